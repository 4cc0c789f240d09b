"""Is a change of train.py better? Learn the concepts of mini_sd and compare CLIP scores with those of the baseline.

python mini_sd/evaluate.py --quick                # three concepts, one seed: a first impression
python mini_sd/evaluate.py                        # six concepts, three seeds
python mini_sd/evaluate.py --quick -- --lr 1e-2   # options after -- are train.py's

Each run is `python train.py` as a user types it, one a core; its scores are those of the scores.json that it writes.
The baseline (baseline.json) is the unchanged train.py. Gap closed: CLIP-I on a scale from the initializer token (0) to
held-out images of the concept (1). A difference counts if it is larger than 3.5 standard errors; these come from the
differences between seeds.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

FOLDER = Path(__file__).resolve().parent
BASELINE = FOLDER / "baseline.json"
# The initializer token, what the token stands for, and CLIP-I of 64 held-out images of the concept
CONCEPTS = {
    "kat": ("cat", "object", 0.731),
    "pup": ("dog", "object", 0.633),
    "finn": ("fish", "object", 0.705),
    "buggy": ("car", "object", 0.698),
    "blueprint": ("drawing", "style", 0.779),
    "mint": ("pixel", "style", 0.633),
}
MEASURES = {"clip_i": "CLIP-I", "clip_t": "CLIP-T", "gap_closed": "gap closed"}


def train(concept, seed, folder, options):
    """Run train.py on a concept -> {"concept", "seed", "initializer": scores, "learned": scores}."""
    word, learnable_property, held_out = CONCEPTS[concept]
    argv = [sys.executable, FOLDER.parent / "train.py", "--images", FOLDER / "concepts" / concept]
    argv += ["--placeholder_token", f"<{concept}>", "--initializer_token", word, "--seed", str(seed)]
    argv += ["--learnable_property", learnable_property, "--preview_steps", "0", "--output_dir", folder, *options]
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{concept}, seed {seed}: train.py failed\n{done.stderr[-2000:]}")
    tokens = json.loads((folder / "scores.json").read_text())["tokens"]
    row = {"concept": concept, "seed": seed}
    for name, token in (("initializer", word), ("learned", f"<{concept}>")):
        row[name] = {measure: tokens[token][measure]["mean"] for measure in ("clip_i", "clip_t")}
    start = row["initializer"]["clip_i"]
    for name in ("initializer", "learned"):
        row[name]["gap_closed"] = (row[name]["clip_i"] - start) / (held_out - start)
    return row


def by_concept(rows, measure, name="learned"):
    """{concept: values of its seeds}."""
    return {c: [row[name][measure] for row in rows if row["concept"] == c] for c in {row["concept"] for row in rows}}


def compare(ours, theirs):
    """{concept: values} twice -> difference of the means of the concepts, its standard error, verdict."""
    difference = statistics.fmean(statistics.fmean(ours[c]) - statistics.fmean(theirs[c]) for c in ours)
    # The variance between seeds, pooled over the concepts: the baseline's, or that of these runs if it is larger
    pooled = []
    for groups in (theirs, ours):
        squares = sum((value - statistics.fmean(group)) ** 2 for group in groups.values() for value in group)
        pooled.append(squares / max(1, sum(len(group) - 1 for group in groups.values())))
    error = math.sqrt(sum(max(pooled) / len(ours[c]) + pooled[0] / len(theirs[c]) for c in ours)) / len(ours)
    if abs(difference) <= 3.5 * error:
        return difference, error, "within noise"
    return difference, error, "better" if difference > 0 else "worse"


def report(rows, baseline):
    """Print the scores of each concept, and for each measure the comparison with the baseline."""
    print(f"{'':24}" + "".join(f"{title:>22}" for title in MEASURES.values()))
    for concept in dict.fromkeys(row["concept"] for row in rows):
        cells = []
        for measure in MEASURES:
            means = [statistics.fmean(by_concept(rows, measure, name)[concept]) for name in ("initializer", "learned")]
            cells.append(f"{means[0]:.3f} -> {means[1]:.3f}")
        print(f"{concept:24}" + "".join(f"{cell:>22}" for cell in cells))
    for measure, title in MEASURES.items() if baseline else ():
        ours, theirs = by_concept(rows, measure), by_concept(baseline, measure)
        difference, error, verdict = compare(ours, {concept: theirs[concept] for concept in ours})
        mean = statistics.fmean(statistics.fmean(theirs[concept]) for concept in ours)
        print(f"{title:24}baseline {mean:.3f}, difference {difference:+.3f} (standard error {error:.3f}): {verdict}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="kat, finn and blueprint with one seed")
    parser.add_argument("--concepts", nargs="+", choices=CONCEPTS, help="(default: all six)")
    parser.add_argument("--seeds", nargs="+", type=int, help="(default: 0 1 2, with --quick 0)")
    parser.add_argument("--save_baseline", action="store_true", help="these runs become the baseline")
    parser.add_argument("options", nargs="*", help="of train.py, after --")
    args = parser.parse_args()
    concepts = args.concepts or (["kat", "finn", "blueprint"] if args.quick else list(CONCEPTS))
    runs = [(concept, seed) for seed in args.seeds or ([0] if args.quick else [0, 1, 2]) for concept in concepts]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = [pool.submit(train, *run, Path(folder, "-".join(map(str, run))), args.options) for run in runs]
        rows = [future.result() for future in tqdm(futures, unit="run")]
    baseline = json.loads(BASELINE.read_text()) if BASELINE.exists() and not args.save_baseline else []
    report(rows, baseline)
    if args.save_baseline:
        lines = ",\n".join(json.dumps(row) for row in rows)
        BASELINE.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
