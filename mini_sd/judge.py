"""Judge the train.py that lies in the folder above: it learns the concepts of mini_sd, each with several seeds.

    python mini_sd/judge.py                             # all six, two seeds each
    python mini_sd/judge.py --concepts kat --seeds 0 -- --lr 1e-2 --steps 200       # options of train.py after --

One line a run: CLIP-I and CLIP-T (see sample.py) of the word it began as and of the learned word, and `closed`: the
share of the way from the first word's likeness to that of fresh pictures of the thing, which only the world can draw.
Runs that are there already in --out are not learned again.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # so that `python mini_sd/judge.py` finds the scripts
sys.path.insert(0, str(HERE))

import world  # noqa: E402

import model_utils as mu  # noqa: E402
import sample  # noqa: E402
from data import load_images  # noqa: E402


def learn(concept, seed, folder, options):
    """Run train.py in a process of its own, as a user would."""
    kind = "style" if concept in world.STYLE_CONCEPTS else "object"
    command = [sys.executable, str(HERE.parent / "train.py"), "--images", str(HERE / "concepts" / concept)]
    command += ["--placeholder_token", f"<{concept}>", "--initializer_token", world.INITIALIZERS[concept]]
    command += ["--learnable_property", kind, "--seed", str(seed), "--preview_steps", "0", "--no-score"]
    subprocess.run(
        [*command, "--output_dir", str(folder), "--overwrite", *options], check=True, stdout=subprocess.DEVNULL
    )


def judge(concept, folder, drawings):
    """What the run in `folder` has reached."""
    config = json.loads((folder / "config.json").read_text())
    parts, clip = sample.load_parts(mu.DEFAULT_MODEL, {str(folder): None}), sample.load_clip(mu.DEFAULT_MODEL)
    training_images = mu.to_pil(load_images(config["images"], config["resolution"])[0])
    first, word = config["initializer_token"], config["placeholder_token"]
    how = sample.read_json(HERE / "model_index.json")["_sampling"] | {"batch_size": 32, "progress": False}
    kind = config["learnable_property"]
    found = sample.score_embedding(parts, clip, training_images, [first, word], kind, drawings, **how)["words"]
    known, _ = sample.embed(clip, training_images, ["a"])
    fresh, _ = sample.embed(clip, [world.draw(world.concept_picture(concept, 100 + i)) for i in range(64)], ["a"])
    row = {"concept": concept, "seed": config["seed"], "fresh": (fresh @ known.T).mean().item()}
    for score in ("clip_i", "clip_t"):
        row |= {f"{score}_before": found[first][score]["mean"], f"{score}_after": found[word][score]["mean"]}
    row["closed"] = (row["clip_i_after"] - row["clip_i_before"]) / (row["fresh"] - row["clip_i_before"])
    return row


def main():
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*world.OBJECT_CONCEPTS, *world.STYLE_CONCEPTS]
    parser.add_argument("--concepts", nargs="+", choices=names, default=names)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--drawings", type=int, default=64, help="of each word and score")
    parser.add_argument("--out", type=Path, default=Path("runs", "judged"), help="folder for the runs and judged.json")
    args = parser.parse_args(sys.argv[1:split])
    columns = ["clip_i_before", "clip_i_after", "fresh", "closed", "clip_t_before", "clip_t_after"]
    print(f"{'':16}" + "".join(f"{column:>15}" for column in columns), flush=True)
    rows = []
    for concept in args.concepts:
        for seed in args.seeds:
            folder = args.out / f"{concept}-{seed}"
            if not (folder / "judged.json").exists():
                learn(concept, seed, folder, sys.argv[split + 1 :])
                row = judge(concept, folder, args.drawings)
                (folder / "judged.json").write_text(json.dumps(row, indent=1))
            rows.append(json.loads((folder / "judged.json").read_text()))
            print(f"{concept + f' seed {seed}':16}" + "".join(f"{rows[-1][c]:15.3f}" for c in columns), flush=True)
    means = {c: sum(row[c] for row in rows) / len(rows) for c in columns}
    print(f"{'mean':16}" + "".join(f"{means[c]:15.3f}" for c in columns))
    if len(rows) > 1:
        errors = {
            c: math.sqrt(sum((row[c] - means[c]) ** 2 for row in rows) / (len(rows) - 1) / len(rows)) for c in columns
        }
        print(f"{'standard error':16}" + "".join(f"{errors[c]:15.3f}" for c in columns))
    (args.out / "judged.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
