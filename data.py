"""Images and prompts: reading images, masks and captions, the latent cache, the random examples of a step."""

import contextlib
import io
import itertools
import math
import re
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
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
STYLE_TEMPLATES = [f"{what} in the style of {{}}" for what in [
    "a painting", "a picture", "an image", "a work", "a scene", "a page", "a good painting", "a nice painting",
    "a clear painting", "a bright painting", "a simple painting", "a small painting", "a large painting",
    "a close-up painting", "a cropped painting", "a good picture", "a nice picture", "a bright picture",
    "a simple picture",
]]  # fmt: skip

SUFFIXES = set(".jpg .jpeg .jfif .png .apng .webp .gif .bmp .tif .tiff .avif .heic .heif .hif".split())
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"]  # Pillow knows more, some of which start other programs
Image.MAX_IMAGE_PIXELS = 125_000_000  # Pillow refuses twice as many: a bomb. The largest phone photos have 200 million


def list_images(folder):
    """Return the image files of a folder as a sorted list of paths; of one image file that file alone.

    Hidden files, sub-folders and files that are neither images nor their captions are named in one line on stderr and
    left out. UserError if there is no such folder or no image in it.
    """
    if Path(folder).is_file():
        return [Path(folder)]
    if not Path(folder).is_dir():
        raise UserError(f"--images {folder}: no such file or folder; name one that holds images.")
    entries = sorted(Path(folder).iterdir())
    paths = [p for p in entries if _is_image(p)]
    others = sorted(repr(p.name) for p in set(entries) - set(paths) - {p.with_suffix(".txt") for p in paths})
    if not paths:
        full = [repr(str(p)) for p in entries if p.is_dir() and any(map(_is_image, p.glob("*")))]
        advice = f"did you mean {' or '.join(full[:3])}?" if full else f"put in some, as {', '.join(FORMATS)}."
        raise UserError(f"--images: no images in {str(folder)!r} (it holds {_first(others) or 'nothing'}); {advice}")
    if others:
        print(f"skipped in {str(folder)!r}, not images: {_first(others)}", file=sys.stderr)
    return paths


def _is_image(path):
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def read_image(path, resolution):
    """Return the center square of an image, upright, in sRGB, on white: uint8 [resolution, resolution, 4].

    The last channel is its alpha. Of an animation the first frame is taken. Images are cropped, never squashed.
    ValueError with the reason if the file cannot be read.
    """
    formats = FORMATS
    with contextlib.suppress(ImportError):
        import pillow_heif  # optional, for the HEIC files of iPhones

        pillow_heif.register_heif_opener()
        formats = [*FORMATS, "HEIF"]
    try:
        with warnings.catch_warnings(action="ignore"), open(path, "rb") as file:
            start = file.read(10)
            image = Image.open(file, formats=formats)  # given a path, Pillow 13 garbles some turned TIFFs (memory map)
            image.draft(None, (3 * resolution, 3 * resolution))  # large JPEGs: decode at 1/2, 1/4 or 1/8 of the size
            image.load()
            with contextlib.suppress(Exception):  # damaged EXIF data is no reason to refuse the image
                ImageOps.exif_transpose(image, in_place=True)
            square = _square(image, resolution)
    except UnidentifiedImageError:
        if formats == FORMATS and start[4:] in (b"ftyphe", b"ftypmi", b"ftypms"):  # whatever its suffix
            raise ValueError("HEIC: pip install pillow-heif, or export as JPEG") from None
        raise ValueError("not an image of a known kind") from None
    except Exception as error:  # a damaged file can raise nearly anything inside Pillow
        raise ValueError(str(error) or type(error).__name__) from error
    if profile := image.info.get("icc_profile"):
        try:
            square = _to_srgb(square, profile)
        except Exception:  # nearly anything too
            print(f"note: the colour profile of {str(path)!r} does not fit and was ignored", file=sys.stderr)
    square = square.convert("RGBA")
    on_white = Image.alpha_composite(Image.new("RGBA", square.size, "white"), square)
    on_white.putalpha(square.getchannel("A"))
    return np.array(on_white)


def _square(image, resolution):
    """Resize the center square of an image -> [resolution, resolution] in mode L, LA, RGB, RGBA or CMYK."""
    if image.mode[0] in "IF":  # 16 and 32 bit grey: Pillow's convert would clip at 255 where it should scale
        pixels = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0.0, neginf=0.0)
        white = 65535 if image.mode.startswith("I;16") else max(1, pixels.max())  # 32 bit files do not say
        image = Image.fromarray((pixels * (255 / white)).clip(0, 255).round().astype(np.uint8))
    if image.mode not in ("L", "LA", "RGB", "RGBA", "CMYK") or "transparency" in image.info:
        # before the resize: palette indices cannot be averaged
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    x, y, half = image.width / 2, image.height / 2, min(image.size) / 2
    box = (x - half, y - half, x + half, y + half)
    return image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def _to_srgb(image, profile):
    """Convert the colours of an image from those of its ICC profile -> mode RGBA. Any exception if they do not fit."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[source.profile.xcolor_space.strip()]
    if image.mode.removesuffix("A") not in (mode, "L"):  # grey images may have a profile of colours
        raise ValueError("a profile for other images")
    srgb = ImageCms.createProfile("sRGB")
    colours = ImageCms.profileToProfile(image.convert(mode), source, srgb, outputMode="RGB")
    colours.putalpha(image.convert("RGBA").getchannel("A"))
    return colours


def load_training_images(folder, resolution, masks_folder=None):
    """Read a folder of images, or one image -> images [N, 3, R, R] in [-1, 1], masks [N, 1, R, R] in [0, 1], N paths.

    A mask says how much each pixel counts: its alpha, times the mask of the same name if there is a folder of them.
    What cannot be read is named in one line on stderr. UserError if nothing can be read, a mask is missing, or nothing
    of an image counts.
    """
    arrays, paths, reasons = [], [], {}
    for path in tqdm(list_images(folder), desc="reading images", delay=2, leave=False, disable=None):
        try:
            arrays.append(read_image(path, resolution))
            paths.append(path)
        except ValueError as error:
            reasons.setdefault(str(error), []).append(repr(path.name))
    what = ", ".join(f"{_first(names)} ({reason})" for reason, names in reasons.items())
    if not paths:
        raise UserError(f"--images: no image in {str(folder)!r} can be read: {what}; give other files.")
    if reasons:
        count = sum(map(len, reasons.values()))
        print(f"skipped {count} of {count + len(paths)} images, cannot be read: {what}", file=sys.stderr)
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()  # [N, 4, R, R]
    images, masks = pixels[:, :3] / 127.5 - 1, pixels[:, 3:] / 255
    if masks_folder:
        masks *= _read_masks(masks_folder, paths, resolution)
    for path, mask in zip(paths, masks, strict=True):
        if not mask.any():  # nothing of it counts
            raise UserError(f"--images: the whole center of {str(path)!r} is transparent or masked; take it out.")
    return images, masks, paths


def _read_masks(folder, paths, resolution):
    """The masks [N, 1, R, R] in [0, 1] of images: the alpha of the file of this name, or its grey if it has none."""
    files = {file.stem: file for file in Path(folder).glob("*") if _is_image(file)}
    masks = []
    for path in paths:
        try:
            pixels = read_image(files[path.stem], resolution)
        except (KeyError, ValueError) as error:
            reason = error if isinstance(error, ValueError) else f"there is none of this name in {str(folder)!r}"
            raise UserError(f"--masks: no mask of {path.name!r} ({reason}); add one: white counts.") from error
        masks.append(pixels[..., 3] if pixels[..., 3].min() < 255 else pixels[..., :3].mean(axis=-1))
    return torch.from_numpy(np.stack(masks)[:, None].astype(np.float32) / 255)


def _first(names, count=10):
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def load_captions(paths, token, templates, templates_file=None):
    """Return captions (a list), choices [N, T] (image i has captions[j] for j in choices[i]), source in words.

    They are the templates, with the token for {}, or the lines of a file of such. Without the file an image can have
    captions of its own: the lines of NAME.txt beside it. UserError if a file cannot be read or a template has no {}.
    """
    if templates_file:
        rows, source = [_read_lines(templates_file, "--templates")] * len(paths), f"captions of {templates_file}"
        if not rows[0] or not all("{}" in line for line in rows[0]):
            raise UserError(f"--templates {templates_file}: every line needs {{}}, which stands for the token.")
    else:
        rows = [_own_captions(path, token) or templates for path in paths]
        own = [row[0] for row in rows if row is not templates]
        source = f"{len(own)} with captions such as {own[0]!r}" if own else ""
    place = {caption: i for i, caption in enumerate(dict.fromkeys(itertools.chain(*rows)))}
    longest = max(map(len, rows))
    choices = torch.tensor([[place[row[j % len(row)]] for j in range(longest)] for row in rows])  # [N, T]
    return [caption.replace("{}", token) for caption in place], choices, source


def _own_captions(path, token):
    """The lines of NAME.txt beside an image, each with {} or the token; none if there is no such file."""
    file = path.with_suffix(".txt")
    lines = _read_lines(file, "--images") if file.is_file() else []
    named = re.compile(rf"{{}}|(?<!\w){re.escape(token)}(?!\w)")  # 'kat' is not in 'katze', as in the tokenizer
    return [line if named.search(line) else f"{{}}, {line}" for line in lines]


def _read_lines(path, option):
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{option}: {str(path)!r} cannot be read ({error}); give a file of UTF-8 text.") from error
    return [line.strip() for line in lines if line.strip()]


class LatentCache(NamedTuple):
    """The VAE's posterior of every image ([:, 0]) and its mirror image ([:, 1]): latents = mean + std * randn."""

    mean: torch.Tensor  # fp32 [N, 2, 4, h, w] on the CPU, scaled as the UNet takes it
    std: torch.Tensor
    mask: torch.Tensor  # fp32 [N, 2, 1, h, w] in [0, 1]: how much of each latent pixel counts


def encode_dataset(vae, images, masks):
    """Encode images [N, 3, H, W] in [-1, 1] and their mirror images once, with masks [N, 1, H, W] -> LatentCache.

    A VAE is not symmetric: the images are mirrored, not their latents. UserError if it overflows.
    """
    bar = tqdm(images, desc="encoding images", delay=2, leave=False, disable=None)
    moments = [encode_images(vae, torch.stack([image, image.flip(-1)]), 1) for image in bar]  # N pairs of [2, 4, h, w]
    mean, std = (torch.stack(part) for part in zip(*moments, strict=True))  # [N, 2, 4, h, w]
    if not (mean.isfinite().all() and std.isfinite().all()):
        raise UserError("--model: its VAE makes latents of these images that are not finite; take another checkpoint.")
    masks = F.interpolate(masks, mean.shape[-2:], mode="area")  # [N, 1, h, w]
    return LatentCache(mean, std, torch.stack([masks, masks.flip(-1)], dim=1))


def draw_examples(cache, token_ids, batch_size, generator):
    """Draw the examples of a step -> latents, noise [B, 4, h, w], token_ids [B, L], mask [B, 1, h, w].

    token_ids [N, T, L]: the tokens of T captions for each image. All randomness comes from `generator` (CPU). Images
    and captions are sampled without replacement until each has come once. The latents are a fresh sample from the VAE's
    posterior, as if the images were encoded at every step.
    """
    picks = _without_replacement(len(cache.mean), batch_size, generator)
    mirrored = torch.randint(2, (batch_size,), generator=generator)
    captions = _without_replacement(token_ids.shape[1], batch_size, generator)
    mean, std = cache.mean[picks, mirrored], cache.std[picks, mirrored]  # [B, 4, h, w]
    latents = mean + std * torch.randn(mean.shape, generator=generator)
    noise = torch.randn(mean.shape, generator=generator)
    return latents, noise, token_ids[picks, captions], cache.mask[picks, mirrored]


def _without_replacement(count, batch_size, generator):
    rounds = math.ceil(batch_size / count)
    return torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])[:batch_size]
