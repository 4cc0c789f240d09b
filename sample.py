"""Draw with a learned word: samplers, guidance, pictures, scores, the command line.

python sample.py                        # what train.py has just learned
python sample.py --embedding runs/kat --embedding runs/pup --prompt "a <kat> and a <pup> on the moon"
python sample.py --score                # how well was the word learned?
"""

import argparse
import itertools
import json
import math
import sys
import textwrap
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm
from transformers import CLIPModel, CLIPTokenizer
from transformers.utils import cached_file

import model_utils as mu
from data import load_images
from model_utils import UserError

# --- Samplers ---------------------------------------------------------------------------------------------------------
# x: noisy latents [B, 4, h, w]; x0: the clean latents they seem to come from; eps: the noise they seem to hold;
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
        grid = grid + min(schedule.steps_offset, total - 1 - grid[0])
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
    """Ancestral sampling: Ho et al. 2020 (arXiv:2006.11239), equation 7. Each picture has a generator of its own."""
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

# --- Drawing ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample_latents(
    unet, schedule, text_embeddings, negative_embeddings, latents, steps, guidance, sampler, generators=None,
    tick=lambda: None,
):  # fmt: skip
    """Clean latents [B, 4, h, w] (scaled, fp32) from `latents` of pure noise.

    text_embeddings, negative_embeddings: [B, L, dim]. guidance: the scale s of classifier-free guidance (Ho and
    Salimans 2022); at 1 or less the sentence alone leads, at half the cost. generators: one a picture, for samplers
    that add noise. tick() is called after each of the `steps` calls of the UNet.
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
        tick()
        return noise_pred

    timesteps = inference_timesteps(schedule, steps, sampler)
    return SAMPLERS[sampler](denoise, latents.float(), timesteps, schedule, generators)


# A loaded model; placeholders: {learned word: its token_ids}
Parts = namedtuple("Parts", "tokenizer text_encoder vae unet schedule placeholders")


@torch.no_grad()
def draw(
    parts, prompts, seeds, negative_prompt="", steps=25, guidance=7.5, sampler="dpm++",
    height=None, width=None, batch_size=4, progress=True,
):  # fmt: skip
    """Yield a PIL picture for each prompt and its seed, as soon as its batch is done.

    Each starts from torch.randn((1, C, h, w)) of a CPU generator with its seed and takes all later noise from it, so
    no picture depends on the batch it is in. height, width: pixels (default: the model's own; UserError if they do not
    fit it). The VAE may wait on another device: it is moved over only to decode.
    """
    unet, device, factor = parts.unet, parts.unet.device, 2 ** (len(parts.vae.config.block_out_channels) - 1)
    height, width = (size or unet.config.sample_size * factor for size in (height, width))
    if min(height, width) < 1 or height % factor or width % factor:
        raise UserError(f"--height {height}, --width {width}: this model draws sizes that are multiples of {factor}.")
    shape = (1, unet.config.in_channels, height // factor, width // factor)

    sentences = list(dict.fromkeys([negative_prompt, *prompts]))  # each is encoded once
    encoded = mu.encode_tokens(parts.text_encoder, mu.tokenize(parts.tokenizer, sentences, parts.placeholders))
    embeddings = dict(zip(sentences, encoded.to(device), strict=True))
    batches = [slice(start, start + batch_size) for start in range(0, len(prompts), batch_size)]
    with tqdm(total=len(batches) * steps, desc="drawing", unit="step", disable=None if progress else True) as bar:
        for batch in batches:
            text = torch.stack([embeddings[prompt] for prompt in prompts[batch]])  # [B, L, dim]
            negative = embeddings[negative_prompt].expand_as(text)
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[batch]]
            noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators]).to(device)
            how = (steps, guidance, sampler, generators, bar.update)
            latents = sample_latents(unet, parts.schedule, text, negative, noise, *how)
            home = parts.vae.device
            images = mu.decode_latents(parts.vae.to(device), latents)
            parts.vae.to(home)
            yield from mu.to_pil(images)


def image_grid(images, columns, captions=()):
    """PIL pictures of one size -> one sheet, row by row. captions: a line of text above each row, "" for none."""
    width, height = images[0].size
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    sheet_width = columns * (width + 2)
    captions = [textwrap.wrap(caption, max(10, sheet_width // 6)) for caption in captions][: len(rows)]  # letters: 6 px
    captions += [[]] * (len(rows) - len(captions))
    sheet = Image.new("RGB", (sheet_width, sum(height + 2 + 14 * len(lines) for lines in captions)), "white")
    y = 0
    for row, lines in zip(rows, captions, strict=True):
        for line in lines:
            ImageDraw.Draw(sheet).text((2, y), line, fill="black")
            y += 14
        for column, image in enumerate(row):
            sheet.paste(image, (column * (width + 2) + 1, y + 1))
        y += height + 2
    return sheet


def plot_curves(panels, path, width=480, height=200):
    """Write line plots, one below the other, as PNG. panels: {title: [(x, y), ...]}; what is not finite is left out."""
    sheet = Image.new("RGB", (width, height * len(panels)), "white")
    pen = ImageDraw.Draw(sheet)
    for place, (title, points) in enumerate(panels.items()):
        points = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
        left, top, right, bottom = 70, place * height + 30, width - 20, (place + 1) * height - 24
        pen.text((left, top - 20), title, fill="black")
        pen.rectangle((left, top, right, bottom), outline="lightgrey")
        if len(points) < 2:
            continue
        (x_low, x_high), (y_low, y_high) = ((min(numbers), max(numbers)) for numbers in zip(*points, strict=True))
        x_scale, y_scale = (right - left) / (x_high - x_low), (bottom - top) / (y_high - y_low or 1)
        line = [(left + (x - x_low) * x_scale, bottom - (y - y_low) * y_scale) for x, y in points]
        pen.line(line, fill="royalblue", width=2, joint="curve")
        pen.text((left - 6, top), f"{y_high:.3g}", fill="dimgrey", anchor="ra")
        pen.text((left - 6, bottom), f"{y_low:.3g}", fill="dimgrey", anchor="rd")
        pen.text((left, bottom + 6), str(x_low), fill="dimgrey")
        pen.text((right, bottom + 6), f"step {x_high}", fill="dimgrey", anchor="ra")
    mu.atomic_write(path, lambda buffer: sheet.save(buffer, format="PNG"))


def save_png(image, path, settings):
    """Write a PIL picture with the dict `settings` in its text chunks (read back by PIL.Image.open(path).text)."""
    chunks = PngInfo()
    for key, value in settings.items():
        chunks.add_text(key, str(value))
    mu.atomic_write(path, lambda buffer: image.save(buffer, format="PNG", pnginfo=chunks))


# --- Scores -----------------------------------------------------------------------------------------------------------
# Gal et al. 2022 (arXiv:2208.01618), section 5. CLIP-I: how like the training pictures drawings of the word are;
# CLIP-T: how well drawings follow a sentence, from which the word is left out. Both are cosines of CLIP embeddings.

DEFAULT_SCORE_MODEL = "openai/clip-vit-base-patch32"
PHOTO_PROMPT = {"object": "a photo of a {}", "style": "a painting in the style of {}"}
SCENES = ["on a red background", "on a green background", "at night", "on the beach", "on the moon"]
THINGS = ["a cat", "a dog", "a bird", "a fish", "a house", "a car", "a boat", "two cats"]
EDITING_PROMPTS = {
    "object": ["a photo of two {}", "a drawing of a {}", "pixel art of a {}"]
    + [f"a photo of a {{}} {scene}" for scene in SCENES],
    "style": [f"a picture of {thing} in the style of {{}}" for thing in THINGS],
}
# A CLIPModel that judges, with the content of its preprocessor_config.json
Clip = namedtuple("Clip", "model tokenizer preprocessing name")


def load_clip(model, score_model=None, device="cpu"):
    """Clip of `score_model` (folder or Hub id); without one the model's own folder `clip`, else OpenAI's ViT-B/32."""
    name = score_model or (str(Path(model, "clip")) if Path(model, "clip").is_dir() else DEFAULT_SCORE_MODEL)
    try:
        preprocessing = json.loads(Path(cached_file(name, "preprocessor_config.json")).read_text())
        if missing := {"crop_size", "image_mean", "image_std"} - preprocessing.keys():
            raise ValueError(f"preprocessor_config.json lacks {missing}")
        clip = CLIPModel.from_pretrained(name, dtype=torch.float32).requires_grad_(False).eval().to(device)
        in_a_model = Path(name).with_name("tokenizer").is_dir()
        tokenizer = mu.load_tokenizer(Path(name).parent) if in_a_model else CLIPTokenizer.from_pretrained(name)
    except Exception as error:
        raise UserError(f"--score_model {name} cannot be loaded: name a CLIP's folder or, online, Hub id.") from error
    return Clip(clip, tokenizer, preprocessing, name)


@torch.no_grad()
def embed(clip, images, sentences):
    """CLIP embeddings of length 1, on the CPU: of PIL pictures [N, dim], of sentences [S, dim]."""
    size = clip.preprocessing["crop_size"]
    size = size["height"] if isinstance(size, dict) else size  # old files hold a plain number
    squares = [ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC) for image in images]
    pixels = (np.stack(squares) / 255 - clip.preprocessing["image_mean"]) / clip.preprocessing["image_std"]
    pixels = torch.tensor(pixels, dtype=torch.float32).permute(0, 3, 1, 2)  # [N, 3, S, S]
    length = clip.model.config.text_config.max_position_embeddings
    tokens = clip.tokenizer(sentences, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    both = clip.model(tokens.input_ids.to(clip.model.device), pixels.to(clip.model.device))
    return both.image_embeds.cpu(), both.text_embeds.cpu()


def score_embedding(
    parts, clip, training_images, words, learnable_property="object", drawings=64, seed=0,
    look=lambda word, images: None, **drawing,
):  # fmt: skip
    """Draw with each of `words` and measure; returns what scores.json holds.

    words: what the learned word began as, to compare with, and the learned word. training_images: PIL. `drawings` of
    PHOTO_PROMPT give CLIP-I; as many, spread over EDITING_PROMPTS, give CLIP-T. drawing: options of `draw`.
    look(word, images): is shown all drawings of each word.
    """

    def mean_and_error(cosines):  # [sentences, drawings]: the drawings are chance, the sentences are not
        return {"mean": cosines.mean().item(), "error": (cosines.var(dim=1).mean() / cosines.numel()).sqrt().item()}

    edits = EDITING_PROMPTS[learnable_property]
    drawings, each = max(2, drawings), max(2, drawings // len(edits))
    prompts = [PHOTO_PROMPT[learnable_property]] * drawings + [edit for edit in edits for _ in range(each)]
    seeds = range(seed, seed + len(prompts))  # the same for each word
    sentences = [" ".join(edit.replace("{}", "").split()) for edit in edits]
    known, targets = embed(clip, training_images, sentences)  # [N, dim], [S, dim]
    alike = known @ known.T  # the training pictures with each other: hardly to be surpassed
    others = (alike.sum() - alike.trace()).item() / max(1, alike.numel() - len(alike))
    scores = {"clip": clip.name, "drawings": drawings, "seed": seed, **drawing, "training_images": others, "words": {}}
    for word in words:
        images = list(draw(parts, [prompt.format(word) for prompt in prompts], seeds, **drawing))
        look(word, images)
        drawn, _ = embed(clip, images, sentences)
        likeness = (drawn[:drawings] @ known.T).mean(dim=1)[None]  # [1, drawings]
        followed = (drawn[drawings:].unflatten(0, (len(edits), each)) * targets[:, None]).sum(dim=-1)  # [S, each]
        found = {"clip_i": mean_and_error(likeness), "clip_t": mean_and_error(followed)}
        scores["words"][word] = found | {"sentences": dict(zip(edits, followed.mean(dim=1).tolist(), strict=True))}
    return scores


def report_scores(scores, path):
    """Print what score_embedding found as a table (mean and standard error) and write it to `path` as JSON."""
    print(f"{'':24}{'CLIP-I (likeness)':>20}{'CLIP-T (sentence)':>20}")
    for word, found in scores["words"].items():
        cells = (f"{found[score]['mean']:.3f} +- {found[score]['error']:.3f}" for score in ("clip_i", "clip_t"))
        print(f"{word:24}" + "".join(f"{cell:>20}" for cell in cells))
    print(f"{'training pictures':24}{scores['training_images']:>11.3f}\nscores in {path}")
    mu.atomic_write(path, lambda buffer: buffer.write(json.dumps(scores, indent=1, ensure_ascii=False).encode()))


# --- Command line -----------------------------------------------------------------------------------------------------


def sampling_defaults(model):
    """Steps and guidance that the model's folder advises."""
    return mu.read_json(Path(model, "model_index.json")).get("_sampling", {})


def load_parts(model, words, device="cpu", dtype=torch.float32, revision=None, variant=None):
    """Parts of a model that knows the words of embedding files: {file, run folder or Hub id: new name or None}."""
    options = (device, dtype, revision, variant)
    tokenizer, text_encoder = mu.load_tokenizer(model, revision), mu.load_text_encoder(model, *options)
    dim = text_encoder.get_input_embeddings().weight.shape[1]
    found = [mu.load_embedding(source, token, dim) for source, token in words.items()]
    if len({e.token for e in found}) < len(found):
        raise UserError(f"two embeddings are called {found[-1].token!r}: give each a --token, in their order.")
    placeholders = {e.token: mu.add_placeholder(tokenizer, e.token, len(e.rows), "--token") for e in found}
    mu.install_learned_rows(text_encoder, sum(placeholders.values(), []), torch.cat([e.rows for e in found]))
    vae = mu.load_vae(model, device, torch.float32, revision, variant)  # in half some VAEs overflow
    unet = mu.load_unet(model, *options)
    return Parts(tokenizer, text_encoder, vae, unet, mu.load_schedule(model, revision), placeholders)


def run(args):
    # 1. The words, and the model they were learned on
    newest = sorted(Path("runs").glob("*/learned_embeds.safetensors"), key=lambda path: path.stat().st_mtime)[-1:]
    sources, tokens = args.embedding or [str(path) for path in newest], args.token or []
    if not sources:
        raise UserError("there is no run in runs/ yet; run train.py first, or name an --embedding.")
    if len(tokens) > len(sources):
        raise UserError(f"--token is given {len(tokens)} times for {len(sources)} --embedding; give one for each.")
    for name in ("num_images", "batch_size", "height", "width"):
        if (number := getattr(args, name)) is not None and number < 1:
            raise UserError(f"--{name} {number}: must be 1 or more.")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed {args.seed}: must be 0 or more (and below 2**63).")
    if args.guidance is not None and not math.isfinite(args.guidance):
        raise UserError(f"--guidance {args.guidance}: must be a number, 7.5 is usual.")
    if len(set(sources)) < len(sources):
        raise UserError(f"--embedding {max(sources, key=sources.count)} is given twice; once is enough.")
    words = dict(itertools.zip_longest(sources, tokens))
    home = next((folder for folder in (Path(sources[0]), Path(sources[0]).parent) if folder.is_dir()), Path())
    config = mu.read_config(home)  # what train.py noted
    metadata = {} if config else mu.load_embedding(sources[0], words[sources[0]]).metadata
    learned_on = config.get("model") or mu.model_of_name(metadata.get("base_model"))
    model, device = args.model or learned_on or mu.DEFAULT_MODEL, mu.choose_device(args.device)
    origin = vars(args) if args.model else config  # another model has files of its own
    options = (mu.choose_dtype(args.precision, device), origin.get("revision"), origin.get("variant"))
    parts = load_parts(model, words, device, *options)

    # 2. How to draw: as asked, else as the model's folder advises, else as is usual with Stable Diffusion
    how = {"sampler": "dpm++", "steps": 25, "guidance": 7.5, "batch_size": 4, "negative_prompt": ""}
    how |= sampling_defaults(model)
    names = (*how, "height", "width")
    how |= {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    kind = config.get("learnable_property", "object")

    # 3. Either the scores of the first word
    if args.score:
        if "images" not in config:
            raise UserError("--score compares with training pictures: name a run folder of train.py as --embedding.")
        pictures = mu.to_pil(load_images(config["images"], config["resolution"])[0])
        compared = [word for word in (config.get("initializer_token"), next(iter(parts.placeholders))) if word]
        clip, count = load_clip(model, args.score_model, device), args.num_images or 64
        scores = score_embedding(parts, clip, pictures, compared, kind, count, args.seed, **how)
        return report_scores(scores, home / "scores.json")

    # 4. Or drawings
    prompts = args.prompt or [PHOTO_PROMPT[kind].format(word) for word in parts.placeholders]
    for prompt in prompts:
        if not {ids[0] for ids in parts.placeholders.values()} & set(parts.tokenizer(prompt).input_ids):
            print(f"note: {prompt!r} holds no learned word, such as {[*parts.placeholders][0]}", file=sys.stderr)
    count, folder, images = args.num_images or 4, Path(args.output_dir or home / "drawings"), []
    each_prompt = [prompt for prompt in prompts for _ in range(count)]
    seeds = range(args.seed, args.seed + len(each_prompt))
    notes = {**how, "model": mu.name_of_model(model), "embeddings": dict(zip(parts.placeholders, words, strict=True))}
    for image in draw(parts, each_prompt, seeds, **how):
        path = next(p for i in itertools.count() if not (p := folder / f"{i:04d}.png").exists())
        save_png(image, path, {"prompt": each_prompt[len(images)], "seed": seeds[len(images)], **notes})
        images.append(image)
    if len(images) > 1:
        path = next(p for i in ["", *range(2, 10**6)] if not (p := folder / f"grid{i}.png").exists())
        grid = image_grid(images, count if len(prompts) > 1 else math.ceil(count**0.5), prompts)
        save_png(grid, path, {"prompt": prompts, "seed": args.seed, **notes})
    print(f"{len(images)} drawings in {folder}")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Draw with a learned word.", allow_abbrev=False)
    add = parser.add_argument
    add("--embedding", action="append", help="file, run folder or Hub id; repeatable (default: newest run in runs/)")
    add("--token", action="append", help="new name for the word of each --embedding, in their order")
    add("--prompt", action="append", help="repeatable (default: a photo of each word)")
    add("--negative_prompt", help="what the drawings should not show")
    add("--num_images", type=int, help="drawings of each prompt (default: 4; for each score 64)")
    add("--sampler", choices=SAMPLERS, help="(default: dpm++)")
    add("--steps", "--num_inference_steps", type=int, help="UNet calls a drawing (default: 25, or the model's own)")
    add("--guidance", "--guidance_scale", type=float, help="pull of the prompt (default: 7.5, or the model's own)")
    add("--seed", type=int, default=0, help="of the first drawing, the next have the next (default: %(default)s)")
    add("--height", type=int, help="in pixels (default: the model's own)")
    add("--width", type=int, help="in pixels (default: the model's own)")
    add("--batch_size", type=int, help="drawings at a time, changes none of them (default: 4)")
    add("--output_dir", "--out", help="for the drawings (default: drawings/ in the run folder)")
    add("--model", "--pretrained_model_name_or_path", help="folder or Hub id (default: what the word was learned on)")
    add("--revision", help="of --model, if it is a Hub id")
    add("--variant", help="of the weight files of --model, such as fp16")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="(default: %(default)s)")
    add("--precision", default="auto", choices=["auto", "no", "fp32", "fp16", "bf16"], help="(default: %(default)s)")
    add("--score", action="store_true", help="measure the word of a run with CLIP: scores.json beside its embedding")
    add("--score_model", help=f"CLIP, folder or Hub id (default: clip/ in the model, else {DEFAULT_SCORE_MODEL})")
    try:
        run(parser.parse_args(argv))
    except (UserError, RuntimeError, MemoryError) as error:
        if not isinstance(error, UserError) and not mu.explain(error):
            raise
        print(f"error: {mu.explain(error) or error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
