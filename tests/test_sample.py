"""Drawing on a tiny model: equal to diffusers' pipeline, to the last digit of a pixel; files, scores, command line."""

import json
import os
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import model_utils as mu
import sample
from sample import draw, load_parts

SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "dpm++": diffusers.DPMSolverMultistepScheduler,
}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Two embedding files: <kat> of three vectors, <pup> of one."""
    folder, generator = tmp_path_factory.mktemp("words"), torch.Generator().manual_seed(3)
    files = []
    for token, vectors in (("<kat>", 3), ("<pup>", 1)):
        files.append(str(folder / f"{token[1:-1]}.safetensors"))
        mu.save_embedding(files[-1], token, torch.randn(vectors, 32, generator=generator), "tiny")
    return files


@pytest.fixture(scope="module")
def theirs(tiny_model, words):
    """diffusers' pipeline, with the same words."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_model, low_cpu_mem_usage=False)
    for file in words:
        pipe.load_textual_inversion(file)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def parts(tiny_model, words):
    return load_parts(tiny_model, dict.fromkeys(words))


def reschedule(model, folder, **changes):
    """Copy the model's scheduler_config.json with changes (None: the file does not say) -> the new model folder."""
    config = json.loads(Path(model, "scheduler", "scheduler_config.json").read_text()) | changes
    (folder / "scheduler").mkdir()
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return folder


def assert_same_pictures(ours, theirs):
    assert len(ours) == len(theirs)
    for mine, reference in zip(ours, theirs, strict=True):
        difference = np.abs(np.asarray(mine, dtype=int) - np.asarray(reference, dtype=int))
        assert mine.size == reference.size and difference.max() <= 1  # of 255
        assert np.asarray(mine).std() > 5  # there is something in it


def compare(pipe, parts, model, sampler, prompts, steps, guidance, negative_prompt=""):
    """Draw with diffusers and with ours, from the same seeds. The noise schedule is taken from the folder `model`."""
    loaded = diffusers.PNDMScheduler.from_pretrained(model, subfolder="scheduler")
    pipe.scheduler = SCHEDULERS[sampler].from_config(loaded.config)
    seeds = range(7, 7 + len(prompts))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    negatives = [negative_prompt] * len(prompts)
    settings = {"num_inference_steps": steps, "guidance_scale": guidance, "negative_prompt": negatives}
    expected = pipe(prompts, generator=generators, **settings).images
    parts = parts._replace(schedule=mu.load_schedule(model))
    assert_same_pictures(list(draw(parts, prompts, seeds, negative_prompt, steps, guidance, sampler)), expected)


PROMPTS = ["a photo of a <kat> and a <pup>", "two dogs at night"]


@pytest.mark.parametrize("negative_prompt", ["", "a red toy"])
@pytest.mark.parametrize("guidance", [0.0, 1.0, 7.5])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_pictures_equal_diffusers(theirs, parts, tiny_model, sampler, guidance, negative_prompt):
    for steps in (1, 4, 16):
        compare(theirs, parts, tiny_model, sampler, PROMPTS, steps, guidance, negative_prompt)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_pictures_equal_diffusers_for_every_schedule(
    theirs, parts, tiny_model, tmp_path, sampler, spacing, prediction_type
):
    model = reschedule(tiny_model, tmp_path, timestep_spacing=spacing, prediction_type=prediction_type)
    compare(theirs, parts, model, sampler, PROMPTS[:1], 7, 5.0)


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_pictures_of_mini_sd_equal_diffusers(tmp_path, sampler):
    rows = torch.randn(2, 128, generator=torch.Generator().manual_seed(3)) / 50
    mu.save_embedding(tmp_path / "kat.safetensors", "<kat>", rows, "mini_sd")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        mu.DEFAULT_MODEL, low_cpu_mem_usage=False, torch_dtype=torch.float32
    )
    pipe.load_textual_inversion(str(tmp_path / "kat.safetensors"))
    pipe.set_progress_bar_config(disable=True)
    ours, prompts = load_parts(mu.DEFAULT_MODEL, {tmp_path / "kat.safetensors": None}), ["a photo of a <kat> at night"]
    for steps, guidance, negative_prompt in ((1, 0.0, ""), (5, 1.0, ""), (12, 7.5, ""), (9, 7.5, "a red hat")):
        compare(pipe, ours, mu.DEFAULT_MODEL, sampler, prompts, steps, guidance, negative_prompt)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm++"])
def test_pictures_equal_diffusers_without_a_spacing(theirs, parts, tiny_model, tmp_path, sampler):
    """Stable Diffusion 1.4's file names none: each of diffusers' schedulers then has a default of its own."""
    compare(theirs, parts, reschedule(tiny_model, tmp_path, timestep_spacing=None), sampler, PROMPTS[:1], 7, 5.0)


def test_latents_equal_diffusers(theirs, parts, tiny_model):
    """No rounding to pixels, and another size than the model's own."""
    loaded = diffusers.PNDMScheduler.from_pretrained(tiny_model, subfolder="scheduler")
    theirs.scheduler = SCHEDULERS["dpm++"].from_config(loaded.config)
    latents = torch.randn(2, 4, 12, 8, generator=torch.Generator().manual_seed(0))
    settings = {"num_inference_steps": 15, "output_type": "latent", "height": 24, "width": 16}
    expected = theirs(PROMPTS, latents=latents, **settings).images
    text = mu.encode_tokens(parts.text_encoder, mu.tokenize(parts.tokenizer, PROMPTS, parts.placeholders))
    empty = mu.encode_tokens(parts.text_encoder, mu.tokenize(parts.tokenizer, ["", ""]))
    ours = sample.sample_latents(parts.unet, parts.schedule, text, empty, latents, 15, 7.5, "dpm++")
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    assert not ours.requires_grad


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_a_picture_does_not_depend_on_the_batch_size(parts, sampler):
    prompts, seeds = [*PROMPTS, "a <pup>", "a cat", "a toy"], [5, 9, 2, 7, 7]
    drawn = [list(draw(parts, prompts, seeds, "", 4, 4.0, sampler, batch_size=size)) for size in (1, 2, 5)]
    for pictures in drawn[1:]:
        assert_same_pictures(pictures, drawn[0])


def test_the_vae_goes_back_where_it_waited(tiny_model, words):
    parts = load_parts(tiny_model, dict.fromkeys(words))
    moves, to = [], parts.vae.to
    parts.vae.to = lambda device: moves.append(str(device)) or to(device)
    assert [image.size for image in draw(parts, ["a cat"], [0], steps=1, height=8, width=24)] == [(24, 8)]
    assert moves == ["cpu", "cpu"]


@pytest.mark.parametrize("size", [{"height": 17}, {"width": 1}, {"height": -16}])
def test_sizes_that_do_not_fit_are_refused(parts, size):
    with pytest.raises(mu.UserError, match="--height .* --width .* multiples of 2"):
        next(draw(parts, ["a cat"], [0], **size))


# --- Picture files ----------------------------------------------------------------------------------------------------


def test_image_grid():
    images = [Image.new("RGB", (10, 8), (50 * k, 0, 0)) for k in range(5)]
    sheet = sample.image_grid(images, 3)
    plain = np.asarray(sheet)
    for k in range(5):
        assert (plain == [50 * k, 0, 0]).all(-1).sum() == 80
    assert (plain != 255).any(-1).sum() == 400
    captioned = sample.image_grid(images, 3, ["", "two, 夜"])
    assert captioned.width == sheet.width and captioned.height > sheet.height
    assert (np.asarray(captioned)[:10] == plain[:10]).all()  # the first row has no caption and keeps its place
    assert (np.asarray(captioned)[-10:] == plain[-10:]).all()


def test_long_captions_are_wrapped_not_cut():
    images = [Image.new("RGB", (64, 8), "black")] * 2
    one, many = (
        sample.image_grid(images, 1, [caption, ""]) for caption in ("a cat", "a painting in the style of <kat>")
    )
    assert many.size == (one.width, one.height + 3 * 14)  # 4 lines instead of 1: 11 letters are as wide as the picture


def test_settings_are_in_the_png(tmp_path):
    settings = {"prompt": "a <kat> at night, 夜の猫", "seed": 3, "guidance": 7.5}
    sample.save_png(Image.new("RGB", (4, 4), "red"), tmp_path / "a.png", settings)
    with Image.open(tmp_path / "a.png") as image:
        assert image.text == {key: str(value) for key, value in settings.items()}
        assert image.getpixel((0, 0)) == (255, 0, 0)


# --- Scores -----------------------------------------------------------------------------------------------------------


def noise_pictures(count, size=(16, 16), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, size[1], size[0], 3), dtype=np.uint8)
    return [Image.fromarray(picture) for picture in pixels]


@pytest.mark.parametrize("size", [(16, 16), (64, 64), (9, 9)])
def test_clip_embeddings_equal_transformers(tiny_model, size):
    clip = sample.load_clip(tiny_model)
    images, sentences = noise_pictures(3, size), ["a photo of a cat", "two dogs"]
    pixels = CLIPImageProcessorPil(**clip.preprocessing)(images, return_tensors="pt")
    tokens = clip.tokenizer(sentences, padding=True, return_tensors="pt")
    expected = [clip.model.get_image_features(**pixels), clip.model.get_text_features(**tokens)]
    old_form = clip._replace(preprocessing=clip.preprocessing | {"size": 16, "crop_size": 16})
    for judge in (clip, old_form):
        for ours, output in zip(sample.embed(judge, images, sentences), expected, strict=True):
            unit = output.pooler_output / output.pooler_output.norm(dim=-1, keepdim=True)
            torch.testing.assert_close(ours, unit, rtol=1e-4, atol=1e-5)


def test_scores_are_the_papers(tiny_model, words, monkeypatch):
    """CLIP-I: mean of all pairs; CLIP-T: each drawing with its sentence, the word left out; errors by hand."""
    clip, references = sample.load_clip(tiny_model), noise_pictures(3, seed=1)
    asked = {}

    def fake_draw(parts, prompts, seeds, **options):
        asked[len(asked)] = (prompts, list(seeds), options)
        return iter(noise_pictures(len(prompts), seed=len(asked)))

    monkeypatch.setattr(sample, "draw", fake_draw)
    scores = sample.score_embedding(None, clip, references, ["cat", "<kat>"], "object", 16, seed=5, steps=3)
    assert list(scores["words"]) == ["cat", "<kat>"] and asked[0][1] == asked[1][1] == list(range(5, 5 + 32))
    prompts, _, options = asked[1]
    assert options == {"steps": 3} and prompts[:16] == ["a photo of a <kat>"] * 16
    assert prompts[16:18] == ["a photo of two <kat>"] * 2 and len(set(prompts[16:])) == 8

    sentences = [prompt.replace("<kat>", "").replace("  ", " ").strip() for prompt in prompts[16:]]
    drawn, targets = sample.embed(clip, noise_pictures(32, seed=2), sentences)
    known, _ = sample.embed(clip, references, sentences)
    cosines = torch.cosine_similarity(drawn[:16, None], known[None], dim=-1)  # [16, 3]
    follow = torch.cosine_similarity(drawn[16:], targets, dim=-1)  # [16]
    found = scores["words"]["<kat>"]
    assert found["clip_i"]["mean"] == pytest.approx(cosines.mean().item(), abs=1e-5)
    assert found["clip_i"]["error"] == pytest.approx(cosines.mean(1).std().item() / 4, rel=1e-3)
    assert found["clip_t"]["mean"] == pytest.approx(follow.mean().item(), abs=1e-5)
    within = (follow.view(8, 2) - follow.view(8, 2).mean(1, keepdim=True)).pow(2).sum(1)  # variance of two, n - 1 = 1
    assert found["clip_t"]["error"] == pytest.approx((within.mean() / 16).sqrt().item(), rel=1e-3)
    assert found["sentences"]["a photo of two {}"] == pytest.approx(follow.view(8, 2)[0].mean().item(), abs=1e-5)
    pairs = [(known[i] @ known[j]).item() for i in range(3) for j in range(3) if i != j]
    assert scores["training_images"] == pytest.approx(sum(pairs) / 6, abs=1e-5)


def test_the_judge_can_be_chosen(tiny_model, tmp_path):
    own = sample.load_clip(tiny_model)
    assert own.name == os.path.join(tiny_model, "clip")
    chosen = tmp_path / "judge"
    shutil.copytree(own.name, chosen)
    mu.load_tokenizer(tiny_model).save_pretrained(chosen)
    assert sample.load_clip(tiny_model, str(chosen)).name == str(chosen)
    without = tmp_path / "without"
    without.mkdir()
    for model, name in ((without, None), (tiny_model, str(without)), (tiny_model, str(tmp_path / "missing"))):
        with pytest.raises(mu.UserError, match="--score_model"):  # offline: OpenAI's is not to be had
            sample.load_clip(model, name)
    preprocessing = chosen / "preprocessor_config.json"
    preprocessing.write_text(preprocessing.read_text().replace('"crop_size"', '"other"'))
    damaged = shutil.copytree(own.name, tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for name in (chosen, damaged):
        with pytest.raises(mu.UserError, match="--score_model"):
            sample.load_clip(tiny_model, str(name))


# --- Command line -----------------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tiny_model, tmp_path, monkeypatch):
    """What train.py leaves behind, in the current folder: runs/old and the newer runs/kat."""
    monkeypatch.chdir(tmp_path)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for k, picture in enumerate(noise_pictures(3, (20, 16))):
        picture.save(pictures / f"{k}.png")
    for age, name in enumerate(("kat", "old")):
        folder = tmp_path / "runs" / name
        rows = torch.randn(2, 32, generator=torch.Generator().manual_seed(age))
        mu.save_embedding(folder / "learned_embeds.safetensors", f"<{name}>", rows, tiny_model)
        config = {"model": tiny_model, "placeholder_token": f"<{name}>", "initializer_token": "cat", "revision": None}
        config |= {"learnable_property": "object", "images": str(pictures), "resolution": 16, "variant": None}
        (folder / "config.json").write_text(json.dumps(config))
        os.utime(folder / "learned_embeds.safetensors", (1e9 - age, 1e9 - age))
    return tmp_path / "runs" / "kat"


def test_without_arguments_the_newest_word_is_drawn(run_folder, capsys):
    sample.main(["--steps", "2"])
    drawings = sorted(path.name for path in (run_folder / "drawings").iterdir())
    assert drawings == ["0000.png", "0001.png", "0002.png", "0003.png", "grid.png"]
    assert "4 drawings in " in capsys.readouterr().out
    with Image.open(run_folder / "drawings" / "0002.png") as image:
        text = image.text
    assert text["prompt"] == "a photo of a <kat>" and text["seed"] == "2" and text["negative_prompt"] == ""
    assert (text["sampler"], text["steps"], text["guidance"]) == ("dpm++", "2", "7.5")
    assert "<kat>" in text["embeddings"] and str(run_folder / "learned_embeds.safetensors")[-30:] in text["embeddings"]
    assert text["model"].endswith("tiny")


def test_nothing_is_overwritten_and_a_seed_is_a_picture(run_folder):
    sample.main(["--steps", "2", "--num_images", "3"])
    before = {path: path.read_bytes() for path in (run_folder / "drawings").iterdir()}
    sample.main(["--steps", "2", "--num_images", "2", "--seed", "1", "--batch_size", "1"])
    for path, content in before.items():
        assert path.read_bytes() == content
    new = sorted({path.name for path in (run_folder / "drawings").iterdir()} - {path.name for path in before})
    assert new == ["0003.png", "0004.png", "grid2.png"]
    with Image.open(run_folder / "drawings/0001.png") as old, Image.open(run_folder / "drawings/0003.png") as again:
        assert_same_pictures([again], [old])  # both have seed 1


def test_several_words_and_prompts(run_folder, tiny_model, capsys):
    prompts = ["a <kat> and a <dog>", "a toy"]
    options = ["--embedding", "runs/kat", "--embedding", "runs/old/learned_embeds.safetensors", "--token", "<kat>"]
    arguments = [*options, "--token", "<dog>", "--prompt", prompts[0], "--prompt", prompts[1], "--out", "drawn"]
    sample.main([*arguments, "--num_images", "2", "--steps", "3", "--sampler", "ddpm", "--guidance_scale", "3"])
    assert "'a toy' holds no learned word" in capsys.readouterr().err
    files = {"runs/kat": None, "runs/old": "<dog>"}
    parts = load_parts(tiny_model, files)
    expected = list(draw(parts, [p for p in prompts for _ in range(2)], range(4), "", 3, 3.0, "ddpm"))
    drawn = [Image.open(run_folder.parents[1] / "drawn" / f"{k:04d}.png") for k in range(4)]
    assert_same_pictures(drawn, expected)
    assert drawn[3].text["prompt"] == "a toy" and drawn[3].text["seed"] == "3"


def test_the_model_folder_may_advise_settings(run_folder, tiny_model, tmp_path):
    model = tmp_path / "advised"
    shutil.copytree(tiny_model, model)
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {"_sampling": {"guidance": 4, "steps": 3}}))
    sample.main(["--model", str(model), "--num_images", "1", "--out", "a"])
    sample.main(["--model", str(model), "--num_images", "1", "--out", "b", "--steps", "2"])
    found = [Image.open(tmp_path / folder / "0000.png").text for folder in ("a", "b")]
    assert [(text["guidance"], text["steps"]) for text in found] == [("4", "3"), ("4", "2")]
    assert not (tmp_path / "a" / "grid.png").exists()  # a single drawing needs none
    diffusers.StableDiffusionPipeline.from_pretrained(model, low_cpu_mem_usage=False)  # does not mind


def test_the_embedding_remembers_its_model(run_folder):
    (run_folder / "config.json").unlink()
    sample.main(["--steps", "1", "--num_images", "1"])
    assert Image.open(run_folder / "drawings" / "0000.png").text["model"].endswith("tiny")


def test_score(run_folder, capsys):
    sample.main(["--score", "--num_images", "4", "--steps", "2", "--batch_size", "8"])
    scores = json.loads((run_folder / "scores.json").read_text())
    assert list(scores["words"]) == ["cat", "<kat>"] and scores["steps"] == 2 and scores["drawings"] == 4
    for found in scores["words"].values():
        for score in ("clip_i", "clip_t"):
            assert -1 <= found[score]["mean"] <= 1 and 0 < found[score]["error"] < 1
        assert len(found["sentences"]) == 8
    out = capsys.readouterr().out
    assert f"{scores['words']['<kat>']['clip_i']['mean']:.3f}" in out and "scores.json" in out and "CLIP-T" in out


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--embedding", "no/such/folder"], "--embedding"),
        (["--embedding", "empty"], "--embedding"),
        (["--model", "empty"], "--model"),
        (["--steps", "0"], "--steps"),
        (["--num_images", "0"], "--num_images"),
        (["--batch_size", "-1"], "--batch_size"),
        (["--height", "15"], "--height"),
        (["--height", "0"], "--height"),
        (["--seed", "-1"], "--seed"),
        (["--guidance", "nan"], "--guidance"),
        (["--embedding", "runs/kat", "--embedding", "runs/kat"], "given twice"),
        (["--token", "cat"], "--token"),
        (["--token", "<a>", "--token", "<b>"], "--token"),
        (["--device", "cpu", "--precision", "fp16"], "--precision"),
        (["--score", "--score_model", "empty"], "--score_model"),
        (["--score", "--embedding", "loose/learned_embeds.safetensors"], "--score"),
        (["--embedding", "runs/kat", "--embedding", "runs/kat/learned_embeds.safetensors"], "--token"),
    ],
)
def test_mistakes_get_one_clear_sentence(run_folder, capsys, arguments, sentence):
    for name in ("empty", "loose"):
        (run_folder.parents[1] / name).mkdir()
    shutil.copy(run_folder / "learned_embeds.safetensors", run_folder.parents[1] / "loose")
    with pytest.raises(SystemExit) as stop:
        sample.main(arguments)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("error: ") and sentence in error
    assert not (run_folder / "drawings").exists()


def test_nothing_learned_yet(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        sample.main([])
    assert stop.value.code == 2 and "run train.py first" in capsys.readouterr().err


def test_two_words_of_one_name_are_told_apart_by_token(run_folder, capsys):
    other = run_folder.with_name("kat-2")
    shutil.copytree(run_folder, other)
    both = ["--embedding", str(run_folder), "--embedding", str(other)]
    with pytest.raises(SystemExit):
        sample.main(both)
    assert "two embeddings are called '<kat>'" in capsys.readouterr().err
