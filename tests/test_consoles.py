"""Consoles without the letters, files that another program holds open, threads and notebooks, lines to copy."""

import io
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import read_log, read_rows, read_state
from PIL import Image

import model_utils as mu
import sample
import train

# --- Consoles ---------------------------------------------------------------------------------------------------------


def options(model, images, *more):
    """A run of four steps, for train.main."""
    argv = ["--model", model, "--images", images, "--steps", "4", "--batch_size", "2", "--lr_warmup_steps", "2"]
    return [*argv, "--initializer_token", "cat", "--preview_steps", "0", "--no-score", *more]


def test_a_console_without_the_letters_of_token_and_folder(tiny_model, image_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", console)
    argv = options(tiny_model, image_folder, "--placeholder_token", "<子猫>", "--output_dir", "子猫 runs")
    train.main(argv)
    sample.main(["--embedding", "子猫 runs", "--score", "--num_images", "2", "--steps", "1"])
    sample.main(["--embedding", "子猫 runs", "--prompt", "a <子猫>", "--num_images", "1", "--steps", "1"])
    assert Path("子猫 runs", "scores.json").exists() and Path("子猫 runs", "samples", "0000.png").exists()
    console.flush()
    said = console.buffer.getvalue().decode("cp1252")
    assert "?? runs" in said and "<??>" in said and "1 images in" in said


def test_an_error_is_said_on_such_a_console_too(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stderr", console)
    with pytest.raises(SystemExit):
        train.main(["--images", "子猫"])
    console.flush()
    assert console.buffer.getvalue().startswith(b"error: --images")


class NotebookOutput(io.StringIO):
    """A stream that cannot be reconfigured."""

    reconfigure = property()


def test_train_and_sample_run_in_a_thread_and_with_a_notebooks_output(tiny_model, image_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdout", NotebookOutput())
    monkeypatch.setattr(sys, "stderr", NotebookOutput())
    argv = options(tiny_model, image_folder)
    train.main([*argv, "--output_dir", "cell"])
    errors = []

    def work():
        try:
            train.main([*argv, "--output_dir", "thread"])
            sample.main(["--embedding", "thread", "--num_images", "1", "--steps", "1"])
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors and Path("thread", "samples", "0000.png").exists()
    assert Path("thread", "learned_embeds.safetensors").exists() and Path("cell", "learned_embeds.safetensors").exists()
    assert "try next" in sys.stdout.getvalue()


# --- Files that another program holds open ----------------------------------------------------------------------------


@pytest.fixture
def hold_open(monkeypatch):
    """hold_open(names): as many writes of files with these names fail as on Windows; returns the names left."""
    monkeypatch.setattr(mu, "sampling_defaults", lambda model: {"steps": 1})  # previews in no time

    def hold(names):
        replace, left = os.replace, list(names)

        def refuse(source, target):
            if Path(target).name in left:
                left.remove(Path(target).name)
                raise PermissionError(13, "Access is denied", str(target))
            replace(source, target)

        monkeypatch.setattr(os, "replace", refuse)
        return left

    return hold


EVERY_TWO = ["--save_steps", "2", "--preview_steps", "2", "--log_steps", "2", "--save_bin"]


def test_files_that_are_held_open_once_are_written_at_the_next_save(learn, hold_open, capsys):
    names = ["learned_embeds.bin", "learned_embeds.safetensors", "preview.png", "state.pt"]
    left = hold_open([])
    expected = learn(*EVERY_TWO, steps=8)
    left += names
    folder = learn(*EVERY_TWO, steps=8, out="held")
    assert not left
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert [sum(name in line for line in warnings) for name in names] == [1, 1, 1, 1]
    assert read_state(folder)["step"] == 8
    for file in ("learned_embeds.safetensors", "learned_embeds.bin", "log.jsonl"):
        assert (folder / file).read_bytes() == (expected / file).read_bytes()
    with Image.open(folder / "preview.png") as ours, Image.open(expected / "preview.png") as theirs:
        assert ours.text == theirs.text and ours.tobytes() == theirs.tobytes()
    assert not list(folder.glob(".*.tmp"))


@pytest.mark.parametrize("name", ["state.pt", "learned_embeds.safetensors", "curves.png"])
def test_a_file_that_stays_open_is_an_error_at_the_end(learn, hold_open, name):
    left = hold_open([name] * 100)
    with pytest.raises(mu.UserError, match=f"cannot write .*{name}.*Access is denied.*close what holds it open"):
        learn(*EVERY_TWO)
    assert len(left) < 100 and read_log("run")[-1]["step"] == 4


def test_a_preview_that_stays_open_is_a_warning(learn, hold_open, capsys):
    hold_open(["preview.png"] * 100)
    folder = learn(*EVERY_TWO)
    output = capsys.readouterr()
    assert "preview.png" in output.err and "try next" in output.out
    assert read_state(folder)["step"] == 4 and read_rows(folder).isfinite().all()


def test_a_full_disk_at_a_line_of_the_log_loses_none(learn, monkeypatch, capsys):
    expected = read_log(learn("--log_steps", "1"))
    opened, failed = Path.open, []

    def refuse(path, *args, **kwargs):
        if path.name == "log.jsonl" and args == ("a",) and len(failed) < 2:
            failed.append(path)
            raise OSError(28, "No space left on device")
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    assert read_log(learn("--log_steps", "1", out="full")) == expected
    assert capsys.readouterr().err.count("No space left on device") == 2


# --- Lines to copy ----------------------------------------------------------------------------------------------------


def words_in_bash(line, folder):
    """The words of a command line as bash gives them to `python`."""
    script = "python() { printf '%s\\0' \"$@\"; }; " + line
    output = subprocess.run(["bash", "-c", script], capture_output=True, check=True, cwd=folder).stdout
    return output.decode().split("\0")[:-1]


def words_in_cmd(line):
    """The words as cmd.exe gives them: only double quotes quote, and <, >, & and | outside of them are its own."""
    assert not re.search(r"[<>&|^]", re.sub('"[^"]*"', "", line)), line
    return [word.replace('"', "") for word in re.findall(r'(?:"[^"]*"|[^" ])+', line)][1:]


@pytest.mark.parametrize("text", ["runs/kat", "my cat", "a <子猫>", "it's", "<a&b>", "(a|b)", "a;b", "<~>", "*", "#1"])
def test_quoted_text_is_one_word_in_bash_and_in_cmd(text, tmp_path):
    line = f"python {mu.quote(text)}"
    assert words_in_bash(line, tmp_path) == words_in_cmd(line) == [text]


@pytest.mark.parametrize("text", ["<$(touch hacked)>", "`touch hacked`", 'a"; touch hacked; "', "<!!>", "a\\", "$HOME"])
def test_quoted_text_executes_nothing(text, tmp_path):
    assert words_in_bash(f"python {mu.quote(text)}", tmp_path) == [text]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("token", ["<kat>", "<子猫>", "<$(touch${IFS}hacked)>", "<it's>"])
def test_the_lines_to_copy_run_in_a_shell(learn, capsys, tmp_path, token, monkeypatch):
    folder = learn("--placeholder_token", token, out="my runs/kat")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("try next"))
    words = words_in_bash(line.removeprefix("try next"), tmp_path)
    args = sample.build_parser().parse_args(words[1:])
    assert words[0] == "sample.py" and Path(args.embedding[0]).resolve() == folder and token in args.prompt[0]
    if "$" not in token:
        assert words_in_cmd(line.removeprefix("try next").strip()) == words
    draw = train.draw_batch

    def interrupted(dataset, batch_size, schedule, step, args):
        if step == 1:
            signal.raise_signal(signal.SIGINT)
        return draw(dataset, batch_size, schedule, step, args)

    monkeypatch.setattr(train, "draw_batch", interrupted)
    with pytest.raises(SystemExit):
        learn("--placeholder_token", token, out="my runs/other kat")
    line = capsys.readouterr().out.strip().splitlines()[-1]
    words = words_in_bash(line[line.index("python ") :], tmp_path)
    assert train.parse_options(words[1:]).output_dir == "my runs/other kat"
    assert not (tmp_path / "hacked").exists()
