"""Is a change of the scripts better? Learn the concepts of mini_sd, and compare with the baseline.

python mini_sd/evaluate.py --quick                  # four concepts, one seed: a minute on two cores
python mini_sd/evaluate.py                          # six concepts, three seeds
python mini_sd/evaluate.py --quick -- --lr 1e-2     # options after -- are train.py's
python mini_sd/evaluate.py --variant huber min_snr  # copies of the scripts with variants/NAME.diff applied

Each run is train.py's, on the CPU in fp32 whatever the machine has, one a core. Three measures:

Held-out gain: how far the learned row lowers the published loss (Gal et al. 2022, equation 2, at uniform timesteps) on
32 images of the concept that were not trained on, below that of the initializer's row; in percent of the baseline's.
Images, timesteps and noise are the same for every row. The loss is written out here, around sample.py's denoiser, so
that another loss in train.py does not change it. It sees what the images look like, in detail, but no other prompts.
CLIP-I, CLIP-T: of generated images, see sample.py. They see whether prompts are followed, and miss details.

The baseline (baseline.json) is the unchanged train.py with ten seeds. A difference counts if it is larger than 3.5
standard errors, which come from the differences between seeds and between held-out images.
"""

import argparse
import contextlib
import io
import json
import math
import multiprocessing
import os
import shutil
import statistics
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
MEASURES = {"gain": "held-out gain, %", "clip_i": "CLIP-I", "clip_t": "CLIP-T"}
TIMESTEPS = range(62, 1000, 125)  # the centers of eight equal parts


@torch.no_grad()
def held_out_losses(components, concept, token):
    """The published loss on each of the held-out images [32], its mean over TIMESTEPS."""
    import data
    import model_utils as mu
    import sample

    sheet = torch.from_numpy(np.array(Image.open(FOLDER / "held_out" / f"{concept}.png").convert("RGB")))
    images = sheet.unfold(0, 64, 64).unfold(1, 64, 64).flatten(0, 1) / 127.5 - 1  # [32, 3, 64, 64]
    latents, _ = mu.encode_images(components, images)  # the mean of the VAE's posterior
    templates = data.STYLE_TEMPLATES if CONCEPTS[concept][1] == "style" else data.OBJECT_TEMPLATES
    captions = [templates[i % len(templates)].format(token) for i in range(len(latents))]
    denoise, generator = sample.denoiser(components, captions), torch.Generator().manual_seed(0)
    losses = []
    for t in TIMESTEPS:
        abar, noise = components.schedule.alphas_cumprod[t], torch.randn(latents.shape, generator=generator)
        noise_pred = denoise(abar.sqrt() * latents + (1 - abar).sqrt() * noise, t)
        losses.append((noise_pred - noise).square().mean(dim=(1, 2, 3)))
    return torch.stack(losses).mean(dim=0).tolist()


def measure(concept, seed, options=()):
    """Learn a concept (seed None: nothing; the initializer token is measured) -> losses, CLIP scores, seconds."""
    import sample
    import train

    word, learnable_property = CONCEPTS[concept]
    model, images = (
        ["--model", str(FOLDER), "--device", "cpu", "--precision", "fp32"],
        str(FOLDER / "concepts" / concept),
    )
    argv = [*model, "--images", images, "--initializer_token", word, "--placeholder_token", f"<{concept}>"]
    argv += ["--learnable_property", learnable_property, "--seed", str(seed or 0), "--preview_steps", "0", "--no-score"]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args, start = (
            train.parse_options([*argv, "--output_dir", str(Path(folder, "run")), *options]),
            time.perf_counter(),
        )
        token, source = word, ["--prompt", word]
        if seed is not None:
            with contextlib.redirect_stderr(io.StringIO()):
                token, source = f"<{concept}>", ["--embedding", str(train.train(args))]
        seconds = time.perf_counter() - start
        components, *_ = sample.load_run(sample.build_parser().parse_args([*model, *source]))
    training_images = sample.mu.to_pil(sample.load_images(images, components.resolution)[0])
    settings = sample.sampling_settings(FOLDER, {"batch_size": 32}) | {"num_images": 32, "seed": seed or 0}
    clip = sample.load_clip(FOLDER, components.device)
    scores = sample.score_tokens(components, clip, training_images, [token], learnable_property, **settings)[token]
    found = {"concept": concept, "seed": seed, "seconds": round(seconds, 1)}
    found |= {name: round(scores[name]["mean"], 4) for name in ("clip_i", "clip_t")}
    return found | {"losses": [round(loss, 6) for loss in held_out_losses(components, concept, token)]}


def measure_all(runs, options, variant=None):
    """Results of `measure` for runs, pairs of concept and seed: one a core, with the scripts or those of a variant."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        for name in ("train.py", "sample.py", "data.py", "model_utils.py") if variant else ():
            shutil.copy(FOLDER.parent / name, folder)
        if variant:
            subprocess.run(["git", "apply", FOLDER / "variants" / f"{variant}.diff"], cwd=folder, check=True)
        scripts = folder if variant else str(FOLDER.parent)
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(os.cpu_count(), spawn, sys.path.insert, (0, scripts)) as pool:
            futures = [pool.submit(measure, *run, options) for run in runs]
            return [future.result() for future in tqdm(futures, desc=variant, unit="run")]


def add_gains(rows, baseline):
    """Add to each result its gain on each held-out image, and their mean, in percent of the baseline's mean gain."""
    for concept in {row["concept"] for row in rows}:
        of_concept = [row for row in baseline if row["concept"] == concept]
        start = next(np.array(row["losses"]) for row in of_concept if row["seed"] is None)
        usual = np.mean([start - row["losses"] for row in of_concept if row["seed"] is not None])
        for row in rows:
            if row["concept"] == concept:
                row["gains"] = 100 * (start - row["losses"]) / usual
                row["gain"] = row["gains"].mean()


def compare(ours, theirs, name):
    """Two lists of results -> the difference of the means over concepts, its standard error, the verdict."""
    concepts = sorted({row["concept"] for row in ours})
    differences, variances = [], []
    for concept in concepts:
        groups = [[row for row in rows if row["concept"] == concept] for rows in (ours, theirs)]
        values = [[row[name] for row in group] for group in groups]
        differences.append(statistics.fmean(values[0]) - statistics.fmean(values[1]))
        between_seeds = [statistics.variance(v) if len(v) > 1 else 0 for v in values]  # of few seeds: at least theirs
        variances.append(max(between_seeds) / len(values[0]) + between_seeds[1] / len(values[1]))
        if name == "gain":  # paired: the images are the same
            gains = [np.mean([row["gains"] for row in group], axis=0) for group in groups]
            variances[-1] += np.var(gains[0] - gains[1], ddof=1) / len(gains[0])
    difference, error = statistics.fmean(differences), math.sqrt(sum(variances)) / len(concepts)
    verdict = "within noise" if abs(difference) <= 3.5 * error else "better" if difference > 0 else "worse"
    return difference, error, verdict


def report(rows, baseline):
    """Print the results of each concept, and for each measure the comparison with the baseline."""
    for concept in dict.fromkeys(row["concept"] for row in rows):
        of_concept = [row for row in rows if row["concept"] == concept]
        start = next(row for row in baseline if row["concept"] == concept and row["seed"] is None)
        gains = [row["gain"] for row in of_concept]
        cells = [f"gain {statistics.fmean(gains):.0f} % ({min(gains):.0f} to {max(gains):.0f})"]
        for name in ("clip_i", "clip_t"):
            mean = statistics.fmean(row[name] for row in of_concept)
            cells.append(f"{MEASURES[name]} {start[name]:.3f} -> {mean:.3f}")
        print(f"{concept:12}" + "".join(f"{cell:26}" for cell in cells))
    found = {name: compare(rows, [row for row in baseline if row["seed"] is not None], name) for name in MEASURES}
    for name, (difference, error, verdict) in found.items():
        digits = 1 if name == "gain" else 3
        print(f"{MEASURES[name]:20}{difference:+.{digits}f} (standard error {error:.{digits}f}): {verdict}")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four concepts with one seed")
    parser.add_argument("--concepts", nargs="+", choices=CONCEPTS, help="(default: all six)")
    parser.add_argument("--seeds", nargs="+", type=int, help="(default: 0 1 2, with --quick 0)")
    parser.add_argument("--variant", nargs="+", default=[None], help="names in variants/; one row of a table each")
    parser.add_argument("--save_baseline", action="store_true", help="these runs become the baseline: ten seeds")
    parser.add_argument("options", nargs="*", help="of train.py, after --")
    args = parser.parse_args()
    concepts = args.concepts or (QUICK if args.quick else list(CONCEPTS))
    seeds = args.seeds or ([0] if args.quick else range(10) if args.save_baseline else [0, 1, 2])
    runs, table = [(concept, seed) for seed in seeds for concept in concepts], []
    if args.save_baseline:
        rows = measure_all([(concept, None) for concept in CONCEPTS] + runs, args.options)
        BASELINE.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    baseline = json.loads(BASELINE.read_text())
    add_gains(baseline, baseline)
    for variant in args.variant:
        rows = [row for row in baseline if row["seed"] is not None]
        if not args.save_baseline:
            rows = measure_all(runs, args.options, variant)
            add_gains(rows, baseline)
        found = report(rows, baseline)
        if variant:
            lines = (FOLDER / "variants" / f"{variant}.diff").read_text().splitlines()
            cells = [sum(line[0:1] == "+" and line[:3] != "+++" for line in lines)]
            for name, (difference, error, verdict) in found.items():
                bold, digits = "" if verdict == "within noise" else "**", 1 if name == "gain" else 3
                cells.append(f"{bold}{difference:+.{digits}f}{bold} ± {error:.{digits}f}")
            cells.append(f"{statistics.fmean(row['seconds'] for row in rows):.0f}")
            table.append(f"| [{variant}](variants/{variant}.diff) | {' | '.join(map(str, cells))} |")
    print("\n".join(table))


if __name__ == "__main__":
    main()
