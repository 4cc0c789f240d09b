"""Pictures and sentences: reading images, templates, the latent cache, drawing a batch."""

import contextlib
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from model_utils import UserError

# Sentences the word is shown in while it is learned (the role of the lists in Gal et al. 2022, appendix D).
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
    """Return the picture files of a folder as a sorted list of paths.

    Hidden files, sub-folders and files without a picture's suffix are named in one line on stderr and left out.
    UserError if the folder cannot be read or holds no picture.
    """
    try:
        entries = sorted(Path(folder).iterdir())
    except OSError as error:
        what = f"cannot read the folder {str(folder)!r} ({error.strerror})"
        raise UserError(f"--images: {what}; give a folder of pictures") from error
    paths = [p for p in entries if not p.name.startswith(".") and p.suffix.lower() in SUFFIXES and p.is_file()]
    others = sorted(repr(p.name) for p in set(entries) - set(paths))
    if not paths:
        found = f"only {_first(others)}" if others else "it is empty"
        raise UserError(f"--images: no pictures in {str(folder)!r} ({found}); put in some, as {', '.join(FORMATS)}")
    if others:
        print(f"skipped in {str(folder)!r}, not pictures: {_first(others)}", file=sys.stderr)
    return paths


def read_image(path, resolution, center_crop=True):
    """Return the middle square of a picture, upright and on white, as a uint8 array [resolution, resolution, 3].

    Of an animation the first frame is taken. Nothing is ever squashed: the long side is cropped, with `center_crop`
    (kept for notes from other scripts) or without. ValueError with the reason if the file cannot be read.
    """
    pillow_limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # Pillow's own limit refuses 200 megapixels
    try:
        with warnings.catch_warnings(action="ignore"), open(path, "rb") as file:
            image = Image.open(file, formats=FORMATS)  # given a path, Pillow 13 garbles some turned TIFFs (memory map)
            if (pixels := image.width * image.height) > MAX_PIXELS:
                raise ValueError(f"{pixels // 10**6} megapixels, more than the limit of {MAX_PIXELS // 10**6}")
            image.draft(None, (3 * resolution, 3 * resolution))  # large JPEGs: decode at 1/2, 1/4 or 1/8 of the size
            image.load()
            with contextlib.suppress(Exception):  # damaged EXIF data is no reason to refuse the picture
                ImageOps.exif_transpose(image, in_place=True)
            return _square(image, resolution)
    except UnidentifiedImageError:
        raise ValueError("not a picture of a known kind") from None
    except Exception as error:  # a damaged file can raise nearly anything inside Pillow
        raise ValueError(str(error) or type(error).__name__) from error
    finally:
        Image.MAX_IMAGE_PIXELS = pillow_limit


def _square(image, resolution):
    """Resize the middle square of a picture of any mode to a uint8 array [resolution, resolution, 3]."""
    if image.mode[0] in "IF":  # 16 and 32 bit grey: Pillow's convert would clip at 255 where it should scale
        pixels = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0.0, neginf=0.0)
        # 32 bit files do not say which number is white: the smallest usual one that no pixel exceeds
        levels = (65535,) if image.mode.startswith("I;16") else (1, 255, 65535, pixels.max())
        white = next(level for level in levels if pixels.max() <= level)
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


def load_images(folder, resolution, center_crop=True):
    """Return the pictures of a folder as images [N, 3, resolution, resolution] in [-1, 1], and their file names.

    What cannot be read is named in one line on stderr. UserError if nothing can be read.
    """
    paths = list_images(folder)
    images = torch.empty(len(paths), 3, resolution, resolution)
    names, damaged = [], []
    for path in tqdm(paths, desc="reading pictures", delay=2, leave=False, disable=None):
        try:
            pixels = read_image(path, resolution, center_crop)
        except ValueError as error:
            damaged.append(f"{path.name!r} ({error})")
            continue
        images[len(names)] = torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1
        names.append(path.name)
    if not names:
        raise UserError(f"--images: no picture in {str(folder)!r} can be read: {_first(damaged)}; give other files")
    if damaged:
        print(f"skipped in {str(folder)!r}, cannot be read: {_first(damaged)}", file=sys.stderr)
    return images[: len(names)], names


def _first(names, count=10):
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


class LatentCache(NamedTuple):
    """The VAE's answer for every picture ([:, 0]) and its mirror image ([:, 1]): latents = mean + std * randn."""

    mean: torch.Tensor  # fp32 [N, 2, 4, h, w] on the CPU, scaled: the latents drawn are what the UNet takes
    std: torch.Tensor


class Batch(NamedTuple):
    latents: torch.Tensor  # [B, 4, h, w], scaled
    noise: torch.Tensor  # [B, 4, h, w]
    token_ids: torch.Tensor  # [B, L]
    picks: torch.Tensor  # [B, 2], which picture, and 1 where it is mirrored


def encode_dataset(vae, images, encode_images):
    """Encode images [N, 3, H, W] in [-1, 1] and their mirror images once into a LatentCache.

    `encode_images` is model_utils'. A VAE is not symmetric: latents are not mirrored. UserError if it overflows.
    """
    moments = []  # N pairs of [2, 4, h, w]
    for image in tqdm(images, desc="encoding pictures", delay=2, leave=False, disable=None):
        moments.append(encode_images(vae, torch.stack([image, image.flip(-1)]), 1))  # one at a time saves memory
    mean, std = (torch.stack(parts).cpu() for parts in zip(*moments, strict=True))  # [N, 2, 4, h, w]
    if not (mean.isfinite().all() and std.isfinite().all()):
        raise UserError("--model: its VAE makes numbers that are not finite of these pictures; take another checkpoint")
    shift, scale = getattr(vae.config, "shift_factor", None) or 0.0, vae.config.scaling_factor
    return LatentCache((mean - shift) * scale, std * scale)


def draw_batch(cache, template_ids, batch_size, generator):
    """Draw a Batch; `template_ids` [T, L] are the tokens of every sentence, `generator` (CPU) gives all randomness.

    Pictures and sentences are dealt evenly: none comes twice in a batch before each has come once. The latents are a
    fresh sample from the VAE's posterior, as if the pictures were encoded at every step.
    """
    picks = _deal(len(cache.mean), batch_size, generator)
    mirrored = torch.randint(2, (batch_size,), generator=generator)
    sentences = _deal(len(template_ids), batch_size, generator)
    mean, std = cache.mean[picks, mirrored], cache.std[picks, mirrored]  # [B, 4, h, w]
    latents = mean + std * torch.randn(mean.shape, generator=generator)
    noise = torch.randn(mean.shape, generator=generator)
    return Batch(latents, noise, template_ids[sentences], torch.stack([picks, mirrored], dim=1))


def _deal(count, batch_size, generator):
    rounds = -(-batch_size // count)
    return torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])[:batch_size]
