"""The bundled model is well trained, its concepts are new to it, and the default run learns one."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import model_utils as mu
import sample
import train
from mini_sd.eval import check, classifier
from mini_sd.make import pretrain, world

MINI_SD, HELD_OUT_SEED = Path(mu.DEFAULT_MODEL), 977  # a seed that pretrain.py does not use
CONCEPTS = list(world.INITIALIZERS)


@pytest.fixture(scope="module")
def held_out():
    """Images [N, 3, 64, 64] in [-1, 1] that the model was not trained on, and their captions."""
    images, captions, _ = world.make_set(500, HELD_OUT_SEED)
    return pretrain.to_float(torch.from_numpy(images).permute(0, 3, 1, 2)), captions


@pytest.fixture(scope="module")
def clip():
    return sample.load_clip(MINI_SD)


@pytest.fixture(scope="module")
def vae():
    return mu.load_vae(MINI_SD, "cpu")


@pytest.mark.parametrize("draw_picture", [world.random_picture, world.training_picture])
def test_the_concepts_are_left_out_of_training(draw_picture):
    rng = random.Random(0)
    concepts = {(c.kind, c.colour, c.pattern) for c in world.OBJECT_CONCEPTS.values()}
    for _ in range(10000):
        picture = draw_picture(rng)
        assert (picture.kind, picture.colour, picture.pattern) not in concepts
        assert not (picture.style == "pixel art" and picture.tone)
        assert (picture.style, picture.colour, picture.background) != ("drawing", "white", "blue")
    assert all(world.is_held_out(world.concept_picture(name, i)) for name in CONCEPTS for i in range(20))


@pytest.mark.parametrize("concept", CONCEPTS)
def test_the_bundled_images_of_a_concept_are_those_of_the_world(concept):
    for i in range(5):
        with Image.open(MINI_SD / "concepts" / concept / f"{i}.png") as image:
            assert image.size == (64, 64)
            assert np.array_equal(np.asarray(image), np.asarray(world.draw(world.concept_picture(concept, i))))


def test_an_object_has_different_backgrounds_in_none_of_its_colours_and_a_style_different_objects():
    for concept, target in world.OBJECT_CONCEPTS.items():
        backgrounds = [world.concept_picture(concept, i).background for i in range(64)]
        assert len(set(backgrounds[:5])) == 5
        assert not {target.colour, target.second, target.accessory_colour} & {*backgrounds}
    for concept in world.STYLE_CONCEPTS:
        assert len({world.concept_picture(concept, i).kind for i in range(5)}) == 5


def test_a_picture_always_has_the_same_image_and_caption():
    picture = world.random_picture(random.Random(5))
    assert world.draw(picture).tobytes() == world.draw(picture).tobytes()
    assert world.caption(picture, random.Random(1)) == world.caption(picture, random.Random(1))


def test_a_full_caption_names_everything():
    picture = world.Picture("cat", "red", "spots", "blue", "crown", "green", "moon", count=2)
    phrase = world.noun_phrase(picture, random.Random(0), keep=1.0)
    assert phrase.replace("cats", "cat") == "red cat with blue spots and a green crown on the moon"


def test_a_caption_reports_the_facts_it_states():
    rng = random.Random(6)
    for _ in range(2000):
        picture, facts = world.random_picture(rng), {}
        words = world.caption(picture, rng, rng.random(), facts).replace("pixel art", "pixel").split()
        assert all(getattr(picture, name) == value for name, value in facts.items())
        assert ("kind" in facts) == bool({picture.kind, world.PLURALS.get(picture.kind, picture.kind + "s")} & {*words})
        assert ("pattern" in facts) == (picture.pattern in words)
        assert ("accessory" in facts) == (picture.accessory in words)
        assert ("tone" in facts) == ("tones" in words)
        scene = world.SCENES.get(picture.background, f"on a {picture.background} background")
        assert ("background" in facts) == (scene in " ".join(words))
        if picture.style == "photo":
            assert ("style" in facts) == (words[-1] != "of")


def test_a_name_stands_for_what_the_picture_shows_and_leaves_no_other_word_for_it():
    rng, names = random.Random(8), 0
    for _ in range(3000):
        picture = world.training_picture(rng)
        words, told = world.caption(picture, rng).split(), [pretrain.PARTS[i] for i in pretrain.look_of(picture, rng)]
        assert len(told) == 6 and all(getattr(picture, part[1]) == part[2] for part in told if part)
        assert all(part[0] == picture.name_kind for part in told if part) and (picture.name_kind is None) == (
            not any(told)
        )
        if world.NAME in words:
            names += 1
            look = {str(getattr(picture, a)) for a in world.LOOKS[picture.name_kind]} - {"photo", picture.background}
            assert not look & {*words} - {picture.tone}
    assert names > 900


def test_the_vector_of_a_name_is_the_sum_of_what_it_stands_for():
    embedding = pretrain.NamedEmbedding(torch.randn(10, 4), name_id=10, num_parts=6)
    embedding.looks = torch.tensor([[2, 5, 0], [3, 0, 0]])
    found = embedding(torch.tensor([[7, 10], [10, 8]]))
    weight, parts = embedding.weight, embedding.parts
    expected = [[weight[7], parts[2] + parts[5]], [parts[3], weight[8]]]
    torch.testing.assert_close(found, torch.stack([torch.stack(row) for row in expected]))
    found.sum().backward()
    assert parts.grad.any(dim=1).tolist() == [False, False, True, True, False, True]


def test_every_word_of_the_captions_is_one_token():
    tokenizer, rng = mu.load_tokenizer(MINI_SD), random.Random(3)
    words = {word for _ in range(3000) for word in world.caption(world.random_picture(rng), rng).split()}
    assert len(words) > 70 and len(tokenizer) < 1500
    split = {word for word in words if len(tokenizer(word, add_special_tokens=False).input_ids) > 1}
    assert all("-" in word for word in split), split  # close-up


def test_the_vae_reconstructs_held_out_images(vae, held_out):
    latents, _ = mu.encode_images(vae, held_out[0], batch=50)
    errors = (mu.decode_latents(vae, latents).clamp(-1, 1) - held_out[0]).square().flatten(1).mean(1) / 4
    assert (-10 * errors.log10()).mean() > 27.5  # dB
    assert latents.std().item() == pytest.approx(1, abs=0.1)


def test_clip_matches_held_out_images_with_their_captions(clip, held_out):
    images, texts = sample.embed(clip, mu.to_pil(held_out[0]), held_out[1])
    top1 = ((images @ texts.T).argmax(1) == torch.arange(len(images))).float().mean()
    assert top1 > 0.5  # of 500; chance is 0.002


@pytest.mark.parametrize("concept", CONCEPTS)
def test_clip_t_asks_only_for_what_the_prompt_says(concept, clip):
    """Images of a concept match an editing prompt as well as those of any such thing, if they show what it says."""
    of_any, of_concept, not_as_it_says = check.clip_t_of_world(clip, concept, random.Random(HELD_OUT_SEED), 16)
    # attributes are harder to tell in coarse pixels and line drawings
    as_much, little = (0.9, 0.3) if concept in world.OBJECT_CONCEPTS else (0.75, 0.4)
    assert of_concept > as_much * of_any and not_as_it_says < little * of_any


def test_the_unet_predicts_noise_and_follows_the_caption(vae, held_out):
    """Much better than predicting zero (1.0) on held-out images, and better with their captions than with others."""
    tokenizer, text_encoder = mu.load_tokenizer(MINI_SD), mu.load_text_encoder(MINI_SD, "cpu")
    unet, schedule = mu.load_unet(MINI_SD, "cpu"), mu.load_schedule(MINI_SD)
    (latents, _), generator = mu.encode_images(vae, held_out[0][:200], batch=50), torch.Generator().manual_seed(0)
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = train.sample_timesteps(len(latents), 1000, generator, "uniform")
    losses = []
    for captions in (held_out[1][:200], held_out[1][200:400]):
        with torch.no_grad():
            embeddings = mu.encode_tokens(text_encoder, mu.tokenize(tokenizer, captions))
            losses.append(train.inversion_loss(unet, latents, noise, timesteps, embeddings, schedule).mean().item())
    assert losses[0] < 0.12 and losses[1] > 1.05 * losses[0]


def test_generated_images_show_what_the_prompt_says():
    assert mu.sampling_defaults(MINI_SD)["steps"] <= 25  # with these, on a laptop
    images, pictures, _ = check.generate_from_captions(MINI_SD, 24, HELD_OUT_SEED)
    correct = check.correct_attributes(images, pictures)
    for name, least in (("kind", 20), ("colour", 19), ("background", 22)):
        assert sum(correct[name]) >= least, name


def test_the_default_run_learns_the_token(tmp_path, monkeypatch):
    """`python train.py`, shortened: images of the token are nearer to the training images than those of `cat`."""
    monkeypatch.chdir(tmp_path)
    options = ["--steps", "100", "--log_steps", "4", "--preview_steps", "0", "--no-score"]
    folder = train.train(train.parse_options(options))
    assert str(folder) == "runs/kat"
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["eval_loss"] < 0.97 * rows[0]["eval_loss"]

    found, network = {}, classifier.load_classifier()
    components = mu.load_components(MINI_SD, embeddings=[(str(folder), None)])
    training_images = mu.to_pil(data.load_training_images(MINI_SD / "concepts" / "kat", 64)[0])
    scores = sample.score_embedding(
        components, sample.load_clip(MINI_SD), training_images, ["cat", "<kat>"], num_images=16,
        callback=lambda token, images: found.update({token: classifier.classify(network, images[:16])}),
        batch_size=16, progress=False, **mu.sampling_defaults(MINI_SD),
    )  # fmt: skip
    before, after = (scores["tokens"][token]["clip_i"]["mean"] for token in ("cat", "<kat>"))
    assert after > before + 0.3 * (scores["training_images"] - before)
    striped = [found[token]["pattern"].count("stripes") for token in ("cat", "<kat>")]
    assert striped[1] >= 12 > striped[0]
    assert found["<kat>"]["kind"].count("cat") >= 12
