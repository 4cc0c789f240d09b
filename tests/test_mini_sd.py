"""The embedded model is really trained, its concepts are new to it, and the default run teaches it a word."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import model_utils as mu
import sample
import train

MINI_SD = Path(mu.DEFAULT_MODEL)
sys.path.insert(0, str(MINI_SD))

import pretrain  # noqa: E402
import reader  # noqa: E402
import world  # noqa: E402

UNSEEN = 977  # a seed that pretrain.py does not use


@pytest.fixture(scope="module")
def unseen():
    """Pictures the model has not seen [N, 3, 64, 64] in [-1, 1], and their sentences."""
    images, sentences, _ = world.make_set(500, UNSEEN)
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1, sentences


def test_the_concepts_are_kept_out_of_training():
    rng = random.Random(0)
    looks = {(c.kind, c.colour, c.pattern) for c in world.OBJECT_CONCEPTS.values()}
    for _ in range(20000):
        picture = world.random_picture(rng)
        assert (picture.kind, picture.colour, picture.pattern) not in looks
        assert not (picture.style == "pixel art" and picture.tone)
        assert (picture.style, picture.colour, picture.background) != ("drawing", "white", "blue")
    names = [*world.OBJECT_CONCEPTS, *world.STYLE_CONCEPTS]
    assert all(world.is_held_out(world.concept_picture(name, i)) for name in names for i in range(20))


def test_the_concepts_on_disk_are_those_of_the_world():
    for name in [*world.OBJECT_CONCEPTS, *world.STYLE_CONCEPTS]:
        for i in range(5):
            with Image.open(MINI_SD / "concepts" / name / f"{i}.png") as image:
                assert image.size == (64, 64)
                assert np.array_equal(np.asarray(image), np.asarray(world.draw(world.concept_picture(name, i))))


def test_a_thing_is_shown_before_different_backgrounds_and_nothing_of_it_is_hidden():
    for name, thing in world.OBJECT_CONCEPTS.items():
        backgrounds = [world.concept_picture(name, i).background for i in range(64)]
        assert len(set(backgrounds[:5])) == 5
        assert not {thing.colour, thing.second, thing.accessory_colour} & {*backgrounds}


def test_a_style_is_shown_on_different_things():
    for name in world.STYLE_CONCEPTS:
        assert len({world.concept_picture(name, i).kind for i in range(5)}) == 5


def test_a_picture_is_settled_by_its_description():
    picture = world.random_picture(random.Random(5))
    assert world.draw(picture).tobytes() == world.draw(picture).tobytes()
    assert world.caption(picture, random.Random(1)) == world.caption(picture, random.Random(1))


def test_captions_say_what_is_there():
    picture = world.Picture("cat", "red", "spots", "blue", "crown", "green", "moon", count=2)
    said = world.noun_phrase(picture, random.Random(0), keep=1.0)
    assert said.replace("cats", "cat") == "red cat with blue spots and a green crown on the moon"


def test_every_word_of_the_world_is_one_token():
    tokenizer, rng = mu.load_tokenizer(MINI_SD), random.Random(3)
    words = {word for _ in range(3000) for word in world.caption(world.random_picture(rng), rng).split()}
    assert len(words) > 70
    many = {word for word in words if len(tokenizer(word, add_special_tokens=False).input_ids) > 1}
    assert all("-" in word for word in many), many  # close-up
    assert len(tokenizer) < 1500


def test_the_autoencoder_rebuilds_unseen_pictures(unseen):
    vae = mu.load_vae(MINI_SD, "cpu")
    mean, _ = mu.encode_images(vae, unseen[0], batch=50)
    rebuilt = mu.decode_latents(vae, mean * vae.config.scaling_factor).clamp(-1, 1)
    error = (rebuilt - unseen[0]).square().flatten(1).mean(1) / 4
    assert (-10 * error.log10()).mean() > 26  # dB
    assert (mean * vae.config.scaling_factor).std().item() == pytest.approx(1, abs=0.1)


def test_clip_matches_unseen_pictures_with_their_sentences(unseen):
    clip = sample.load_clip(MINI_SD)
    images, texts = sample.embed(clip, mu.to_pil(unseen[0]), unseen[1])
    top1 = ((images @ texts.T).argmax(1) == torch.arange(len(images))).float().mean()
    assert top1 > 0.5  # of 500; chance is 0.002


def test_clip_t_asks_for_no_more_than_the_sentence_says():
    """True pictures of a concept follow a sentence as well as those of any such thing: stripes are not held against it.

    The sentences are those of CLIP-T, without the word; pictures that do not do what they say are far from them.
    """
    clip, rng = sample.load_clip(MINI_SD), random.Random(UNSEEN)
    for name in world.INITIALIZERS:
        of_any, of_concept, elsewhere = pretrain.clip_t_of_true_pictures(clip, name, rng, 16)
        # what is shown is harder to tell in coarse pixels and line drawings
        as_much, little = (0.9, 0.3) if name in world.OBJECT_CONCEPTS else (0.75, 0.4)
        assert of_concept > as_much * of_any
        assert elsewhere < little * of_any


def test_a_caption_tells_what_it_said():
    rng = random.Random(6)
    for _ in range(2000):
        picture, facts = world.random_picture(rng), {}
        words = world.caption(picture, rng, rng.random(), facts).replace("pixel art", "pixel").split()
        assert all(getattr(picture, name) == value for name, value in facts.items())
        assert ("kind" in facts) == bool({picture.kind, world.PLURALS.get(picture.kind, picture.kind + "s")} & {*words})
        assert ("pattern" in facts) == (picture.pattern in words)
        assert ("accessory" in facts) == (picture.accessory in words)
        assert ("tone" in facts) == ("tones" in words)
        scene = world.SCENES.get(picture.background, f"on a {picture.background} background").split()
        assert ("background" in facts) == (" ".join(scene) in " ".join(words))
        if picture.style == "photo":
            assert ("style" in facts) == (words[-1] != "of")


def test_the_unet_knows_noise_and_listens_to_the_sentence(unseen):
    """Much better than a guess of zero (1.0) on unseen pictures, and better with their sentences than with others."""
    tokenizer, text_encoder = mu.load_tokenizer(MINI_SD), mu.load_text_encoder(MINI_SD, "cpu")
    unet, vae, schedule = mu.load_unet(MINI_SD, "cpu"), mu.load_vae(MINI_SD, "cpu"), mu.load_schedule(MINI_SD)
    latents = mu.encode_images(vae, unseen[0][:200], batch=50)[0] * vae.config.scaling_factor
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = train.draw_timesteps(len(latents), 1000, generator, "uniform")
    with torch.no_grad():
        losses = []
        for sentences in (unseen[1][:200], unseen[1][200:400]):
            embeddings = mu.encode_tokens(text_encoder, mu.tokenize(tokenizer, sentences))
            losses.append(train.inversion_loss(unet, latents, noise, timesteps, embeddings, schedule).mean().item())
    assert losses[0] < 0.12
    assert losses[1] > 1.05 * losses[0]


def test_drawings_show_what_the_sentence_says():
    rng, pictures = random.Random(UNSEEN), []
    while len(pictures) < 24:
        picture = world.random_picture(rng)
        pictures += [picture] if picture.count == 1 and picture.style == "photo" and not picture.tone else []
    sentences = ["a photo of a " + world.noun_phrase(picture, rng, keep=1.0) for picture in pictures]
    parts = sample.Parts(
        mu.load_tokenizer(MINI_SD), mu.load_text_encoder(MINI_SD, "cpu"), mu.load_vae(MINI_SD, "cpu"),
        mu.load_unet(MINI_SD, "cpu"), mu.load_schedule(MINI_SD), {},
    )  # fmt: skip
    how = json.loads((MINI_SD / "model_index.json").read_text())["_sampling"]
    found = reader.read(
        reader.load_reader(), list(sample.draw(parts, sentences, range(24), batch_size=24, progress=False, **how))
    )
    for question, least in (("kind", 20), ("colour", 19), ("background", 22)):
        right = sum(a == getattr(p, question) for a, p in zip(found[question], pictures, strict=True))
        assert right >= least, (question, right)


def test_the_default_run_teaches_the_word(tmp_path, monkeypatch):
    """`python train.py`, shortened: the drawings have come nearer to the pictures than those of `cat` are."""
    monkeypatch.chdir(tmp_path)
    folder = train.train(
        train.parse_options(["--steps", "100", "--log_steps", "4", "--preview_steps", "0", "--no-score"])
    )
    assert str(folder) == "runs/kat"
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["eval_loss"] < 0.97 * rows[0]["eval_loss"]

    parts, seen = sample.load_parts(str(MINI_SD), {str(folder): None}), {}
    pictures = mu.to_pil(data.load_images(MINI_SD / "concepts" / "kat", 64)[0])
    look = lambda word, images: seen.update({word: reader.read(reader.load_reader(), images[:16])})  # noqa: E731
    how = json.loads((MINI_SD / "model_index.json").read_text())["_sampling"] | {"batch_size": 16, "progress": False}
    scores = sample.score_embedding(
        parts, sample.load_clip(MINI_SD), pictures, ["cat", "<kat>"], drawings=16, look=look, **how
    )
    before, after = (scores["words"][word]["clip_i"]["mean"] for word in ("cat", "<kat>"))
    assert after > before + 0.3 * (scores["training_images"] - before)
    striped = [seen[word]["pattern"].count("stripes") for word in ("cat", "<kat>")]
    assert striped[1] >= 12 > striped[0]
    assert seen["<kat>"]["kind"].count("cat") >= 12


def test_drawing_advice_of_the_model_folder():
    how = json.loads((MINI_SD / "model_index.json").read_text())["_sampling"]
    assert set(how) <= {"steps", "guidance", "sampler"} and 1 <= how["steps"] <= 25
