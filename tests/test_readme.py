"""What the README shows is what the code is: the loss, and every change of it that it offers."""

import re
import types
from pathlib import Path

import pytest
import torch

import model_utils as mu

ROOT = Path(__file__).parent.parent
README, SOURCE = (ROOT / "README.md").read_text(encoding="utf-8"), (ROOT / "train.py").read_text(encoding="utf-8")
DIFFS = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)


def losses(source, model):
    """Losses [B] by the inversion_loss of a train.py's source, and the gradient that reaches the sentences."""
    module = types.ModuleType("train_copy")
    exec(compile(source, "train_copy.py", "exec"), module.__dict__)  # __name__ is not "__main__": nothing runs
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(4, 4, 8, 8, generator=generator) for _ in range(2))
    embeddings = torch.randn(4, 32, 32, generator=generator).requires_grad_()
    unet, schedule, timesteps = mu.load_unet(model, "cpu"), mu.load_schedule(model), torch.tensor([10, 300, 600, 950])
    loss = module.inversion_loss(unet, latents, noise, timesteps, embeddings, schedule)
    loss.mean().backward()
    return loss.detach(), embeddings.grad


def test_the_loss_is_shown_as_it_stands():
    shown = re.search(r"```python\n(def inversion_loss.*?)```", README, re.DOTALL).group(1)
    whole = re.search(r"^def inversion_loss.*?(?=\n\n\n)", SOURCE, re.DOTALL | re.MULTILINE).group(0)
    assert re.sub(r'\n    """.*?"""', "", whole, flags=re.DOTALL).strip() == shown.strip()


@pytest.mark.parametrize("diff", DIFFS, ids=range(len(DIFFS)))
def test_every_change_applies_and_runs(diff, tiny_model):
    lines = diff.splitlines()
    assert len(lines) <= 6 and all(line[:1] in "+-" for line in lines)
    before = "\n".join(line[1:] for line in lines if line[0] == "-")
    after = "\n".join(line[1:] for line in lines if line[0] == "+")
    assert SOURCE.count(before) == 1
    plain, _ = losses(SOURCE, tiny_model)
    changed, grad = losses(SOURCE.replace(before, after), tiny_model)
    assert changed.shape == (4,) and changed.isfinite().all() and not torch.equal(plain, changed)
    assert grad.isfinite().all() and grad.abs().max() > 0


def test_there_are_diffs():
    assert len(DIFFS) >= 3


def test_every_test_that_is_named_exists():
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+?)(?:_?\.\.\.)?`", README)
    assert len(named) > 20
    assert all(f"def {name}" in tests for name in named), [name for name in named if f"def {name}" not in tests]
