"""Every embedding file people have is read, the damaged and hostile are refused, ours are read by diffusers."""

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

import model_utils as mu
import sample
from model_utils import UserError, load_embedding, save_embedding

ONE, THREE = (torch.randn(n, 768, generator=torch.Generator().manual_seed(n)) for n in (1, 3))
SDXL = {"clip_l": ONE, "clip_g": torch.ones(1, 1280)}
BOTH = ["kat.safetensors", "kat.bin"]


def write(path, content):
    """As other programs do: safetensors or a pickle, by the file's name."""
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


# --- What people have -------------------------------------------------------------------------------------------------

A1111 = {
    "string_to_token": {"*": 265},
    "string_to_param": {"*": ONE},
    "name": "kat",
    "step": 500,
    "sd_checkpoint": None,
}
PAPER = {
    "string_to_token": {"*": torch.tensor(265)},
    "string_to_param": nn.ParameterDict({"*": nn.Parameter(THREE)}),
}
FORMATS = {  # name, content, token that it names, rows
    "diffusers": ("learned_embeds.safetensors", {"<kat>": ONE}, "<kat>", ONE),
    "diffusers, vectors": ("learned_embeds.safetensors", {"<kat>": THREE}, "<kat>", THREE),
    "diffusers, pickle": ("learned_embeds.bin", {"<kat>": ONE}, "<kat>", ONE),
    "concept library": ("learned_embeds.bin", {"<kat>": ONE[0]}, "<kat>", ONE),
    "DVAR": ("learned_weights_last.bin", {"<kat>": nn.Parameter(ONE)}, "<kat>", ONE),
    "paper": ("embeddings.pt", PAPER, None, THREE),
    "A1111": ("kat.pt", A1111, "kat", ONE),
    "A1111, inner key": ("kat.pt", {"string_to_param": OrderedDict({"<kat>": ONE})}, "<kat>", ONE),
    "A1111, parameter": ("kat.pt", {"string_to_param": {"*": nn.Parameter(ONE)}, "name": "kat"}, "kat", ONE),
    "kohya": ("kat.pt", {"emb_params": THREE}, None, THREE),
    "kohya, InvokeAI": ("kat.safetensors", {"emb_params": THREE}, None, THREE),
    "OneTrainer": ("kat.safetensors", {"emp_params": ONE, "emp_params_out": THREE}, None, ONE),
    "bare tensor": ("kat.ckpt", THREE, None, THREE),
    "bare 1-D tensor": ("kat.bin", ONE[0].clone(), None, ONE),
    "SDXL": ("kat.safetensors", SDXL, None, ONE),
    "SDXL, pickle": ("kat.pt", SDXL, None, ONE),
    "SDXL, OneTrainer": ("kat.safetensors", SDXL | {"clip_l_out": THREE, "clip_g_out": torch.zeros(3, 8)}, None, ONE),
    "ComfyUI": ("kat.safetensors", {"clip_l": ONE}, None, ONE),
}


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_read(form, tmp_path):
    name, content, token, rows = FORMATS[form]
    path = write(tmp_path / name, content)
    if token is None:
        with pytest.raises(UserError, match="--token '<my-cat>'"):
            load_embedding(path, dim=768)
    else:
        assert load_embedding(str(path)).token == token
    embedding = load_embedding(path, token="<given>", dim=768)
    assert embedding.token == "<given>"
    assert embedding.rows.dtype == torch.float32 and not embedding.rows.requires_grad
    assert torch.equal(embedding.rows, rows)


def test_the_content_tells_the_format_not_the_name(tmp_path):
    for written, called in (("a.safetensors", "a.bin"), ("b.bin", "b.safetensors"), ("c.pt", "c.SafeTensors")):
        path = write(tmp_path / written, {"<kat>": ONE}).rename(tmp_path / called)
        assert torch.equal(load_embedding(path).rows, ONE)
    torch.save({"<kat>": ONE}, tmp_path / "2019.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(load_embedding(tmp_path / "2019.pt").rows, ONE)
    header = json.dumps({"<kat>": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "__metadata__": None})
    header = header.ljust(0x180).encode()  # the length's first byte is that of a pickle
    (tmp_path / "d.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert load_embedding(tmp_path / "d.safetensors").metadata == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", BOTH)
def test_every_precision_is_read_as_fp32(dtype, name, tmp_path):
    rows = load_embedding(write(tmp_path / name, {"<kat>": ONE.to(dtype)})).rows
    assert rows.dtype == torch.float32 and torch.equal(rows, ONE.to(dtype).float())


@pytest.mark.parametrize(
    "content, dim, named",
    [
        ({"<kat>": torch.zeros(1024)}, 768, r"1024 \(Stable Diffusion 2\).*768 \(Stable Diffusion 1\).*--model"),
        ({"<kat>": torch.zeros(1024)}, 128, r"1024 .*, the model wants 128 \(no common model\)"),
        ({"<kat>": SDXL["clip_g"]}, 768, r"1280 \(SDXL\).*768 \(Stable Diffusion 1\)"),
        (SDXL, 1024, r"768 \(Stable Diffusion 1\).*1024 \(Stable Diffusion 2\)"),
    ],
)
def test_a_wrong_width_is_refused_with_both_models(content, dim, named, tmp_path, capsys):
    with pytest.raises(UserError, match=named):
        load_embedding(write(tmp_path / "kat.safetensors", content), "<kat>", dim)
    assert ("taken: clip_l" in capsys.readouterr().err) == (content is SDXL)


def test_a_folder_is_searched_for_its_embedding(tmp_path):
    with pytest.raises(UserError, match="holds no learned_embeds.safetensors"):
        load_embedding(tmp_path)
    for name in ("my cat 猫.pt", "learned_embeds.bin", "learned_embeds.safetensors"):  # each is preferred to the last
        rows = torch.randn(1, 8)
        write(tmp_path / name, {"<kat>": rows})
        assert torch.equal(load_embedding(str(tmp_path)).rows, rows)
    two = tmp_path / "two"
    two.mkdir()
    for name in ("a.pt", "b.pt"):
        write(two / name, {"<kat>": rows})
    with pytest.raises(UserError, match="name the file itself"):
        load_embedding(two)
    with pytest.raises(UserError, match="no such file or folder"):
        load_embedding(tmp_path / "missing.safetensors")


def test_a_hub_id_is_downloaded_as_safetensors_or_else_as_pickle(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="sd-concepts-library/no-such-thing: no such folder here"):
        load_embedding("sd-concepts-library/no-such-thing")
    write(tmp_path / "learned_embeds.bin", {"<cat-toy>": ONE[0]})
    asked = []

    def download(repo, filename, revision=None):
        asked.append((repo, filename))
        if filename.endswith(".safetensors"):
            raise OSError("404")
        return str(tmp_path / filename)

    monkeypatch.setattr(mu.huggingface_hub, "hf_hub_download", download)
    repo = "sd-concepts-library/cat-toy"
    assert load_embedding(repo).token == "<cat-toy>"
    assert asked == [(repo, "learned_embeds.safetensors"), (repo, "learned_embeds.bin")]


# --- Damaged and hostile files ----------------------------------------------------------------------------------------


class Hostile:
    """When unpickled by a careless reader, it makes the folder that it names."""

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
    }.items():
        yield write(tmp_path / f"{name}.pt", content)
    torch.save({"<kat>": ONE, "x": Hostile(harm)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    yield tmp_path / "old.bin"
    for protocol in range(6):
        (tmp_path / f"{protocol}.safetensors").write_bytes(pickle.dumps(Hostile(harm), protocol))
        yield tmp_path / f"{protocol}.safetensors"


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_hostile_pickle_runs_no_code(tmp_path):
    harm = tmp_path / "harm"
    for path in hostile_files(tmp_path, harm):
        with pytest.raises(UserError, match="--embedding"):
            load_embedding(path, token="<kat>")
        assert not harm.exists(), path
    pickle.loads(path.read_bytes())  # a careless reader
    assert harm.exists()


@pytest.mark.parametrize(
    "content, named",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3819\n", "git-lfs pointer"),
        (b"<!DOCTYPE html>\n<html><head><title>404</title>", "web page"),
        (b"\n  <HTML lang=en>", "web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "web page"),
        (b"", "0 bytes"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "damaged"),
        (b"GIF89a" + bytes(50), "begins with b'GIF89a"),
        (b'{"error": "not found"}', "no embedding file"),
        (b"PK\x03\x04 and then nothing", "damaged"),
        (b"\x80\x02 and then nothing", "damaged"),
        ((50).to_bytes(8, "little") + b"{not json", "damaged"),
        ((2**63).to_bytes(8, "little") + b"{}", "damaged"),
    ],
)
def test_what_is_no_embedding_is_called_by_its_name(content, named, tmp_path):
    (tmp_path / "learned_embeds.bin").write_bytes(content)
    with pytest.raises(UserError, match=named):
        load_embedding(tmp_path)


@pytest.mark.parametrize("name", BOTH)
def test_a_truncated_file_is_refused(name, tmp_path):
    path = write(tmp_path / name, {"<kat>": THREE})
    content = path.read_bytes()
    for length in (1, 7, 9, 30, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="damaged|no embedding file"):
            load_embedding(path)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -1e300])  # the last is finite in the file, not in fp32
@pytest.mark.parametrize("name", BOTH)
def test_numbers_that_are_not_finite_are_refused(wrong, name, tmp_path):
    rows = THREE.double()
    rows[1, 5] = wrong
    with pytest.raises(UserError, match="NaN or infinite"):
        load_embedding(write(tmp_path / name, {"<kat>": rows}))


@pytest.mark.parametrize(
    "content, named",
    [
        ({"<kat>": torch.zeros(76, 768)}, r"\[76, 768\], not 1 to 75 rows"),
        ({"<kat>": torch.zeros(1, 1).expand(10**9, 10**6)}, "not 1 to 75 rows"),  # 4 bytes that claim petabytes
        ({"<kat>": torch.zeros(1).expand(75, 10**12)}, "not 1 to 75 rows"),  # 2 KB that unfold to 300 TB
        ({"<kat>": torch.zeros(0, 768)}, "not 1 to 75 rows"),
        ({"<kat>": torch.zeros(1, 1, 768)}, "not 1 to 75 rows"),
        ({"<kat>": torch.tensor(1.0)}, "not 1 to 75 rows"),
        ({"<kat>": torch.zeros(1, 768, dtype=torch.int64)}, "torch.int64"),
        ({}, "holds"),
        ([ONE], "no embedding of one token"),
        ("a string", "no embedding of one token"),
        ({"<kat>": "a string"}, "no embedding of one token"),
        ({"emb_params": "a string"}, "no embedding of one token"),
        ({"<kat>": {"<kat>": ONE}}, "no embedding of one token"),
        ({"<kat>": ONE, "<dog>": ONE}, "'<kat>', '<dog>'"),
        ({"string_to_param": {"*": ONE, "+": ONE}}, "no embedding of one token"),
        ({"string_to_param": ONE}, "no embedding of one token"),
        ({"string_to_param": {"*": ONE}, "name": 5}, "--token"),
        ({"string_to_param": {"*": ONE}, "name": torch.ones(2)}, "--token"),
        ({5: ONE}, "--token"),
        ({f"{part}{i:02}": ONE for part in ("IN", "OUT") for i in range(8)}, "IN00"),  # XTI: a row for each layer
    ],
)
def test_what_is_not_the_rows_of_one_token_is_refused(content, named, tmp_path):
    with pytest.raises(UserError, match=named):
        load_embedding(write(tmp_path / "kat.pt", content))


def test_huge_files_and_zip_bombs_are_refused_unread(tmp_path, monkeypatch):
    big = tmp_path / "model.safetensors"
    with open(big, "wb") as file:
        file.truncate(4 << 30)  # a hole: takes no room on the disk
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda path: pytest.fail("it was read"))
        with pytest.raises(UserError, match="4096 MB"):
            load_embedding(big)
    plain, bomb = io.BytesIO(), tmp_path / "bomb.bin"
    torch.save({"<kat>": ONE}, plain)
    with zipfile.ZipFile(plain) as small, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as large:
        for entry in small.namelist():
            large.writestr(entry, bytes(80 << 20) if entry.endswith("data/0") else small.read(entry))
    assert bomb.stat().st_size < 1 << 20
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was unpacked"))
    with pytest.raises(UserError, match="nothing in it was run") as error:
        load_embedding(bomb)
    assert "too large" in str(error.value.__cause__)


def fail_with(code):
    def fail(*_):
        raise OSError(code, os.strerror(code), "kat.bin")

    return fail


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "kat.bin", {"<kat>": ONE})
    monkeypatch.setattr(Path, "read_bytes", fail_with(errno.EACCES))
    with pytest.raises(SystemExit):
        sample.main(["--embedding", str(path)])
    assert "error: kat.bin: Permission denied; check the path" in capsys.readouterr().err


# --- What we write ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, shape", [(ONE, (768,)), (THREE, (3, 768)), (torch.zeros(1000, 768)[5:6], (768,))])
def test_saved_files_hold_one_plain_fp32_tensor_and_are_always_the_same(rows, shape, tmp_path):
    """A single vector is 1-D, as in the concept library and as InvokeAI wants it; A1111 takes no nn.Parameter."""
    paths = [tmp_path / "new" / "folder" / f"learned_embeds.{suffix}" for suffix in ("safetensors", "bin")]
    for path in paths:
        save_embedding(path, "<kätzchen>", nn.Parameter(rows.double()), "owner/model")
        content = path.read_bytes()
        save_embedding(path, "<kätzchen>", rows, "owner/model")
        assert path.read_bytes() == content and len(content) < 20_000  # a row does not bring its table along
        assert load_embedding(path).token == "<kätzchen>" and torch.equal(load_embedding(path).rows, rows)
    with safetensors.safe_open(paths[0], "pt") as file:
        assert file.metadata() == load_embedding(paths[0]).metadata == {"base_model": "owner/model"}
        tensors = [{key: file.get_tensor(key) for key in file.keys()}, torch.load(paths[1], weights_only=True)]
    for content in tensors:
        assert list(content) == ["<kätzchen>"] and type(content["<kätzchen>"]) is torch.Tensor
        assert content["<kätzchen>"].shape == shape and content["<kätzchen>"].dtype == torch.float32
    assert sorted(paths) == sorted(paths[0].parent.iterdir())


@pytest.mark.parametrize("name", ["learned_embeds.safetensors", "learned_embeds.bin"])
@pytest.mark.parametrize("num_vectors", [1, 3])
def test_diffusers_loads_it_and_encodes_the_same_prompts(num_vectors, name, tiny_model, tmp_path):
    rows = torch.randn(num_vectors, 32, generator=torch.Generator().manual_seed(0))
    save_embedding(tmp_path / name, "<kat>", rows, tiny_model)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model, low_cpu_mem_usage=False)
    pipeline.load_textual_inversion(str(tmp_path))
    prompts = ["a photo of <kat> on a red background", "two cat"]
    theirs, _ = pipeline.encode_prompt(prompts, "cpu", 1, False)
    components = mu.load_components(tiny_model, embeddings=[(tmp_path, None)])
    token_ids = mu.tokenize(components.tokenizer, prompts, components.placeholders)
    ours = mu.encode_tokens(components.text_encoder, token_ids)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "function, code, named",
    [
        ("fsync", errno.ENOSPC, "No space left on device"),
        ("replace", errno.EROFS, "Read-only file system"),
    ],
)
def test_a_write_that_fails_leaves_the_old_file(function, code, named, tmp_path, monkeypatch):
    path = tmp_path / "learned_embeds.safetensors"
    save_embedding(path, "<kat>", ONE, "owner/model")
    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail_with(code))
        with pytest.raises(UserError, match=f"learned_embeds.safetensors .{named}.*name another folder"):
            save_embedding(path, "<kat>", THREE, "owner/model")
    assert torch.equal(load_embedding(path).rows, ONE) and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "learned_embeds.bin").mkdir()
    for path in (tmp_path / "file" / "learned_embeds.bin", tmp_path / "learned_embeds.bin"):
        with pytest.raises(UserError, match="cannot write"):
            save_embedding(path, "<kat>", ONE, "owner/model")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "learned_embeds.bin"]


def test_a_kill_between_write_and_move_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    mu.atomic_write(path, lambda buffer: buffer.write(b"old"))

    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", kill)
        with pytest.raises(KeyboardInterrupt):
            mu.atomic_write(path, lambda buffer: buffer.write(b"new"))
    assert path.read_bytes() == b"old"
    mu.atomic_write(path, lambda buffer: buffer.write(b"newer"))
    assert path.read_bytes() == b"newer" and list(tmp_path.iterdir()) == [path]  # no temporary file is left


def test_a_link_in_place_of_the_temporary_file_is_not_followed(tmp_path):
    (tmp_path / "other").write_bytes(b"of somebody else")
    (tmp_path / ".state.pt.tmp").symlink_to(tmp_path / "other")
    mu.atomic_write(tmp_path / "state.pt", lambda buffer: buffer.write(b"new"))
    assert (tmp_path / "other").read_bytes() == b"of somebody else"
    assert (tmp_path / "state.pt").read_bytes() == b"new" and not (tmp_path / "state.pt").is_symlink()
