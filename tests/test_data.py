"""Images of every kind become upright, unsquashed squares in sRGB on white, and each comes with its own captions.

What cannot be read is named and left out. All that is random in a step's examples comes from one generator.
"""

import math
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import data
import model_utils as mu
from model_utils import UserError

RED, GREEN, BLUE, SAND = COLOURS = [(200, 30, 40), (20, 160, 60), (40, 60, 220), (230, 200, 120)]
BLACK, WHITE = (0, 0, 0), (255, 255, 255)


def quarters(values, size=(48, 48), dtype=np.uint8):
    """An image of four flat quarters: top left, top right, bottom left, bottom right."""
    x, y = np.meshgrid(np.arange(size[0]) >= size[0] / 2, np.arange(size[1]) >= size[1] / 2)
    return Image.fromarray(np.array(values, dtype)[2 * y + x])


def saved(path, image, **options):
    image.save(path, **options)
    return path


def assert_quarters(path, expected, atol=0):
    """The quarters of an image file have these colours, as read_image reads it."""
    array = data.read_image(path, 24)[..., :3].astype(int)
    np.testing.assert_allclose(array[[6, 6, 18, 18], [6, 18, 6, 18]], expected, atol=atol)


# --- Reading one image ------------------------------------------------------------------------------------------------

GREYS, ALPHAS = [0, 90, 180, 255], [255, 128, 0, 40]
GREY, OPACITY = np.array([[value] * 3 for value in GREYS]), np.array(ALPHAS)[:, None] / 255
COLOURS_ON_WHITE, GREY_ON_WHITE = (255 + (np.array(colours) - 255) * OPACITY for colours in (COLOURS, GREY))
RGB, PALETTE, LA = quarters(COLOURS), quarters([0, 1, 2, 3]), Image.merge("LA", [quarters(GREYS), quarters(ALPHAS)])
PALETTE.putpalette(sum(COLOURS, ()))
RGBA = RGB.copy()
RGBA.putalpha(quarters(ALPHAS))
INKS = [(0, 200, 180, 40), (220, 0, 100, 60), (0, 0, 0, 255), (0, 0, 0, 0)]
CMYK = Image.frombytes("CMYK", (48, 48), quarters(INKS).tobytes())
PRINTED = [[(255 - ink) * (255 - black) / 255 for ink in colours] for *colours, black in INKS]
LOSSLESS, FINEST = {"lossless": True, "exact": True}, {"quality": 100, "subsampling": 0}
ANIMATION = {"save_all": True, "append_images": [Image.new("RGB", RGB.size, RED)], "duration": 50}
KINDS = {  # image, suffix, options of save, expected colours, tolerance: 1 where alpha is rounded, 4 if lossy
    "1": (quarters([True, False, False, True], dtype=bool), "png", {}, [WHITE, BLACK, BLACK, WHITE], 0),
    "L": (quarters(GREYS), "png", {}, GREY, 0),
    "LA": (LA, "png", {}, GREY_ON_WHITE, 1),
    "P": (PALETTE, "png", {}, COLOURS, 0),
    "P, half transparent": (PALETTE, "png", {"transparency": bytes(ALPHAS)}, COLOURS_ON_WHITE, 1),
    "P, GIF": (PALETTE, "gif", {"transparency": 2}, [RED, GREEN, WHITE, SAND], 0),
    "PA": (PALETTE.convert("PA"), "tif", {}, COLOURS, 0),
    "RGB, one colour transparent": (RGB, "png", {"transparency": GREEN}, [RED, WHITE, BLUE, SAND], 0),
    "RGB, BMP": (RGB, "bmp", {}, COLOURS, 0),
    "RGB, AVIF": (RGB, "avif", {"quality": 100}, COLOURS, 4),
    "RGBA": (RGBA, "png", {}, COLOURS_ON_WHITE, 1),
    "RGBA, WebP": (RGBA, "webp", LOSSLESS, COLOURS_ON_WHITE, 1),
    "YCbCr": (RGB.convert("YCbCr"), "tif", {}, COLOURS, 4),
    "CMYK, JPEG": (CMYK, "jpg", FINEST, PRINTED, 4),
    "animated PNG": (RGB, "png", ANIMATION, COLOURS, 0),
    "animated GIF": (RGB, "gif", ANIMATION, COLOURS, 0),
    "animated WebP": (RGB, "webp", ANIMATION | LOSSLESS, COLOURS, 0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_and_the_first_frame_of_an_animation_keep_their_colours(tmp_path, kind):
    image, suffix, options, expected, atol = KINDS[kind]
    assert_quarters(saved(tmp_path / f"image.{suffix}", image, **options), expected, atol)


# What a camera stores of the upright image, in the order of EXIF's orientations 2 to 8
STORED = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_90 TRANSVERSE ROTATE_270".split()


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_images_are_turned_upright_and_damaged_exif_is_ignored(tmp_path, suffix):
    options = FINEST if suffix == "jpg" else {}
    for orientation, turn in enumerate(STORED, start=2):
        exif = Image.Exif()
        exif[0x0112] = orientation
        upright = quarters(COLOURS, (60, 42)).convert("RGB" if suffix == "jpg" else "RGBA")
        stored = upright.transpose(Image.Transpose[turn])
        assert_quarters(saved(tmp_path / f"{orientation}.{suffix}", stored, exif=exif, **options), COLOURS, 4)
    for exif in (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff") if suffix != "tif" else ():
        assert_quarters(saved(tmp_path / f"damaged.{suffix}", RGB, exif=exif, **options), COLOURS, 4)


@pytest.mark.parametrize("size", [(1, 51), (64, 64), (300, 121), (121, 300), (1001, 700)])
def test_the_center_square_is_resized_as_lanczos_in_floating_point(tmp_path, size):
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    pixels = (127.5 + 60 * np.sin(x / 1.5) + 50 * np.sin(y / 6)).astype(np.uint8)  # fine waves: a poor resize aliases
    left, top, side = (size[0] - min(size)) / 2, (size[1] - min(size)) / 2, min(size)
    exact = Image.fromarray(pixels.astype(np.float32))
    exact = exact.resize((64, 64), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    array = data.read_image(saved(tmp_path / "waves.png", Image.fromarray(pixels)), 64)
    np.testing.assert_allclose(array[..., 0], np.asarray(exact).clip(0, 255), atol=5)  # large ones are first averaged


def test_photos_of_200_megapixels_are_decoded_small_without_visible_loss(tmp_path, monkeypatch):
    decoded, to_square = [], data.to_square
    monkeypatch.setattr(data, "to_square", lambda image, size: decoded.append(image.size) or to_square(image, size))
    huge = Image.new("L", (15_000, 14_000), 60)
    huge.paste(200, (7_500, 0, 15_000, 14_000))
    assert_quarters(saved(tmp_path / "huge.jpg", huge), [(60,) * 3, (200,) * 3] * 2, 2)
    waves = np.tile((127.5 + 100 * np.sin(np.arange(1200) * 2 * np.pi / 20)).astype(np.uint8), (1200, 1))
    small = data.read_image(saved(tmp_path / "a.jpg", Image.fromarray(waves), quality=95), 192)
    assert decoded == [(1875, 1750), (600, 600)]  # an 8th and a half of their sides
    reference = data.read_image(saved(tmp_path / "a.png", Image.fromarray(waves)), 192).astype(int)
    np.testing.assert_allclose(small, reference, atol=8)  # of waves of 200


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SWAPPED = SRGB.replace(b"rXYZ", b"aXYZ").replace(b"bXYZ", b"rXYZ").replace(b"aXYZ", b"bXYZ")  # red and blue
INK_PROFILE = SWAPPED.replace(b"RGB ", b"CMYK", 1)
GREY_PROFILE = SWAPPED.replace(b"RGB ", b"GRAY", 1).replace(b"rTRC", b"kTRC", 1)
BLUE_FIRST = [(blue, green, red) for red, green, blue in COLOURS]
PROFILED = {  # image, suffix, profile, expected colours, tolerance: 8 bits of another colour space are not exact
    "RGB": (quarters(BLUE_FIRST), "png", SWAPPED, COLOURS, 3),
    "JPEG": (quarters(BLUE_FIRST), "jpg", SWAPPED, COLOURS, 6),
    "P": (quarters(BLUE_FIRST).quantize(4), "png", SWAPPED, COLOURS, 3),
    "RGBA": (quarters([(*c, 255) for c in BLUE_FIRST[:3]] + [(0,) * 4]), "png", SWAPPED, [RED, GREEN, BLUE, WHITE], 3),
    "grey": (quarters(GREYS), "png", SWAPPED, GREY, 1),
    "garbage": (RGB, "png", b"garbage", COLOURS, 0),
    "cut off": (RGB, "png", SWAPPED[:300], COLOURS, 0),
    "of inks": (RGB, "png", INK_PROFILE, COLOURS, 0),
    "of greys": (RGB, "png", GREY_PROFILE, COLOURS, 0),
}


@pytest.mark.parametrize("kind", PROFILED)
def test_colours_are_converted_to_srgb_and_a_profile_that_does_not_fit_is_ignored(tmp_path, kind):
    image, suffix, profile, expected, atol = PROFILED[kind]
    assert_quarters(saved(tmp_path / f"a.{suffix}", image, icc_profile=profile, **FINEST), expected, atol)


# --- The data set -----------------------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_named_in_a_line_each_and_the_rest_is_used(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    for name, image in {
        "a.png": Image.new("RGB", (9, 9), RED),
        "d.png": quarters([0, 257, 9999, 65535], dtype=np.uint16),
        "e.tif": quarters([0, 0.5, 1, 9], dtype=np.float32),
        "f.eps": RGB,  # to read it Pillow would start Ghostscript
        "h.png": Image.new("RGBA", (9, 9), (*RED, 0)),
        "z.webp": Image.new("RGB", (9, 9), BLUE),
    }.items():
        saved(tmp_path / name, image, **LOSSLESS)
    (tmp_path / "c.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    (tmp_path / "g.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    for name in ("b.mp4", ".hidden.png", "a.txt"):
        (tmp_path / name).write_text("no image {}")
    (tmp_path / "folder.png").mkdir()
    images, alpha, paths = data.load_images(tmp_path, 8)
    assert paths == [tmp_path / "a.png", tmp_path / "z.webp"] and alpha.min() == 1
    assert torch.equal(images[:, :, 3, 3], torch.tensor([RED, BLUE]) / 127.5 - 1)
    unknown, grey = r"not an image of a known kind \(HEIC: pip install pillow-heif\)", "grey of 16 or 32 bits.*"
    notes = {"b.mp4": unknown, "c.png": ".+", "d.png": grey, "e.tif": grey, "f.eps": unknown}
    notes |= {"g.HEIC": unknown, "h.png": "its center is transparent"}
    for line, (name, why) in zip(capsys.readouterr().err.splitlines(), notes.items(), strict=True):
        assert re.fullmatch(f"skipped {re.escape(str(tmp_path / name))}: {why}", line)


@pytest.fixture
def kat(components):
    mu.add_tokens(components, [("<kat>", torch.zeros(1, 32)), ("sks", torch.zeros(1, 32))], "--placeholder_token")
    return components


def test_captions_are_those_beside_an_image_else_the_templates(kat, tmp_path):
    for name, colour in zip(("a.png", "b.webp", "c.png", "d.png"), COLOURS, strict=True):
        saved(tmp_path / name, Image.new("RGB", (16, 16), colour), **LOSSLESS)
    texts = {"a": "\ufeffa {} toy\r\n\n  two <kat>s  \nred cat\n", "b": "the {}", "c": " \n"}
    texts[".own"] = "a photo of a [name], [filewords]\n[filewords]\ncat"  # as A1111's
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    dataset = data.load_dataset(kat, tmp_path, 16, "<kat>", templates_file=tmp_path / ".own.txt")
    templates = ["a photo of a <kat>", "<kat>, cat", "a photo of a <kat>"]  # shorter lists begin again
    own = [["a <kat> toy", "two <kat>s", "<kat>, red cat"], ["the <kat>"] * 3, templates, templates]
    assert torch.equal(dataset.images[:, :, 3, 3], torch.tensor(COLOURS) / 127.5 - 1)
    assert torch.equal(dataset.token_ids, torch.stack([mu.tokenize(kat, captions) for captions in own]))
    (tmp_path / "b.txt").write_text("a photo of {}s")
    with pytest.raises(UserError, match="^--placeholder_token: 'sks' is no .* word in the caption 'a photo of skss'"):
        data.load_dataset(kat, tmp_path / "b.webp", 16, "sks")


@pytest.mark.parametrize(("kind", "count"), [("object", 27), ("style", 19)])
def test_built_in_templates_are_distinct_and_take_one_token_each(kat, tmp_path, kind, count):
    templates = {"object": data.OBJECT_TEMPLATES, "style": data.STYLE_TEMPLATES}[kind]
    assert len(set(templates)) == len(templates) == count and all(line.count("{}") == 1 for line in templates)
    token_ids = data.load_dataset(kat, saved(tmp_path / "a.png", RGB), 16, "<kat>", kind).token_ids
    assert torch.equal(token_ids[0], mu.tokenize(kat, [line.format("<kat>") for line in templates]))


def test_the_cache_holds_encodings_of_images_and_mirror_images_and_masks_of_their_alpha(kat, tmp_path):
    cut_out = Image.new("RGBA", (16, 16), (*RED, 255))
    cut_out.paste((0, 255, 0, 0), (9, 0, 16, 16))
    saved(tmp_path / "a.png", cut_out), saved(tmp_path / "b.png", RGB)
    dataset = data.load_dataset(kat, tmp_path, 16, "<kat>")
    assert torch.equal(dataset.images[0, :, 5, 8], torch.tensor(RED) / 127.5 - 1)
    assert dataset.images[0, :, :, 9:].min() == 1  # white, not the green under the transparency
    for mirrored, images in enumerate([dataset.images, dataset.images.flip(-1)]):
        posterior = kat.vae.encode(images).latent_dist  # a batch of another size adds up in another order
        torch.testing.assert_close(dataset.mean[:, mirrored], posterior.mean * 0.7, rtol=0, atol=1e-5)
        torch.testing.assert_close(dataset.std[:, mirrored], posterior.std * 0.7, rtol=1e-4, atol=0)
    assert (dataset.mean[:, 1] - dataset.mean[:, 0].flip(-1)).abs().max() > 1e-3  # mirrored latents are something else
    half = torch.tensor([1, 1, 1, 1, 0.5, 0, 0, 0]).expand(1, 8, 8)  # the mean of two pixels each
    assert torch.equal(dataset.mask[0], torch.stack([half, half.flip(-1)])) and dataset.mask[1].min() == 1


def generator(seed):
    return torch.Generator().manual_seed(seed)


MEAN, STD = torch.randn(2, 5, 2, 4, 3, 3, generator=generator(2)).abs()
MASK, TOKEN_IDS = torch.rand(5, 2, 1, 3, 3, generator=generator(3)), torch.arange(5 * 27 * 6).view(5, 27, 6)
DATASET = data.Dataset(MEAN, STD, MASK, TOKEN_IDS, images=None)


@pytest.mark.parametrize("batch_size", [1, 5, 8, 60])
def test_draws_are_those_of_a_written_out_reference_and_touch_no_other_randomness(batch_size):
    """Images and captions come without replacement until each has come once; each image has its own captions."""
    g, state = generator(10), torch.get_rng_state()
    picks = torch.cat([torch.randperm(5, generator=g) for _ in range(math.ceil(batch_size / 5))])[:batch_size]
    mirrored = torch.randint(2, (batch_size,), generator=g)
    captions = torch.cat([torch.randperm(27, generator=g) for _ in range(math.ceil(batch_size / 27))])[:batch_size]
    of_latents, noise = (torch.randn(batch_size, 4, 3, 3, generator=g) for _ in range(2))
    latents = MEAN[picks, mirrored] + STD[picks, mirrored] * of_latents
    expected = (latents, noise, TOKEN_IDS[picks, captions], MASK[picks, mirrored])
    drawn = data.draw_examples(DATASET, batch_size, generator(10))
    assert all(torch.equal(*pair) for pair in zip(drawn, expected, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
