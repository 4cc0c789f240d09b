"""sample.py: which tokens, model and settings it takes, the files it writes, its grids and curves, and its scores.

Images that are compared come from the same calls on the same machine, so they are equal to the byte; where the batch
is another one, matrices may be summed in another order, which is one of 255 levels of a pixel at most.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import data
import model_utils as mu
import sample


def pngs(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def pixels(path):
    return np.asarray(Image.open(path), dtype=int)


def noise_images(count, seed=0):
    array = np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in array]


@pytest.mark.parametrize(
    "kind, prompt", [("object", "a photo of a <kat>"), ("style", "a painting in the style of <kat>")]
)
def test_without_options_the_newest_run_is_sampled(run, kind, prompt):
    config = mu.read_json(run / "config.json") | {"learnable_property": kind}
    (run / "config.json").write_text(json.dumps(config))
    for older in ("runs/a", "runs/z"):
        shutil.copytree(run, older)
        os.utime(f"{older}/learned_embeds.safetensors", (1e9, 1e9))
    sample.main(["--steps", "2"])
    assert pngs("runs/kat/samples") == ["0000.png", "0001.png", "0002.png", "0003.png", "grid.png"]
    assert not Path("runs/a/samples").exists() and not Path("runs/z/samples").exists()
    found = Image.open("runs/kat/samples/0002.png").text
    expected = {"sampler": "dpm++", "steps": "2", "guidance": "7.5", "negative_prompt": "", "batch_size": "4"}
    assert found == expected | {"prompt": prompt, "seed": "2", "model": config["model"], "embeddings": "runs/kat"}


def test_nothing_is_overwritten_and_a_seed_determines_an_image(run):
    samples = run / "samples"
    sample.main(["--steps", "2", "--num_images", "3"])
    before = {path: path.read_bytes() for path in samples.iterdir()}
    sample.main(["--steps", "2", "--num_images", "2", "--seed", "1", "--batch_size", "1"])
    assert before == {path: path.read_bytes() for path in before}
    assert pngs(samples) == [*(f"{i:04d}.png" for i in range(5)), "grid-2.png", "grid.png"]
    for old, new in (("0001.png", "0003.png"), ("0002.png", "0004.png")):
        assert Image.open(samples / old).text["seed"] == Image.open(samples / new).text["seed"]
        assert np.abs(pixels(samples / old) - pixels(samples / new)).max() <= 1
    assert np.abs(pixels(samples / "0000.png") - pixels(samples / "0001.png")).max() > 50


def test_several_tokens_and_prompts_and_other_names_in_order(run, components, capsys):
    early = run / "learned_embeds-steps-2.safetensors"
    argv = ["--embedding", str(run), "--embedding", str(early), "--token", "<kat>", "--token", "<dug>"]
    prompts = ["a <dug> and a <kat>", "a toy"]
    argv += ["--prompt", prompts[0], "--prompt", prompts[1], "--num_images", "2", "--seed", "5", "--steps", "3"]
    sample.main([*argv, "--sampler", "ddpm", "--guidance", "3", "--negative_prompt", "a dog", "--out", "out"])
    captured = capsys.readouterr()
    assert captured.err.splitlines() == ["note: 'a toy' holds no learned token (<kat>, <dug>)"]
    assert "note" not in captured.out
    tokens = [("<kat>", mu.load_embedding(run)[1]), ("<dug>", mu.load_embedding(early)[1])]
    assert (tokens[0][1] - tokens[1][1]).abs().max() > 1e-3
    mu.add_tokens(components, tokens, "--token")
    each_prompt = [prompts[0]] * 2 + [prompts[1]] * 2
    expected = list(sample.generate(components, each_prompt, range(5, 9), "a dog", 3, 3.0, "ddpm"))
    images = [Image.open(f"out/{i:04d}.png") for i in range(4)]
    assert [image.tobytes() for image in images] == [image.tobytes() for image in expected]
    assert [(image.text["prompt"], image.text["seed"]) for image in images] == [*zip(each_prompt, "5678", strict=True)]
    assert Image.open("out/grid.png").tobytes() == sample.image_grid(expected, 2, prompts).tobytes()


def test_a_token_in_the_negative_prompt_needs_no_note(run, capsys):
    sample.main(["--steps", "1", "--num_images", "1", "--prompt", "a cat", "--negative_prompt", "a <kat>"])
    assert "note" not in capsys.readouterr().err


def test_settings_are_the_given_ones_else_what_the_models_folder_advises_else_the_usual(model):
    usual = {"sampler": "dpm++", "steps": 25, "guidance": 7.5, "negative_prompt": "", "batch_size": 4}
    assert sample.sampling_settings(model, {"height": None}) == usual
    advice = {"guidance": 4.5, "steps": 3}
    index = mu.read_json(model / "model_index.json") | {"_sampling": advice}
    (model / "model_index.json").write_text(json.dumps(index))
    assert sample.sampling_settings(model, {"steps": None}) == usual | advice
    given = {"steps": 2, "guidance": 0.0, "height": 24, "width": 8}
    assert sample.sampling_settings(model, {**given, "seed": 5}) == usual | given


@pytest.mark.parametrize("captions", [[], ["one", "two, 夜 and more words than fit"]])
def test_a_grid_has_every_image_at_its_place_below_its_caption(captions):
    """A row takes 18 pixels, and 14 for its caption."""
    grid, top = sample.image_grid(noise_images(5), 3, captions), 14 * bool(captions)
    assert grid.size == (54, 2 * (18 + top))
    for i, image in enumerate(noise_images(5)):
        x, y = 18 * (i % 3) + 1, (18 + top) * (i // 3) + top + 1
        assert grid.crop((x, y, x + 16, y + 16)).tobytes() == image.tobytes()
        grid.paste("white", (x, y, x + 16, y + 16))
    inked = {y // (18 + top) for y in np.flatnonzero((np.asarray(grid) != 255).any(axis=(1, 2)))}
    assert inked == set(range(len(captions)))


def test_each_panel_of_the_curves_shows_its_points(tmp_path):
    panels = {"rising": [(0, 0), (5, 3), (20, 4)], "falling": [(7, 1e-3), (8, 0)], "flat": [(1, 2), (3, 2)]}
    places = [[(10, 150), (125, 56), (470, 24)], [(10, 24), (470, 150)], [(10, 24), (470, 24)]]
    sample.plot_curves(panels, tmp_path / "curves.png")
    bands = pixels(tmp_path / "curves.png").reshape(3, 160, 480, 3)
    for band, points in zip(bands, places, strict=True):
        assert band[:20].min() < 128  # its title
        for x, y in points:
            rows = np.flatnonzero((band[:, x] == [65, 105, 225]).all(-1))  # royal blue
            assert len(rows) and np.abs(rows - y).max() <= 2  # the line is two pixels wide


@pytest.mark.parametrize("size", [(16, 16), (40, 24)])
def test_clip_embeddings_are_those_of_transformers(tiny_model, size):
    model, tokenizer, _ = clip = sample.load_clip(tiny_model, "cpu")
    images, prompts = [image.resize(size) for image in noise_images(3)], ["a photo of a cat", "two dogs"]
    preprocessing = mu.read_json(Path(tiny_model, "clip", "preprocessor_config.json"))
    image_inputs = transformers.CLIPImageProcessorPil(**preprocessing)(images, return_tensors="pt")
    expected = [model.get_image_features(**image_inputs)]
    expected += [model.get_text_features(**tokenizer(prompts, padding=True, return_tensors="pt"))]
    for ours, theirs in zip(sample.embed(clip, images, prompts), expected, strict=True):
        features = theirs.pooler_output / theirs.pooler_output.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(ours, features, rtol=1e-4, atol=1e-5)


def test_scores_are_those_of_the_paper(tiny_model, monkeypatch):
    calls, clip = [], sample.load_clip(tiny_model, "cpu")

    def fake_generate(components, prompts, seeds, **options):
        calls.append((prompts, list(seeds), options))
        return iter(noise_images(len(prompts), seed=len(calls)))

    monkeypatch.setattr(sample, "generate", fake_generate)
    scores = sample.score_tokens(None, clip, noise_images(3, seed=9), ["cat", "<kat>"], "object", 16, seed=5, steps=3)
    assert [call[1:] for call in calls] == [(list(range(5, 37)), {"steps": 3})] * 2 and list(scores) == ["cat", "<kat>"]
    prompts = calls[1][0]
    assert prompts[:18] == ["a photo of a <kat>"] * 16 + ["a photo of two <kat>"] * 2 and len(set(prompts[16:])) == 8
    without_token = [" ".join(prompt.replace("<kat>", "").split()) for prompt in prompts[16:]]
    generated, targets = sample.embed(clip, noise_images(32, seed=2), without_token)
    known, _ = sample.embed(clip, noise_images(3, seed=9), [""])
    clip_i = torch.cosine_similarity(generated[:16, None], known, dim=-1).mean(dim=1)  # [16]: each with all images
    clip_t = torch.cosine_similarity(generated[16:], targets).view(8, 2)  # each with its own prompt
    within_prompts = (clip_t[:, 0] - clip_t[:, 1]).square().mean() / 2
    expected = {"clip_i": (clip_i, clip_i.var() / 16), "clip_t": (clip_t, within_prompts / 16)}
    for name, (cosines, variance) in expected.items():
        found = scores["<kat>"][name]
        assert found["mean"] == pytest.approx(cosines.mean().item(), abs=1e-6)
        assert found["error"] == pytest.approx(variance.sqrt().item(), rel=1e-3)


def test_score_writes_the_scores_of_the_initializer_and_the_token(run, tiny_model, image_folder, components, capsys):
    sample.main(["--score", "--num_images", "4", "--steps", "2", "--seed", "3", "--batch_size", "8"])
    written = mu.read_json(run / "scores.json")
    mu.add_tokens(components, [mu.load_embedding(run)], "--token")
    training_images = mu.to_pil(data.load_images(image_folder, 16)[0])
    settings = {"sampler": "dpm++", "steps": 2, "guidance": 7.5, "negative_prompt": "", "batch_size": 8}
    settings |= {"num_images": 4, "seed": 3}
    clip, tokens = sample.load_clip(tiny_model, "cpu"), ["cat", "<kat>"]
    expected = sample.score_tokens(components, clip, training_images, tokens, "object", **settings)
    assert written == {"tokens": expected, **settings}
    before, early = (run / "scores.json").read_bytes(), run / "learned_embeds-steps-2.safetensors"
    sample.main(["--score", "--num_images", "2", "--steps", "1", "--embedding", str(early)])
    assert (run / "scores.json").read_bytes() == before != (run / "scores-steps-2.json").read_bytes()
    output = capsys.readouterr().out
    for found in [*expected["cat"].values(), *expected["<kat>"].values()]:
        assert f"{found['mean']:.3f} +- {found['error']:.3f}" in output
