"""The loop: equal to the classical form, exact after a crash, careful with what is there, and the word moves."""

import itertools
import json
import math
import random
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import load_file

import data
import model_utils as mu
import sample
import train


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures with spaces")
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return str(folder)


@pytest.fixture
def learn(tiny_model, pictures, tmp_path, monkeypatch):
    """learn(*options, steps=4) runs train.py on the tiny model in an empty folder and returns the run's folder."""
    monkeypatch.chdir(tmp_path)

    def run(*options, steps=4, out="run", word="<kat>"):
        base = ["--model", tiny_model, "--images", pictures, "--placeholder_token", word, "--steps", str(steps)]
        base += ["--batch_size", "2", "--preview_steps", "0", "--no-score", "--lr_warmup_steps", "2"]
        args = train.parse_options([*base, *options, *(["--output_dir", out] if out else [])])
        return train.train(args).absolute()

    return run


def refused(argv, capsys):
    """Run the command line, expect exit code 2 and one sentence; return it."""
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and "Traceback" not in "\n".join(lines)
    return lines[-1]


# --- The method -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_loss_and_gradient_equal_the_classical_form(tiny_model, prediction_type):
    """Whole table trained, all other rows' gradient set to zero, diffusers' noising."""
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(4, 4, 8, 8, generator=generator) for _ in range(2))
    timesteps = torch.tensor([0, 250, 600, 999])
    tokenizer, unet = mu.load_tokenizer(tiny_model), mu.load_unet(tiny_model, "cpu")
    start = mu.initializer_id(tokenizer, "cat")
    token_ids = mu.add_placeholder(tokenizer, "<kat>")
    ids = mu.tokenize(tokenizer, ["a photo of a <kat>", "<kat> <kat>", "a cat", "the <kat> in"], {"<kat>": token_ids})

    text_encoder = mu.load_text_encoder(tiny_model, "cpu")
    text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    table = text_encoder.get_input_embeddings().weight.requires_grad_(True)
    with torch.no_grad():
        table[token_ids[0]] = table[start]
    reference = DDPMScheduler.from_pretrained(tiny_model, subfolder="scheduler", prediction_type=prediction_type)
    pred = unet(reference.add_noise(latents, noise, timesteps), timesteps, text_encoder(ids).last_hidden_state).sample
    target = noise if prediction_type == "epsilon" else reference.get_velocity(latents, noise, timesteps)
    classical_loss = torch.nn.functional.mse_loss(pred, target)
    classical_loss.backward()
    classical_grad = table.grad[token_ids[0]]

    text_encoder = mu.load_text_encoder(tiny_model, "cpu")
    rows = text_encoder.get_input_embeddings().weight[[start]]
    learned = mu.install_learned_rows(text_encoder, token_ids, rows)
    schedule = mu.load_schedule(tiny_model)
    schedule.prediction_type = prediction_type
    embeddings = mu.encode_tokens(text_encoder, ids)
    loss = train.inversion_loss(unet, latents, noise, timesteps, embeddings, schedule)
    assert loss.shape == (4,)
    loss.mean().backward()
    assert loss.mean().item() == pytest.approx(classical_loss.item(), rel=1e-6)
    torch.testing.assert_close(learned.learned_rows.grad[0], classical_grad, rtol=1e-4, atol=1e-8)
    assert learned.learned_rows.grad.abs().max() > 0


@pytest.mark.parametrize("sampling, up_to", [("uniform", lambda x: x), ("cubic", lambda x: 1 - (1 - x) ** (1 / 3))])
def test_timesteps_have_their_distribution_and_are_spread_evenly(sampling, up_to):
    """up_to(x): the share of timesteps below x * 1000."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([train.draw_timesteps(8, 1000, generator, sampling) for _ in range(2000)])
    assert draws.min() == 0 and draws.max() == 999
    eighths = 8 * up_to((draws.double().sort(dim=1).values + 0.5) / 1000)  # 0 to 8, all equally likely
    assert ((eighths - torch.arange(8) > -0.1) & (eighths - torch.arange(8) < 1.1)).all()  # one from each eighth
    singles = torch.cat([train.draw_timesteps(1, 10, generator, sampling) for _ in range(5000)])
    expected = torch.tensor([5000 * (up_to((i + 1) / 10) - up_to(i / 10)) for i in range(10)])
    assert ((torch.bincount(singles, minlength=10) - expected).abs() < 5 * expected.sqrt()).all()


def test_learning_rate():
    args = train.build_parser().parse_args(["--lr", "1", "--lr_warmup_steps", "4", "--steps", "14"])
    rates = [train.learning_rate(step, args) for step in range(14)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0 and rates[9] == pytest.approx(0.5) and 0 < rates[13] < 0.05
    args.lr_scheduler = "linear"
    assert train.learning_rate(9, args) == pytest.approx(0.5)
    args.lr_scheduler, args.scale_lr, args.batch_size, args.grad_accum = "constant", True, 4, 2
    assert train.learning_rate(13, args) == 8.0


def test_every_step_draws_afresh_and_each_seed_is_its_own():
    draws = {train.step_generator(s, t).initial_seed() for s in range(30) for t in range(100)}
    assert len(draws) > 2990  # 3000 numbers out of 2**32: hardly ever two alike
    assert torch.equal(*(torch.randn(3, generator=train.step_generator(5, 7)) for _ in range(2)))


def test_accumulation_is_the_same_step(learn):
    whole = load_file(learn("--batch_size", "4", out="a") / "learned_embeds.safetensors")["<kat>"]
    parts = load_file(learn("--grad_accum", "2", out="b") / "learned_embeds.safetensors")["<kat>"]
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-6)


def test_the_word_moves_and_nothing_else(learn, tiny_model, monkeypatch):
    kept = {}
    for part in ("text_encoder", "unet"):
        load = getattr(mu, f"load_{part}")
        monkeypatch.setattr(
            mu, f"load_{part}", lambda *a, load=load, part=part, **k: kept.setdefault(part, load(*a, **k))
        )
    folder = learn(steps=5)
    assert all(p.grad is None for p in kept["unet"].parameters())
    monkeypatch.undo()
    fresh = mu.load_unet(tiny_model, "cpu").state_dict()
    assert all(torch.equal(v, fresh[k]) for k, v in kept["unet"].state_dict().items())
    fresh = mu.load_text_encoder(tiny_model, "cpu")
    table = fresh.get_input_embeddings().weight
    assert torch.equal(kept["text_encoder"].get_input_embeddings().weight, table)
    others = {k: v for k, v in kept["text_encoder"].state_dict().items() if "token_embedding" not in k}
    assert others and all(torch.equal(v, fresh.state_dict()[k]) for k, v in others.items())
    word = load_file(folder / "learned_embeds.safetensors")["<kat>"]
    start = table[mu.initializer_id(mu.load_tokenizer(tiny_model), "cat")]
    assert word.dtype == torch.float32 and (word[0] - start).norm() > 1e-3


def test_several_vectors(learn):
    folder = learn("--num_vectors", "3", "--save_bin")
    assert load_file(folder / "learned_embeds.safetensors")["<kat>"].shape == (3, 32)
    assert torch.load(folder / "learned_embeds.bin")["<kat>"].shape == (3, 32)


def test_the_numbers_of_a_fixed_run(learn):
    """A silent change of the method shows here; a wanted one is written down here."""
    rows = [
        json.loads(line) for line in (learn("--log_steps", "1", "--seed", "1") / "log.jsonl").read_text().splitlines()
    ]
    assert [row["loss"] for row in rows] == pytest.approx(FIXED_LOSSES, rel=1e-4)
    assert rows[-1]["row_norm"] == pytest.approx(FIXED_NORM, rel=1e-4)


def test_what_a_run_tells(learn, tiny_model):
    folder = learn("--log_steps", "2", "--lr", "1e-2", "--batch_size", "4", "--timestep_sampling", "uniform", steps=12)
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12]
    tokenizer, table = mu.load_tokenizer(tiny_model), mu.load_text_encoder(tiny_model, "cpu").get_input_embeddings()
    word = load_file(folder / "learned_embeds.safetensors")["<kat>"]
    start = table.weight[mu.initializer_id(tokenizer, "cat")]
    assert rows[-1]["row_norm"] == pytest.approx(word.norm().item(), rel=1e-5)
    assert rows[-1]["cosine_to_start"] == pytest.approx(torch.cosine_similarity(word[0], start, dim=0).item(), abs=1e-5)
    assert rows[-1]["vocabulary_norm"] == pytest.approx(table.weight.norm(dim=1).median().item(), rel=1e-5)
    assert rows[0]["nearest"][0][0] == "cat" and len(rows[0]["nearest"][0]) == 3
    for row in rows:  # the mean over the quarters of the timesteps, which stratified batches hold in equal shares
        assert row["loss"] == pytest.approx(sum(row["loss_by_timestep"]) / 4, rel=1e-5) and row["grad_norm"] > 0
    with Image.open(folder / "curves.png") as curves:
        assert len(curves.convert("RGB").getcolors()) > 5


def test_losses_are_told_by_quarters_of_the_timesteps(learn, monkeypatch):
    plain = train.inversion_loss
    monkeypatch.setattr(train, "inversion_loss", lambda *args: plain(*args) * 0 + args[3] // 250)
    rows = [json.loads(line) for line in (learn("--batch_size", "4") / "log.jsonl").read_text().splitlines()]
    assert [row["loss_by_timestep"] for row in rows] == [[0, 1, 2, 3]]
    rows = [json.loads(line) for line in (learn(steps=1, out="one") / "log.jsonl").read_text().splitlines()]
    assert rows[0]["loss_by_timestep"].count(None) == 2  # two pictures cannot be in four quarters


def test_the_fixed_batch_gives_a_curve_that_can_be_read(learn):
    """Step after step its loss changes by what the word has learned, that of the steps by chance."""
    rows = [json.loads(line) for line in (learn("--log_steps", "1", steps=12) / "log.jsonl").read_text().splitlines()]
    jumps = lambda name: sum(abs(b[name] - a[name]) for a, b in itertools.pairwise(rows))  # noqa: E731
    assert 0 < jumps("eval_loss") < 0.2 * jumps("loss")


def test_a_loss_settles_when_its_last_values_only_waver():
    falling = [1 / (1 + i) for i in range(40)]
    assert not train.has_settled(falling[:15])
    assert not train.has_settled([1 - i / 30 for i in range(30)])
    assert train.has_settled(falling)
    last, every = np.array(falling[-15:]), np.array(falling)
    assert train.has_settled(falling, share=last.var() / every.var() * 1.01)
    assert not train.has_settled(falling, share=last.var() / every.var() * 0.99)


def test_a_loss_that_wavers_as_much_as_it_falls_settles_when_it_falls_no_more():
    falling = [1 - 0.006 * i + 0.1 * (-1) ** i for i in range(60)]
    assert not any(train.has_settled(falling[:i]) for i in range(61))
    flat = falling[:40] + [0.76 + 0.1 * (-1) ** i for i in range(40, 80)]  # the two windows are the same from step 70
    settled = [train.has_settled(flat[:i]) for i in range(81)]
    assert not any(settled[:50]) and settled[70]
    swing = [0.1 * (-1) ** i for i in range(30)]  # its halves differ by 0.2 / 15
    assert not any(train.has_settled(swing[:i], share=0) for i in range(30))
    chance = (2 * np.var(swing[:15]) / 14) ** 0.5
    lowered = lambda fall: [x + (fall - 0.2 / 15) * (i < 15) for i, x in enumerate(swing)]  # noqa: E731
    assert train.has_settled(lowered(0.99 * chance), share=0) and not train.has_settled(lowered(1.01 * chance), share=0)


def test_early_stop_ends_the_run_where_the_loss_settles(learn, monkeypatch, capsys):
    monkeypatch.setattr(train, "has_settled", lambda losses: len(losses) >= 3)
    folder = learn("--early_stop", "--log_steps", "2", steps=20)
    assert torch.load(folder / "state.pt", weights_only=True)["step"] == 6
    assert "settled   after step 6" in capsys.readouterr().out
    learn("--resume", "--early_stop", steps=20)  # has nothing more to do
    assert torch.load(folder / "state.pt", weights_only=True)["step"] == 6
    learn("--resume", "--no-early_stop", steps=20)
    assert torch.load(folder / "state.pt", weights_only=True)["step"] == 20


def test_tensorboard_where_it_is_and_a_sentence_where_not(learn, monkeypatch):
    written = []
    fake = types.SimpleNamespace(
        SummaryWriter=lambda folder, purge_step: types.SimpleNamespace(
            add_scalar=lambda *point: written.append(point), flush=lambda: None, close=lambda: written.append("closed")
        )
    )
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    learn("--tensorboard", "--log_steps", "2", "--batch_size", "4", steps=4)
    assert {point[0] for point in written[:-1]} >= {"loss", "eval_loss", "grad_norm", "row_norm", "loss_by_timestep/3"}
    assert {point[2] for point in written[:-1]} == {2, 4} and written[-1] == "closed"
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(mu.UserError, match="--tensorboard is not installed"):
        learn("--tensorboard", out="other")


@pytest.mark.parametrize("native", [True, False])  # as on a processor that multiplies in half, and as on another
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_points_the_same_way(tiny_model, monkeypatch, dtype, native):
    monkeypatch.setattr(mu, "computes_in_half", lambda dtype, device: native and dtype != torch.float32)
    grads = []
    for precision in (torch.float32, dtype):
        text_encoder, unet = (
            mu.load_text_encoder(tiny_model, "cpu", precision),
            mu.load_unet(tiny_model, "cpu", precision),
        )
        new_id = text_encoder.get_input_embeddings().weight.shape[0]
        learned = mu.install_learned_rows(text_encoder, [new_id], text_encoder.get_input_embeddings().weight[[5]])
        generator = torch.Generator().manual_seed(0)
        latents, noise = (torch.randn(8, 4, 8, 8, generator=generator) for _ in range(2))
        with torch.autocast("cpu", precision, enabled=mu.computes_in_half(precision, "cpu")):
            embeddings = mu.encode_tokens(text_encoder, torch.full((8, 4), new_id))
            timesteps = torch.arange(8) * 120
            loss = train.inversion_loss(unet, latents, noise, timesteps, embeddings, mu.load_schedule(tiny_model))
        assert loss.dtype == torch.float32
        loss.mean().backward()
        grads.append(learned.learned_rows.grad.flatten())
    assert torch.cosine_similarity(*grads, dim=0) > 0.99


# --- Crashes ----------------------------------------------------------------------------------------------------------


class Crash(Exception):
    pass


FIXED_LOSSES, FIXED_NORM = [1.22473, 1.13838, 1.12348, 1.2602], 0.22709
MANY = ["--grad_accum", "2", "--num_vectors", "2", "--lr_scheduler", "linear"]


@pytest.mark.parametrize("options, dtype", [([], None), (MANY, None), (MANY, torch.float16)])
def test_a_resumed_run_is_the_uninterrupted_one(learn, monkeypatch, options, dtype):
    if (
        dtype
    ):  # fp16 brings the gradient scaler, whose state goes on too; users are refused it on the CPU, as it is slow
        monkeypatch.setattr(mu, "choose_dtype", lambda *_: dtype)
    whole = learn("--save_steps", "2", "--log_steps", "1", *options, steps=7, out="whole")
    for crash_at in (0, 3, 5):
        draw, calls = data.draw_batch, []

        def crashing(*args, draw=draw, calls=calls, crash_at=crash_at):
            calls.append(1)
            if len(calls) > crash_at:
                raise Crash
            return draw(*args)

        out = f"crash{crash_at}"
        monkeypatch.setattr(data, "draw_batch", crashing)
        with pytest.raises(Crash):
            learn("--save_steps", "2", "--log_steps", "1", *options, steps=7, out=out)
        monkeypatch.setattr(data, "draw_batch", draw)
        resumed = train.train(train.parse_options(["--resume", "--output_dir", out]))
        for name in ("learned_embeds.safetensors", "log.jsonl"):
            assert (resumed / name).read_bytes() == (whole / name).read_bytes(), name
    state = torch.load(whole / "state.pt", weights_only=True)
    assert (whole / "state.pt").stat().st_size < 100_000
    assert state["scaler"]["scale"] == (2.0**16 if dtype else 1.0) and state["step"] == 7


def test_a_run_whose_checkpoint_is_lost_is_not_begun_anew(learn, capsys):
    folder = learn()
    (folder / "state.pt").unlink()
    before = (folder / "learned_embeds.safetensors").read_bytes()
    assert "no checkpoint" in refused(["--resume", "--output_dir", str(folder)], capsys)
    assert (folder / "learned_embeds.safetensors").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--save_steps", "3"], ["--save_steps", "2", "--save_bin", *MANY]])
def test_killed_thirty_times(tiny_model, pictures, tmp_path, options):
    """SIGKILL at 30 random moments, each time resumed: the same files as the run that nobody killed."""
    command = [sys.executable, train.__file__, "--model", tiny_model, "--images", pictures, "--no-score", *options]
    command += ["--batch_size", "2", "--lr_warmup_steps", "20", "--preview_steps", "500"]
    names = ["learned_embeds.safetensors", "log.jsonl"] + ["learned_embeds.bin"] * ("--save_bin" in options)

    def seconds(*more):
        start = time.time()
        subprocess.run([*command, *more], check=True)
        return time.time() - start

    whole, killed, rng = tmp_path / "whole", tmp_path / "killed", random.Random(0)
    start_up = seconds("--steps", "1", "--output_dir", str(tmp_path / "first"))
    command += ["--steps", "1000"]
    learning = seconds("--output_dir", str(whole)) - start_up
    kills, through = 0, 0
    while kills < 30 or not through:
        resume = ["--resume"] if (killed / "config.json").exists() else []
        process = subprocess.Popen([*command, "--output_dir", str(killed), *resume])
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
        through += 1
        shutil.rmtree(killed)  # for what is left of the kills another run is begun


def test_resuming_with_more_steps_and_not_with_other_options(learn, pictures, tmp_path, capsys):
    folder = learn()
    assert json.loads((learn("--resume", steps=6) / "log.jsonl").read_text().splitlines()[-1])["step"] == 6
    assert "--seed was 0 and is now 3" in refused(["--resume", "--output_dir", str(folder), "--seed", "3"], capsys)
    assert "--batch_size was 2" in refused(["--resume", "--output_dir", str(folder), "--batch_size", "4"], capsys)
    for path in Path(pictures).iterdir():
        image = Image.open(path)
    extra = Path(pictures) / "extra.png"
    image.save(extra)
    try:
        assert "the pictures are not those" in refused(
            ["--resume", "--output_dir", str(folder), "--steps", "9"], capsys
        )
    finally:
        extra.unlink()
    (folder / "state.pt").write_bytes((folder / "state.pt").read_bytes()[:1000])
    before = (folder / "learned_embeds.safetensors").read_bytes()
    assert "is damaged" in refused(["--resume", "--output_dir", str(folder)], capsys)
    assert (folder / "learned_embeds.safetensors").read_bytes() == before


def test_ctrl_c_saves_and_says_how_to_go_on(learn, monkeypatch, capsys):
    import signal

    draw, calls = data.draw_batch, []

    def interrupting(*args):
        calls.append(1)
        if len(calls) == 4:  # the first draws the fixed batch
            signal.raise_signal(signal.SIGINT)
        return draw(*args)

    whole = learn(steps=6, out="whole")
    monkeypatch.setattr(data, "draw_batch", interrupting)
    with pytest.raises(SystemExit) as stop:
        learn(steps=6, out="stopped")
    assert stop.value.code == 130
    assert "stopped after step 3" in capsys.readouterr().out
    monkeypatch.undo()
    resumed = train.train(train.parse_options(["--resume", "--output_dir", str(whole.parent / "stopped")]))
    name = "learned_embeds.safetensors"
    assert (resumed / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("where", ["save", "preview", "loading"])
def test_ctrl_c_loses_nothing_whenever_it_comes(learn, monkeypatch, capsys, tiny_model, pictures, where):
    import signal

    module, name = {"save": (mu, "save_embedding"), "preview": (sample, "draw"), "loading": (mu, "load_vae")}[where]
    real, calls = getattr(module, name), []

    def interrupting(*args, **kwargs):
        calls.append(1)
        if len(calls) == (2 if where == "preview" else 1):  # the first preview is that of step 0
            signal.raise_signal(signal.SIGINT)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, interrupting)
    options = ["--model", tiny_model, "--images", pictures, "--steps", "9", "--batch_size", "2", "--no-score"]
    with pytest.raises(SystemExit) as stop:
        train.main([*options, "--save_steps", "3", "--preview_steps", "2", "--output_dir", "run"])
    assert stop.value.code == 130
    if where == "loading":
        assert capsys.readouterr().err.splitlines()[-1] == "stopped"
        return
    step = {"save": 4, "preview": 3}[where]  # it comes during step 3 or step 2: the next one is the last
    assert f"stopped after step {step}, all is saved" in capsys.readouterr().out
    assert torch.load("run/state.pt", weights_only=True)["step"] == step


def test_previews_of_a_resumed_run_follow_each_other(learn, monkeypatch):
    """Whatever --preview_steps is: no gaps, no row twice."""
    learn("--preview_steps", "2", "--log_steps", "1", steps=4)
    with Image.open("run/preview.png") as sheet:
        before = np.asarray(sheet)
    learn("--preview_steps", "3", "--resume", steps=7)  # the word at steps 6 and 7
    with Image.open("run/preview.png") as sheet:
        after = np.asarray(sheet)
    rows = len(before) // 4  # training pictures, steps 0, 2 and 4
    assert len(before) == 4 * rows and len(after) == 6 * rows and np.array_equal(after[: 4 * rows], before)
    assert all(after[i * rows + 20 : (i + 1) * rows].std() > 5 for i in range(6))


def test_a_run_may_log_seldom(learn):
    folder = learn("--log_steps", "50", steps=45)
    assert [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()] == [45]


def test_a_gradient_that_is_not_finite_skips_the_step(learn, monkeypatch):
    loss, calls = train.inversion_loss, []

    def broken(*args):
        calls.extend([1] * torch.is_grad_enabled())  # not when the fixed batch is looked at
        return loss(*args) * (math.nan if len(calls) in (2, 3) else 1)

    monkeypatch.setattr(train, "inversion_loss", broken)
    folder = learn("--log_steps", "1", steps=5)
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().replace("NaN", "null").splitlines()]
    assert [row["skipped_steps"] for row in rows] == [0, 1, 2, 2, 2]
    assert rows[0]["row_norm"] == rows[2]["row_norm"] != rows[3]["row_norm"]
    assert load_file(folder / "learned_embeds.safetensors")["<kat>"].isfinite().all()


def test_twenty_such_steps_end_the_run_with_the_last_good_rows(learn, monkeypatch):
    loss, calls = train.inversion_loss, []

    def broken(*args):
        calls.extend([1] * torch.is_grad_enabled())
        return loss(*args) * (math.nan if len(calls) > 3 else 1)

    monkeypatch.setattr(train, "inversion_loss", broken)
    with pytest.raises(mu.UserError, match="20 gradients running were not finite.*--precision fp32"):
        learn("--log_steps", "1", steps=60)
    assert len(calls) == 23
    assert load_file("run/learned_embeds.safetensors")["<kat>"].isfinite().all()


def test_rows_that_are_not_finite_are_never_saved(learn, monkeypatch):
    rate = train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda step, args: math.nan if step == 3 else rate(step, args))
    with pytest.raises(mu.UserError, match="--lr .* not finite any more"):
        learn("--save_steps", "2", "--log_steps", "1", steps=6)
    assert load_file("run/learned_embeds.safetensors")["<kat>"].isfinite().all()
    assert torch.load("run/state.pt", weights_only=True)["step"] == 2


# --- Folders and mistakes ---------------------------------------------------------------------------------------------


def test_runs_never_overwrite_each_other(learn, capsys):
    assert [learn(steps=1, out=None).name for _ in range(3)] == ["kat", "kat-2", "kat-3"]
    before = Path("runs/kat/learned_embeds.safetensors").read_bytes()
    assert "--overwrite" in refused(["--output_dir", "runs/kat"], capsys)
    assert Path("runs/kat/learned_embeds.safetensors").read_bytes() == before
    learn("--overwrite", "--seed", "4", steps=1, out="runs/kat")
    assert Path("runs/kat/learned_embeds.safetensors").read_bytes() != before


def test_two_runs_begun_at_the_same_moment_take_two_folders(learn, tmp_path):
    options = [train.parse_options(["--placeholder_token", "<kat>"]) for _ in range(2)]
    assert [train.claim_folder(args) for args in options] == [Path("runs/kat"), Path("runs/kat-2")]
    assert [args.output_dir for args in options] == [str(Path("runs/kat")), str(Path("runs/kat-2"))]


@pytest.mark.parametrize("name", ["learned_embeds.bin", "learned_embeds.safetensors", "preview.png", "config.json"])
def test_files_of_another_program_are_not_overwritten(learn, name, tmp_path):
    """The folder of diffusers' script or of the concept library has no config.json, but a word."""
    (tmp_path / "old").mkdir()
    dear = b'{"dear": "to someone"}'
    (tmp_path / "old" / name).write_bytes(dear)
    with pytest.raises(mu.UserError, match=f"--output_dir old holds '{name}'.*--overwrite"):
        learn(out="old")
    assert (tmp_path / "old" / name).read_bytes() == dear
    learn("--overwrite", out="old")


def test_curves_of_another_program_in_the_same_folder_stay(learn, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "events.out.tfevents.1").write_bytes(b"of another")
    learn()
    assert (tmp_path / "run" / "events.out.tfevents.1").read_bytes() == b"of another"


def test_a_preview_that_fails_costs_no_step(learn, monkeypatch):
    def fail(*args):
        raise mu.UserError("no memory to draw with")

    monkeypatch.setattr(train.Run, "add_preview_row", lambda run, drawings, step: step and fail())
    with pytest.raises(mu.UserError, match="to draw with"):
        learn("--preview_steps", "4", "--save_steps", "3")
    assert torch.load("run/state.pt", weights_only=True)["step"] == 4


def test_the_project_may_move(learn, tiny_model, tmp_path, monkeypatch):
    """Runs and files name the embedded model by its name alone; where it lies now is asked when they are read."""
    monkeypatch.setattr(mu, "DEFAULT_MODEL", shutil.copytree(tiny_model, str(tmp_path / "here" / "mini_sd")))
    folder = learn("--model", mu.DEFAULT_MODEL)
    (tmp_path / "here").rename(tmp_path / "there")
    monkeypatch.setattr(mu, "DEFAULT_MODEL", str(tmp_path / "there" / "mini_sd"))
    args = train.parse_options(["--resume", "--output_dir", str(folder), "--steps", "6"])
    assert args.model == mu.DEFAULT_MODEL and train.train(args).absolute() == folder
    assert str(tmp_path) not in (folder / "learned_embeds.safetensors").read_bytes().decode("latin-1")
    shutil.copy(folder / "learned_embeds.safetensors", tmp_path / "alone.safetensors")
    for embedding in ("run", "alone.safetensors"):
        sample.main(["--embedding", embedding, "--prompt", "a <kat>", "--num_images", "1", "--steps", "1"])


def test_a_run_that_failed_before_it_saved_does_not_stand_in_the_way(learn, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"placeholder_token": "<kat>", "model": "mini_sd"}')
    assert (learn() / "learned_embeds.safetensors").exists()
    with pytest.raises(mu.UserError, match="holds a run"):
        learn()


def test_resume_takes_the_newest_run_of_any_word(learn, monkeypatch, capsys):
    learn(out="runs/kat"), learn(out="runs/pup", word="<pup>")
    assert train.parse_options(["--resume"]).output_dir == str(Path("runs/pup"))
    assert train.parse_options(["--resume", "--placeholder_token", "<kat>"]).output_dir == str(Path("runs/kat"))
    assert "no such run in runs/" in refused(["--resume", "--placeholder_token", "<finn>"], capsys)
    Path("runs/other").mkdir()
    Path("runs/other/config.json").write_text('{"of": "another program"}')
    assert train.parse_options(["--resume"]).output_dir == str(Path("runs/pup"))
    assert train.parse_options(["--resume", "--placeholder_token", "<kat>"]).output_dir == str(Path("runs/kat"))
    assert "no checkpoint" in refused(["--resume", "--output_dir", "runs/other"], capsys)


def test_what_a_kill_kept_from_being_written_is_written_on_resume(learn):
    """The last checkpoint is there, the word is not; and a word in another form is asked for afterwards."""
    folder = learn()
    word = (folder / "learned_embeds.safetensors").read_bytes()
    (folder / "learned_embeds.safetensors").unlink()
    learn("--resume", "--save_bin")
    assert (folder / "learned_embeds.safetensors").read_bytes() == word and (folder / "learned_embeds.bin").exists()


def test_the_precision_of_a_run_is_kept_wherever_it_goes_on(learn, capsys):
    folder = learn("--precision", "bf16", steps=2)
    assert train.parse_options(["--resume", "--output_dir", str(folder), "--precision", "auto"]).precision == "bf16"
    assert "--precision was 'bf16'" in refused(["--resume", "--output_dir", "run", "--precision", "fp32"], capsys)
    assert json.loads((learn(out="other", steps=1) / "config.json").read_text())["precision"] == "fp32"  # of 'auto'


def test_moved_pictures_are_the_same_pictures(learn, pictures, tmp_path):
    learn()
    shutil.copytree(pictures, tmp_path / "moved")
    args = train.parse_options(["--resume", "--output_dir", "run", "--images", str(tmp_path / "moved"), "--steps", "5"])
    assert torch.load(train.train(args) / "state.pt", weights_only=True)["step"] == 5


@pytest.mark.parametrize("name", ["state.pt", "config.json"])
def test_what_is_no_checkpoint_is_refused(learn, name, capsys):
    folder = learn()
    torch.save({"rows": torch.zeros(1)}, folder / "other.pt")
    (folder / name).write_bytes((folder / "other.pt").read_bytes() if name == "state.pt" else b'{"steps": ')
    assert name in refused(["--resume", "--output_dir", str(folder)], capsys)
    if name == "config.json":
        (folder / name).unlink()
        assert "no config.json" in refused(["--resume", "--output_dir", str(folder)], capsys)


def test_many_skipped_steps_leave_the_scale_alone(learn, monkeypatch):
    loss, calls = train.inversion_loss, itertools.count()

    def broken(*args):
        return loss(*args) * (math.nan if torch.is_grad_enabled() and next(calls) % 2 else 1)

    monkeypatch.setattr(train, "inversion_loss", broken)
    state = torch.load(learn(steps=300) / "state.pt", weights_only=True)
    assert state["scaler"]["scale"] == 1 and state["rows"].isfinite().all()


def test_out_of_memory_and_no_compiler_are_a_sentence(learn, monkeypatch, capsys, tiny_model, pictures):
    def fail(error):
        def loss(*args):
            raise error

        monkeypatch.setattr(train, "inversion_loss", loss)
        return ["--model", tiny_model, "--images", pictures, "--steps", "1", "--preview_steps", "0", "--no-score"]

    assert "--batch_size" in refused(fail(torch.OutOfMemoryError("CUDA out of memory.")), capsys)
    absurd = ["--model", tiny_model, "--images", pictures, "--resolution", "1000000"]
    assert "out of memory" in refused(absurd, capsys)  # the CPU's allocator says it in its own words
    inductor = type("InductorError", (RuntimeError,), {"__module__": "torch._inductor.exc"})
    assert "--compile" in refused(fail(inductor("InvalidCxxCompiler: No working C++ compiler")), capsys)
    with pytest.raises(RuntimeError, match="a defect"):  # what no user can mend keeps its traceback
        train.main(fail(RuntimeError("a defect")))


def test_only_the_steps_run_compiled(learn, monkeypatch):
    """The fixed batch and the previews would have the UNet compiled a second time, for the case without gradient."""
    calls = []

    def compiled(unet):
        return lambda *args, **kwargs: calls.append(torch.is_grad_enabled()) or unet(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", compiled)
    folder = learn("--compile", "--log_steps", "1", "--preview_steps", "2", steps=4)
    assert calls == [True] * 4
    embedding = (folder / "learned_embeds.safetensors").read_bytes()
    assert (learn("--log_steps", "1", steps=4, out="eager") / "learned_embeds.safetensors").read_bytes() == embedding


def test_previews_that_are_asked_for_later_have_the_training_pictures_above(learn):
    learn(steps=2)
    with Image.open(learn("--preview_steps", "2", "--resume", steps=4) / "preview.png") as sheet:
        rows = np.asarray(sheet)
    assert all(half[20:].std() > 5 for half in np.split(rows, 2))


def test_previews_are_rows_of_one_sheet(learn):
    folder = learn("--preview_steps", "2", steps=4)
    with Image.open(folder / "preview.png") as sheet:
        assert sheet.size == (4 * 18, 4 * (16 + 2 + 14))  # training pictures, then steps 0, 2 and 4
    learn("--resume", "--preview_steps", "2", steps=6)
    with Image.open(folder / "preview.png") as sheet:
        assert sheet.height == 5 * (16 + 2 + 14)


@pytest.mark.parametrize(
    "options, said",
    [
        (["--images", "nowhere"], ["--images", "nowhere"]),
        (["--images", "empty"], ["--images", "empty"]),
        (["--placeholder_token", "cat"], ["--placeholder_token", "already a word"]),
        (["--placeholder_token", "<|endoftext|>"], ["--placeholder_token", "already a word"]),
        (["--placeholder_token", "my cat"], ["--placeholder_token", "spaces"]),
        (["--placeholder_token", ""], ["--placeholder_token", "empty"]),
        (["--initializer_token", "catdog"], ["--initializer_token", "3 tokens"]),
        (["--initializer_token", ""], ["--initializer_token", "0 tokens"]),
        (["--model", "no/such/folder"], ["--model"]),
        (["--steps", "0"], ["--steps", "1 or more"]),
        (["--lr", "nan"], ["--lr"]),
        (["--resolution", "13"], ["--resolution", "multiple"]),
        (["--resolution", "0"], ["--resolution", "1 or more"]),
        (["--num_vectors", "28"], ["--num_vectors 28", "room for"]),
        (["--seed", str(2**64)], ["--seed"]),
        (["--preview_steps", "-1"], ["--preview_steps -1"]),
        (["--lr", "inf"], ["--lr inf"]),
        (["--resume", "--overwrite"], ["--resume", "--overwrite"]),
        (["--precision", "fp16", "--device", "cpu"], ["--precision fp16", "bf16"]),
        (["--resume", "--output_dir", "empty"], ["--resume", "checkpoint"]),
    ],
)
def test_mistakes_get_one_sentence(options, said, tiny_model, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    sentence = refused(["--model", tiny_model, "--images", pictures, "--steps", "1", *options], capsys)
    assert all(word in sentence for word in said), sentence
    assert not Path("runs").exists()


def test_a_model_that_lacks_a_part(tiny_model, pictures, tmp_path, capsys):

    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    shutil.rmtree(broken / "unet")
    out = str(tmp_path / "out")
    assert "unet" in refused(["--model", str(broken), "--images", pictures, "--output_dir", out], capsys)
