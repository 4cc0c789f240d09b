"""Damaged settings in a model's folder: one sentence that names the file and the entry, never a traceback."""

import json
import shutil

import pytest
import torch

import model_utils as mu
import sample
import train

SCHEDULE, UNET, VAE = "scheduler/scheduler_config.json", "unet/config.json", "vae/config.json"
TEXT = "text_encoder/config.json"
CLIP, INDEX = "clip/preprocessor_config.json", "model_index.json"
ABSENT = object()


@pytest.fixture(scope="module")
def folder(tiny_model, image_folder, tmp_path_factory):
    """A folder with a copy of the tiny model and a run of train.py."""
    folder = tmp_path_factory.mktemp("settings")
    shutil.copytree(tiny_model, folder / "model")
    mu.save_embedding(folder / "run" / "learned_embeds.safetensors", "<kat>", torch.ones(1, 32), "model")
    config = {"model": str(folder / "model"), "placeholder_token": "<kat>", "images": image_folder}
    (folder / "run" / "config.json").write_text(json.dumps(config | {"initializer_token": "cat", "resolution": 16}))
    return folder


@pytest.fixture
def change(folder):
    """change(file, {entry: value}) or change(file, text) -> the model's folder, as it was again afterwards."""
    original = {}

    def change(file, new):
        path = folder / "model" / file
        text = original.setdefault(path, path.read_text())
        if isinstance(new, dict):
            entries = json.loads(text) | new
            new = json.dumps({name: value for name, value in entries.items() if value is not ABSENT})
        path.write_text(new)
        return folder / "model"

    yield change
    for path, text in original.items():
        path.write_text(text)


NO_JSON = {"": "cannot be read", "{": "cannot be read", "\x00": "cannot be read", "[" * 99_999: "cannot be read"}
NO_JSON |= {"[]": "holds no JSON object", "null": "holds no JSON object", '"text"': "holds no JSON object"}
NAN, INFINITE = float("nan"), float("inf")
DAMAGED = {
    SCHEDULE: {
        "beta_schedule": [None, 0, [], ABSENT, "sigmoid", "squaredcos_cap_v2"],
        "beta_start": [None, "0.1", 0, -1, NAN, [0.1], True],
        "beta_end": [None, 1, INFINITE],
        "num_train_timesteps": [None, 0, 1, 1000.0, "1000", 10**9],
        "trained_betas": [0, "0.1", [], [0.1, 0.2], [0.01] * 1000],
        "prediction_type": [None, "sample", "flow_prediction", 0],
        "timestep_spacing": ["karras", 0, ["leading"]],
        "set_alpha_to_one": [None, 0, "false"],
        "rescale_betas_zero_snr": [None, 1],
    },
    UNET: {"sample_size": [0, -8, "8", 8.0, True, [], [8], [8, 8, 8], [8, None], [8, 0], {}]},
    VAE: {"scaling_factor": [None, 0, "0.18", NAN, []], "shift_factor": [0.3, "0"]},
    TEXT: {"max_position_embeddings": [None, 0, 2, "32", 32.0, [32], NAN]},
    INDEX: {"_sampling": [None, 0, [], "fast"], "steps": [None, 0, 2.5, "25"], "guidance": [None, "7.5", NAN, [7.5]]},
}
SAMPLING = {
    "thresholding": [True],
    "use_karras_sigmas": [True, "no"],
    "use_exponential_sigmas": [True],
    "use_beta_sigmas": [True],
    "use_flow_sigmas": [True],
    "use_lu_lambdas": [True],
    "algorithm_type": ["sde-dpmsolver++", "dpmsolver", None],
    "solver_type": ["heun"],
    "solver_order": [1, 3, None, [2]],
    "final_sigmas_type": ["sigma_min", None],
    "lambda_min_clipped": [-5.1],
    "variance_type": ["learned", "fixed_large"],
}
CASES = [(file, entry, value) for file in DAMAGED for entry, values in DAMAGED[file].items() for value in values]


def error_of(main, argv, capsys):
    """Run a script, expect exit code 2 and one sentence; return it."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("step 1/1")]
    assert stop.value.code == 2 and line.startswith("error: ")
    return line


def read_by_both(file, folder, image_folder, capsys):
    """What sample.py and train.py say of the model in a folder."""
    yield error_of(sample.main, ["--embedding", str(folder / "run"), "--steps", "1"], capsys)
    argv = ["--model", str(folder / "model"), "--images", image_folder, "--initializer_token", "cat"]
    argv += ["--steps", "1", "--batch_size", "1", "--output_dir", str(folder / "new"), "--overwrite"]
    yield error_of(train.main, argv, capsys)


@pytest.mark.parametrize("file", DAMAGED)
def test_both_scripts_name_a_damaged_file_and_entry(file, folder, image_folder, change, capsys):
    entry, (*_, value) = next(iter(DAMAGED[file].items()))
    for new, named in (({entry: value}, f"'{entry}' is"), ("{", "cannot be read"), ("[]", "holds no JSON object")):
        change(file, new)
        for error in read_by_both(file, folder, image_folder, capsys):
            assert file in error and named in error, error


LOADERS = {
    SCHEDULE: mu.load_schedule,
    UNET: lambda model: mu.native_size(mu.read_unet_config(model), mu.load_vae(model, "cpu")),
    VAE: lambda model: mu.load_vae(model, "cpu"),
    TEXT: mu.load_tokenizer,
    INDEX: mu.sampling_defaults,
}


@pytest.mark.parametrize("file, entry, value", CASES)
def test_every_damaged_entry_is_named(file, entry, value, change):
    new = {"_sampling": {entry: value}} if entry in ("steps", "guidance") else {entry: value}
    with pytest.raises(mu.UserError) as caught:
        LOADERS[file](change(file, new))
    sentence = str(caught.value)
    assert file in sentence and f"'{entry}' is" in sentence and "\n" not in sentence


@pytest.mark.parametrize("file", DAMAGED)
def test_a_damaged_file_is_named(file, change):
    for text, named in NO_JSON.items():
        with pytest.raises(mu.UserError) as caught:
            LOADERS[file](change(file, text))
        assert file in str(caught.value) and named in str(caught.value)


def test_betas_that_leave_only_noise_are_refused(change):
    with pytest.raises(mu.UserError, match="scheduler_config.json: its betas turn too many timesteps into pure noise"):
        mu.load_schedule(change(SCHEDULE, {"beta_end": 0.9}))


@pytest.mark.parametrize("new", ["", "{", "[]", {"image_mean": None}, {"image_std": [0.5, 0.5]}, {"size": "x"}])
def test_damaged_settings_of_the_clip_that_scores_are_a_sentence(new, change, folder, capsys):
    change(CLIP, new)
    argv = ["--embedding", str(folder / "run"), "--steps", "1", "--score", "--num_images", "1"]
    assert f"--score_model {folder / 'model' / 'clip'} cannot be loaded" in error_of(sample.main, argv, capsys)


@pytest.mark.parametrize("name, value", [(name, value) for name, values in SAMPLING.items() for value in values])
def test_settings_of_other_samplers_are_noted_and_do_not_stop_a_run(name, value, change, capsys):
    mu.load_schedule(change(SCHEDULE, {name: value}))
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith("note: ") and f"{SCHEDULE}: {name} ignored" in note


DEIS = {"algorithm_type": "deis", "solver_type": "logrho", "solver_order": 2, "use_karras_sigmas": False}
DPM = {"algorithm_type": "dpmsolver++", "solver_type": "midpoint", "variance_type": None, "final_sigmas_type": "zero"}


@pytest.mark.parametrize("entries", [DEIS, DPM | {"lambda_min_clipped": -INFINITE, "thresholding": False}])
def test_the_usual_schedulers_of_checkpoints_are_accepted(entries, change, capsys):
    assert mu.load_schedule(change(SCHEDULE, entries)).num_train_timesteps == 1000
    assert capsys.readouterr().err == ""
