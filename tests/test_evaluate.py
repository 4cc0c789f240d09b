"""evaluate.py tells a difference from noise, and classifier.py knows the world."""

import math
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import model_utils as mu
from mini_sd.eval import classifier, evaluate
from mini_sd.make import world

MINI_SD, ROOT = Path(mu.DEFAULT_MODEL), Path(mu.DEFAULT_MODEL).parent


def rows_of(shift=0.0, seeds=(0, 1), noise=0.01, salt=0, concepts=evaluate.CONCEPTS):
    """Rows of runs: each concept has its level, each run its noise."""
    rng, rows = random.Random(salt), []
    for i, concept in enumerate(evaluate.CONCEPTS):
        for seed in seeds:
            learned = {column: 0.5 + 0.05 * i + shift + rng.gauss(0, noise) for column in evaluate.COLUMNS}
            initializer = dict.fromkeys(evaluate.COLUMNS, 0.1)
            rows.append({"concept": concept, "seed": seed, "learned": learned, "initializer": initializer})
    return [row for row in rows if row["concept"] in concepts]


def verdict(rows, baseline, column="clip_i"):
    return evaluate.compare(column, rows, baseline)[3]


BASE = rows_of(seeds=(0, 1, 2))


def test_only_a_difference_beyond_the_noise_gets_a_verdict():
    assert all(verdict(BASE, BASE, column) == "within noise" for column in evaluate.COLUMNS)
    same_method = [verdict(rows_of(salt=salt), BASE) for salt in range(1, 201)]
    assert same_method.count("within noise") >= 196
    for shift, expected, expected_backgrounds in ((0.03, "better", "more"), (-0.03, "worse", "less")):
        assert verdict(rows_of(shift, salt=7), BASE) == expected
        assert verdict(rows_of(shift, salt=7), BASE, "training_backgrounds") == expected_backgrounds
    assert verdict(rows_of(0.03, noise=0.06, salt=7), BASE) == "within noise"  # these runs themselves vary as much


def test_a_concept_counts_with_its_own_noise():
    others = [row for row in BASE if row["concept"] != "mint"]
    mint = rows_of(seeds=(0, 1, 2), noise=0.2, concepts=["mint"])
    assert verdict(rows_of(0.1, seeds=(0,), concepts=["mint"]), others + mint) == "within noise"
    assert verdict(rows_of(0.06, salt=7, concepts=["kat"]), others + mint) == "better"


def test_only_concepts_with_results_on_both_sides_are_compared():
    both = ["kat", "mint"]
    ours, theirs = rows_of(salt=3, seeds=(0,), concepts=both), rows_of(seeds=(0, 1, 2), concepts=both)
    mean, difference, error, _ = evaluate.compare("prompt_accuracy", ours, BASE)
    assert mean == pytest.approx(0.5 + 0.05 * 2.5, abs=0.02)  # the two concepts lie 0.25 apart
    assert abs(difference) < 0.03
    deviation = evaluate.seed_deviation(evaluate.by_concept(theirs, "prompt_accuracy"))
    assert error == pytest.approx(deviation * math.sqrt(1 / 2 + 1 / 6))
    assert verdict(ours, rows_of(seeds=(0, 1, 2), concepts=["pup"])) == ""
    assert verdict(ours, rows_of(seeds=(0,))) == ""  # one seed says nothing about noise


def test_the_table_has_every_concept_and_a_verdict(capsys):
    ours, baseline = rows_of(-0.2, salt=1), rows_of(seeds=(0, 1, 2))
    for row in ours + baseline:
        if row["concept"] in world.STYLE_CONCEPTS:
            del row["learned"]["training_backgrounds"], row["initializer"]["training_backgrounds"]
    evaluate.report(ours, baseline)
    table = capsys.readouterr().out
    assert all(f"{concept} (2)" in table for concept in evaluate.CONCEPTS)
    assert table.splitlines()[-1].split() == ["verdict", *["worse"] * 6, "less"]
    evaluate.report(ours, [])
    assert "no baseline" in capsys.readouterr().out


def test_the_classifier_is_right_on_held_out_images():
    images, _, pictures = world.make_set(300, 977)
    predictions = classifier.classify(classifier.load_classifier(), images)
    wanted = {"kind": 0.97, "colour": 0.85, "pattern": 0.93, "accessory": 0.9, "background": 0.97, "style": 0.97}
    for name, least in {**wanted, "count": 0.97}.items():
        answers = zip(predictions[name], pictures, strict=True)  # in shades of one colour there is no colour to see
        correct = [found == getattr(picture, name) for found, picture in answers if not picture.tone]
        assert sum(correct) / len(correct) > least, name


@pytest.mark.parametrize("concept", evaluate.CONCEPTS)
def test_images_of_the_concept_itself_have_its_attributes(concept):
    network = classifier.load_classifier()
    pictures = [replace(world.concept_picture(concept, 100 + i), count=1) for i in range(16)]
    asked = evaluate.PROMPT_ATTRIBUTES[evaluate.property_of(concept)]
    edits = [replace(picture, **{name: value}) for name, value in asked for picture in pictures]
    photos, edits = (classifier.classify(network, [world.draw(p) for p in every]) for every in (pictures, edits))
    found = evaluate.accuracies(concept, photos, edits)
    assert found["attribute_accuracy"] > 0.8 and found["prompt_accuracy"] > 0.9
    assert ("accessory_accuracy" in found) == (concept in world.OBJECT_CONCEPTS)
    assert found.get("accessory_accuracy", 1) > 0.8


def run_options(folder):
    return ["--concepts", "kat", "--seeds", "0", "--num_images", "8", "--workers", "2", "--out", str(folder)]


def test_a_run_is_trained_once_and_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "BASELINE", tmp_path / "baseline.json")
    evaluate.main([*run_options(tmp_path), "--", "--steps", "2"])
    table = capsys.readouterr().out
    assert "kat (1)" in table and "no baseline" in table
    (path,) = tmp_path.glob("*/kat-0/evaluation.json")
    learned, written = mu.read_json(path)["learned"], path.stat().st_mtime_ns
    assert set(learned) == set(evaluate.COLUMNS) - {"gap_closed"} and all(0 <= x <= 1 for x in learned.values())
    saved = mu.read_json(path.parents[1] / "evaluation.json")
    saved["rows"] = [saved["rows"][0], saved["rows"][0] | {"seed": 1}]
    evaluate.write_json(tmp_path / "baseline.json", saved)
    evaluate.main([*run_options(tmp_path), "--", "--steps", "2"])
    assert capsys.readouterr().out.splitlines()[-2].split() == ["verdict", *["within", "noise"] * 7]
    assert path.stat().st_mtime_ns == written


@pytest.fixture
def copy(tmp_path):
    """The project in another folder, to be changed."""
    for name in ("train.py", "sample.py", "model_utils.py", "data.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(MINI_SD, tmp_path / "mini_sd", ignore=shutil.ignore_patterns("work", "__pycache__"))
    return tmp_path


def test_other_code_another_model_or_option_is_another_method(copy, monkeypatch):
    monkeypatch.setattr(evaluate, "MODEL", copy / "mini_sd")
    methods = [evaluate.method_fingerprint(*arguments) for arguments in (([], 48), ([], 48), (["--lr", "1"], 48))]
    for name in ("train.py", "mini_sd/unet/config.json"):
        with (copy / name).open("a") as file:
            file.write("\n")
        methods.append(evaluate.method_fingerprint([], 48))
    assert methods[0] == methods[1] and len(set(methods)) == 4


@pytest.mark.parametrize(
    "option", ["--model", "--pretrained_model_name_or_path", "--seed", "--out", "--train_data_dir"]
)
def test_options_that_evaluate_sets_are_refused_under_every_name(option, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--quick", "--", "--lr", "1e-2", f"{option}=1"])
    assert stop.value.code == 2 and "evaluate sets that itself" in capsys.readouterr().err


@pytest.mark.slow
def test_a_spoiled_loss_is_worse_and_the_unchanged_one_within_noise(copy):
    def evaluated(*options):
        command = [sys.executable, "-m", "mini_sd.eval.evaluate", "--quick", *options]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.splitlines()[-2]

    verdicts = evaluated("--seeds", "7")
    assert "within noise" in verdicts and "worse" not in verdicts and "better" not in verdicts
    source = (copy / "train.py").read_text()
    target = "schedule.target(latents, noise, timesteps)"
    assert source.count(target) == 1
    (copy / "train.py").write_text(source.replace(target, "schedule.target(latents, noise / 2, timesteps)"))
    assert evaluated().split()[1] == "worse"  # in CLIP-I
