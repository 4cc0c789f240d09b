"""The run's folder: exact after any interruption, never overwritten, with all that was learned in whole files."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import pytest
import torch
from conftest import options, read_log, read_rows, read_state
from PIL import Image

import model_utils as mu
import sample
import train

FILES = ["learned_embeds.safetensors", "learned_embeds-steps-6.safetensors", "log.jsonl", "state.pt", "preview.png"]
RICH = ["--grad_accum", "2", "--num_vectors", "2", "--lr_scheduler", "linear"]


class Crash(Exception):
    pass


def resume(folder, *more):
    return train.train(train.parse_options(["--resume", "--output_dir", str(folder), *more]))


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.parametrize("precision, more", [("fp32", []), ("fp32", RICH), ("fp16", RICH)])
def test_a_resumed_run_equals_the_uninterrupted_one(learn, before_step, monkeypatch, precision, more):
    """After a crash before the first checkpoint (of step 2), between two, and after the second. fp16 has a scaler."""
    monkeypatch.setattr(mu, "choose_precision", lambda *_: precision)
    more = ["--save_steps", "2", "--log_steps", "1", "--preview_steps", "3", *more]
    whole = learn(*more, steps=7, out="whole")
    for step in (train.EVAL_SEED, 3, 5):
        before_step(step, Mock(side_effect=Crash))
        with pytest.raises(Crash):
            learn(*more, steps=7, out=f"crash{step}")
        before_step(None)
        resumed = resume(f"crash{step}")
        for name in FILES:
            assert (resumed / name).read_bytes() == (whole / name).read_bytes(), (step, name)
    assert (whole / "state.pt").stat().st_size < 10_000


def test_a_kill_between_the_files_of_a_save_costs_nothing(learn, monkeypatch):
    """Whatever of embedding, log and checkpoint was written last before it."""
    more = ["--save_steps", "2", "--log_steps", "2"]
    whole = contents(learn(*more, steps=6, out="whole"))
    for count in (2, 5, 6, 7, 9):
        dying = Mock(wraps=mu.write_whole, side_effect=[DEFAULT] * (count - 1) + [Crash])
        with monkeypatch.context() as patch, pytest.raises(Crash):
            patch.setattr(mu, "write_whole", dying)
            learn(*more, steps=6, out=f"killed{count}")
        resumed = contents(resume(f"killed{count}"))
        assert {**whole, "config.json": None} == {**resumed, "config.json": None}, count


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL")
def test_a_killed_process_is_resumed_to_the_same_bytes(tiny_model, image_folder, tmp_path):
    argv = [sys.executable, train.__file__, *options(tiny_model, image_folder, "--save_steps", "5", steps=150)]
    subprocess.run([*argv, "--output_dir", str(tmp_path / "whole")], check=True, capture_output=True)
    process = subprocess.Popen([*argv, "--output_dir", str(tmp_path / "killed")], stderr=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "state.pt").exists():
        assert process.poll() is None  # it is at work
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL and read_state(tmp_path / "killed")["step"] < 150
    argv = [sys.executable, train.__file__, "--resume", str(tmp_path / "killed")]
    subprocess.run(argv, check=True, capture_output=True)
    for name in ("learned_embeds.safetensors", "log.jsonl", "state.pt"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_ctrl_c_says_how_to_go_on_once_there_is_a_run(
    tiny_model, image_folder, tmp_path, monkeypatch, before_step, capsys
):
    monkeypatch.chdir(tmp_path)
    argv = options(tiny_model, image_folder, "--save_steps", "2", "--output_dir", "a run")
    press = Mock(side_effect=KeyboardInterrupt)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(mu, "load_components", press)
        train.main(argv)
    assert capsys.readouterr().out == "\nstopped\n"
    before_step(3, press)
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    assert stop.value.code == 130
    assert 'python train.py --resume "a run"' in capsys.readouterr().out
    before_step(None)
    train.main(["--resume", "a run"])
    assert read_state("a run")["step"] == 4


def test_resume_takes_the_newest_run_or_the_one_that_is_named(learn, refused):
    assert "no run in runs/" in refused(train.main, ["--resume"])
    kat, pup = learn(out="runs/kat", steps=2), learn("--placeholder_token", "<pup>", out="runs/pup", steps=2)
    os.utime(kat / "config.json", (1, 1))
    newest = train.parse_options(["--resume", "--steps", "3"])
    assert (newest.output_dir, newest.placeholder_token) == (str(Path("runs/pup")), "<pup>")
    for argv in (["--resume", "runs/kat"], ["--resume", "--output_dir", "runs/kat"]):
        assert train.parse_options([*argv, "--steps", "3"]).placeholder_token == "<kat>"
    (pup / "config.json").write_text('{"of": "another program"}')
    assert "no folder of a run" in refused(train.main, ["--resume"])


def test_resume_keeps_every_option(run):
    """Each at a value that is not its default, and the flags both ways."""
    (run / "state.pt").unlink()
    for flag in (True, False):
        config = {"recipe": "notebook", "device": "cpu", "precision": "bf16", "lr": 0.125}
        config |= {"initializer_token": "a dog", "output_dir": str(run), "resume": "latest"}
        for action in train.build_parser()._actions[1:]:
            number = 7 if action.type in (int, mu.one_or_more) else "-dashed words"
            value = flag if action.nargs == 0 else number
            config.setdefault(action.dest, [*action.choices][-1] if action.choices else value)
        (run / "config.json").write_text(json.dumps(config))
        assert vars(train.parse_options(["--resume"])) == config


def test_options_that_change_the_course_are_refused_and_all_named(run, refused):
    before, more = contents(run), "--lr 1 --batch_size 4 --precision bf16 --initializer_token dog --seed 3".split()
    sentence = refused(train.main, ["--resume", run, "--steps", "9", *more])
    assert all(f"{name} was" in sentence for name in more[::2]) and sentence.count(" was ") == 5
    assert contents(run) == before


def test_a_finished_run_is_left_alone(run, capsys):
    before = contents(run)
    with pytest.raises(SystemExit) as stop:
        train.main(["--resume", str(run)])
    assert stop.value.code in (None, 0)
    assert capsys.readouterr().out == "complete at step 4: --steps N trains on\n"
    with pytest.raises(SystemExit):
        train.main(["--resume", str(run), "--steps", "3"])
    assert contents(run) == before
    assert [row["step"] for row in read_log(resume(run, "--steps", "6"))] == [*range(7)]


def test_every_save_keeps_its_embedding(learn):
    constant = ["--lr_scheduler", "constant"]
    folder = learn("--save_steps", "2", *constant, steps=5)
    kept = {path.name: read_rows(path) for path in folder.glob("learned_embeds*")}
    for step, name in ((2, "learned_embeds-steps-2"), (4, "learned_embeds-steps-4"), (5, "learned_embeds")):
        rows = kept.pop(f"{name}.safetensors")
        assert torch.equal(rows, read_rows(learn(*constant, steps=step, out=f"{step}"))), step
    assert not kept


def test_the_preview_has_a_row_of_images_for_each_preview(learn, monkeypatch):
    """Below the training images; each row is what sample.generate makes of the token as it was then."""
    rows, generate = [], sample.generate

    def remember(*args, **settings):
        rows.append(([*generate(*args, **settings)], args[1], settings))
        return rows[-1][0]

    monkeypatch.setattr(sample, "generate", remember)
    folder = learn("--preview_steps", "2", "--preview_prompt", "a <kat> in red", steps=3)
    sheet = Image.open(folder / "preview.png").convert("RGB")
    assert len(rows) == 3 and sheet.size == (4 * 18, 4 * (16 + 2 + 14))  # training, steps 0, 2 and 3
    for i, (images, prompts, settings) in enumerate(rows, start=1):
        assert prompts == ["a <kat> in red"] * 4 and settings["height"] == settings["width"] == 16
        for column, image in enumerate(images):
            left, top = column * 18 + 1, i * 32 + 15
            assert sheet.crop((left, top, left + 16, top + 16)).tobytes() == image.tobytes()
    assert len({images[0].tobytes() for images, *_ in rows}) == 3


def test_a_preview_that_fails_is_a_note_and_the_run_goes_on(learn, monkeypatch, capsys):
    monkeypatch.setattr(sample, "generate", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory.")))
    assert read_state(learn("--preview_steps", "2"))["step"] == 4
    assert capsys.readouterr().err.count("note: no preview of step") == 3


def test_a_run_ends_by_naming_its_files_its_speed_and_a_command_that_works(learn, capsys):
    folder = learn(out="a run")
    printed = capsys.readouterr().out
    assert "from 'cat'" in printed and "embedding  " in printed and " s a step" in printed
    curves = Image.open(folder / "curves.png")
    assert curves.size == (480, 5 * 160) and len(curves.convert("RGB").getcolors(10_000)) > 2
    command = printed.split("try next   python sample.py ")[1].strip()
    assert command == '--embedding "a run" --prompt "a photo of a <kat> on the moon"'
    learn("--learnable_property", "style", out="style")
    assert '--prompt "a picture of two cats in the style of <kat>"' in capsys.readouterr().out


def test_runs_never_overwrite_each_other(learn, refused, tiny_model, image_folder):
    folders = [learn(steps=1, out="") for _ in range(2)]
    assert [folder.name for folder in folders] == ["kat", "kat-2"] and folders[0].parent.name == "runs"
    argv = ["--output_dir", "scored", "--preview_steps", "1", "--save_steps", "1", "--score"]
    for file in learn(*argv, steps=1).iterdir():  # any of them alone, also one of another program
        Path("other", file.name).mkdir(parents=True)
        Path("other", file.name, file.name).write_bytes(b"of another program")
        argv = options(tiny_model, image_folder, "--output_dir", f"other/{file.name}")
        assert "holds a run" in refused(train.main, argv), file
        assert contents(f"other/{file.name}") == {file.name: b"of another program"}


def test_a_second_token_that_an_edit_adds_is_saved_as_one(learn, monkeypatch):
    add_one = mu.add_tokens

    def add_two(components, tokens, option):
        return add_one(components, [*tokens, ("<b>", -tokens[0][1])], option)

    monkeypatch.setattr(mu, "add_tokens", add_two)
    path = learn("--num_vectors", "2") / "learned_embeds.safetensors"
    rows = {name: mu.load_embedding(path, name)[1] for name in ("<kat>", "<b>")}
    assert [len(x) for x in rows.values()] == [2, 2] and not torch.equal(*rows.values())


def test_processes_without_a_part_of_a_step_are_noted(learn, monkeypatch, capsys):
    monkeypatch.setattr(train, "join_processes", lambda device: (0, 3))
    monkeypatch.setattr(train, "dist", Mock())
    learn("--grad_accum", "2", out="four images")
    assert "processes" not in capsys.readouterr().err
    learn("--batch_size", "1", "--grad_accum", "2", out="two images")
    assert "note: 3 processes, but a step has only 2 images" in capsys.readouterr().err


def test_two_processes_learn_what_one_learns(learn, tiny_model, image_folder):
    """Parts of 1, 1, 1 and none, and another number of processes when the run goes on, as a program."""
    more = ["--batch_size", "1", "--grad_accum", "3", "--log_steps", "1"]
    one = learn(*more, out="one")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", train.__file__]
    argv = options(tiny_model, image_folder, *more, "--output_dir", "two", steps=4)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*run, *argv], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("embedding  ") == done.stdout.count("training  ") == 1  # one process speaks
    torch.testing.assert_close(read_rows("two"), read_rows(one), atol=1e-5, rtol=0)
    for ours, theirs in zip(read_log("two"), read_log(one), strict=True):
        # AdamW hardly sees whether gradients are added or averaged: their norm does
        assert ours == {name: pytest.approx(value, rel=1e-3) for name, value in theirs.items()}
    assert read_state(resume("two", "--steps", "5"))["step"] == 5
