"""The promises on a real checkpoint and device: SD_MODEL=CompVis/stable-diffusion-v1-4 python -m pytest -m real -s

Ten minutes on a GPU or on two CPU cores. Prints what it measures.
"""

import os
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import read_log

import model_utils as mu
import sample
import train

MODEL = os.environ.get("SD_MODEL")
pytestmark = [pytest.mark.real, pytest.mark.skipif(not MODEL, reason="SD_MODEL=folder or Hub id is not set")]
DEVICE = mu.choose_device("auto")
SIZE = 512 if DEVICE.type == "cuda" else 256  # pixels
SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler, "ddpm": diffusers.DDPMScheduler, "dpm++": diffusers.DPMSolverMultistepScheduler,
}  # fmt: skip


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_images_equal_the_pipeline(sampler):
    components, settings = mu.load_components(MODEL).to(DEVICE), {"height": SIZE, "width": SIZE}
    (ours,) = sample.generate(components, ["a photo of a cat"], [7], "", 3, 4.0, sampler, progress=False, **settings)
    loaded = diffusers.PNDMScheduler.from_pretrained(MODEL, subfolder="scheduler")
    pipeline = diffusers.StableDiffusionPipeline(
        components.vae.to(DEVICE), components.text_encoder, components.tokenizer, components.unet,
        SCHEDULERS[sampler].from_config(loaded.config), None, None, requires_safety_checker=False,
    )  # fmt: skip
    settings |= {"num_inference_steps": 3, "guidance_scale": 4.0, "generator": torch.Generator().manual_seed(7)}
    theirs = pipeline("a photo of a cat", **settings).images[0]
    difference = np.abs(np.asarray(ours, dtype=int) - np.asarray(theirs, dtype=int)).max()
    print(f"\n{sampler}, 3 steps: at most {difference} of 255 from the pipeline")
    assert difference <= 2  # sums in another order on a GPU


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_evaluation_loss_falls(precision, tmp_path, capsys):
    try:
        mu.choose_precision(precision, DEVICE)
    except mu.UserError as error:
        pytest.skip(str(error))
    steps = ["--steps", "150", "--batch_size", "4"] if DEVICE.type == "cuda" else ["--steps", "24", "--batch_size", "1"]
    argv = ["--model", MODEL, "--images", str(Path(mu.DEFAULT_MODEL, "concepts", "kat")), "--initializer_token", "cat"]
    argv += ["--recipe", "fast", "--lr_warmup_steps", "0", "--log_steps", "2", "--preview_steps", "0", "--no-score"]
    argv += ["--resolution", str(SIZE), "--precision", precision, "--output_dir", str(tmp_path / "run"), *steps]
    losses = [row["eval_loss"] for row in read_log(train.train(train.parse_options(argv)))]
    speed = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("speed"))
    with capsys.disabled():
        print(f"\n{precision}, {' '.join(steps)}: {speed}; evaluation loss {losses[0]:.5f} to {losses[-1]:.5f}")
    assert losses[-1] < losses[0]
