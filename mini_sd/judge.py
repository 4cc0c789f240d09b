"""Is this train.py better? It learns the concepts of mini_sd with several seeds, and what it learns is measured.

    python mini_sd/judge.py --quick             # three concepts, one seed: a first impression
    python mini_sd/judge.py                     # all six, two seeds each
    python mini_sd/judge.py -- --lr 1e-2        # options of train.py after --

A line a concept, the mean with its standard error, and below it the untouched method (`baseline.json`) with the
difference and whether that is more than chance. Runs that are there already, of the very same scripts and options, are
not learned again. The columns:

    CLIP-I, CLIP-T   as in sample.py --score, of the learned word (in brackets: of the word that it began as)
    closed           how far CLIP-I came from the first word's to that of fresh pictures of the thing, which only the
                     world can draw
    looks            of "a photo of a <word>", the share that shows its kind, colour and pattern (of a style: its style)
    sentence         of the editing sentences, the share that shows what the sentence asks for (background, two, ...)
    background       of "a photo of a <word>", the share with a background of the training pictures: much more than for
                     the first word means that it was learned too

The last three are read off the drawings by `reader.py`.
"""

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # so that `python mini_sd/judge.py` finds the scripts
sys.path.insert(0, str(HERE))

import reader  # noqa: E402
import world  # noqa: E402

import model_utils as mu  # noqa: E402
import sample  # noqa: E402
from data import load_images  # noqa: E402

CONCEPTS = [*world.OBJECT_CONCEPTS, *world.STYLE_CONCEPTS]
COLUMNS = ["clip_i", "clip_t", "closed", "looks", "sentence", "background"]
MORE_IS_BETTER = {"clip_i", "clip_t", "closed", "looks", "sentence"}
ASKED = {  # what the reader should find in a drawing of each editing sentence
    "object": [("count", 2), ("style", "drawing"), ("style", "pixel art"), ("background", "red")]
    + [("background", name) for name in ("green", "night", "beach", "moon")],
    "style": [("kind", name) for name in ("cat", "dog", "bird", "fish", "house", "car", "boat")] + [("count", 2)],
}


def kind_of(concept):
    return "style" if concept in world.STYLE_CONCEPTS else "object"


def share(answers, wanted):
    return sum(answer in wanted for answer in answers) / len(answers)


def measure(folder, drawings, with_first_word):
    """Draw with the word that the run in `folder` has learned, and say how good it is: {column: number}."""
    config = json.loads((folder / "config.json").read_text())
    concept, kind = config["placeholder_token"].strip("<>"), config["learnable_property"]
    parts, clip = sample.load_parts(mu.DEFAULT_MODEL, {str(folder): None}), sample.load_clip(mu.DEFAULT_MODEL)
    training_images = mu.to_pil(load_images(config["images"], config["resolution"])[0])
    known, _ = sample.embed(clip, training_images, ["a"])
    fresh, _ = sample.embed(clip, [world.draw(world.concept_picture(concept, 100 + i)) for i in range(64)], ["a"])
    read, truth = reader.load_reader(), world.concept_picture(concept, 0)
    own_backgrounds = {world.concept_picture(concept, i).background for i in range(len(training_images))}
    seen = {}

    def look(word, images):
        photos, edits = reader.read(read, images[:drawings]), reader.read(read, images[drawings:])
        each = len(edits["kind"]) // len(ASKED[kind])
        looks = ["style"] if kind == "style" else ["kind", "colour", "pattern"]
        asked = [edits[q][i * each : (i + 1) * each] for i, (q, _) in enumerate(ASKED[kind])]
        seen[word] = {
            "looks": sum(share(photos[q], {getattr(truth, q)}) for q in looks) / len(looks),
            "sentence": sum(share(a, {w}) for a, (_, w) in zip(asked, ASKED[kind], strict=True)) / len(asked),
            "background": share(photos["background"], own_backgrounds),
        }

    first, word = config["initializer_token"], config["placeholder_token"]
    words = [first, word] if with_first_word else [word]
    how = sample.read_json(HERE / "model_index.json")["_sampling"] | {"batch_size": 32, "progress": False}
    scores = sample.score_embedding(parts, clip, training_images, words, kind, drawings, look=look, **how)["words"]
    row = {"concept": concept, "seed": config["seed"], "drawings": drawings, "fresh": (fresh @ known.T).mean().item()}
    for name, key in zip(words, ["first", "word"] if with_first_word else ["word"], strict=True):
        row[key] = {"clip_i": scores[name]["clip_i"]["mean"], "clip_t": scores[name]["clip_t"]["mean"], **seen[name]}
    return row


def learn_and_measure(concept, seed, folder, args, first, threads):
    """One run of train.py and its measurement, each in a process of its own."""
    if not (folder / "judged.json").exists():
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, str(HERE.parent / "train.py"), "--images", str(HERE / "concepts" / concept)]
        command += ["--placeholder_token", f"<{concept}>", "--initializer_token", world.INITIALIZERS[concept]]
        command += ["--learnable_property", kind_of(concept), "--seed", str(seed), "--preview_steps", "0"]
        command += ["--no-score", "--output_dir", str(folder), "--overwrite", *args.options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"train.py failed on {concept}, seed {seed}:\n{done.stderr[-2000:]}")
        command = [sys.executable, __file__, "--measure", str(folder), "--drawings", str(args.drawings)]
        subprocess.run([*command, *["--with_first_word"] * (first is None)], env=environment, check=True)
    row = json.loads((folder / "judged.json").read_text())
    row["first"] = row.get("first") or first
    for words in (row["first"], row["word"]):
        words["closed"] = (words["clip_i"] - row["first"]["clip_i"]) / (row["fresh"] - row["first"]["clip_i"])
    return row


def mean(numbers):
    return sum(numbers) / len(numbers)


def noise(rows, column):
    """The standard deviation between the seeds of one concept, pooled over the concepts; None without two seeds."""
    groups = [[r["word"][column] for r in rows if r["concept"] == c] for c in {r["concept"] for r in rows}]
    freedom = sum(len(group) - 1 for group in groups)
    return math.sqrt(sum((x - mean(g)) ** 2 for g in groups for x in g) / freedom) if freedom else None


def verdict(column, rows, baseline):
    """(difference to the baseline on the same concepts, its standard error, what to think of it)."""
    same = [r for r in baseline if r["concept"] in {row["concept"] for row in rows}]
    by_concept = {r["concept"] for r in same}
    average = lambda rows: mean(  # noqa: E731
        [mean([r["word"][column] for r in rows if r["concept"] == concept]) for concept in sorted(by_concept)]
    )
    difference, spread = average(rows) - average(same), noise(baseline, column)
    error = spread * math.sqrt(1 / len(rows) + 1 / len(same))
    if abs(difference) <= 3 * error:  # of a hundred comparisons of the same method, about one would be called different
        return difference, error, "equal"
    better = (difference > 0) == (column in MORE_IS_BETTER)
    return difference, error, "BETTER" if better else "WORSE"


def report(rows, baseline):
    """Print the table."""
    line = lambda name, cells: print(f"{name:18}" + "".join(f"{cell:>17}" for cell in cells))  # noqa: E731
    line("", COLUMNS)
    for concept in [c for c in CONCEPTS if c in {r["concept"] for r in rows}]:
        own = [r for r in rows if r["concept"] == concept]
        line(
            f"{concept} ({len(own)} seed{'s' * (len(own) > 1)})",
            [f"{mean([r['word'][c] for r in own]):.3f} ({own[0]['first'][c]:.3f})" for c in COLUMNS],
        )
    means = {c: mean([r["word"][c] for r in rows]) for c in COLUMNS}
    line("mean", [f"{means[c]:.3f}" for c in COLUMNS])
    if (spread := {c: noise(rows, c) for c in COLUMNS})["clip_i"] is not None:
        line("standard error", [f"{spread[c] / math.sqrt(len(rows)):.3f}" for c in COLUMNS])
    if baseline:
        found = {c: verdict(c, rows, baseline) for c in COLUMNS}
        line("against baseline", [f"{found[c][0]:+.3f}" for c in COLUMNS])
        line("chance (1 s.e.)", [f"{found[c][1]:.3f}" for c in COLUMNS])
        line("so it is", [found[c][2] for c in COLUMNS])


def main():
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="kat, finn and blueprint, one seed, 32 drawings")
    parser.add_argument("--concepts", nargs="+", choices=CONCEPTS)
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--drawings", type=int, default=64, help="of the word, and as many of the editing sentences")
    parser.add_argument("--workers", type=int, help="runs side by side (default: one a core, at most 8; 1 on a GPU)")
    parser.add_argument("--out", type=Path, default=Path("runs", "judged"), help="folder for the runs")
    parser.add_argument(
        "--save_baseline", action="store_true", help="write baseline.json: these are the untouched method's"
    )
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--with_first_word", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(sys.argv[1:split])
    args.options = sys.argv[split + 1 :]
    if args.measure:
        row = measure(args.measure, args.drawings, args.with_first_word)
        mu.atomic_write(args.measure / "judged.json", lambda buffer: buffer.write(json.dumps(row, indent=1).encode()))
        return
    concepts = args.concepts or (["kat", "finn", "blueprint"] if args.quick else CONCEPTS)
    seeds = args.seeds or ([0] if args.quick else [0, 1])
    args.drawings = 32 if args.quick else args.drawings
    baseline = [] if args.save_baseline else (sample.read_json(HERE / "baseline.json") or [])
    # a run is done again when a script or an option is another one
    scripts = b"".join((HERE.parent / f"{name}.py").read_bytes() for name in ("train", "sample", "model_utils", "data"))
    method = hashlib.sha256(scripts + json.dumps([args.options, args.drawings]).encode()).hexdigest()[:8]
    workers = args.workers or (1 if torch.cuda.is_available() else min(8, os.cpu_count()))
    threads = max(1, os.cpu_count() // workers)
    jobs = [(concept, seed) for seed in seeds for concept in concepts]

    def job(concept_and_seed):
        concept, seed = concept_and_seed
        first = next((r["first"] for r in baseline if r["concept"] == concept), None)
        return learn_and_measure(concept, seed, args.out / method / f"{concept}-{seed}", args, first, threads)

    with ThreadPoolExecutor(workers) as pool:
        rows = list(tqdm(pool.map(job, jobs), total=len(jobs), desc="learning and measuring", unit="run", disable=None))
    report(rows, baseline)
    where = HERE / "baseline.json" if args.save_baseline else args.out / method / "judged.json"
    mu.atomic_write(where, lambda buffer: buffer.write(json.dumps(rows, indent=1).encode()))
    print(f"all figures in {where}")


if __name__ == "__main__":
    main()
