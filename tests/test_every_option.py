"""Every option of both scripts arrives where it acts: none is lost between the command line and the function it is for.

The tables name an option and what the functions then receive, or what the run then holds. What they do with it is
tested where they are.
"""

import collections
import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import read_log, read_rows
from PIL import Image
from safetensors.torch import load_file

import data
import model_utils as mu
import sample
import train

THREE = torch.randn(3, 32, generator=torch.Generator().manual_seed(3))
WATCHED = {
    mu: "choose_device load_components initial_rows",
    data: "load_dataset",
    train: "sample_timesteps step_generator inversion_loss learning_rate",
    sample: "generate score_tokens load_clip load_images",
}


@pytest.fixture
def calls(monkeypatch):
    """{function: (arguments, settings) of each call}, and the learning rate of each step of the optimizer as "rate"."""
    found = collections.defaultdict(list)

    def watch(module, name):
        function, keep = getattr(module, name), 2 if name == "load_components" else None  # no revisions, no variants

        def watched(*args, **settings):
            found[name].append((args, settings))
            return function(*args[:keep], **settings)

        monkeypatch.setattr(module, name, watched)

    for module, names in WATCHED.items():
        for name in names.split():
            watch(module, name)
    step = torch.optim.AdamW.step
    rate = lambda optimizer: found["rate"].append(optimizer.param_groups[0]["lr"]) or step(optimizer)  # noqa: E731
    monkeypatch.setattr(torch.optim.AdamW, "step", rate)
    monkeypatch.setattr(torch, "compile", lambda unet: found["compile"].append(copy.copy(unet)) or found["compile"][-1])
    return found


def arguments(name, place):
    """What a function received as an argument or a setting, without repetitions."""

    def received(calls, folder):
        found = [settings[place] if isinstance(place, str) else args[place] for args, settings in calls[name]]
        return [value for i, value in enumerate(found) if value not in found[:i]]

    return received


def rates(calls, folder):
    return [round(rate, 6) for rate in calls["rate"]]


def passes(calls, folder):
    """Images of each pass through the UNet; the first and the last are those of the evaluation batch."""
    return [len(args[1]) for args, _ in calls["inversion_loss"]]


def rows(calls, folder):
    return list(read_rows(folder).shape)


def names(calls, folder):
    return sorted(path.name for path in folder.glob("*.safetensors"))


def unet(calls, folder):
    """Whether the UNet of the steps recomputes, and whether it is the compiled one."""
    used = calls["inversion_loss"][1][0][0].unet
    return [used.is_gradient_checkpointing, used in calls["compile"]]


# Without these a run has the learning rate 0.02, two steps of warm-up, then the cosine of "fast"; 4 steps of 2 images
TRAIN = {
    "--model MODEL": (arguments("load_components", 0), ["MODEL"]),
    "--revision r1": (arguments("load_components", 2), ["r1"]),
    "--variant v1": (arguments("load_components", 3), ["v1"]),
    "--precision bf16": (arguments("load_components", 1), [torch.bfloat16]),
    "--device cpu": (arguments("choose_device", 0), ["cpu"]),
    "--images IMAGE": (arguments("load_dataset", 1), ["IMAGE"]),
    "--resolution 8": (arguments("load_dataset", 2), [8]),
    "--placeholder_token <p>": (lambda calls, folder: list(load_file(folder / "learned_embeds.safetensors")), ["<p>"]),
    "--learnable_property style": (arguments("load_dataset", 4), ["style"]),
    "--templates TEXT": (arguments("load_dataset", 5), ["TEXT"]),
    "--initializer_token dog": (arguments("initial_rows", 1), ["dog"]),
    "--num_vectors 3": (rows, [3, 32]),
    "--initializer_token cat": (lambda calls, folder: [mu.read_json(folder / "config.json")["num_vectors"]], [1]),
    "--seed 7": (arguments("step_generator", 0), [7]),
    "--num_vectors 2 --seed 7": (arguments("initial_rows", 3), [7]),
    "--steps 3": (arguments("step_generator", 1), [train.EVAL_SEED, 0, 1, 2]),
    "--batch_size 5": (passes, [5, *[5] * 4, 5]),
    "--grad_accum 2": (passes, [4, *[2, 2] * 4, 4]),
    "--lr 0.5": (rates, [0.25, 0.5, 0.5, 0.25]),
    "--lr_warmup_steps 0": (rates, [0.02, 0.017071, 0.01, 0.002929]),
    "--lr_scheduler linear": (rates, [0.01, 0.02, 0.02, 0.01]),
    "--lr_scheduler constant": (rates, [0.02] * 4),
    "--lr_scheduler constant_with_warmup": (rates, [0.01, 0.02, 0.02, 0.02]),
    "--scale_lr --grad_accum 2": (rates, [0.04, 0.08, 0.08, 0.04]),
    "--timestep_sampling uniform": (arguments("sample_timesteps", 3), ["uniform"]),
    "--gradient_checkpointing": (unet, [True, False]),
    "--compile": (unet, [False, True]),
    "--save_steps 3": (names, ["learned_embeds-steps-3.safetensors", "learned_embeds.safetensors"]),
    "--log_steps 2": (lambda calls, folder: [row["step"] for row in read_log(folder)], [0, 2, 4]),
    "--preview_steps 3": (arguments("generate", 2), [range(4)]),
    "--preview_steps 2 --seed 5": (arguments("generate", 2), [range(5, 9)]),
    "--preview_steps 3 --preview_prompt <kat>": (arguments("generate", 1), [["<kat>"] * 4]),
    "--preview_steps 3 --learnable_property style": (
        arguments("generate", 1), [["a painting in the style of <kat>"] * 4]
    ),
    "--preview_steps 3 --resolution 8": (arguments("generate", "height"), [8]),
    "--score": (arguments("score_tokens", 4), ["object"]),
    "--score --learnable_property style": (arguments("score_tokens", 4), ["style"]),
    "--score --initializer_token dog": (arguments("score_tokens", 3), [["dog", "<kat>"]]),
    "--score --seed 7": (arguments("score_tokens", "seed"), [7]),
    "--score --resolution 8": (arguments("load_images", 1), [8]),
    "--no-score": (lambda calls, folder: calls["score_tokens"], []),
}  # fmt: skip


@pytest.mark.parametrize("option", TRAIN)
def test_every_option_of_training(option, learn, calls, tiny_model, image_folder):
    Path("text").write_text("a {}")
    places = {"MODEL": tiny_model, "IMAGE": f"{image_folder}/0.png", "TEXT": str(Path("text").resolve())}
    received, expected = TRAIN[option]
    folder = learn(*(places.get(word, word) for word in option.split()))
    assert received(calls, folder) == [
        places.get(value, value) if isinstance(value, str) else value for value in expected
    ]


def test_the_recipes_are_written_down():
    """What a step of each is, in figures of their own: train.RECIPES compared with itself would say nothing."""
    notebook = {"steps": 2000, "batch_size": 4, "lr": 2e-3, "lr_scheduler": "constant", "lr_warmup_steps": 0}
    assert train.RECIPES["notebook"] == notebook | {"timestep_sampling": "uniform"}
    fast = {"steps": 175, "batch_size": 8, "lr": None, "lr_scheduler": "cosine", "lr_warmup_steps": 30}
    assert train.RECIPES["fast"] == fast | {"timestep_sampling": "mixed"}


def learned_rows(calls, folder):
    """The rows with which images are generated, of all tokens, one after the other."""
    return calls["generate"][0][0][0].text_encoder.get_input_embeddings().learned_rows.flatten().tolist()


def tokens(calls, folder):
    return list(calls["generate"][0][0][0].placeholders)


def sizes(calls, folder):
    return [image.size for image in map(Image.open, sorted(Path("runs/kat/samples").glob("0*.png")))]


# Without these: one image of one step with the token of runs/kat, whose config.json names a revision and a variant
SAMPLE = {
    "--embedding THREE": (learned_rows, THREE.flatten().tolist()),  # all vectors, in their order
    "--embedding THREE --token <dug>": (tokens, ["<dug>"]),
    "--prompt <kat>": (arguments("generate", 1), [["<kat>"]]),
    "--negative_prompt dog": (arguments("generate", "negative_prompt"), ["dog"]),
    "--num_images 3": (arguments("generate", 2), [range(3)]),
    "--seed 5": (arguments("generate", 2), [range(5, 6)]),
    "--sampler ddim": (arguments("generate", "sampler"), ["ddim"]),
    "--steps 2": (arguments("generate", "steps"), [2]),
    "--guidance 3": (arguments("generate", "guidance"), [3.0]),
    "--height 8": (sizes, [(16, 8)]),
    "--width 8": (sizes, [(8, 16)]),
    "--batch_size 2": (arguments("generate", "batch_size"), [2]),
    "--output_dir out": (lambda calls, folder: [path.name for path in Path("out").iterdir()], ["0000.png"]),
    "--device cpu": (arguments("choose_device", 0), ["cpu"]),
    "--precision bf16": (arguments("load_components", 1), [torch.bfloat16]),
    "--seed 0": (arguments("load_components", slice(2, 4)), [("r1", "v1")]),
    "--revision main": (arguments("load_components", slice(2, 4)), [("main", "v1")]),
    "--variant bf16": (arguments("load_components", slice(2, 4)), [("r1", "bf16")]),
    "--model MODEL": (arguments("load_components", slice(0, 4, 2)), [("MODEL", None)]),
    "--model MODEL --variant bf16": (arguments("load_components", slice(2, 4)), [(None, "bf16")]),
    "--score --num_images 8": (arguments("score_tokens", "num_images"), [8]),
    "--score --num_images 8 --seed 3": (arguments("score_tokens", "seed"), [3]),
}


@pytest.mark.parametrize("option", SAMPLE)
def test_every_option_of_sampling(option, run, calls, tiny_model):
    config = mu.read_json(run / "config.json") | {"revision": "r1", "variant": "v1"}
    (run / "config.json").write_text(json.dumps(config))
    mu.save_embedding(run / "three.safetensors", [("<kat>", THREE)], "a model")
    places = {"MODEL": tiny_model, "THREE": "runs/kat/three.safetensors"}
    received, expected = SAMPLE[option]
    argv = ["--steps", "1", *(["--num_images", "1"] if "--num_images" not in option else [])]
    sample.main([*argv, *(places.get(word, word) for word in option.split())])
    known = [tuple(places.get(x, x) for x in value) if isinstance(value, tuple) else value for value in expected]
    assert received(calls, run) == known


OTHERS = {"--help", "--recipe", "--output_dir", "--resume"}  # in test_options.py, test_run.py


@pytest.mark.parametrize("script, table, others", [(train, TRAIN, OTHERS), (sample, SAMPLE, {"--help"})])
def test_no_option_is_forgotten(script, table, others):
    tested = {word.replace("--no-", "--") for options in table for word in options.split() if word[:2] == "--"}
    parser = script.build_parser()
    assert {action.option_strings[-1 if action.dest == "help" else 0] for action in parser._actions} == tested | others
    assert parser.format_help().startswith("usage: python")
