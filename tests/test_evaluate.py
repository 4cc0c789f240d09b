"""judge.py: tells a difference from chance, and a spoiled method from the untouched one."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import model_utils as mu

MINI_SD, ROOT = Path(mu.DEFAULT_MODEL), Path(mu.DEFAULT_MODEL).parent
sys.path.insert(0, str(MINI_SD))

import judge  # noqa: E402
import reader  # noqa: E402
import world  # noqa: E402


def rows_of(shift=0.0, seeds=(0, 1), noise=0.01, salt=0):
    """What a method may have reached: each concept has its level, each run its chance."""
    rng, rows = random.Random(salt), []
    for i, concept in enumerate(judge.CONCEPTS):
        for seed in seeds:
            reached = {column: 0.5 + 0.05 * i + shift + rng.gauss(0, noise) for column in judge.COLUMNS}
            rows.append({"concept": concept, "seed": seed, "word": reached, "first": dict.fromkeys(judge.COLUMNS, 0.1)})
    return rows


def test_the_same_method_is_equal_and_another_is_not():
    baseline = rows_of(seeds=(0, 1, 2))
    assert all(judge.verdict(column, baseline, baseline)[3] == "equal" for column in judge.COLUMNS)
    other_seeds = [judge.verdict("clip_i", rows_of(salt=salt), baseline)[3] for salt in range(1, 201)]
    assert other_seeds.count("equal") >= 196
    for shift, words in ((0.03, ("BETTER", "more")), (-0.03, ("WORSE", "less"))):
        assert judge.verdict("clip_i", rows_of(shift, salt=7), baseline)[3] == words[0]
        assert judge.verdict("background", rows_of(shift, salt=7), baseline)[3] == words[1]
    # a concept that chance moves more counts with its own noise, not with that of the others
    wild = [row | {"word": {"clip_i": 0.5 + 0.1 * (-1) ** row["seed"]}} for row in baseline if row["concept"] == "mint"]
    shifted = [row | {"word": {"clip_i": 0.7}} for row in wild if row["seed"] == 0]
    calm = [row for row in baseline if row["concept"] != "mint"]
    assert judge.verdict("clip_i", shifted, calm + wild)[3] == "equal"
    kat = [row for row in rows_of(0.06, salt=7) if row["concept"] == "kat"]
    assert judge.verdict("clip_i", kat, calm + wild)[3] == "BETTER"
    # what would be a difference is none where the runs themselves differ as much
    assert judge.verdict("clip_i", rows_of(0.03, noise=0.06, salt=7), baseline)[3] == "equal"


def test_only_the_concepts_that_were_judged_are_compared():
    baseline = rows_of(seeds=(0, 1, 2))
    some = [row for row in rows_of(salt=3, seeds=(0,)) if row["concept"] in ("kat", "mint")]
    theirs = [row for row in baseline if row["concept"] in ("kat", "mint")]
    before, difference, error, _ = judge.verdict("looks", some, baseline)
    assert before == pytest.approx(0.5 + 0.05 * 2.5, abs=0.02)  # the two concepts lie 0.25 apart
    assert abs(difference) < 0.03
    assert error == pytest.approx(judge.noise(theirs, "looks") * (1 / 2 + 1 / 6) ** 0.5)
    assert judge.verdict("looks", some, [row for row in baseline if row["concept"] == "pup"]) is None
    assert judge.verdict("looks", some, rows_of(seeds=(0,))) is None  # one seed says nothing about chance


def test_the_table_shows_every_concept(capsys):
    ours, baseline = rows_of(-0.2, salt=1), rows_of(seeds=(0, 1, 2))
    for row in ours + baseline:  # a style has no background of its own
        if row["concept"] in world.STYLE_CONCEPTS:
            row["word"]["background"] = row["first"]["background"] = None
    judge.report(ours, baseline)
    table = capsys.readouterr().out
    assert all(f"{concept} (2 seeds)" in table for concept in judge.CONCEPTS)
    assert table.splitlines()[-1].split() == ["so", "it", "is", *["WORSE"] * 5, "less"]
    judge.report(ours, [])
    assert "there is no baseline" in capsys.readouterr().out


def test_the_reader_reads_pictures_it_has_not_seen():
    images, _, pictures = world.make_set(300, 977)
    images = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    found = reader.read(reader.load_reader(), images)
    toned = [p.tone is not None for p in pictures]  # printed in shades of one colour: its own colour cannot be seen
    right = {
        q: [a == (getattr(p, q) or "none") for a, p, t in zip(found[q], pictures, toned, strict=True) if not t]
        for q in found
    }
    wanted = {"kind": 0.97, "pattern": 0.93, "background": 0.97, "style": 0.97, "count": 0.97, "colour": 0.85}
    assert all(sum(right[q]) / len(right[q]) > least for q, least in wanted.items())


def run_judge(folder, *options):
    command = [sys.executable, "mini_sd/judge.py", "--out", "judged", *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture
def copy(tmp_path):
    """The project in another folder, to be changed."""
    for name in ("train.py", "sample.py", "model_utils.py", "data.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(MINI_SD, tmp_path / "mini_sd", ignore=shutil.ignore_patterns("work", "__pycache__"))
    return tmp_path


def test_a_run_is_judged_once(copy, monkeypatch, capsys):
    (copy / "mini_sd" / "baseline.json").unlink(missing_ok=True)
    options = ["--concepts", "kat", "--seeds", "0", "--drawings", "8", "--workers", "1", "--", "--steps", "2"]
    table = run_judge(copy, *options)
    assert "kat (1 seed)" in table and "there is no baseline" in table
    (first,) = copy.glob("judged/*/kat-0/judged.json")
    row = json.loads(first.read_text())
    assert set(row["word"]) == {"clip_i", "clip_t", "looks", "sentence", "background"}
    assert all(0 <= row["word"][name] <= 1 for name in ("looks", "sentence", "background"))
    saved = json.loads((first.parents[1] / "judged.json").read_text())
    before = first.stat().st_mtime_ns
    # the same as a baseline, and once more with another seed's name: nothing is learned or measured again
    saved["rows"] = [saved["rows"][0], saved["rows"][0] | {"seed": 1}]
    (copy / "mini_sd" / "baseline.json").write_text(json.dumps(saved))
    monkeypatch.chdir(copy)
    monkeypatch.setattr(judge, "HERE", copy / "mini_sd")
    monkeypatch.setattr(sys, "argv", ["judge.py", "--out", "judged", *options])
    judge.main()
    last = capsys.readouterr().out.splitlines()[-2].split()
    assert last == ["so", "it", "is", *["equal"] * 6] and first.stat().st_mtime_ns == before
    # another train.py is another method: it would be learned again
    (copy / "train.py").write_text("raise SystemExit('called')")
    with pytest.raises(SystemExit, match="train.py failed on kat, seed 0:\ncalled"):
        judge.main()


@pytest.mark.parametrize("option", ["--model", "--model=elsewhere", "--seed"])
def test_what_the_judge_says_itself_is_refused(option, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["judge.py", "--quick", "--", "--lr", "1e-2", option, "1"])
    with pytest.raises(SystemExit) as stop:
        judge.main()
    assert stop.value.code == 2 and f"{option.split('=')[0]}: that is for the judge" in capsys.readouterr().err


@pytest.mark.slow
def test_a_spoiled_loss_is_judged_worse_and_the_untouched_equal(copy):
    table = run_judge(copy, "--quick", "--seeds", "7")
    assert "WORSE" not in table and "BETTER" not in table and "equal" in table
    source = (copy / "train.py").read_text()
    target = "    target = schedule.target(latents, noise, timesteps)"
    assert source.count(target) == 1
    (copy / "train.py").write_text(
        source.replace(target, "    target = schedule.target(latents, noise / 2, timesteps)")
    )
    assert run_judge(copy, "--quick").splitlines()[-2].split()[3] == "WORSE"  # in CLIP-I
