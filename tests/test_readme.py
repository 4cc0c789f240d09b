"""What the READMEs show is what the code is: the loss, the changes of it, the commands, the test files."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import edited_train, options, read_rows

import sample
import train

ROOT = Path(__file__).parent.parent
SOURCE = (ROOT / "train.py").read_text(encoding="utf-8")
README, MINI_SD_README = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "mini_sd/README.md"))
DIFFS = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)


@pytest.mark.published
def test_the_loss_is_shown_as_it_is():
    shown = re.search(r"```python\n(def inversion_loss.*?)```", README, re.DOTALL).group(1)
    whole = re.search(r"^def inversion_loss.*?(?=\n\n\n)", SOURCE, re.DOTALL | re.MULTILINE).group(0)
    assert re.sub(r'\n    """.*?"""', "", whole, flags=re.DOTALL).strip() == shown.strip()


@pytest.mark.published
@pytest.mark.parametrize("diff", DIFFS, ids=range(len(DIFFS)))
def test_every_change_shown_applies_and_learns_something_else(diff, tiny_model, image_folder, tmp_path):
    lines = diff.splitlines()
    before, after = ("\n".join(line[1:] for line in lines if line[0] in kept) for kept in ("- ", "+ "))
    rows = []
    for name, module in (("plain", train), ("changed", edited_train((before, after)))):
        more = ["--timestep_sampling", "uniform", "--output_dir", str(tmp_path / name)]  # Min-SNR: at low noise too
        argv = options(tiny_model, image_folder, *more, steps=8)
        rows.append(read_rows(module.train(module.parse_options(argv))))
    assert rows[1].isfinite().all() and not torch.allclose(*rows, atol=1e-5)


def test_there_are_changes_of_the_loss_to_try():
    assert len(DIFFS) >= 2


@pytest.mark.parametrize("text", [README, MINI_SD_README], ids=["README", "mini_sd"])
def test_every_command_shown_has_valid_options(text):
    text = text.replace("...", "").replace("\\\n", "")
    commands = re.findall(r"python (train|sample)\.py([^\n`&|#]*)", text)
    assert commands
    for script, words in commands:
        {"train": train, "sample": sample}[script].build_parser().parse_args(shlex.split(words))


def test_every_option_and_test_file_named_exists():
    known = {name for script in (train, sample) for name in script.build_parser()._option_string_actions}
    known |= {"--quick", "--save_baseline", "--seeds", "--nproc_per_node"}  # of other programs
    assert set(re.findall(r"`(--\w+)", README)) <= known
    named = re.findall(r"`(?:tests/)?(test_\w+)\.py`", README)
    assert len(named) >= 5 and all((ROOT / "tests" / f"{name}.py").exists() for name in named)
