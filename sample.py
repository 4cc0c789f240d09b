"""Generate images with a learned token: samplers, guidance, grids, CLIP scores.

python sample.py                        # what train.py has just learned
python sample.py --embedding runs/kat --embedding runs/pup --prompt "a <kat> and a <pup> on the moon"
python sample.py --model mini_sd --prompt "a cat"       # the model alone, to compare with
python sample.py --embedding runs/kat --export kat.pt   # for A1111, ComfyUI and InvokeAI
python sample.py --score                # how well was the token learned?
"""

import signal
import sys

if __name__ == "__main__":  # also during the imports Ctrl-C ends the program quietly
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))

import itertools
import json
import math
import re
import textwrap
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

import model_utils as mu
from data import load_training_images
from model_utils import UserError

# --- Samplers ---------------------------------------------------------------------------------------------------------
# x: noisy latents [B, 4, h, w]; x0: the predicted clean latents; eps: the predicted noise;
# abar: `alphas_cumprod`. denoise(x, t) is one (guided) call of the UNet.


def inference_timesteps(schedule, steps, sampler="dpm++"):
    """The `steps` timesteps that a sampler visits, from noisy to clean, all different, in [0, num_train_timesteps).

    'leading', 'linspace' and 'trailing' of Lin et al. 2023 (arXiv:2305.08891), table 2: diffusers' integers, except
    where those leave the range. A schedule without a spacing gets the sampler's usual one. UserError: no such steps.
    """
    total = schedule.num_train_timesteps
    if not 1 <= steps <= total:
        raise UserError(f"--steps {steps}: choose a number from 1 to {total}, as many as the model was trained with.")
    spacing = schedule.timestep_spacing or ("linspace" if sampler == "dpm++" else "leading")
    # DPM-Solver++ divides the whole way down to 0 into `steps` parts: one more point, which is not visited
    points = min(steps + (sampler == "dpm++"), total)
    if spacing == "trailing":
        grid = np.arange(total, 0, -total / steps).round() - 1  # rounding errors can add a point: cut off below
    elif spacing == "linspace":
        grid = np.linspace(0, total - 1, points).round()[::-1]
    else:
        grid = np.arange(points)[::-1] * (total // points)
        grid = grid + min(1, total - 1 - grid[0])  # Stable Diffusion's steps_offset
    return [int(t) for t in grid[:steps]]


def split_prediction(x, pred, abar_t, prediction_type):
    """x0 and eps, from a prediction of eps, or of v = sqrt(abar) eps - sqrt(1 - abar) x0 (Salimans and Ho 2022)."""
    alpha, sigma = math.sqrt(abar_t), math.sqrt(1 - abar_t)
    if prediction_type == "v_prediction":
        return alpha * x - sigma * pred, alpha * pred + sigma * x
    return (x - sigma * pred) / alpha, pred


def ddim(denoise, latents, timesteps, schedule, generators=None):
    """DDIM without noise: Song et al. 2021 (arXiv:2010.02502), equation 12 with sigma = 0."""
    abar, x = schedule.alphas_cumprod.tolist(), latents
    stride, abar_end = len(abar) // len(timesteps), 1.0 if schedule.set_alpha_to_one else abar[0]
    for t in timesteps:
        x0, eps = split_prediction(x, denoise(x, t), abar[t], schedule.prediction_type)
        abar_next = abar[t - stride] if t >= stride else abar_end
        x = math.sqrt(abar_next) * x0 + math.sqrt(1 - abar_next) * eps
    return x


def ddpm(denoise, latents, timesteps, schedule, generators):
    """Ancestral sampling: Ho et al. 2020 (arXiv:2006.11239), equation 7. Each image has its own generator."""
    abar, x = schedule.alphas_cumprod.tolist(), latents
    for t, t_next in zip(timesteps, [*timesteps[1:], None], strict=True):
        x0, _ = split_prediction(x, denoise(x, t), abar[t], schedule.prediction_type)
        if t_next is None:
            return x0  # equation 7 at the end, where abar is 1
        abar_next, alpha = abar[t_next], abar[t] / abar[t_next]
        mean = (math.sqrt(abar_next) * (1 - alpha) * x0 + math.sqrt(alpha) * (1 - abar_next) * x) / (1 - abar[t])
        noise = torch.cat([torch.randn(x[:1].shape, generator=g, device=g.device) for g in generators]).to(x)
        x = mean + math.sqrt((1 - alpha) * (1 - abar_next) / (1 - abar[t])) * noise


def dpm_solver_pp(denoise, latents, timesteps, schedule, generators=None):
    """DPM-Solver++(2M): Lu et al. 2022 (arXiv:2211.01095), algorithm 2; the first and the last step are of order 1."""
    abar = [max(a, 2**-24) for a in schedule.alphas_cumprod.tolist()]  # 0, pure noise, has no logarithm
    lambdas = [math.log(a / (1 - a)) / 2 for a in abar]  # log(alpha / sigma)
    x, x0_before, h_before = latents, None, None
    for t, t_next in zip(timesteps, [*timesteps[1:], None], strict=True):
        x0, _ = split_prediction(x, denoise(x, t), abar[t], schedule.prediction_type)
        if t_next is None:
            return x0  # the step to sigma = 0
        h = lambdas[t_next] - lambdas[t]
        ahead = x0 if x0_before is None else x0 + h / (2 * h_before) * (x0 - x0_before)
        x = math.sqrt((1 - abar[t_next]) / (1 - abar[t])) * x - math.sqrt(abar[t_next]) * math.expm1(-h) * ahead
        x0_before, h_before = x0, h


SAMPLERS = {"ddim": ddim, "ddpm": ddpm, "dpm++": dpm_solver_pp}

# --- Generating images ------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample_latents(
    unet, schedule, text_embeddings, negative_embeddings, latents, steps, guidance, sampler, generators=None,
    callback=lambda: None,
):  # fmt: skip
    """Clean latents [B, 4, h, w] (scaled, fp32) from `latents` of pure noise.

    text_embeddings, negative_embeddings: [B, L, dim]. guidance: the scale s of classifier-free guidance (Ho and
    Salimans 2022); at 1 or less the prompt alone is used, at half the cost. generators: one per image, for samplers
    that add noise. callback() is called after each of the `steps` calls of the UNet.
    """
    guided = guidance > 1 and negative_embeddings is not None
    context = torch.cat([negative_embeddings, text_embeddings]) if guided else text_embeddings
    context = context.to(unet.dtype)  # [2B or B, L, dim]

    def denoise(x, t):
        batch = torch.cat([x, x]) if guided else x  # both halves in one call
        noise_pred = unet(batch.to(unet.dtype), t, encoder_hidden_states=context).sample.float()
        if guided:
            uncond, cond = noise_pred.chunk(2)
            noise_pred = uncond + guidance * (cond - uncond)
        callback()
        return noise_pred

    timesteps = inference_timesteps(schedule, steps, sampler)
    return SAMPLERS[sampler](denoise, latents.float(), timesteps, schedule, generators)


@torch.no_grad()
def generate(
    components, prompts, seeds, negative_prompt="", steps=25, guidance=7.5, sampler="dpm++",
    height=None, width=None, batch_size=4, progress=True,
):  # fmt: skip
    """Yield a PIL image for each prompt and its seed, as soon as its batch is done.

    Each starts from torch.randn((1, C, h, w)) of a CPU generator with its seed and takes all later noise from it, so
    that no image depends on the batch it is in. height, width: pixels (default: the model's own; UserError if they do
    not fit it). The VAE may wait on another device: it is moved only to decode.
    """
    unet, vae, device, factor = components.unet, components.vae, components.unet.device, mu.vae_factor(components.vae)
    native_height, native_width = mu.native_size(unet.config, vae)
    height, width = height or native_height, width or native_width
    if height % factor or width % factor:
        raise UserError(f"--height {height}, --width {width}: this model needs multiples of {factor} pixels.")
    shape = (1, unet.config.in_channels, height // factor, width // factor)

    distinct = list(dict.fromkeys([negative_prompt, *prompts]))  # each is encoded once
    token_ids = mu.tokenize(components.tokenizer, distinct, components.placeholders)
    encoded = mu.encode_tokens(components.text_encoder, token_ids).to(device)
    embeddings = dict(zip(distinct, encoded, strict=True))
    batches = [slice(start, start + batch_size) for start in range(0, len(prompts), batch_size)]
    with tqdm(total=len(batches) * steps, desc="generating", unit="step", disable=None if progress else True) as bar:
        for batch in batches:
            text = torch.stack([embeddings[prompt] for prompt in prompts[batch]])  # [B, L, dim]
            negative = embeddings[negative_prompt].expand_as(text)
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[batch]]
            noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators]).to(device)
            settings = (steps, guidance, sampler, generators, bar.update)
            latents = sample_latents(unet, components.schedule, text, negative, noise, *settings)
            home = vae.device
            images = mu.decode_latents(vae.to(device), latents)
            vae.to(home)
            yield from mu.to_pil(images)


def image_grid(images, columns, captions=()):
    """PIL images of one size -> one sheet, row by row. captions: a line of text above each row, "" for none."""
    width, height = images[0].size
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    sheet_width = columns * (width + 2)
    texts = [*captions, *[""] * len(rows)][: len(rows)]
    wrapped = [textwrap.wrap(text, max(10, sheet_width // 6)) for text in texts]  # a letter is 6 pixels wide
    sheet = Image.new("RGB", (sheet_width, sum(height + 2 + 14 * len(lines) for lines in wrapped)), "white")
    y = 0
    for row, lines in zip(rows, wrapped, strict=True):
        for line in lines:
            ImageDraw.Draw(sheet).text((2, y), line, fill="black")
            y += 14
        for column, image in enumerate(row):
            sheet.paste(image, (column * (width + 2) + 1, y + 1))
        y += height + 2
    return sheet


def plot_curves(panels, path, width=480, height=160):
    """Write line plots, one below the other, as PNG. panels: {title: [(x, y), ...]}; a y of None is left out."""
    sheet = Image.new("RGB", (width, height * len(panels)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (title, points) in enumerate(panels.items()):
        xs, ys = np.array([point for point in points if point[1] is not None] or [(0, 0)]).T
        label = f"{title}: {ys[0]:.4g} at step {xs[0]:g}, {ys[-1]:.4g} at step {xs[-1]:g} (lowest {ys.min():.4g})"
        pen.text((10, i * height + 6), label, fill="black")
        xs = 10 + (width - 20) * (xs - xs.min()) / (np.ptp(xs) or 1)
        ys = i * height + 24 + (height - 34) * (ys.max() - ys) / (np.ptp(ys) or 1)
        pen.line([*zip(xs.tolist(), ys.tolist(), strict=True)], fill="royalblue", width=2, joint="curve")
    save_png(sheet, path, {})


def save_png(image, path, settings):
    """Write a PIL image with the dict `settings` in its text chunks (read back by PIL.Image.open(path).text)."""
    chunks = PngInfo()
    for key, value in settings.items():
        chunks.add_text(key, str(value))
    mu.atomic_write(path, lambda buffer: image.save(buffer, format="PNG", pnginfo=chunks))


# --- CLIP scores ------------------------------------------------------------------------------------------------------
# Gal et al. 2022 (arXiv:2208.01618), section 5. CLIP-I: similarity of generated images to the training images. CLIP-T:
# similarity of generated images to an editing prompt, without the token. Both are cosines of CLIP embeddings.

DEFAULT_SCORE_MODEL = "openai/clip-vit-base-patch32"
PHOTO_PROMPT = {"object": "a photo of a {}", "style": "a painting in the style of {}"}
SCENES = ["on a red background", "on a green background", "at night", "on the beach", "on the moon"]
THINGS = ["a cat", "a dog", "a bird", "a fish", "a house", "a car", "a boat", "two cats"]
EDITING_PROMPTS = {
    "object": ["a photo of two {}", "a drawing of a {}", "pixel art of a {}"]
    + [f"a photo of a {{}} {scene}" for scene in SCENES],
    "style": [f"a picture of {thing} in the style of {{}}" for thing in THINGS],
}


class Clip(NamedTuple):
    """The CLIP that scores."""

    model: CLIPModel
    tokenizer: CLIPTokenizer
    processor: CLIPImageProcessorPil
    name: str


def load_clip(model, score_model=None, device="cpu"):
    """Clip of `score_model` (folder or Hub id); by default the model's own folder `clip`, else OpenAI's ViT-B/32."""
    name = score_model or (str(Path(model, "clip")) if Path(model, "clip").is_dir() else DEFAULT_SCORE_MODEL)
    try:
        processor = CLIPImageProcessorPil.from_pretrained(name)
        clip = CLIPModel.from_pretrained(name, dtype=torch.float32).requires_grad_(False).eval()
        clip.get_image_features(**processor(Image.new("RGB", (8, 8)), return_tensors="pt"))  # wrong settings fail here
        in_a_model = Path(name).with_name("tokenizer").is_dir()
        tokenizer = mu.load_tokenizer(Path(name).parent) if in_a_model else CLIPTokenizer.from_pretrained(name)
    except Exception as error:
        raise UserError(f"--score_model {name} cannot be loaded ({mu.reason(error)}); name another CLIP.") from error
    return Clip(clip.to(device), tokenizer, processor, name)


@torch.no_grad()
def embed(clip, images, prompts):
    """CLIP embeddings of norm 1, on the CPU: of PIL images [N, dim], of prompts [P, dim]."""
    pixels = clip.processor(images, return_tensors="pt").pixel_values  # [N, 3, S, S]
    length = clip.model.config.text_config.max_position_embeddings
    tokens = clip.tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    output = clip.model(tokens.input_ids.to(clip.model.device), pixels.to(clip.model.device))
    return output.image_embeds.cpu(), output.text_embeds.cpu()


def score_embedding(
    components, clip, training_images, tokens, learnable_property="object", num_images=64, seed=0,
    callback=lambda token, images: None, **generation,
):  # fmt: skip
    """Generate with each of `tokens` and measure; returns what scores.json holds.

    tokens: the initializer token, to compare with, and the learned one. training_images: PIL. `num_images` of
    PHOTO_PROMPT give CLIP-I; as many, spread over EDITING_PROMPTS, give CLIP-T. generation: options of `generate`.
    callback(token, images): gets all images of each token.
    """
    edits = EDITING_PROMPTS[learnable_property]
    num_images, per_edit = max(2, num_images), max(2, num_images // len(edits))
    prompts = [PHOTO_PROMPT[learnable_property]] * num_images + [edit for edit in edits for _ in range(per_edit)]
    seeds = range(seed, seed + len(prompts))  # the same for each token
    without_token = [" ".join(edit.replace("{}", "").split()) for edit in edits]
    known, targets = embed(clip, training_images, without_token)  # [N, dim], [P, dim]
    pairs = known @ known.T  # the training images with each other, for comparison
    with_each_other = (pairs.sum() - pairs.trace()).item() / max(1, pairs.numel() - len(pairs))
    scores = {"clip": clip.name, "num_images": num_images, "seed": seed, **generation}
    scores |= {"training_images": with_each_other, "tokens": {}}
    for token in tokens:
        images = list(generate(components, [prompt.format(token) for prompt in prompts], seeds, **generation))
        callback(token, images)
        generated, _ = embed(clip, images, without_token)
        clip_i = (generated[:num_images] @ known.T).mean(dim=1)[None]  # [1, num_images]
        clip_t = (generated[num_images:].unflatten(0, (len(edits), per_edit)) * targets[:, None]).sum(dim=-1)  # [P, n]
        scores["tokens"][token] = found = {}
        for name, cosines in {"clip_i": clip_i, "clip_t": clip_t}.items():
            error = (cosines.var(dim=1).mean() / cosines.numel()).sqrt()  # the images are random, the prompts given
            found[name] = {"mean": cosines.mean().item(), "error": error.item()}
        found["prompts"] = dict(zip(edits, clip_t.mean(dim=1).tolist(), strict=True))
    return scores


def report_scores(scores, path):
    """Write what score_embedding found to `path` as JSON, and print it as a table (mean and standard error)."""
    mu.atomic_write(path, lambda buffer: buffer.write(json.dumps(scores, indent=1).encode()))
    print(f"{'':24}{'CLIP-I (images)':>20}{'CLIP-T (prompts)':>20}")
    for token, found in scores["tokens"].items():
        cells = (f"{found[name]['mean']:.3f} +- {found[name]['error']:.3f}" for name in ("clip_i", "clip_t"))
        print(f"{mu.printable(token):24}" + "".join(f"{cell:>20}" for cell in cells))
    print(f"{'training images':24}{scores['training_images']:>11.3f}\nscores     {path}")


# --- Command line -----------------------------------------------------------------------------------------------------


def build_parser():
    parser = mu.Parser("Generate images with a learned token.")
    add, count = parser.add_argument, mu.number(int, 1, 2**31 - 1)
    # fmt: off
    add("--embedding", type=mu.path, action="append", help="file, run folder or Hub id; repeatable (default: last run)")
    add("--token", action="append", help="another name for the token of each --embedding, in their order")
    add("--export", type=mu.path, metavar="FILE", help="only write the embedding to a new .safetensors, .pt or .bin")
    add("--prompt", action="append", help="repeatable (default: a photo of each token)")
    add("--negative_prompt", help="what the images should not show")
    add("--num_images", type=count, help="images per prompt (default: 4; with --score 64)")
    add("--sampler", choices=SAMPLERS, help="(default: dpm++)")
    add("--steps", "--num_inference_steps", type=count, help="denoising steps (default: 25, or the model's own)")
    add("--guidance", "--guidance_scale", type=mu.number(float, -1e6, 1e6),
        help="scale of classifier-free guidance (default: 7.5, or the model's own)")
    add("--seed", type=mu.number(int, 0, 2**63 - 1), default=0, help="of the first image; the next ones count up")
    add("--height", type=mu.number(int, 1, 8192), help="in pixels (default: the model's own)")
    add("--width", type=mu.number(int, 1, 8192), help="in pixels (default: the model's own)")
    add("--batch_size", type=count, help="images generated at a time; does not change them (default: 4)")
    add("--output_dir", "--out", type=mu.path, help="folder for the images (default: samples/ in the run's folder)")
    add("--model", "--pretrained_model_name_or_path", type=mu.path, help="folder or Hub id (default: the run's)")
    add("--revision", help="revision of a Hub id (default: the run's)")
    add("--variant", help="variant of the weight files, such as fp16 (default: the run's)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="device to generate on")
    add("--precision", default="auto", choices=mu.PRECISIONS, help="precision of the UNet")
    add("--score", action="store_true", help="compute the CLIP scores of a run's token: scores.json in its folder")
    add("--score_model", type=mu.path, help=f"CLIP folder or Hub id (default: the model's, else {DEFAULT_SCORE_MODEL})")
    # fmt: on
    return parser


def export(path, embeddings):
    """Write a copy of the one embedding of [(source, name or None)] to `path`, which other programs call it by."""
    if Path(path).suffix not in mu.EMBEDDING_SUFFIXES or Path(path).exists() or len(embeddings) != 1:
        raise UserError(f"--export {path}: one --embedding and the name of a new .safetensors, .pt or .bin are needed.")
    embedding = mu.load_embedding(*embeddings[0])
    mu.save_embedding(path, embedding.token, embedding.rows, embedding.metadata.get("base_model", ""))
    name = Path(path).stem
    print(f"{mu.printable(embedding.token)} is in {path}: in A1111 it is called {name}, in ComfyUI embedding:{name}")
    if len(embedding.rows) > 1 and Path(path).suffix != ".pt":
        print("note: InvokeAI reads an embedding of several vectors only from a .pt", file=sys.stderr)


def tokens_outside(components, prompt):
    """The learned tokens that a prompt does not hold."""
    ids = components.tokenizer(prompt, verbose=False).input_ids
    return [token for token, token_ids in components.placeholders.items() if token_ids[0] not in ids]


def check_prompts(components, prompts, negative_prompt=""):
    """Notes on stderr: a prompt without a learned token, a token in no prompt, weights, which mean nothing here."""
    subjects = unused = tokens_outside(components, negative_prompt)
    for prompt in prompts:
        absent = tokens_outside(components, prompt)
        if subjects and set(subjects) <= set(absent):
            print(f"note: {prompt!r} holds no learned token, such as {subjects[0]}", file=sys.stderr)
        unused = [token for token in unused if token in absent]
    if unused and unused != subjects:
        print(f"note: no prompt holds {', '.join(unused)}", file=sys.stderr)
    if any(re.search(r"\(.+:\d(\.\d+)?\)", prompt) for prompt in [*prompts, negative_prompt]):
        print("note: weights such as (word:1.3) are read as plain text", file=sys.stderr)


def run(args):
    """Generate images, or scores, as the options say. UserError if that cannot be done."""
    # 1. The tokens, and the model they were learned on
    sources, names = args.embedding or [], args.token or []
    if not sources and not (args.model and args.prompt):  # with both the model alone generates
        runs = sorted(Path("runs").glob("*/learned_embeds.safetensors"), key=lambda path: path.stat().st_mtime)
        if not runs:
            raise UserError("no run in runs/: run train.py first, or name an --embedding, or a --model and a --prompt.")
        sources = [str(runs[-1])]
    if len(names) > len(sources):
        raise UserError(f"--token is given {len(names)} times for {len(sources)} --embedding; give one for each.")
    embeddings = list(itertools.zip_longest(sources, names))
    if args.export:
        return export(args.export, embeddings)
    first = Path(sources[0]) if sources else Path()
    folder = next((path for path in (first, first.parent) if path.is_dir()), Path())  # a Hub id has none
    config = mu.read_config(folder) if sources and first.exists() else {}  # what train.py stored
    if sources and not config:
        metadata = mu.load_embedding(*embeddings[0]).metadata
        config = {"model": mu.model_of_name(metadata.get("base_model"))}
    model, device = args.model or config.get("model") or mu.DEFAULT_MODEL, mu.choose_device(args.device)
    from_run = {} if args.model else config  # another model has other files
    files = {name: getattr(args, name) or from_run.get(name) for name in ("revision", "variant")}
    if not args.model:
        mu.refuse_download(model, **files)
    dtype = mu.choose_dtype(args.precision, device)
    print(f"model      {mu.printable(model)}")
    components = mu.load_components(model, device, dtype, **files, embeddings=embeddings)
    learned_from = dict(zip(components.placeholders, sources, strict=True))
    for token, source in learned_from.items():
        print(f"token      {token} ({mu.printable(source)})")
    learnable_property = config.get("learnable_property", "object")

    # 2. The settings: as given, else as the model's folder advises, else as usual with Stable Diffusion
    settings = {"sampler": "dpm++", "steps": 25, "guidance": 7.5, "batch_size": 4, "negative_prompt": ""}
    settings |= mu.sampling_defaults(model)
    given = {name: getattr(args, name) for name in (*settings, "height", "width")}
    settings |= {name: value for name, value in given.items() if value is not None}

    # 3. Either the scores of the first token
    if args.score:
        if not {"images", "resolution"} <= config.keys():
            raise UserError("--score compares with training images: name a run folder of train.py as --embedding.")
        print(f"images     {mu.printable(config['images'])}")
        training_images = mu.to_pil(load_training_images(config["images"], config["resolution"])[0])
        tokens, initializer = list(components.placeholders)[:1], config.get("initializer_token")
        if initializer and mu.initializer_ids(components.tokenizer, initializer):  # else it is an embedding file
            tokens = [initializer, *tokens]
        clip = load_clip(model, args.score_model, device)
        settings |= {"num_images": args.num_images or 64, "seed": args.seed}
        scores = score_embedding(components, clip, training_images, tokens, learnable_property, **settings)
        return report_scores(scores, folder / "scores.json")

    # 4. Or images
    subjects = tokens_outside(components, settings["negative_prompt"])
    prompts = args.prompt or [PHOTO_PROMPT[learnable_property].format(token) for token in subjects]
    if not prompts:
        raise UserError("--prompt is missing: the learned tokens are all in the --negative_prompt.")
    check_prompts(components, prompts, settings["negative_prompt"])
    count, out = args.num_images or 4, Path(args.output_dir or folder / "samples")
    each_prompt = [prompt for prompt in prompts for _ in range(count)]
    seeds = range(args.seed, args.seed + len(each_prompt))
    stored = {**settings, "model": mu.name_of_model(model), "embeddings": learned_from}
    images, generated = [], generate(components, each_prompt, seeds, **settings)
    for prompt, seed, image in zip(each_prompt, seeds, generated, strict=True):
        save_next(image, out, "", {"prompt": prompt, "seed": seed, **stored})
        images.append(image)
    if len(images) > 1:
        grid = image_grid(images, count if len(prompts) > 1 else math.ceil(count**0.5), prompts)
        save_next(grid, out, "grid", {"prompt": prompts, "seed": args.seed, **stored})
    print(f"{len(images)} images in {out}")


def save_next(image, folder, stem, settings):
    """Save an image under the next free name of a folder: 0000.png, 0001.png, ..., or stem.png, stem2.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in itertools.count(0):
        path = folder / (f"{stem}{i + 1 if i else ''}.png" if stem else f"{i:04d}.png")
        with suppress(FileExistsError):
            path.touch(exist_ok=False)  # taken: another process that generates here skips it
            break
    try:
        save_png(image, path, settings)
    except BaseException:
        path.unlink()  # nothing of 0 bytes stays
        raise


def main(argv=None):
    advice = "take a smaller --batch_size, --precision bf16 or fp16, or a smaller --height and --width"
    mu.run_main(lambda argv: run(build_parser().parse_args(argv)), argv, advice)


if __name__ == "__main__":
    main()
