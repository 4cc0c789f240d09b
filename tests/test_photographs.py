"""Images as people have them: colour profiles, phone files, transparency and masks, captions, where the files lie."""

import io
import itertools
import json
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps
from safetensors.torch import load_file

import data
import model_utils as mu
import train
from model_utils import UserError

RED, BLUE = (200, 30, 40), (40, 60, 220)
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)


def write(path, content="", **options):
    """A file of text, of bytes or of an image, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Image.Image):
        content.save(path, **options)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def colourful(size=96):
    """An image with every hue from black to white."""
    x, y = np.meshgrid(np.linspace(0, 1, size), np.linspace(0, 1, size))
    hues = 0.5 + 0.5 * np.cos(2 * np.pi * (x[..., None] + [0, 1 / 3, 2 / 3]))
    return Image.fromarray((255 * (y[..., None] * hues + (1 - y[..., None]) * x[..., None])).round().astype(np.uint8))


def half(left, right=None, size=(32, 32)):
    """An image of two halves; without a second colour the right half is transparent."""
    image = Image.new("RGBA", size, (*left, 255))
    image.paste((*right, 255) if right else (0, 255, 0, 0), (size[0] // 2, 0, *size))
    return image


def difference(path, image, channels=slice(3)):
    """The mean difference between an image file as it is read and an sRGB image, of 255."""
    reference = write(path.with_name("reference.png"), image)
    read = [data.read_image(p, 48)[..., channels].astype(float) for p in (path, reference)]
    return np.abs(read[0] - read[1]).mean()


# --- Colour profiles --------------------------------------------------------------------------------------------------

D50, BRADFORD = (0.9642, 1.0, 0.8249), [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
D65_XY, D50_XY = (0.3127, 0.3290), (0.3457, 0.3585)
SRGB = (D65_XY, [(0.640, 0.330), (0.300, 0.600), (0.150, 0.060)], None)
SPACES = {  # white and primaries (x, y), gamma (None: sRGB's own curve)
    "Display P3": (D65_XY, [(0.680, 0.320), (0.265, 0.690), (0.150, 0.060)], None),
    "Adobe RGB": (D65_XY, [(0.640, 0.330), (0.210, 0.710), (0.150, 0.060)], 563 / 256),
    "ProPhoto": (D50_XY, [(0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001)], 1.8),
}


def icc_profile(space, tags, kind=b"mntr", version=4, connection=b"XYZ "):
    """An ICC profile: a header of 128 bytes, a table of its tags, what they hold."""
    position, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        table += struct.pack(">4sII", name, position + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    header = struct.pack(">I4xI4s4s4s12x4s", position + len(body), version << 24, kind, space, connection, b"acsp")
    return header.ljust(68, b"\0") + fixed(D50) + bytes(48) + struct.pack(">I", len(tags)) + table + body


def fixed(numbers):
    return b"".join(struct.pack(">i", round(65536 * number)) for number in numbers)


def xyz_tag(numbers):
    return b"XYZ " + bytes(4) + fixed(numbers)


def curve_tag(gamma):
    numbers = [gamma] if gamma else [2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045]  # sRGB's is in two parts
    return struct.pack(">4s4xH2x", b"para", 0 if gamma else 3) + fixed(numbers)


def rgb_profile(white, primaries, gamma):
    tags = {b"wtpt": xyz_tag(D50)}
    for letter, column in zip("rgb", to_d50(white, primaries).T, strict=True):
        tags |= {f"{letter}XYZ".encode(): xyz_tag(column), f"{letter}TRC".encode(): curve_tag(gamma)}
    return icc_profile(b"RGB ", tags)


def to_d50(white, primaries):
    """The matrix from linear RGB of these primaries to XYZ, adapted to D50."""
    white, *columns = (np.array([x / y, 1, (1 - x - y) / y]) for x, y in [white, *primaries])
    columns = np.stack(columns, axis=1)
    columns = columns * np.linalg.solve(columns, white)
    scale = (np.array(BRADFORD) @ D50) / (np.array(BRADFORD) @ white)
    return np.linalg.inv(BRADFORD) @ np.diag(scale) @ BRADFORD @ columns


def srgb_curve(linear):
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear.clip(1e-9) ** (1 / 2.4) - 0.055)


def stored_in(space, image):
    """What an editor writes for an sRGB image in another colour space -> the image, its profile."""
    white, primaries, gamma = SPACES[space]
    pixels = np.asarray(image) / 255
    linear = np.where(pixels <= 0.04045, pixels / 12.92, ((pixels + 0.055) / 1.055) ** 2.4)
    linear = (linear @ (np.linalg.inv(to_d50(white, primaries)) @ to_d50(*SRGB[:2])).T).clip(0, 1)
    pixels = linear ** (1 / gamma) if gamma else srgb_curve(linear)
    return Image.fromarray((255 * pixels).round().astype(np.uint8)), rgb_profile(white, primaries, gamma)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_colours_of_other_profiles_are_converted_to_srgb(tmp_path, space, suffix, capsys):
    image, profile = stored_in(space, colourful())
    options = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    image.save(tmp_path / f"without.{suffix}", **options)
    image.save(tmp_path / f"with.{suffix}", icc_profile=profile, **options)
    assert difference(tmp_path / f"without.{suffix}", colourful()) > 3
    assert difference(tmp_path / f"with.{suffix}", colourful()) < 1
    assert capsys.readouterr().err == ""


def test_an_srgb_profile_changes_nothing(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert difference(write(tmp_path / "a.png", colourful(), icc_profile=profile), colourful()) < 0.1


@pytest.mark.parametrize("mode", ["RGBA", "P", "L"])
def test_a_colour_profile_of_transparent_palette_and_grey_images(tmp_path, mode):
    expected = {"RGBA": colourful(), "P": colourful().quantize(200).convert("RGB"), "L": colourful().convert("L")}[mode]
    image, profile = stored_in("Display P3", expected.convert("RGB"))
    image = image.quantize(256) if mode == "P" else image.convert(mode)
    if mode == "RGBA":
        for each in (image, expected):
            each.putalpha(Image.linear_gradient("L").resize(image.size))
    path = write(tmp_path / "a.png", image, icc_profile=profile)
    assert difference(path, expected) < 1
    assert difference(path, expected, channels=3) == 0


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_profiles(tmp_path, mode):
    linear = np.tile(np.linspace(0.05, 1, 64), (64, 1))
    image = Image.fromarray((65535 * linear).astype(np.uint16) if mode == "I;16" else (255 * linear).astype(np.uint8))
    path = write(tmp_path / "a.png", image.convert(mode), icc_profile=GREY_PROFILE)
    assert difference(path, Image.fromarray((255 * srgb_curve(linear)).round().astype(np.uint8))) < 1


def lab_to_srgb(lightness, a, b):
    """CIE Lab (D50) -> sRGB, of 255."""
    f = (lightness + 16) / 116 + np.array([a / 500, 0, -b / 200])
    xyz = D50 * np.where(f > 6 / 29, f**3, (f - 4 / 29) * 3 * (6 / 29) ** 2)
    return 255 * srgb_curve((np.linalg.inv(to_d50(*SRGB[:2])) @ xyz).clip(0, 1))


@pytest.mark.parametrize(("inks", "lab"), [((0, 0, 0, 0), (100, 0, 0)), ((1, 0, 0, 0), (60, -20, -40))])
def test_cmyk_profiles(tmp_path, inks, lab):
    """White, and a cyan that is duller than the one of CMYK without a profile. The profile holds a table of Lab."""
    corners = np.tile(np.array([0, 128, 128], np.uint8), (2, 2, 2, 2, 1))  # black
    corners[inks] = np.round([lab[0] * 2.55, lab[1] + 128, lab[2] + 128])
    table = struct.pack(">4s4x3Bx", b"mft1", 4, 3, 2) + fixed(np.eye(3).ravel())
    table += bytes(range(256)) * 4 + corners.tobytes() + bytes(range(256)) * 3
    profile = icc_profile(b"CMYK", {b"wtpt": xyz_tag(D50), b"A2B0": table}, b"prtr", 2, b"Lab ")
    image = Image.new("CMYK", (32, 32), tuple(255 * ink for ink in inks))
    path = write(tmp_path / "a.jpg", image, icc_profile=profile, quality=100)
    np.testing.assert_allclose(data.read_image(path, 16)[8, 8, :3], lab_to_srgb(*lab), atol=2)


GREY_PROFILE = icc_profile(b"GRAY", {b"wtpt": xyz_tag(D50), b"kTRC": curve_tag(1)})


@pytest.mark.parametrize("profile", [b"garbage", rgb_profile(*SRGB)[:300], icc_profile(b"CMYK", {}), GREY_PROFILE])
def test_a_profile_that_is_damaged_or_of_another_mode_is_ignored_with_a_line(tmp_path, profile, capsys):
    path = write(tmp_path / "a.png", colourful(), icc_profile=profile)
    assert difference(path, colourful()) == 0
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "a.png" in error and "profile" in error


# --- Files of phones --------------------------------------------------------------------------------------------------


@pytest.fixture
def without_pillow_heif(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)


def test_heic_is_skipped_with_the_number_and_two_remedies(tmp_path, without_pillow_heif, capsys):
    write(tmp_path / "a.png", colourful())
    for name in ("b.heic", "c.HEIC", "d.jpg"):
        write(tmp_path / name, HEIC)
    assert data.load_training_images(tmp_path, 16)[2] == [tmp_path / "a.png"]
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "3 of 4" in error
    assert all(part in error for part in ("'b.heic'", "'c.HEIC'", "'d.jpg'", "pip install pillow-heif", "JPEG"))


@pytest.mark.parametrize("name", ["a.heic", "a.jpg"])
def test_a_folder_of_heic_alone_is_a_user_error_with_two_remedies(tmp_path, without_pillow_heif, name):
    write(tmp_path / name, HEIC)
    with pytest.raises(UserError, match=rf"^--images.*'{name}' \(HEIC: pip install pillow-heif, or export as JPEG"):
        data.load_training_images(tmp_path, 16)


@pytest.mark.parametrize("name", ["a.heic", "a.HIF", "a.jpg"])
def test_heic_is_read_where_pillow_heif_is_installed(tmp_path, name):
    pillow_heif = pytest.importorskip("pillow_heif")
    upright = colourful()
    image, profile = stored_in("Display P3", upright.transpose(Image.Transpose.ROTATE_90))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    buffer = io.BytesIO()
    pillow_heif.from_pillow(image).save(buffer, quality=-1, icc_profile=profile, exif=exif.tobytes(), chroma=444)
    write(tmp_path / name, buffer.getvalue())
    [path] = data.list_images(tmp_path)
    assert difference(path, upright) < 1.5


def test_a_photograph_of_48_megapixels_as_a_phone_saves_it(tmp_path):
    """An MPO (two JPEGs in one file), turned by its EXIF data, in Display P3, with a motion photo's film behind."""
    upright = colourful().resize((6000, 8000))
    image, profile = stored_in("Display P3", colourful().transpose(Image.Transpose.ROTATE_90))
    image, exif = image.resize((8000, 6000)), Image.Exif()
    exif[0x0112] = 6
    options = {"format": "MPO", "save_all": True, "append_images": [image.reduce(8)]}
    path = write(tmp_path / "IMG_1.jpg", image, exif=exif, icc_profile=profile, quality=95, **options)
    with Image.open(path) as opened:
        assert opened.format == "MPO" and opened.n_frames == 2
    path.write_bytes(path.read_bytes() + b"\0\0\0\x18ftypmp42" + bytes(5000))
    assert difference(path, ImageOps.fit(upright, (500, 500))) < 1


# --- Masks ------------------------------------------------------------------------------------------------------------


def loss_of(latents, noise, mask):
    """inversion_loss of a UNet that predicts 0, so that the error is the noise."""
    unet = lambda x, t, c: SimpleNamespace(sample=torch.zeros_like(x))  # noqa: E731
    schedule = mu.NoiseSchedule(torch.linspace(0.99, 0.01, 10))
    return train.inversion_loss(unet, latents, noise, torch.tensor([2, 5]), torch.zeros(2, 4, 8), schedule, *mask)


def test_masked_parts_do_not_count_in_the_loss():
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 2, 4, 6, 6, generator=generator)
    mask = torch.zeros(2, 1, 6, 6)
    mask[0, :, :2], mask[1, :, 1:4, 3:] = 1, 0.5
    loss = loss_of(latents, noise, [mask])
    expected = torch.stack([noise[0, :, :2].square().mean(), noise[1, :, 1:4, 3:].square().mean()])
    torch.testing.assert_close(loss, expected)
    assert torch.equal(loss_of(latents, torch.where(mask > 0, noise, 99.0), [mask]), loss)


def test_without_a_mask_the_loss_is_exactly_the_mean_squared_error():
    latents, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = noise.square().mean(dim=(1, 2, 3))
    for mask in ([], [None], [torch.ones(2, 1, 8, 8)]):
        assert torch.equal(loss_of(latents, noise, mask), expected)


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_transparency_becomes_a_mask_and_white(tmp_path, suffix):
    write(tmp_path / f"a.{suffix}", half(RED), lossless=True)
    write(tmp_path / f"b.{suffix}", half(RED, BLUE), lossless=True)
    images, masks, _ = data.load_training_images(tmp_path, 16)
    assert masks.shape == (2, 1, 16, 16) and masks[1].min() == 1
    assert masks[0, 0, :, :4].min() == 1 and masks[0, 0, :, 12:].max() == 0
    assert images[0, :, :, 12:].min() == 1


@pytest.mark.parametrize("mask", [half((255,) * 3, (0,) * 3).convert("L"), half(BLUE)], ids=["grey", "cut out"])
def test_masks_of_the_same_names_are_white_or_opaque_where_the_image_counts(tmp_path, mask):
    write(tmp_path / "images" / "a.jpg", half(RED, BLUE).convert("RGB"))
    write(tmp_path / "masks" / "a.png", mask)
    images, masks, _ = data.load_training_images(tmp_path / "images", 16, tmp_path / "masks")
    assert masks[0, 0, :, :4].min() == 1 and masks[0, 0, :, 12:].max() == 0
    assert images[0, 0, :, 12:].max() < 0  # still blue


def test_what_is_transparent_does_not_count_whatever_the_mask_says(tmp_path):
    write(tmp_path / "images" / "a.png", half(RED))
    write(tmp_path / "masks" / "a.png", Image.new("L", (8, 8), 128))
    _, masks, _ = data.load_training_images(tmp_path / "images", 16, tmp_path / "masks")
    assert masks[..., :4].unique().tolist() == pytest.approx([128 / 255]) and masks[..., 12:].max() == 0


@pytest.mark.parametrize("masks", ["missing", "damaged"])
def test_a_mask_that_cannot_be_read_is_a_user_error(tmp_path, masks):
    write(tmp_path / "images" / "a.png", colourful())
    write(tmp_path / "masks" / ("a.png" if masks == "damaged" else "b.png"), "no image")
    with pytest.raises(UserError, match=r"^--masks: no mask of 'a.png' .*(there is none|not an image)"):
        data.load_training_images(tmp_path / "images", 16, tmp_path / "masks")


@pytest.mark.parametrize("by", ["alpha", "mask"])
def test_an_image_of_which_nothing_counts_is_refused(tmp_path, by):
    write(tmp_path / "images" / "a.png", colourful())
    write(tmp_path / "images" / "b.png", Image.new("RGBA", (9, 9), (1, 2, 3, 0)) if by == "alpha" else colourful())
    if by == "mask":
        write(tmp_path / "masks" / "a.png", Image.new("L", (9, 9), 255))
        write(tmp_path / "masks" / "b.png", Image.new("L", (9, 9), 0))
    with pytest.raises(UserError, match=r"^--images.*b\.png' is transparent or masked.*take it out"):
        data.load_training_images(tmp_path / "images", 16, tmp_path / "masks" if by == "mask" else None)


def test_masks_have_the_size_of_latents_and_are_mirrored_with_the_images(tiny_model):
    """Wherever the right half of a drawn image is masked, the right half of its mask is 0."""
    images = torch.full((1, 3, 16, 16), -1.0)
    masks = torch.ones(1, 1, 16, 16)
    images[..., 9:], masks[..., 9:] = 1, 0
    cache = data.encode_dataset(mu.load_vae(tiny_model, "cpu"), images, masks)
    assert cache.mask.shape == (1, 2, 1, 8, 8)
    assert cache.mask[0, 0, 0, 0].tolist() == [1, 1, 1, 1, 0.5, 0, 0, 0]
    exact = cache._replace(std=torch.zeros_like(cache.std))
    latents, _, _, mask = data.draw_examples(exact, torch.zeros(1, 1, 5).long(), 16, torch.Generator().manual_seed(0))
    mirrored = [torch.equal(row, cache.mean[0, 1]) for row in latents]
    assert 0 < sum(mirrored) < 16
    assert all(torch.equal(row, cache.mask[0, int(flip)]) for row, flip in zip(mask, mirrored, strict=True))
    assert torch.equal(cache.mask[0, 1], cache.mask[0, 0].flip(-1))


# --- Captions ---------------------------------------------------------------------------------------------------------


def captions_of(paths, templates_file=None):
    """The captions of each image, as a set, and where they are from."""
    captions, choices, source = data.load_captions(paths, "<kat>", ["a photo of {}", "a {}"], templates_file)
    assert choices.shape[0] == len(paths)
    return [{captions[j] for j in row} for row in choices.tolist()], source


def test_captions_beside_the_images(tmp_path, capsys):
    texts = ["a {} on a sofa\n\n  {} at night  \n", "<kat> in a box", "orange cat, sitting", " \n", None]
    paths = [write(tmp_path / f"{i}.png", colourful()) for i in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        if text:
            write(path.with_suffix(".txt"), text)
    assert data.list_images(tmp_path) == paths and capsys.readouterr().err == ""
    templates = {"a photo of <kat>", "a <kat>"}
    own = [{"a <kat> on a sofa", "<kat> at night"}, {"<kat> in a box"}, {"<kat>, orange cat, sitting"}]
    assert captions_of(paths) == ([*own, templates, templates], "3 with captions such as 'a {} on a sofa'")
    assert captions_of(paths[4:]) == ([templates], "")


def test_a_file_of_templates_is_for_all_images(tmp_path):
    paths = [write(tmp_path / f"{i}.png") for i in range(2)]
    write(tmp_path / "0.txt", "not this")
    file = write(tmp_path / "my.txt", "\ufeffein Foto von {}\r\n{} на луне\r\n")
    assert captions_of(paths, file) == ([{"ein Foto von <kat>", "<kat> на луне"}] * 2, f"captions of {file}")


@pytest.mark.parametrize("content", [None, "", "a photo of {}\na cat", b"\xff\xfea\0 \0{\0}\0"])
def test_templates_that_cannot_be_used_are_a_user_error(tmp_path, content):
    file = tmp_path / "my.txt"
    if content is not None:
        write(file, content)
    with pytest.raises(UserError, match=r"^--templates.*my\.txt"):
        captions_of([tmp_path / "a.png"], str(file))


def cache_of(count):
    """A cache in which latents, noise-free, are the number of their image."""
    mean = torch.arange(count).view(-1, 1, 1, 1, 1).expand(count, 2, 4, 2, 2).float()
    return data.LatentCache(mean, torch.zeros_like(mean), torch.ones(count, 2, 1, 2, 2))


def test_every_image_comes_with_its_own_captions():
    token_ids = torch.arange(6).view(3, 2, 1)  # image i: captions 2 i and 2 i + 1
    drawn = [data.draw_examples(cache_of(3), token_ids, 4, train.step_generator(0, step)) for step in range(20)]
    images = torch.cat([latents[:, 0, 0, 0] for latents, *_ in drawn]).long()
    captions = torch.cat([ids[:, 0] for _, _, ids, _ in drawn])
    assert torch.equal(captions // 2, images) and captions.unique().tolist() == list(range(6))


def test_without_captions_the_draws_are_those_of_older_versions():
    """In this order: images, mirroring, captions, the latents' noise, the noise."""
    generator = train.step_generator(3, 7)
    images, mirrored = torch.randperm(5, generator=generator)[:4], torch.randint(2, (4,), generator=generator)
    captions = torch.randperm(27, generator=generator)[:4]
    sample, noise = (torch.randn(4, 4, 2, 2, generator=generator) for _ in range(2))
    mean = torch.randn(5, 2, 4, 2, 2)
    cache = data.LatentCache(mean, torch.ones_like(mean), torch.ones(5, 2, 1, 2, 2))
    template_ids = torch.arange(27)[:, None]  # [T, L], the same for all images
    drawn = data.draw_examples(cache, template_ids.expand(5, 27, 1), 4, train.step_generator(3, 7))
    expected = (mean[images, mirrored] + sample, noise, template_ids[captions], torch.ones(4, 1, 2, 2))
    assert all(torch.equal(*pair) for pair in zip(drawn, expected, strict=True))


# --- Whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def learn(tiny_model, tmp_path, monkeypatch):
    """Train two steps on tmp_path/images -> the learned rows. It holds three images."""
    monkeypatch.chdir(tmp_path)
    for i in range(3):
        write(tmp_path / "images" / f"{i}.png", colourful().rotate(90 * i))
    runs = itertools.count()

    def learn(*options, folder=None):
        common = [
            "--model",
            tiny_model,
            "--initializer_token",
            "cat",
            "--batch_size",
            "2",
            "--preview_steps",
            "0",
            "--no-score",
            "--steps",
            "2",
        ]
        folder = folder or str(tmp_path / f"run{next(runs)}")
        run = train.train(train.parse_options([*common, "--images", "images", "--output_dir", folder, *options]))
        return load_file(run / "learned_embeds.safetensors")["<kat>"]

    return learn


def first_line(capsys):
    return capsys.readouterr().out.splitlines()[0]


def test_a_run_with_masks_learns_something_else_but_with_white_ones_the_same(learn, tmp_path, capsys):
    for i in range(3):
        write(tmp_path / "white" / f"{i}.png", Image.new("L", (5, 5), 255))
        write(tmp_path / "left" / f"{i}.png", half((255,) * 3, (0,) * 3).convert("L"))
    plain = learn()
    assert torch.equal(learn("--masks", "white"), plain)
    assert "masked" not in capsys.readouterr().out
    assert not torch.equal(learn("--masks", "left"), plain)
    assert "3 images, 3 of them masked or transparent" in first_line(capsys)


def test_a_run_with_captions_learns_something_else(learn, tmp_path, capsys):
    plain = learn()
    capsys.readouterr()
    write(tmp_path / "images" / "1.txt", "two red {} at night")
    assert not torch.equal(learn(), plain)
    assert "3 images, 1 with captions such as 'two red {} at night'" in first_line(capsys)


@pytest.mark.parametrize("changed", ["caption", "templates", "mask"])
def test_resume_goes_on_with_moved_files_and_refuses_changed_ones(learn, tmp_path, changed):
    name, option = {"caption": ("images/0.txt", []), "templates": ("my.txt", ["--templates", "my.txt"]),
                    "mask": ("masks/0.png", ["--masks", "masks"])}[changed]  # fmt: skip
    contents = ["a {}", "the {}"] if changed != "mask" else [Image.new("L", (9, 9), 255), half(RED)]
    for i in range(3):
        write(tmp_path / "masks" / f"{i}.png", half((255,) * 3, (0,) * 3))
    write(tmp_path / name, contents[0])
    learn(*option, folder="run")
    resume = ["--resume", "--steps", "3", "--output_dir", "run"]
    config = json.loads(Path("run", "config.json").read_text())
    assert not option or Path(config[option[0][2:]]).is_absolute()
    write(tmp_path / name, contents[1])
    with pytest.raises(UserError, match="of a run with other images, masks or captions"):
        train.train(train.parse_options(resume))
    write(tmp_path / name, contents[0])
    if option:
        Path(option[1]).rename("moved")
        resume += [option[0], "moved"]
    train.train(train.parse_options(resume))


# --- Where the files lie ----------------------------------------------------------------------------------------------


def test_a_tilde_is_the_home_folder(learn, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    learn("--images=~/images", folder="~/run")
    assert (tmp_path / "run" / "learned_embeds.safetensors").exists()
    assert train.parse_options(["--resume=~/run"]).output_dir == str(tmp_path / "run")


def test_one_image_file_instead_of_a_folder(learn, tmp_path, capsys):
    write(tmp_path / "images" / "1.txt", "red {}")
    assert learn("--images", "images/1.png").isfinite().all()
    assert "1 images, 1 with captions such as 'red {}'" in first_line(capsys)
    assert data.load_training_images(tmp_path / "images" / "1.png", 16)[0].shape == (1, 3, 16, 16)


def test_a_folder_of_folders_is_answered_with_did_you_mean(tmp_path):
    for name in ("b/1.jpg", "a/notes.txt", "c/2.png", "c/.hidden.png"):
        write(tmp_path / "my cats" / name)
    b, c = (repr(str(tmp_path / "my cats" / name)) for name in "bc")
    with pytest.raises(UserError) as caught:
        data.list_images(tmp_path / "my cats")
    assert str(caught.value).endswith(f"did you mean {b} or {c}?")


@pytest.mark.parametrize("folder", ["images", "images/run", "images/../images", "link/run"])
@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_an_output_folder_among_the_training_images_is_refused(learn, tmp_path, folder, overwrite):
    (tmp_path / "link").symlink_to("images")
    with pytest.raises(UserError, match="^--output_dir .* --images"):
        learn(*overwrite, folder=folder)
    assert not (tmp_path / "images" / "run").exists()
