"""Does a change of train.py help? Train on the concepts of mini_sd with several seeds and measure what was learned.

    python -m mini_sd.eval.evaluate --quick         # three concepts, one seed: a first impression
    python -m mini_sd.eval.evaluate                 # all six concepts, two seeds each
    python -m mini_sd.eval.evaluate -- --lr 1e-2    # options after -- are train.py's

Prints the scores of each concept and of its initializer token, the mean with its standard error, and the comparison
with the baseline, the unchanged train.py (baseline.json). Finished runs are used again as long as code, model and
options are the same. The columns:

    CLIP-I, CLIP-T   as in sample.py --score
    gap closed       CLIP-I on a scale from the initializer token (0) to held-out images of the concept (1)
    attributes       of "a photo of a <token>", the fraction with the kind, colour and pattern of the concept (of a
                     style: in that style; of blueprint also white and on blue), the mean of these
    accessory        of "a photo of a <token>", the fraction with the accessory of the concept in its colour (objects)
    prompts          of the editing prompts, the fraction that shows what the prompt asks for (background, two, ...)
    backgrounds      of "a photo of a <token>", the fraction with the background of a training image: much more than for
                     the initializer token means that the backgrounds were learned too (objects only)

"full-text prompt": what the frozen model generates when the four objects are described in words ("orange cat with
purple stripes and a blue crown"), without learning. The last four columns come from classifier.py.
"""

import argparse
import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import random
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

import model_utils as mu
import sample
import train
from data import load_training_images
from mini_sd.eval import classifier
from mini_sd.make import world

MODEL = Path(mu.DEFAULT_MODEL)
BASELINE = Path(__file__).resolve().with_name("baseline.json")
CONCEPTS = [*world.OBJECT_CONCEPTS, *world.STYLE_CONCEPTS]
COLUMNS = {  # and their headings
    "clip_i": "CLIP-I", "clip_t": "CLIP-T", "gap_closed": "gap closed", "attribute_accuracy": "attributes",
    "accessory_accuracy": "accessory", "prompt_accuracy": "prompts", "training_backgrounds": "backgrounds",
}  # fmt: skip
FIXED_OPTIONS = ["model", "images", "placeholder_token", "seed", "output_dir", "resume"]  # not after --
STYLE_ATTRIBUTES = {"blueprint": ["style", "colour", "background"], "mint": ["style"]}
PROMPT_ATTRIBUTES = {  # what each of sample.EDITING_PROMPTS asks for
    "object": [("count", 2), ("style", "drawing"), ("style", "pixel art"), ("background", "red")]
    + [("background", name) for name in ("green", "night", "beach", "moon")],
    "style": [("kind", name) for name in ("cat", "dog", "bird", "fish", "house", "car", "boat")] + [("count", 2)],
}


def property_of(concept):
    return "style" if concept in world.STYLE_CONCEPTS else "object"


def mean(numbers):
    return sum(numbers) / len(numbers) if numbers else math.nan


# --- One run ----------------------------------------------------------------------------------------------------------


def accuracies(concept, photos, edits):
    """{column: fraction} from the classes of the images of PHOTO_PROMPT and, in their order, of the editing prompts."""
    target, asked = world.concept_picture(concept, 0), PROMPT_ATTRIBUTES[property_of(concept)]
    accepted = {name: {getattr(target, name)} for name in classifier.CLASSES}
    if target.pattern != "plain":  # either of its two colours may be taken for the thing's own
        accepted["colour"].add(target.second)
    attributes = STYLE_ATTRIBUTES.get(concept, ["kind", "colour", "pattern"])
    followed, each = [], len(edits["kind"]) // len(asked)
    for i, (name, wanted) in enumerate(asked):
        followed += [value == wanted for value in edits[name][i * each : (i + 1) * each]]
    found = {"attribute_accuracy": mean([value in accepted[name] for name in attributes for value in photos[name]])}
    found["prompt_accuracy"] = mean(followed)
    if concept in world.OBJECT_CONCEPTS:
        worn = (target.accessory, target.accessory_colour)
        seen = zip(photos["accessory"], photos["accessory_colour"], strict=True)
        found["accessory_accuracy"] = mean([values == worn for values in seen])
        backgrounds = {world.concept_picture(concept, i).background for i in range(5)}
        found["training_backgrounds"] = mean([background in backgrounds for background in photos["background"]])
    return found


def measure(folder, num_images, with_references):
    """Generate with the token of the run in `folder` -> its row of the results.

    with_references: also measure the initializer token and the full-text prompt, which do not depend on training.
    """
    config = mu.read_config(folder)
    concept, learnable_property = config["placeholder_token"].strip("<>"), config["learnable_property"]
    components = mu.load_components(MODEL, embeddings=[(str(folder), None)])
    clip, network, found = sample.load_clip(MODEL), classifier.load_classifier(), {}
    training_images = mu.to_pil(load_training_images(config["images"], config["resolution"])[0])
    held_out_images = [world.draw(world.concept_picture(concept, 100 + i)) for i in range(64)]
    (training, _), (held_out, _) = (sample.embed(clip, images, [""]) for images in (training_images, held_out_images))
    tokens = {"learned": config["placeholder_token"]}
    if with_references:
        tokens["initializer"] = config["initializer_token"]
    if with_references and learnable_property == "object":
        picture = replace(world.concept_picture(concept, 0), background="white")
        full_text = world.noun_phrase(picture, random.Random(0), keep=1.0)
        tokens["full_text"] = full_text.removesuffix(" on a white background")

    def classify(token, images):
        photos, edits = images[:num_images], images[num_images:]
        found[token] = accuracies(concept, classifier.classify(network, photos), classifier.classify(network, edits))

    options = mu.sampling_defaults(MODEL) | {"batch_size": 32, "progress": False, "callback": classify}
    what = (training_images, [*tokens.values()], learnable_property, num_images)
    scores = sample.score_embedding(components, clip, *what, **options)["tokens"]
    row = {"concept": concept, "seed": config["seed"], "held_out": (held_out @ training.T).mean().item()}
    for name, token in tokens.items():
        row[name] = {score: scores[token][score]["mean"] for score in ("clip_i", "clip_t")} | found[token]
    return row


def train_and_measure(concept, seed, folder, options, num_images, with_references):
    """Train on a concept unless that is done, measure, and write the row -> row. Runs in a worker process."""
    try:
        if not (folder / "evaluation.json").exists():
            fixed = ["--images", MODEL / "concepts" / concept, "--placeholder_token", f"<{concept}>", "--seed", seed]
            fixed += ["--learnable_property", property_of(concept), "--initializer_token", world.INITIALIZERS[concept]]
            fixed += ["--preview_steps", 0, "--no-score", "--output_dir", folder, "--overwrite"]
            with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
                train.train(train.parse_options([*map(str, fixed), *options]))
        row = measure(folder, num_images, with_references)
    except Exception as error:
        error.add_note(f"while training on {concept} with seed {seed} in {folder}")
        raise
    write_json(folder / "evaluation.json", row)
    return row


def write_json(path, content):
    mu.atomic_write(path, lambda buffer: buffer.write(json.dumps(content, indent=1).encode()))


# --- Comparison -------------------------------------------------------------------------------------------------------


def add_gap_closed(rows, initializers):
    """Give each row the scores of its concept's initializer token, and all scores of a row the gap closed."""
    initializers = initializers | {row["concept"]: row["initializer"] for row in rows if "initializer" in row}
    for row in rows:
        row["initializer"] = initializers[row["concept"]]
        start = row["initializer"]["clip_i"]
        for name in {"initializer", "full_text", "learned"} & row.keys():
            row[name]["gap_closed"] = (row[name]["clip_i"] - start) / (row["held_out"] - start)


def by_concept(rows, column, name="learned"):
    """{concept: values of its runs} of a column; without the concepts that have none."""
    found = {concept: [] for concept in CONCEPTS}
    for row in rows:
        found[row["concept"]] += [row[name][column]] if column in row.get(name, {}) else []
    return {concept: values for concept, values in found.items() if values}


def mean_of_concepts(values):
    return mean([mean(group) for group in values.values()])


def seed_deviation(values):
    """Standard deviation between the seeds of a concept, pooled over the concepts; NaN if none has two seeds."""
    degrees_of_freedom = sum(len(group) - 1 for group in values.values())
    squares = sum((value - mean(group)) ** 2 for group in values.values() for value in group)
    return math.sqrt(squares / degrees_of_freedom) if degrees_of_freedom else math.nan


def standard_error(values, deviation):
    """Of mean_of_concepts, if the seeds of a concept have this standard deviation."""
    return deviation * math.sqrt(sum(1 / len(group) for group in values.values())) / max(1, len(values))


def compare(column, rows, baseline):
    """(mean of the baseline, difference from it, its standard error, verdict) over the concepts that both have.

    The error comes from the deviation between seeds: the baseline's, or that of these runs if it is larger. NaN and ""
    if there is nothing to compare with.
    """
    ours, theirs = by_concept(rows, column), by_concept(baseline, column)
    theirs = {concept: theirs[concept] for concept in ours if concept in theirs}  # some concepts vary more than others
    ours = {concept: ours[concept] for concept in theirs}
    base_deviation = seed_deviation(theirs)
    deviation = max(base_deviation, seed_deviation(ours))  # of the baseline if that of these runs is NaN: one seed
    difference = mean_of_concepts(ours) - mean_of_concepts(theirs)
    error = math.hypot(standard_error(ours, deviation), standard_error(theirs, base_deviation))
    if math.isnan(error):
        verdict = ""
    elif abs(difference) <= 3.5 * error:  # not 2: seven columns are compared, and the error is itself an estimate
        verdict = "within noise"
    elif column == "training_backgrounds":  # neither is better: fewer can also mean that there is no background at all
        verdict = "more" if difference > 0 else "less"
    else:
        verdict = "better" if difference > 0 else "worse"
    return mean_of_concepts(theirs), difference, error, verdict


def report(rows, baseline):
    """Print the table."""

    def print_line(name, cells, form=".3f"):
        texts = (cell if isinstance(cell, str) else "" if math.isnan(cell) else format(cell, form) for cell in cells)
        print(f"{name:18}" + "".join(f"{text:>14}" for text in texts))

    print_line("concept (seeds)", COLUMNS.values())
    seeds = {concept: len(values) for concept, values in by_concept(rows, "clip_i").items()}
    for concept, count in seeds.items():
        for title, name in ((f"{concept} ({count})", "learned"), ("    initializer", "initializer")):
            print_line(title, [mean(by_concept(rows, column, name).get(concept, [])) for column in COLUMNS])
    baseline = [row for row in baseline if row["concept"] in seeds]
    full_text = [by_concept(rows + baseline, column, "full_text") for column in COLUMNS]
    learned = [by_concept(rows, column) for column in COLUMNS]
    print_line("full-text prompt", map(mean_of_concepts, full_text))
    print_line("mean", map(mean_of_concepts, learned))
    print_line("standard error", [standard_error(values, seed_deviation(values)) for values in learned])
    comparisons = [compare(column, rows, baseline) for column in COLUMNS]
    if not any(verdict for *_, verdict in comparisons):
        print("no baseline for these concepts: make one of the unchanged train.py with --save_baseline")
        return
    names = ("baseline", "difference", "standard error", "verdict")
    for name, cells in zip(names, zip(*comparisons, strict=True), strict=True):
        print_line(name, cells, "+.3f" if name == "difference" else ".3f")


# --- Command line -----------------------------------------------------------------------------------------------------


def fingerprint(paths):
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(paths))).hexdigest()[:8]


def model_fingerprint():
    patterns = ("*/*.safetensors", "*/*config.json", "model_index.json", "concepts/*/*.png")
    return fingerprint(path for pattern in patterns for path in MODEL.glob(pattern))


def method_fingerprint(options, num_images):
    """Of all that a result depends on besides concept and seed."""
    modules = [*MODEL.parent.glob("*.py"), *(Path(path) for path in (__file__, classifier.__file__, world.__file__))]
    method = json.dumps([model_fingerprint(), fingerprint(modules), options, num_images])
    return hashlib.sha256(method.encode()).hexdigest()[:8]


def start_worker(threads):
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process; train() itself listens while it runs


def run_jobs(jobs, workers):
    """Rows of the jobs, each the arguments of train_and_measure."""
    workers = workers or (1 if torch.cuda.is_available() else min(8, os.cpu_count()))
    threads = max(1, os.cpu_count() // workers)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker, (threads,))
    try:
        futures = [pool.submit(train_and_measure, *job) for job in jobs]
        return [future.result() for future in tqdm(futures, "training and measuring", unit="run", disable=None)]
    finally:
        pool.shutdown(cancel_futures=True)


def evaluate(args):
    concepts = args.concepts or (["kat", "finn", "blueprint"] if args.quick else CONCEPTS)
    seeds = args.seeds or ([0] if args.quick else [0, 1])
    if args.save_baseline and (len(set(seeds)) < 2 or set(concepts) < set(CONCEPTS)):
        raise mu.UserError("--save_baseline needs all concepts and at least two seeds.")
    saved, model = {} if args.save_baseline else mu.read_json(BASELINE), model_fingerprint()
    if saved and (saved["model"], saved["num_images"]) != (model, args.num_images):
        print("note: baseline.json is of another model or --num_images and is ignored", file=sys.stderr)
        saved = {}
    baseline = saved.get("rows", [])
    initializers = {row["concept"]: row["initializer"] for row in baseline}
    folder, rows, jobs = args.out / method_fingerprint(args.options, args.num_images), [], []
    for seed in seeds:
        for concept in concepts:
            run, with_references = folder / f"{concept}-{seed}", concept not in initializers and seed == seeds[0]
            row = mu.read_json(run / "evaluation.json")
            if row and ("initializer" in row or not with_references):
                rows.append(row)
            else:
                jobs.append((concept, seed, run, args.options, args.num_images, with_references))
    rows += run_jobs(jobs, args.workers)
    add_gap_closed(rows, initializers)
    report(rows, baseline)
    path = BASELINE if args.save_baseline else folder / "evaluation.json"
    write_json(path, {"model": model, "num_images": args.num_images, "options": args.options, "rows": rows})
    print(f"all results in {path}")


def parse_options(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="kat, finn and blueprint with one seed")
    add("--concepts", nargs="+", choices=CONCEPTS, help="default: all")
    add("--seeds", nargs="+", type=int, help="default: 0 1")
    add("--num_images", type=int, default=48, help="of the token, and as many of the editing prompts (default: 48)")
    add("--workers", type=int, help="runs in parallel (default: one a core, at most 8; one on a GPU)")
    add("--out", type=Path, default=Path("runs", "evaluate"), help="folder for the runs (default: runs/evaluate)")
    add("--save_baseline", action="store_true", help="write baseline.json: the results of the unchanged train.py")
    args = parser.parse_args(argv[:split])
    args.options = argv[split + 1 :]
    train_parser = train.build_parser()
    train_parser.set_defaults(**dict.fromkeys(FIXED_OPTIONS))
    given = train_parser.parse_args(args.options)
    refused = ", ".join(f"--{name}" for name in FIXED_OPTIONS if getattr(given, name) is not None)
    if refused:
        raise mu.UserError(f"{refused}: evaluate sets that itself (mini_sd, its concepts, --seeds); leave it out.")
    return args


def main(argv=None):
    mu.run_main(lambda options: evaluate(parse_options(options)), argv, "use fewer --workers")


if __name__ == "__main__":
    main()
