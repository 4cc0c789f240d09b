"""Pictures of every kind become upright, unsquashed squares; batches are drawn by one generator and nothing else."""

import io
import os
import struct
import warnings
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFile

import data
from data import LatentCache, draw_batch, encode_dataset, list_images, load_images, read_image
from model_utils import UserError, encode_images, load_vae

RED, GREEN, BLUE, SAND = (200, 30, 40), (20, 160, 60), (40, 60, 220), (230, 200, 120)


def quarters(values, size=(48, 48), dtype=np.uint8):
    """A picture of four flat quarters: top left, top right, bottom left, bottom right."""
    width, height = size
    index = (np.arange(height) >= height / 2)[:, None] * 2 + (np.arange(width) >= width / 2)
    return np.array(values, dtype=dtype)[index]


def middles(array):
    """The colours in the middle of the four quarters, [4, 3]."""
    near, far = len(array) // 4, len(array) * 3 // 4
    return array[[near, near, far, far], [near, far, near, far]].astype(int)


def on_white(colour, alpha):
    return [c * alpha / 255 + 255 - alpha for c in colour]


def save(folder, image, name, **options):
    path = folder / name
    image.save(path, **options)
    return path


def smooth(rng, size, channels=3):
    """A random picture without fine detail, float [height, width, channels], far enough from 0 and 255 to overshoot."""
    coarse = rng.uniform(60, 195, (channels, 3, 3)).astype(np.float32)
    return np.stack([Image.fromarray(c).resize(size, Image.Resampling.BILINEAR) for c in coarse], axis=-1)


# --- Reading one picture ----------------------------------------------------------------------------------------------


def palette_picture(**info):
    image = Image.fromarray(quarters([0, 1, 2, 3]))
    image.putpalette([*RED, *GREEN, *BLUE, *SAND])
    image.info.update(info)
    return image


def sixteen_bit(values, mode="I;16"):
    array = quarters(values, dtype=">u2" if mode.endswith("B") else "<u2")
    return Image.frombytes(mode, array.shape[::-1], array.tobytes())


def grey(values):
    return [[v] * 3 for v in values]


COLOURS, GREYS = [RED, GREEN, BLUE, SAND], [0, 90, 180, 255]
ALPHAS = [255, 128, 0, 40]
RGB = Image.fromarray(quarters(COLOURS))
RGBA = Image.fromarray(quarters([(*c, a) for c, a in zip(COLOURS, ALPHAS, strict=True)]))
BLENDED = [on_white(c, a) for c, a in zip(COLOURS, ALPHAS, strict=True)]
INKS = [(0, 200, 180, 40), (220, 0, 100, 60), (0, 0, 0, 255), (0, 0, 0, 0)]
PRINTED = [[(255 - ink) * (255 - k) / 255 for ink in cmy] for *cmy, k in INKS]
FLOATS = quarters([0, 0.25, 0.5, 1], dtype=np.float32)
HOLED = np.where(np.arange(48)[:, None] == 3, np.nan, np.where(np.arange(48) == 2, np.inf, FLOATS)).astype(np.float32)
MODES = {
    "1": (Image.fromarray(quarters([True, False, False, True], dtype=bool)), "png", grey([255, 0, 0, 255])),
    "L": (Image.fromarray(quarters(GREYS)), "png", grey(GREYS)),
    "L, one grey transparent": (
        Image.fromarray(quarters(GREYS)), "png", grey([0, 255, 180, 255]), {"transparency": 90},
    ),
    "LA": (
        Image.fromarray(quarters(list(zip(GREYS, ALPHAS, strict=True)))), "png",
        grey([on_white([v], a)[0] for v, a in zip(GREYS, ALPHAS, strict=True)]),
    ),
    "P": (palette_picture(), "png", COLOURS),
    "P, one colour transparent": (palette_picture(), "png", [RED, GREEN, (255,) * 3, SAND], {"transparency": 2}),
    "P, half transparent": (palette_picture(), "png", BLENDED, {"transparency": bytes(ALPHAS)}),
    "P, GIF": (palette_picture(), "gif", [RED, GREEN, (255,) * 3, SAND], {"transparency": 2}),
    "PA": (palette_picture().convert("PA"), "tif", COLOURS),
    "RGB": (RGB, "png", COLOURS),
    "RGB, BMP": (RGB, "bmp", COLOURS),
    "RGB, lossless WebP": (RGB, "webp", COLOURS, {"lossless": True}),
    "RGB, JPEG": (RGB, "jpg", COLOURS, {"quality": 100, "subsampling": 0}),
    "RGB, AVIF": (RGB, "avif", COLOURS, {"quality": 100, "subsampling": "4:4:4"}),
    "RGB, one colour transparent": (RGB, "png", [RED, (255,) * 3, BLUE, SAND], {"transparency": GREEN}),
    "RGBA": (RGBA, "png", BLENDED),
    "RGBA, WebP": (RGBA, "webp", BLENDED, {"lossless": True, "exact": True}),
    "YCbCr": (RGB.convert("YCbCr"), "tif", COLOURS),
    "CMYK": (Image.fromarray(quarters(INKS), "CMYK"), "tif", PRINTED),
    "CMYK, JPEG": (Image.fromarray(quarters(INKS), "CMYK"), "jpg", PRINTED, {"quality": 100}),
    "I;16": (sixteen_bit([0, 257 * 90, 257 * 180, 65535]), "png", grey(GREYS)),
    "I;16, dark": (sixteen_bit([0, 100, 200, 255]), "png", grey([0, 0, 1, 1])),
    "I;16B": (sixteen_bit([0, 257 * 90, 257 * 180, 65535], "I;16B"), "tif", grey(GREYS)),
    "I, 8 bit": (Image.fromarray(quarters(GREYS, dtype=np.int32)), "tif", grey(GREYS)),
    "I, 16 bit": (Image.fromarray(quarters([0, 257 * 90, 257 * 180, 65535], dtype=np.int32)), "tif", grey(GREYS)),
    "I, 32 bit": (Image.fromarray(quarters([-9, 9 << 24, 18 << 24, 51 << 23], dtype=np.int32)), "tif", grey(GREYS)),
    "F": (Image.fromarray(FLOATS), "tif", grey([0, 64, 128, 255])),
    "F, 8 bit": (Image.fromarray(FLOATS * 255), "tif", grey([0, 64, 128, 255])),
    "F, below 0": (Image.fromarray(FLOATS - 0.25), "tif", grey([0, 0, 64, 191])),
    "F, holes": (Image.fromarray(HOLED), "tif", grey([0, 64, 128, 255])),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_keeps_its_colours(tmp_path, mode):
    image, suffix, expected, *options = MODES[mode]
    path = save(tmp_path, image, f"picture.{suffix}", **(options[0] if options else {}))
    with warnings.catch_warnings(action="error"):
        array = read_image(path, 24)
    assert array.shape == (24, 24, 3) and array.dtype == np.uint8 and array.flags.writeable
    lossy, blended = suffix in ("jpg", "avif") or mode == "YCbCr", expected is BLENDED or mode in ("LA", "CMYK")
    np.testing.assert_allclose(middles(array), expected, atol=4 if lossy else 1 if blended else 0)


def test_hidden_colours_do_not_bleed_out_of_transparency(tmp_path):
    """What lies under full transparency may be any colour: none of it may show at the edge after the resize."""
    array = np.zeros((64, 64, 4), np.uint8)
    array[..., 1] = 255  # green, all of it transparent,
    array[20:44, 20:44] = (255, 0, 0, 255)  # but for a red square
    result = read_image(save(tmp_path, Image.fromarray(array), "a.png"), 24).astype(int)
    assert (result[..., 1] == result[..., 2]).all()  # white and red mix to pink: as much green as blue
    assert result[12, 12].tolist() == [255, 0, 0] and result[0, 0].tolist() == [255, 255, 255]


STORED = {  # what a camera held that way writes for the upright picture: the inverse of EXIF's orientation
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(tmp_path, orientation, suffix):
    upright = quarters(COLOURS, size=(61, 42))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}.get(suffix, {})
    array = read_image(save(tmp_path, stored, f"turned.{suffix}", exif=exif, **options), 24).astype(int)
    reference = read_image(save(tmp_path, Image.fromarray(upright), "upright.png"), 24).astype(int)
    assert np.abs(array - reference).max() <= (12 if suffix == "jpg" else 1)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_damaged_exif_is_ignored(tmp_path, suffix, exif):
    path = save(tmp_path, RGB, f"picture.{suffix}", exif=exif, quality=100)
    with warnings.catch_warnings(action="error"):
        np.testing.assert_allclose(middles(read_image(path, 24)), COLOURS, atol=12)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_first_frame_of_an_animation(tmp_path, suffix):
    frames = [Image.new("RGB", (32, 32), colour) for colour in (RED, GREEN, BLUE)]
    options = {"webp": {"lossless": True}}.get(suffix, {})
    path = save(tmp_path, frames[0], f"a.{suffix}", save_all=True, append_images=frames[1:], duration=50, **options)
    with Image.open(path) as image:
        assert image.n_frames == 3
    np.testing.assert_allclose(middles(read_image(path, 16)), [RED] * 4, atol=1)


@pytest.mark.parametrize("size", [(1, 1), (1, 51), (51, 1), (3, 5), (3, 1001)])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_tiny_and_thin_pictures(tmp_path, size, suffix):
    array = np.full((size[1], size[0], 3), RED, np.uint8)
    side = min(size)
    top, left = (size[1] - side) // 2, (size[0] - side) // 2
    array[top : top + side, left : left + side] = SAND
    path = save(tmp_path, Image.fromarray(array), f"thin.{suffix}", quality=100, subsampling=0)
    array = read_image(path, 16)
    assert array.shape == (16, 16, 3)
    np.testing.assert_allclose(array[7:9, 7:9], np.broadcast_to(SAND, (2, 2, 3)), atol=12)


# --- Shape and sharpness ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(300, 120), (120, 300), (121, 300), (200, 200), (40, 90)])
@pytest.mark.parametrize("center_crop", [True, False])
def test_a_circle_stays_a_circle(tmp_path, size, center_crop):
    width, height = size
    radius = min(size) * 0.4
    image = Image.new("L", size)
    middle = (width / 2, height / 2)
    ImageDraw.Draw(image).ellipse([m - radius for m in middle] + [m + radius for m in middle], fill=255)
    inside = read_image(save(tmp_path, image, "circle.png"), 64, center_crop)[..., 0] > 127
    rows, columns = inside.any(axis=1), inside.any(axis=0)
    assert abs(rows.sum() - 51.2) <= 2.5 and abs(columns.sum() - 51.2) <= 2.5  # 0.8 of 64, in both directions
    for line in (rows, columns):  # and in the middle
        assert abs(np.flatnonzero(line).mean() - 31.5) <= 1


def waves(pixels_a_wave, size=512):
    line = 127.5 + 100 * np.sin(2 * np.pi * np.arange(size) / pixels_a_wave)
    return Image.fromarray(np.broadcast_to(line.round().astype(np.uint8), (size, size)).copy())


def swing(array):
    return array[:, 4:-4, 0].astype(float).std() * np.sqrt(2)


def test_the_resize_neither_aliases_nor_blurs(tmp_path):
    """512 to 64: waves too fine for 64 pixels must vanish (nearest and plain bilinear alias), others stay."""
    assert swing(read_image(save(tmp_path, waves(6), "fine.png"), 64)) < 5
    assert swing(read_image(save(tmp_path, waves(32), "coarse.png"), 64)) > 93  # bilinear leaves 81
    board = np.indices((512, 512)).sum(axis=0) % 2 * np.uint8(255)
    assert np.ptp(read_image(save(tmp_path, Image.fromarray(board.astype(np.uint8)), "board.png"), 64)) <= 4


def test_enlarging_is_smooth(tmp_path):
    ramp = np.linspace(0, 255, 8).astype(np.uint8)
    path = save(tmp_path, Image.fromarray(np.broadcast_to(ramp, (8, 8)).copy()), "ramp.png")
    steps = np.diff(read_image(path, 64)[30, :, 0].astype(int))
    assert steps.max() <= 10  # nearest: 36


# --- Damage and bombs -------------------------------------------------------------------------------------------------


def encoded(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.9])
def test_truncated_files_are_refused(tmp_path, form, kept):
    content = encoded(NOISE, form)
    path = tmp_path / "cut.png"
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ValueError, match=r"."):
        read_image(path, 16)


@pytest.mark.parametrize(
    "content",
    [
        b"just a note",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        b"<!DOCTYPE html><html></html>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",  # would start Ghostscript
    ],
)
def test_other_files_with_a_pictures_name_are_refused(tmp_path, content):
    path = tmp_path / "picture.jpg"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a picture of a known kind"):
        read_image(path, 16)


def test_a_wrong_suffix_does_not_matter(tmp_path):
    path = tmp_path / "really_a_png.jpg"
    path.write_bytes(encoded(RGB, "PNG"))
    np.testing.assert_allclose(middles(read_image(path, 24)), COLOURS, atol=1)


@pytest.mark.parametrize("error", [SyntaxError("broken PNG file"), struct.error("too short"), MemoryError()])
def test_whatever_pillow_raises_is_a_value_error_that_says_why(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    path = save(tmp_path, RGB, "picture.png")
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(ValueError, match=str(error) or "MemoryError"):
        read_image(path, 16)


def png_bomb(width, height):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(9999))), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("side", [16_000, 20_000, 60_000])
def test_bombs_are_refused_before_they_are_unpacked(tmp_path, side, monkeypatch):
    monkeypatch.setattr(data.ImageOps, "exif_transpose", lambda *_, **__: pytest.fail("unpacked"))
    monkeypatch.setattr(Image.Image, "draft", lambda *_: pytest.fail("unpacked"))
    path = tmp_path / "bomb.png"
    path.write_bytes(png_bomb(side, side))
    with warnings.catch_warnings(action="error"):
        with pytest.raises(ValueError, match=rf"{side * side // 10**6} megapixels, more than the limit of 250"):
            read_image(path, 16)


def test_the_limit_counts_pixels(tmp_path, monkeypatch):
    path = save(tmp_path, Image.new("RGB", (50, 20), RED), "picture.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 123)
    monkeypatch.setattr(data, "MAX_PIXELS", 1000)
    assert read_image(path, 16)[8, 8].tolist() == list(RED)
    assert Image.MAX_IMAGE_PIXELS == 123  # the rest of the program keeps the limit it had
    monkeypatch.setattr(data, "MAX_PIXELS", 999)
    with pytest.raises(ValueError, match="megapixels"):
        read_image(path, 16)
    assert Image.MAX_IMAGE_PIXELS == 123


@pytest.mark.parametrize("size", [(12_000, 9_000), (13_600, 14_000)])  # 108 and 190: Pillow warns at 89, refuses at 179
def test_huge_photographs_are_read_small(tmp_path, size, monkeypatch):
    decoded, transpose = [], data.ImageOps.exif_transpose
    monkeypatch.setattr(data.ImageOps, "exif_transpose", lambda i, **o: decoded.append(i.size) or transpose(i, **o))
    image = Image.new("L", size, 60)
    image.paste(200, (size[0] // 2, 0, *size))
    path = save(tmp_path, image, "huge.jpg")
    with warnings.catch_warnings(action="error"):
        array = read_image(path, 64)
    assert decoded == [(size[0] // 8, size[1] // 8)]  # a 64th of the memory
    np.testing.assert_allclose(middles(array)[:, 0], [60, 200, 60, 200], atol=2)


def test_reading_jpegs_small_loses_nothing(tmp_path):
    small = read_image(save(tmp_path, waves(20, 1200), "a.jpg", quality=95), 192)  # decoded at half the size
    whole = read_image(save(tmp_path, waves(20, 1200), "a.png"), 192)
    assert np.abs(small.astype(int) - whole).max() <= 8


# --- Any picture at all -----------------------------------------------------------------------------------------------


def square_of(values, resolution):
    """The reference: floats [height, width] -> the middle square, resized without any trick."""
    height, width = values.shape
    side = min(height, width)
    box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
    image = Image.fromarray(values.astype(np.float32))
    return np.asarray(image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box))


def random_picture(rng, mode, size):
    """A picture of the mode, and its true colours on white as floats [height, width, 3]."""
    colour = smooth(rng, size).round()
    if mode in ("L", "LA", "I;16", "I", "F"):
        colour = colour[..., :1]
    alpha = smooth(rng, size, 1).round() if mode.endswith("A") else None
    pixels = np.concatenate([colour, alpha], axis=-1) if alpha is not None else colour
    if mode == "I;16":
        image = Image.fromarray((pixels[..., 0] * 257).astype(np.uint16))
    elif mode in ("I", "F"):
        image = Image.fromarray((pixels[..., 0] * {"I": 257, "F": 1 / 255}[mode]).astype({"I": "i4", "F": "f4"}[mode]))
    elif mode == "P":
        image = Image.fromarray(pixels.astype(np.uint8)).quantize(64)
        colour = np.asarray(image.convert("RGB"), dtype=np.float32)
    else:
        image = Image.fromarray(pixels.astype(np.uint8).squeeze(-1) if mode == "L" else pixels.astype(np.uint8))
    assert image.mode == mode
    if alpha is not None:
        colour = colour * alpha / 255 + 255 - alpha
    return image, np.broadcast_to(colour, (*colour.shape[:2], 3))


def test_random_sizes_modes_and_orientations(tmp_path):
    rng = np.random.default_rng(7)
    forms = {"L": "png bmp tif", "LA": "png tif", "P": "png gif", "RGB": "png bmp tif webp", "RGBA": "png tif webp",
             "I;16": "png tif", "I": "tif", "F": "tif"}  # fmt: skip
    for case in range(300):
        mode = str(rng.choice(list(forms)))
        suffix = str(rng.choice(forms[mode].split()))
        size = tuple(int(s) for s in rng.choice([1, 2, 3, 5, 17, 32, 33, 64, 90, 140], 2))
        resolution = int(rng.choice([8, 16, 24, 40]))
        orientation = int(rng.integers(1, 9)) if suffix in ("png", "tif", "webp") else 1
        image, truth = random_picture(rng, mode, size)
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"exif": exif} if orientation > 1 else {}
        options |= {"lossless": True, "exact": True} if suffix == "webp" else {}
        array = read_image(save(tmp_path, image, f"{case}.{suffix}", **options), resolution)
        truth = STORED[{6: 8, 8: 6}.get(orientation, orientation)](truth)  # the inverse: upright again
        expected = np.stack([square_of(truth[..., c], resolution) for c in range(3)], axis=-1).clip(0, 255)
        what = f"case {case}: {mode} {suffix} {size} to {resolution}, orientation {orientation}"
        assert array.shape == (resolution, resolution, 3) and array.dtype == np.uint8, what
        assert np.abs(array - expected).max() <= 4, what


def test_random_damage_is_an_image_or_a_value_error(tmp_path):
    rng = np.random.default_rng(11)
    forms = [encoded(NOISE, form) for form in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")]
    path, refused = tmp_path / "damaged.png", 0
    with warnings.catch_warnings(action="error"):
        for case in range(300):
            content = np.frombuffer(forms[case % len(forms)], np.uint8).copy()
            places = rng.integers(0, min(len(content), int(rng.choice([30, 200, 20000]))), 4)
            content[places] = rng.integers(0, 256, 4)
            path.write_bytes(content.tobytes())
            try:
                assert read_image(path, 16).shape == (16, 16, 3)
            except ValueError as error:
                refused += 1
                assert str(error)
    assert 50 < refused < 300


# --- A folder ---------------------------------------------------------------------------------------------------------


def folder_of(folder, names, colour=RED):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(encoded(Image.new("RGB", (8, 8), colour), "PNG"))
    return folder


def test_names_of_every_script_come_sorted(tmp_path, capsys):
    names = ["my cat (1).png", "Кошка.png", "猫.PNG", "قطة.JPG", "b.jpeg", "a.webp", "%s {} 'q\".png"]
    folder = folder_of(tmp_path / "my pictures é", names)
    assert [p.name for p in list_images(folder)] == sorted(names)
    assert load_images(str(folder), 8)[1] == sorted(names)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_other_files_are_skipped_in_one_line_that_names_them(tmp_path, capsys):
    folder = folder_of(tmp_path, ["b.png", "a.png"])
    others = [
        ".DS_Store",
        "._a.png",
        ".hidden.png",
        "notes.txt",
        "Thumbs.db",
        "clip.mp4",
        "raw.heic",
        "line\nbreak.txt",
    ]
    for name in others:
        (folder / name).write_bytes(b"x")
    (folder / "more.png").mkdir()
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    images, names = load_images(folder, 8)
    assert names == ["a.png", "b.png"] and len(images) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.out == ""
    for name in [*others, "more.png", "gone.png"]:
        assert repr(name) in captured.err


def test_names_that_are_not_text(tmp_path, capsys):
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_bytes(b"x")
        (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(encoded(RGB, "PNG"))
    except OSError:
        pytest.skip("this file system takes no such names")
    assert len(load_images(tmp_path, 8)[0]) == 1
    assert r"'caf\udce9.txt'" in capsys.readouterr().err


def test_a_thousand_files(tmp_path, capsys):
    folder = folder_of(tmp_path, [f"{i:04}.png" for i in range(1000)])
    for i in range(1000):
        (folder / f"{i:04}.txt").touch()
    images, names = load_images(folder, 8)
    assert images.shape == (1000, 3, 8, 8) and names == [f"{i:04}.png" for i in range(1000)]
    assert torch.equal(images[0], images[999])
    line = capsys.readouterr().err
    assert "'0009.txt' and 990 more" in line and len(line) < 400 + len(str(folder))


@pytest.mark.parametrize("make", ["missing", "file", "empty", "other files", "all damaged"])
def test_a_folder_without_pictures_is_a_user_error(tmp_path, make):
    folder = tmp_path / "my cat"
    if make == "file":
        folder.write_bytes(encoded(RGB, "PNG"))
    elif make != "missing":
        folder.mkdir()
    if make == "other files":
        (folder / "IMG_1.heic").write_bytes(b"x")
    if make == "all damaged":
        (folder / "a.png").write_bytes(encoded(RGB, "PNG")[:60])
        (folder / "b.jpg").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        load_images(folder, 16)
    sentence = str(caught.value)
    assert sentence.startswith("--images") and repr(str(folder)) in sentence and "\n" not in sentence
    expected = {
        "missing": ["No such file"],
        "file": ["Not a directory"],
        "empty": ["it is empty", "JPEG"],
        "other files": ["only 'IMG_1.heic'", "JPEG"],
        "all damaged": ["'a.png' (", "'b.jpg' ("],
    }[make]
    assert all(part in sentence for part in expected)


def test_a_damaged_picture_among_good_ones_is_skipped_and_named(tmp_path, capsys):
    folder = folder_of(tmp_path, ["a.png", "c.png"])
    folder_of(tmp_path, ["e.png"], BLUE)
    (folder / "b.jpg").write_bytes(encoded(NOISE, "JPEG")[:900])
    (folder / "d.png").write_bytes(png_bomb(60_000, 60_000))
    images, names = load_images(folder, 16)
    assert names == ["a.png", "c.png", "e.png"] and images.shape == (3, 3, 16, 16)
    last = (images[2, :, 0, 0] + 1) * 127.5
    np.testing.assert_allclose(last, BLUE, atol=1)  # names and pictures still belong together
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "'b.jpg' (image file is truncated" in error and "'d.png' (3600 mega" in error


def test_images_are_channels_first_from_minus_one_to_one(tmp_path):
    save(tmp_path, Image.fromarray(quarters([(255, 0, 0), (0, 255, 0), (0, 0, 255), (51, 102, 204)])), "a.png")
    images, _ = load_images(tmp_path, 48)
    assert images.shape == (1, 3, 48, 48) and images.dtype == torch.float32
    expected = torch.tensor([[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [-0.6, -0.2, 0.6]])
    torch.testing.assert_close(images[0, :, [12, 12, 36, 36], [12, 36, 12, 36]].T, expected, atol=1e-6, rtol=0)
    assert images.min() == -1 and images.max() == 1


# --- Sentences --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("templates", "count"), [(data.OBJECT_TEMPLATES, 27), (data.STYLE_TEMPLATES, 19)])
def test_templates(templates, count):
    assert len(templates) == len(set(templates)) == count
    for template in templates:
        assert template.count("{}") == 1 and template == " ".join(template.split())
        assert "<kat>" in template.format("<kat>")
    assert not set(data.OBJECT_TEMPLATES) & set(data.STYLE_TEMPLATES)
    assert all("style of {}" in t for t in data.STYLE_TEMPLATES)


# --- The latent cache and the batch -----------------------------------------------------------------------------------


def test_the_cache_holds_true_encodings_of_pictures_and_mirror_images(tiny_model):
    vae = load_vae(tiny_model, torch.device("cpu"))
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    cache = encode_dataset(vae, images, encode_images)
    assert cache.mean.shape == cache.std.shape == (3, 2, 4, 8, 8)
    assert cache.mean.dtype == cache.std.dtype == torch.float32 and not cache.mean.requires_grad
    with torch.no_grad():
        for side, pictures in enumerate([images, images.flip(-1)]):
            posterior = vae.encode(pictures).latent_dist
            torch.testing.assert_close(cache.mean[:, side], posterior.mean * 0.7)  # the model's scaling factor
            torch.testing.assert_close(cache.std[:, side], posterior.std * 0.7)
    assert (cache.mean[:, 1] - cache.mean[:, 0].flip(-1)).abs().max() > 1e-3  # mirrored latents are something else


def test_the_cache_is_scaled_and_shifted_as_the_unet_expects():
    vae = SimpleNamespace(config=SimpleNamespace(scaling_factor=0.5, shift_factor=3.0))
    images = torch.zeros(2, 3, 8, 8)
    cache = encode_dataset(vae, images, lambda vae, x, batch: (torch.full((len(x), 4, 1, 1), 7.0),) * 2)
    assert (cache.mean == 2.0).all() and (cache.std == 3.5).all()  # (7 - 3) / 2 and 7 / 2


@pytest.mark.parametrize("broken", [0, 1])
def test_a_vae_that_overflows_is_a_user_error(broken):
    vae = SimpleNamespace(config=SimpleNamespace(scaling_factor=1.0))
    moments = [torch.zeros(2, 4, 2, 2), torch.ones(2, 4, 2, 2)]
    moments[broken][1, 0, 0, 0] = torch.inf
    with pytest.raises(UserError, match="--model.*not finite"):
        encode_dataset(vae, torch.zeros(2, 3, 8, 8), lambda vae, x, batch: moments)


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def cache():
    mean = torch.randn(5, 2, 4, 3, 3, generator=generator(1)) * 3
    return LatentCache(mean, torch.rand(mean.shape, generator=generator(2)) + 0.5)


TEMPLATE_IDS = torch.arange(27)[:, None] * 100 + torch.arange(6)  # [T, L]


def test_a_batch_is_what_it_says(cache):
    exact = LatentCache(cache.mean, torch.zeros_like(cache.std))
    latents, noise, token_ids, picks = draw_batch(exact, TEMPLATE_IDS, 8, generator(0))
    assert latents.shape == noise.shape == (8, 4, 3, 3) and latents.dtype == noise.dtype == torch.float32
    assert token_ids.shape == (8, 6) and token_ids.dtype == torch.int64 and picks.shape == (8, 2)
    for latent, (picture, mirrored) in zip(latents, picks.tolist(), strict=True):
        assert torch.equal(latent, cache.mean[picture, mirrored])
    for ids in token_ids:
        assert (TEMPLATE_IDS == ids).all(dim=1).sum() == 1


def test_a_draw_is_determined_by_its_generator_and_fresh_for_every_seed(cache):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (draw_batch(cache, TEMPLATE_IDS, 8, generator(s)) for s in (10, 10, 11))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert torch.equal(torch.get_rng_state(), state)  # the program's own randomness is neither used nor moved
    shared = generator(10)
    draw_batch(cache, TEMPLATE_IDS, 8, shared)
    assert not torch.equal(draw_batch(cache, TEMPLATE_IDS, 8, shared).latents, first.latents)


def test_the_same_picture_gets_a_fresh_latent_each_time(cache):
    batch = draw_batch(LatentCache(cache.mean[:1], cache.std[:1]), TEMPLATE_IDS, 64, generator(0))
    plain = batch.latents[batch.picks[:, 1] == 0]
    assert len(plain) > 10 and len(plain.flatten(1).unique(dim=0)) == len(plain)


@pytest.mark.parametrize("batch_size", [1, 4, 5, 8, 23])
def test_pictures_and_sentences_are_dealt_evenly(cache, batch_size):
    pictures, mirrors, sentences = torch.zeros(5), torch.zeros(2), torch.zeros(27)
    steps = 2000 // batch_size
    for step in range(steps):
        batch = draw_batch(cache, TEMPLATE_IDS, batch_size, generator(step))
        counts = batch.picks[:, 0].bincount(minlength=5)
        assert counts.max() - counts.min() <= 1
        pictures += counts
        mirrors += batch.picks[:, 1].bincount(minlength=2)
        here = (batch.token_ids[:, 0] // 100).bincount(minlength=27)
        assert here.max() - here.min() <= 1
        sentences += here
    drawn = steps * batch_size
    for counts in (pictures, mirrors, sentences):  # over the steps all are equally likely, within 5 sigma
        share = 1 / len(counts)
        assert (counts - drawn * share).abs().max() < 5 * (drawn * share * (1 - share)) ** 0.5


def test_latents_have_the_moments_of_the_posterior(cache):
    draws = 20_000
    batch = draw_batch(cache, TEMPLATE_IDS, draws, generator(3))
    for picture in range(5):
        for mirrored in range(2):
            chosen = (batch.picks == torch.tensor([picture, mirrored])).all(dim=1)
            latents, mean, std = batch.latents[chosen], cache.mean[picture, mirrored], cache.std[picture, mirrored]
            n = len(latents)
            assert n > 1500
            assert ((latents.mean(dim=0) - mean).abs() < 5 * std / n**0.5).all()
            assert ((latents.std(dim=0) / std - 1).abs() < 5 / (2 * n) ** 0.5).all()
    noise = batch.noise
    assert (noise.mean(dim=0).abs() < 5 / draws**0.5).all()
    assert ((noise.std(dim=0) - 1).abs() < 5 / (2 * draws) ** 0.5).all()
    drawn = (batch.latents - cache.mean[tuple(batch.picks.T)]) / cache.std[tuple(batch.picks.T)]
    correlation = (drawn * noise).mean(dim=0)  # the diffusion noise is not the noise of the latents
    assert (correlation.abs() < 5 / draws**0.5).all()
