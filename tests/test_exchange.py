"""Embedding files to and from other programs, by readers written to their rules, and what prompts say of them."""

import base64
import json
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

import model_utils as mu
import sample

ONE, EIGHT = (torch.randn(n, 768, generator=torch.Generator().manual_seed(n)) for n in (1, 8))


# --- Other programs' rules --------------------------------------------------------------------------------------------


def check_as_a1111(path):
    """Stable Diffusion web UI's check of a pickle, of 2022 and still: names of files in the zip, then of classes."""
    allowed = {"collections": ["OrderedDict"], "torch._utils": ["_rebuild_tensor_v2", "_rebuild_parameter"]}
    allowed["torch"] = ["FloatStorage", "HalfStorage", "IntStorage", "LongStorage", "DoubleStorage"]

    class Restricted(pickle.Unpickler):
        def persistent_load(self, saved_id):
            assert saved_id[0] == "storage"
            return torch.storage.TypedStorage(_internal=True)

        def find_class(self, module, name):
            assert name in allowed.get(module, []), f"global '{module}/{name}' is forbidden"
            return super().find_class(module, name)

    with zipfile.ZipFile(path) as file:
        for name in file.namelist():
            assert re.match(r"^([^/]+)/((data/\d+)|version|(data\.pkl))$", name), f"bad file inside {path}: {name}"
        Restricted(file.open(next(name for name in file.namelist() if name.endswith("/data.pkl")))).load()


def load_raw(path):
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def read_as_a1111(path):
    """-> its name in prompts, rows [n, dim]."""
    if path.suffix != ".safetensors":
        check_as_a1111(path)
    content = load_raw(path)
    content = content.get("string_to_param", content)
    assert len(content) == 1
    (rows,) = content.values()
    assert type(rows) is torch.Tensor
    if rows.dim() == 1:
        assert "string_to_param" not in load_raw(path)
        rows = rows[None]
    return path.stem, rows


def read_as_comfyui(path):
    content = load_raw(path)
    rows = next(iter(content.get("string_to_param", content).values()))
    return f"embedding:{path.stem}", rows.reshape(-1, rows.shape[-1])


def read_as_invokeai(path):
    """The width is looked up before the rows are read, and must be that of a model it knows."""
    content = load_raw(path)
    if "string_to_token" in content:
        rows = next(iter(content["string_to_param"].values()))
        width = rows.shape[-1]
    elif "emb_params" in content:
        rows = content["emb_params"]
        width = rows.shape[-1]
    else:
        rows = next(iter(content.values()))
        width = rows.shape[0]
    if width not in (768, 1024, 1280):
        raise ValueError(f"unrecognized token dimension {width}")
    return path.stem, rows.reshape(-1, rows.shape[-1])


def read_as_diffusers(path):
    (content,) = diffusers.loaders.textual_inversion.load_textual_inversion_state_dicts([str(path)])
    load = diffusers.loaders.TextualInversionLoaderMixin._retrieve_tokens_and_embeddings
    tokenizer = type("Tokenizer", (), {"get_vocab": lambda self: {}})()
    (token,), (rows,) = load([None], [content], tokenizer)
    return token, rows.reshape(-1, rows.shape[-1])


READERS = {
    "A1111": (read_as_a1111, "my kat"),
    "ComfyUI": (read_as_comfyui, "embedding:my kat"),
    "InvokeAI": (read_as_invokeai, "my kat"),
    "diffusers": (read_as_diffusers, "<kat>"),
    "ours": (mu.load_embedding, "<kat>"),
}


# --- Files that we write ----------------------------------------------------------------------------------------------


@pytest.fixture
def export(tmp_path, capsys):
    """export(rows, name) writes them as <kat> and exports that with sample.py -> path, output."""

    def run(rows, name):
        mu.save_embedding(tmp_path / "run" / "learned_embeds.safetensors", "<kat>", rows, "owner/model")
        sample.main(["--embedding", str(tmp_path / "run"), "--export", str(tmp_path / name)])
        return tmp_path / name, "".join(capsys.readouterr())

    return run


@pytest.mark.parametrize("rows, suffix", [(ONE, ".safetensors"), (ONE, ".pt"), (EIGHT, ".pt")])
@pytest.mark.parametrize("program", READERS)
def test_an_exported_embedding_is_read_by_every_program(export, program, rows, suffix):
    path, said = export(rows, f"my kat{suffix}")
    reader, name = READERS[program]
    token, found = reader(path)[:2]
    assert token == name and found.dtype == torch.float32 and torch.equal(found, rows)
    assert "embedding:my kat" in said and "InvokeAI" not in said


def test_several_vectors_in_safetensors_are_read_by_all_but_invokeai_which_is_said(export):
    path, said = export(EIGHT, "kat.safetensors")
    for program in ("A1111", "ComfyUI", "diffusers", "ours"):
        assert torch.equal(READERS[program][0](path)[1], EIGHT)
    with pytest.raises(ValueError, match="unrecognized"):
        read_as_invokeai(path)
    assert "InvokeAI" in said


def test_export_overwrites_nothing_and_names_what_it_needs(export, tmp_path, capsys):
    path, _ = export(ONE, "kat.pt")
    before = path.read_bytes()
    for argv in (["--export", str(path)], ["--export", "kat.ckpt"], ["--export", "b.pt", "--embedding", str(path)]):
        with pytest.raises(SystemExit):
            sample.main(["--embedding", str(tmp_path / "run"), *argv])
        assert "--export" in capsys.readouterr().err
    assert path.read_bytes() == before and not Path("b.pt").exists()


@pytest.mark.parametrize("rows", [ONE, EIGHT])
def test_saved_pickles_pass_a1111s_check_and_are_always_the_same(rows, tmp_path):
    path = tmp_path / "learned_embeds.bin"
    mu.save_embedding(path, "<kat>", rows, "owner/model")
    first = path.read_bytes()
    mu.save_embedding(path, "<kat>", rows, "owner/model")
    assert path.read_bytes() == first
    with zipfile.ZipFile(path) as file:
        assert {entry.date_time[0] for entry in file.infolist()} == {1980}  # no file has the time of its writing
    for program in ("A1111", "ComfyUI", "diffusers", "ours"):
        assert torch.equal(READERS[program][0](path)[1], rows)
    torch.save({"<kat>": rows}, path)  # as it comes from PyTorch 2
    with pytest.raises(AssertionError, match="bad file inside"):
        check_as_a1111(path)


# --- Files of others --------------------------------------------------------------------------------------------------


def save_a1111_png(path, content, size=(64, 64)):
    """An image with an embedding in its text, as the web UI writes it."""
    text = json.dumps(content, default=lambda tensor: {"TORCHTENSOR": tensor.tolist()})
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("sd-ti-embedding", base64.b64encode(text.encode()))
    Image.new("RGB", size, "red").save(path, pnginfo=chunks)
    return path


def test_an_embedding_in_a_png_is_read(tmp_path):
    content = {"string_to_token": {"*": 265}, "string_to_param": {"*": EIGHT}, "name": "kat", "step": 500}
    embedding = mu.load_embedding(save_a1111_png(tmp_path / "kat-500.png", content), dim=768)
    assert embedding.token == "kat" and torch.equal(embedding.rows, EIGHT)


def test_a_png_without_an_embedding_or_with_a_damaged_one_is_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    with pytest.raises(mu.UserError, match="no embedding file"):
        mu.load_embedding(tmp_path / "photo.png")
    deep = {"a": 1}
    for _ in range(200):
        deep = {"a": deep}
    for i, content in enumerate(
        [deep, {"string_to_param": {"*": {"TORCHTENSOR": [[1.0], [1.0, 2.0]]}}}, {"TORCHTENSOR": "x"}, [1]]
    ):
        with pytest.raises(mu.UserError, match="--embedding"):
            mu.load_embedding(save_a1111_png(tmp_path / f"{i}.png", content), "<kat>")
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("sd-ti-embedding", base64.b64encode(b"[" * 100_000))
    Image.new("RGB", (8, 8)).save(tmp_path / "nested.png", pnginfo=chunks)
    with pytest.raises(mu.UserError, match="damaged"):
        mu.load_embedding(tmp_path / "nested.png")


@pytest.mark.parametrize("name", ["two.safetensors", "two.bin"])
def test_one_of_several_tokens_is_chosen_by_its_name(name, tmp_path):
    content, path = {"<kat>": ONE, "<pup>": EIGHT}, tmp_path / name
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    assert torch.equal(mu.load_embedding(path, "<pup>").rows, EIGHT)
    assert mu.load_embedding(path, "<kat>").token == "<kat>"
    for token in (None, "<finn>"):
        with pytest.raises(mu.UserError, match="'<(kat|pup)>', '<(kat|pup)>'.*--token"):
            mu.load_embedding(path, token)


def test_one_file_can_give_two_tokens(tiny_model, tmp_path):
    torch.save({"<kat>": torch.ones(32), "<pup>": torch.zeros(32)}, tmp_path / "two.bin")
    two = [(tmp_path / "two.bin", "<kat>"), (tmp_path / "two.bin", "<pup>")]
    components = mu.load_components(tiny_model, embeddings=two)
    assert list(components.placeholders) == ["<kat>", "<pup>"]
    assert components.text_encoder.get_input_embeddings().learned_rows.mean(dim=1).tolist() == [1, 0]
    with pytest.raises(mu.UserError, match="two embeddings are called '<kat>'"):
        mu.load_components(tiny_model, embeddings=[two[0], two[0]])


def test_one_of_several_a1111_terms_is_chosen_by_its_name(tmp_path):
    torch.save({"string_to_param": OrderedDict({"a": ONE, "b": EIGHT}), "name": "both"}, tmp_path / "both.pt")
    embedding = mu.load_embedding(tmp_path / "both.pt", "b")
    assert embedding.token == "b" and torch.equal(embedding.rows, EIGHT)


@pytest.mark.parametrize(
    "keys",
    [
        ["lora_unet_down_blocks_0.lora_up.weight", "lora_unet_down_blocks_0.lora_down.weight"],
        ["unet.down_blocks.0.attn1.to_q.lora_A.weight", "unet.down_blocks.0.attn1.to_q.lora_B.weight"],
        ["unet.attn1.processor.to_q_lora.down.weight", "unet.attn1.processor.to_q_lora.up.weight"],
    ],
)
def test_a_lora_is_called_a_lora(keys, tmp_path):
    save_file({key: torch.zeros(4, 4) for key in keys}, tmp_path / "style.safetensors")
    with pytest.raises(mu.UserError, match="is a LoRA"):
        mu.load_embedding(tmp_path / "style.safetensors")


def test_a_token_called_like_a_lora_is_none(tmp_path):
    save_file({"<flora>": ONE, "<lora>": EIGHT}, tmp_path / "two.safetensors")
    with pytest.raises(mu.UserError, match="choose one with --token"):
        mu.load_embedding(tmp_path / "two.safetensors")


# --- What the name of a token says of it ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["my cat", "cat", " "])
def test_a_name_that_cannot_be_a_token_names_the_file_and_the_option(name, tiny_model, tmp_path):
    path = tmp_path / "kat.pt"
    torch.save({"string_to_param": {"*": torch.zeros(1, 32)}, "name": name}, path)
    with pytest.raises(mu.UserError) as error:
        mu.load_components(tiny_model, embeddings=[(path, None)])
    assert str(error.value).startswith(f"--embedding {path}: its token {name!r}")
    assert "--token '<my-cat>'" in str(error.value)
    with pytest.raises(mu.UserError, match="^--token 'red'"):
        mu.load_components(tiny_model, embeddings=[(path, "red")])
    assert list(mu.load_components(tiny_model, embeddings=[(path, "<my-cat>")]).placeholders) == ["<my-cat>"]


# --- Prompts ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def generate(tiny_model, tmp_path, monkeypatch, capsys):
    """generate(*options) runs sample.py with <kat> and the negative embedding badkat -> its notes, the prompts."""
    monkeypatch.chdir(tmp_path)
    mu.save_embedding(tmp_path / "kat.safetensors", "<kat>", torch.randn(2, 32), tiny_model)
    mu.save_embedding(tmp_path / "badkat.safetensors", "badkat", torch.randn(8, 32), tiny_model)

    def run(*options):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        sample.main(["--model", tiny_model, "--num_images", "1", "--steps", "1", "--out", str(out), *options])
        notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
        return notes, [Image.open(path).text["prompt"] for path in sorted(out.glob("0*.png"))]

    return run


KAT, BAD = ["--embedding", "kat.safetensors"], ["--embedding", "badkat.safetensors"]


def test_an_embedding_in_the_negative_prompt_is_used_and_no_subject(generate):
    negative = ["--negative_prompt", "badkat"]
    assert generate(*BAD, *negative, "--prompt", "a cat") == ([], ["a cat"])
    assert generate(*KAT, *BAD, *negative) == ([], ["a photo of a <kat>"])
    with pytest.raises(SystemExit):
        generate(*BAD, *negative)


def test_an_embedding_that_no_prompt_holds_is_noted_once(generate):
    for options, noted in [
        ([*BAD, "--negative_prompt", "badkta", "--prompt", "a cat"], "badkat"),
        ([*KAT, *BAD, "--negative_prompt", "badkta", "--prompt", "a <kat>"], "badkat"),
        ([*KAT, *BAD, "--negative_prompt", "badkat", "--prompt", "a cat"], "<kat>"),
        ([*KAT, "--prompt", "a <kat>", "--prompt", "a <kta>"], "'a <kta>'"),
    ]:
        (note,) = generate(*options)[0]
        assert noted in note


def test_weights_in_prompts_are_noted_once(generate):
    notes, _ = generate(*KAT, "--prompt", "a (<kat>:1.3)", "--prompt", "a <kat> (at night:0.5)")
    assert len(notes) == 1 and "plain text" in notes[0]
    assert generate(*KAT, "--prompt", "a <kat> (at 10:30)")[0] == []


def test_a_preview_prompt_without_the_token_is_noted(learn, capsys):
    learn("--preview_prompt", "a photo of a kat")
    assert "'a photo of a kat' holds no learned token, such as <kat>" in capsys.readouterr().err
    learn("--preview_prompt", "a photo of a <kat>", out="other")
    assert "note: " not in capsys.readouterr().err


def test_a_token_of_many_vectors_that_would_be_cut_is_named_once(tiny_model):
    tokenizer = mu.load_tokenizer(tiny_model)
    placeholders = {"<kat>": mu.add_placeholder(tokenizer, "<kat>", 45)}
    for prompt in ("a <kat>", "a photo of a cat and a dog and a toy in a painting on the <kat>"):
        with pytest.raises(mu.UserError) as error:
            mu.tokenize(tokenizer, [prompt], placeholders)
        message = str(error.value)
        assert message.replace(repr(prompt), "").count("<kat>") == 1 and "<kat>_" not in message
