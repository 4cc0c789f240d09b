"""A new token has a name of its own and is found wherever it stands; its rows go into and out of every embedding file.

What is no embedding is said in one sentence, and nothing in a stranger's file can run.
"""

import os
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import nn

import model_utils as mu
import train
from model_utils import UserError

ONE, THREE = (torch.randn(n, 32, generator=torch.Generator().manual_seed(n)) for n in (1, 3))


def test_a_name_that_is_no_new_token_is_refused_and_leaves_the_vocabulary_as_it_was(components):
    before = components.tokenizer.get_vocab()
    known = ["cat", "CAT", "ca", "c", "*", "photo</w>", "<|endoftext|>"]
    for name in [*known, "", " ", "my cat", "<my\tcat>", "<cat>\n"]:
        fault = "is already a token" if name in known else "is empty or has spaces"
        with pytest.raises(UserError, match=f"^--option {re.escape(repr(name))} {fault}.*--option '<my-cat>'"):
            mu.add_tokens(components, [(name, ONE)], "--option")
        assert components.tokenizer.get_vocab() == before and components.placeholders == {}, name
    mu.add_tokens(components, [("<kat>", THREE), ("<pup>_2", ONE)], "--token")
    for name, rows in (("<kat>_2", ONE), ("<pup>", THREE)):  # so are the names of vectors, old and new
        with pytest.raises(UserError, match=f"^--token '{name}' is already a token"):
            mu.add_tokens(components, [(name, rows)], "--token")


def test_a_token_is_found_wherever_it_stands_and_similar_ones_are_told_apart(components):
    counts = {"<kat>": 3, "<kat2>": 1, "<Kat>": 2, "sks9": 2, "sks9b": 1, "kätzchen": 1, "<猫>": 2, "S*": 1, "<a|b": 1}
    mu.add_tokens(components, [(token, torch.zeros(n, 32)) for token, n in counts.items()], "--token")
    ids = components.placeholders
    learned = sum(ids.values(), [])
    assert len(set(learned)) == sum(counts.values()) and min(learned) > components.tokenizer.eos_token_id
    for prompt, found in {
        "a <kat> and a <kat2> on <Kat>": ["<kat>", "<kat2>", "<Kat>"],
        "<kat2><kat><Kat>": ["<kat2>", "<kat>", "<Kat>"],
        "<KAT> <kat2 > kat": [],
        "two <kat>s, <kat>-like": ["<kat>", "<kat>"],
        "SKS9 sks9 sks9b, sks9.": ["sks9", "sks9b", "sks9"],
        "asks9 sks92": [],
        "(kätzchen),<猫>猫": ["kätzchen", "<猫>"],
        "a S*, <a|b": ["S*", "<a|b"],
    }.items():
        row = mu.tokenize(components, [prompt])[0].tolist()
        assert [i for i in row if i in learned] == sum((ids[token] for token in found), []), prompt


def test_token_ids_equal_the_tokenizers_own(components):
    prompts = ["", "a photo of a cat", "a photo, of  the RED cat!", "émigré 猫 \U0001f600", "cat " * 30, "cat " * 31]
    options = {"padding": "max_length", "max_length": 32, "truncation": True, "return_tensors": "pt"}
    assert torch.equal(mu.tokenize(components, prompts), components.tokenizer(prompts, **options).input_ids)


def test_a_long_prompt_is_cut_at_its_end_but_never_in_a_token(components):
    mu.add_tokens(components, [("<kat>", THREE)], "--token")
    for end in ("<kat>", "<kat> red dog"):
        row = mu.tokenize(components, ["cat " * 27 + end])[0].tolist()
        assert row[-4:] == [*components.placeholders["<kat>"], components.tokenizer.eos_token_id]
    for prompt in ("cat " * 28 + "<kat>", "cat " * 40 + "<kat>", "<kat> " + "cat " * 30 + "<kat>"):
        with pytest.raises(UserError, match=f"^the prompt {re.escape(repr(prompt[:60]))} is too long for '<kat>'"):
            mu.tokenize(components, [prompt])


def test_an_initializer_is_words_an_embedding_file_or_a_runs_folder(components, run):
    def start(initializer, num_vectors=1, seed=0):
        return mu.initial_rows(components, initializer, num_vectors, seed)

    table = components.text_encoder.get_input_embeddings().weight
    red, cat = (table[components.tokenizer.get_vocab()[word + "</w>"]] for word in ("red", "cat"))
    Path("cat").mkdir()  # a folder of images, say
    assert torch.equal(start(" Cat "), cat[None])
    torch.testing.assert_close(start("red cat"), (red + cat)[None] / 2)
    rows = start("red cat", 7)
    assert torch.equal(rows[:2], torch.stack([red, cat])) and torch.equal(rows, start("red cat", 7))
    assert torch.equal(start("red cat", 2), rows[:2]) and not torch.equal(rows, start("red cat", 7, seed=1))
    noise = rows[2:] - torch.stack([red, cat, red, cat, red])
    # A tenth of the deviation of the words' entries, as 160 normal numbers tell it: within 5 standard errors
    assert abs(noise.std() / torch.stack([red, cat]).std() - 0.1) < 0.1 * 5 / (2 * 160) ** 0.5
    mu.save_embedding("three.pt", [("<x>", THREE)], "model")
    assert torch.equal(start("three.pt", 3), THREE) and torch.equal(start("three.pt", 2), THREE[:2])
    torch.testing.assert_close(start("three.pt", 1), THREE.mean(dim=0, keepdim=True))
    assert torch.equal(start("three.pt", None), THREE) and torch.equal(start("cat", None), cat[None])
    for folder in ("runs/kat", "kat"):
        assert torch.equal(start(str(run.rename(folder))), mu.load_embedding(folder)[1])
    for wrong in ("", "  ", "<|endoftext|>", "cat <|endoftext|>"):
        with pytest.raises(UserError, match=f"^--initializer_token {re.escape(repr(wrong))} is no word"):
            start(wrong)
    with pytest.raises(UserError, match="^--initializer_token nowhere/kat: no such file"):
        start("nowhere/kat")


def test_an_initializer_of_several_pieces_is_noted(components, capsys):
    notes = {"red cat": "", " Cat": "", "dogcat": "do + g + cat", "cat redtoy": "cat + re + d + toy"}
    for words, note in notes.items():
        assert mu.initial_rows(components, words, None, 0).isfinite().all()
        assert (f"'{words}' is {note} to the model" in capsys.readouterr().err) == bool(note), words


def write(path, content):
    """As other programs do: safetensors or a pickle, by the file's name."""
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


PAPER = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": nn.ParameterDict({"*": nn.Parameter(THREE)})}
A1111 = {"string_to_token": {"*": 265}, "string_to_param": {"*": ONE}, "name": "kat", "step": 500}
SDXL = {"clip_l": ONE, "clip_g": torch.ones(1, 1280), "clip_l_out": THREE}
FORMATS = {  # name, content, the token that it names, rows
    "diffusers": ("kat.safetensors", {"<kat>": ONE[0]}, "<kat>", ONE),
    "diffusers, vectors": ("kat.safetensors", {"<kat>": THREE}, "<kat>", THREE),
    "diffusers, pickle": ("kat.bin", {"<kat>": nn.Parameter(ONE[0])}, "<kat>", ONE),
    "A1111": ("kat.pt", A1111, "kat", ONE),
    "A1111, inner key": ("kat.pt", {"string_to_param": OrderedDict({"<kat>": ONE})}, "<kat>", ONE),
    "paper": ("kat.pt", PAPER, None, THREE),
    "kohya": ("kat.pt", {"emb_params": THREE}, None, THREE),
    "InvokeAI": ("kat.safetensors", {"emb_params": THREE}, None, THREE),
    "OneTrainer": ("kat.safetensors", {"emp_params": ONE, "emp_params_out": THREE}, None, ONE),
    "SDXL": ("kat.safetensors", SDXL, None, ONE),
    "bare tensor": ("kat.ckpt", THREE, None, THREE),
    "fp16": ("kat.safetensors", {"<kat>": THREE.half()}, "<kat>", THREE.half()),
    "bf16": ("kat.safetensors", {"<kat>": THREE.bfloat16()}, "<kat>", THREE.bfloat16()),
    "fp64": ("kat.bin", {"<kat>": THREE.double()}, "<kat>", THREE),
}


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_read(form, tmp_path):
    name, content, token, rows = FORMATS[form]
    path = write(tmp_path / name, content)
    if token is None:
        with pytest.raises(UserError, match=f"^--embedding {re.escape(str(path))} does not name its token.*--token"):
            mu.load_embedding(path)
    else:
        assert mu.load_embedding(str(path))[0] == token
    found, read = mu.load_embedding(path.rename(tmp_path / "a.pt"), "<given>", 32)  # the content tells the format
    assert found == "<given>" and read.dtype == torch.float32 and torch.equal(read, rows.float())


IDS = {"<kat>": torch.tensor(265), "*": torch.tensor(31)}
TWO = {"two.safetensors": {"<kat>": ONE, "*": THREE}, "two.bin": {"<kat>": ONE, "*": THREE}}
TWO["two.pt"] = {"string_to_token": IDS, "string_to_param": nn.ParameterDict({"<kat>": ONE, "*": THREE})}  # the paper's


@pytest.mark.parametrize("name", TWO)
def test_of_several_tokens_in_a_file_one_is_chosen_by_its_name_and_renamed(name, tmp_path):
    path = write(tmp_path / name, TWO[name])
    for chosen, found, rows in (("<kat>", "<kat>", ONE), ("*", "*", THREE), ("*=<pup>", "<pup>", THREE)):
        token, read = mu.load_embedding(path, chosen, 32)
        assert token == found and torch.equal(read, rows)
    for option, remedy in {"--embedding": "--token 'NAME=<my-cat>' takes", "--initializer_token": "name a"}.items():
        for token in (None, "<finn>", "<finn>=<kat>"):
            with pytest.raises(UserError, match=rf"it holds (<kat>, \*|\*, <kat>); {remedy}"):
                mu.load_embedding(path, token, option=option)
    alone = write(tmp_path / "alone.safetensors", {"=w=": ONE})
    assert mu.load_embedding(alone)[0] == mu.load_embedding(alone, "=w=")[0] == "=w="


def test_of_several_files_in_a_folder_safetensors_is_taken(tmp_path):
    for name in ("learned_embeds.bin", "learned_embeds.safetensors"):
        rows = torch.randn(1, 8)
        write(tmp_path / name, {"<kat>": rows})
        assert torch.equal(mu.load_embedding(str(tmp_path))[1], rows)


def test_what_is_no_embedding_is_said_with_option_and_path(tmp_path):
    def refused(name, fault, **options):
        with pytest.raises(UserError, match=f"^--option {re.escape(str(tmp_path / name))}{fault}"):
            mu.load_embedding(str(tmp_path / name), option="--option", **options)

    for name in ("whole.safetensors", "whole.pt"):
        content = write(tmp_path / name, {"<kat>": THREE}).read_bytes()
        for length in (0, 5, 9, len(content) // 2, len(content) - 1):
            (tmp_path / f"cut-{name}").write_bytes(content[:length])
            refused(f"cut-{name}", " is no embedding")
        refused(name, " has rows of width 32, the model wants 768", dim=768)
    (tmp_path / "text.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    refused("text.bin", " is no embedding")
    write(tmp_path / "integers.pt", {"<kat>": torch.zeros(1, 32, dtype=torch.int64)})
    refused("integers.pt", " is no embedding of one token; it holds no rows")
    (tmp_path / "empty").mkdir()
    refused("empty", ": no such file, no learned_embeds.safetensors in it")
    refused("missing", ": no such file")


@pytest.mark.parametrize(("rows", "shape"), [(ONE, (32,)), (THREE, (3, 32)), (torch.ones(999, 32)[5:6], (32,))])
def test_a_saved_file_is_one_plain_fp32_tensor_and_always_the_same(rows, shape, tmp_path):
    """A single vector is 1-D, as in the concept library."""
    path = tmp_path / "learned_embeds.safetensors"
    mu.save_embedding(path, [("<kätzchen>", nn.Parameter(rows.double()))], "owner/model")
    content = path.read_bytes()
    mu.save_embedding(path, [("<kätzchen>", rows)], "owner/model")
    assert path.read_bytes() == content and len(content) < 1000
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"base_model": "owner/model"} and list(file.keys()) == ["<kätzchen>"]
        saved = file.get_tensor("<kätzchen>")
    assert saved.dtype == torch.float32 and saved.shape == shape and torch.equal(saved, rows.view(shape))


def test_diffusers_loads_a_saved_file_and_encodes_the_same_prompts(tiny_model, components, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model, low_cpu_mem_usage=False)
    for name, rows in (("<one>", ONE), ("<three>", THREE)):
        mu.save_embedding(tmp_path / f"{name}.safetensors", [(name, rows)], "owner/model")
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.safetensors").rename(tmp_path / name / "learned_embeds.safetensors")
        pipeline.load_textual_inversion(str(tmp_path / name))  # a run's folder, as README says
    mu.add_tokens(components, [mu.load_embedding(tmp_path / name) for name in ("<one>", "<three>")], "")
    prompts = ["a photo of <one> on a red background", "two <three>, a cat", "<three><one>"]
    theirs, _ = pipeline.encode_prompt(prompts, "cpu", 1, False)
    ours = mu.encode(components, mu.tokenize(components, prompts))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)  # rounding of fp32


class Hostile:
    """When unpickled by a careless reader, it makes the folder `harm`."""

    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_a_hostile_pickle_runs_no_code_at_any_door(run, model):
    content = {"<kat>": ONE, "step": Hostile(), "rows": ONE}
    resumed = train.parse_options(["--resume", str(run), "--steps", "6"])
    torch.save(content, run / "state.pt")
    doors = [lambda: train.parse_options(["--resume", str(run), "--steps", "6"]), lambda: train.train(resumed)]
    for name in ("kat.pt", "kat.bin", "kat.safetensors"):
        torch.save(content, name, _use_new_zipfile_serialization=name != "kat.pt")
        doors.append(lambda name=name: mu.load_embedding(name))
    for door in doors:
        with pytest.raises(Exception, match="Weights only|nothing was run"):
            door()
        assert not Path("harm").exists()
    for part, name in {"unet": "diffusion_", "vae": "diffusion_", "text_encoder": ""}.items():  # the last is read first
        next((model / part).glob("*.safetensors")).unlink()
        torch.save(content, model / part / f"{name}pytorch_model.bin")
        with pytest.raises(UserError, match=f"'{part}' cannot be loaded"):
            mu.load_components(str(model))
        assert not Path("harm").exists()
    torch.load("kat.bin", weights_only=False)  # a careless reader
    assert Path("harm").exists()


def test_a_write_that_is_interrupted_leaves_the_old_file_whole(tmp_path):
    resource = pytest.importorskip("resource")  # not on Windows
    path, limits = tmp_path / "state.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    mu.write_whole(path, b"old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # as if the disk were full after that many bytes
    try:
        with pytest.raises(OSError, match="too large"):
            mu.write_whole(path, bytes(9999))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old"
    mu.write_whole(path, b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]
