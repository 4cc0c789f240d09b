"""The frozen model and the few numbers that are learned: everything `train.py` and `sample.py` share.

From top to bottom: device and precision; loading CLIP, VAE and UNet; the noise schedule; the new word and the masked
lookup that is the heart of textual inversion; sentences and pictures to tensors and back; embedding files.
"""

import ctypes
import gc
import io
import json
import math
import os
import re
import sys
import warnings
import zipfile
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
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

DEFAULT_MODEL = str(Path(__file__).with_name("mini_sd"))

FAMILIES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "SDXL"}  # by width of a token's row
MAX_VECTORS = 75  # CLIP reads 77 tokens, two of them mark start and end
MAX_FILE_BYTES = 64 * 2**20  # an embedding is a few KB; whole checkpoints begin at hundreds of MB


class UserError(Exception):
    """A mistake that the user can mend: one sentence that names the option and the remedy."""


def explain(error):
    """What a user can do about an error of PyTorch's own, as one sentence; None if it is another one."""
    words, origin = str(error).lower(), type(error).__module__
    if isinstance(error, MemoryError) or "out of memory" in words or "allocate memory" in words:
        return (
            "out of memory: take a smaller --batch_size (with as much more --grad_accum it learns alike), "
            "--gradient_checkpointing, --precision bf16 or fp16, or smaller pictures."
        )
    if origin.startswith(("torch._inductor", "torch._dynamo")):
        return f"--compile: PyTorch cannot compile on this machine ({_reason(error)}); leave it out."
    return None


# --- Device and precision ---------------------------------------------------------------------------------------------


def choose_device(name):
    """'auto', 'cpu', 'cuda' or 'mps' -> torch.device. UserError if this machine has no such device."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available.get(torch.device(name).type, False):
        raise UserError(f"--device {name}: PyTorch finds no such device here; use --device auto or --device cpu.")
    return torch.device(name)


def send(tensor, device):
    """Copy a tensor of the CPU to the device; CUDA need not be waited for (on MPS such copies can be garbled)."""
    on_cuda = device.type == "cuda"
    return (tensor.pin_memory() if on_cuda else tensor).to(device, non_blocking=on_cuda)


def choose_dtype(precision, device):
    """'auto', 'no', 'fp32', 'fp16' or 'bf16' -> torch.dtype of the frozen weights (learned rows are always fp32)."""
    if precision == "auto":
        on_cuda = torch.device(device).type == "cuda"
        precision = "fp32" if not on_cuda else "bf16" if torch.cuda.is_bf16_supported(False) else "fp16"
    if precision == "fp16" and torch.device(device).type == "cpu":
        raise UserError("--precision fp16 needs a graphics card; on the CPU use --precision bf16 or fp32.")
    return {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def computes_in_half(dtype, device):
    """True for fp16 and bf16 where the device can multiply in them. Most CPUs cannot: PyTorch's detour is slow."""
    if dtype == torch.float32 or torch.device(device).type != "cpu":
        return dtype != torch.float32
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class WidenedLayer(torch.autograd.Function):
    """A frozen nn.Linear or nn.Conv2d that computes in fp32 with a weight that is kept in half.

    The weight is widened to fp32 when it is used, and once more when the gradient comes back through it: autograd by
    itself would keep every widened weight from one to the other.
    """

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer, ctx.shape, weight = layer, x.shape, layer.weight.float()
        if isinstance(layer, nn.Linear):
            return F.linear(x.float(), weight, layer.bias)
        return F.conv2d(x.float(), weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)

    @staticmethod
    def backward(ctx, grad):
        layer, weight = ctx.layer, ctx.layer.weight.float()
        if isinstance(layer, nn.Linear):
            return grad @ weight, None
        how = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return nn.grad.conv2d_input(ctx.shape, weight, grad, *how), None


def widen_when_used(module):
    """Let a frozen module with weights in half compute in fp32 (see WidenedLayer).

    What autograd keeps until the gradient comes back is kept in half, except what is small for each picture: among
    that are the logarithms from which attention computes its weights anew.
    """
    dtype, forward = next(module.parameters()).dtype, module.forward

    def narrow(x):
        large = x.is_floating_point() and x.dim() > 1 and x[:1].numel() >= 2**16
        return x.to(dtype) if large else x, x.dtype

    def widen(kept):
        x, its_dtype = kept
        return x.to(its_dtype)

    def forward_that_keeps_half(*args, **kwargs):
        with torch.autograd.graph.saved_tensors_hooks(narrow, widen):
            return forward(*args, **kwargs)

    module.forward = forward_that_keeps_half
    for parameter in module.parameters():
        if parameter.dim() < 2:  # biases and norms are small: widened for good
            parameter.data = parameter.data.float()
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.forward = lambda x, layer=layer: WidenedLayer.apply(x, layer)


def give_back_freed_memory():
    """From now on tensors of 2 MB or more return to the system when they are freed (Linux with glibc).

    glibc would keep them for later, by and by a gigabyte in pieces too small for the next tensor.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 2 * 2**20)  # M_MMAP_THRESHOLD


def compile_unet(unet):
    """torch.compile: the first step takes minutes, unless an earlier run has compiled it; the others are faster."""
    warnings.filterwarnings("ignore", message="Dynamo detected")  # how diffusers is written is not the user's concern
    return torch.compile(unet)


# --- Loading the frozen model -----------------------------------------------------------------------------------------


def load_tokenizer(model, revision=None):
    """CLIPTokenizer of a diffusers-layout folder or Hub id. UserError if it is missing or empty."""
    tokenizer = _load_part(transformers.CLIPTokenizer, "tokenizer", model, revision=revision)
    if len(tokenizer) < 4:  # from an empty folder transformers makes a tokenizer of the special tokens alone
        why = "no vocabulary" if Path(model).is_dir() else "no such model there, or no connection"
        raise _unloadable(model, "tokenizer", why)
    if tokenizer.model_max_length > 10_000:  # transformers' way to say "unknown"
        tokenizer.model_max_length = 77
    return tokenizer


def load_text_encoder(model, device, dtype=torch.float32, revision=None, variant=None):
    """CLIPTextModel, frozen, of a folder or Hub id. variant: 'fp16' reads the files named *.fp16.*"""
    return _load_frozen(transformers.CLIPTextModel, "text_encoder", model, device, dtype, revision, variant)


def load_vae(model, device, dtype=torch.float32, revision=None, variant=None):
    """AutoencoderKL, frozen."""
    return _load_frozen(diffusers.AutoencoderKL, "vae", model, device, dtype, revision, variant)


def load_unet(model, device, dtype=torch.float32, revision=None, variant=None):
    """UNet2DConditionModel, frozen. UserError if it wants more than latents and one text encoder (SDXL, inpainting)."""
    unet = _load_frozen(diffusers.UNet2DConditionModel, "unet", model, device, dtype, revision, variant)
    if unet.config.in_channels != unet.config.out_channels or unet.config.addition_embed_type:
        raise UserError(f"--model {model} is no plain text-to-image model; take a Stable Diffusion 1 or 2 checkpoint.")
    if unet.device.type == "mps":
        return unet
    return unet.to(memory_format=torch.channels_last)  # the same numbers in another order: convolutions are faster


def _load_frozen(part_class, part, model, device, dtype, revision, variant):
    # dtype is always given: left to itself transformers takes the file's, and rows learned in half do not learn.
    # low_cpu_mem_usage=True would need accelerate.
    options = {"dtype": dtype, "low_cpu_mem_usage": False, "revision": revision, "variant": variant}
    module, info = _load_part(part_class, part, model, output_loading_info=True, **options)
    if info["missing_keys"]:  # from_pretrained would go on with random numbers
        raise _unloadable(model, part, f"it lacks weights, {min(info['missing_keys'])} for one")
    del info
    gc.collect()  # the file's pages, mapped into memory, hang in a circle of references: gigabytes
    module = module.requires_grad_(False).eval().to(device)
    if dtype != torch.float32 and not computes_in_half(dtype, device):
        widen_when_used(module)
        give_back_freed_memory()
    return module


def _load_part(part_class, part, model, **options):
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()  # downloading gigabytes in silence would look like a hang
    _refuse_missing("--model", model)
    if Path(model).is_dir() and not Path(model, part).is_dir():
        raise UserError(f"--model {model}: the folder '{part}' is missing; a model in diffusers layout is needed.")
    options |= {"subfolder": part, "local_files_only": huggingface_hub.constants.HF_HUB_OFFLINE}
    try:
        with warnings.catch_warnings(action="ignore"):  # what the libraries deprecate is not the user's concern
            return part_class.from_pretrained(str(model), **options)
    except Exception as error:
        raise _unloadable(model, part, _reason(error)) from error


def _unloadable(model, part, why):
    where = "" if Path(model).is_dir() else "there is no such folder here, and from the Hub "
    return UserError(f"--model {model}: {where}its part '{part}' cannot be loaded ({why}); is it there and whole?")


def native_resolution(model, factor, revision=None):
    """The size in pixels that a model draws: that of its UNet's latents times the VAE's `factor`."""
    return read_json(_fetch("--model", model, "unet/config.json", revision))["sample_size"] * factor


def read_json(path):
    """What a JSON file holds; {} if there is no such file. UserError if it is damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({_reason(error)}): mend or remove it.") from error


def name_of_model(model):
    """What runs and embedding files call it: the embedded one by its name alone, for the project's folder may move."""
    return Path(model).name if model == DEFAULT_MODEL else str(model)


def model_of_name(name):
    """The folder or Hub id that `name_of_model` gave this name."""
    return DEFAULT_MODEL if name == Path(DEFAULT_MODEL).name else name


def read_config(folder):
    """The options that the run in a folder began with; {} where there is none. UserError if they are damaged."""
    config = read_json(Path(folder, "config.json"))
    if not isinstance(config, dict) or "placeholder_token" not in config:  # another program's
        return {}
    return config | {"model": model_of_name(config["model"])}


def _fetch(option, name, filename, revision=None):
    """Path of a file in a local folder, or of a Hub repository after downloading it."""
    _refuse_missing(option, name)
    if Path(name).is_dir():
        if not Path(name, filename).is_file():
            raise UserError(f"{option} {name}: the file '{filename}' is missing.")
        return Path(name, filename)
    try:
        return Path(huggingface_hub.hf_hub_download(str(name), filename, revision=revision))
    except Exception as error:
        why = _reason(error)
        raise UserError(f"{option} {name}: no such folder here, and no '{filename}' from the Hub ({why}).") from error


def _refuse_missing(option, name):
    if not Path(name).exists() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name)):
        raise UserError(f"{option} {name}: there is no such file or folder, and it is no Hub id such as 'owner/name'.")


def _reason(error):
    """The first line of a library's message, which often has twenty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


# --- The noise schedule -----------------------------------------------------------------------------------------------


@dataclass
class NoiseSchedule:
    """How much noise there is at each timestep, kept in fp32 whatever the model's precision is.

    alphas_cumprod [T]: the share of the latents' variance left at each timestep, falling from nearly 1 to nearly 0.
    """

    alphas_cumprod: torch.Tensor
    prediction_type: str = "epsilon"  # what the UNet predicts: 'epsilon' or 'v_prediction'
    timestep_spacing: str | None = None  # None: each sampler's usual one, as in diffusers
    steps_offset: int = 1  # where the file is silent: what diffusers' Stable Diffusion pipeline then sets
    set_alpha_to_one: bool = True

    @property
    def num_train_timesteps(self):
        return len(self.alphas_cumprod)

    def to(self, device):
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device))

    def _signal_and_noise(self, timesteps):
        # fp32: cast to half, 1 - alphas_cumprod itself would be rounded (to 0 in bf16 for the first timesteps)
        alphas_cumprod = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()

    def add_noise(self, latents, noise, timesteps):
        """latents, noise [B, 4, h, w], timesteps [B] -> noisy_latents. DDPM (Ho et al. 2020), equation 4."""
        signal, sigma = self._signal_and_noise(timesteps)
        return (signal * latents + sigma * noise).to(latents.dtype)

    def target(self, latents, noise, timesteps):
        """What the UNet should say [B, 4, h, w]: the noise, or v (Salimans and Ho 2022, appendix D)."""
        if self.prediction_type == "epsilon":
            return noise
        signal, sigma = self._signal_and_noise(timesteps)
        return (signal * noise - sigma * latents).to(latents.dtype)

    def snr(self, timesteps):
        """Signal-to-noise ratio [B] at timesteps [B]."""
        return self.alphas_cumprod[timesteps] / (1 - self.alphas_cumprod[timesteps])


def load_schedule(model, revision=None):
    """NoiseSchedule of the checkpoint's scheduler_config.json. UserError for what is not written out here."""
    config = read_json(_fetch("--model", model, "scheduler/scheduler_config.json", revision))
    kind, start, end = config.get("beta_schedule"), config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    timesteps = config.get("num_train_timesteps", 1000)
    if config.get("trained_betas") is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float32)
    elif kind == "linear":
        betas = torch.linspace(start, end, timesteps)
    elif kind == "scaled_linear":  # latent diffusion's own
        betas = torch.linspace(start**0.5, end**0.5, timesteps) ** 2
    elif kind == "squaredcos_cap_v2":  # Nichol and Dhariwal 2021, equation 17
        cosine = [math.cos((t / timesteps + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(timesteps + 1)]
        betas = torch.tensor([min(1 - after / before, 0.999) for before, after in pairwise(cosine)])
    else:
        raise UserError(f"--model {model}: its noise schedule {kind!r} is not supported; take another checkpoint.")
    alphas_cumprod = (1 - betas).cumprod(0)
    if config.get("rescale_betas_zero_snr"):  # Lin et al. 2023, algorithm 1: the last timestep is pure noise
        root = alphas_cumprod.sqrt()
        alphas_cumprod = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "v_prediction"):
        raise UserError(f"--model {model} predicts {prediction_type!r}; only epsilon and v_prediction are supported.")
    given = {name: config[name] for name in ("timestep_spacing", "steps_offset", "set_alpha_to_one") if name in config}
    return NoiseSchedule(alphas_cumprod, prediction_type, **given)


# --- The new word and the masked lookup -------------------------------------------------------------------------------


def add_placeholder(tokenizer, placeholder, num_vectors=1, option="--placeholder_token"):
    """Add a word to the tokenizer -> its token_ids, one for each vector (named word, word_1, word_2, ...).

    UserError if the word is empty, has spaces or is one already: add_tokens' own count proves nothing, for an existing
    word it answers 1 as well, and training would overwrite that word.
    """
    remedy = f"{option} {placeholder!r}: choose a name such as '<my-cat>'; this one"
    if not placeholder or not placeholder.isprintable() or any(character.isspace() for character in placeholder):
        raise UserError(f"{remedy} is empty or has spaces or invisible characters.")
    if not 1 <= num_vectors <= MAX_VECTORS:
        raise UserError(f"--num_vectors {num_vectors}: must be between 1 and {MAX_VECTORS}, what a sentence can hold.")
    names = [placeholder] + [f"{placeholder}_{i}" for i in range(1, num_vectors)]
    vocabulary = tokenizer.get_vocab()
    pieces = tokenizer(placeholder, add_special_tokens=False, verbose=False).input_ids
    known = {placeholder.lower(), placeholder.lower() + "</w>"} & tokenizer.backend_tokenizer.get_vocab(False).keys()
    if known or len(pieces) == 1 or not vocabulary.keys().isdisjoint(names):
        raise UserError(f"{remedy} is already a word of the model.")

    # normalized=False: found as it is written, before lower-casing. single_word: 'sks' is not found inside 'asks'.
    single_word = bool(re.match(r"\w", placeholder) or re.match(r"\w", placeholder[-1]))
    tokenizer.add_tokens([transformers.AddedToken(n, normalized=False, single_word=single_word) for n in names])
    token_ids = tokenizer.convert_tokens_to_ids(names)
    if len(set(token_ids)) < num_vectors or not set(token_ids).isdisjoint(vocabulary.values()):
        raise UserError(f"{remedy} cannot be added to this model's tokenizer.")
    return token_ids


def initializer_id(tokenizer, text, option="--initializer_token"):
    """The id of the one token that `text` is. UserError with its pieces if it is several, none or unknown."""
    token_ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    pieces = [tokenizer.convert_ids_to_tokens(i).removesuffix("</w>") for i in token_ids]
    words = [piece for piece in pieces if len(piece) > 2 and piece.isalpha()]
    hint = " or ".join(f"{option} {word}" for word in dict.fromkeys(words)) or f"{option} cat"
    if len(token_ids) != 1:
        raise UserError(f"{option} {text!r} is {len(token_ids)} tokens {pieces}, not one; a start can be: {hint}.")
    if token_ids[0] in tokenizer.all_special_ids or token_ids[0] in tokenizer.added_tokens_decoder:
        raise UserError(f"{option} {text!r} is no word that the model knows; choose a common one: {option} cat.")
    return token_ids[0]


def tokenize(tokenizer, prompts, placeholders=None):
    """Sentences [B] -> token_ids [B, L], L the tokenizer's model_max_length, padded.

    placeholders: {word: its token_ids from add_placeholder}; a word stands for all its vectors, one after the other.
    What does not fit is cut off and said on stderr; UserError if a placeholder would be cut.
    """
    vectors_of = {token_ids[0]: list(token_ids) for token_ids in (placeholders or {}).values()}
    all_vectors = {i for token_ids in vectors_of.values() for i in token_ids}
    length = tokenizer.model_max_length
    rows = []
    for prompt in prompts:
        ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        body, position = [], 0
        while position < len(ids):  # ids, not text, are expanded: no word can be mistaken for the start of another
            vectors = vectors_of.get(ids[position], [ids[position]])
            body += vectors
            spelled_out = ids[position : position + len(vectors)] == vectors  # '<cat> <cat>_1', as diffusers writes it
            position += len(vectors) if spelled_out else 1
        if cut := body[length - 2 :]:
            text = tokenizer.decode(cut)
            if all_vectors & set(cut):
                raise UserError(f"the prompt {prompt!r} is too long: {text!r}, with a learned word, would be cut off.")
            print(f"note: a prompt can have {length - 2} tokens; cut off: {text!r}", file=sys.stderr)
        row = [tokenizer.bos_token_id, *body[: length - 2], tokenizer.eos_token_id]
        rows.append(row + [tokenizer.pad_token_id] * (length - len(row)))
    return torch.tensor(rows)  # [B, L]


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
        row_of_id[list(token_ids)] = torch.arange(len(token_ids))
        self.register_buffer("row_of_id", row_of_id.to(table.device), persistent=False)
        self.learned_rows = nn.Parameter(init_rows.detach().to(table.device, torch.float32, copy=True))  # [n, dim]

    def forward(self, token_ids):  # [B, L]
        row = self.row_of_id[token_ids]
        is_new = (row >= 0).unsqueeze(-1)  # [B, L, 1]
        learned_rows = self.learned_rows[row.clamp(min=0)].to(self.weight.dtype)
        frozen_rows = F.embedding(token_ids.clamp(max=len(self.weight) - 1), self.weight)
        return torch.where(is_new, learned_rows, frozen_rows)  # [B, L, dim]


def install_learned_rows(text_encoder, token_ids, init_rows):
    """Replace the encoder's token table -> LearnedEmbedding. All words at once: token_ids (n), init_rows [n, dim]."""
    embedding = LearnedEmbedding(text_encoder.get_input_embeddings().weight, token_ids, init_rows)
    text_encoder.set_input_embeddings(embedding)
    return embedding


@torch.no_grad()
def nearest_words(tokenizer, table, rows, count=3):
    """The `count` words of the token table [V, dim] with the largest cosine to each of rows [n, dim] -> n lists."""
    table = table[: len(tokenizer)]  # some tables are longer
    cosines = F.normalize(rows.float(), dim=1) @ F.normalize(table.float(), dim=1).T  # [n, V]
    nearest = cosines.topk(min(count, len(table)), dim=1).indices.tolist()
    return [[word.removesuffix("</w>") for word in tokenizer.convert_ids_to_tokens(ids)] for ids in nearest]


# --- Sentences and pictures to tensors, and back ----------------------------------------------------------------------


def encode_tokens(text_encoder, token_ids):
    """token_ids [B, L] -> text_embeddings [B, L, dim], the last layer after its layer norm."""
    return text_encoder(token_ids.to(text_encoder.device)).last_hidden_state


@torch.no_grad()
def encode_images(vae, images, batch=4):
    """images [N, 3, H, W] in [-1, 1] -> mean, std [N, 4, h, w] of their latents, fp32, unscaled, where images are.

    A fresh sample is (mean + std * noise - shift_factor or 0) * scaling_factor, as the UNet knows it.
    """
    chunks = [vae.encode(chunk.to(vae.device, vae.dtype)).latent_dist for chunk in images.split(batch)]
    mean = torch.cat([chunk.mean for chunk in chunks])
    std = torch.cat([chunk.std for chunk in chunks])
    return mean.to(images.device, torch.float32), std.to(images.device, torch.float32)


@torch.no_grad()
def decode_latents(vae, latents):
    """latents [B, 4, h, w] (scaled) -> images [B, 3, H, W] fp32, about [-1, 1]. UserError if they are not finite.

    As many at a time as have the pixels of one picture of 512 x 512: more would be the most memory of a whole run.
    """
    unscaled = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)
    batch = max(1, 64 * 64 // unscaled[0, 0].numel())
    images = torch.cat([vae.decode(chunk.to(vae.device, vae.dtype)).sample.float() for chunk in unscaled.split(batch)])
    if not images.isfinite().all():  # would be saved as black pictures
        raise UserError("--precision: the drawing is not finite; use --precision fp32.")
    return images


def to_pil(images):
    """images [B, 3, H, W] in [-1, 1] -> list of B PIL pictures."""
    pixels = ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(array) for array in pixels.permute(0, 2, 3, 1).cpu().numpy()]


# --- Embedding files --------------------------------------------------------------------------------------------------


class Embedding(NamedTuple):
    """A learned word: its name, its rows [n, dim] in fp32, and what the file says of itself."""

    token: str
    rows: torch.Tensor
    metadata: dict


def atomic_write(path, write):
    """Let `write(buffer)` fill a BytesIO and move that to `path`: the old file or the new one, never a half."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")  # same folder: a move between disks would be a copy
    buffer = io.BytesIO()
    write(buffer)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        why = error.strerror or error
        raise UserError(f"cannot write {path} ({why}): make room there or choose another --output_dir.") from error


def save_embedding(path, placeholder, rows, base_model, metadata=None, bin=False):
    """Write rows [n, dim] as diffusers' one-key file, fp32; bin=True: the pickle of 2022, 1-D for a single vector."""
    rows = rows.detach().float().cpu().contiguous()
    if bin:
        content = {placeholder: (rows[0] if len(rows) == 1 else rows).clone()}
        return atomic_write(path, lambda buffer: torch.save(content, buffer))
    # Written by hand (8 bytes of length, a JSON header, the numbers), for the library shuffles the metadata: here the
    # same embedding is the same file, byte for byte.
    notes = {"format": "pt", "base_model": str(base_model)} | {k: str(v) for k, v in (metadata or {}).items()}
    numbers = rows.numpy().astype("<f4").tobytes()
    tensor = {"dtype": "F32", "shape": list(rows.shape), "data_offsets": [0, len(numbers)]}
    header = json.dumps({"__metadata__": notes, placeholder: tensor}, ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    atomic_write(path, lambda buffer: buffer.write(len(header).to_bytes(8, "little") + header + numbers))


def load_embedding(source, token=None, dim=None):
    """Read any embedding file there is -> Embedding. `source`: a file, a folder that holds one, or a Hub id.

    Known: diffusers and concept library (one key), A1111 and the paper's code (string_to_param), kohya, InvokeAI and
    OneTrainer (emb_params, emp_params), SDXL pairs (clip_l is taken), a bare tensor. Nothing in a file can run code.
    token gives or changes the name; dim is the width that the model wants. UserError says what is wrong.
    """
    path = _find_embedding_file(source)
    content, metadata = _read_tensors(path)
    name, rows = _name_and_rows(content, path)
    token = token or name
    if not isinstance(token, str) or token == "*":
        raise UserError(f"--embedding {path} does not say its word; give it one: --token '<{path.stem}>'.")
    shape, is_plain = list(rows.shape), rows.layout == torch.strided and rows.device.type == "cpu"
    if not is_plain or not rows.is_floating_point() or len(shape) not in (1, 2) or 0 in shape:
        raise UserError(f"--embedding {path} holds {rows.dtype} {shape}, not rows of floating-point numbers.")
    if len(shape) == 2 and shape[0] > MAX_VECTORS:
        raise UserError(f"--embedding {path} holds {shape[0]} vectors; a sentence has room for {MAX_VECTORS}.")
    if rows.numel() * rows.element_size() > rows.untyped_storage().nbytes():
        raise UserError(f"--embedding {path} claims {shape} numbers, and holds fewer: nothing in it was used.")
    if dim is not None and shape[-1] != dim:
        theirs, ours = (f"{width} ({FAMILIES.get(width, 'no common model')})" for width in (shape[-1], dim))
        raise UserError(f"--embedding {path} has rows of width {theirs}, the model wants {ours}; use another --model.")
    rows = rows.detach().to(torch.float32, copy=True).reshape(-1, shape[-1])  # [n, dim]
    if not rows.isfinite().all():
        raise UserError(f"--embedding {path} holds NaN or infinite numbers: its training failed; take another file.")
    return Embedding(token, rows, metadata)


def _find_embedding_file(source):
    _refuse_missing("--embedding", source)
    if Path(source).is_file():
        return Path(source)
    if not Path(source).is_dir():
        with suppress(UserError):
            return _fetch("--embedding", source, "learned_embeds.safetensors")
        return _fetch("--embedding", source, "learned_embeds.bin")
    for pattern in ("learned_embeds.safetensors", "learned_embeds.bin", "*.safetensors", "*.bin", "*.pt"):
        if len(found := list(Path(source).glob(pattern))) == 1:
            return found[0]
    raise UserError(f"--embedding {source}: the folder holds no learned_embeds.safetensors; name the file itself.")


def _read_tensors(path):
    """-> what the file holds (dict or tensor), what it says of itself. The first bytes, not the name, tell its kind."""
    try:
        size = path.stat().st_size
        data = path.read_bytes() if size <= MAX_FILE_BYTES else b""
    except OSError as error:
        raise UserError(f"--embedding {path} cannot be read ({error.strerror}).") from error
    unpacked, start = size, data[:512].lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"--embedding {path} is a git-lfs pointer, not the file itself: run 'git lfs pull' there.")
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(f"--embedding {path} is a web page (HTML), not an embedding; use the page's download link.")
    try:
        if data.startswith(b"PK"):
            unpacked = sum(entry.file_size for entry in zipfile.ZipFile(io.BytesIO(data)).infolist())
        if unpacked > MAX_FILE_BYTES:
            raise UserError(f"--embedding {path} has {unpacked >> 20} MB; an embedding has a few KB. A checkpoint?")
        if data[8:9] == b"{":  # safetensors: 8 bytes of length, a JSON header, the numbers
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            return safetensors.torch.load(data), header.get("__metadata__") or {}
        if data.startswith((b"PK", b"\x80")):
            # weights_only: a pickle may otherwise run any program. ParameterDict: a mere container in the paper's files
            with torch.serialization.safe_globals([nn.ParameterDict]):
                content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            notes = content if isinstance(content, dict) else {}
            return content, {key: str(note) for key, note in notes.items() if isinstance(note, (str, int))}
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--embedding {path} is damaged or holds more than numbers; nothing in it was run.") from error
    raise UserError(f"--embedding {path} is no embedding file; it has {size} bytes and begins with {data[:8]!r}.")


def _name_and_rows(content, path):
    """What a file holds -> its word ('*' if it does not say), its rows."""
    if isinstance(content, torch.Tensor):
        return "*", content
    name = None
    if isinstance(content, dict) and "string_to_param" in content:  # A1111; the paper's code has no name
        name, params = content.get("name"), content["string_to_param"]
        content = getattr(params, "_parameters", params)  # of a ParameterDict
    content = content if isinstance(content, dict) else {}
    for key in ("clip_l", "emb_params", "emp_params"):
        if key in content:
            if "clip_g" in content:
                print(f"note: {path} is for SDXL; taken: clip_l, the half for Stable Diffusion 1", file=sys.stderr)
            content = {"*": content[key]}
    if len(content) != 1 or not isinstance(next(iter(content.values())), torch.Tensor):
        raise UserError(f"--embedding {path} is no embedding of one word; it holds {list(content)[:6]}.")
    ((key, rows),) = content.items()
    return name or ("*" if key == "clip_g" else key), rows
