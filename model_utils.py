"""The frozen model and the few numbers that are learned: everything that `train.py` and `sample.py` share.

From top to bottom: the parts of the method (the noise schedule, the masked lookup); the new token, and prompts as
tokens; images as latents and back; embedding files; the whole frozen model (Components); errors, device, precision.
"""

import argparse
import gc
import json
import logging
import os
import re
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import diffusers
import huggingface_hub
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import nn
from tqdm import tqdm

# --- The method's parts: noise schedule, masked lookup ----------------------------------------------------------------


class NoiseSchedule(NamedTuple):
    """The noise level of each timestep, kept in fp32 whatever the model's precision is.

    alphas_cumprod [T]: the fraction of the latents' variance left at each timestep, falling from nearly 1 to nearly 0.
    """

    alphas_cumprod: torch.Tensor
    prediction_type: str = "epsilon"  # what the UNet predicts: 'epsilon' or 'v_prediction'
    timestep_spacing: str | None = None  # None: each sampler's usual one, as in diffusers
    set_alpha_to_one: bool = True

    @property
    def num_train_timesteps(self):
        return len(self.alphas_cumprod)

    def _signal_and_noise(self, timesteps):
        # fp32: cast to half, 1 - alphas_cumprod itself would be rounded (to 0 in bf16 for the first timesteps)
        alphas_cumprod = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()

    def add_noise(self, latents, noise, timesteps):
        """latents, noise [B, 4, h, w], timesteps [B] -> noisy_latents. DDPM (Ho et al. 2020), equation 4."""
        signal, sigma = self._signal_and_noise(timesteps)
        return (signal * latents + sigma * noise).to(latents.dtype)

    def target(self, latents, noise, timesteps):
        """What the UNet should predict [B, 4, h, w]: the noise, or v (Salimans and Ho 2022, appendix D)."""
        if self.prediction_type == "epsilon":
            return noise
        signal, sigma = self._signal_and_noise(timesteps)
        return (signal * noise - sigma * latents).to(latents.dtype)


def make_schedule(config):
    """The schedule of a scheduler_config.json (a dict), with diffusers' defaults. ValueError if it is unknown here."""
    kind, prediction_type = config.get("beta_schedule", "linear"), config.get("prediction_type", "epsilon")
    known = kind in ("linear", "scaled_linear") and prediction_type in ("epsilon", "v_prediction")
    if not known or config.get("trained_betas"):
        raise ValueError(
            f"beta_schedule {kind!r}, trained_betas or prediction_type {prediction_type!r} is unknown here"
        )
    power = 0.5 if kind == "scaled_linear" else 1  # latent diffusion's own: linear in the square root
    start, end = config.get("beta_start", 1e-4) ** power, config.get("beta_end", 0.02) ** power
    betas = torch.linspace(start, end, config.get("num_train_timesteps", 1000)) ** (1 / power)
    alphas_cumprod = (1 - betas).cumprod(0)
    if config.get("rescale_betas_zero_snr"):  # Lin et al. 2023 (arXiv:2305.08891), algorithm 1: T is pure noise
        root = alphas_cumprod.sqrt()
        alphas_cumprod = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    spacing, to_one = config.get("timestep_spacing"), config.get("set_alpha_to_one", True)
    return NoiseSchedule(alphas_cumprod, prediction_type, spacing, to_one)


class LearnedEmbedding(nn.Module):
    """CLIP's token table with a few rows of its own that can learn: the masked gradient of textual inversion.

    The mask that picks `learned_rows` [n, dim] in the forward pass is the mask of the gradient in the backward pass, so
    this equals training the whole table with every other row's gradient set to zero. But the table is no parameter:
    weight decay, half precision and the optimizer's state cannot reach it.
    """

    def __init__(self, table, token_ids, init_rows):
        super().__init__()
        self.register_buffer("weight", table.detach())  # [V, dim], frozen
        row_of_id = torch.full((max(len(table), max(token_ids) + 1),), -1)
        row_of_id[token_ids] = torch.arange(len(token_ids))
        self.register_buffer("row_of_id", row_of_id.to(table.device), persistent=False)
        self.learned_rows = nn.Parameter(init_rows.detach().to(table.device, torch.float32, copy=True))  # [n, dim]

    def forward(self, token_ids):  # [B, L]
        row = self.row_of_id[token_ids]  # [B, L], -1 for an old token
        is_new = (row >= 0).unsqueeze(-1)  # [B, L, 1]
        # F.embedding: the gradient of learned_rows[row] would add up in no fixed order on several threads
        learned = F.embedding(row.clamp(min=0), self.learned_rows).to(self.weight.dtype)
        frozen = F.embedding(token_ids.clamp(max=len(self.weight) - 1), self.weight)
        return torch.where(is_new, learned, frozen)  # [B, L, dim]


# --- The new token, and prompts as tokens -----------------------------------------------------------------------------

EMBEDDING_SUFFIXES = (".safetensors", ".bin", ".pt")


def initial_rows(components, initializer, num_vectors, seed):
    """The rows [num_vectors, dim] that a token starts with, fp32 on the CPU.

    initializer: words, or an embedding's file or folder. One vector starts as the mean of its rows; several take one
    each, and repeat them with a little noise if there are fewer. None: as many as the embedding has, or one for words.
    UserError if it is neither known words nor an embedding.
    """
    tokenizer, table = components.tokenizer, components.text_encoder.get_input_embeddings().weight
    token_ids = tokenizer(initializer, add_special_tokens=False).input_ids
    if is_embedding_path(initializer):
        _, rows = load_embedding(initializer, "<initializer>", table.shape[1], "--initializer_token")
        num_vectors = num_vectors or len(rows)
    elif not token_ids or set(token_ids) & set(tokenizer.all_special_ids):
        raise UserError(f"--initializer_token {initializer!r} is no word that the model knows; choose one such as cat.")
    else:
        rows = table[token_ids].float().cpu()
        if len(token_ids) > len(initializer.split()):  # a rare or misspelt word
            pieces = " + ".join(tokenizer.decode([i]) for i in token_ids)
            print(f"note: --initializer_token {initializer!r} is {pieces} to the model, not one token", file=sys.stderr)
    if num_vectors in (1, None):
        return rows.mean(dim=0, keepdim=True)
    noise = torch.randn(num_vectors, table.shape[1], generator=torch.Generator().manual_seed(seed)) * rows.std()
    noise[: len(rows)] = 0
    return rows[torch.arange(num_vectors) % len(rows)] + 0.1 * noise


def is_embedding_path(initializer):
    """Whether an initializer names an embedding's file or folder, and is not words."""
    path = Path(initializer)
    return len(path.parts) > 1 or path.suffix in EMBEDDING_SUFFIXES or any(path.glob("learned_embeds.*"))


def add_tokens(components, tokens, option):
    """Add tokens, pairs of a name and its rows [n, dim], to a model -> learned_rows [sum of n, dim], a parameter.

    LearnedEmbedding takes the place of the text encoder's token table. A token of n rows is n tokens of the tokenizer:
    token, token_1, token_2, ... UserError, with the option that named it, if it is empty, has spaces or exists.
    """
    tokenizer, placeholders = components.tokenizer, components.placeholders
    for token, rows in tokens:
        names = [token] + [f"{token}_{i}" for i in range(1, len(rows))]
        # Tested before, as tokenizer.add_tokens returns 1 for an existing token too, whose row would be replaced
        pieces = tokenizer(token, add_special_tokens=False).input_ids
        exists = len(pieces) == 1 or not tokenizer.get_vocab().keys().isdisjoint(names)
        if exists or token.split() != [token]:
            fault = "is already a token of the model" if exists else "is empty or has spaces"
            raise UserError(f"{option} {token!r} {fault}; choose a name such as {option} '<my-cat>'.")
        # normalized=False: found as it is written, before lower-casing. single_word: 'sks' is not found inside 'asks'
        settings = {"normalized": False, "single_word": bool(re.search(r"^\w|\w$", token))}
        tokenizer.add_tokens([transformers.AddedToken(name, **settings) for name in names])
        placeholders[token] = tokenizer.convert_tokens_to_ids(names)
    token_ids = [i for ids in placeholders.values() for i in ids]
    table = components.text_encoder.get_input_embeddings().weight
    embedding = LearnedEmbedding(table, token_ids, torch.cat([rows for _, rows in tokens]))
    components.text_encoder.set_input_embeddings(embedding)
    return embedding.learned_rows


def tokenize(components, prompts):
    """Prompts [B] -> token_ids [B, L], L the tokenizer's model_max_length, padded, or cut off where they are longer.

    A learned token stands for all its vectors, one after the other. UserError if one of them would be cut off.
    """
    tokenizer, length = components.tokenizer, components.tokenizer.model_max_length
    vectors_of = {token_ids[0]: token_ids for token_ids in components.placeholders.values()}
    rows = []
    for prompt in prompts:
        ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        # ids, not text, are expanded: no token can be mistaken for the start of another
        body = [vector for i in ids for vector in vectors_of.get(i, [i])]
        for token, token_ids in components.placeholders.items():
            if set(token_ids) & set(body[length - 2 :]):
                raise UserError(f"the prompt {prompt[:60]!r} is too long for {token!r}; take fewer words or vectors.")
        row = [tokenizer.bos_token_id, *body[: length - 2], tokenizer.eos_token_id]
        rows.append(row + [tokenizer.pad_token_id] * (length - len(row)))
    return torch.tensor(rows)  # [B, L]


def encode(components, token_ids):
    """token_ids [B, L] -> text_embeddings [B, L, dim]. Training and sampling encode here, and nowhere else."""
    return components.text_encoder(token_ids).last_hidden_state


# --- Images as latents, and back --------------------------------------------------------------------------------------


@torch.no_grad()
def encode_images(components, images):
    """images [B, 3, H, W] in [-1, 1] -> mean, std [B, 4, h, w] of their latents, scaled, fp32 on the CPU.

    A fresh sample, as the UNet takes it, is mean + std * noise. The VAE visits the device, which gets one at a time.
    """
    vae = components.vae.to(components.device)
    # disable=None: hidden unless stderr is a terminal
    bar = tqdm(images.split(1), desc="encoding images", delay=2, leave=False, disable=None)
    posteriors = [vae.encode(image.to(components.device)).latent_dist for image in bar]
    mean = torch.cat([posterior.mean for posterior in posteriors]).cpu()
    std = torch.cat([posterior.std for posterior in posteriors]).cpu()
    vae.to("cpu")
    return mean * vae.config.scaling_factor, std * vae.config.scaling_factor


@torch.no_grad()
def decode_latents(components, latents):
    """latents [B, 4, h, w] (scaled) -> list of B PIL images. The VAE visits the device."""
    vae = components.vae.to(components.device)
    unscaled = latents / vae.config.scaling_factor
    # As many at a time as have the pixels of one image of 512 x 512: more would set the peak memory of a whole run
    batch_size = max(1, 64 * 64 // unscaled[0, 0].numel())
    images = torch.cat([vae.decode(chunk).sample.cpu() for chunk in unscaled.split(batch_size)])
    vae.to("cpu")
    return to_pil(images)


def to_pil(images):
    """images [B, 3, H, W] in [-1, 1] -> list of B PIL images."""
    pixels = ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(array) for array in pixels.permute(0, 2, 3, 1).numpy()]


# --- Embedding files --------------------------------------------------------------------------------------------------


def save_embedding(path, tokens, base_model):
    """Write pairs of a token and its rows [n, dim] as diffusers does: {token: fp32 tensor}, 1-D for one vector."""
    content = {token: rows.detach().float().cpu().squeeze(0).clone() for token, rows in tokens}
    write_whole(path, safetensors.torch.save(content, metadata={"base_model": base_model}))


def load_embedding(source, token=None, dim=None, option="--embedding"):
    """Read an embedding -> its token, its rows [n, dim] in fp32. source: a file, a folder that holds one, or a Hub id.

    Any program's file: diffusers', A1111's, the paper's, kohya's, OneTrainer's, InvokeAI's, SDXL's (clip_l is taken),
    a bare tensor. token: chooses one of several, or gives another name, or both ("*=<kat>"); dim: the model's width;
    option: names the source in a UserError, which says what is wrong. Nothing in a file can run code.
    """
    path = find_embedding(source, option)
    try:
        with open(path, "rb") as file, torch.serialization.safe_globals([nn.ParameterDict]):  # the paper's container
            if file.read(9)[8:] == b"{":  # safetensors: 8 bytes of length, then JSON, whatever its suffix
                content = safetensors.torch.load_file(path)
            else:  # weights_only: a pickle could otherwise run any program
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise nearly anything
        raise UserError(f"{option} {path} is no embedding: damaged, or not only tensors; nothing was run.") from error
    tensors = dict(named_tensors(content))
    for name in ("clip_l", "emb_params", "emp_params"):  # beside these stand SDXL's other half, or other data
        tensors = {"*": tensors[name]} if name in tensors else tensors
    chosen, _, new_name = (token or "").partition("=")
    if chosen in tensors:
        tensors, token = {chosen: tensors[chosen]}, new_name or chosen
    if len(tensors) != 1:
        found = ", ".join(list(tensors)[:6]) or "no rows"
        remedy = "--token 'NAME=<my-cat>' takes one of several" if option == "--embedding" else "name a file of one"
        raise UserError(f"{option} {path} is no embedding of one token; it holds {found}; {remedy}.")
    ((name, rows),) = tensors.items()
    if name == "*":
        name = isinstance(content, dict) and content.get("name")  # A1111's
    if not (token or name):
        raise UserError(f"{option} {path} does not name its token; give it one, such as --token '<my-cat>'.")
    if dim not in (None, rows.shape[-1]):
        widths = f"rows of width {rows.shape[-1]}, the model wants {dim} (768: Stable Diffusion 1, 1024: 2, 1280: SDXL)"
        raise UserError(f"{option} {path} has {widths}; use another --model.")
    return token or name, torch.atleast_2d(rows.detach().float())  # [n, dim]


def find_embedding(source, option):
    """Path of the embedding file that is named by its own path, by its folder, or by a Hub id."""
    names = ("learned_embeds.safetensors", "learned_embeds.bin")
    for path in (Path(source), *(Path(source, name) for name in names)):
        if path.is_file():
            return path
    why = "a Hub id is 'owner/name'"
    for name in names if is_hub_id(source) and not Path(source).exists() else ():
        try:
            return Path(huggingface_hub.hf_hub_download(source, name))
        except Exception as error:  # no such repository, no network
            why = reason(error)
    raise UserError(f"{option} {source}: no such file, no learned_embeds.safetensors in it, not on the Hub ({why}).")


def is_hub_id(source):
    """Whether a name that is no path here can be that of a Hub repository."""
    return source.count("/") == 1 and Path(source).suffix not in (*EMBEDDING_SUFFIXES, ".ckpt")


def named_tensors(content, name="*"):
    """Yield the name and value of each tensor of rows, however deep dicts are nested."""
    content = getattr(content, "_parameters", content)  # of a ParameterDict
    if isinstance(content, torch.Tensor) and content.dim() in (1, 2) and content.is_floating_point():
        yield name, content
    for key, value in content.items() if isinstance(content, dict) else ():
        yield from named_tensors(value, key)


# --- The whole frozen model -------------------------------------------------------------------------------------------

DEFAULT_MODEL = str(Path(__file__).with_name("mini_sd"))


class Components(NamedTuple):
    """A loaded model. All is frozen, apart from the rows of `add_tokens`."""

    tokenizer: transformers.CLIPTokenizer
    text_encoder: transformers.CLIPTextModel
    vae: diffusers.AutoencoderKL  # fp32 (in half precision some overflow); visits the device to encode and decode
    unet: diffusers.UNet2DConditionModel
    schedule: NoiseSchedule
    placeholders: dict  # {learned token: its token_ids}, filled by add_tokens

    @property
    def device(self):
        return self.unet.device

    @property
    def pixels_per_latent(self):  # along one side
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def resolution(self):  # height and width in pixels of the images that the model was trained on
        return self.unet.config.sample_size * self.pixels_per_latent


def load_components(model, dtype=torch.float32, revision=None, variant=None, device="cpu"):
    """Components of a folder in diffusers' layout or a Hub id, on the device, apart from the VAE.

    dtype: of UNet and text encoder. variant: 'fp16' reads the files named *.fp16.*. UserError if it is no Stable
    Diffusion 1 or 2, with the part and the reason.
    """
    if Path(model).is_file():
        convert = "diffusers.StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
        raise UserError(f"--model {model} is one file; make a folder of it with {convert}, and name that.")
    if not Path(model).is_dir() and not is_hub_id(model):
        raise UserError(f"--model {model}: no such folder, and no Hub id, which is 'owner/name'.")
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity(logging.CRITICAL)  # errors are raised
        library.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()  # downloading gigabytes in silence would look like a hang
    text_encoder = load_part(transformers.CLIPTextModel, model, "text_encoder", dtype, revision, variant)
    with loading(model, "tokenizer"):
        tokenizer = transformers.CLIPTokenizer.from_pretrained(model, subfolder="tokenizer", revision=revision)
        if len(tokenizer) < 4:  # without its files transformers makes one of the special tokens alone
            raise ValueError("it has no vocabulary")
    tokenizer.model_max_length = text_encoder.config.max_position_embeddings  # not always in its own file
    vae = load_part(diffusers.AutoencoderKL, model, "vae", torch.float32, revision, variant)
    unet = load_part(diffusers.UNet2DConditionModel, model, "unet", dtype, revision, variant)
    with loading(model, "scheduler"):
        path = transformers.utils.cached_file(model, "scheduler_config.json", subfolder="scheduler", revision=revision)
        schedule = make_schedule(json.loads(Path(path).read_text()))
    width, channels = text_encoder.config.hidden_size, vae.config.latent_channels
    text_width, in_channels = unet.config.cross_attention_dim, unet.config.in_channels
    if (text_width, in_channels) != (width, channels):  # SDXL, inpainting, parts of several models
        fault = f"its UNet takes {in_channels} channels and text of width {text_width}, not {channels} and {width}"
        raise UserError(f"--model {model} is no Stable Diffusion 1 or 2: {fault}; name another.")
    unet.to(device)
    if unet.device.type != "mps":  # the same numbers in another order, with which convolutions are faster
        unet.to(memory_format=torch.channels_last)
    schedule = schedule._replace(alphas_cumprod=schedule.alphas_cumprod.to(device))
    return Components(tokenizer, text_encoder.to(device), vae, unet, schedule, {})


def load_part(part_class, model, part, dtype, revision, variant):
    """One frozen network of a model."""
    with loading(model, part):
        # dtype is given: by default transformers takes the file's, and rows in half precision do not learn.
        # low_cpu_mem_usage=True would need accelerate
        options = {"subfolder": part, "revision": revision, "variant": variant, "dtype": dtype}
        options |= {"low_cpu_mem_usage": False, "output_loading_info": True}
        network, info = part_class.from_pretrained(model, **options)
        if info["missing_keys"]:  # from_pretrained would go on with random numbers
            raise ValueError(f"it lacks weights, such as {min(info['missing_keys'])}")
    del info
    gc.collect()  # a reference cycle keeps the memory-mapped file: gigabytes
    return network.requires_grad_(False).eval()


@contextmanager
def loading(model, part):
    """Whatever fails inside becomes a UserError that names the part of the model and the reason."""
    try:
        with warnings.catch_warnings(action="ignore"):  # deprecations inside the libraries are not the user's concern
            yield
    except Exception as error:
        raise UserError(f"--model {model}: its part '{part}' cannot be loaded ({reason(error)}).") from error


def read_json(path):
    """The dict in a JSON file; an empty one if there is no such file."""
    return json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).is_file() else {}


def write_whole(path, content):
    """Write bytes to a file: after a kill it holds the old ones or the new ones, never half of it."""
    temporary = Path(path).with_name(f".{Path(path).name}.tmp")  # same folder: a move between disks would be a copy
    temporary.write_bytes(content)
    os.replace(temporary, path)


# --- Errors, device and precision -------------------------------------------------------------------------------------


class UserError(Exception):
    """A mistake that the user can correct: one sentence that names the option and the remedy."""


def reason(error):
    """The first line of a library's message, which often has twenty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


@contextmanager
def one_sentence_errors(memory_advice=""):
    """End the program with one sentence and exit code 2 after a UserError, or when memory has run out."""
    try:
        yield
    except Exception as error:
        no_memory = isinstance(error, MemoryError) or re.search(
            "(out of|allocate|enough) memory", str(error), re.IGNORECASE
        )
        if not isinstance(error, UserError) and not no_memory:
            raise  # a defect keeps its traceback
        sentence = error if isinstance(error, UserError) else f"out of memory: {memory_advice}."
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(2)


def make_parser(description):
    """An argparse parser whose errors are not preceded by twenty lines of usage."""
    usage = "python %(prog)s [--option value ...]   (--help lists them)"
    return argparse.ArgumentParser(description=description, usage=usage, allow_abbrev=False)


def one_or_more(text):
    """Type of an argparse option: a whole number of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return int(text)


def full_path(text):
    """Type of an argparse option: the absolute path of a file or folder; a Hub id as it is."""
    return str(Path(text).resolve() if Path(text).exists() else text)


def newest_run(file):
    """The run's folder in runs/ whose `file` was written last. UserError if there is none."""
    files = sorted(Path("runs").glob(f"*/{file}"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise UserError("there is no run in runs/: train one first, or name it (--resume FOLDER, --embedding FOLDER).")
    return files[-1].parent


def choose_device(name):
    """'auto', 'cpu', 'cuda' or 'mps' -> torch.device. UserError if this machine has no such device."""
    is_there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = next(device for device in is_there if is_there[device]) if name == "auto" else name
    if not is_there[device]:
        raise UserError(f"--device {name}: PyTorch finds no such device here; use --device auto or --device cpu.")
    return torch.device(device)


def peak_memory(device):
    """How much memory of the GPU was in use at most since the last call, to add to a line; "" on other devices."""
    if device.type != "cuda":
        return ""
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return f", {peak:.1f} GB of GPU memory"


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PRECISIONS = ("auto", "no", *DTYPES)


def choose_precision(name, device):
    """One of PRECISIONS -> 'fp32', 'fp16' or 'bf16', of the frozen weights. UserError for fp16 on a CPU."""
    if name == "auto" and device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if name == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs a GPU; on the CPU use --precision fp32 or bf16.")
    return "fp32" if name in ("auto", "no") else name
