"""Checkpoints as people have them: in half precision, pickled, in one file, moved, with a learned token, version 2."""

import json
import logging
import os
import shutil
import subprocess
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from conftest import PROMPT_LENGTH, TEXT_WIDTH, build_tokenizer, read_rows, read_state
from PIL import Image
from safetensors.torch import load_file, save_file

import model_utils as mu
import sample
import train

PARTS = {"text_encoder": "model", "vae": "diffusion_pytorch_model", "unet": "diffusion_pytorch_model"}


@pytest.fixture
def copied(tiny_model, tmp_path):
    """A copy of the tiny model that a test may change."""
    return Path(shutil.copytree(tiny_model, tmp_path / "copied"))


def edit_json(path, **entries):
    """Change entries of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def weights_of(components):
    modules = (components.text_encoder, components.vae, components.unet)
    return torch.cat([weight.flatten() for module in modules for weight in module.parameters()])


def pixels_of(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(Path(folder).glob("0*.png"))])


@pytest.fixture
def half_pipeline(tiny_model):
    return diffusers.StableDiffusionPipeline.from_pretrained(tiny_model, torch_dtype=torch.float16)


# --- Weight files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}])
@pytest.mark.parametrize("in_fp32", [[], ["unet"]])
def test_files_of_the_fp16_variant_load_without_an_option(half_pipeline, copied, in_fp32, shards):
    whole = mu.load_components(copied)
    for part in PARTS.keys() - set(in_fp32):
        shutil.rmtree(copied / part)
        getattr(half_pipeline, part).save_pretrained(copied / part, variant="fp16", **shards)
        assert not list((copied / part).glob(f"{PARTS[part]}.safetensors"))
    components = mu.load_components(copied)
    assert components.unet.dtype == torch.float32
    torch.testing.assert_close(weights_of(components), weights_of(whole), rtol=1e-3, atol=1e-4)
    exact = torch.equal(components.unet.conv_in.weight, whole.unet.conv_in.weight)
    assert exact == bool(in_fp32)


def test_plain_files_are_preferred_to_a_variant(half_pipeline, copied):
    half_pipeline.unet.save_pretrained(copied / "unet", variant="fp16")
    plain = load_file(copied / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"]
    assert torch.equal(mu.load_unet(copied, "cpu").conv_in.weight, plain)
    assert torch.equal(mu.load_unet(copied, "cpu", variant="fp16").conv_in.weight, plain.half().float())


def pickle_weights(model, extra=()):
    """Replace a model's safetensors by .bin files."""
    for part, name in PARTS.items():
        path = model / part / f"{name}.safetensors"
        bin_name = "pytorch_model.bin" if part == "text_encoder" else f"{name}.bin"
        torch.save(load_file(path) | dict(extra), path.with_name(bin_name))
        path.unlink()


def test_pickled_weights_load_in_silence(copied, capfd):
    whole, records = mu.load_components(copied), []
    pickle_weights(copied)
    capfd.readouterr()
    handler = logging.Handler()
    handler.emit = records.append
    for library in (diffusers, transformers):  # where they print was settled at their import
        library.utils.logging.add_handler(handler)
    assert torch.equal(weights_of(mu.load_components(copied)), weights_of(whole))
    for library in (diffusers, transformers):
        library.utils.logging.remove_handler(handler)
    assert records == [] and capfd.readouterr() == ("", "")


class Hostile:
    """Unpickled by a careless reader, it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("load", [mu.load_text_encoder, mu.load_vae, mu.load_unet])
def test_pickled_weights_run_no_code(copied, tmp_path, load):
    pickle_weights(copied, {"x": Hostile(tmp_path / "harm")})
    with pytest.raises(mu.UserError, match="cannot be loaded"):
        load(copied, "cpu")
    assert not (tmp_path / "harm").exists()


# --- Other layouts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file, model",
    [
        ("v1-5 pruned.ckpt", "v1-5 pruned.ckpt"),
        ("$(touch hacked).safetensors", "$(touch hacked).safetensors"),
        ("models/it's.safetensors", "models"),
        ("models/v1.ckpt", "models/v1.yaml"),
    ],
)
def test_one_file_gets_the_line_that_converts_it(file, model, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    for path in (Path(file), Path(model)):
        path.parent.mkdir(exist_ok=True)
        if path.suffix:
            path.write_bytes(b"...")
    sentence = refused(["--model", model, "--output_dir", "out"])
    assert sentence.startswith(f"error: --model {model}: ")
    line = sentence[sentence.index("python -c") : sentence.index(" and give --model")]
    sh = 'python() { printf %s "$2"; }; ' + line
    code = subprocess.run(["bash", "-c", sh], capture_output=True, text=True, check=True).stdout
    calls = []

    class Stub:
        def __getattr__(self, name):
            return lambda argument: calls.append((name, argument)) or self

    monkeypatch.setattr(diffusers, "StableDiffusionPipeline", Stub())
    exec(code)
    new = str(Path(file).with_suffix("")) + "-diffusers"
    assert calls == [("from_single_file", file), ("save_pretrained", new)]
    assert new in sentence.split(" and give --model")[1] and not Path("hacked").exists()


def test_a_model_that_lacks_a_file_is_not_told_to_convert_the_single_file_beside_it(copied):
    (copied / "v1-5-pruned.safetensors").write_bytes(b"...")
    (copied / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(mu.UserError, match="'scheduler/scheduler_config.json' is missing"):
        mu.load_schedule(copied)


def test_a_hub_cache_folder_names_its_snapshot(copied, tmp_path, refused):
    snapshots = tmp_path / "models--owner--name" / "snapshots"
    snapshots.mkdir(parents=True)
    copied.rename(snapshots / "0123abc")
    for model in (snapshots.parent, snapshots):
        assert str(snapshots / "0123abc") in refused(["--model", str(model)])


@pytest.mark.parametrize("size", [None, [8, 8], [8, 12]])
def test_a_sample_size_that_is_absent_or_a_pair(copied, size, image_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = copied / "unet" / "config.json"
    edit_json(path, sample_size=size)
    for config in (path.read_text(), path.read_text().replace('"act_fn"', '"sample_size": null, "act_fn"')):
        if size is None:
            path.write_text(config)
        argv = ["--model", str(copied), "--images", image_folder, "--initializer_token", "cat", "--steps", "1"]
        argv += ["--no-score", "--overwrite"]
        folder = train.train(train.parse_options([*argv, "--output_dir", "run", "--preview_steps", "0"]))
        assert json.loads((folder / "config.json").read_text())["resolution"] == 16
        sample.main(["--embedding", "run", "--num_images", "1", "--steps", "1", "--out", str(tmp_path / str(size))])
    assert pixels_of(tmp_path / str(size))[0].shape == (16, size[1] * 2 if size else 16, 3)
    with pytest.raises(mu.UserError, match="--resolution 13"):
        train.train(train.parse_options([*argv, "--output_dir", "run", "--resolution", "13"]))


# --- The place of a model ---------------------------------------------------------------------------------------------


def test_a_model_named_by_a_relative_path_is_found_from_any_folder(learn, copied, tmp_path, monkeypatch):
    folder = learn("--model", os.path.relpath(copied, tmp_path))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    sample.main(["--embedding", str(folder), "--num_images", "1", "--steps", "1"])
    assert len(pixels_of(folder / "samples")) == 1


def test_a_run_resumes_with_the_same_model_in_another_place(learn, resume, copied, tmp_path, refused):
    constant = ["--lr_scheduler", "constant"]  # the learning rates do not depend on the number of steps
    uninterrupted = read_rows(learn(*constant, steps=4, out="uninterrupted"))
    folder = learn("--model", str(copied), *constant, steps=2)
    copied.rename(tmp_path / "moved")
    assert "--model" in refused(["--resume", "--output_dir", str(folder), "--steps", "4"])
    resume(folder, "--model", "moved", "--steps", "4")
    assert read_state(folder)["step"] == 4
    assert json.loads((folder / "config.json").read_text())["model"] == str(tmp_path / "moved")
    torch.testing.assert_close(read_rows(folder), uninterrupted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("part, weight", [("unet", "conv_out.bias"), ("text_encoder", "embeddings.token_embedding")])
def test_a_run_does_not_resume_with_another_model(learn, copied, refused, part, weight):
    folder = learn(steps=2)
    path = copied / part / f"{PARTS[part]}.safetensors"
    state = load_file(path)
    name = next(name for name in state if weight in name)
    state[name] = state[name] + 0.01
    save_file(state, path, {"format": "pt"})
    sentence = refused(["--resume", "--output_dir", str(folder), "--model", str(copied), "--steps", "4"])
    assert "of a run with other weights" in sentence and "--model" in sentence and read_state(folder)["step"] == 2


# --- A token that the checkpoint knows already ------------------------------------------------------------------------


@pytest.fixture
def with_token(copied):
    """A pipeline as the notebook of 2022 saved it: <kat> in the tokenizer's files and in the token table."""
    tokenizer = mu.load_tokenizer(copied)
    pieces = tokenizer.get_vocab()
    shutil.rmtree(copied / "tokenizer")
    (copied / "tokenizer").mkdir()
    (copied / "tokenizer" / "vocab.json").write_text(json.dumps(pieces))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (copied / "tokenizer" / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    (copied / "tokenizer" / "added_tokens.json").write_text(json.dumps({"<kat>": len(pieces)}))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": PROMPT_LENGTH}
    (copied / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    text_encoder = mu.load_text_encoder(copied, "cpu")
    text_encoder.resize_token_embeddings(len(pieces) + 1, mean_resizing=False)
    text_encoder.save_pretrained(copied / "text_encoder")
    return copied


def test_the_model_alone_generates_with_its_own_token(with_token, learn, tmp_path, capsys):
    learn(out="runs/kat")  # of another model
    settings = ["--seed", "5", "--num_images", "2", "--steps", "2"]
    sample.main(["--model", str(with_token), "--prompt", "a photo of a <kat>", *settings])
    assert "token " not in capsys.readouterr().out  # no run is loaded
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(with_token)
    assert len(pipeline.tokenizer("<kat>").input_ids) == 3
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    theirs = pipeline(["a photo of a <kat>"] * 2, generator=generators, num_inference_steps=2).images
    difference = pixels_of("samples").astype(int) - np.stack(theirs)
    assert abs(difference).max() <= 1


def test_a_known_token_can_be_the_initializer(with_token, learn):
    tokens = ["--placeholder_token", "<new>", "--initializer_token", "<kat>"]
    folder = learn("--model", str(with_token), *tokens, "--lr", "1e-6", steps=1)
    row = mu.load_text_encoder(with_token, "cpu").get_input_embeddings().weight[-1]
    torch.testing.assert_close(read_rows(folder)[0], row, rtol=0, atol=1e-5)


def test_a_known_token_is_no_new_one(with_token, refused):
    assert "already a token" in refused(["--model", str(with_token), "--placeholder_token", "<kat>"])


def test_a_token_without_a_row_is_refused(with_token, tiny_model, refused):
    shutil.copytree(Path(tiny_model, "text_encoder"), with_token / "text_encoder", dirs_exist_ok=True)
    assert "without a row" in refused(["--model", str(with_token)])


def test_without_run_and_model_or_prompt_nothing_is_generated(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for argv in ([], ["--prompt", "a cat"], ["--model", tiny_model]):
        monkeypatch.setattr("sys.argv", ["sample.py", *argv])
        with pytest.raises(SystemExit):
            sample.main()  # as from the command line
        assert "train.py" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- Stable Diffusion 2, and the bundled model ------------------------------------------------------------------------


@pytest.fixture
def version_2(copied):
    """The tiny model as Stable Diffusion 2 is made: "!" as padding, another CLIP, linear projections, v-prediction."""
    tokenizer = build_tokenizer()
    tokenizer.pad_token = "!"
    tokenizer.save_pretrained(copied / "tokenizer")
    tower = {"hidden_size": TEXT_WIDTH, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}  # as in the file of Stable Diffusion 2
    config = transformers.CLIPTextConfig(
        **tower, **ends, vocab_size=len(tokenizer), max_position_embeddings=PROMPT_LENGTH, hidden_act="gelu"
    )
    shutil.rmtree(copied / "text_encoder")
    transformers.CLIPTextModel(config).save_pretrained(copied / "text_encoder")
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=[2, 4],
        cross_attention_dim=TEXT_WIDTH,
        use_linear_projection=True,
    )
    unet.save_pretrained(copied / "unet")
    edit_json(copied / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    return copied


def test_version_2_trains_and_generates_as_diffusers_does(version_2, learn):
    torch.manual_seed(0)
    folder = learn("--model", str(version_2), steps=1)
    assert mu.tokenize(mu.load_tokenizer(version_2), ["a cat"])[0, -1] == 0
    settings = ["--seed", "5", "--num_images", "1", "--steps", "3", "--guidance", "5"]
    sample.main(["--embedding", str(folder), "--prompt", "a <kat> at night", "--negative_prompt", "a dog", *settings])
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(version_2)
    pipeline.load_textual_inversion(str(folder))
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    options = {"negative_prompt": "a dog", "num_inference_steps": 3, "guidance_scale": 5.0}
    (theirs,) = pipeline("a <kat> at night", generator=torch.Generator().manual_seed(5), **options).images
    (ours,) = pixels_of(folder / "samples").astype(int)
    assert abs(ours - np.asarray(theirs)).max() <= 1 and ours.std() > 5


def test_the_bundled_model_loads_in_diffusers_without_a_dtype():
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(mu.DEFAULT_MODEL)
    assert {getattr(pipeline, part).dtype for part in PARTS} == {torch.float32}
    assert np.asarray(pipeline("a cat", num_inference_steps=1).images[0]).std() > 5
