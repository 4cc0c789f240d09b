"""Images of every kind become upright, unsquashed squares; the examples of a step come from one generator alone."""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

import data
import model_utils as mu
from data import LatentCache, list_images

RED, GREEN, BLUE, SAND = COLOURS = [(200, 30, 40), (20, 160, 60), (40, 60, 220), (230, 200, 120)]
GREYS, ALPHAS, LEVELS_16 = [0, 90, 180, 255], [255, 128, 0, 40], [0, 257 * 90, 257 * 180, 65535]


def read_image(path, resolution):
    """The colours alone, without the alpha."""
    return data.read_image(path, resolution)[..., :3]


def quarters(values, size=(48, 48), dtype=np.uint8):
    """An array of four flat quarters: top left, top right, bottom left, bottom right."""
    width, height = size
    index = (np.arange(height) >= height / 2)[:, None] * 2 + (np.arange(width) >= width / 2)
    return np.array(values, dtype=dtype)[index]


def assert_quarters(array, expected, atol=0):
    near, far = len(array) // 4, len(array) * 3 // 4
    np.testing.assert_allclose(array[[near, near, far, far], [near, far, near, far]].astype(int), expected, atol=atol)


def save(folder, image, name, **options):
    image.save(folder / name, **options)
    return folder / name


def encoded(image, form):
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings(action="error"):
        yield


# --- Reading one image ------------------------------------------------------------------------------------------------


def on_white(colour, alpha):
    return [c * alpha / 255 + 255 - alpha for c in colour]


def grey(values):
    return [[value] * 3 for value in values]


def palette_image():
    image = Image.fromarray(quarters([0, 1, 2, 3]))
    image.putpalette(sum(COLOURS, ()))
    return image


def with_alpha(colours):
    return Image.fromarray(quarters([(*colour, alpha) for colour, alpha in zip(colours, ALPHAS, strict=True)]))


RGB = Image.fromarray(quarters(COLOURS))
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
WHITE = (255, 255, 255)
BLENDED = [on_white(colour, alpha) for colour, alpha in zip(COLOURS, ALPHAS, strict=True)]
BLENDED_GREYS = grey([on_white([value], alpha)[0] for value, alpha in zip(GREYS, ALPHAS, strict=True)])
INKS = [(0, 200, 180, 40), (220, 0, 100, 60), (0, 0, 0, 255), (0, 0, 0, 0)]
CMYK = Image.fromarray(quarters(INKS), "CMYK")
PRINTED = [[(255 - ink) * (255 - black) / 255 for ink in colours] for *colours, black in INKS]
BIG_ENDIAN = Image.frombytes("I;16B", (48, 48), quarters(LEVELS_16, dtype=">u2").tobytes())
FLOATS = quarters([0, 0.25, 0.5, 1], dtype=np.float32)
HOLES = np.where(np.arange(48)[:, None] == 3, np.nan, np.where(np.arange(48) == 2, np.inf, FLOATS)).astype(np.float32)
LOSSLESS, FINEST = {"lossless": True, "exact": True}, {"quality": 100}
MODES = {  # image, suffix, options of save, expected colours, tolerance
    "1": (Image.fromarray(quarters([True, False, False, True], dtype=bool)), "png", {}, grey([255, 0, 0, 255]), 0),
    "L": (Image.fromarray(quarters(GREYS)), "png", {}, grey(GREYS), 0),
    "L, one grey transparent": (
        Image.fromarray(quarters(GREYS)), "png", {"transparency": 90}, grey([0, 255, 180, 255]), 0,
    ),
    "LA": (with_alpha([(value,) for value in GREYS]), "png", {}, BLENDED_GREYS, 1),
    "P": (palette_image(), "png", {}, COLOURS, 0),
    "P, half transparent": (palette_image(), "png", {"transparency": bytes(ALPHAS)}, BLENDED, 1),
    "P, GIF": (palette_image(), "gif", {"transparency": 2}, [RED, GREEN, WHITE, SAND], 0),
    "PA": (palette_image().convert("PA"), "tif", {}, COLOURS, 0),
    "RGB": (RGB, "png", {}, COLOURS, 0),
    "RGB, one colour transparent": (RGB, "png", {"transparency": GREEN}, [RED, WHITE, BLUE, SAND], 0),
    "RGB, BMP": (RGB, "bmp", {}, COLOURS, 0),
    "RGB, JPEG": (RGB, "jpg", FINEST, COLOURS, 4),
    "RGB, AVIF": (RGB, "avif", FINEST, COLOURS, 4),
    "RGBA": (with_alpha(COLOURS), "png", {}, BLENDED, 1),
    "RGBA, WebP": (with_alpha(COLOURS), "webp", LOSSLESS, BLENDED, 1),
    "YCbCr": (RGB.convert("YCbCr"), "tif", {}, COLOURS, 4),
    "CMYK": (CMYK, "tif", {}, PRINTED, 1),
    "CMYK, JPEG": (CMYK, "jpg", FINEST, PRINTED, 4),
    "I;16": (Image.fromarray(quarters(LEVELS_16, dtype=np.uint16)), "png", {}, grey(GREYS), 0),
    "I;16, dark": (Image.fromarray(quarters([0, 100, 200, 255], dtype=np.uint16)), "png", {}, grey([0, 0, 1, 1]), 0),
    "I;16B": (BIG_ENDIAN, "tif", {}, grey(GREYS), 0),
    "I, 8 bit": (Image.fromarray(quarters(GREYS, dtype=np.int32)), "tif", {}, grey(GREYS), 0),
    "I, 16 bit": (Image.fromarray(quarters(LEVELS_16, dtype=np.int32)), "tif", {}, grey(GREYS), 0),
    "I, 32 bit": (
        Image.fromarray(quarters([-9, 9 << 24, 18 << 24, 51 << 23], dtype=np.int32)), "tif", {}, grey(GREYS), 0,
    ),
    "F": (Image.fromarray(FLOATS), "tif", {}, grey([0, 64, 128, 255]), 0),
    "F, 8 bit": (Image.fromarray(FLOATS * 255), "tif", {}, grey([0, 64, 128, 255]), 0),
    "F, below 0": (Image.fromarray(FLOATS - 0.25), "tif", {}, grey([0, 0, 64, 191]), 0),
    "F, NaN and infinite": (Image.fromarray(HOLES), "tif", {}, grey([0, 64, 128, 255]), 0),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_keeps_its_colours(tmp_path, mode):
    image, suffix, options, expected, atol = MODES[mode]
    array = read_image(save(tmp_path, image, f"image.{suffix}", **options), 24)
    assert array.shape == (24, 24, 3) and array.dtype == np.uint8
    assert_quarters(array, expected, atol)


def test_colours_under_full_transparency_do_not_bleed_out_in_the_resize(tmp_path):
    array = np.zeros((64, 64, 4), np.uint8)
    array[..., 1] = 255  # green, all of it transparent,
    array[20:44, 20:44] = (255, 0, 0, 255)  # but for a red square
    result = read_image(save(tmp_path, Image.fromarray(array), "a.png"), 24).astype(int)
    assert (result[..., 1] == result[..., 2]).all()  # white and red mix to pink: as much green as blue
    assert result[12, 12].tolist() == [255, 0, 0] and result[0, 0].tolist() == [255, 255, 255]


STORED = {  # what a camera held that way stores of the upright image: the inverse of EXIF's orientation
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("orientation", STORED)
def test_images_are_turned_upright(tmp_path, orientation, suffix):
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](quarters(COLOURS, size=(60, 42)))))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"webp": LOSSLESS, "jpg": FINEST}.get(suffix, {})
    assert_quarters(read_image(save(tmp_path, stored, f"turned.{suffix}", exif=exif, **options), 24), COLOURS, 4)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_damaged_exif_is_ignored(tmp_path, suffix, exif):
    assert_quarters(read_image(save(tmp_path, RGB, f"a.{suffix}", exif=exif, quality=100), 24), COLOURS, 12)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_the_first_frame_of_an_animation_is_read(tmp_path, suffix):
    frames = [Image.new("RGB", (32, 32), colour) for colour in (RED, GREEN, BLUE)]
    options = LOSSLESS if suffix == "webp" else {}
    path = save(tmp_path, frames[0], f"a.{suffix}", save_all=True, append_images=frames[1:], duration=50, **options)
    assert_quarters(read_image(path, 16), [RED] * 4, 1)


@pytest.mark.parametrize("size", [(1, 1), (1, 51), (51, 1), (3, 1001), (8, 8), (121, 300), (300, 120), (512, 512)])
@pytest.mark.parametrize("period", [3, 6, 32])  # in pixels: fine waves alias in a poor resize, coarse ones blur
def test_the_center_square_is_resized_as_lanczos_in_floating_point(tmp_path, size, period):
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    pixels = (127.5 + 60 * np.sin(2 * np.pi * x / period) + 50 * np.sin(2 * np.pi * y / 40)).astype(np.uint8)
    left, top, side = (size[0] - min(size)) / 2, (size[1] - min(size)) / 2, min(size)
    exact = Image.fromarray(pixels.astype(np.float32))
    exact = exact.resize((64, 64), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    array = read_image(save(tmp_path, Image.fromarray(pixels), "waves.png"), 64)
    np.testing.assert_allclose(array[..., 0], np.asarray(exact).clip(0, 255), atol=4)


def test_huge_photos_are_decoded_small_without_loss(tmp_path, monkeypatch):
    decoded, transpose = [], data.ImageOps.exif_transpose
    monkeypatch.setattr(data.ImageOps, "exif_transpose", lambda i, **o: decoded.append(i.size) or transpose(i, **o))
    huge = Image.new("L", (13_600, 14_000), 60)  # 190 megapixels: more than Pillow itself allows
    huge.paste(200, (6_800, 0, 13_600, 14_000))
    assert_quarters(read_image(save(tmp_path, huge, "huge.jpg"), 64), grey([60, 200, 60, 200]), 2)
    assert decoded == [(1700, 1750)]  # a 64th of the memory
    waves = 127.5 + 100 * np.sin(np.arange(1200) * 2 * np.pi / 20)
    waves = Image.fromarray(np.broadcast_to(waves.astype(np.uint8), (1200, 1200)).copy())
    small = read_image(save(tmp_path, waves, "a.jpg", quality=95), 192)  # decoded at half the size
    np.testing.assert_allclose(small, read_image(save(tmp_path, waves, "a.png"), 192).astype(int), atol=8)


# --- Damaged and hostile files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_truncated_files_are_refused(tmp_path, form):
    content, path = encoded(NOISE, form), tmp_path / "cut.png"
    for kept in (0.0, 0.01, 0.5, 0.9):
        path.write_bytes(content[: int(len(content) * kept)])
        with pytest.raises(ValueError, match="."):
            read_image(path, 16)


def test_the_content_tells_the_kind_of_file_not_the_suffix(tmp_path):
    path = tmp_path / "image.jpg"
    path.write_bytes(encoded(RGB, "PNG"))
    assert_quarters(read_image(path, 24), COLOURS)
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"  # starts Ghostscript
    for content in (b"just a note", b"version https://git-lfs.github.com/spec/v1\n", b"<!DOCTYPE html>", postscript):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not an image of a known kind"):
            read_image(path, 16)


@pytest.mark.parametrize("error", [SyntaxError("broken PNG file"), struct.error("too short"), MemoryError()])
def test_whatever_pillow_raises_is_a_value_error_that_says_why(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(ValueError, match=str(error) or "MemoryError"):
        read_image(save(tmp_path, RGB, "a.png"), 16)


def png_bomb(side):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9999))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def test_decompression_bombs_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    path, limit = tmp_path / "bomb.png", Image.MAX_IMAGE_PIXELS
    path.write_bytes(png_bomb(20_000))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="400000000 pixels.* exceeds limit of 250000000"):
        read_image(path, 16)
    assert limit == Image.MAX_IMAGE_PIXELS  # the rest of the program keeps the limit it had


# --- A folder ---------------------------------------------------------------------------------------------------------


def fill(folder, *names, colour=RED):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(encoded(Image.new("RGB", (8, 8), colour), "PNG"))
    return folder


def test_images_are_sorted_channels_first_and_from_minus_one_to_one(tmp_path, capsys):
    names = ["my cat (1).png", "Кошка.png", "猫.PNG", "قطة.JPG", "b.jpeg", "%s {} 'q\".png"]
    folder = fill(tmp_path / "my images é", *names)
    assert [path.name for path in list_images(folder)] == sorted(names)
    save(
        folder, Image.fromarray(quarters([(255, 0, 0), (0, 255, 0), (0, 0, 255), (51, 102, 204)])), "a.webp", **LOSSLESS
    )
    images = data.load_training_images(str(folder), 48)[0]  # a.webp comes second
    assert images.shape == (7, 3, 48, 48) and images.dtype == torch.float32
    expected = torch.tensor([[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [-0.6, -0.2, 0.6]])
    torch.testing.assert_close(images[1, :, [12, 12, 36, 36], [12, 36, 12, 36]].T, expected, atol=1e-6, rtol=0)
    assert capsys.readouterr() == ("", "")


def test_what_is_no_image_is_skipped_in_one_line_that_names_it(tmp_path, capsys):
    folder = fill(tmp_path, "a.png", "b.png", "._a.png", ".hidden.png")
    for name in (".DS_Store", "clip.mp4", "raw.cr2", "line\nbreak.txt", *(f"{i:03}.txt" for i in range(100))):
        (folder / name).write_bytes(b"x")
    (folder / "folder.png").mkdir()
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    assert len(data.load_training_images(folder, 8)[0]) == 2
    output, error = capsys.readouterr()
    first = ".DS_Store", "._a.png", ".hidden.png", *(f"{i:03}.txt" for i in range(7))
    assert output == "" and error.endswith(", ".join(map(repr, first)) + " and 98 more\n") and error.count("\n") == 1


def test_names_that_are_not_utf8(tmp_path, capsys):
    try:
        fill(tmp_path, os.fsdecode(b"caf\xe9.doc"), os.fsdecode(b"caf\xe9.png"))
    except OSError:
        pytest.skip("this file system takes no such names")
    assert len(data.load_training_images(tmp_path, 8)[0]) == 1
    assert r"'caf\udce9.doc'" in capsys.readouterr().err


def test_damaged_images_are_skipped_in_one_line_that_says_why(tmp_path, capsys):
    folder = fill(tmp_path, "a.png")
    fill(tmp_path, "e.png", colour=BLUE)
    (folder / "b.jpg").write_bytes(encoded(NOISE, "JPEG")[:900])
    (folder / "d.png").write_bytes(png_bomb(60_000))
    assert torch.equal(data.load_training_images(folder, 16)[0][:, :, 0, 0], torch.tensor([RED, BLUE]) / 127.5 - 1)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "'b.jpg' (image file is truncated" in error
    assert "'d.png' (Image size (3600000000 pixels)" in error


@pytest.mark.parametrize(
    "content, expected",
    [
        (None, ["no such file or folder"]),
        (b"a file", ["not an image"]),
        ({}, ["holds nothing", "JPEG"]),
        ({"IMG_1.heic": b"x"}, ["'IMG_1.heic' (not an image of a known kind)"]),
        ({"a.png": encoded(RGB, "PNG")[:60], "b.jpg": b""}, ["'a.png' (", "'b.jpg' ("]),
    ],
)
def test_a_folder_without_images_is_a_user_error(tmp_path, content, expected):
    folder = tmp_path / "my cat"
    if isinstance(content, bytes):
        folder.write_bytes(content)
    elif content is not None:
        folder.mkdir()
        for name, data_of_file in content.items():
            (folder / name).write_bytes(data_of_file)
    with pytest.raises(mu.UserError) as caught:
        data.load_training_images(folder, 16)
    sentence = str(caught.value)
    assert sentence.startswith("--images") and str(folder) in sentence and "\n" not in sentence
    assert all(part in sentence for part in expected)


# --- Templates, the latent cache, the examples of a step --------------------------------------------------------------


@pytest.mark.parametrize("templates, count", [(data.OBJECT_TEMPLATES, 27), (data.STYLE_TEMPLATES, 19)])
def test_templates_are_distinct_and_each_takes_one_token(templates, count):
    assert len(set(templates)) == len(templates) == count
    assert all(template.count("{}") == 1 and template == " ".join(template.split()) for template in templates)


def test_the_cache_holds_the_encodings_of_images_and_their_mirror_images(tiny_model):
    vae = mu.load_vae(tiny_model, "cpu")
    images = torch.rand(3, 3, 16, 16, generator=generator(0)) * 2 - 1
    cache = data.encode_dataset(vae, images, torch.ones(3, 1, 16, 16))
    for mirrored, inputs in enumerate([images, images.flip(-1)]):
        mean, std = mu.encode_images(vae, inputs)
        torch.testing.assert_close(cache.mean[:, mirrored], mean)
        torch.testing.assert_close(cache.std[:, mirrored], std)
    assert (cache.mean[:, 1] - cache.mean[:, 0].flip(-1)).abs().max() > 1e-3  # mirrored latents are something else


def generator(seed):
    return torch.Generator().manual_seed(seed)


TEMPLATE_IDS = torch.arange(27)[:, None] * 100 + torch.arange(6)  # [T, L]
NUMBERS = (torch.arange(10.0).view(5, 2, 1, 1, 1) * 1000).expand(5, 2, 4, 3, 3)  # means that tell which one was drawn
CACHE = LatentCache(NUMBERS, torch.rand(NUMBERS.shape, generator=generator(2)) + 0.5, torch.ones(5, 2, 1, 3, 3))


def draw_examples(batch_size, generator):
    """Latents, noise and token_ids of the examples of a step; each image has the same captions."""
    return data.draw_examples(CACHE, TEMPLATE_IDS.expand(5, 27, 6), batch_size, generator)[:3]


def test_examples_are_determined_by_their_generator():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (draw_examples(8, generator(seed)) for seed in (10, 10, 11))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is neither used nor moved


@pytest.mark.parametrize("batch_size", [1, 4, 5, 8, 23])
def test_images_and_captions_are_sampled_without_replacement(batch_size):
    steps = 2000 // batch_size
    totals = {5: torch.zeros(5), 2: torch.zeros(2), 27: torch.zeros(27)}  # images, mirroring, captions
    for step in range(steps):
        latents, _, token_ids = draw_examples(batch_size, generator(step))
        number = (latents[:, 0, 0, 0] / 1000).round().long()
        captions = token_ids[:, 0] // 100
        assert torch.equal(token_ids, TEMPLATE_IDS[captions])
        for count, drawn in ((5, number // 2), (27, captions)):
            counts = drawn.bincount(minlength=count)
            assert counts.max() - counts.min() <= 1
            totals[count] += counts
        totals[2] += (number % 2).bincount(minlength=2)
    for count, total in totals.items():  # over the steps all are equally likely, within 5 standard deviations
        expected = steps * batch_size / count
        assert (total - expected).abs().max() < 5 * (expected * (1 - 1 / count)) ** 0.5


@pytest.mark.parametrize("overflowing", ["mean", "std"])
def test_a_vae_that_overflows_is_a_user_error(monkeypatch, overflowing):
    moments = {"mean": torch.zeros(2, 4, 2, 2), "std": torch.ones(2, 4, 2, 2)}
    moments[overflowing][1, 0, 0, 0] = torch.inf
    monkeypatch.setattr(data, "encode_images", lambda vae, images, batch: tuple(moments.values()))
    with pytest.raises(mu.UserError, match="--model.*not finite"):
        data.encode_dataset(None, torch.zeros(2, 3, 8, 8), torch.ones(2, 1, 8, 8))


def test_latents_are_fresh_samples_of_the_posterior_independent_of_the_noise():
    count = 20_000
    latents, noise, _ = draw_examples(count, generator(3))
    number = (latents[:, 0, 0, 0] / 1000).round().long()
    drawn = (latents - CACHE.mean.flatten(0, 1)[number]) / CACHE.std.flatten(0, 1)[number]
    for sample in (drawn, noise):  # standard normal, within 5 standard errors
        assert (sample.mean(dim=0).abs() < 5 / count**0.5).all()
        assert ((sample.std(dim=0) - 1).abs() < 5 / (2 * count) ** 0.5).all()
    assert ((drawn * noise).mean(dim=0).abs() < 5 / count**0.5).all()
