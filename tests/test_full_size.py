"""Stable Diffusion 1.4's exact sizes with random weights. Minutes and gigabytes: python -m pytest -m slow"""

import json

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

import model_utils as mu
import sample
import train


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    import full_size

    return str(full_size.build(tmp_path_factory.mktemp("full_size")))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_training_step_and_one_denoising_step_at_full_size(full_size, precision, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unet = mu.load_unet(full_size, "meta")
    assert sum(weight.numel() for weight in unet.parameters()) == 859_520_964
    (tmp_path / "images").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (512, 600, 3), dtype=np.uint8)).save("images/a.png")
    options = ["--model", full_size, "--images", "images", "--initializer_token", "cat", "--precision", precision]
    options += ["--steps", "1", "--batch_size", "1", "--preview_steps", "0", "--output_dir", "run", "--device", "cpu"]
    train.main(options)
    (row,) = [json.loads(line) for line in open("run/log.jsonl")]
    assert row["grad_norm"] > 0 and row["skipped_steps"] == 0
    rows = load_file("run/learned_embeds.safetensors")["<kat>"]
    assert rows.shape == (768,) and rows.isfinite().all()

    options = ["--device", "cpu", "--precision", precision, "--steps", "1", "--num_images", "1"]
    sample.main(["--embedding", "run", *options])
    with Image.open("run/samples/0000.png") as image:
        assert image.size == (512, 512)
