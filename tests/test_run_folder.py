"""train.py's options and its run folder: nothing is overwritten, mistakes get one sentence."""

import json
import shlex
import shutil
import sys
import types
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import read_rows
from PIL import Image

import model_utils as mu
import sample
import train

# --- Folders ----------------------------------------------------------------------------------------------------------


def test_runs_never_overwrite_each_other(learn, refused):
    assert [learn(steps=1, out=None).name for _ in range(3)] == ["kat", "kat-2", "kat-3"]
    path = Path("runs/kat/learned_embeds.safetensors")
    before = path.read_bytes()
    assert "holds a run: add --resume or --overwrite" in refused(["--output_dir", "runs/kat"])
    assert path.read_bytes() == before
    learn("--overwrite", "--seed", "4", steps=1, out="runs/kat")
    assert path.read_bytes() != before


def test_two_runs_started_at_the_same_moment_take_two_folders(learn):
    options = [train.parse_options(["--placeholder_token", "<kat>"]) for _ in range(2)]
    assert [train.claim_folder(args) for args in options] == [Path("runs/kat"), Path("runs/kat-2")]
    assert [args.output_dir for args in options] == [str(Path("runs/kat")), str(Path("runs/kat-2"))]


@pytest.mark.parametrize("name", ["learned_embeds.bin", "learned_embeds.safetensors", "preview.png", "config.json"])
def test_files_of_another_program_are_not_overwritten(learn, name):
    """The folders of diffusers' script and of the concept library hold an embedding and no config.json."""
    Path("old").mkdir()
    content = b'{"precious": "to someone"}'
    Path("old", name).write_bytes(content)
    for options in ([], ["--overwrite"]):
        with pytest.raises(mu.UserError, match=f"holds '{name}' and is not a run's folder: name another"):
            learn(*options, out="old")
    assert Path("old", name).read_bytes() == content


def test_overwrite_leaves_nothing_of_the_earlier_run(learn):
    learn("--save_bin", "--preview_steps", "4")
    Path("run/scores.json").write_text("{}")
    Path("run/events.out.tfevents.1").write_bytes(b"of the earlier run")
    Path("run/notes.txt").write_text("the user's own")
    learn("--overwrite", steps=1)
    names = [".lock", "config.json", "curves.png", "learned_embeds.safetensors", "log.jsonl", "notes.txt", "state.pt"]
    assert sorted(path.name for path in Path("run").iterdir()) == names


def test_tensorboard_files_of_another_program_stay(learn):
    Path("run").mkdir()
    events = Path("run/events.out.tfevents.1")
    events.write_bytes(b"of another")
    learn()
    assert events.read_bytes() == b"of another"


def test_a_run_that_failed_before_it_saved_is_no_obstacle(learn):
    Path("run").mkdir()
    Path("run/config.json").write_text('{"placeholder_token": "<kat>", "model": "mini_sd"}')
    assert (learn() / "learned_embeds.safetensors").exists()
    with pytest.raises(mu.UserError, match="holds a run"):
        learn()


def test_a_run_ends_by_naming_its_files_and_a_command_that_works(learn, capsys):
    learn(out="a run")
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.replace("try next", "next").splitlines())
    assert lines.keys() >= {"embedding", "log", "curves", "next"}
    assert all(Path(lines[name]).is_file() for name in ("embedding", "log", "curves"))
    command = shlex.split(lines["next"])
    assert command[:2] == ["python", "sample.py"] and "<kat>" in command[-1]
    sample.main([*command[2:], "--num_images", "1", "--steps", "1"])
    assert Path("a run/samples/0000.png").is_file()
    with Image.open("a run/curves.png") as curves:
        assert len(curves.convert("RGB").getcolors()) > 5


def test_a_run_is_scored_at_the_end_where_the_model_has_a_clip(learn, tiny_model, tmp_path, monkeypatch):
    scored = []
    monkeypatch.setattr(sample, "run", scored.append)
    learn("--score", "--seed", "3", steps=1)
    assert [(args.score, args.embedding, args.seed) for args in scored] == [(True, ["run"], 3)]
    Path("run/scores.json").write_text("{}")
    train.main(["--resume", "run"])  # finished: what is there stays
    assert len(scored) == 1
    learn("--no-score", steps=1, out="unscored")
    without_clip = shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("clip"))
    learn("--score", "--model", str(without_clip), steps=1, out="without")
    assert len(scored) == 1


def test_tensorboard_gets_what_is_logged(learn, monkeypatch):
    written = []

    def writer(folder, purge_step):
        closed = lambda: written.append("closed")  # noqa: E731
        return types.SimpleNamespace(add_scalar=lambda *point: written.append(point), close=closed)

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=writer))
    learn("--tensorboard", "--log_steps", "2", steps=4)
    assert {point[0] for point in written[:-1]} >= {"loss", "eval_loss", "lr", "grad_norm", "embedding_norm"}
    assert {point[2] for point in written[:-1]} == {2, 4} and written[-1] == "closed"
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(mu.UserError, match="--tensorboard is not installed"):
        learn("--tensorboard", out="other")


# --- Previews ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick_sampling(monkeypatch):
    monkeypatch.setattr(mu, "sampling_defaults", lambda model: {"steps": 2})


def read_preview(folder):
    """The steps that the rows of preview.png show, and the rows as arrays, that of the training images first."""
    with Image.open(Path(folder, "preview.png")) as sheet:
        steps = json.loads(sheet.text["steps"])
        return steps, np.split(np.asarray(sheet), len(steps) + 1)


def test_previews_are_rows_below_the_training_images(learn, quick_sampling):
    """Also when the run is resumed with other --preview_steps: no gaps, no row twice."""
    learn("--preview_steps", "2", steps=4)
    steps, rows = read_preview("run")
    assert steps == [0, 2, 4] and rows[0].shape == (16 + 2 + 14, 4 * (16 + 2), 3)
    learn("--preview_steps", "3", "--resume", steps=7)
    steps, more_rows = read_preview("run")
    assert steps == [0, 2, 4, 6, 7] and np.array_equal(more_rows[:4], rows)
    assert all(row[20:].std() > 5 for row in more_rows)


def test_previews_of_a_resumed_run_are_those_of_the_uninterrupted_one(learn, resume, before_step, quick_sampling):
    options = ["--preview_steps", "1", "--save_steps", "2", "--log_steps", "1"]
    whole = learn(*options, out="whole")
    before_step(3, lambda: 1 / 0)  # step 3 is previewed and not saved: the resumed run begins after step 2
    with pytest.raises(ZeroDivisionError):
        learn(*options)
    before_step(None)
    assert (resume("run") / "preview.png").read_bytes() == (whole / "preview.png").read_bytes()


def test_previews_after_the_step_of_the_checkpoint_are_dropped(learn, resume, before_step, quick_sampling):
    before_step(3, lambda: 1 / 0)  # step 3 is previewed and not saved: the resumed run begins after step 2
    with pytest.raises(ZeroDivisionError):
        learn("--preview_steps", "1", "--save_steps", "2", "--log_steps", "1", steps=5)
    before_step(None)
    assert read_preview("run")[0] == [0, 1, 2, 3]
    assert read_preview(resume("run", "--preview_steps", "4"))[0] == [0, 1, 2, 4, 5]


def test_previews_asked_for_on_resume_or_after_damage_begin_a_new_sheet(learn, quick_sampling):
    learn(steps=2)
    learn("--preview_steps", "2", "--resume", steps=4)
    assert read_preview("run")[0] == [4]
    Path("run/preview.png").write_bytes(b"damaged")
    learn("--preview_steps", "2", "--resume", steps=6)
    steps, rows = read_preview("run")
    assert steps == [6] and all(row[20:].std() > 5 for row in rows)


def test_the_preview_keeps_the_training_images_and_the_newest_rows(learn, quick_sampling, monkeypatch):
    assert train.PREVIEW_ROWS == 20
    learn("--preview_steps", "1", steps=2, out="short")
    training_images = read_preview("short")[1][0]
    monkeypatch.setattr(train, "PREVIEW_ROWS", 3)
    steps, rows = read_preview(learn("--preview_steps", "1", steps=5))
    assert steps == [3, 4, 5] and np.array_equal(rows[0], training_images)


@pytest.mark.parametrize(
    "kind, prompt", [("object", "a photo of a <kat>"), ("style", "a painting in the style of <kat>")]
)
def test_previews_show_the_prompt_at_the_training_resolution(learn, quick_sampling, monkeypatch, kind, prompt):
    prompts, generate = [], sample.generate

    def generating(components, given, seeds, **settings):
        prompts.append((given, list(seeds), settings["height"], settings["width"]))
        return generate(components, given, seeds, **settings)

    monkeypatch.setattr(sample, "generate", generating)
    options = ["--learnable_property", kind, "--preview_steps", "1", "--seed", "5", "--resolution", "8"]
    learn(*options, steps=1)
    assert prompts == [([prompt] * 4, [5, 6, 7, 8], 8, 8)] * 2
    learn(*options, "--preview_prompt", "two <kat> in red", steps=1, out="other")
    assert prompts[-1][0] == ["two <kat> in red"] * 4


@pytest.mark.parametrize("error", [mu.UserError("no room"), RuntimeError("out of memory"), MemoryError("no memory")])
def test_a_preview_that_fails_is_reported_and_the_run_goes_on(learn, monkeypatch, capsys, error):
    def failing(*args, **kwargs):
        raise error

    rows = read_rows(learn(out="other"))
    monkeypatch.setattr(sample, "generate", failing)
    learn("--preview_steps", "2")
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: no preview")]
    assert [line.split()[5] for line in warnings] == ["0", "2", "4"] and str(error) in warnings[0]
    assert torch.equal(read_rows("run"), rows)


# --- Options ----------------------------------------------------------------------------------------------------------


def test_all_names_of_an_option_mean_the_same():
    for action in train.build_parser()._actions:
        names = [name for name in action.option_strings if name.startswith("--") and not name.startswith("--no-")]
        if len(names) > 1:
            value = [*action.choices][-1] if action.choices else "7"
            parsed = [vars(train.build_parser().parse_args([name, value])) for name in names]
            assert all(values == parsed[0] != vars(train.build_parser().parse_args([])) for values in parsed), names


def test_variant_and_revision_choose_the_weights(learn, tiny_model, refused, image_folder, tmp_path, monkeypatch):
    """A repository as the Hub's cache holds it, with two revisions: one of plain files, one of *.fp16.* alone."""
    cache = tmp_path / "hub" / "models--someone--tiny"
    for revision, commit, variant in (("main", "a" * 40, ""), ("half", "b" * 40, ".fp16")):
        snapshot = shutil.copytree(tiny_model, cache / "snapshots" / commit)
        for path in [*snapshot.glob("*/*.safetensors")]:
            path.rename(path.with_name(path.stem + variant + path.suffix))
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / revision).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    learn("--model", "someone/tiny", steps=1, out="plain")
    learn("--model", "someone/tiny", "--revision", "half", "--variant", "fp16", "--preview_steps", "1", steps=1)
    assert torch.equal(read_rows("run"), read_rows("plain"))
    assert read_preview("run")[0] == [0, 1]  # the VAE is loaded once more for previews
    argv = ["--model", "someone/tiny", "--images", image_folder, "--initializer_token", "cat", "--steps", "1"]
    assert "--model someone/tiny" in refused([*argv, "--variant", "fp16"])
    assert "--model someone/tiny" in refused([*argv, "--revision", "none"])


# --- Mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, said",
    [
        (["--images", "nowhere"], ["--images", "nowhere"]),
        (["--images", "empty"], ["--images", "empty"]),
        (["--placeholder_token", "cat"], ["--placeholder_token", "already a token"]),
        (["--placeholder_token", "<|endoftext|>"], ["--placeholder_token", "already a token"]),
        (["--placeholder_token", "my cat"], ["--placeholder_token", "spaces"]),
        (["--placeholder_token", ""], ["--placeholder_token", "empty"]),
        (["--initializer_token", "<|endoftext|>"], ["--initializer_token", "no word"]),
        (["--initializer_token", ""], ["--initializer_token"]),
        (["--initializer_token", "no.bin"], ["no.bin", "no such file"]),
        (["--model", "no/such/folder"], ["--model"]),
        (["--steps", "0"], ["--steps", "not 0"]),
        (["--lr", "nan"], ["--lr"]),
        (["--lr", "inf"], ["--lr", "inf"]),
        (["--resolution", "13"], ["--resolution", "multiple"]),
        (["--resolution", "0"], ["--resolution", "not 0"]),
        (["--num_vectors", "28"], ["--num_vectors", "too long"]),
        (["--num_vectors", "76"], ["--num_vectors", "75"]),
        (["--seed", str(2**64)], ["--seed"]),
        (["--preview_steps", "-1"], ["--preview_steps", "-1"]),
        (["--resume", "--overwrite"], ["--resume", "--overwrite"]),
        (["--resume", "--output_dir", "empty"], ["--resume", "checkpoint"]),
        (["--precision", "fp16", "--device", "cpu"], ["--precision fp16", "bf16"]),
        (["--output_dir", "file"], ["--output_dir file", "a file"]),
        (["--output_dir", "file/below"], ["file/below"]),
        (["--learnng_rate", "1"], ["--learnng_rate"]),
    ],
)
def test_mistakes_get_one_sentence(options, said, tiny_model, image_folder, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("file").write_text("precious")
    argv = ["--model", tiny_model, "--images", image_folder, "--initializer_token", "cat", "--steps", "1", *options]
    sentence = refused(argv)
    assert all(words in sentence for words in said), sentence
    assert not Path("runs").exists() and Path("file").read_text() == "precious"


def test_a_model_that_lacks_a_part_is_named_with_the_part(tiny_model, image_folder, tmp_path, refused):
    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    shutil.rmtree(broken / "unet")
    argv = ["--model", str(broken), "--images", image_folder, "--initializer_token", "cat"]
    sentence = refused([*argv, "--output_dir", str(tmp_path / "out")])
    assert str(broken) in sentence and "'unet" in sentence


def test_errors_of_the_machine_are_a_sentence_and_defects_keep_their_traceback(learn, monkeypatch, refused):
    learn(steps=1)

    def failing(error):
        monkeypatch.setattr(train, "train", lambda args: (_ for _ in ()).throw(error))
        return []

    assert "--batch_size" in refused(failing(torch.OutOfMemoryError("CUDA out of memory.")))
    inductor = type("InductorError", (RuntimeError,), {"__module__": "torch._inductor.exc"})
    assert "--compile" in refused(failing(inductor("InvalidCxxCompiler: No working C++ compiler")))
    with pytest.raises(RuntimeError, match="a defect"):
        train.main(failing(RuntimeError("a defect")))


def test_early_stop_says_when_it_can_never_come(capsys):
    train.parse_options(["--early_stop", "--steps", "300", "--log_steps", "20"])
    assert "needs over 300 --steps" in capsys.readouterr().err
    train.parse_options(["--early_stop", "--steps", "301", "--log_steps", "20"])
    assert not capsys.readouterr().err
