"""Read off a picture of the world what only the world can know: kind, colour, pattern, background and so on.

A small convolutional network, trained on the captioned world itself, so that "the sentence was ignored" or "the
background was learned too" can be counted. judge.py uses it; textual inversion does not need it.

    python mini_sd/reader.py --minutes 6        # train it and write reader.safetensors
"""

import argparse
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import world  # noqa: E402

# what is read, and the answers there are
QUESTIONS = {
    "kind": world.KINDS,
    "colour": list(world.COLOURS),
    "pattern": world.PATTERNS,
    "accessory": ["none", *world.ACCESSORIES],
    "background": [*world.BACKGROUNDS, *world.SCENES],
    "style": world.STYLES,
    "count": [1, 2],
}


class Reader(nn.Module):
    """images [B, 3, 64, 64] in [-1, 1] -> {question: logits [B, answers]}"""

    def __init__(self):
        super().__init__()
        widths = [3, 32, 64, 96, 128]
        layers = []
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.body = nn.Sequential(*layers)  # [B, 128, 4, 4]
        self.middle = nn.Sequential(nn.Linear(128 * 16, 256), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(256, len(answers)) for name, answers in QUESTIONS.items()})

    def forward(self, images):
        features = self.middle(self.body(images).flatten(1))
        return {name: head(features) for name, head in self.heads.items()}


def load_reader(path=HERE / "reader.safetensors"):
    reader = Reader()
    reader.load_state_dict({name: weight.float() for name, weight in load_file(path).items()})
    return reader.requires_grad_(False).eval()


@torch.no_grad()
def read(reader, images):
    """images [B, 3, 64, 64] in [-1, 1], or PIL pictures -> {question: list of B answers}"""
    if not torch.is_tensor(images):
        images = torch.from_numpy(np.stack([np.asarray(i.convert("RGB")) for i in images])).permute(0, 3, 1, 2)
        images = images / 127.5 - 1
    found = {name: [] for name in QUESTIONS}
    for chunk in images.split(256):
        for name, logits in reader(chunk).items():
            found[name] += [QUESTIONS[name][i] for i in logits.argmax(1).tolist()]
    return found


def labels(pictures):
    """{question: [N] indices of the true answers}"""
    truth = {name: [getattr(p, name) or "none" for p in pictures] for name in QUESTIONS}
    return {name: torch.tensor([QUESTIONS[name].index(a) for a in answers]) for name, answers in truth.items()}


def blurred(images, generator):
    """Soft and noisy as what a small autoencoder decodes: else the reader would know the world's crisp edges alone."""
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    share = torch.rand(len(images), 1, 1, 1, generator=generator)
    noise = torch.randn(images.shape, generator=generator) * 0.15 * torch.rand(share.shape, generator=generator)
    return images.lerp(soft, share) + noise


def train(args):
    from pretrain import TEST_SEED, TRAIN_SEED, set_lr, to_float

    images, test = (torch.from_numpy(np.load(args.work / f"{split}.npy")) for split in ("train", "test"))
    images, test = images.permute(0, 3, 1, 2), to_float(test.permute(0, 3, 1, 2))
    truth, test_truth = (
        labels([world.random_picture(rng) for _ in range(n)])
        for n, rng in ((len(images), random.Random(TRAIN_SEED)), (len(test), random.Random(TEST_SEED)))
    )
    torch.manual_seed(0)
    reader, generator = Reader(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=2e-3, weight_decay=0.02, fused=True)
    begun, step, done = time.time(), 0, 0.0
    while done < 1:
        picks = torch.randint(len(images), (64,), generator=generator)
        x = blurred(to_float(images[picks]), generator)
        x = x.flip(-1) if step % 2 else x
        loss = sum(F.cross_entropy(logits, truth[name][picks]) for name, logits in reader(x).items())
        done = min(1.0, (time.time() - begun) / (60 * args.minutes))
        set_lr(optimizer, 2e-3, done, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
        if step % 200 == 0 or done == 1:
            found = {name: [QUESTIONS[name].index(a) for a in answers] for name, answers in read(reader, test).items()}
            right = {name: f"{(torch.tensor(found[name]) == test_truth[name]).float().mean():.3f}" for name in found}
            print(f"step {step}, loss {loss.item():.3f}, right on unseen pictures: {right}", flush=True)
    save_file({name: weight.half() for name, weight in reader.state_dict().items()}, HERE / "reader.safetensors")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE / "work", help="folder of pretrain.py's pictures")
    parser.add_argument("--minutes", type=float, default=6)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
