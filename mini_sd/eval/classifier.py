"""Attribute classifier: the kind, colour, pattern, background and so on of an image of the world.

A small convolutional network, trained on the world itself, so that "the prompt was ignored" or "the background was
learned too" can be counted. evaluate.py uses it; textual inversion does not need it.

    python -m mini_sd.eval.classifier --minutes 12      # train it and write classifier.safetensors
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from mini_sd.make import world
from mini_sd.make.pretrain import TEST_SEED, TRAIN_SEED, set_lr, to_float

WEIGHTS = Path(__file__).resolve().with_name("classifier.safetensors")
CLASSES = {  # of each attribute of a Picture
    "kind": world.KINDS,
    "colour": list(world.COLOURS),
    "pattern": world.PATTERNS,
    "accessory": [None, *world.ACCESSORIES],
    "accessory_colour": [None, *world.COLOURS],  # None without an accessory
    "background": [*world.BACKGROUNDS, *world.SCENES],
    "style": world.STYLES,
    "count": [1, 2],
}


class Classifier(nn.Module):
    """images [B, 3, 64, 64] in [-1, 1] -> {attribute: logits [B, classes]}"""

    def __init__(self):
        super().__init__()
        widths = [3, 32, 64, 96, 128]
        layers = []
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.body = nn.Sequential(*layers)  # [B, 128, 4, 4]
        self.middle = nn.Sequential(nn.Linear(128 * 16, 256), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(256, len(classes)) for name, classes in CLASSES.items()})

    def forward(self, images):
        features = self.middle(self.body(images).flatten(1))
        return {name: head(features) for name, head in self.heads.items()}


def load_classifier(path=WEIGHTS):
    classifier = Classifier()
    classifier.load_state_dict({name: weight.float() for name, weight in load_file(path).items()})
    return classifier.requires_grad_(False).eval()


@torch.no_grad()
def classify(classifier, images):
    """images [B, 3, 64, 64] in [-1, 1], or PIL images -> {attribute: list of B predictions}"""
    if not torch.is_tensor(images):
        images = to_float(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
    predictions = {name: [] for name in CLASSES}
    for batch in images.split(256):
        for name, logits in classifier(batch).items():
            predictions[name] += [CLASSES[name][i] for i in logits.argmax(1).tolist()]
    return predictions


def class_of(picture, name):
    """The class of a Picture's attribute."""
    return None if name == "accessory_colour" and not picture.accessory else getattr(picture, name)


def blurred(images, generator):
    """As soft and noisy as decoded latents: a classifier trained on the world's crisp edges alone would need those."""
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    fraction = torch.rand(len(images), 1, 1, 1, generator=generator)
    noise = torch.randn(images.shape, generator=generator) * 0.15 * torch.rand(fraction.shape, generator=generator)
    return images.lerp(soft, fraction) + noise


def labelled_set(n, seed):
    """Images uint8 [n, 3, 64, 64] of the world, and {attribute: indices [n] of their classes}."""
    images, _, pictures = world.make_set(n, seed)
    labels = {a: torch.tensor([classes.index(class_of(p, a)) for p in pictures]) for a, classes in CLASSES.items()}
    return torch.from_numpy(images).permute(0, 3, 1, 2), labels


def train(minutes):
    (images, labels), (test_images, test_labels) = labelled_set(32000, TRAIN_SEED), labelled_set(2000, TEST_SEED)
    torch.manual_seed(0)
    classifier, generator = Classifier(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.02, fused=True)
    begun, step, progress = time.time(), 0, 0.0
    while progress < 1:
        picks = torch.randint(len(images), (64,), generator=generator)
        batch = blurred(to_float(images[picks]), generator)
        batch = batch.flip(-1) if step % 2 else batch
        loss = sum(F.cross_entropy(logits, labels[name][picks]) for name, logits in classifier(batch).items())
        progress = min(1.0, (time.time() - begun) / (60 * minutes))
        set_lr(optimizer, 2e-3, progress, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
        if step % 200 == 0 or progress == 1:
            with torch.no_grad():
                logits = classifier(to_float(test_images))
            accuracy = {a: (logits[a].argmax(1) == test_labels[a]).float().mean().item() for a in CLASSES}
            accuracy = ", ".join(f"{name} {value:.3f}" for name, value in accuracy.items())
            print(f"step {step}, loss {loss.item():.3f}, accuracy on held-out images: {accuracy}", flush=True)
    save_file({name: weight.half() for name, weight in classifier.state_dict().items()}, WEIGHTS)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=12, help="training time")
    train(parser.parse_args().minutes)


if __name__ == "__main__":
    main()
