"""What the README shows is what the code is: the loss, and every change of it that it offers."""

import argparse
import re
import shlex
import types
from pathlib import Path

import pytest
from safetensors.torch import load_file

import model_utils as mu
import sample
import train

ROOT = Path(__file__).parent.parent
README, MINI_SD, PROMISES, SOURCE = (
    (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "mini_sd/README.md", "tests/README.md", "train.py")
)
DIFFS = re.findall(r"```diff\n(.*?)```", README + MINI_SD, re.DOTALL)


def learned(source, folder, model):
    """The rows that a train.py of this source learns in a few steps."""
    module = types.ModuleType("train_copy")
    exec(compile(source, "train_copy.py", "exec"), module.__dict__)  # __name__ is not "__main__": nothing runs
    images = str(Path(mu.DEFAULT_MODEL, "concepts", "kat"))
    options = ["--model", model, "--images", images, "--steps", "4", "--batch_size", "4", "--lr", "1e-2", "--no-score"]
    options += ["--recipe", "fast", "--initializer_token", "cat"]
    run = module.train(module.parse_options([*options, "--preview_steps", "0", "--output_dir", str(folder)]))
    return load_file(run / "learned_embeds.safetensors")["<kat>"]


def test_the_loss_is_shown_as_it_stands():
    shown = re.search(r"```python\n(def inversion_loss.*?)```", README, re.DOTALL).group(1)
    whole = re.search(r"^def inversion_loss.*?(?=\n\n\n)", SOURCE, re.DOTALL | re.MULTILINE).group(0)
    assert re.sub(r'\n    """.*?"""', "", whole, flags=re.DOTALL).strip() == shown.strip()


@pytest.mark.parametrize("diff", DIFFS, ids=range(len(DIFFS)))
def test_every_change_applies_and_runs(diff, tiny_model, tmp_path):
    lines = diff.splitlines()
    assert len(lines) <= 6 and all(line[:1] in "+- " for line in lines)
    before = "\n".join(line[1:] for line in lines if line[0] in "- ")
    after = "\n".join(line[1:] for line in lines if line[0] in "+ ")
    assert SOURCE.count(before) == 1
    plain = learned(SOURCE, tmp_path / "plain", tiny_model)
    changed = learned(SOURCE.replace(before, after), tmp_path / "changed", tiny_model)
    assert changed.shape == plain.shape and changed.isfinite().all()
    assert (changed - plain).abs().max() > 1e-5  # it does something


def test_there_are_diffs():
    assert len(DIFFS) >= 6


@pytest.mark.parametrize("script", [train, sample])
def test_the_table_of_options_is_that_of_help(script):
    """Every option by its first name, those of --help and no others; the hidden ones of diffusers' script aside."""
    table = re.search(rf"\| options of {script.__name__}\.py \|.*?\n\n", README, re.DOTALL).group(0)
    actions = [a for a in script.build_parser()._actions if a.help != argparse.SUPPRESS and a.dest != "help"]
    assert sorted(re.findall(r"`(--\w+)`", table)) == sorted(action.option_strings[0] for action in actions)


@pytest.mark.parametrize("text", [README, MINI_SD], ids=["README", "mini_sd"])
def test_commands_are_ones_that_the_scripts_take(text):
    commands = re.findall(r"python (train|sample)\.py((?: \\\n|[^\n`&|#])*)", text.replace("...", ""))
    assert commands
    for script, options in commands:
        {"train": train, "sample": sample}[script].build_parser().parse_args(shlex.split(options))


def test_every_test_that_is_named_exists():
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+?)(?:_?\.\.\.)?`", PROMISES)
    assert len(named) > 20
    assert all(f"def {name}" in tests for name in named), [name for name in named if f"def {name}" not in tests]
