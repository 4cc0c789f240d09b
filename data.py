"""The data set: captions, reading images, the latent cache, the random examples of a step."""

import io
import math
import re
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

import model_utils as mu
from model_utils import UserError

# --- Captions ---------------------------------------------------------------------------------------------------------

# Captions the token is trained with (the role of the lists in Gal et al. 2022, appendix D).
OBJECT_TEMPLATES = [
    "a photo of a {}", "a photo of the {}", "a photo of my {}", "a photo of one {}", "a photograph of a {}",
    "a picture of a {}", "a picture of the {}", "a picture of my {}", "a picture of one {}", "a close-up photo of a {}",
    "a close-up photo of the {}", "a close-up picture of my {}", "a cropped photo of a {}",
    "a cropped picture of the {}", "a good photo of a {}", "a good picture of the {}", "a nice photo of a {}",
    "a nice picture of my {}", "a clear photo of the {}", "a clear picture of a {}", "a bright photo of a {}",
    "a bright picture of the {}", "a simple photo of a {}", "a simple picture of the {}", "a small photo of the {}",
    "a large photo of a {}", "an image of a {}",
]  # fmt: skip
STYLE_TEMPLATES = [f"{what} in the style of {{}}" for what in [
    "a painting", "a picture", "an image", "a work", "a scene", "a page", "a good painting", "a nice painting",
    "a clear painting", "a bright painting", "a simple painting", "a small painting", "a large painting",
    "a close-up painting", "a cropped painting", "a good picture", "a nice picture", "a bright picture",
    "a simple picture",
]]  # fmt: skip


def read_templates(path, components, token):
    """The captions in a text file, a line each, with {} for the token; a line without {} or token gets '{}, ' in front.

    In A1111's templates [name] is the token; [filewords], the words of a file's name, are left out.
    """
    text = re.sub(r",? *\[filewords\]", "", Path(path).read_text(encoding="utf-8-sig")).replace("[name]", "{}")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    found = [components.placeholders[token][0] in components.tokenizer(line, verbose=False).input_ids for line in lines]
    return [line if there or "{}" in line else f"{{}}, {line}" for line, there in zip(lines, found, strict=True)]


# --- Reading images ---------------------------------------------------------------------------------------------------

FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"]  # Pillow knows more, some of which start other programs


def read_image(path, resolution):
    """The center square of an image, upright, in sRGB, on white: uint8 [resolution, resolution, 4], the last its alpha.

    Of an animation the first frame is taken. Images are cropped, never squashed. Any exception if the file cannot be
    read: a damaged one can raise nearly anything inside Pillow.
    """
    formats = FORMATS
    with suppress(ImportError):
        import pillow_heif  # optional, for the HEIC files of iPhones

        pillow_heif.register_heif_opener()
        formats = [*FORMATS, "HEIF"]
    Image.MAX_IMAGE_PIXELS = None  # phones take photos of 200 megapixels
    try:
        with warnings.catch_warnings(action="ignore"), open(path, "rb") as file:
            image = Image.open(file, formats=formats)  # given a path, Pillow 13 garbles some turned TIFFs (memory map)
            image.draft(None, (3 * resolution, 3 * resolution))  # large JPEGs: decode at 1/2, 1/4 or 1/8 of the size
            image.load()
            with suppress(Exception):  # damaged EXIF data is no reason to refuse the image
                ImageOps.exif_transpose(image, in_place=True)
    except UnidentifiedImageError:
        raise ValueError("not an image of a known kind (HEIC: pip install pillow-heif)") from None
    square = to_square(image, resolution)
    if profile := image.info.get("icc_profile"):
        with suppress(Exception):  # a damaged profile, or one of other colours, is ignored
            square = to_srgb(square, profile)
    square = square.convert("RGBA")
    if not any(square.getchannel("A").getextrema()):
        raise ValueError("its center is transparent")
    on_white = Image.alpha_composite(Image.new("RGBA", square.size, "white"), square)
    on_white.putalpha(square.getchannel("A"))
    return np.array(on_white)


def to_square(image, resolution):
    """Resize the center square of an image -> [resolution, resolution] in mode L, LA, RGB, RGBA or CMYK."""
    if image.mode[0] in "IF":
        raise ValueError("grey of 16 or 32 bits: save it with 8 bits")
    if image.mode not in ("L", "LA", "RGB", "RGBA", "CMYK") or "transparency" in image.info:
        # before the resize: palette indices cannot be averaged
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    x, y, half = image.width / 2, image.height / 2, min(image.size) / 2
    box = (x - half, y - half, x + half, y + half)
    return image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def to_srgb(image, profile):
    """Convert the colours of an image from those of its ICC profile -> mode RGBA. Any exception if they do not fit."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[source.profile.xcolor_space.strip()]
    if image.mode.removesuffix("A") not in (mode, "L"):  # grey images may have a profile of colours
        raise ValueError("a profile for other images")
    srgb = ImageCms.createProfile("sRGB")
    colours = ImageCms.profileToProfile(image.convert(mode), source, srgb, outputMode="RGB")
    colours.putalpha(image.convert("RGBA").getchannel("A"))
    return colours


def load_images(folder, resolution):
    """Read a folder of images, or one image -> images [N, 3, R, R] in [-1, 1], alpha [N, 1, R, R] in [0, 1], N paths.

    What cannot be read is named on stderr. UserError if nothing can.
    """
    if not Path(folder).exists():
        raise UserError(f"--images {folder}: no such file or folder; name one that holds images.")
    arrays, paths = [], []
    for path in [Path(folder)] if Path(folder).is_file() else sorted(Path(folder).iterdir()):
        if path.is_dir() or path.suffix == ".txt" or path.name.startswith("."):  # .txt: captions
            continue
        try:
            arrays.append(read_image(path, resolution))
            paths.append(path)
        except Exception as error:
            print(f"skipped {path}: {mu.reason(error)}", file=sys.stderr)
    if not paths:
        raise UserError(f"--images {folder}: no image in it can be read; put in some, as {', '.join(FORMATS)}.")
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()  # [N, 4, R, R]
    return pixels[:, :3] / 127.5 - 1, pixels[:, 3:] / 255, paths


# --- The latent cache, and the examples of a step ---------------------------------------------------------------------


class Dataset(NamedTuple):
    """The VAE's posterior of every image ([:, 0]) and its mirror image ([:, 1]), and its captions. On the CPU."""

    mean: torch.Tensor  # fp32 [N, 2, 4, h, w], scaled as the UNet takes it; latents = mean + std * randn
    std: torch.Tensor
    mask: torch.Tensor  # fp32 [N, 2, 1, h, w] in [0, 1], of the images' alpha: how much each latent pixel counts
    token_ids: torch.Tensor  # [N, T, L], T captions of each image as tokens
    images: torch.Tensor  # [N, 3, R, R] in [-1, 1]


def load_dataset(components, folder, resolution, token, learnable_property="object", templates_file=None):
    """Read images and captions, encode both -> Dataset. UserError if no image can be read or a caption has no token."""
    images, alpha, paths = load_images(folder, resolution)
    built_in = STYLE_TEMPLATES if learnable_property == "style" else OBJECT_TEMPLATES
    templates = read_templates(templates_file, components, token) if templates_file else built_in
    own = [path.with_suffix(".txt") for path in paths]  # beside the images
    rows = [(file.is_file() and read_templates(file, components, token)) or templates for file in own]
    longest = max(map(len, rows))  # shorter lists begin again
    captions = [row[i % len(row)].replace("{}", token) for row in rows for i in range(longest)]
    token_ids = mu.tokenize(components, captions)  # [N * T, L]
    for caption, ids in zip(captions, token_ids, strict=True):
        if components.placeholders[token][0] not in ids:  # it would learn nothing
            raise UserError(f"--placeholder_token: {token!r} is no separate word in the caption {caption!r}.")
    pairs = torch.stack([images, images.flip(-1)], dim=1)  # [N, 2, 3, R, R]; both are encoded: a VAE is not symmetric
    mean, std = (x.unflatten(0, (-1, 2)) for x in mu.encode_images(components, pairs.flatten(0, 1)))  # [N, 2, 4, h, w]
    small = F.interpolate(alpha, mean.shape[-2:], mode="area")  # [N, 1, h, w]
    mask = torch.stack([small, small.flip(-1)], dim=1)
    return Dataset(mean, std, mask, token_ids.unflatten(0, (len(images), longest)), images)


def draw_examples(dataset, batch_size, generator):
    """Draw the examples of a step -> latents, noise [B, 4, h, w], token_ids [B, L], mask [B, 1, h, w].

    All randomness comes from `generator` (CPU). Images and captions are sampled without replacement until each has come
    once. The latents are a fresh sample from the VAE's posterior, as if the images were encoded at every step.
    """
    picks = without_replacement(len(dataset.mean), batch_size, generator)
    mirrored = torch.randint(2, (batch_size,), generator=generator)
    choices = without_replacement(dataset.token_ids.shape[1], batch_size, generator)
    mean, std = dataset.mean[picks, mirrored], dataset.std[picks, mirrored]  # [B, 4, h, w]
    latents = mean + std * torch.randn(mean.shape, generator=generator)
    noise = torch.randn(mean.shape, generator=generator)
    return latents, noise, dataset.token_ids[picks, choices], dataset.mask[picks, mirrored]


def without_replacement(count, batch_size, generator):
    rounds = math.ceil(batch_size / count)
    return torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])[:batch_size]
