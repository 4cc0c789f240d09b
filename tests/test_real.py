"""The promises on a real checkpoint and device: SD_MODEL=CompVis/stable-diffusion-v1-4 python -m pytest -m real

Ten minutes on a GPU or on two CPU cores. It ends with a table to paste into an issue or the README.
"""

import json
import os
import platform
import statistics
import time

import diffusers
import numpy as np
import pytest
import torch
import transformers

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
TABLE = []  # rows (what, value)


@pytest.fixture(scope="module", autouse=True)
def print_table():
    yield
    device = (
        torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{os.cpu_count()} cores, {platform.processor()}"
    )
    print(f"\n\n| {MODEL}, {SIZE} px | {device} |\n|---|---|")
    for what, value in TABLE:
        print(f"| {what} | {value} |")
    print(f"\ntorch {torch.__version__}, transformers {transformers.__version__}, diffusers {diffusers.__version__}")


@pytest.fixture(scope="class")
def components():
    return mu.load_components(MODEL, DEVICE)


def options(*more):
    """Options of a run of the bundled kat on the checkpoint."""
    argv = ["--model", MODEL, "--images", f"{mu.DEFAULT_MODEL}/concepts/kat", "--initializer_token", "cat"]
    argv += ["--resolution", str(SIZE), "--batch_size", "1", "--preview_steps", "0", "--no-score", *more]
    return train.parse_options(argv)


class TestAgainstReferences:  # a class, so that its components are freed before the training tests
    @pytest.mark.parametrize("sampler", SCHEDULERS)
    def test_images_equal_the_pipeline(self, components, sampler):
        prompts, settings = ["a photo of a cat"], {"height": SIZE, "width": SIZE}
        ours = next(sample.generate(components, prompts, [7], "", 3, 4.0, sampler, progress=False, **settings))
        loaded = diffusers.PNDMScheduler.from_pretrained(MODEL, subfolder="scheduler")
        pipe = diffusers.StableDiffusionPipeline(
            components.vae, components.text_encoder, components.tokenizer, components.unet,
            SCHEDULERS[sampler].from_config(loaded.config), None, None, requires_safety_checker=False,
        )  # fmt: skip
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(7)
        theirs = pipe(prompts, num_inference_steps=3, guidance_scale=4.0, generator=generator, **settings).images[0]
        difference = np.abs(np.asarray(ours, dtype=int) - np.asarray(theirs, dtype=int))
        TABLE.append((f"{sampler}, 3 steps: largest difference to the pipeline", f"{difference.max()} of 255"))
        assert difference.max() <= 2

    def test_the_gradient_is_that_of_the_whole_table(self, components):
        """The classical form: CLIP's table is trained, and only the new row's gradient is used."""
        generator = torch.Generator().manual_seed(0)
        latents, noise = (torch.randn(1, 4, SIZE // 8, SIZE // 8, generator=generator) for _ in range(2))
        timesteps, tokenizer = torch.tensor([500]), mu.load_tokenizer(MODEL)
        (token_id,) = mu.add_placeholder(tokenizer, "<kat>")
        token_ids = mu.tokenize(tokenizer, ["a photo of a <kat>"], {"<kat>": [token_id]})
        batch = train.Batch(latents, noise, timesteps, token_ids, torch.ones_like(latents[:, :1]))
        schedule = components.schedule.to(DEVICE)

        encoder = mu.load_text_encoder(MODEL, DEVICE)
        row = mu.initial_rows(tokenizer, encoder.get_input_embeddings().weight, "cat", 1, 0)
        learned_rows = mu.install_learned_rows(encoder, [token_id], row).learned_rows
        ours = train.batch_loss(components._replace(text_encoder=encoder, schedule=schedule), batch).sum()
        ours.backward()

        encoder = mu.load_text_encoder(MODEL, DEVICE)
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        table = encoder.get_input_embeddings().weight
        table.data[token_id] = row[0]
        table.requires_grad_(True)
        classical = train.batch_loss(components._replace(text_encoder=encoder, schedule=schedule), batch).sum()
        classical.backward()
        cosine = torch.cosine_similarity(learned_rows.grad[0], table.grad[token_id], dim=0).item()
        TABLE.append(("gradient of the row, cosine to the classical form", f"{cosine:.6f}"))
        assert ours.item() == pytest.approx(classical.item(), rel=1e-4) and cosine > 0.9999


def precisions():
    """Those that the device has."""
    for precision in ("fp32", "bf16", "fp16"):
        try:
            mu.choose_dtype(precision, DEVICE)
            yield precision
        except mu.UserError:
            continue


@pytest.mark.parametrize("precision", precisions())
def test_step_time_and_memory(precision, tmp_path, monkeypatch):
    times, draw = [], train.draw_batch
    monkeypatch.setattr(train, "draw_batch", lambda *args: times.append(time.perf_counter()) or draw(*args))
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    steps = 30 if DEVICE.type == "cuda" else 4
    train.train(
        options("--precision", precision, "--steps", str(steps), "--log_steps", "1", "--out", str(tmp_path / "a"))
    )
    seconds = statistics.median(np.diff(times[2:]))  # the first two are the evaluation batch and the first step
    memory = f", peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GB" if DEVICE.type == "cuda" else ""
    TABLE.append((f"{precision}, batch 1: a step with its evaluation of 4", f"{seconds:.3f} s{memory}"))


def test_the_evaluation_loss_falls(tmp_path):
    steps = ["--steps", "150", "--batch_size", "4"] if DEVICE.type == "cuda" else ["--steps", "8"]
    folder = train.train(
        options("--recipe", "fast", "--lr_warmup_steps", "0", "--log_steps", "2", *steps, "--out", str(tmp_path))
    )
    losses = [json.loads(line)["eval_loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
    TABLE.append(("evaluation loss, begin and end of a short training", f"{losses[0]:.5f}, {losses[-1]:.5f}"))
    assert losses[-1] < losses[0]
