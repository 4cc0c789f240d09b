"""The bundled model: the default run learns its token, and evaluate.py tells a difference from noise."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import model_utils as mu
import sample
import train

MINI_SD = Path(mu.DEFAULT_MODEL)
SPEC = importlib.util.spec_from_file_location("evaluate", MINI_SD / "evaluate.py")
evaluate = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(evaluate)


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_the_default_run_learns_the_token(two_threads, tmp_path, monkeypatch):
    """`python train.py`, shortened: images of the token are nearer to the training images than those of `cat`."""
    monkeypatch.chdir(tmp_path)
    folder = train.train(train.parse_options(["--steps", "100", "--log_steps", "10", "--preview_steps", "0"]))
    assert folder == Path("runs", "kat")
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert rows[0]["step"] == 0 and rows[-1]["eval_loss"] < 0.97 * rows[0]["eval_loss"]
    scores = json.loads((folder / "scores.json").read_text())["tokens"]
    (i_before, t_before), (i_after, t_after) = (
        [scores[token][name]["mean"] for name in ("clip_i", "clip_t")] for token in ("cat", "<kat>")
    )
    assert i_after > i_before + 0.15 and t_after > 0.8 * t_before


# --- The evaluation ---------------------------------------------------------------------------------------------------


def test_held_out_images_are_other_ones():
    for concept in evaluate.CONCEPTS:
        sheet = np.asarray(Image.open(MINI_SD / "held_out" / f"{concept}.png").convert("RGB"))
        tiles = {sheet[y : y + 64, x : x + 64].tobytes() for y in range(0, 256, 64) for x in range(0, 512, 64)}
        trained = {Image.open(path).convert("RGB").tobytes() for path in (MINI_SD / "concepts" / concept).iterdir()}
        assert len(tiles) == 32 and len(trained) == 5 and not tiles & trained


def results(concept, values):
    """Results with these values, that of the first seed first, and the same gain on each of two held-out images."""
    return [{"concept": concept, "seed": i, "gain": v, "gains": np.full(2, v)} for i, v in enumerate(values)]


def test_a_difference_has_the_error_of_seeds_and_images():
    deviation = 1.5**0.5  # of three seeds: the standard error of a difference of 2 x 1 from 2 x 3 runs is 1
    theirs = sum((results(c, [m - deviation, m, m + deviation]) for c, m in (("kat", 100), ("mint", 50))), [])
    ours = results("kat", [103]) + results("mint", [53])
    assert evaluate.compare(ours, theirs, "gain") == pytest.approx((3, 1))
    for row, sign in zip(ours, (1, -1), strict=True):
        row["gains"] = row["gains"] + [sign, -sign]  # a variance of 2 between two images: 1 of their mean
    assert evaluate.compare(ours, theirs, "gain") == pytest.approx((3, 1.5**0.5))


def test_gains_are_in_percent_of_the_baselines():
    baseline = [{"concept": "kat", "seed": s, "losses": x} for s, x in ((None, [8, 6]), (0, [4, 4]), (1, [4, 2]))]
    rows = [{"concept": "kat", "seed": 5, "losses": [5, 6]}]
    evaluate.add_gains(rows, baseline)
    assert rows[0]["gain"] == pytest.approx(100 * 1.5 / 3.5) and rows[0]["gains"] == pytest.approx([300 / 3.5, 0])


def test_the_baseline_has_ten_seeds_of_every_concept_and_learns_each():
    rows = json.loads(evaluate.BASELINE.read_text())
    evaluate.add_gains(rows, rows)
    seeds = [None, *range(10)]
    assert {(row["concept"], row["seed"]) for row in rows} == {(c, s) for c in evaluate.CONCEPTS for s in seeds}
    assert all(row["gain"] > 70 or row["seed"] is None for row in rows)


def test_neither_a_card_nor_another_loss_changes_what_is_measured(monkeypatch):
    """On the CPU in fp32; training with a loss of zero leaves the initializer's row."""
    zero = {"mean": 0.0, "error": 0.0}
    scores = {token: {"clip_i": zero, "clip_t": zero} for token in ("cat", "<kat>")}
    monkeypatch.setattr(sample, "score_tokens", lambda *_, **__: scores)
    found = [evaluate.measure("kat", None)["losses"], evaluate.measure("kat", 0, ["--steps", "2"])["losses"]]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert evaluate.measure("kat", 0, ["--steps", "2"])["losses"] == found[1] != found[0]
    monkeypatch.setattr(train, "inversion_loss", lambda components, latents, *_: 0 * latents.sum(dim=(1, 2, 3)))
    monkeypatch.setattr(torch.Tensor, "backward", lambda _: None)
    assert evaluate.measure("kat", 0, ["--steps", "2"])["losses"] == pytest.approx(found[0])


def test_evaluate_runs_a_variant_with_the_options_after_the_dashes(tmp_path):
    argv = [sys.executable, MINI_SD / "evaluate.py", "--variant", "huber", "--concepts", "kat", "--seeds", "3"]
    argv += ["--", "--steps", "1"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if line.startswith("| huber | **-"))
    assert float(row.split("**")[1]) < -80  # one step learns nothing
    failed = subprocess.run([*argv[:-2], "--stpes", "1"], capture_output=True, text=True, cwd=tmp_path)
    assert failed.returncode and "--stpes" in failed.stderr
