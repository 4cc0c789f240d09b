"""Generate images with a learned token: samplers, guidance, grids, CLIP scores.

python sample.py                        # with what train.py has just learned
python sample.py --embedding runs/kat --embedding runs/pup --prompt "a <kat> and a <pup> on the moon"
python sample.py --model mini_sd --prompt "a cat"       # the model alone, to compare with
python sample.py --score                # how well was the token learned?
"""

import io
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

import model_utils as mu
from data import load_images
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


def denoiser(components, prompts, negative_prompt="", guidance=1.0, callback=lambda: None):
    """denoise(x, t) for the samplers: what the UNet predicts for prompts [B] at timestep t.

    With classifier-free guidance (Ho and Salimans 2022) of scale `guidance`, away from the negative prompt; at a scale
    of 1 or less the prompts alone are used, at half the cost. They are encoded once, for all timesteps. callback() is
    called after each call of the UNet.
    """
    unet = components.unet
    token_ids = mu.tokenize(components, [negative_prompt, *prompts]).to(components.device)  # [1 + B, L]
    negative, text = mu.encode(components, token_ids).split([1, len(prompts)])  # [1, L, dim], [B, L, dim]
    context = torch.cat([negative.expand_as(text), text]) if guidance > 1 else text  # [B or 2B, L, dim]

    def denoise(x, t):
        batch = torch.cat([x] * (len(context) // len(x)))  # [B or 2B, 4, h, w]: both halves in one call
        noise_pred = unet(batch.to(unet.dtype), t, encoder_hidden_states=context).sample.float()
        callback()
        if len(context) == len(x):
            return noise_pred
        uncond, cond = noise_pred.chunk(2)
        return uncond + guidance * (cond - uncond)

    return denoise


@torch.no_grad()
def generate(
    components, prompts, seeds, negative_prompt="", steps=25, guidance=7.5, sampler="dpm++",
    height=None, width=None, batch_size=4, progress=True,
):  # fmt: skip
    """Yield a PIL image for each prompt and its seed, as soon as its batch is done.

    Each starts from torch.randn((1, C, h, w)) of a CPU generator with its seed and takes all later noise from it, so
    that no image depends on the batch it is in. height, width: pixels (default: the model's own).
    """
    device, factor = components.device, components.pixels_per_latent
    height, width = height or components.resolution, width or components.resolution
    if height % factor or width % factor:
        raise UserError(f"--height {height}, --width {width}: this model needs multiples of {factor} pixels.")
    shape = (1, components.unet.config.in_channels, height // factor, width // factor)
    timesteps = inference_timesteps(components.schedule, steps, sampler)
    mu.tokenize(components, prompts)  # one that is too long is refused before the first image
    batches = [slice(start, start + batch_size) for start in range(0, len(prompts), batch_size)]
    with tqdm(total=len(batches) * steps, desc="generating", unit="step", disable=None if progress else True) as bar:
        for batch in batches:
            denoise = denoiser(components, prompts[batch], negative_prompt, guidance, bar.update)
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[batch]]
            noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators]).to(device)
            latents = SAMPLERS[sampler](denoise, noise, timesteps, components.schedule, generators)  # [B, 4, h, w]
            yield from mu.decode_latents(components, latents)


def sampling_settings(model, given):
    """Settings of `generate`: as given (unless None), else as the model's folder advises, else as usual."""
    usual = {"sampler": "dpm++", "steps": 25, "guidance": 7.5, "negative_prompt": "", "batch_size": 4}
    advice = mu.read_json(Path(model, "model_index.json")).get("_sampling", {})
    names = [*usual, "height", "width"]
    return usual | advice | {name: given[name] for name in names if given.get(name) is not None}


# --- Grids, curves and PNG files --------------------------------------------------------------------------------------


def image_grid(images, columns, captions=()):
    """PIL images of one size -> one sheet, row by row. captions: a line of text above each row, or none at all."""
    width, height = images[0].size
    rows, top = math.ceil(len(images) / columns), 14 if captions else 0
    sheet = Image.new("RGB", (columns * (width + 2), rows * (top + height + 2)), "white")
    for row, caption in enumerate(captions):
        ImageDraw.Draw(sheet).text((2, row * (top + height + 2)), caption, fill="black")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        sheet.paste(image, (column * (width + 2) + 1, row * (top + height + 2) + top + 1))
    return sheet


def plot_curves(panels, path):
    """Write line plots, one below the other, as PNG. panels: {title: [(x, y), ...]}."""
    width, height = 480, 160  # of each
    sheet = Image.new("RGB", (width, height * len(panels)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (title, points) in enumerate(panels.items()):
        xs, ys = np.array(points or [(0, 0)]).T
        label = f"{title}: {ys[0]:.4g} at step {xs[0]:g}, {ys[-1]:.4g} at step {xs[-1]:g} (lowest {ys.min():.4g})"
        pen.text((10, i * height + 6), label, fill="black")
        xs = 10 + (width - 20) * (xs - xs.min()) / (np.ptp(xs) or 1)
        ys = i * height + 24 + (height - 34) * (ys.max() - ys) / (np.ptp(ys) or 1)
        pen.line([*zip(xs.tolist(), ys.tolist(), strict=True)], fill="royalblue", width=2)
    save_png(sheet, path, {})


def save_png(image, path, settings):
    """Write a PIL image with the dict `settings` in its text chunks (read back by PIL.Image.open(path).text)."""
    chunks, buffer = PngInfo(), io.BytesIO()
    for key, value in settings.items():
        chunks.add_text(key, str(value))
    image.save(buffer, format="PNG", pnginfo=chunks)
    mu.write_whole(path, buffer.getvalue())


def next_free(folder, names):
    """The first of the names that no file in the folder has."""
    return next(path for path in (Path(folder, name) for name in names) if not path.exists())


def numbered(name, suffix=""):
    """Yield name, name-2, name-3, ... with the suffix."""
    return (f"{name}{suffix}" if i == 1 else f"{name}-{i}{suffix}" for i in itertools.count(1))


# --- CLIP scores ------------------------------------------------------------------------------------------------------
# Gal et al. 2022 (arXiv:2208.01618), section 5. CLIP-I: similarity of generated images to the training images. CLIP-T:
# similarity of generated images to an editing prompt, without the token. Both are cosines of CLIP embeddings.

SCORE_MODEL = "openai/clip-vit-base-patch32"
PHOTO_PROMPT = {"object": "a photo of a {}", "style": "a painting in the style of {}"}
SCENES = ["on a red background", "on a green background", "at night", "on the beach", "on the moon"]
THINGS = ["a cat", "a dog", "a bird", "a fish", "a house", "a car", "a boat", "two cats"]
EDITING_PROMPTS = {
    "object": ["a photo of two {}", "a drawing of a {}", "pixel art of a {}"]
    + [f"a photo of a {{}} {scene}" for scene in SCENES],
    "style": [f"a picture of {thing} in the style of {{}}" for thing in THINGS],
}


def load_clip(model, device):
    """-> CLIP, tokenizer, image processor: of the model's own clip/ folder, else OpenAI's, as in the paper."""
    own = Path(model, "clip")
    name, tokenizer = (own, Path(model, "tokenizer")) if own.is_dir() else (SCORE_MODEL, SCORE_MODEL)
    clip = CLIPModel.from_pretrained(name, dtype=torch.float32).requires_grad_(False).eval().to(device)
    return clip, CLIPTokenizer.from_pretrained(tokenizer), CLIPImageProcessorPil.from_pretrained(name)


@torch.no_grad()
def embed(clip, images, prompts):
    """CLIP embeddings of norm 1, on the CPU: of PIL images [N, dim], of prompts [P, dim]. clip: from load_clip."""
    model, tokenizer, processor = clip
    pixels = processor(images, return_tensors="pt").pixel_values  # [N, 3, S, S]
    length = model.config.text_config.max_position_embeddings
    tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    output = model(tokens.input_ids.to(model.device), pixels.to(model.device))
    return output.image_embeds.cpu(), output.text_embeds.cpu()


def score_tokens(components, clip, training_images, tokens, learnable_property, num_images, seed, **settings):
    """Generate with each of `tokens` (the initializer, to compare with, and the learned one) -> {token: scores}.

    training_images: PIL. `num_images` of PHOTO_PROMPT give CLIP-I; as many, spread over EDITING_PROMPTS, give CLIP-T;
    both as mean and standard error. settings: of `generate`.
    """
    edits = EDITING_PROMPTS[learnable_property]
    per_edit = max(2, num_images // len(edits))  # two, for the error
    prompts = [PHOTO_PROMPT[learnable_property]] * num_images + [edit for edit in edits for _ in range(per_edit)]
    seeds = range(seed, seed + len(prompts))  # the same for each token
    without_token = [" ".join(edit.replace("{}", "").split()) for edit in edits]
    known, targets = embed(clip, training_images, without_token)  # [N, dim], [P, dim]
    scores = {}
    for token in tokens:
        images = list(generate(components, [prompt.format(token) for prompt in prompts], seeds, **settings))
        generated, _ = embed(clip, images, without_token)  # [num_images + P * n, dim]
        clip_i = (generated[:num_images] @ known.T).mean(dim=1)[None]  # [1, num_images]
        clip_t = (generated[num_images:].unflatten(0, (len(edits), per_edit)) * targets[:, None]).sum(dim=-1)  # [P, n]
        scores[token] = {}
        for name, cosines in {"clip_i": clip_i, "clip_t": clip_t}.items():
            error = (cosines.var(dim=1).mean() / cosines.numel()).sqrt()  # the images are random, the prompts given
            scores[token][name] = {"mean": cosines.mean().item(), "error": error.item()}
    return scores


def score_run(components, path, config, **settings):
    """Score the token of a run, and its initializer: prints a table, writes JSON. config: the run's options."""
    training_images = mu.to_pil(load_images(config["images"], config["resolution"])[0])
    tokens = list(components.placeholders)[:1]
    if not mu.is_embedding_path(config["initializer_token"]):
        tokens.insert(0, config["initializer_token"])
    clip = load_clip(config["model"], components.device)
    scores = score_tokens(components, clip, training_images, tokens, config["learnable_property"], **settings)
    mu.write_whole(path, json.dumps({"tokens": scores, **settings}, indent=1).encode())
    print(f"{'':24}{'CLIP-I (images)':>20}{'CLIP-T (prompts)':>20}")
    for token, found in scores.items():
        cells = (f"{found[name]['mean']:.3f} +- {found[name]['error']:.3f}" for name in ("clip_i", "clip_t"))
        print(f"{token:24}" + "".join(f"{cell:>20}" for cell in cells))


# --- Options ----------------------------------------------------------------------------------------------------------


def build_parser():
    parser = mu.make_parser("Generate images with a learned token.")
    add = parser.add_argument
    # fmt: off
    add("--embedding", action="append", help="file, run folder or Hub id; repeatable (default: last run)")
    add("--token", action="append", help="name of each --embedding's token; OLD=NEW takes one of several")
    add("--prompt", action="append", help="repeatable (default: a photo of each token)")
    add("--negative_prompt", help="what the images should not show")
    add("--num_images", type=mu.one_or_more, help="images per prompt (default: 4; with --score 64)")
    add("--sampler", choices=SAMPLERS, help="(default: dpm++, or what the model advises)")
    add("--steps", "--num_inference_steps", type=mu.one_or_more, help="(default: 25, or what the model advises)")
    add("--guidance", "--guidance_scale", type=float, help="scale (default: 7.5, or what the model advises)")
    add("--seed", type=int, default=0, help="of the first image; the next ones count up")
    add("--height", type=mu.one_or_more, help="in pixels (default: the model's own)")
    add("--width", type=mu.one_or_more, help="in pixels (default: the model's own)")
    add("--batch_size", type=mu.one_or_more, help="images generated at a time; does not change them (default: 4)")
    add("--output_dir", "--out", help="folder for the images (default: samples/ in the run's folder)")
    add("--model", "--pretrained_model_name_or_path", help="folder or Hub id (default: the run's)")
    add("--revision", help="revision of a Hub id (default: the run's)")
    add("--variant", help="variant of the weight files, such as fp16 (default: the run's)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="device to generate on")
    add("--precision", "--mixed_precision", default="auto", choices=mu.PRECISIONS, help="precision of the UNet")
    add("--score", action="store_true", help="compute the CLIP scores of a run's token: scores*.json in its folder")
    # fmt: on
    return parser


def load_run(args):
    """The model with the tokens that the options name -> components, folder and options of the first token's run."""
    sources = args.embedding or []
    if not sources and not (args.model and args.prompt):  # with both the model alone generates
        sources = [str(mu.newest_run("learned_embeds.safetensors"))]
    first = Path(sources[0]) if sources else Path()
    folder = first if first.is_dir() else first.parent if first.is_file() else Path()  # a Hub id has none
    config = mu.read_json(folder / "config.json") if sources and first.exists() else {}
    if args.model:  # the run's revision and variant belong to its own model
        config |= {"model": args.model, "revision": None, "variant": None}
    model = config.setdefault("model", mu.DEFAULT_MODEL)
    device = mu.choose_device(args.device)
    dtype = mu.DTYPES[mu.choose_precision(args.precision, device)]
    files = [getattr(args, name) or config.get(name) for name in ("revision", "variant")]
    components = mu.load_components(model, dtype, *files, device)
    print(f"model      {model}")
    width, tokens = components.text_encoder.config.hidden_size, []
    for source, name in itertools.zip_longest(sources, args.token or []):
        tokens.append(mu.load_embedding(source, name, width))
        print(f"token      {tokens[-1][0]} ({source})")
    if tokens:
        mu.add_tokens(components, tokens, "--token")
    return components, folder, config


def run(args):
    """Generate images, or scores, as the options say. UserError if that cannot be done."""
    components, folder, config = load_run(args)
    settings = sampling_settings(config["model"], vars(args))
    if args.score:
        if "initializer_token" not in config:
            raise UserError("--score compares with training images: name a run folder of train.py as --embedding.")
        settings |= {"num_images": args.num_images or 64, "seed": args.seed}
        step = Path((args.embedding or [""])[0]).stem.partition("learned_embeds")[2]  # "-steps-100"
        path = next_free(folder, numbered(f"scores{step}", ".json"))
        print(f"scores     {path}")
        return score_run(components, path, config, **settings)
    photo = PHOTO_PROMPT[config.get("learnable_property", "object")]
    prompts = args.prompt or [photo.format(token) for token in components.placeholders]
    for prompt in prompts if components.placeholders else ():
        if not any(token in f"{prompt} {settings['negative_prompt']}" for token in components.placeholders):
            print(f"note: {prompt!r} holds no learned token ({', '.join(components.placeholders)})", file=sys.stderr)
    count, out = args.num_images or 4, Path(args.output_dir or folder / "samples")
    each_prompt = [prompt for prompt in prompts for _ in range(count)]
    seeds = range(args.seed, args.seed + len(each_prompt))
    stored = {**settings, "model": config["model"], "embeddings": args.embedding or components.placeholders and folder}
    images = []
    for i, image in enumerate(generate(components, each_prompt, seeds, **settings)):
        out.mkdir(parents=True, exist_ok=True)
        path = next_free(out, (f"{number:04d}.png" for number in itertools.count()))
        save_png(image, path, {"prompt": each_prompt[i], "seed": seeds[i], **stored})
        images.append(image)
    if len(images) > 1:
        grid = image_grid(images, count if len(prompts) > 1 else min(count, 4), prompts)
        path = next_free(out, numbered("grid", ".png"))
        save_png(grid, path, {"prompt": prompts, "seed": args.seed, **stored})
    print(f"images     {len(images)} in {out}")


def main(argv=None):
    advice = "take a smaller --batch_size, --precision bf16, or a smaller --height and --width"
    with mu.one_sentence_errors(advice):
        run(build_parser().parse_args(argv))


if __name__ == "__main__":
    main()
