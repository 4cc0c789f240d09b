"""What several test files share: a tiny Stable Diffusion with random weights, training images, runs of train.py."""

import gc
import json
import os
import shutil
import sys
import types
from pathlib import Path

if not os.environ.get("SD_MODEL"):  # a real model may be downloaded, and takes all cores (test_real.py)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported: no test asks the network
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch: for tiny tensors more threads only wait for each other
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import pytest
import torch
import transformers
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel

import model_utils as mu
import train

WORDS = "a an the of in on and photo picture painting drawing style cat dog toy red blue two night background".split()
PROMPT_LENGTH, TEXT_WIDTH = 32, 32


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # loading a model collects garbage, and would go through all objects of the libraries each time


def build_tokenizer():
    """A small CLIP tokenizer: all bytes, all bytes that end a word, the merges that spell WORDS, start and end."""
    letters = sorted(ByteLevel.alphabet())
    pieces, merges = letters + [letter + "</w>" for letter in letters], []
    for word in WORDS:
        symbols = [*word[:-1], word[-1] + "</w>"]
        whole = symbols[0]
        for symbol in symbols[1:]:
            if (whole, symbol) not in merges:
                merges.append((whole, symbol))
                pieces.append(whole + symbol)
            whole += symbol
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=PROMPT_LENGTH)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Path of a random model: 16 px, latents [4, 8, 8], 32 tokens per prompt, embeddings of width 32, with clip/."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    tower = {"hidden_size": TEXT_WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = tower | ends | {"vocab_size": len(tokenizer), "max_position_embeddings": PROMPT_LENGTH}
    vision = tower | {"image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    clip = transformers.CLIPModel(config)
    text_encoder = transformers.CLIPTextModel(clip.config.text_config)
    text_encoder.load_state_dict(clip.text_model.state_dict())
    blocks = {"block_out_channels": (8, 16), "norm_num_groups": 4}
    ends = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(**blocks, **ends, sample_size=16, scaling_factor=0.7)
    ends = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    ends |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 4, "layers_per_block": 1}
    unet = UNet2DConditionModel(**blocks, **ends, sample_size=8, cross_attention_dim=TEXT_WIDTH)
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    scheduler = PNDMScheduler(**betas, skip_prk_steps=True, steps_offset=1)
    scheduler.register_to_config(clip_sample=False)  # as in Stable Diffusion 1.4's file
    folder = tmp_path_factory.mktemp("model") / "tiny"
    parts = (vae, text_encoder, tokenizer, unet, scheduler, None, None)
    StableDiffusionPipeline(*parts, requires_safety_checker=False).save_pretrained(folder)
    clip.save_pretrained(folder / "clip")
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    transformers.CLIPImageProcessorPil(**size).save_pretrained(folder / "clip")
    return str(folder)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Path of a folder with three training images of noise."""
    folder = tmp_path_factory.mktemp("images with spaces")
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return str(folder)


def options(model, images, *more, steps=4):
    """Options of a short run with --recipe fast and without previews."""
    argv = ["--model", model, "--images", images, "--initializer_token", "cat", "--recipe", "fast", "--lr", "2e-2"]
    argv += ["--steps", str(steps), "--batch_size", "2", "--lr_warmup_steps", "2", "--preview_steps", "0", "--no-score"]
    return [*argv, *more]


@pytest.fixture
def learn(tiny_model, image_folder, tmp_path, monkeypatch):
    """learn(*options, steps=4, out="run") trains the tiny model in an empty folder -> the run's folder."""
    monkeypatch.chdir(tmp_path)

    def run(*more, steps=4, out="run"):
        argv = options(tiny_model, image_folder, "--output_dir", out, *more, steps=steps)
        return train.train(train.parse_options(argv)).absolute()

    return run


@pytest.fixture(scope="session")
def finished(tiny_model, image_folder, tmp_path_factory):
    """Folder of a run of 4 steps with a checkpoint every 2 and a preview every 4; not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "kat"
    more = ["--save_steps", "2", "--log_steps", "1", "--preview_steps", "4", "--output_dir", str(folder)]
    return train.train(train.parse_options(options(tiny_model, image_folder, *more)))


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    """A copy of the finished run, runs/kat in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(finished, "runs/kat"))


@pytest.fixture
def model(tiny_model, tmp_path):
    """A copy of the tiny model that a test may change."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def components(tiny_model):
    """The tiny model, without a new token."""
    return mu.load_components(tiny_model)


@pytest.fixture
def refused(capsys):
    """refused(main, argv) expects exit code 2 and one sentence on stderr from a script's main, and returns it."""

    def call(main, argv):
        capsys.readouterr()  # what came before
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in argv])
        error = capsys.readouterr().err.strip()
        assert stop.value.code == 2 and "Traceback" not in error
        *before, sentence = error.splitlines()  # before: a line of usage, or a note
        assert "error: " in sentence and len(before) <= 1 and "error: " not in "".join(before)
        return sentence

    return call


@pytest.fixture
def before_step(monkeypatch):
    """before_step(step, action) lets train.py call action() when it seeds this step (or train.EVAL_SEED)."""
    step_generator = train.step_generator

    def install(chosen, action=None):
        def seeding(seed, step):
            if step == chosen:
                action()
            return step_generator(seed, step)

        monkeypatch.setattr(train, "step_generator", seeding)

    return install


def read_log(folder):
    """The rows of a run's log.jsonl."""
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def read_state(folder):
    """The checkpoint of a run."""
    return torch.load(Path(folder) / "state.pt", weights_only=True)


def read_rows(folder):
    """The learned rows [n, dim] of a run, as train.py saved them."""
    return mu.load_embedding(folder)[1]


def edited_train(*changes):
    """A module of train.py as it is after changes (old text, new text) of its source."""
    source = Path(train.__file__).read_text(encoding="utf-8")
    for old, new in changes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    module = types.ModuleType("edited_train")
    exec(compile(source, "edited_train.py", "exec"), module.__dict__)
    return module
