"""Each of mini_sd/variants applies to the scripts as they are, trains, samples, and does what its first lines say."""

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import options, read_log, read_rows
from PIL import Image

import train as plain

FOLDER = Path(plain.__file__).parent
NAMES = sorted(path.stem for path in (FOLDER / "mini_sd" / "variants").glob("*.diff"))
MASK = torch.ones(4, 1, 8, 8)
TIMESTEPS = torch.tensor([10, 300, 600, 950])


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """edited(name): the module train of a copy of the scripts with the diff applied, and through it the others."""

    def load(name):
        for script in ("train", "sample", "data", "model_utils"):
            shutil.copy(FOLDER / f"{script}.py", tmp_path)
            monkeypatch.delitem(sys.modules, script)
        subprocess.run(["git", "apply", FOLDER / "mini_sd" / "variants" / f"{name}.diff"], cwd=tmp_path, check=True)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.chdir(tmp_path)
        return importlib.import_module("train")

    return load


def prepare(train, model, vectors=1):
    """A model with <kat>, its learned rows, and the arguments of inversion_loss for four images."""
    components = train.mu.load_components(model)
    rows = train.mu.initial_rows(components, "cat", vectors, 0)
    learned_rows = train.mu.add_tokens(components, [("<kat>", rows)], "--token")
    latents, noise = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    token_ids = train.mu.tokenize(components, ["a photo of a <kat>"] * 4)
    return components, learned_rows, [latents, noise, TIMESTEPS, token_ids, MASK]


def run(train, model, images, *more, steps=3):
    return train.train(train.parse_options(options(model, images, "--log_steps", "1", *more, steps=steps))).absolute()


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_trains_and_samples(name, edited, tiny_model, image_folder):
    train = edited(name)
    folder = run(train, tiny_model, image_folder)
    assert read_rows(folder).isfinite().all() and len(read_log(folder)) == 4
    train.sample.main(["--embedding", str(folder), "--num_images", "1", "--steps", "2", "--out", "out"])
    assert Image.open("out/0000.png").height in (16, 18)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weighs_each_timestep(edited, tiny_model, prediction_type):
    train = edited("min_snr")
    components, _, example = prepare(train, tiny_model)
    schedule = components.schedule._replace(prediction_type=prediction_type)
    components, abar = components._replace(schedule=schedule), schedule.alphas_cumprod[TIMESTEPS]
    snr = abar / (1 - abar)
    weight = snr.clamp(max=5) / (snr + 1 if prediction_type == "v_prediction" else snr)
    losses = train.inversion_loss(components, *example)
    torch.testing.assert_close(losses, weight * plain.inversion_loss(components, *example))


def test_huber_is_quadratic_for_small_errors_and_linear_for_large_ones(edited, tiny_model):
    train = edited("huber")
    components, _, (latents, noise, timesteps, token_ids, mask) = prepare(train, tiny_model)
    components.unet.forward = lambda x, *_, **__: type("Output", (), {"sample": torch.zeros_like(x)})
    for size, expected in ((0.01, 0.01**2 / 2 / 0.1), (3, 3 - 0.1 / 2)):
        losses = train.inversion_loss(components, latents, torch.full_like(noise, size), timesteps, token_ids, mask)
        torch.testing.assert_close(losses, torch.full((4,), expected))


def drawn(train, batch_size):
    """Draws of a data set of one image, whose captions are [start, word, token, end, end]."""
    mean, mask, token_ids = torch.zeros(1, 2, 4, 8, 8), torch.ones(1, 2, 1, 8, 8), torch.tensor([[[1, 7, 9, 2, 2]]])
    dataset = train.data.Dataset(mean, mean, mask, token_ids, None)
    return train.data.draw_examples(dataset, batch_size, torch.Generator().manual_seed(0))


def test_offset_noise_has_the_variance_asked_for(edited):
    noise = drawn(edited("offset_noise"), 5000)[1]
    assert noise.mean(dim=(2, 3)).var().item() == pytest.approx(1 / 64 + 0.1**2, rel=0.05)  # 20,000 means
    assert noise.var(dim=(2, 3)).mean().item() == pytest.approx(1, rel=0.01)


def test_caption_dropout_drops_a_tenth_and_an_empty_caption_has_no_gradient(edited, tiny_model):
    train = edited("caption_dropout")
    token_ids = drawn(train, 5000)[2]
    empty = (token_ids == torch.tensor([1, 2, 2, 2, 2])).all(dim=1)
    assert 0.08 < empty.float().mean() < 0.12 and (9 == token_ids[~empty]).any(dim=1).all()
    components, learned_rows, example = prepare(train, tiny_model)
    example[3] = train.mu.tokenize(components, [""] * 4)
    train.inversion_loss(components, *example).sum().backward()
    assert not learned_rows.grad.any()


def test_the_norm_is_fixed(edited, tiny_model, image_folder):
    log = read_log(run(edited("fixed_norm"), tiny_model, image_folder))
    norms = [row["embedding_norm"] for row in log]
    assert norms == pytest.approx([norms[0]] * 4) and log[-1]["cosine_to_init"] < 0.999


def test_a_term_keeps_the_row_near_the_initializers(edited, tiny_model, image_folder):
    train = edited("near_initializer")
    start = train.mu.initial_rows(train.mu.load_components(tiny_model), "cat", 1, 0)
    far = [read_rows(run(module, tiny_model, image_folder, steps=12)) - start for module in (plain, train)]
    assert 0.9 < far[1].norm() / far[0].norm() < 1  # the weight is small


def test_a_term_keeps_the_encoded_captions_near_those_of_the_initializer(edited, tiny_model):
    train = edited("encoded_text")
    components, learned_rows, example = prepare(train, tiny_model)
    term = lambda: (train.inversion_loss(components, *example) - plain.inversion_loss(components, *example)).sum()  # noqa: E731
    assert term().item() == pytest.approx(0, abs=1e-6)
    start = learned_rows.detach().clone()
    learned_rows.data += 0.5 * torch.randn(start.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(term(), learned_rows)
    assert term() > 0 and (gradient * (learned_rows - start)).sum() > 0  # down is back


def test_each_of_two_rows_learns_at_its_noise_levels(edited, tiny_model):
    train = edited("timestep_rows")
    components, learned_rows, example = prepare(train, tiny_model, 2)
    for i, low in enumerate((True, True, False, False)):
        learned_rows.grad = None
        train.inversion_loss(components, *example)[i].backward()
        assert learned_rows.grad.any(dim=1).tolist() == [not low, low]
    found = []
    for _ in range(2):
        denoise = train.sample.denoiser(components, ["a <kat>"], guidance=3)
        found.append([denoise(example[0][:1], t) for t in (600, 400)])
        learned_rows.data[1] += 1
    assert [torch.equal(*pair) for pair in zip(*found, strict=True)] == [True, False]


def test_equal_rows_for_all_layers_are_the_plain_unet_and_each_layer_has_its_own(edited, tiny_model):
    train = edited("layer_rows")
    layers = len(train.mu.cross_attention(train.mu.load_components(tiny_model).unet))
    components, learned_rows, example = prepare(train, tiny_model, layers)
    learned_rows.data[:] = learned_rows.data[0].clone()
    losses = train.inversion_loss(components, *example)
    reference = plain.mu.load_components(tiny_model)
    plain.mu.add_tokens(reference, [("<kat>", learned_rows.detach()[:1])], "--token")
    torch.testing.assert_close(losses, plain.inversion_loss(reference, *example), rtol=1e-5, atol=0)
    losses.sum().backward()
    assert layers > 1 and learned_rows.grad.any(dim=1).all() and not torch.equal(*learned_rows.grad[:2])


def test_the_moving_average_is_saved_and_resumed(edited, tiny_model, image_folder):
    train = edited("moving_average")
    folder = run(train, tiny_model, image_folder, "--save_steps", "1")
    state = torch.load(folder / "state.pt", weights_only=True)
    assert torch.equal(read_rows(folder), state["optimizer"]["state"][0]["average"])
    assert not torch.equal(read_rows(folder), state["rows"])


def test_a_negative_row_is_learned_and_guided_away_from(edited, tiny_model, image_folder):
    train = edited("negative_token")
    folder = run(train, tiny_model, image_folder, "--lr_scheduler", "constant")
    components, learned_rows, example = prepare(train, tiny_model, 2)
    assert ((read_rows(folder) - learned_rows.detach()).norm(dim=1) > 1e-3).all()
    found = []
    for _ in range(2):
        found.append(
            [train.sample.denoiser(components, ["a <kat>"], "", scale)(example[0][:1], 500) for scale in (1, 3)]
        )
        learned_rows.data[1] += 1
    assert [torch.equal(*pair) for pair in zip(*found, strict=True)] == [True, False]


def test_spsa_needs_no_gradient(edited, tiny_model, image_folder, monkeypatch):
    train = edited("spsa")
    loss, modes = train.inversion_loss, []
    monkeypatch.setattr(train, "inversion_loss", lambda *args: modes.append(torch.is_grad_enabled()) or loss(*args))
    run(train, tiny_model, image_folder)
    assert modes == [False] * (4 + 2 * 3)  # four evaluations, two passes a step


@pytest.mark.parametrize(
    "name, change", [("half_steps", {"steps": 88}), ("uniform_timesteps", {"timestep_sampling": "uniform"})]
)
def test_a_recipe_is_changed_in_one_number(name, change, edited):
    recipe = plain.RECIPES["fast"]
    assert edited(name).RECIPES["fast"] == recipe | change != recipe


def test_attention_outside_the_mask_falls(edited, tiny_model):
    train = edited("attention_loss")
    components, learned_rows, example = prepare(train, tiny_model)
    torch.testing.assert_close(train.inversion_loss(components, *example), plain.inversion_loss(components, *example))
    example[4] = MASK.clone()
    example[4][..., 4:] = 0
    terms = []
    for _ in range(10):
        term = (train.inversion_loss(components, *example) - plain.inversion_loss(components, *example)).mean()
        terms.append(term.item())
        (gradient,) = torch.autograd.grad(term, learned_rows)
        learned_rows.data -= 0.3 * gradient / gradient.norm()
    assert 0 < terms[-1] < 0.99 * terms[0]


def test_the_attention_picture_is_the_share_of_the_token(edited, tiny_model):
    train = edited("attention_picture")
    components, _, (latents, _, timesteps, token_ids, _) = prepare(train, tiny_model)
    denoise = train.sample.denoiser(components, ["a photo of a <kat>"] * 4)
    denoise(latents, 500)
    for attention in train.mu.token_attention(components, token_ids):
        assert attention.shape[:2] == (4, 1) and 0 < attention.min() and attention.max() < 1
    (image,) = train.sample.generate(components, ["a <kat>"], [0], steps=2)
    left, right = image.crop((1, 1, 17, 17)), image.crop((19, 1, 35, 17))
    assert image.size == (36, 18) and left.tobytes() != right.tobytes() and max(right.getextrema()[0]) == 255
