"""Every embedding file people have is read, the broken and hostile are refused by name, ours are read by the others."""

import errno
import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import nn

import model_utils
from model_utils import UserError, load_embedding, save_embedding

ONE, THREE = torch.randn(1, 768, generator=torch.Generator().manual_seed(0)), torch.randn(3, 768)
SDXL = {"clip_l": ONE, "clip_g": torch.randn(1, 1280)}


def write(path, content):
    """As the other programs do: safetensors or a pickle, by the file's name."""
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


# --- What people have -------------------------------------------------------------------------------------------------

FORMATS = {
    "diffusers": ("learned_embeds.safetensors", {"<kat>": ONE}, "<kat>", ONE),
    "diffusers, vectors": ("learned_embeds.safetensors", {"<kat>": THREE}, "<kat>", THREE),
    "diffusers, pickle": ("learned_embeds.bin", {"<kat>": ONE}, "<kat>", ONE),
    "concept library": ("learned_embeds.bin", {"<kat>": ONE[0]}, "<kat>", ONE),
    "DVAR": ("learned_weights_last.bin", {"<kat>": nn.Parameter(ONE)}, "<kat>", ONE),
    "paper": (
        "embeddings.pt",
        {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": nn.ParameterDict({"*": nn.Parameter(THREE)})},
        None,
        THREE,
    ),
    "A1111": (
        "kat.pt",
        {
            "string_to_token": {"*": 265},
            "string_to_param": {"*": ONE},
            "name": "kat",
            "step": 500,
            "sd_checkpoint": None,
            "sd_checkpoint_name": "v1-5",
        },
        "kat",
        ONE,
    ),
    "A1111, inner key": ("kat.pt", {"string_to_param": OrderedDict({"<kat>": ONE})}, "<kat>", ONE),
    "A1111, parameter": ("kat.pt", {"string_to_param": {"*": nn.Parameter(ONE)}, "name": "kat"}, "kat", ONE),
    "kohya": ("kat.pt", {"emb_params": THREE}, None, THREE),
    "kohya, ckpt": ("kat.ckpt", {"emb_params": THREE}, None, THREE),
    "kohya, invoke": ("kat.safetensors", {"emb_params": THREE}, None, THREE),
    "OneTrainer": ("kat.safetensors", {"emp_params": ONE}, None, ONE),
    "OneTrainer, out": ("kat.safetensors", {"emp_params": ONE, "emp_params_out": THREE}, None, ONE),
    "bare tensor": ("kat.pt", THREE, None, THREE),
    "bare 1-D tensor": ("kat.bin", ONE[0].clone(), None, ONE),
    "SDXL": ("kat.safetensors", SDXL, None, ONE),
    "SDXL, pickle": ("kat.pt", SDXL, None, ONE),
    "SDXL, OneTrainer": (
        "kat.safetensors",
        SDXL | {"clip_l_out": THREE, "clip_g_out": torch.zeros(3, 1280)},
        None,
        ONE,
    ),
    "ComfyUI": ("kat.safetensors", {"clip_l": ONE}, None, ONE),
}


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_read(form, tmp_path):
    name, content, token, rows = FORMATS[form]
    path = write(tmp_path / name, content)
    if token is None:
        with pytest.raises(UserError, match=f"--token '<{path.stem}>'"):
            load_embedding(path, dim=768)
    else:
        assert load_embedding(str(path)).token == token
    embedding = load_embedding(path, token="<given>", dim=768)
    assert embedding.token == "<given>"
    assert embedding.rows.dtype == torch.float32
    assert not embedding.rows.requires_grad
    assert torch.equal(embedding.rows, rows)


def test_the_file_is_known_by_what_it_holds_not_by_its_name(tmp_path):
    for written, called in (("a.safetensors", "a.bin"), ("b.bin", "b.safetensors"), ("c.pt", "c.SafeTensors")):
        path = write(tmp_path / written, {"<kat>": ONE}).rename(tmp_path / called)
        assert torch.equal(load_embedding(path).rows, ONE)
    torch.save({"<kat>": ONE}, tmp_path / "2019.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(load_embedding(tmp_path / "2019.pt").rows, ONE)
    for length in (640, 896):  # a header length whose first bytes are those of a pickle
        note = {"x": ""}
        while int.from_bytes(save_and_read(tmp_path / "d.safetensors", note)[:8], "little") < length:
            note["x"] += "."
        assert (tmp_path / "d.safetensors").read_bytes()[0] == 0x80
        assert torch.equal(load_embedding(tmp_path / "d.safetensors").rows, ONE)


def save_and_read(path, metadata):
    save_embedding(path, "<kat>", ONE, "base", metadata)
    return path.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_precision_comes_as_fp32(dtype, tmp_path):
    for name in ("kat.safetensors", "kat.bin"):
        rows = load_embedding(write(tmp_path / name, {"<kat>": ONE.to(dtype)})).rows
        assert rows.dtype == torch.float32
        assert torch.equal(rows, ONE.to(dtype).float())


def test_sdxl_half_that_is_taken_is_said(tmp_path, capsys):
    path = write(tmp_path / "kat.safetensors", SDXL)
    load_embedding(path, "<kat>", dim=768)
    assert "clip_l" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"768 \(Stable Diffusion 1\).*1024 \(Stable Diffusion 2\)"):
        load_embedding(path, "<kat>", dim=1024)
    second = write(tmp_path / "learned_embeds_2.safetensors", {"<kat>": SDXL["clip_g"]})
    with pytest.raises(UserError, match=r"1280 \(SDXL\).*768 \(Stable Diffusion 1\)"):
        load_embedding(second, dim=768)


def test_a_wrong_width_is_refused_with_both(tmp_path):
    path = write(tmp_path / "kat.bin", {"<kat>": torch.zeros(1024)})
    with pytest.raises(UserError, match=r"1024 \(Stable Diffusion 2\).*768 \(Stable Diffusion 1\).*--model"):
        load_embedding(path, dim=768)
    with pytest.raises(UserError, match=r"1024 .*, the model wants 128 \(no common model\)"):
        load_embedding(path, dim=128)


def test_folders_and_hub_ids(tmp_path):
    for name in ("*.nothing", "learned_embeds.bin", "learned_embeds.safetensors"):  # the later is preferred
        rows = torch.randn(1, 8)
        if name != "*.nothing":
            write(tmp_path / name, {"<kat>": rows})
            assert torch.equal(load_embedding(tmp_path).rows, rows)
        else:
            with pytest.raises(UserError, match="holds no learned_embeds.safetensors"):
                load_embedding(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    write(other / "my cat 猫.pt", {"<kat>": rows})
    assert torch.equal(load_embedding(str(other)).rows, rows)
    write(other / "my dog.pt", {"<dog>": rows})
    with pytest.raises(UserError, match="name the file itself"):
        load_embedding(other)
    with pytest.raises(UserError, match="no such file or folder"):
        load_embedding(tmp_path / "missing.safetensors")
    with pytest.raises(UserError, match="sd-concepts-library/no-such-thing: no such folder here"):
        load_embedding("sd-concepts-library/no-such-thing")


def test_hub_ids_fall_back_to_the_pickle(tmp_path, monkeypatch):
    write(tmp_path / "learned_embeds.bin", {"<cat-toy>": ONE[0]})
    asked = []

    def download(repo, filename, revision=None):
        asked.append((repo, filename))
        if filename.endswith(".safetensors"):
            raise OSError("404")
        return str(tmp_path / filename)

    monkeypatch.setattr(model_utils.huggingface_hub, "hf_hub_download", download)
    assert load_embedding("sd-concepts-library/cat-toy").token == "<cat-toy>"
    assert [repo for repo, _ in asked] == ["sd-concepts-library/cat-toy"] * 2


# --- What is broken, and what is hostile ------------------------------------------------------------------------------


class Hostile:
    """Unpickled by a careless reader, it makes the folder that it names."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def hostile_files(tmp_path, harm):
    parameters = nn.ParameterDict({"*": nn.Parameter(ONE)})
    parameters.forward = Hostile(harm)
    for name, content in {
        "plain": {"<kat>": ONE, "x": Hostile(harm)},
        "a1111": {"string_to_param": {"*": Hostile(harm)}, "name": "kat"},
        "paper": {"string_to_param": parameters},
        "whole": Hostile(harm),
    }.items():
        torch.save(content, tmp_path / f"{name}.pt")
        yield tmp_path / f"{name}.pt"
    torch.save({"<kat>": ONE, "x": Hostile(harm)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    yield tmp_path / "old.bin"
    for protocol in range(6):
        (tmp_path / f"{protocol}.safetensors").write_bytes(pickle.dumps(Hostile(harm), protocol))
        yield tmp_path / f"{protocol}.safetensors"


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_strangers_pickle_runs_no_code(tmp_path):
    harm = tmp_path / "harm"
    for path in hostile_files(tmp_path, harm):
        with pytest.raises(UserError, match="--embedding"):
            load_embedding(path, token="<kat>")
        assert not harm.exists(), path
    pickle.loads(path.read_bytes())  # a careless reader
    assert harm.exists()


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3819\n", "git-lfs pointer"),
        (b"<!DOCTYPE html>\n<html><head><title>404</title>", "web page"),
        (b"\n  <HTML lang=en>", "web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "web page"),
        (b"", "0 bytes"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "PNG"),
        (b'{"error": "not found"}', "no embedding file"),
        (b"PK\x03\x04 and then nothing", "damaged"),
        (b"\x80\x02 and then nothing", "damaged"),
        ((50).to_bytes(8, "little") + b"{not json", "damaged"),
        ((2**63).to_bytes(8, "little") + b"{}", "damaged"),
    ],
)
def test_what_is_no_embedding_is_called_by_its_name(data, what, tmp_path):
    path = tmp_path / "learned_embeds.bin"
    path.write_bytes(data)
    with pytest.raises(UserError, match=what):
        load_embedding(tmp_path)


@pytest.mark.parametrize("name", ["kat.safetensors", "kat.bin"])
def test_a_cut_off_file_is_refused(name, tmp_path):
    path = write(tmp_path / name, {"<kat>": THREE})
    whole = path.read_bytes()
    for length in (1, 7, 9, 30, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="damaged|no embedding file"):
            load_embedding(path)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_are_refused(wrong, tmp_path):
    rows = THREE.clone()
    rows[1, 5] = wrong
    for name in ("kat.safetensors", "kat.bin"):
        with pytest.raises(UserError, match="NaN or infinite"):
            load_embedding(write(tmp_path / name, {"<kat>": rows}))
    with pytest.raises(UserError, match="NaN or infinite"):  # finite in the file, not in fp32
        load_embedding(write(tmp_path / "kat.pt", {"<kat>": torch.full((1, 8), 1e300, dtype=torch.float64)}))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({"<kat>": torch.zeros(76, 768)}, "76 vectors"),
        ({"<kat>": torch.zeros(1, 1).expand(10**9, 10**6)}, "1000000000 vectors"),  # 4 bytes that claim petabytes
        ({"<kat>": torch.zeros(0, 768)}, "not rows"),
        ({"<kat>": torch.zeros(1, 1, 768)}, "not rows"),
        ({"<kat>": torch.tensor(1.0)}, "not rows"),
        ({"<kat>": torch.zeros(1, 768, dtype=torch.int64)}, "not rows"),
        ({"<kat>": torch.zeros(1, 768).to_sparse()}, "not rows"),
        ({"<kat>": torch.zeros(1, 768, device="meta")}, "not rows"),
        ({}, "holds"),
        ([ONE], "no embedding of one word"),
        ("a string", "no embedding of one word"),
        ({"<kat>": "a string"}, "no embedding of one word"),
        ({"emb_params": "a string"}, "no embedding of one word"),
        ({"<kat>": {"<kat>": ONE}}, "no embedding of one word"),
        ({"<kat>": ONE, "<dog>": ONE}, "'<kat>', '<dog>'"),
        ({"string_to_param": {"*": ONE, "+": ONE}}, "no embedding of one word"),
        ({"string_to_param": ONE}, "no embedding of one word"),
        ({"string_to_param": {"*": ONE}, "name": 5}, "--token"),
        ({5: ONE}, "--token"),
        ({f"{part}{i:02}": ONE for part in ("IN", "OUT") for i in range(8)}, "IN00"),  # XTI: a row for each layer
    ],
)
def test_what_is_not_one_word_is_refused(content, what, tmp_path):
    with pytest.raises(UserError, match=what):
        load_embedding(write(tmp_path / "kat.pt", content))


def test_numbers_that_are_claimed_and_not_there_are_refused(tmp_path):
    torch.save({"<kat>": torch.zeros(1).expand(75, 10**12)}, tmp_path / "kat.bin")  # 2 KB that unfold to 300 TB
    with pytest.raises(UserError, match="holds fewer"):
        load_embedding(tmp_path / "kat.bin")


def test_a_file_may_say_nothing_of_itself(tmp_path):
    header = json.dumps(
        {"__metadata__": None, "<kat>": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    ).encode()
    (tmp_path / "kat.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert load_embedding(tmp_path / "kat.safetensors").metadata == {}


def test_absurd_sizes_are_refused_unread(tmp_path, monkeypatch):
    big = tmp_path / "model.safetensors"
    with open(big, "wb") as file:
        file.truncate(4 << 30)  # a hole: takes no room on the disk
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda path: pytest.fail("it was read"))
        with pytest.raises(UserError, match="4096 MB"):
            load_embedding(big)
    buffer = io.BytesIO()
    torch.save({"<kat>": ONE}, buffer)
    bomb = tmp_path / "bomb.bin"
    with (
        zipfile.ZipFile(buffer) as small,
        zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as large,
    ):
        for entry in small.namelist():
            large.writestr(entry, bytes(80 << 20) if entry.endswith("data/0") else small.read(entry))
    assert bomb.stat().st_size < 1 << 20
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was unpacked"))
    with pytest.raises(UserError, match="80 MB"):
        load_embedding(bomb)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = write(tmp_path / "kat.bin", {"<kat>": ONE})

    def refuse(_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match="Permission denied"):
        load_embedding(path)


# --- What we write ----------------------------------------------------------------------------------------------------


def test_saved_file_is_one_key_with_its_metadata_and_always_the_same(tmp_path):
    path = tmp_path / "new" / "folder" / "learned_embeds.safetensors"
    note = {"step": 300, "initializer_token": "cat", "seed": 0, "loss": 0.1, "learnable_property": "object"}
    save_embedding(path, "<kätzchen>", nn.Parameter(THREE.double()), "owner/model", note)
    first = path.read_bytes()
    save_embedding(path, "<kätzchen>", THREE, "owner/model", note)
    assert path.read_bytes() == first
    assert list(path.parent.iterdir()) == [path]
    with safetensors.safe_open(path, "pt") as file:
        assert list(file.keys()) == ["<kätzchen>"]
        assert torch.equal(file.get_tensor("<kätzchen>"), THREE)
        metadata = file.metadata()
    expected = {"format": "pt", "base_model": "owner/model"} | {key: str(value) for key, value in note.items()}
    assert metadata == load_embedding(path).metadata == expected
    assert list(load_embedding(path).metadata) == list(expected)  # safetensors' own writer shuffles them
    assert load_embedding(path).token == "<kätzchen>"


def test_saved_bin_is_the_form_of_2022(tmp_path):
    for rows, shape in ((ONE, (768,)), (THREE, (3, 768))):
        save_embedding(tmp_path / "learned_embeds.bin", "<kat>", rows, "owner/model", bin=True)
        content = torch.load(tmp_path / "learned_embeds.bin", weights_only=True)
        assert list(content.keys()) == ["<kat>"]
        assert type(content["<kat>"]) is torch.Tensor  # A1111 takes nothing else
        assert content["<kat>"].shape == shape
        assert content["<kat>"].dtype == torch.float32
        assert torch.equal(load_embedding(tmp_path).rows, rows)
        first = (tmp_path / "learned_embeds.bin").read_bytes()
        save_embedding(tmp_path / "other.bin", "<kat>", rows, "owner/model", bin=True)
        assert (tmp_path / "other.bin").read_bytes() == first
        assert len(first) < 20_000  # a row of a table must not bring the table along
        (tmp_path / "other.bin").unlink()
    save_embedding(tmp_path / "view.bin", "<kat>", torch.randn(1000, 768)[5:6], "owner/model", bin=True)
    assert (tmp_path / "view.bin").stat().st_size < 20_000


@pytest.mark.parametrize("bin", [False, True])
@pytest.mark.parametrize("num_vectors", [1, 3])
def test_diffusers_loads_it_and_reads_the_same_sentence(num_vectors, bin, tiny_model, tmp_path):
    rows = torch.randn(num_vectors, 32, generator=torch.Generator().manual_seed(0))
    name = "learned_embeds.bin" if bin else "learned_embeds.safetensors"
    save_embedding(tmp_path / name, "<kat>", rows, tiny_model, bin=bin)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
    pipeline.load_textual_inversion(str(tmp_path))
    prompts = ["a photo of <kat> on a red background", "two cat"]
    theirs, _ = pipeline.encode_prompt(prompts, "cpu", 1, False)

    tokenizer = model_utils.load_tokenizer(tiny_model)
    text_encoder = model_utils.load_text_encoder(tiny_model, "cpu")
    embedding = load_embedding(tmp_path, dim=32)
    token_ids = model_utils.add_placeholder(tokenizer, embedding.token, len(embedding.rows))
    model_utils.install_learned_rows(text_encoder, token_ids, embedding.rows)
    ours = model_utils.encode_tokens(text_encoder, model_utils.tokenize(tokenizer, prompts, {"<kat>": token_ids}))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    plain = model_utils.load_text_encoder(tiny_model, "cpu")
    assert not torch.allclose(model_utils.encode_tokens(plain, model_utils.tokenize(tokenizer, ["a cat"])), ours[:1])


def fail_with(code):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize(
    ("where", "code", "said"),
    [
        ("fsync", errno.ENOSPC, "No space left on device"),
        ("replace", errno.EROFS, "Read-only file system"),
        ("fsync", errno.EIO, "Input/output error"),
    ],
)
def test_a_write_that_fails_leaves_what_was_there(where, code, said, tmp_path, monkeypatch):
    path = tmp_path / "learned_embeds.safetensors"
    save_embedding(path, "<kat>", ONE, "owner/model")
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, where, fail_with(code))
        with pytest.raises(UserError, match=f"learned_embeds.safetensors .{said}.*--output_dir"):
            save_embedding(path, "<kat>", THREE, "owner/model")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    save_embedding(path, "<kat>", THREE, "owner/model")
    assert torch.equal(load_embedding(path).rows, THREE)


def test_a_full_disk(tmp_path, monkeypatch):
    """/dev/full answers every write with 'no space left'."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    path = tmp_path / "learned_embeds.bin"
    path.write_bytes(b"what was there")
    monkeypatch.setattr("builtins.open", lambda name, mode, real=open: real("/dev/full", mode))
    with pytest.raises(UserError, match="No space left on device"):
        save_embedding(path, "<kat>", ONE, "owner/model", bin=True)
    monkeypatch.undo()
    assert path.read_bytes() == b"what was there"


def test_a_place_that_is_none(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        save_embedding(tmp_path / "file" / "learned_embeds.bin", "<kat>", ONE, "owner/model", bin=True)
    (tmp_path / "learned_embeds.bin").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        save_embedding(tmp_path / "learned_embeds.bin", "<kat>", ONE, "owner/model", bin=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "learned_embeds.bin"]


def test_a_kill_between_write_and_move_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    model_utils.atomic_write(path, lambda buffer: buffer.write(b"old"))

    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", kill)
        with pytest.raises(KeyboardInterrupt):
            model_utils.atomic_write(path, lambda buffer: buffer.write(b"new"))
    assert path.read_bytes() == b"old"
    model_utils.atomic_write(path, lambda buffer: buffer.write(b"newer"))
    assert path.read_bytes() == b"newer"
    assert list(tmp_path.iterdir()) == [path]  # the half-done one was written over and moved
