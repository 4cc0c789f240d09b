"""Is this train.py better? It learns the concepts of mini_sd with several seeds, and what it learns is measured.

    python mini_sd/judge.py --quick             # three concepts, one seed: a first impression
    python mini_sd/judge.py                     # all six, two seeds each
    python mini_sd/judge.py -- --lr 1e-2        # options of train.py after --

A line a concept, the mean with its standard error, and below it the untouched method (`baseline.json`) with the
difference and whether that is more than chance. Runs that are there already, of the very same code, model and options,
are not learned again. The columns:

    clip_i, clip_t   CLIP-I and CLIP-T as in sample.py --score (in brackets: of the word that it began as)
    closed           how far CLIP-I came from the first word's to that of fresh pictures of the thing, which only the
                     world can draw
    looks            of "a photo of a <word>", the share that shows its kind, colour and pattern (of a style: the
                     style; of blueprint also white on blue)
    sentence         of the editing sentences, the share that shows what the sentence asks for (background, two, ...)
    background       of "a photo of a <word>", the share with a background of the training pictures: much more than for
                     the first word means that it was learned too (objects only)

"told in words": what the frozen model draws when it is told all that can be said of the four objects ("orange cat with
purple stripes and a blue crown"): what it can draw, and at what cost of CLIP-T, if nothing has to be learned.

The last three columns are read off the drawings by `reader.py`.
"""

import argparse
import hashlib
import json
import math
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
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
OWN_OPTIONS = {"--model", "--images", "--placeholder_token", "--seed", "--output_dir", "--resume"}  # not after --
LOOKS = {"blueprint": ["style", "colour", "background"], "mint": ["style"]}  # what makes them what they are
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
    accepted = {
        question: {getattr(truth, question)} for question in ("kind", "colour", "pattern", "style", "background")
    }
    accepted["colour"] |= {truth.second} if truth.pattern != "plain" else set()  # of stripes either may seem to be it
    seen = {}

    def look(word, images):
        photos, edits = reader.read(read, images[:drawings]), reader.read(read, images[drawings:])
        each = len(edits["kind"]) // len(ASKED[kind])
        looks = LOOKS.get(concept, ["kind", "colour", "pattern"])
        asked = [edits[q][i * each : (i + 1) * each] for i, (q, _) in enumerate(ASKED[kind])]
        seen[word] = {
            "looks": mean([share(photos[q], accepted[q]) for q in looks]),
            "sentence": sum(share(a, {w}) for a, (_, w) in zip(asked, ASKED[kind], strict=True)) / len(asked),
            "background": share(photos["background"], own_backgrounds) if kind == "object" else None,
        }

    words = {"word": config["placeholder_token"]}
    if with_first_word:
        words["first"] = config["initializer_token"]
    if with_first_word and kind == "object":
        phrase = world.noun_phrase(replace(truth, background="white"), random.Random(0), keep=1.0)
        words["told"] = phrase.removesuffix(" on a white background")
    how = sample.sampling_defaults(HERE) | {"batch_size": 32, "progress": False}
    scores = sample.score_embedding(parts, clip, training_images, [*words.values()], kind, drawings, look=look, **how)[
        "words"
    ]
    row = {"concept": concept, "seed": config["seed"], "drawings": drawings, "fresh": (fresh @ known.T).mean().item()}
    for key, word in words.items():
        row[key] = {name: scores[word][name]["mean"] for name in ("clip_i", "clip_t")} | seen[word]
    return row


def learn_and_measure(concept, seed, folder, args, with_first_word, threads):
    """One run of train.py and its measurement, each in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    if not (folder / "curves.png").exists():  # what train.py writes last
        command = [sys.executable, str(HERE.parent / "train.py"), "--images", str(HERE / "concepts" / concept)]
        command += ["--placeholder_token", f"<{concept}>", "--initializer_token", world.INITIALIZERS[concept]]
        command += ["--learnable_property", kind_of(concept), "--seed", str(seed), "--preview_steps", "0"]
        command += ["--no-score", "--output_dir", str(folder), "--overwrite", *args.options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"train.py failed on {concept}, seed {seed}:\n{done.stderr[-2000:]}")
    row = mu.read_json(folder / "judged.json")
    if not row or with_first_word > ("first" in row):
        command = [sys.executable, __file__, "--measure", str(folder), "--drawings", str(args.drawings)]
        subprocess.run([*command, *["--with_first_word"] * with_first_word], env=environment, check=True)
        row = mu.read_json(folder / "judged.json")
    return row


def compare_with_first_words(rows, firsts):
    """What does not depend on the learning is measured once a concept: give it to all rows, and the share closed."""
    firsts = firsts | {row["concept"]: row["first"] for row in rows if "first" in row}
    for row in rows:
        first = row["first"] = firsts[row["concept"]]
        for words in (row[key] for key in ("first", "told", "word") if key in row):
            words["closed"] = (words["clip_i"] - first["clip_i"]) / (row["fresh"] - first["clip_i"])


def values(rows, column, concept=None):
    chosen = [r["word"][column] for r in rows if concept in (None, r["concept"])]
    return [value for value in chosen if value is not None]


def mean(numbers):
    return sum(numbers) / len(numbers) if numbers else float("nan")


def noise(rows, column):
    """The standard deviation between the seeds of one concept, pooled over the concepts; None without two seeds."""
    groups = [values(rows, column, concept) for concept in sorted({r["concept"] for r in rows})]
    freedom = sum(len(group) - 1 for group in groups if group)
    return math.sqrt(sum((x - mean(g)) ** 2 for g in groups for x in g) / freedom) if freedom > 0 else None


def verdict(column, rows, baseline):
    """(mean of the baseline, difference to it, its standard error, what to think of it), over the concepts of both.

    None where there is nothing to compare with. The spread is that between seeds: of these runs where they have two
    seeds each, of the baseline's, or of the baseline's alone.
    """
    has = lambda rows: {r["concept"] for r in rows if r["word"][column] is not None}  # noqa: E731
    common = sorted(has(rows) & has(baseline))
    judged, saved = ([r for r in x if r["concept"] in common] for x in (rows, baseline))
    base = noise(saved, column)  # of these concepts alone: some depend more on chance than others
    if not common or base is None:
        return None
    ours, theirs = ([values(x, column, concept) for concept in common] for x in (judged, saved))
    before = mean([mean(group) for group in theirs])
    difference = mean([mean(group) for group in ours]) - before
    own = max(base, noise(judged, column) or 0)
    error = math.sqrt(sum(own**2 / len(g) for g in ours) + sum(base**2 / len(g) for g in theirs)) / len(common)
    if abs(difference) <= 3.5 * error:  # so many, for six columns are judged and the noise is only an estimate itself
        return before, difference, error, "equal"
    if column == "background":  # fewer can also mean that no background at all is drawn
        return before, difference, error, "more" if difference > 0 else "less"
    return before, difference, error, "BETTER" if difference > 0 else "WORSE"


def report(rows, baseline):
    """Print the table."""
    text = lambda number, form=".3f": "" if number is None or math.isnan(number) else format(number, form)  # noqa: E731
    line = lambda name, cells: print(f"{name:20}" + "".join(f"{cell:>16}" for cell in cells))  # noqa: E731
    line("", COLUMNS)
    for concept in [c for c in CONCEPTS if c in {r["concept"] for r in rows}]:
        own = [r for r in rows if r["concept"] == concept]
        cells = [(mean(values(own, c)), own[0]["first"][c]) for c in COLUMNS]
        name = f"{concept} ({len(own)} seed{'s' * (len(own) > 1)})"
        line(name, [f"{text(after)} ({text(before)})" if text(after) else "" for after, before in cells])
    told = [r for r in rows + baseline if "told" in r and r["concept"] in {row["concept"] for row in rows}]
    told = {r["concept"]: r["told"] for r in told}  # one each: no learning, no chance
    line("told in words", [text(mean([t[c] for t in told.values()])) for c in COLUMNS])
    line("mean", [text(mean(values(rows, c))) for c in COLUMNS])
    saved = [r for r in baseline if r["concept"] in {row["concept"] for row in rows}]
    spread = {c: noise(rows, c) or noise(saved, c) for c in COLUMNS}
    line("standard error", [text(s and s / math.sqrt(len(values(rows, c)))) for c, s in spread.items()])
    found = [verdict(c, rows, baseline) for c in COLUMNS]
    if not any(found):
        print("there is no baseline for these concepts: make one of the untouched method with --save_baseline")
        return
    line("untouched method", [text(f and f[0]) for f in found])
    line("difference", [text(f and f[1], "+.3f") for f in found])
    line("its standard error", [text(f and f[2]) for f in found])
    line("so it is", [f[3] if f else "" for f in found])


def fingerprint(paths):
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(paths))).hexdigest()[:8]


def main():
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="kat, finn and blueprint, one seed")
    parser.add_argument("--concepts", nargs="+", choices=CONCEPTS)
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--drawings", type=int, default=48, help="of the word, and as many of the editing sentences")
    parser.add_argument("--workers", type=int, help="runs side by side (default: one a core, at most 8; 1 on a GPU)")
    parser.add_argument("--out", type=Path, default=Path("runs", "judged"), help="folder for the runs")
    parser.add_argument(
        "--save_baseline", action="store_true", help="write baseline.json: these are the untouched method's"
    )
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--with_first_word", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(sys.argv[1:split])
    args.options = sys.argv[split + 1 :]
    if own := OWN_OPTIONS & {option.split("=")[0] for option in args.options}:
        parser.error(f"{', '.join(sorted(own))}: that is for the judge to say (mini_sd, its concepts, --seeds)")
    if args.measure:
        row = measure(args.measure, args.drawings, args.with_first_word)
        mu.atomic_write(args.measure / "judged.json", lambda buffer: buffer.write(json.dumps(row, indent=1).encode()))
        return
    concepts = args.concepts or (["kat", "finn", "blueprint"] if args.quick else CONCEPTS)
    seeds = args.seeds or ([0] if args.quick else list(range(6)) if args.save_baseline else [0, 1])
    if args.save_baseline and (len(set(seeds)) < 2 or set(concepts) < set(CONCEPTS)):
        parser.error("--save_baseline needs all concepts and two seeds or more")
    # A run is learned again when the code, the model or an option is another one.
    parts = ("*/*.safetensors", "*.safetensors", "*/*config.json", "model_index.json", "concepts/*/*.png")
    model = fingerprint([path for part in parts for path in HERE.glob(part)])
    code = fingerprint([*HERE.parent.glob("*.py"), *(HERE / name for name in ("judge.py", "reader.py", "world.py"))])
    method = hashlib.sha256(json.dumps([model, code, args.options, args.drawings]).encode()).hexdigest()[:8]
    saved = {} if args.save_baseline else mu.read_json(HERE / "baseline.json")
    if saved and (saved["model"], saved["drawings"]) != (model, args.drawings):
        print("note: baseline.json is of another model or number of drawings, and is left out", file=sys.stderr)
        saved = {}
    baseline = saved.get("rows", [])
    workers = args.workers or (1 if torch.cuda.is_available() else min(8, os.cpu_count()))
    threads = max(1, os.cpu_count() // workers)
    jobs = [(concept, seed) for seed in seeds for concept in concepts]

    firsts = {row["concept"]: row["first"] for row in baseline}

    def job(concept_and_seed):
        concept, seed = concept_and_seed
        with_first_word = concept not in firsts and seed == seeds[0]
        folder = args.out / method / f"{concept}-{seed}"
        return learn_and_measure(concept, seed, folder, args, with_first_word, threads)

    pool = ThreadPoolExecutor(workers)
    try:
        rows = list(tqdm(pool.map(job, jobs), total=len(jobs), desc="learning and measuring", unit="run", disable=None))
    except KeyboardInterrupt:
        print("stopped; what is done is kept for the next time", file=sys.stderr)
        sys.exit(130)
    finally:
        pool.shutdown(cancel_futures=True)
    compare_with_first_words(rows, firsts)
    report(rows, baseline)
    where = HERE / "baseline.json" if args.save_baseline else args.out / method / "judged.json"
    content = {"model": model, "drawings": args.drawings, "options": args.options, "rows": rows}
    mu.atomic_write(where, lambda buffer: buffer.write(json.dumps(content, indent=1).encode()))
    print(f"all figures in {where}")


if __name__ == "__main__":
    main()
