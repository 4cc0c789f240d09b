"""Generating on a tiny model: equal to diffusers' pipeline within one level of a pixel; files, scores, command line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import model_utils as mu
import sample
from sample import generate

SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "dpm++": diffusers.DPMSolverMultistepScheduler,
}
PROMPTS = ["a photo of a <kat> and a <pup>", "two dogs at night"]


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory):
    """Two embedding files: <kat> of three vectors, <pup> of one."""
    folder, generator = tmp_path_factory.mktemp("embeddings"), torch.Generator().manual_seed(3)
    files = []
    for token, vectors in (("<kat>", 3), ("<pup>", 1)):
        path = folder / f"{token[1:-1]}.safetensors"
        mu.save_embedding(path, token, torch.randn(vectors, 32, generator=generator), "tiny")
        files.append((path, None))
    return files


def load_pipeline(model, embeddings):
    """diffusers' pipeline with the same tokens."""
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        model, low_cpu_mem_usage=False, torch_dtype=torch.float32
    )
    for file, _ in embeddings:
        pipeline.load_textual_inversion(str(file))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline(tiny_model, embeddings):
    return load_pipeline(tiny_model, embeddings)


@pytest.fixture(scope="module")
def components(tiny_model, embeddings):
    return mu.load_components(tiny_model, embeddings=embeddings)


def assert_same_images(ours, theirs):
    for image, reference in zip(ours, theirs, strict=True):
        difference = np.abs(np.asarray(image, dtype=int) - np.asarray(reference, dtype=int))
        assert image.size == reference.size and difference.max() <= 1  # of 255
        assert np.asarray(image).std() > 5  # there is something in it


def compare(pipeline, components, model, sampler, prompts, steps, guidance, negative_prompt=""):
    """Generate with diffusers and with ours from the same seeds, with the noise schedule of the folder `model`."""
    loaded = diffusers.PNDMScheduler.from_pretrained(model, subfolder="scheduler")
    pipeline.scheduler = SCHEDULERS[sampler].from_config(loaded.config)
    seeds = range(7, 7 + len(prompts))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    negatives = [negative_prompt] * len(prompts)
    settings = {"num_inference_steps": steps, "guidance_scale": guidance, "negative_prompt": negatives}
    expected = pipeline(prompts, generator=generators, **settings).images
    components = components._replace(schedule=mu.load_schedule(model))
    images = list(generate(components, prompts, seeds, negative_prompt, steps, guidance, sampler))
    assert_same_images(images, expected)


@pytest.mark.parametrize("guidance, negative_prompt", [(0.0, ""), (1.0, "a red toy"), (7.5, ""), (7.5, "a red toy")])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_images_equal_diffusers(pipeline, components, tiny_model, sampler, guidance, negative_prompt):
    for steps in (1, 4, 16):
        compare(pipeline, components, tiny_model, sampler, PROMPTS, steps, guidance, negative_prompt)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing", None])  # Stable Diffusion 1.4 names none
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_images_equal_diffusers_for_every_schedule(
    pipeline, components, tiny_model, tmp_path, sampler, spacing, prediction_type
):
    config = json.loads(Path(tiny_model, "scheduler", "scheduler_config.json").read_text())
    config |= {"prediction_type": prediction_type, "timestep_spacing": spacing}
    (tmp_path / "scheduler").mkdir()
    given = {key: value for key, value in config.items() if value is not None}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(given))
    compare(pipeline, components, tmp_path, sampler, PROMPTS[:1], 7, 5.0)


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_images_of_mini_sd_equal_diffusers(tmp_path, sampler):
    file = tmp_path / "kat.safetensors"
    mu.save_embedding(file, "<kat>", torch.randn(2, 128, generator=torch.Generator().manual_seed(3)) / 50, "mini_sd")
    components = mu.load_components(mu.DEFAULT_MODEL, embeddings=[(file, None)])
    pipeline, prompts = load_pipeline(mu.DEFAULT_MODEL, [(file, None)]), ["a photo of a <kat> at night"]
    for steps, guidance, negative_prompt in ((1, 0.0, ""), (5, 1.0, ""), (12, 7.5, ""), (9, 7.5, "a red hat")):
        compare(pipeline, components, mu.DEFAULT_MODEL, sampler, prompts, steps, guidance, negative_prompt)


def test_latents_of_another_size_equal_diffusers(pipeline, components, tiny_model):
    loaded = diffusers.PNDMScheduler.from_pretrained(tiny_model, subfolder="scheduler")
    pipeline.scheduler = SCHEDULERS["dpm++"].from_config(loaded.config)
    latents = torch.randn(2, 4, 12, 8, generator=torch.Generator().manual_seed(0))
    settings = {"num_inference_steps": 15, "output_type": "latent", "height": 24, "width": 16}
    expected = pipeline(PROMPTS, latents=latents, **settings).images
    tokenizer, text_encoder, _, unet, schedule, placeholders = components
    text, negative = (
        mu.encode_tokens(text_encoder, mu.tokenize(tokenizer, prompts, placeholders)) for prompts in (PROMPTS, ["", ""])
    )
    ours = sample.sample_latents(unet, schedule, text, negative, latents, 15, 7.5, "dpm++")
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    assert not ours.requires_grad


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_an_image_does_not_depend_on_the_batch_size(components, sampler):
    prompts, seeds = [*PROMPTS, "a <pup>", "a cat", "a toy"], [5, 9, 2, 7, 7]
    one, *others = (
        list(generate(components, prompts, seeds, "", 4, 4.0, sampler, batch_size=size)) for size in (1, 2, 5)
    )
    for images in others:
        assert_same_images(images, one)


def test_the_vae_is_moved_to_decode_and_goes_back(tiny_model):
    components = mu.load_components(tiny_model)
    moves, to = [], components.vae.to
    components.vae.to = lambda device: moves.append(str(device)) or to(device)
    assert [image.size for image in generate(components, ["a cat"], [0], steps=1, height=8, width=24)] == [(24, 8)]
    assert moves == ["cpu", "cpu"]


@pytest.mark.parametrize("size", [{"height": 17}, {"width": 1}, {"height": -15}])
def test_sizes_that_do_not_fit_are_refused(components, size):
    with pytest.raises(mu.UserError, match="--height .* --width .* multiples of 2"):
        next(generate(components, ["a cat"], [0], **size))


# --- Image files ------------------------------------------------------------------------------------------------------


def test_a_grid_shows_every_image_and_captions_move_only_what_is_below_them():
    images = [Image.new("RGB", (10, 8), (50 * k, 0, 0)) for k in range(5)]
    grid = sample.image_grid(images, 3)
    pixels = np.asarray(grid)
    assert all((pixels == [50 * k, 0, 0]).all(-1).sum() == 80 for k in range(5))
    assert (pixels != 255).any(-1).sum() == 400
    captioned = np.asarray(sample.image_grid(images, 3, ["", "two, 夜"]))
    assert captioned.shape[1] == grid.width and captioned.shape[0] > grid.height
    assert (captioned[:10] == pixels[:10]).all() and (captioned[-10:] == pixels[-10:]).all()


def test_long_captions_are_wrapped_not_cut():
    images = [Image.new("RGB", (64, 8), "black")] * 2
    one, many = (
        sample.image_grid(images, 1, [caption, ""]) for caption in ("a cat", "a painting in the style of <kat>")
    )
    assert many.size == (one.width, one.height + 3 * 14)  # 4 lines instead of 1: 11 letters are as wide as the image


def test_settings_are_in_the_png(tmp_path):
    settings = {"prompt": "a <kat> at night, 夜の猫", "seed": 3, "guidance": 7.5}
    sample.save_png(Image.new("RGB", (4, 4), "red"), tmp_path / "a.png", settings)
    with Image.open(tmp_path / "a.png") as image:
        assert image.text == {key: str(value) for key, value in settings.items()}
        assert image.getpixel((0, 0)) == (255, 0, 0)


# --- CLIP scores ------------------------------------------------------------------------------------------------------


def noise_images(count, size=(16, 16), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, size[1], size[0], 3), dtype=np.uint8)
    return [Image.fromarray(array) for array in pixels]


@pytest.mark.parametrize("size", [(16, 16), (64, 64), (9, 9)])
def test_clip_embeddings_equal_transformers(tiny_model, tmp_path, size):
    folder = shutil.copytree(Path(tiny_model, "clip"), tmp_path / "clip")
    preprocessing = json.loads((folder / "preprocessor_config.json").read_text())
    mu.load_tokenizer(tiny_model).save_pretrained(folder)
    clip = sample.load_clip(tiny_model, str(folder))
    images, prompts = noise_images(3, size), ["a photo of a cat", "two dogs"]
    pixels = CLIPImageProcessorPil(**preprocessing)(images, return_tensors="pt")
    tokens = clip.tokenizer(prompts, padding=True, return_tensors="pt")
    expected = [clip.model.get_image_features(**pixels), clip.model.get_text_features(**tokens)]
    for ours, output in zip(sample.embed(clip, images, prompts), expected, strict=True):
        normed = output.pooler_output / output.pooler_output.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(ours, normed, rtol=1e-4, atol=1e-5)


def test_scores_are_those_of_the_paper(tiny_model, monkeypatch):
    """CLIP-I: mean of all pairs; CLIP-T: each image with its editing prompt without the token; errors by hand."""
    clip, training_images, calls = sample.load_clip(tiny_model), noise_images(3, seed=1), []

    def fake_generate(components, prompts, seeds, **options):
        calls.append((prompts, list(seeds), options))
        return iter(noise_images(len(prompts), seed=len(calls)))

    monkeypatch.setattr(sample, "generate", fake_generate)
    scores = sample.score_embedding(None, clip, training_images, ["cat", "<kat>"], "object", 16, seed=5, steps=3)
    assert list(scores["tokens"]) == ["cat", "<kat>"]
    assert [(seeds, options) for _, seeds, options in calls] == [(list(range(5, 5 + 32)), {"steps": 3})] * 2
    prompts = calls[1][0]
    assert prompts[:16] == ["a photo of a <kat>"] * 16
    assert prompts[16:18] == ["a photo of two <kat>"] * 2 and len(set(prompts[16:])) == 8

    without_token = [prompt.replace("<kat>", "").replace("  ", " ").strip() for prompt in prompts[16:]]
    generated, targets = sample.embed(clip, noise_images(32, seed=2), without_token)
    known, _ = sample.embed(clip, training_images, without_token)
    clip_i = torch.cosine_similarity(generated[:16, None], known[None], dim=-1).mean(dim=1)  # [16]
    clip_t = torch.cosine_similarity(generated[16:], targets, dim=-1).view(8, 2)
    found = scores["tokens"]["<kat>"]
    assert found["clip_i"]["mean"] == pytest.approx(clip_i.mean().item(), abs=1e-5)
    assert found["clip_i"]["error"] == pytest.approx(clip_i.std().item() / 4, rel=1e-3)
    assert found["clip_t"]["mean"] == pytest.approx(clip_t.mean().item(), abs=1e-5)
    variance = (clip_t[:, 0] - clip_t[:, 1]).square().mean() / 2  # of two images each, within the prompts
    assert found["clip_t"]["error"] == pytest.approx((variance / 16).sqrt().item(), rel=1e-3)
    assert found["prompts"]["a photo of two {}"] == pytest.approx(clip_t[0].mean().item(), abs=1e-5)
    pairs = [(known[i] @ known[j]).item() for i in range(3) for j in range(3) if i != j]
    assert scores["training_images"] == pytest.approx(sum(pairs) / 6, abs=1e-5)


def test_the_clip_that_scores_can_be_chosen_and_a_damaged_one_is_refused(tiny_model, tmp_path):
    own = sample.load_clip(tiny_model)
    assert own.name == os.path.join(tiny_model, "clip")
    chosen = shutil.copytree(own.name, tmp_path / "chosen")
    mu.load_tokenizer(tiny_model).save_pretrained(chosen)
    assert sample.load_clip(tiny_model, str(chosen)).name == str(chosen)
    (tmp_path / "empty").mkdir()
    (chosen / "model.safetensors").write_bytes((chosen / "model.safetensors").read_bytes()[:1000])
    # the first: OpenAI's is not available offline
    for model, name in (
        (tmp_path / "empty", None),
        (tiny_model, "empty"),
        (tiny_model, "missing"),
        (tiny_model, "chosen"),
    ):
        with pytest.raises(mu.UserError, match="--score_model"):
            sample.load_clip(model, name and str(tmp_path / name))


# --- Command line -----------------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tiny_model, tmp_path, monkeypatch):
    """What train.py leaves behind, in the current folder: runs/old and the newer runs/kat."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for k, image in enumerate(noise_images(3, (20, 16))):
        image.save(tmp_path / "images" / f"{k}.png")
    for age, name in enumerate(("kat", "old")):
        folder = tmp_path / "runs" / name
        rows = torch.randn(2, 32, generator=torch.Generator().manual_seed(age))
        mu.save_embedding(folder / "learned_embeds.safetensors", f"<{name}>", rows, tiny_model)
        config = {"model": tiny_model, "placeholder_token": f"<{name}>", "initializer_token": "cat", "revision": None}
        config |= {
            "learnable_property": "object",
            "images": str(tmp_path / "images"),
            "resolution": 16,
            "variant": None,
        }
        (folder / "config.json").write_text(json.dumps(config))
        os.utime(folder / "learned_embeds.safetensors", (1e9 - age, 1e9 - age))
    return tmp_path / "runs" / "kat"


def png_settings(path):
    with Image.open(path) as image:
        return image.text


def refused(argv, capsys):
    """Run sample.py, expect exit code 2 and one sentence; return it."""
    with pytest.raises(SystemExit) as stop:
        sample.main(argv)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("error: ")
    return error


def test_without_options_the_newest_run_is_sampled(run_folder, capsys):
    sample.main(["--steps", "2"])
    files = sorted(path.name for path in (run_folder / "samples").iterdir())
    assert files == ["0000.png", "0001.png", "0002.png", "0003.png", "grid.png"]
    assert "4 images in " in capsys.readouterr().out
    text = png_settings(run_folder / "samples" / "0002.png")
    assert text["prompt"] == "a photo of a <kat>" and text["seed"] == "2" and text["negative_prompt"] == ""
    assert (text["sampler"], text["steps"], text["guidance"]) == ("dpm++", "2", "7.5")
    assert "<kat>" in text["embeddings"] and str(run_folder / "learned_embeds.safetensors")[-30:] in text["embeddings"]
    assert text["model"].endswith("tiny")


def test_nothing_is_overwritten_and_a_seed_determines_an_image(run_folder):
    samples = run_folder / "samples"
    sample.main(["--steps", "2", "--num_images", "3"])
    before = {path: path.read_bytes() for path in samples.iterdir()}
    sample.main(["--steps", "2", "--num_images", "2", "--seed", "1", "--batch_size", "1"])
    assert before == {path: path.read_bytes() for path in before}
    assert sorted(path.name for path in set(samples.iterdir()) - set(before)) == ["0003.png", "0004.png", "grid2.png"]
    with Image.open(samples / "0001.png") as old, Image.open(samples / "0003.png") as new:
        assert_same_images([new], [old])  # both have seed 1


def test_several_tokens_and_prompts(run_folder, tiny_model, capsys):
    argv = ["--embedding", "runs/kat", "--embedding", "runs/old/learned_embeds.safetensors"]
    argv += ["--token", "<kat>", "--token", "<dog>", "--prompt", "a <kat> and a <dog>", "--prompt", "a toy"]
    sample.main([*argv, "--out", "out", "--num_images", "2", "--steps", "3", "--sampler", "ddpm", "--guidance", "3"])
    assert "'a toy' holds no learned token, such as <kat>" in capsys.readouterr().err
    components = mu.load_components(tiny_model, embeddings=[("runs/kat", None), ("runs/old", "<dog>")])
    prompts = ["a <kat> and a <dog>"] * 2 + ["a toy"] * 2
    expected = list(generate(components, prompts, range(4), "", 3, 3.0, "ddpm"))
    images = [Image.open(f"out/{k:04d}.png") for k in range(4)]
    assert_same_images(images, expected)
    assert [(image.text["prompt"], image.text["seed"]) for image in images] == list(zip(prompts, "0123", strict=True))


def test_the_options_of_diffusers_scripts_are_accepted(run_folder, tiny_model):
    argv = ["--pretrained_model_name_or_path", tiny_model, "--num_inference_steps", "3", "--guidance_scale", "2"]
    sample.main([*argv, "--output_dir", "out", "--num_images", "1", "--height", "24", "--width", "8"])
    text = png_settings("out/0000.png")
    assert (text["steps"], text["guidance"], text["height"], text["width"]) == ("3", "2.0", "24", "8")
    assert not Path("out/grid.png").exists()  # a single image needs none


def test_a_models_folder_may_advise_settings(run_folder, tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "advised")
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {"_sampling": {"guidance": 4, "steps": 3}}))
    argv = ["--embedding", "runs/kat", "--model", str(model), "--num_images", "1"]
    sample.main([*argv, "--out", "a"])
    sample.main([*argv, "--out", "b", "--steps", "2"])
    found = [png_settings(f"{folder}/0000.png") for folder in "ab"]
    assert [(text["guidance"], text["steps"]) for text in found] == [("4", "3"), ("4", "2")]
    load_pipeline(model, [])  # diffusers does not mind the entry


def test_an_embedding_without_a_run_remembers_its_model(run_folder):
    (run_folder / "config.json").unlink()
    sample.main(["--steps", "1", "--num_images", "1"])
    assert png_settings(run_folder / "samples" / "0000.png")["model"].endswith("tiny")


@pytest.mark.parametrize(
    "argv, revision, variant",
    [
        ([], "r1", "fp16"),
        (["--revision", "main"], "main", "fp16"),
        (["--variant", "bf16"], "r1", "bf16"),
        (["--model", "own"], None, None),  # another model has other files
        (["--model", "own", "--revision", "main", "--variant", "bf16"], "main", "bf16"),
    ],
)
def test_revision_and_variant_are_the_runs_unless_another_model_is_named(
    run_folder, tiny_model, monkeypatch, argv, revision, variant
):
    config = json.loads((run_folder / "config.json").read_text()) | {"revision": "r1", "variant": "fp16"}
    (run_folder / "config.json").write_text(json.dumps(config))
    asked = {}

    def load_components(*_, **options):
        asked.update(options)
        raise mu.UserError("asked")

    monkeypatch.setattr(mu, "load_components", load_components)
    with pytest.raises(mu.UserError, match="asked"):
        sample.run(sample.build_parser().parse_args(["--embedding", "runs/kat", *argv]))
    assert (asked["revision"], asked["variant"]) == (revision, variant)


def test_score(run_folder, capsys):
    sample.main(["--score", "--num_images", "4", "--steps", "2", "--batch_size", "8"])
    scores = json.loads((run_folder / "scores.json").read_text())
    assert list(scores["tokens"]) == ["cat", "<kat>"]
    assert (scores["steps"], scores["num_images"], scores["seed"]) == (2, 4, 0)
    for found in scores["tokens"].values():
        for score in ("clip_i", "clip_t"):
            assert -1 <= found[score]["mean"] <= 1 and 0 < found[score]["error"] < 1
        assert len(found["prompts"]) == 8
    output = capsys.readouterr().out
    assert f"{scores['tokens']['<kat>']['clip_i']['mean']:.3f}" in output and "scores.json" in output


@pytest.mark.parametrize(
    "argv, named",
    [
        ("--embedding no/such/folder", "--embedding no/such/folder"),
        ("--embedding empty", "--embedding empty"),
        ("--embedding runs/kat --embedding runs/kat/learned_embeds.safetensors", "two embeddings are called '<kat>'"),
        ("--token cat", "--token"),
        ("--token <a> --token <b>", "--token is given 2 times"),
        ("--embedding runs/kat --model empty", "--model empty"),
        ("--embedding runs/kat --model no/such/model", "--model no/such/model"),
        ("--variant fp16", "'text_encoder' cannot be loaded"),  # the tiny model has no such files
        ("--steps 0", "--steps"),
        ("--steps 1001", "--steps 1001"),
        ("--steps many", "--steps"),
        ("--num_images 0", "--num_images"),
        ("--batch_size -1", "--batch_size"),
        ("--height 15", "--height 15"),
        ("--width 0", "--width"),
        ("--seed -1", "--seed"),
        ("--guidance nan", "--guidance"),
        ("--sampler euler", "--sampler"),
        ("--num_image 1", "did you mean --num_images"),
        ("--device cpu --precision fp16", "--precision fp16"),
        ("--score --score_model empty", "--score_model empty"),
        ("--score --embedding loose/learned_embeds.safetensors", "--score"),
    ],
)
def test_mistakes_end_in_one_sentence(run_folder, capsys, argv, named):
    for name in ("empty", "loose"):
        Path(name).mkdir()
    shutil.copy(run_folder / "learned_embeds.safetensors", "loose")
    assert named in refused(argv.split(), capsys)
    assert not (run_folder / "samples").exists()


def test_without_any_run_train_py_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "run train.py first" in refused([], capsys)


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_both_scripts_run_as_programs(script):
    path = Path(sample.__file__).with_name(script)
    done = subprocess.run([sys.executable, str(path), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--seed" in done.stdout
