"""What the READMEs show is what the code is: the loss, the changes of it, the commands, the options, the tests."""

import argparse
import re
import shlex
import types
from pathlib import Path

import pytest
from conftest import read_rows

import model_utils as mu
import sample
import train

ROOT = Path(__file__).parent.parent
SOURCE = (ROOT / "train.py").read_text(encoding="utf-8")
README, TESTS_README, MINI_SD_README = (
    (ROOT / folder / "README.md").read_text(encoding="utf-8") for folder in ("", "tests", "mini_sd")
)
DIFFS = re.findall(r"```diff\n(.*?)```", README + MINI_SD_README, re.DOTALL)
TEST_FILES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py")}


def train_with(source, folder, model):
    """The rows that a train.py of this source learns in a few steps."""
    module = types.ModuleType("train_copy")
    exec(compile(source, "train_copy.py", "exec"), module.__dict__)  # __name__ is not "__main__": nothing runs
    argv = ["--model", model, "--images", str(Path(mu.DEFAULT_MODEL, "concepts", "kat")), "--initializer_token", "cat"]
    argv += ["--recipe", "fast", "--steps", "4", "--batch_size", "4", "--lr", "1e-2", "--no-score"]
    return read_rows(module.train(module.parse_options([*argv, "--preview_steps", "0", "--output_dir", str(folder)])))


def test_the_loss_is_shown_as_it_is():
    shown = re.search(r"```python\n(def inversion_loss.*?)```", README, re.DOTALL).group(1)
    whole = re.search(r"^def inversion_loss.*?(?=\n\n\n)", SOURCE, re.DOTALL | re.MULTILINE).group(0)
    assert re.sub(r'\n    """.*?"""', "", whole, flags=re.DOTALL).strip() == shown.strip()


@pytest.mark.parametrize("diff", DIFFS, ids=range(len(DIFFS)))
def test_every_change_shown_applies_and_makes_a_difference(diff, tiny_model, tmp_path):
    lines = diff.splitlines()
    assert len(lines) <= 6 and all(line[:1] in "+- " for line in lines)
    before = "\n".join(line[1:] for line in lines if line[0] in "- ")
    after = "\n".join(line[1:] for line in lines if line[0] in "+ ")
    assert SOURCE.count(before) == 1
    plain = train_with(SOURCE, tmp_path / "plain", tiny_model)
    changed = train_with(SOURCE.replace(before, after), tmp_path / "changed", tiny_model)
    assert changed.shape == plain.shape and changed.isfinite().all()
    assert (changed - plain).abs().max() > 1e-5


@pytest.mark.parametrize("text", [README, MINI_SD_README], ids=["README", "mini_sd"])
def test_every_command_shown_has_valid_options(text):
    text = text.replace("...", "").replace("\\\n", "")
    commands = re.findall(r"python (train|sample)\.py([^\n`&|#]*)", text)
    assert commands and len(DIFFS) >= 5  # what is looked for is found
    for script, options in commands:
        {"train": train, "sample": sample}[script].build_parser().parse_args(shlex.split(options))


@pytest.mark.parametrize("script", [train, sample])
def test_the_table_of_options_is_complete(script):
    table = re.search(rf"\| options of {script.__name__}\.py .*?\n\n", README, re.DOTALL).group(0)
    visible = [action for action in script.build_parser()._actions if action.help != argparse.SUPPRESS]
    assert set(re.findall(r"--\w+", table)) == {action.option_strings[0] for action in visible} - {"-h"}


def test_every_test_named_exists_and_every_test_file_is_named():
    named = re.findall(r"`(test_\w+?)`", README + TESTS_README + MINI_SD_README)
    assert len(named) > 40
    assert [name for name in named if f"def {name}(" not in "".join(TEST_FILES.values())] == []
    assert [name for name in TEST_FILES if name not in TESTS_README] == []
