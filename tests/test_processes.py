"""A step is the same step however it is cut: by lack of memory, by --grad_accum, over several processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import model_utils as mu
import train

TRAIN_PY = str(Path(train.__file__).resolve())


@pytest.fixture
def command(tiny_model, tmp_path, monkeypatch):
    """command(*options) -> options of a short run of the tiny model in an empty folder."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{i}.png")
    base = ["--model", tiny_model, "--images", "images", "--initializer_token", "cat", "--preview_steps", "0"]
    base += ["--no-score", "--steps", "4", "--batch_size", "8", "--lr", "1e-2", "--log_steps", "2"]
    return lambda *options: [*base, *options]


def rows_of(folder):
    return load_file(Path(folder, "learned_embeds.safetensors"))["<kat>"]


def log_of(folder):
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


def out_of_memory_above(images, monkeypatch):
    """A UNet that fits so many images; returns the sizes of the batches that went through it."""
    real, sizes = train.inversion_loss, []

    def loss(unet, latents, *rest):
        if len(latents) > images:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        sizes.append(len(latents))
        return real(unet, latents, *rest)

    monkeypatch.setattr(train, "inversion_loss", loss)
    return sizes


# --- Memory -----------------------------------------------------------------------------------------------------------


def test_a_batch_that_does_not_fit_is_halved_until_it_does(command, monkeypatch, capsys):
    train.main(command("--out", "whole"))
    sizes = out_of_memory_above(2, monkeypatch)
    train.main(command("--out", "parts", "--save_steps", "2"))
    assert max(sizes) == 2
    torch.testing.assert_close(rows_of("parts"), rows_of("whole"), atol=1e-5, rtol=0)
    for parts, whole in zip(log_of("parts"), log_of("whole"), strict=True):
        assert parts["loss_by_timestep"] == pytest.approx(whole["loss_by_timestep"], rel=1e-4)
        assert parts["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-4)
    notes = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line]
    assert [note.split("takes ")[1][0] for note in notes] == ["4", "2"]
    resumed = command("--out", "parts", "--resume", "--steps", "6")
    train.main(resumed)
    assert log_of("parts")[-1]["step"] == 6


def test_halves_need_not_be_even_and_accumulation_halves_too(command, monkeypatch):
    train.main(command("--out", "whole", "--batch_size", "7", "--grad_accum", "3"))
    sizes = out_of_memory_above(3, monkeypatch)
    train.main(command("--out", "parts", "--batch_size", "7", "--grad_accum", "3"))
    assert max(sizes) == 2  # 7, 4, 2
    torch.testing.assert_close(rows_of("parts"), rows_of("whole"), atol=1e-5, rtol=0)


def test_what_was_added_before_memory_ran_out_is_not_added_twice(command, monkeypatch):
    train.main(command("--out", "whole", "--grad_accum", "2"))
    real, calls = train.inversion_loss, []

    def loss(*args):
        calls.append(args)
        if len(calls) == 2:  # the second half of the first step
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(*args)

    monkeypatch.setattr(train, "inversion_loss", loss)
    train.main(command("--out", "parts", "--grad_accum", "2"))
    torch.testing.assert_close(rows_of("parts"), rows_of("whole"), atol=1e-5, rtol=0)


def test_a_single_image_that_does_not_fit_ends_the_run(command, monkeypatch, capsys):
    out_of_memory_above(0, monkeypatch)
    with pytest.raises(SystemExit):
        train.main(command("--out", "run"))
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: out of memory: take a smaller --batch_size")


# --- Processes --------------------------------------------------------------------------------------------------------


def torchrun(processes, *options, **kwargs):
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), TRAIN_PY]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*run, *options], capture_output=True, text=True, env=environment, timeout=300, **kwargs)


def test_several_processes_learn_what_one_learns(command):
    """With accumulation, a number that does not divide the batch, and another number when the run goes on."""
    options = ["--batch_size", "5", "--grad_accum", "2"]
    train.main(command(*options, "--out", "one"))
    done = torchrun(2, *command(*options, "--out", "two", "--steps", "2"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("embedding  ") == 1 and done.stdout.count("training  ") == 1  # one process speaks
    train.main(command(*options, "--out", "two", "--resume", "--steps", "4"))
    torch.testing.assert_close(rows_of("two"), rows_of("one"), atol=1e-5, rtol=0)
    for two, one in zip(log_of("two"), log_of("one"), strict=True):
        assert two["loss_by_timestep"] == pytest.approx(one["loss_by_timestep"], rel=1e-4)
        assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-4)


def test_a_process_that_dies_ends_the_run_and_what_was_saved_is_whole(command, tmp_path):
    dying = tmp_path / "dying.py"
    dying.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(Path(TRAIN_PY).parent)!r})\n"
        "import train\n"
        "draw = train.draw_batch\n"
        "def draw_batch(dataset, size, schedule, step, args):\n"
        "    if step == 5 and os.environ['RANK'] == '1':\n"
        "        os._exit(1)\n"
        "    return draw(dataset, size, schedule, step, args)\n"
        "train.draw_batch = draw_batch\n"
        "train.main()\n"
    )
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(dying)]
    options = command("--out", "run", "--steps", "9", "--save_steps", "2")
    done = subprocess.run([*run, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    # the other process says so, unless torchrun, which names the failed one, was faster to end it
    assert "another process has ended" in done.stderr or "ChildFailedError" in done.stderr
    assert torch.load("run/state.pt", weights_only=True)["step"] == 4
    assert rows_of("run").isfinite().all()
    train.main(command("--out", "run", "--resume", "--steps", "9"))
    assert log_of("run")[-1]["step"] == 9


def test_a_lost_connection_is_a_sentence(monkeypatch):
    def fail(tensor):
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1234")

    monkeypatch.setattr(mu.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(mu.dist, "all_reduce", fail)
    with pytest.raises(mu.UserError, match="another process has ended .*continue with --resume"):
        mu.sum_over_processes(torch.zeros(1))
