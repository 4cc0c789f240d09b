"""Nothing lost, nothing let in: what a stranger's folder, a second process or an odd file can do to a run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image

import model_utils as mu
import sample
import train

TRAIN_PY = str(Path(train.__file__).resolve())


def sentence(main, argv, capsys):
    """Run a command line that ends in exit code 2 with one sentence; return it."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


# --- Links and names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["state.pt", "config.json", "log.jsonl", "learned_embeds.safetensors", "curves.png"])
def test_no_file_is_written_through_a_link_in_the_folder(learn, tmp_path, name):
    victim = tmp_path / "victim.txt"
    victim.write_text("dear")
    folder = learn()
    for link in (f".{name}.tmp", name):
        (folder / link).unlink(missing_ok=True)
        (folder / link).symlink_to(victim)
    if name == "config.json":  # then it is no run
        with pytest.raises(mu.UserError, match="config.json cannot be read"):
            learn("--overwrite")
    else:
        learn("--overwrite")
        assert not (folder / name).is_symlink()
    assert victim.read_text() == "dear"


def test_samples_are_not_written_through_a_link(learn, tmp_path):
    victim = tmp_path / "victim.txt"
    victim.write_text("dear")
    folder = learn()
    (folder / "samples").mkdir()
    for name in (".0000.png.tmp", "0000.png"):
        (folder / "samples" / name).symlink_to(victim)
    sample.main(["--embedding", str(folder), "--num_images", "1", "--steps", "1"])
    assert victim.read_text() == "dear" and [p.name for p in folder.glob("samples/0*")].count("0001.png") == 1


def test_a_strangers_model_is_shown_and_never_downloaded(learn, monkeypatch, capsys):
    folder = learn()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model": "evil/\x1b[31mmodel"}))
    monkeypatch.setattr(mu.huggingface_hub, "hf_hub_download", lambda *a, **k: pytest.fail("asked the Hub"))
    for main, argv in ((sample.main, ["--embedding", str(folder)]), (train.main, ["--resume", str(folder)])):
        line = sentence(main, argv, capsys)
        assert "evil/" in line and "name it with --model" in line and "\x1b" not in line
    (folder / "config.json").write_text(json.dumps(config))
    sample.main(["--embedding", str(folder), "--num_images", "1", "--steps", "1"])
    assert f"model      {config['model']}" in capsys.readouterr().out


def test_an_embedding_holds_no_folder_of_its_owner(learn, tiny_model):
    data = (learn() / "learned_embeds.safetensors").read_bytes()
    assert Path(tiny_model).name.encode() in data and str(Path(tiny_model).parent).encode() not in data


@pytest.mark.parametrize("token", ["<" + "k" * 300 + ">", "<$(touch hacked)>", "<../../up>"])
def test_odd_tokens_make_ordinary_folders(learn, token, tmp_path):
    folder = learn("--placeholder_token", token, out=None) if " " not in token else None
    if folder:
        assert folder.parent == tmp_path / "runs" and len(folder.name) < 100
    assert not (tmp_path / "hacked").exists()


# --- Two processes in one folder --------------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused(learn, tmp_path, capsys):
    if os.name == "nt":
        pytest.skip("no such lock on Windows")
    folder = learn()
    hold = f"lock = mu.lock_folder({str(folder)!r}); print('locked', flush=True); time.sleep(60)"
    script = f"import model_utils as mu, time; {hold}"
    environment = os.environ | {"PYTHONPATH": str(Path(TRAIN_PY).parent)}
    other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert other.stdout.readline() == "locked\n"
        before = (folder / "state.pt").read_bytes()
        with pytest.raises(mu.UserError, match="in use by another run"):
            learn("--overwrite")
        assert (folder / "state.pt").read_bytes() == before
    finally:
        other.kill()
        other.wait()
    learn("--overwrite")


def test_two_samplings_in_one_folder_lose_no_image(tmp_path):
    script = (
        "import sample, sys\nfrom pathlib import Path\nfrom PIL import Image\n"
        "for i in range(40):\n"
        "    sample.save_next(Image.new('RGB', (4, 4)), Path(sys.argv[1]), '', {})\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(TRAIN_PY).parent)}
    run = [sys.executable, "-c", script, str(tmp_path / "samples")]
    for process in [subprocess.Popen(run, env=environment) for _ in range(2)]:
        assert process.wait() == 0
    assert len(list((tmp_path / "samples").glob("*.png"))) == 80


def test_the_checkpoint_of_another_run_is_refused(learn, capsys):
    learn("--placeholder_token", "<pup>", out="other")
    folder = learn()
    (folder / "state.pt").write_bytes(Path("other/state.pt").read_bytes())
    assert "of a run with other tokens" in sentence(train.main, ["--resume", str(folder)], capsys)


# --- Odd files --------------------------------------------------------------------------------------------------------

LOGS = ["", "\n\n", "{", "null", "[]", "5", '{"step": 1}', '{"step": "1", "loss": 2}', '{"step": 1, "eval_loss": []}']
LOGS += [
    '{"step": null, "loss": 1, "eval_loss": 1, "grad_norm": 1, "embedding_norm": 1, "cosine_to_init": 1}',
    "\x00\xff",
    "[" * 200_000,
    json.dumps(dict.fromkeys(train.CURVES, 1.0) | {"step": 1, "eval_loss": 10**400}),
    json.dumps(dict.fromkeys(train.CURVES, 1.0) | {"step": -(10**400)}),
]


@pytest.mark.parametrize("log", LOGS)
def test_a_run_goes_on_beside_any_log(learn, log):
    folder = learn(steps=2)
    with (folder / "log.jsonl").open("a", encoding="latin-1") as file:
        file.write(log + "\n")
    learn("--resume", "--early_stop", "--log_steps", "1", steps=3)
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 3]


def broken_states():
    good = {"token": "<kat>", "images": "x", "model": "x", "step": 2, "rows": torch.zeros(1, 32)}
    good |= {
        "adamw_exp_avg": torch.zeros(1, 32),
        "adamw_exp_avg_sq": torch.ones(1, 32),
        "adamw_step": torch.tensor(2.0),
    }
    scaler = good["scaler"] = torch.amp.GradScaler("cpu", init_scale=1.0).state_dict()
    many = torch.zeros(1, 32).to_sparse()
    yield from (5, [], {}, {"rows": 1})
    for name, values in {
        "step": ["2", None, -1, 2.5], "rows": [None, torch.zeros(2, 32), torch.full((1, 32), torch.nan)],
        "adamw_exp_avg": [torch.tensor(1.0), torch.ones(1, 32, dtype=torch.float64), torch.ones(1, 32, device="meta")],
        "adamw_exp_avg_sq": [torch.ones(32), many, {}], "adamw_step": [torch.ones(1, 32), 2, torch.tensor(torch.inf)],
        "scaler": [None, 5, {"scale": "x"}, scaler | {"scale": -1.0}, scaler | {"_growth_tracker": 2**70}],
        "token": [None, 5], "images": [None, []], "model": [None],
    }.items():  # fmt: skip
        for value in values:
            yield good | {name: value}
        yield {key: value for key, value in good.items() if key != name}


@pytest.mark.parametrize("content", list(broken_states()))
def test_a_checkpoint_of_any_content_is_a_sentence(learn, content, capsys):
    folder = learn(steps=2)
    real = torch.load(folder / "state.pt", weights_only=True)
    if isinstance(content, dict):  # the images and the model are the run's, so that the rest is looked at
        content = content | {k: real[k] for k in ("images", "model") if content.get(k) == "x"}
    torch.save(content, folder / "state.pt")
    line = sentence(train.main, ["--resume", str(folder), "--steps", "3"], capsys)
    assert "state.pt" in line and "Traceback" not in line


def test_a_fifo_is_never_opened(learn, tiny_model, tmp_path, capsys):
    if not hasattr(os, "mkfifo"):
        pytest.skip("no fifos here")
    folder = learn()
    os.mkfifo(folder / "preview.png")
    train.main(["--resume", str(folder), "--steps", "5"])
    for name in ("log.jsonl", "state.pt"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
    assert "no checkpoint" in sentence(train.main, ["--resume", str(folder)], capsys)
    (folder / "learned_embeds.safetensors").unlink()
    train.main(["--resume", str(folder), "--steps", "1"])  # as one that was killed before its first save: anew
    (tmp_path / "embeddings").mkdir()
    os.mkfifo(tmp_path / "embeddings" / "a.pt")
    assert "--embedding" in sentence(sample.main, ["--embedding", str(tmp_path / "embeddings")], capsys)
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "vae" / "config.json").unlink()
    os.mkfifo(model / "vae" / "config.json")
    with pytest.raises(mu.UserError, match="'vae/config.json' is missing"):
        mu.load_vae(model, "cpu")
    (tmp_path / "locked").mkdir()
    os.mkfifo(tmp_path / "locked" / ".lock")
    mu.lock_folder(tmp_path / "locked")


def test_runs_as_a_broken_link_is_a_sentence(learn, tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "nowhere")
    with pytest.raises(mu.UserError, match="a file or broken link is in its way"):
        learn(out=None)


def test_an_embedding_that_is_all_that_is_left_is_not_cleared(learn, capsys):
    folder = learn("--save_bin", steps=1)
    for name in ("state.pt", "learned_embeds.safetensors"):
        (folder / name).unlink()
    assert "no checkpoint" in sentence(train.main, ["--resume", str(folder)], capsys)
    assert (folder / "learned_embeds.bin").exists()


def test_a_training_image_named_like_a_preview_is_not_overwritten(learn, image_folder):
    folder = learn(steps=1)
    shutil.copy(next(Path(image_folder).iterdir()), folder / "preview.png")
    before = (folder / "preview.png").read_bytes()
    with pytest.raises(mu.UserError, match="--output_dir run lies in --images"):
        learn("--overwrite", "--images", "run/preview.png")
    assert (folder / "preview.png").read_bytes() == before


def test_overwrite_does_not_begin_what_it_cannot_end(learn):
    folder = learn(steps=1)
    (folder / "scores.json").mkdir()
    with pytest.raises(mu.UserError, match="is not a run's folder"):
        learn("--overwrite")
    assert (folder / "state.pt").exists()


@pytest.mark.parametrize("width", [128, 384, 768])  # the number of numbers can look like the start of a pickle
def test_files_of_pytorch_before_1_6_are_read(tmp_path, width):
    torch.save({"<kat>": torch.ones(width)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert mu.load_embedding(tmp_path / "old.bin").rows.shape == (1, width)


def test_a_folder_without_locks_can_be_used(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    mu.lock_folder(tmp_path)


def test_ctrl_c_during_a_write_leaves_nothing_half(tmp_path, monkeypatch):
    def press(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", press)
    with pytest.raises(KeyboardInterrupt):
        mu.atomic_write(tmp_path / "state.pt", lambda buffer: buffer.write(b"new"))
    assert not list(tmp_path.iterdir())


def test_captions_in_which_the_token_is_not_found_are_a_sentence(learn):
    Path("captions.txt").write_text("a photo of {}s\n")
    with pytest.raises(mu.UserError, match="'kat' is no separate word in the caption 'a photo of kats'"):
        learn("--templates", "captions.txt", "--placeholder_token", "kat")


def test_a_disk_that_fails_is_a_sentence_and_a_preview_costs_no_step(learn, monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError):  # of curves.png, when all is done
        learn("--preview_steps", "1", steps=1)
    assert "no preview of step 1" in capsys.readouterr().err and Path("run", "state.pt").exists()
    assert "input or output failed" in sentence(lambda argv: mu.run_main(fail, argv, ""), [], capsys)


# --- Command lines ----------------------------------------------------------------------------------------------------


def test_a_closed_output_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    mu.run_main(lambda argv: print("done"), [], "")


def test_a_working_folder_that_is_not_utf_8_is_a_sentence(tmp_path, monkeypatch, capsys):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert "is not UTF-8: rename the file or folder" in sentence(train.main, [], capsys)


def test_variables_of_another_launcher_are_no_torchrun(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "abc"}.items():
        monkeypatch.setenv(name, value)
    assert mu.join_processes(torch.device("cpu")) == (0, 1)


def test_an_image_that_cannot_be_saved_leaves_no_empty_file(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(mu.UserError, match="0000.png .No space left"):
        sample.save_next(Image.new("RGB", (4, 4)), tmp_path, "", {})
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_without_padding_is_a_sentence(learn, tiny_model, tmp_path):
    model = Path(shutil.copytree(tiny_model, tmp_path / "broken"))
    path = model / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": None}))
    with pytest.raises(mu.UserError, match="it lacks a token for start, end or padding"):
        learn("--model", str(model))


def test_help_in_a_config_is_ignored(learn):
    folder = learn(steps=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"help": True}))
    learn("--resume", steps=2)


def test_a_long_error_is_cut(capsys):
    def fail(argv):
        raise mu.UserError("x" * 10**6)

    assert len(sentence(lambda argv: mu.run_main(fail, argv, ""), [], capsys)) < 2100


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--batch_size", "2147483648"], "--batch_size"),
        (["--steps", "2000000000"], "--steps"),
        *[([option, ""], f"argument {option}") for option in ("--resume", "--model", "--masks", "--templates")],
        *[([option, ""], f"argument {option}") for option in ("--images", "--output_dir", "--initializer_token")],
        (["--placeholder_token", os.fsdecode(b"<caf\xe9>")], "is not UTF-8"),
        (["--output_dir", "a" * 300], "File name too long"),
        (["--model", "/" + "a" * 300], "File name too long"),
    ],
)
def test_odd_options_are_a_sentence(argv, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert said in sentence(train.main, argv, capsys)


def test_the_advice_when_memory_runs_out_names_options_of_the_script(learn, monkeypatch, capsys):
    folder = learn()
    monkeypatch.setattr(sample, "generate", lambda *a, **k: exec("raise MemoryError"))
    line = sentence(sample.main, ["--embedding", str(folder)], capsys)
    options = {action.option_strings[0] for action in sample.build_parser()._actions}
    named = {word.strip(",.") for word in line.split() if word.startswith("--")}
    assert named and named <= options


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_ctrl_c_during_the_imports_is_no_traceback(script, tmp_path):
    wait = "import signal, os; os.kill(os.getpid(), signal.SIGINT)\n"
    (tmp_path / "model_utils.py").write_text(wait)  # what the script imports last
    (tmp_path / "data.py").write_text(wait)
    (tmp_path / script).write_text(Path(TRAIN_PY).with_name(script).read_text(encoding="utf-8"), encoding="utf-8")
    done = subprocess.run([sys.executable, str(tmp_path / script)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 130 and "Traceback" not in done.stderr


def test_a_mask_that_is_a_fifo_is_never_opened(learn, image_folder, tmp_path):
    (tmp_path / "masks").mkdir()
    for path in Path(image_folder).iterdir():
        os.mkfifo(tmp_path / "masks" / path.name)
    with pytest.raises(mu.UserError, match="--masks: no mask of .*there is none"):
        learn("--masks", str(tmp_path / "masks"))


def test_a_tokenizer_with_numbers_beyond_the_table_is_a_sentence(learn, tiny_model, tmp_path):
    model = Path(shutil.copytree(tiny_model, tmp_path / "broken"))
    path = model / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["vocab"]["cat</w>"] = 1_000_000
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(mu.UserError, match="without a row in the text encoder's table"):
        learn("--model", str(model))


def test_parts_that_do_not_fit_each_other_are_a_sentence(learn, tiny_model, tmp_path, capsys):
    settings = {"block_out_channels": (8, 16), "norm_num_groups": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    unet = UNet2DConditionModel(
        sample_size=8, layers_per_block=1, attention_head_dim=4, cross_attention_dim=48, down_block_types=down,
        up_block_types=up, **settings,
    )  # fmt: skip
    for part, module in {
        "unet": unet,
        "vae": AutoencoderKL(latent_channels=8, sample_size=16, **settings, **blocks),
    }.items():
        model = shutil.copytree(tiny_model, tmp_path / part)
        module.save_pretrained(model / part)
        with pytest.raises(mu.UserError, match="--model .*its parts do not fit"):
            learn("--model", str(model), out=f"run-{part}")
        assert not (tmp_path / f"run-{part}").exists()
        argv = ["--model", str(model), "--prompt", "a cat", "--out", str(tmp_path / "out")]
        assert "its parts do not fit" in sentence(sample.main, argv, capsys)


def test_out_of_memory_is_no_bad_checkpoint(learn, tiny_model, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("MPS backend out of memory")

    with torch.no_grad():  # as a notebook may have set it
        mu.load_components(tiny_model)
    monkeypatch.setattr(mu.transformers.CLIPTextModel, "from_pretrained", fail)
    assert "error: out of memory" in sentence(sample.main, ["--model", tiny_model, "--prompt", "a cat"], capsys)


def test_a_relative_initializer_is_the_same_on_resume(learn):
    learn(steps=1)
    options = ["--initializer_token", "run/learned_embeds.safetensors"]
    learn(*options, steps=1, out="other")
    learn("--resume", *options, steps=2, out="other")


def test_a_damaged_initializer_is_named_by_its_own_option(learn):
    Path("first.pt").write_bytes(b"no embedding")
    with pytest.raises(mu.UserError, match="^--initializer_token .*first.pt is no embedding file"):
        learn("--initializer_token", "first.pt")


def test_control_characters_of_a_file_reach_no_terminal(learn, capsys, tmp_path):
    rows, folder = torch.zeros(1, 32), tmp_path / "strange"
    folder.mkdir()
    for token in ("<k\x1b[31mat>", "\ud800", ""):
        torch.save({"string_to_param": {"*": rows}, "name": token}, folder / "a.pt")
        argv = ["--embedding", str(folder / "a.pt"), "--export", "copy.safetensors"]
        assert "does not name its token" in sentence(sample.main, argv, capsys)
    learn("--report_to", "a\x1b[31mb", "--initializer_token", "cat", steps=1)
    torch.save({"clip_l": rows, "clip_g": rows}, folder / "\x1b[31mb.pt")
    sample.main(["--embedding", str(folder / "\x1b[31mb.pt"), "--token", "<b>", "--export", "b.safetensors"])
    output = capsys.readouterr()
    assert "\x1b" not in output.out + output.err and "a?[31mb" in output.err and "?[31mb.pt is for" in output.err


def test_scores_of_a_run_without_its_resolution_are_refused(learn, capsys):
    folder = learn()
    config = json.loads((folder / "config.json").read_text())
    del config["resolution"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "--score" in sentence(sample.main, ["--score", "--embedding", str(folder)], capsys)


def test_expanded_moments_are_copied_before_adamw_writes_them(learn):
    folder = learn("--lr_scheduler", "constant", steps=2)
    state = torch.load(folder / "state.pt", weights_only=True)
    state["adamw_exp_avg_sq"] = torch.ones(1, 1).expand(1, 32)
    torch.save(state, folder / "state.pt")
    train.main(["--resume", str(folder), "--steps", "4"])
    moments = torch.load(folder / "state.pt", weights_only=True)["adamw_exp_avg_sq"]
    assert moments.is_contiguous() and moments.unique().numel() > 1


def test_a_run_that_ended_meanwhile_is_not_cleared(learn, monkeypatch):
    lock = mu.lock_folder
    folder = learn(steps=2, out="first")

    def another_run_ends_first(path):
        for file in ("state.pt", "config.json", "learned_embeds.safetensors"):
            shutil.copy(folder / file, Path(path) / file)
        return lock(path)

    monkeypatch.setattr(mu, "lock_folder", another_run_ends_first)
    with pytest.raises(mu.UserError, match="holds a run"):
        learn(steps=1)
    assert Path("run/state.pt").read_bytes() == (folder / "state.pt").read_bytes()


def test_nothing_that_a_stranger_names_is_downloaded(learn, monkeypatch, capsys):
    monkeypatch.setattr(mu.huggingface_hub, "hf_hub_download", lambda *a, **k: pytest.fail("asked the Hub"))
    folder = learn(steps=2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"initializer_token": "evil/x.pt"}))
    assert "no such file" in sentence(train.main, ["--resume", str(folder)], capsys)
    asked = []

    def in_cache(model, file, revision=None):
        asked.append((file, revision))
        return "here" if revision is None and file == "unet/config.json" else None

    monkeypatch.setattr(mu.huggingface_hub, "try_to_load_from_cache", in_cache)
    for odd in ({"revision": "refs/pr/1"}, {"variant": "evil"}):
        (folder / "config.json").write_text(json.dumps(config | {"model": "owner/tiny"} | odd))
        for main, argv in ((sample.main, ["--embedding", str(folder)]), (train.main, ["--resume", str(folder)])):
            assert "name it with --model" in sentence(main, argv, capsys)
    assert asked


def test_the_new_token_is_no_initializer_of_itself(learn):
    with pytest.raises(mu.UserError, match="holds the new token itself"):
        learn("--initializer_token", "a <kat>")
