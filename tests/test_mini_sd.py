"""The bundled model: the default run learns its token, and evaluate.py tells a difference from noise."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import model_utils as mu
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
    assert rows[-1]["eval_loss"] < 0.97 * rows[0]["eval_loss"]
    scores = json.loads((folder / "scores.json").read_text())["tokens"]
    before, after = (scores[token]["clip_i"]["mean"] for token in ("cat", "<kat>"))
    assert (after - before) / (evaluate.CONCEPTS["kat"][2] - before) > 0.5  # gap closed
    assert scores["<kat>"]["clip_t"]["mean"] > 0.8 * scores["cat"]["clip_t"]["mean"]


# --- The evaluation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("difference, verdict", [(0, "within noise"), (0.034, "within noise"), (0.036, "better")])
def test_only_a_difference_beyond_the_noise_gets_a_verdict(difference, verdict):
    """The standard error of a difference of 2 x 1 from 2 x 3 runs, whose seeds deviate by `deviation`, is 0.01."""
    deviation = 0.01 * 2 / (2 * (1 + 1 / 3)) ** 0.5
    theirs = {concept: [mean - deviation, mean, mean + deviation] for concept, mean in (("kat", 0.5), ("mint", 0.3))}
    found, error, said = evaluate.compare({"kat": [0.5 + difference], "mint": [0.3 + difference]}, theirs)
    assert found == pytest.approx(difference) and error == pytest.approx(0.01) and said == verdict
    fallen = {"kat": [0.5 - difference], "mint": [0.3 - difference]}
    assert evaluate.compare(fallen, theirs)[2] == verdict.replace("better", "worse")


def test_the_baseline_has_three_seeds_of_every_concept_and_learns_each():
    rows = json.loads(evaluate.BASELINE.read_text())
    assert sorted((row["concept"], row["seed"]) for row in rows) == sorted(
        (c, s) for c in evaluate.CONCEPTS for s in range(3)
    )
    assert all(row["learned"]["gap_closed"] > 0.5 and row["initializer"]["gap_closed"] == 0 for row in rows)


def test_evaluate_runs_train_py_with_the_options_after_the_dashes(tmp_path):
    argv = [sys.executable, MINI_SD / "evaluate.py", "--concepts", "kat", "--seeds", "3", "--", "--steps", "1"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "kat" in done.stdout and "CLIP-I" in done.stdout
    gap_closed = next(line for line in done.stdout.splitlines() if line.startswith("gap closed"))
    assert gap_closed.endswith("worse")  # one step learns nothing
    failed = subprocess.run([*argv[:-2], "--stpes", "1"], capture_output=True, text=True, cwd=tmp_path)
    assert failed.returncode and "--stpes" in failed.stderr
