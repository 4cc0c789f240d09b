"""train.py --resume: exact after a crash, a kill or Ctrl-C, and careful with what is there."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import read_log, read_rows, read_state
from PIL import Image

import model_utils as mu
import sample
import train


class Crash(Exception):
    pass


def crash():
    raise Crash


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


RICH = ["--grad_accum", "2", "--num_vectors", "2", "--lr_scheduler", "linear", "--save_bin"]
CRASHES = [train.EVAL_SEED, 3, 5]  # before the first checkpoint (of step 2), between two, after the second


# --- A resumed run is the uninterrupted one ---------------------------------------------------------------------------


@pytest.mark.parametrize("options, dtype", [([], torch.float32), (RICH, torch.float32), (RICH, torch.float16)])
def test_a_resumed_run_equals_the_uninterrupted_one(learn, resume, before_step, monkeypatch, options, dtype):
    """fp16 brings the gradient scaler with its state. Users are refused it on the CPU, where it is slow."""
    monkeypatch.setattr(mu, "choose_dtype", lambda *_: dtype)
    options = ["--save_steps", "2", "--log_steps", "1", *options]
    whole = learn(*options, steps=7, out="whole")
    files = ["learned_embeds.safetensors", "log.jsonl", "state.pt"] + ["learned_embeds.bin"] * ("--save_bin" in options)
    for step in CRASHES:
        before_step(step, crash)
        with pytest.raises(Crash):
            learn(*options, steps=7, out=f"crash{step}")
        before_step(None)
        resumed = resume(f"crash{step}")
        for name in files:
            assert (resumed / name).read_bytes() == (whole / name).read_bytes(), (step, name)
    state = read_state(whole)
    assert (whole / "state.pt").stat().st_size < 100_000
    assert state["scaler"]["scale"] == (2.0**16 if dtype == torch.float16 else 1.0) and state["step"] == 7


def test_the_scale_of_fp16_gradients_is_restored(learn, resume, monkeypatch):
    monkeypatch.setattr(mu, "choose_dtype", lambda *_: torch.float16)
    loss = train.inversion_loss
    with monkeypatch.context() as overflow:
        overflow.setattr(train, "inversion_loss", lambda *args: 1000 * loss(*args))
        state = read_state(learn(steps=2))
    assert state["scaler"]["scale"] < 2.0**16
    assert read_state(resume("run", "--steps", "4"))["scaler"]["scale"] == state["scaler"]["scale"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--save_steps", "3"], ["--save_steps", "2", *RICH]])
def test_thirty_kills_change_nothing(tiny_model, image_folder, tmp_path, options):
    """SIGKILL at 30 random moments, each time resumed: the same files as the run that nobody killed."""
    command = [sys.executable, train.__file__, "--model", tiny_model, "--images", image_folder, "--no-score", *options]
    command += ["--initializer_token", "cat", "--batch_size", "2", "--lr_warmup_steps", "20", "--preview_steps", "500"]
    names = ["learned_embeds.safetensors", "log.jsonl"] + ["learned_embeds.bin"] * ("--save_bin" in options)

    def seconds(*more):
        start = time.time()
        subprocess.run([*command, *more], check=True)
        return time.time() - start

    whole, killed, rng = tmp_path / "whole", tmp_path / "killed", random.Random(0)
    start_up = seconds("--steps", "1", "--output_dir", str(tmp_path / "first"))
    command += ["--steps", "1000"]
    learning = seconds("--output_dir", str(whole)) - start_up
    kills, completed = 0, 0
    while kills < 30 or not completed:
        more = ["--resume"] if (killed / "config.json").exists() else []
        process = subprocess.Popen([*command, "--output_dir", str(killed), *more])
        try:
            process.wait(0.9 * start_up + rng.uniform(0, learning / 15) if kills < 30 else None)
        except subprocess.TimeoutExpired:
            process.kill()
            assert process.wait() == -9
            kills += 1
            continue
        assert process.returncode == 0
        for name in names:
            assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
        completed += 1
        shutil.rmtree(killed)  # the remaining kills get another run


def test_ctrl_c_saves_and_says_how_to_continue(learn, before_step, capsys):
    whole, previous = learn(steps=6, out="whole"), signal.getsignal(signal.SIGINT)

    def press():
        ctrl_c()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # a second one ends the program

    before_step(2, press)
    with pytest.raises(SystemExit) as stop:
        learn(steps=6, out="a run")
    assert stop.value.code == 130 and signal.getsignal(signal.SIGINT) == previous
    printed = capsys.readouterr().out
    assert "stopped after step 3, all is saved" in printed
    assert printed.strip().endswith('python train.py --resume --output_dir "a run"')
    before_step(None)
    train.main(["--resume", "--output_dir", "a run"])
    name = "learned_embeds.safetensors"
    assert Path("a run", name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(
    "module, function, call, step",
    [(mu, "save_embedding", 1, 4), (sample, "generate", 2, 3), (mu, "load_vae", 1, None)],
    ids=["saving", "preview", "loading"],
)
def test_ctrl_c_loses_nothing_whenever_it_comes(
    tiny_model, image_folder, tmp_path, monkeypatch, capsys, module, function, call, step
):
    """While step 3 is saved or step 2 is previewed: the next step is the last."""
    monkeypatch.chdir(tmp_path)
    original, calls = getattr(module, function), []

    def interrupting(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:  # the first preview is that of step 0
            ctrl_c()
        return original(*args, **kwargs)

    monkeypatch.setattr(module, function, interrupting)
    argv = ["--model", tiny_model, "--images", image_folder, "--initializer_token", "cat", "--steps", "9"]
    argv += ["--batch_size", "2", "--no-score"]
    with pytest.raises(SystemExit) as stop:
        train.main([*argv, "--save_steps", "3", "--preview_steps", "2", "--output_dir", "run"])
    assert stop.value.code == 130
    printed = capsys.readouterr()
    if step:
        assert f"stopped after step {step}, all is saved" in printed.out and read_state("run")["step"] == step
    else:
        assert printed.err.splitlines()[-1] == "stopped"


def test_an_embedding_that_a_kill_kept_from_being_written_is_written_on_resume(learn, resume):
    """The kill came between checkpoint and embedding. The other form of the file can be asked for later."""
    embedding = learn() / "learned_embeds.safetensors"
    content = embedding.read_bytes()
    embedding.unlink()
    resume("run", "--save_bin")
    assert embedding.read_bytes() == content and torch.load("run/learned_embeds.bin")["<kat>"].shape == (32,)


def test_half_a_line_at_the_end_of_the_log_is_dropped(learn, resume):
    whole = (learn("--log_steps", "1") / "log.jsonl").read_text()
    with open("run/log.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    resume("run")
    assert Path("run/log.jsonl").read_text() == whole


# --- Which run is resumed, and with which options ---------------------------------------------------------------------


def test_resume_takes_the_newest_run_or_the_one_that_is_named(learn, refused):
    assert "no run in runs/" in refused(["--resume"])
    learn(out="runs/kat"), learn("--placeholder_token", "<pup>", out="runs/pup")
    Path("runs/other").mkdir()
    Path("runs/other/config.json").write_text('{"of": "another program"}')
    assert train.parse_options(["--resume"]).output_dir == str(Path("runs/pup"))
    assert train.parse_options(["--resume", "runs/kat"]).output_dir == "runs/kat"
    assert "name another run" in refused(["--resume", "--placeholder_token", "<finn>"])
    assert "no checkpoint" in refused(["--resume", "--output_dir", "runs/other"])


@pytest.mark.parametrize("flag", [True, False])
def test_resume_keeps_every_option(learn, tmp_path, monkeypatch, flag):
    """Each at a value that is not its default, and the flags both ways."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", sys)  # as if it were installed
    config = {"model": "mini_sd", "lr": 0.125, "recipe": "notebook"}
    for action in train.build_parser()._actions:
        value = (
            flag
            if action.nargs == 0
            else 7
            if action.type not in (None, mu.path, train.initializer)
            else "-dashed words"
        )
        config.setdefault(action.dest, [*action.choices][-1] if action.choices else value)
    for name in train.NOT_STORED | {"help", "output_dir"}:
        config.pop(name)
    (learn() / "config.json").write_text(json.dumps(config))
    resumed = vars(train.parse_options(["--resume", "--output_dir", "run"]))
    assert {name: resumed[name] for name in config} == config | {"model": mu.DEFAULT_MODEL}


def test_resume_allows_more_steps(learn):
    learn()
    assert [row["step"] for row in read_log(learn("--resume", steps=6))] == [4, 6]


@pytest.mark.parametrize(
    "options", [["--seed", "3"], ["--batch_size", "4"], ["--lr=1"], ["--initializer_token", "dog"]]
)
def test_resume_refuses_options_that_change_the_course(learn, refused, options):
    learn()
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    name = options[0].split("=")[0]
    assert f"{name} was" in refused(["--resume", "--output_dir", "run", *options])
    assert {path: path.read_bytes() for path in Path("run").iterdir()} == before


def test_resume_refuses_other_images_and_takes_moved_ones(learn, resume, refused, image_folder, tmp_path):
    learn()
    moved = shutil.copytree(image_folder, tmp_path / "moved")
    assert read_state(resume("run", "--images", str(moved), "--steps", "5"))["step"] == 5
    Image.new("RGB", (20, 20), "red").save(moved / "extra.png")
    assert "run with other images" in refused(["--resume", "--output_dir", "run", "--steps", "9"])
    assert read_state("run")["step"] == 5


def test_the_precision_of_a_run_is_kept_on_another_machine(learn, monkeypatch, refused):
    monkeypatch.setattr(mu, "choose_dtype", lambda *_: torch.bfloat16)  # what 'auto' meant there
    learn(steps=2)
    argv = ["--resume", "--output_dir", "run"]
    assert train.parse_options(argv).precision == "bf16"
    assert train.parse_options([*argv, "--precision", "auto"]).precision == "bf16"
    assert "--precision was 'bf16'" in refused([*argv, "--precision", "fp32"])
    monkeypatch.undo()


def test_the_project_may_move(learn, resume, tiny_model, tmp_path, monkeypatch):
    """Runs and files name the bundled model by its name alone; its path is looked up when they are read."""
    monkeypatch.setattr(mu, "DEFAULT_MODEL", shutil.copytree(tiny_model, str(tmp_path / "here" / "mini_sd")))
    folder = learn("--model", mu.DEFAULT_MODEL)
    (tmp_path / "here").rename(tmp_path / "there")
    monkeypatch.setattr(mu, "DEFAULT_MODEL", str(tmp_path / "there" / "mini_sd"))
    assert read_state(resume(folder, "--steps", "6"))["step"] == 6
    assert str(tmp_path) not in (folder / "learned_embeds.safetensors").read_bytes().decode("latin-1")
    shutil.copy(folder / "learned_embeds.safetensors", tmp_path / "alone.safetensors")
    for embedding in ("run", "alone.safetensors"):
        sample.main(["--embedding", embedding, "--prompt", "a <kat>", "--num_images", "1", "--steps", "1"])


# --- Damaged runs -----------------------------------------------------------------------------------------------------


def test_a_run_whose_checkpoint_is_lost_or_damaged_is_not_started_anew(learn, refused):
    learn()
    rows, state = read_rows("run"), Path("run/state.pt").read_bytes()
    torch.save({"rows": torch.zeros(1)}, "other.pt")
    for content in (state[:1000], b"", b"no pickle", Path("other.pt").read_bytes()):
        Path("run/state.pt").write_bytes(content)
        assert "state.pt is damaged" in refused(["--resume", "--output_dir", "run"])
    Path("run/state.pt").unlink()
    assert "no checkpoint" in refused(["--resume", "--output_dir", "run"])
    assert torch.equal(read_rows("run"), rows)
    Path("run/state.pt").write_bytes(state)
    Path("run/config.json").unlink()
    assert "no config.json" in refused(["--resume", "--output_dir", "run"])


WRONG_ENTRIES = {
    "steps": ["many", -1, 1.5, [1], {}, True], "batch_size": [0, "2x"], "grad_accum": [False],
    "lr": ["fast", -1, [0.1]], "seed": [-1, 2**64, "x"], "precision": ["fp64", 16],
    "lr_scheduler": ["square", 1], "device": ["tpu"],
    "learnable_property": ["animal"], "timestep_sampling": ["random"], "num_vectors": [0, "all"],
    "resolution": [0, 3.5], "model": [5, ["a"]], "images": [7], "initializer_token": [""], "recipe": ["slow"],
    "placeholder_token": ["", 7, {}, ["<kat>"]],
}  # fmt: skip
WRONG_FILES = [
    b"",
    b"[]",
    b"5",
    b"null",
    b'{"steps": ',
    b"\xff\xfe\x00",
    b"[" * 100_000,
    b'{"placeholder_token": null}',
]


def test_a_config_edited_by_hand_is_refused_in_one_sentence(learn, refused):
    config = json.loads((learn() / "config.json").read_text())
    edits = [config | {name: value} for name, values in WRONG_ENTRIES.items() for value in values]
    contents = [json.dumps(edited).encode() for edited in edits] + WRONG_FILES
    before = {name: Path("run", name).read_bytes() for name in ("state.pt", "learned_embeds.safetensors", "log.jsonl")}
    for content in contents:
        Path("run/config.json").write_bytes(content)
        sentence = refused(["--resume", "--output_dir", "run"])
        assert "config.json" in sentence or "--" in sentence, content
        assert Path("run/config.json").read_bytes() == content
    assert {name: Path("run", name).read_bytes() for name in before} == before
