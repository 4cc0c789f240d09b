"""train.py, the method and the loop: equal to the classical form, and only the embedding moves."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import read_log, read_rows, read_state
from diffusers import DDPMScheduler
from safetensors.torch import load_file

import data
import model_utils as mu
import train

# --- The method -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_loss_and_gradient_equal_the_classical_form(tiny_model, prediction_type):
    """The classical form: the whole table is trained, with all other rows' gradient set to zero; diffusers' noising."""
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(4, 4, 8, 8, generator=generator) for _ in range(2))
    timesteps = torch.tensor([0, 250, 600, 999])
    tokenizer, unet = mu.load_tokenizer(tiny_model), mu.load_unet(tiny_model, "cpu")
    (init_id,) = mu.initializer_ids(tokenizer, "cat")
    token_ids = mu.add_placeholder(tokenizer, "<kat>")
    ids = mu.tokenize(tokenizer, ["a photo of a <kat>", "<kat> <kat>", "a cat", "the <kat> in"], {"<kat>": token_ids})

    text_encoder = mu.load_text_encoder(tiny_model, "cpu")
    text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    table = text_encoder.get_input_embeddings().weight.requires_grad_(True)
    with torch.no_grad():
        table[token_ids[0]] = table[init_id]
    reference = DDPMScheduler.from_pretrained(tiny_model, subfolder="scheduler", prediction_type=prediction_type)
    pred = unet(reference.add_noise(latents, noise, timesteps), timesteps, text_encoder(ids).last_hidden_state).sample
    target = noise if prediction_type == "epsilon" else reference.get_velocity(latents, noise, timesteps)
    classical_loss = torch.nn.functional.mse_loss(pred, target)
    classical_loss.backward()

    text_encoder = mu.load_text_encoder(tiny_model, "cpu")
    init_rows = text_encoder.get_input_embeddings().weight[[init_id]]
    learned_rows = mu.install_learned_rows(text_encoder, token_ids, init_rows).learned_rows
    schedule = mu.load_schedule(tiny_model)._replace(prediction_type=prediction_type)
    embeddings = mu.encode_tokens(text_encoder, ids)
    loss = train.inversion_loss(unet, latents, noise, timesteps, embeddings, schedule)
    loss.mean().backward()
    assert loss.shape == (4,) and loss.mean().item() == pytest.approx(classical_loss.item(), rel=1e-6)
    torch.testing.assert_close(learned_rows.grad[0], table.grad[token_ids[0]], rtol=1e-4, atol=1e-8)
    assert learned_rows.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_point_the_same_way(tiny_model, dtype):
    gradients = []
    for precision in (torch.float32, dtype):
        components = mu.load_components(tiny_model, "cpu", precision)
        table = components.text_encoder.get_input_embeddings().weight
        learned_rows = mu.install_learned_rows(components.text_encoder, [len(table)], table[[5]]).learned_rows
        generator = torch.Generator().manual_seed(0)
        latents, noise = (torch.randn(8, 4, 8, 8, generator=generator) for _ in range(2))
        token_ids, mask = torch.full((8, 4), len(table)), torch.ones(8, 1, 8, 8)
        batch = train.Batch(latents, noise, torch.arange(8) * 120, token_ids, mask)
        loss = train.batch_loss(components, batch)
        assert loss.dtype == torch.float32
        loss.mean().backward()
        gradients.append(learned_rows.grad.flatten())
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


@pytest.mark.parametrize("sampling, up_to", [("uniform", lambda x: x), ("cubic", lambda x: 1 - (1 - x) ** (1 / 3))])
def test_timesteps_have_their_distribution_and_are_stratified(sampling, up_to):
    """up_to(x): the fraction of timesteps below x * 1000."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([train.sample_timesteps(8, 1000, generator, sampling) for _ in range(2000)])
    assert draws.min() == 0 and draws.max() == 999
    eighths = 8 * up_to((draws.double().sort(dim=1).values + 0.5) / 1000)  # 0 to 8, all equally likely
    assert ((eighths - torch.arange(8) > -0.1) & (eighths - torch.arange(8) < 1.1)).all()  # one from each eighth
    singles = torch.cat([train.sample_timesteps(1, 10, generator, sampling) for _ in range(5000)])
    expected = torch.tensor([5000 * (up_to((i + 1) / 10) - up_to(i / 10)) for i in range(10)])
    assert ((torch.bincount(singles, minlength=10) - expected).abs() < 5 * expected.sqrt()).all()


def test_learning_rate_warms_up_and_decays():
    args = train.parse_options(["--lr", "1", "--lr_warmup_steps", "4", "--steps", "14"])
    rates = [train.learning_rate(step, args) for step in range(14)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[9] == pytest.approx(0.5) and 0 < rates[13] < 0.05  # cosine
    args.lr_scheduler = "linear"
    assert [train.learning_rate(step, args) for step in (4, 9, 13)] == pytest.approx([1.0, 0.5, 0.1])
    args.lr_scheduler, args.scale_lr, args.batch_size, args.grad_accum = "constant", True, 4, 2
    assert train.learning_rate(13, args) == 8.0


def test_every_step_and_seed_has_its_own_randomness():
    seeds = {train.step_generator(seed, step).initial_seed() for seed in range(30) for step in range(100)}
    assert len(seeds) > 2990  # 3000 numbers out of 2**32: hardly ever two alike
    assert torch.equal(*(torch.randn(3, generator=train.step_generator(5, 7)) for _ in range(2)))


def test_a_loss_has_converged_when_its_last_values_vary_little():
    falling = [1 / (1 + i) for i in range(40)]
    assert not train.has_converged(falling[:15])
    assert not train.has_converged([1 - i / 30 for i in range(30)])
    assert train.has_converged(falling)
    last, every = np.array(falling[-15:]), np.array(falling)
    assert train.has_converged(falling, fraction=last.var() / every.var() * 1.01)
    assert not train.has_converged(falling, fraction=last.var() / every.var() * 0.99)


def test_a_noisy_loss_has_converged_when_it_falls_no_more():
    falling = [1 - 0.006 * i + 0.1 * (-1) ** i for i in range(60)]
    assert not any(train.has_converged(falling[:i]) for i in range(61))
    flat = falling[:40] + [0.76 + 0.1 * (-1) ** i for i in range(40, 80)]  # from step 70 both windows are alike
    converged = [train.has_converged(flat[:i]) for i in range(81)]
    assert not any(converged[:50]) and converged[70]
    swing = np.array([0.1 * (-1) ** i for i in range(30)])  # the means of its halves differ by 0.2 / 15
    assert not any(train.has_converged(swing[:i], fraction=0) for i in range(30))
    error = (2 * np.var(swing[:15]) / 14) ** 0.5
    for fall, expected in ((0.99 * error, True), (1.01 * error, False)):
        first_half_higher = swing + (fall - 0.2 / 15) * (np.arange(30) < 15)
        assert train.has_converged(first_half_higher, fraction=0) == expected


# --- The loop ---------------------------------------------------------------------------------------------------------


def test_only_the_learned_rows_change(learn, tiny_model, monkeypatch):
    kept = {}
    for part in ("text_encoder", "unet"):
        load = getattr(mu, f"load_{part}")
        keep = lambda *a, load=load, part=part, **k: kept.setdefault(part, load(*a, **k))  # noqa: E731
        monkeypatch.setattr(mu, f"load_{part}", keep)
    folder = learn(steps=5)
    monkeypatch.undo()
    fresh = {"text_encoder": mu.load_text_encoder(tiny_model, "cpu"), "unet": mu.load_unet(tiny_model, "cpu")}
    for part, module in fresh.items():
        after = kept[part].state_dict()
        after.pop("embeddings.token_embedding.learned_rows", None)
        assert after.keys() == module.state_dict().keys()
        assert all(torch.equal(weight, after[name]) for name, weight in module.state_dict().items())
        others = [name for name, weight in kept[part].named_parameters() if weight.grad is not None]
        assert not [name for name in others if not name.endswith("learned_rows")]
    init_ids = mu.initializer_ids(mu.load_tokenizer(tiny_model), "cat")
    init_rows = fresh["text_encoder"].get_input_embeddings().weight[init_ids]
    assert (read_rows(folder) - init_rows).norm() > 1e-3


@pytest.mark.parametrize("num_vectors, shape", [(1, (32,)), (3, (3, 32))])
def test_learned_vectors_are_saved_in_fp32_in_both_forms(learn, num_vectors, shape):
    folder = learn("--num_vectors", str(num_vectors), "--save_bin")
    saved = load_file(folder / "learned_embeds.safetensors"), torch.load(folder / "learned_embeds.bin")
    assert all(list(content) == ["<kat>"] for content in saved)
    assert saved[0]["<kat>"].shape == shape and saved[0]["<kat>"].dtype == torch.float32
    assert torch.equal(saved[0]["<kat>"], saved[1]["<kat>"])


def test_the_numbers_of_a_reference_run(learn):
    """A silent change of the method shows here; an intended one is written down here."""
    log = read_log(learn("--log_steps", "1", "--seed", "1"))
    assert [row["loss"] for row in log] == pytest.approx([1.22473, 1.13838, 1.12348, 1.2602], rel=1e-4)
    assert log[-1]["embedding_norm"] == pytest.approx(0.22709, rel=1e-4)


def test_gradient_accumulation_equals_one_large_batch(learn):
    whole, parts = learn("--batch_size", "4", out="whole"), learn("--grad_accum", "2", out="parts")
    torch.testing.assert_close(read_rows(whole), read_rows(parts), rtol=1e-5, atol=1e-6)
    (row,), (row_of_parts,) = read_log(whole), read_log(parts)
    for name in ("loss", "eval_loss", "loss_by_timestep", "grad_norm"):
        assert row_of_parts[name] == pytest.approx(row[name], rel=1e-4), name


def test_scale_lr_multiplies_by_the_images_per_step(learn):
    options = ["--grad_accum", "3", "--lr", "1e-3", "--lr_scheduler", "constant"]
    plain, scaled = (read_log(learn(*options, *more, out=str(len(more)))) for more in ([], ["--scale_lr"]))
    assert plain[-1]["lr"] == pytest.approx(1e-3) and scaled[-1]["lr"] == pytest.approx(6e-3)
    assert scaled[-1]["embedding_norm"] != plain[-1]["embedding_norm"]


@pytest.mark.parametrize("kind, templates", [("object", data.OBJECT_TEMPLATES), ("style", data.STYLE_TEMPLATES)])
def test_captions_are_the_templates_of_the_property(learn, tiny_model, monkeypatch, kind, templates):
    """Sampled without replacement: two steps of 27 captions see every template of either list."""
    loss, seen = train.batch_loss, []
    monkeypatch.setattr(train, "batch_loss", lambda c, batch: seen.extend(batch.token_ids) or loss(c, batch))
    learn("--learnable_property", kind, "--batch_size", "27", steps=2)
    tokenizer = mu.load_tokenizer(tiny_model)
    token_ids = mu.add_placeholder(tokenizer, "<kat>")
    captions = mu.tokenize(tokenizer, [template.format("<kat>") for template in templates], {"<kat>": token_ids})
    assert {tuple(ids.tolist()) for ids in seen} == {tuple(ids.tolist()) for ids in captions}


def test_gradients_are_clipped_to_norm_1_after_unscaling(learn, monkeypatch):
    """Also with fp16's scale of 65536. AdamW is nearly blind to the size of gradients: its moments tell."""
    loss = train.inversion_loss
    monkeypatch.setattr(train, "inversion_loss", lambda *args: 50 * loss(*args))
    for dtype in (torch.float32, torch.float16):
        monkeypatch.setattr(mu, "choose_dtype", lambda *_, dtype=dtype: dtype)
        folder = learn(steps=1, out=str(dtype))
        assert read_log(folder)[0]["grad_norm"] > 1.5
        first_moment = read_state(folder)["adamw_exp_avg"]
        assert first_moment.norm().item() == pytest.approx(0.1, rel=1e-3)  # (1 - beta1) * gradient


def test_gradient_checkpointing_recomputes_and_changes_nothing(learn, monkeypatch):
    load, calls = mu.load_unet, []

    def load_counting(*args):
        unet = load(*args)
        unet.mid_block.resnets[1].register_forward_pre_hook(
            lambda *_: calls.append(1)
        )  # recomputing ends before a forward hook
        return unet

    monkeypatch.setattr(mu, "load_unet", load_counting)
    plain, count = learn(steps=3, out="plain"), len(calls)
    saving = learn("--gradient_checkpointing", steps=3, out="saving")
    assert len(calls) == 2 * count + 3  # once more in each backward pass
    torch.testing.assert_close(read_rows(saving), read_rows(plain), rtol=1e-6, atol=0)


def test_only_the_steps_run_compiled(learn, monkeypatch):
    """Without gradient (evaluation batch, previews) the UNet would be compiled a second time."""
    calls = []

    class Compiled:
        def __init__(self, unet):
            self.unet = unet

        def __getattr__(self, name):
            return getattr(self.unet, name)

        def __call__(self, *args):
            calls.append(torch.is_grad_enabled())
            return self.unet(*args)

    monkeypatch.setattr(torch, "compile", Compiled)
    folder = learn("--compile", "--log_steps", "1", "--preview_steps", "2", steps=4)
    assert calls == [True] * 4
    assert torch.equal(read_rows(folder), read_rows(learn(steps=4, out="eager")))


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_gradients_add_up_in_a_fixed_order_on_two_threads(two_threads):
    """Those of learned_rows[ids] would not, with 40 captions or more."""
    embedding = mu.LearnedEmbedding(torch.zeros(9, 32), [9], torch.ones(1, 32))
    token_ids, generator = torch.full((40, 32), 9), torch.Generator().manual_seed(0)
    upstream, gradients = torch.randn(40, 32, 32, generator=generator), set()
    for _ in range(50):
        embedding.learned_rows.grad = None
        embedding(token_ids).backward(upstream)
        gradients.add(embedding.learned_rows.grad.numpy().tobytes())
    assert len(gradients) == 1


def test_runs_on_two_threads_are_equal_byte_for_byte(learn, two_threads):
    runs = [learn("--log_steps", "1", steps=2, out=f"run{i}") for i in range(3)]
    for name in ("learned_embeds.safetensors", "log.jsonl"):
        assert len({(run / name).read_bytes() for run in runs}) == 1, name


# --- The log ----------------------------------------------------------------------------------------------------------


def test_each_row_of_the_log_describes_the_run_at_its_step(learn, tiny_model):
    folder = learn("--log_steps", "2", "--lr", "1e-2", "--batch_size", "4", "--timestep_sampling", "uniform", steps=12)
    log = read_log(folder)
    assert [row["step"] for row in log] == [2, 4, 6, 8, 10, 12]
    tokenizer, table = mu.load_tokenizer(tiny_model), mu.load_text_encoder(tiny_model, "cpu").get_input_embeddings()
    row, (init_row,) = read_rows(folder)[0], table.weight[mu.initializer_ids(tokenizer, "cat")]
    assert log[-1]["embedding_norm"] == pytest.approx(row.norm().item(), rel=1e-5)
    assert log[-1]["cosine_to_init"] == pytest.approx(torch.cosine_similarity(row, init_row, dim=0).item(), abs=1e-5)
    assert log[-1]["vocabulary_norm"] == pytest.approx(table.weight.norm(dim=1).median().item(), rel=1e-5)
    assert log[0]["nearest"][0][0] == "cat" and len(log[0]["nearest"][0]) == 3
    args = train.parse_options(["--steps", "12", "--lr", "1e-2", "--lr_warmup_steps", "2"])
    assert [row["lr"] for row in log] == [train.learning_rate(row["step"] - 1, args) for row in log]
    for row in log:  # stratified batches of 4 have one timestep in each quarter
        assert row["loss"] == pytest.approx(sum(row["loss_by_timestep"]) / 4, rel=1e-5) and row["grad_norm"] > 0


def test_losses_are_logged_by_quarter_of_the_timesteps(learn, monkeypatch):
    loss = train.inversion_loss
    monkeypatch.setattr(train, "inversion_loss", lambda *args: loss(*args) * 0 + args[3] // 250)
    assert [row["loss_by_timestep"] for row in read_log(learn("--batch_size", "4"))] == [[0, 1, 2, 3]]
    (row,) = read_log(learn(steps=1, out="one"))
    assert row["loss_by_timestep"].count(None) == 2  # two images cannot be in four quarters


def test_the_evaluation_loss_is_not_noisy(learn):
    """From step to step it changes by what is learned; the loss of the steps changes by chance."""
    log = read_log(learn("--log_steps", "1", steps=12))
    jumps = {n: sum(abs(b[n] - a[n]) for a, b in itertools.pairwise(log)) for n in ("loss", "eval_loss")}
    assert 0 < jumps["eval_loss"] < 0.2 * jumps["loss"]


def test_the_last_step_is_logged_whatever_log_steps_is(learn):
    assert [row["step"] for row in read_log(learn("--log_steps", "50", steps=45))] == [45]


def test_without_a_terminal_progress_is_printed_line_by_line(learn, capsys):
    learn("--log_steps", "2")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["2/4:", "4/4:"]
    assert all(word in lines[0] for word in ("loss ", "eval_loss ", "embedding_norm "))


def test_early_stop_ends_the_run_when_the_loss_has_converged(learn, monkeypatch, capsys):
    monkeypatch.setattr(train, "has_converged", lambda losses: len(losses) >= 3)
    options = ["--log_steps", "2"]
    assert read_state(learn("--early_stop", *options, steps=20))["step"] == 6
    assert "converged after step 6" in capsys.readouterr().out
    learn("--resume", *options, steps=20)  # --early_stop is kept: nothing is left to do
    assert read_state("run")["step"] == 6
    learn("--resume", "--no-early_stop", *options, steps=20)
    assert read_state("run")["step"] == 20
    assert read_state(learn(*options, steps=8, out="other"))["step"] == 8  # off unless asked for


def test_convergence_is_judged_from_evenly_spaced_rows(learn, monkeypatch):
    """The rows of --log_steps: others are logged because they are saved or previewed."""
    lengths = []
    monkeypatch.setattr(train, "has_converged", lambda losses: lengths.append(len(losses)))
    log = read_log(learn("--early_stop", "--log_steps", "3", "--save_steps", "2", steps=7))
    assert [row["step"] for row in log] == [2, 3, 4, 6, 7] and lengths == [0, 0, 1, 1, 2]


# --- Gradients and rows that are not finite ---------------------------------------------------------------------------


@pytest.fixture
def break_loss(monkeypatch):
    """break_loss(when) multiplies the loss by NaN in the training passes i = 1, 2, ... for which when(i)."""
    loss, passes = train.inversion_loss, []

    def broken(when, *args):
        passes.extend([1] * torch.is_grad_enabled())  # not for the evaluation batch
        return loss(*args) * (math.nan if when(len(passes)) else 1)

    def install(when):
        monkeypatch.setattr(train, "inversion_loss", lambda *args: broken(when, *args))
        return passes

    return install


def test_a_gradient_that_is_not_finite_skips_the_step(learn, break_loss):
    break_loss(lambda i: i in (2, 3))
    folder = learn("--log_steps", "1", steps=5)
    log = read_log(folder)
    assert [row["skipped_steps"] for row in log] == [0, 1, 2, 2, 2]
    assert [row["loss"] is None for row in log] == [False, True, True, False, False]  # NaN is no JSON
    assert log[0]["embedding_norm"] == log[2]["embedding_norm"] != log[3]["embedding_norm"]
    assert read_rows(folder).isfinite().all()


def test_twenty_bad_steps_in_a_row_end_the_run_with_the_last_good_rows(learn, break_loss):
    passes = break_loss(lambda i: i > 3)
    with pytest.raises(mu.UserError, match="20 gradients in a row not finite.*--precision fp32"):
        learn("--log_steps", "1", steps=60)
    assert len(passes) == 23 and read_state("run")["step"] == 23
    assert read_rows("run").isfinite().all()


def test_skipped_steps_that_are_not_in_a_row_end_nothing_and_leave_the_scale_alone(learn, break_loss):
    break_loss(lambda i: i % 2)
    state = read_state(learn(steps=60))
    assert state["step"] == 60 and state["scaler"]["scale"] == 1 and state["rows"].isfinite().all()


def test_rows_that_are_not_finite_are_never_saved(learn, monkeypatch):
    rate = train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda step, args: math.nan if step == 3 else rate(step, args))
    with pytest.raises(mu.UserError, match="--lr .* not finite any more"):
        learn("--save_steps", "2", "--log_steps", "1", steps=6)
    assert read_rows("run").isfinite().all() and read_state("run")["step"] == 2 and read_log("run")[-1]["step"] == 3
