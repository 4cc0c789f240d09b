"""Images and prompts: reading images, templates, the latent cache, drawing the examples of a step."""

import contextlib
import math
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from model_utils import UserError, encode_images

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
STYLE_TEMPLATES = [
    "a painting in the style of {}", "a picture in the style of {}", "an image in the style of {}",
    "a work in the style of {}", "a scene in the style of {}", "a page in the style of {}",
    "a good painting in the style of {}", "a nice painting in the style of {}", "a clear painting in the style of {}",
    "a bright painting in the style of {}", "a simple painting in the style of {}",
    "a small painting in the style of {}", "a large painting in the style of {}",
    "a close-up painting in the style of {}", "a cropped painting in the style of {}",
    "a good picture in the style of {}", "a nice picture in the style of {}", "a bright picture in the style of {}",
    "a simple picture in the style of {}",
]  # fmt: skip

SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"]  # Pillow knows more, some of which start other programs
MAX_PIXELS = 250_000_000  # the largest phone photos have 200 million; a file that claims more is taken for a bomb


def list_images(folder):
    """Return the image files of a folder as a sorted list of paths.

    Hidden files, sub-folders and files without an image's suffix are named in one line on stderr and left out.
    UserError if the folder cannot be read or holds no image.
    """
    try:
        entries = sorted(Path(folder).iterdir())
    except OSError as error:
        what = f"cannot read the folder {str(folder)!r} ({error.strerror})"
        raise UserError(f"--images: {what}; name a folder of images.") from error
    paths = [p for p in entries if not p.name.startswith(".") and p.suffix.lower() in SUFFIXES and p.is_file()]
    others = sorted(repr(p.name) for p in set(entries) - set(paths))
    if not paths:
        found = f"only {_first(others)}" if others else "it is empty"
        raise UserError(f"--images: no images in {str(folder)!r} ({found}); put in some, as {', '.join(FORMATS)}.")
    if others:
        print(f"skipped in {str(folder)!r}, not images: {_first(others)}", file=sys.stderr)
    return paths


def read_image(path, resolution):
    """Return the center square of an image, upright and on white, as a uint8 array [resolution, resolution, 3].

    Of an animation the first frame is taken. Images are cropped, never squashed. ValueError with the reason if the file
    cannot be read.
    """
    pillow_limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # Pillow's own limit refuses 200 megapixels
    try:
        with warnings.catch_warnings(action="ignore"), open(path, "rb") as file:
            image = Image.open(file, formats=FORMATS)  # given a path, Pillow 13 garbles some turned TIFFs (memory map)
            if (pixels := image.width * image.height) > MAX_PIXELS:
                raise ValueError(f"{pixels // 10**6} megapixels, more than the limit of {MAX_PIXELS // 10**6}")
            image.draft(None, (3 * resolution, 3 * resolution))  # large JPEGs: decode at 1/2, 1/4 or 1/8 of the size
            image.load()
            with contextlib.suppress(Exception):  # damaged EXIF data is no reason to refuse the image
                ImageOps.exif_transpose(image, in_place=True)
            return _square(image, resolution)
    except UnidentifiedImageError:
        raise ValueError("not an image of a known kind") from None
    except Exception as error:  # a damaged file can raise nearly anything inside Pillow
        raise ValueError(str(error) or type(error).__name__) from error
    finally:
        Image.MAX_IMAGE_PIXELS = pillow_limit


def _square(image, resolution):
    """Resize the center square of an image of any mode to a uint8 array [resolution, resolution, 3]."""
    if image.mode[0] in "IF":  # 16 and 32 bit grey: Pillow's convert would clip at 255 where it should scale
        pixels = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0.0, neginf=0.0)
        # 32 bit files do not say which number is white: the smallest usual one that no pixel exceeds
        levels = (65535,) if image.mode.startswith("I;16") else (1, 255, 65535, pixels.max())
        white = min(level for level in levels if pixels.max() <= level)
        pixels *= 255 / white
        image = Image.fromarray(pixels.clip(0, 255, out=pixels).round(out=pixels).astype(np.uint8))
    mode = "RGBA" if image.has_transparency_data else "RGB"
    if image.mode != mode:  # before the resize: palette indices cannot be averaged
        image = image.convert(mode)
    x, y, half = image.width / 2, image.height / 2, min(image.size) / 2
    box = (x - half, y - half, x + half, y + half)
    square = image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
    white_page = Image.new("RGBA", square.size, "white")
    return np.array(Image.alpha_composite(white_page, square.convert("RGBA")).convert("RGB"))


def load_images(folder, resolution):
    """Return the images of a folder as a tensor [N, 3, resolution, resolution] in [-1, 1].

    What cannot be read is named in one line on stderr. UserError if nothing can be read.
    """
    images, damaged = [], []
    for path in tqdm(list_images(folder), desc="reading images", delay=2, leave=False, disable=None):
        try:
            pixels = read_image(path, resolution)  # [R, R, 3]
            images.append(torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1)
        except ValueError as error:
            damaged.append(f"{path.name!r} ({error})")
    if not images:
        raise UserError(f"--images: no image in {str(folder)!r} can be read: {_first(damaged)}; give other files.")
    if damaged:
        print(f"skipped in {str(folder)!r}, cannot be read: {_first(damaged)}", file=sys.stderr)
    return torch.stack(images)


def _first(names, count=10):
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


class LatentCache(NamedTuple):
    """What the VAE makes of every image ([:, 0]) and its mirror image ([:, 1]): latents = mean + std * randn."""

    mean: torch.Tensor  # fp32 [N, 2, 4, h, w] on the CPU, scaled as the UNet takes it
    std: torch.Tensor


def encode_dataset(vae, images):
    """Encode images [N, 3, H, W] in [-1, 1] and their mirror images once -> LatentCache.

    A VAE is not symmetric: the images are mirrored, not their latents. UserError if it overflows.
    """
    moments = []  # N pairs of [2, 4, h, w]
    for image in tqdm(images, desc="encoding images", delay=2, leave=False, disable=None):
        moments.append(encode_images(vae, torch.stack([image, image.flip(-1)]), 1))  # one at a time saves memory
    cache = LatentCache(*(torch.stack(part) for part in zip(*moments, strict=True)))  # [N, 2, 4, h, w]
    if not (cache.mean.isfinite().all() and cache.std.isfinite().all()):
        raise UserError("--model: its VAE makes latents of these images that are not finite; take another checkpoint.")
    return cache


def draw_examples(cache, template_ids, batch_size, generator):
    """Draw the examples of a step -> latents [B, 4, h, w], noise [B, 4, h, w], token_ids [B, L].

    template_ids [T, L]: the tokens of every caption. All randomness comes from `generator` (CPU). Images and captions
    are sampled without replacement until each has come once. The latents are a fresh sample from the VAE's posterior,
    as if the images were encoded at every step.
    """
    picks = _without_replacement(len(cache.mean), batch_size, generator)
    mirrored = torch.randint(2, (batch_size,), generator=generator)
    captions = _without_replacement(len(template_ids), batch_size, generator)
    mean, std = cache.mean[picks, mirrored], cache.std[picks, mirrored]  # [B, 4, h, w]
    latents = mean + std * torch.randn(mean.shape, generator=generator)
    noise = torch.randn(mean.shape, generator=generator)
    return latents, noise, template_ids[captions]


def _without_replacement(count, batch_size, generator):
    rounds = math.ceil(batch_size / count)
    return torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])[:batch_size]
