"""The method: loss and gradient of the classical form, and nothing but the new rows learns, exactly and as logged."""

import inspect
import itertools
import math
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import edited_train, options, read_log, read_rows, read_state
from diffusers import DDPMScheduler

import data
import model_utils as mu
import train

PROMPTS = ["a photo of a <kat>", "<kat> and a <pup>", "a cat", "the <pup> in the <kat>"]


@pytest.fixture
def batch():
    """latents, noise, timesteps of four images."""
    latents, noise = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return latents, noise, torch.tensor([0, 250, 600, 999])


def two_tokens(components):
    """Two tokens of three rows in all."""
    table = components.text_encoder.get_input_embeddings().weight
    return [("<kat>", table[[5, 9]].clone()), ("<pup>", table[[20]].clone())]


def with_trained_table(components, tokens):
    """The classical form: the whole table, with rows for the tokens, is trained -> table, mask of the new rows."""
    mu.add_tokens(components, tokens, "--token")
    old_table, ids = components.text_encoder.get_input_embeddings().weight, sum(components.placeholders.values(), [])
    table = torch.nn.Embedding(len(components.tokenizer), old_table.shape[1])
    with torch.no_grad():
        table.weight[: len(old_table)] = old_table
        table.weight[ids] = torch.cat([rows for _, rows in tokens])
    components.text_encoder.set_input_embeddings(table)
    is_new = torch.zeros(len(table.weight), 1, dtype=torch.bool)
    is_new[ids] = True
    return table.weight, is_new


# --- The loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.published
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_loss_and_gradient_equal_the_classical_form(tiny_model, batch, prediction_type):
    """The mean squared error with diffusers' noising and targets, and the gradient of the whole table."""
    latents, noise, timesteps = batch
    classical = mu.load_components(tiny_model)
    table, is_new = with_trained_table(classical, two_tokens(classical))
    token_ids = mu.tokenize(classical, PROMPTS)
    theirs = DDPMScheduler.from_pretrained(tiny_model, subfolder="scheduler", prediction_type=prediction_type)
    text_embeddings = classical.text_encoder(token_ids).last_hidden_state
    pred = classical.unet(theirs.add_noise(latents, noise, timesteps), timesteps, text_embeddings).sample
    target = noise if prediction_type == "epsilon" else theirs.get_velocity(latents, noise, timesteps)
    classical_losses = (pred - target).square().mean(dim=(1, 2, 3))
    classical_losses.mean().backward()

    ours = mu.load_components(tiny_model)
    learned_rows = mu.add_tokens(ours, two_tokens(ours), "--token")
    ours = ours._replace(schedule=ours.schedule._replace(prediction_type=prediction_type))
    losses = train.inversion_loss(ours, latents, noise, timesteps, token_ids, torch.ones(4, 1, 8, 8))
    losses.mean().backward()
    torch.testing.assert_close(losses, classical_losses, rtol=1e-6, atol=0)  # fp32, other order of sums
    torch.testing.assert_close(learned_rows.grad, table.grad[is_new[:, 0]], rtol=1e-4, atol=1e-8)
    assert (learned_rows.grad.norm(dim=1) > 1e-5).all()


def test_twenty_steps_of_train_py_equal_training_the_table_with_all_other_gradients_zeroed(
    learn, tiny_model, image_folder, monkeypatch
):
    """The whole step: accumulation, clipping, AdamW without weight decay. The loss is its own, steep in places."""

    def loss(components, latents, noise, timesteps, token_ids, mask):
        text_embeddings = components.text_encoder(token_ids).last_hidden_state
        error = components.unet(latents + noise, timesteps, text_embeddings).sample - noise
        return timesteps * error.square().mean(dim=(1, 2, 3)) / 10

    monkeypatch.setattr(train, "inversion_loss", loss)
    folder = learn(*"--num_vectors 2 --grad_accum 3 --lr_scheduler constant --log_steps 1".split(), steps=20)
    args = train.parse_options(options(tiny_model, image_folder, "--num_vectors", "2", steps=20))

    components = mu.load_components(tiny_model)
    init_rows = mu.initial_rows(components, "cat", 2, 0)
    table, is_new = with_trained_table(components, [("<kat>", init_rows)])
    dataset, before = data.load_dataset(components, image_folder, 16, "<kat>"), table.detach().clone()
    optimizer, norms, means = torch.optim.AdamW([table], lr=2e-2, weight_decay=0.0), [], []
    for step in range(20):
        mean = loss(components, *train.draw_batch(dataset, 6, components.schedule, step, args)).mean()
        mean.backward()
        means.append(mean.item())
        table.grad *= is_new
        norms.append(torch.nn.utils.clip_grad_norm_([table], 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
    assert min(norms) < 1 < max(norms)  # some are clipped
    for name, expected in (("grad_norm", norms), ("loss", means)):
        assert [row[name] for row in read_log(folder)[1:]] == pytest.approx(expected, rel=1e-2), name
    # AdamW divides by the size of the gradient: sums in another order show at entries whose gradient is nearly 0
    torch.testing.assert_close(read_rows(folder), table[is_new[:, 0]], rtol=0, atol=1e-3)
    assert torch.equal(table[~is_new[:, 0]], before[~is_new[:, 0]])
    assert ((read_rows(folder) - init_rows).norm(dim=1) > 0.1).all()


def test_masked_pixels_do_not_count(components, batch):
    """The loss, whatever it is, of the left half does not see the right half of the targets; half weight is no less."""
    latents, noise, timesteps = batch
    token_ids = mu.tokenize(components, PROMPTS)

    def unet(noisy_latents, *_):  # one that lets no pixel see another
        return SimpleNamespace(sample=0.5 * noisy_latents)

    unet.dtype, components = torch.float32, components._replace(unet=unet)

    def loss(latents, mask):
        return train.inversion_loss(components, latents, noise, timesteps, token_ids, mask)

    mask, other = torch.ones(4, 1, 8, 8), latents.clone()
    mask[..., 4:], other[..., 4:] = 0, 7
    assert torch.equal(loss(latents, mask), loss(other, mask))
    assert not torch.equal(loss(latents, 1 - mask), loss(other, 1 - mask))
    half = (latents[..., :4], noise[..., :4], timesteps, token_ids, 0.1 * mask[..., :4])
    alone = train.inversion_loss(components, *half)
    torch.testing.assert_close(loss(latents, mask), alone)  # the mean over what counts


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_gradients_point_the_same_way(tiny_model, batch, precision):
    gradients = []
    for dtype in (torch.float32, mu.DTYPES[precision]):
        components = mu.load_components(tiny_model, dtype)
        learned_rows = mu.add_tokens(components, two_tokens(components), "--token")
        losses = train.inversion_loss(components, *batch, mu.tokenize(components, PROMPTS), torch.ones(4, 1, 8, 8))
        assert losses.dtype == learned_rows.dtype == torch.float32
        losses.mean().backward()
        gradients.append(learned_rows.grad)
    assert (torch.cosine_similarity(*gradients) > 0.99).all()


def test_learned_rows_may_stand_inside_the_table_and_behind_it():
    """Some tables are longer than their vocabulary: the next free id has a row, which is not touched."""
    table, rows = torch.randn(10, 4), torch.randn(3, 4)
    embedding = mu.LearnedEmbedding(table, [8, 9, 10], rows)
    expected = torch.stack([table[7], rows[0], rows[1], rows[2], table[0]])
    assert torch.equal(embedding(torch.tensor([[7, 8, 9, 10, 0]]))[0], expected)
    assert [name for name, _ in embedding.named_parameters()] == ["learned_rows"]
    assert mu.LearnedEmbedding(table.half(), [8], rows[:1])(torch.tensor([[8]])).dtype == torch.float16


# --- What is random ---------------------------------------------------------------------------------------------------


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


def test_mixed_timesteps_are_uniform_and_cubic_in_turns():
    def draw(sampling):
        return train.sample_timesteps(9, 1000, torch.Generator().manual_seed(3), sampling)

    assert torch.equal(draw("mixed")[::2], draw("uniform")[::2])
    assert torch.equal(draw("mixed")[1::2], draw("cubic")[1::2])


def test_every_step_and_seed_has_its_own_randomness():
    seeds = {train.step_generator(seed, step).initial_seed() for seed in range(30) for step in range(100)}
    assert len(seeds) > 2990  # 3000 numbers out of 2**32: hardly ever two alike
    assert torch.equal(*(torch.randn(3, generator=train.step_generator(5, 7)) for _ in range(2)))


# --- The loop ---------------------------------------------------------------------------------------------------------


def test_only_the_new_rows_change_in_a_run(learn, tiny_model, monkeypatch):
    loaded, load = [], mu.load_components
    monkeypatch.setattr(mu, "load_components", lambda *args: loaded.append(load(*args)) or loaded[-1])
    folder = learn("--num_vectors", "2")
    (used,), fresh = loaded, load(tiny_model)
    for part in ("text_encoder", "unet", "vae"):
        after = getattr(used, part).state_dict()
        rows = after.pop("embeddings.token_embedding.learned_rows", None)
        before = getattr(fresh, part).state_dict()
        assert after.keys() == before.keys() and all(torch.equal(before[name], after[name]) for name in before)
        moved = [name for name, weight in getattr(used, part).named_parameters() if weight.requires_grad]
        assert moved == ["embeddings.token_embedding.learned_rows"] * (part == "text_encoder")
        assert part != "text_encoder" or torch.equal(rows, read_rows(folder))
    assert (mu.initial_rows(fresh, "cat", 2, 0) - read_rows(folder)).norm(dim=1).min() > 1e-3


@pytest.mark.published
def test_the_numbers_of_a_reference_run(learn):
    """A silent change of the method shows here; an intended one is written down here."""
    log = read_log(learn("--log_steps", "1", "--seed", "1", "--timestep_sampling", "cubic"))
    assert [row["loss"] for row in log[1:]] == pytest.approx([1.22473, 1.13838, 1.12348, 1.2602], rel=1e-4)
    assert log[-1]["embedding_norm"] == pytest.approx(0.22709, rel=1e-4)


def test_gradients_of_fp16_are_clipped_to_norm_1_after_unscaling(learn, monkeypatch):
    """Its scale is 65536. AdamW is nearly blind to the size of gradients: its moments tell."""
    loss = train.inversion_loss
    monkeypatch.setattr(train, "inversion_loss", lambda *args: 50 * loss(*args))
    monkeypatch.setattr(mu, "choose_precision", lambda *_: "fp16")
    folder = learn(steps=1)
    assert 1 < read_log(folder)[1]["grad_norm"] < 1000
    optimizer = read_state(folder)["optimizer"]
    first_moment = optimizer["state"][0]["exp_avg"]
    assert optimizer["param_groups"][0]["weight_decay"] == 0  # the row is pulled nowhere
    assert first_moment.norm().item() == pytest.approx(0.1, rel=1e-3)  # (1 - beta1) * gradient


def test_two_threads_give_the_same_bytes_each_time(learn, request):
    """The gradient of learned_rows[ids] would add up in no fixed order, with 40 captions or more."""
    request.addfinalizer(lambda: torch.set_num_threads(1))
    torch.set_num_threads(2)
    embedding = mu.LearnedEmbedding(torch.zeros(9, 32), [9], torch.ones(1, 32))
    upstream, gradients = torch.randn(40, 32, 32, generator=torch.Generator().manual_seed(0)), set()
    for _ in range(50):
        embedding.learned_rows.grad = None
        embedding(torch.full((40, 32), 9)).backward(upstream)
        gradients.add(embedding.learned_rows.grad.numpy().tobytes())
    assert len(gradients) == 1
    runs = [learn(steps=2, out=f"run{i}") for i in range(2)]
    for name in ("learned_embeds.safetensors", "log.jsonl", "state.pt"):
        assert len({(run / name).read_bytes() for run in runs}) == 1, name


ADAMW = next(line for line in inspect.getsource(train.train).splitlines() if "torch.optim.AdamW" in line)


@pytest.mark.parametrize("name", ["RMSprop([rows], lr=lr)", "NAdam([rows], lr=lr)", "SGD([rows], lr=lr, momentum=0.9)"])
def test_another_optimizer_is_one_line_and_resumes(name, tiny_model, image_folder, tmp_path):
    new = "    optimizer = torch.optim." + name.replace("rows", "learned_rows").replace("lr=lr", "lr=args.lr")
    edited, folders = edited_train((ADAMW, new)), [tmp_path / "whole", tmp_path / "stopped"]
    for folder, steps in zip(folders, (5, 3), strict=True):
        argv = options(tiny_model, image_folder, "--output_dir", str(folder), "--lr_scheduler", "constant", steps=steps)
        edited.train(edited.parse_options(argv))
    edited.train(edited.parse_options(["--resume", str(folders[1]), "--steps", "5"]))
    for file in ("learned_embeds.safetensors", "state.pt"):
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes(), file


# --- Gradients that are not finite, and the log -----------------------------------------------------------------------


def break_loss(monkeypatch, when):
    """Multiply the loss by NaN in the training passes i = 1, 2, ... for which when(i)."""
    loss, passes = train.inversion_loss, []

    def broken(*args):
        passes.extend([1] * torch.is_grad_enabled())  # not for the evaluation batch
        return loss(*args) * (math.nan if torch.is_grad_enabled() and when(len(passes)) else 1)

    monkeypatch.setattr(train, "inversion_loss", broken)


def test_in_fp16_a_gradient_that_is_not_finite_skips_its_step(learn, monkeypatch):
    monkeypatch.setattr(mu, "choose_precision", lambda *_: "fp16")
    break_loss(monkeypatch, lambda i: i in (2, 3))
    folder = learn("--log_steps", "1", steps=5)
    log = read_log(folder)
    norms = [row["embedding_norm"] for row in log[1:]]
    assert norms[0] == norms[1] == norms[2] != norms[3] != norms[4]
    assert [name in row for row in log[1:4] for name in ("loss", "grad_norm")] == [True, True, *[False] * 4]
    assert not {"NaN", "Infinity"} & set(re.findall(r"\w+", (folder / "log.jsonl").read_text()))  # it stays JSON
    assert read_state(folder)["scaler"]["scale"] == 2.0**14  # halved twice
    assert read_rows(folder).isfinite().all()


@pytest.mark.parametrize("precision, remedy", [("fp32", "try an --lr"), ("bf16", "try --precision fp32 or an --lr")])
def test_nothing_that_is_not_finite_is_saved(learn, monkeypatch, precision, remedy):
    break_loss(monkeypatch, lambda i: i == 4)
    with pytest.raises(mu.UserError, match=f"not finite at step 4: {remedy}"):
        learn("--save_steps", "2", "--precision", precision, steps=6)
    assert read_rows("run").isfinite().all() and read_state("run")["step"] == 2
    assert [row["step"] for row in read_log("run")] == [0, 2]


def test_each_row_of_the_log_describes_the_run_at_its_step(learn, components, capsys):
    folder = learn("--log_steps", "2", "--lr", "1e-2", steps=11)
    log = read_log(folder)
    assert [row["step"] for row in log] == [0, 2, 4, 6, 8, 10, 11]
    rows, init_rows = read_rows(folder), mu.initial_rows(components, "cat", 1, 0)
    each = [row["loss"] for row in read_log(learn("--log_steps", "1", "--lr", "1e-2", steps=11, out="each"))[1:]]
    means = [sum(each[i : i + 2]) / len(each[i : i + 2]) for i in range(0, 11, 2)]
    assert [row["loss"] for row in log[1:]] == pytest.approx(means)
    assert log[-1]["embedding_norm"] == pytest.approx(rows.norm().item(), rel=1e-5)
    cosine = torch.cosine_similarity(rows, init_rows).item()
    assert log[-1]["cosine_to_init"] == pytest.approx(cosine, abs=1e-5) and cosine < 0.999
    args = train.parse_options(["--steps", "11", "--lr", "1e-2", "--lr_warmup_steps", "2"])
    assert [row["lr"] for row in log[1:]] == [train.learning_rate(row["step"] - 1, args) for row in log[1:]]
    start = {"step": 0, "eval_loss": log[0]["eval_loss"], "embedding_norm": init_rows.norm().item()}
    assert log[0] == pytest.approx(start | {"cosine_to_init": 1}, rel=1e-5)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step 2/")]
    assert lines[0].startswith(f"step 2/11: loss {log[1]['loss']:.4f}, eval_loss {log[1]['eval_loss']:.4f}")
    # Between rows the loss of the steps changes by chance, that of the evaluation batch by what is learned
    pairs = [*itertools.pairwise(log[1:])]
    jumps = {name: sum(abs(b[name] - a[name]) for a, b in pairs) for name in ("loss", "eval_loss")}
    assert 0 < jumps["eval_loss"] < 0.2 * jumps["loss"]
