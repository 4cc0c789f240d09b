"""Is a change of the scripts better? Learn the concepts of mini_sd, and compare with the baseline.

python mini_sd/evaluate.py --quick                  # four concepts, one seed: a minute on two cores
python mini_sd/evaluate.py                          # six concepts, three seeds
python mini_sd/evaluate.py --quick -- --lr 1e-2     # options after -- are train.py's
python mini_sd/evaluate.py --variant huber min_snr  # the scripts with mini_sd/variants/NAME.diff applied to a copy

Each run is train.py's, one a core, on the CPU in fp32. Held-out gain: how far the learned row lowers the published loss
(Gal et al. 2022, equation 2, at uniform timesteps) on 32 images of the concept that were not trained on, below that of
the initializer's row, in percent of the baseline's. Images, timesteps and noise are the same for every row. The loss
is written out here, around sample.py's denoiser: editing train.py's does not change it. CLIP-I, CLIP-T: see sample.py.
The baseline (baseline.json) is the unchanged train.py with ten seeds. Bold: more than three standard errors.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

FOLDER = Path(__file__).resolve().parent
BASELINE = FOLDER / "baseline.json"
CONCEPTS = {  # the initializer token, what the token stands for
    "kat": ("cat", "object"), "pup": ("dog", "object"), "finn": ("fish", "object"), "buggy": ("car", "object"),
    "blueprint": ("drawing", "style"), "mint": ("pixel", "style"),
}  # fmt: skip
TIMESTEPS = range(62, 1000, 125)  # the centers of eight equal parts


@torch.no_grad()
def held_out_losses(train, components, concept, token):
    """The published loss on each of the held-out images [32], its mean over TIMESTEPS. train: the module."""
    sheet = torch.from_numpy(np.array(Image.open(FOLDER / "held_out" / f"{concept}.png").convert("RGB")))
    images = sheet.unfold(0, 64, 64).unfold(1, 64, 64).flatten(0, 1) / 127.5 - 1  # [32, 3, 64, 64]
    latents, _ = train.mu.encode_images(components, images)  # the mean of the VAE's posterior
    templates = {"object": train.data.OBJECT_TEMPLATES, "style": train.data.STYLE_TEMPLATES}[CONCEPTS[concept][1]]
    captions = [templates[i % len(templates)].format(token) for i in range(len(latents))]
    denoise, generator = train.sample.denoiser(components, captions), torch.Generator().manual_seed(0)
    losses = []
    for t in TIMESTEPS:
        abar, noise = components.schedule.alphas_cumprod[t], torch.randn(latents.shape, generator=generator)
        noise_pred = denoise(abar.sqrt() * latents + (1 - abar).sqrt() * noise, t)
        losses.append((noise_pred - noise).square().mean(dim=(1, 2, 3)))
    return torch.stack(losses).mean(dim=0).tolist()


def measure(concept, seed, options=()):
    """Learn a concept (seed None: measure its initializer token) -> {"losses": [32], "clip_i", "clip_t", "seconds"}."""
    import sample  # here, since each process has scripts of its own
    import train

    word, learnable_property = CONCEPTS[concept]
    images, hardware = str(FOLDER / "concepts" / concept), ["--model", str(FOLDER), "--device=cpu", "--precision=fp32"]
    argv = [*hardware, "--images", images, "--initializer_token", word, "--placeholder_token", f"<{concept}>"]
    argv += ["--learnable_property", learnable_property, f"--seed={seed or 0}", "--preview_steps=0", "--no-score"]
    token, source = (word, ["--prompt", word]) if seed is None else (f"<{concept}>", ["--embedding"])
    with tempfile.TemporaryDirectory() as folder:
        args, start = train.parse_options([*argv, f"--output_dir={folder}/run", *options]), time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            source += [str(train.train(args))] if seed is not None else []
            seconds = time.perf_counter() - start
            components, *_ = sample.load_run(sample.build_parser().parse_args([*hardware, *source]))
    training_images = sample.mu.to_pil(sample.load_images(images, components.resolution)[0])
    settings = sample.sampling_settings(FOLDER, {"batch_size": 32}) | {"num_images": 32, "seed": seed or 0}
    clip = sample.load_clip(FOLDER, components.device)
    scores = sample.score_tokens(components, clip, training_images, [token], learnable_property, **settings)[token]
    found = {name: round(scores[name]["mean"], 4) for name in ("clip_i", "clip_t")}
    losses = [round(loss, 6) for loss in held_out_losses(train, components, concept, token)]
    return {"concept": concept, "seed": seed, "seconds": round(seconds, 1), **found, "losses": losses}


def measure_all(runs, options, variant):
    """The results of `measure` for pairs of concept and seed, one a core, with the scripts or a variant of them."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        for name in ("train.py", "sample.py", "data.py", "model_utils.py"):
            shutil.copy(FOLDER.parent / name, folder)
        if variant:
            subprocess.run(["git", "apply", FOLDER / "variants" / f"{variant}.diff"], cwd=folder, check=True)
        sys.path[0] = folder  # the processes import from there
        with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
            futures = [pool.submit(measure, *run, options) for run in runs]
            return [future.result() for future in tqdm(futures, desc=variant or "train.py", unit="run")]


def add_gains(rows, baseline):
    """Add to each result its gain on each held-out image, and their mean, in percent of the baseline's mean gain."""
    for row in rows:
        of_concept = [other for other in baseline if other["concept"] == row["concept"]]
        start, *learned = (np.array(other["losses"]) for other in of_concept)  # that of the initializer is the first
        row["gains"] = 100 * (start - row["losses"]) / np.mean(start - learned)
        row["gain"] = row["gains"].mean()


def compare(ours, theirs, name):
    """Two lists of results of the same concepts -> the difference of their means, its standard error."""
    differences, variance = [], 0
    for concept in {row["concept"] for row in ours}:
        groups = [[row for row in rows if row["concept"] == concept] for rows in (ours, theirs)]
        values = [np.array([row[name] for row in group]) for group in groups]
        differences.append(values[0].mean() - values[1].mean())
        between_seeds = [value.var(ddof=1) if len(value) > 1 else 0 for value in values]
        variance += max(between_seeds) / len(values[0]) + between_seeds[1] / len(values[1])
        if name == "gain":  # paired, since the images are the same
            ours_of, theirs_of = (np.mean([row["gains"] for row in group], axis=0) for group in groups)
            variance += (ours_of - theirs_of).var(ddof=1) / len(ours_of)
    return np.mean(differences), np.sqrt(variance) / len(differences)


def report(name, rows, baseline):
    """Print the results of each concept, and the differences from the baseline, as lines of a table."""
    for concept in dict.fromkeys(row["concept"] for row in rows):
        start = next(row for row in baseline if row["concept"] == concept)
        gains, *clip = ([r[key] for r in rows if r["concept"] == concept] for key in ("gain", "clip_i", "clip_t"))
        moves = [f"{start[key]:.2f} → {np.mean(of):.2f} |" for key, of in zip(("clip_i", "clip_t"), clip, strict=True)]
        print(f"| `<{concept}>` | {np.mean(gains):.0f} ({min(gains):.0f} to {max(gains):.0f}) |", *moves, "|")
    cells = []
    for key, digits in {"gain": 1, "clip_i": 3, "clip_t": 3}.items():
        difference, error = compare(rows, [row for row in baseline if row["seed"] is not None], key)
        bold = "**" if abs(difference) > 3 * error else ""
        cells.append(f"{bold}{difference:+.{digits}f}{bold} ± {error:.{digits}f}")
    print(f"| {name} | {' | '.join(cells)} | {np.mean([row['seconds'] for row in rows]):.1f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first four concepts with one seed")
    parser.add_argument("--concepts", nargs="+", choices=CONCEPTS, default=list(CONCEPTS), help="(default: all six)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--variant", nargs="+", default=[None], help="names in variants/")
    parser.add_argument("--save_baseline", action="store_true", help="these runs become the baseline")
    parser.add_argument("options", nargs="*", help="of train.py, after --")
    args = parser.parse_args()
    concepts, seeds = (args.concepts[:4], args.seeds[:1]) if args.quick else (args.concepts, args.seeds)
    runs = [(concept, seed) for seed in seeds for concept in concepts]
    if args.save_baseline:
        rows = measure_all([*((concept, None) for concept in concepts), *runs], args.options, None)
        BASELINE.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    baseline = json.loads(BASELINE.read_text())
    add_gains(baseline, baseline)
    print("| | held-out gain, % | CLIP-I | CLIP-T | seconds |\n|---|---|---|---|---|")
    for variant in args.variant:
        rows = baseline[len(concepts) :] if args.save_baseline else measure_all(runs, args.options, variant)
        add_gains(rows, baseline)
        report(variant or "difference", rows, baseline)


if __name__ == "__main__":
    main()
