"""The frozen model and the few numbers that are learned: everything `train.py` and `sample.py` share.

From top to bottom: errors and the command line; device, precision and processes; settings; loading CLIP, VAE and UNet;
the noise schedule; the new token and the masked lookup, the heart of the method; prompts and images to tensors and
back; files and embeddings; a model with its learned tokens.
"""

import argparse
import base64
import difflib
import gc
import hashlib
import io
import json
import logging
import math
import os
import re
import shlex
import signal
import sys
import warnings
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import diffusers
import huggingface_hub
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import nn

DEFAULT_MODEL = str(Path(__file__).with_name("mini_sd"))

PRECISIONS = ("auto", "no", "fp32", "fp16", "bf16")
FAMILIES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "SDXL"}  # by embedding width
EMBEDDING_SUFFIXES = (".safetensors", ".pt", ".bin")
MAX_VECTORS = 75  # CLIP reads 77 tokens, two of which mark start and end
MAX_FILE_BYTES = 64 * 2**20  # an embedding is a few KB; whole checkpoints begin at hundreds of MB


# --- Errors and the command line --------------------------------------------------------------------------------------


class UserError(Exception):
    """A mistake that the user can correct: one sentence that names the option and the remedy."""


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help that shows defaults, but not that of a flag or where the text tells it."""

    def _get_help_string(self, action):
        plain = action.default in (None, False) or "default" in action.help
        return action.help if plain else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Parser whose errors are UserErrors and whose help shows defaults."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=Help, allow_abbrev=False)

    def error(self, message):
        raise UserError(message)

    def parse_args(self, argv):
        """Like argparse, with one line for an unknown option. UnicodeEncodeError if a name is not UTF-8."""
        for word in [*argv, os.getcwd()]:
            word.encode()
        args, unknown = self.parse_known_args(argv)
        if unknown:
            name = unknown[0].split("=")[0]
            near = difflib.get_close_matches(name, self._option_string_actions, 1)
            self.error(f"unknown option {name}" + (f"; did you mean {near[0]}?" if near else "; see --help."))
        return args


def path(text):
    """Type of an argparse option that names a file or folder."""
    if not text:
        raise argparse.ArgumentTypeError("is empty: give a value, or leave the option out")
    return os.path.expanduser(text)  # a shell leaves --images=~/cat as it is


def number(kind, low, high=math.inf):
    """Type of an argparse option: an int or float from low to high."""

    def convert(text):
        value = kind(text)  # argparse reports its ValueError
        if not low <= value <= high:  # NaN is not
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, not {text}")
        return value

    convert.__name__ = kind.__name__
    return convert


def run_main(script, argv, memory_advice):
    """Call script(argv). What the user can correct ends in one sentence and exit code 2, Ctrl-C in 130."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="replace")  # a console without the letters of a token shows '?'
    try:
        script(sys.argv[1:] if argv is None else argv)
    except (UserError, OSError, UnicodeEncodeError, RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            error = f"out of memory: {memory_advice}."
        elif isinstance(error, OSError):  # no permission, a name that is too long, a full disk
            where = "input or output failed" if error.filename is None else error.filename
            error = f"{where}: {error.strerror or reason(error)}; check the path, its permissions and the disk."
        elif isinstance(error, UnicodeEncodeError):
            error = f"{error.object[:200]!r} is not UTF-8: rename the file or folder, or retype the option."
        elif type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            error = f"--compile: PyTorch cannot compile on this machine ({reason(error)}); leave it out."
        elif not isinstance(error, UserError):
            raise
        print(f"error: {printable(error)[:2000]}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def is_out_of_memory(error):
    """Whether an exception says that memory has run out, on any device."""
    is_known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return is_known or bool(re.search("(out of|allocate) memory", str(error), re.IGNORECASE))


@contextmanager
def catch_ctrl_c():
    """Yield a list that is empty until the first Ctrl-C, to be checked once per step; the second ends the program."""
    pressed = []

    def press(*_):
        pressed.append(True)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    previous = signal.getsignal(signal.SIGINT)
    with suppress(ValueError):  # only the main thread gets signals
        signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        with suppress(ValueError):
            signal.signal(signal.SIGINT, previous)


def printable(text):
    """The text with '?' for unprintable characters, so that a stranger's file cannot send terminal escapes."""
    return "".join(character if character.isprintable() else "?" for character in str(text))


def quote(text):
    """A word of a command line as bash, cmd.exe and PowerShell read it; nothing in it is executed."""
    for_sh = shlex.quote(text)
    return for_sh if for_sh == text or re.search(r'["$`\\!]', text) else f'"{text}"'


def reason(error):
    """The first line of a library's message, which often has twenty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


# --- Device, precision, processes -------------------------------------------------------------------------------------


def choose_device(name):
    """'auto', 'cpu', 'cuda' or 'mps' -> torch.device. UserError if this machine has no such device."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device in available if available[device])
    if not available[name]:
        raise UserError(f"--device {name}: PyTorch finds no such device here; use --device auto or --device cpu.")
    return torch.device(name)


def choose_dtype(precision, device):
    """'auto', 'no', 'fp32', 'fp16' or 'bf16' -> torch.dtype of the frozen weights (learned rows are always fp32)."""
    if precision == "auto":
        precision = "fp32"
        if device.type == "cuda":
            precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu":
        if precision == "fp16":
            raise UserError("--precision fp16 needs a GPU; on the CPU use --precision fp32 or bf16.")
        bf16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if precision == "bf16" and not bf16:  # PyTorch would emulate it, many times slower
            raise UserError("--precision bf16: this CPU cannot multiply in bf16; use --precision fp32.")
    return {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def to_device(tensor, device):
    """Copy a CPU tensor to the device, without waiting on CUDA (on MPS such copies can be garbled)."""
    on_cuda = device.type == "cuda"
    return (tensor.pin_memory() if on_cuda else tensor).to(device, non_blocking=on_cuda)


def join_processes(device):
    """Under torchrun, join the other processes of the run -> rank, number of processes; without it 0, 1."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if dist.get_rank() > 0:  # only rank 0 prints
        sys.stdout = open(os.devnull, "w")
    return dist.get_rank(), dist.get_world_size()


def sum_over_processes(tensor):
    """Add up a tensor over all processes, in place. UserError if one of them has ended."""
    if dist.is_initialized():
        try:
            dist.all_reduce(tensor)
        except RuntimeError as error:
            raise UserError(f"another process has ended ({reason(error)}): continue with --resume.") from error
    return tensor


# --- Settings ---------------------------------------------------------------------------------------------------------


def read_json(path):
    """The object in a JSON file; {} if there is no such file. UserError if it is damaged."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).is_file() else {}
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({reason(error)}): correct or remove it.") from error
    return content


class Settings:
    """The entries of a JSON file in a model's folder, checked as they are read."""

    def __init__(self, path, entries=None):
        self.path, self.entries = path, read_json(path) if entries is None else entries

    def get(self, name, default, kind, low=None, high=None):
        """The entry `name`, or the default if there is none. kind: its type, or a list of choices.

        UserError that names file and entry if it is of another type, no choice, or a number outside [low, high].
        """
        value = self.entries.get(name, default)
        if isinstance(kind, list):
            valid, wanted = value in kind, " or ".join(map(str, kind))
        elif kind in (int, float):
            is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
            valid, wanted = is_number and low <= value <= high, f"{kind.__name__} from {low:g} to {high:g}"
        else:
            valid, wanted = isinstance(value, kind), kind.__name__
        if not valid:
            raise UserError(f"{self.path}: '{name}' is {value!r:.80}, not {wanted}; correct it or take another model.")
        return value


def sampling_defaults(model):
    """{'steps': ..., 'guidance': ...} as a model's folder advises in model_index.json; {} where it does not."""
    path = Path(model, "model_index.json")
    advice = Settings(path, Settings(path).get("_sampling", {}, dict))
    limits = {"steps": (int, 1, 1000), "guidance": (float, 0, 1000)}
    return {name: advice.get(name, None, *limit) for name, limit in limits.items() if name in advice.entries}


def read_unet_config(model, revision=None):
    """The UNet's settings, read before the UNet itself."""
    return read_json(_fetch("--model", model, "unet/config.json", revision))


def read_config(folder):
    """The options that the run in a folder began with; {} where there is none. UserError if they are damaged."""
    settings = Settings(Path(folder, "config.json"))
    if "placeholder_token" not in settings.entries:  # another program's
        return {}
    for name in ("placeholder_token", "initializer_token", "images", "model"):
        settings.get(name, "", str)
    settings.get("resolution", 512, int, 1, 8192)
    settings.get("learnable_property", "object", ["object", "style"])
    return settings.entries | {"model": model_of_name(settings.entries.get("model", ""))}


def name_of_model(model):
    """How runs store a model, to find it from any folder: 'mini_sd' for the bundled one, a full path or a Hub id."""
    if Path(model).resolve() == Path(DEFAULT_MODEL).resolve():  # its folder moves with the project
        return Path(DEFAULT_MODEL).name
    return str(Path(model).resolve()) if Path(model).exists() else str(model)


def refuse_download(model, revision=None, variant=None):
    """UserError if a model that a file names, and not the user, is not on this machine."""
    if Path(model).exists():
        return
    file = f"diffusion_pytorch_model.{variant}.safetensors" if variant else "config.json"
    with suppress(Exception):  # no Hub id
        if isinstance(huggingface_hub.try_to_load_from_cache(str(model), f"unet/{file}", revision=revision), str):
            return
    raise UserError(f"the token was learned on {model!r}, not found here (was it moved?): name it with --model.")


def model_of_name(name):
    """The folder or Hub id that `name_of_model` gave this name."""
    return DEFAULT_MODEL if name == Path(DEFAULT_MODEL).name else name


# --- Loading the frozen model -----------------------------------------------------------------------------------------


def load_tokenizer(model, revision=None):
    """CLIPTokenizer of a diffusers-layout folder or Hub id. UserError if it is not the text encoder's."""
    config = Settings(_fetch("--model", model, "text_encoder/config.json", revision))
    with _loading(model, "tokenizer", revision) as options:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(str(model), **options)
        if len(tokenizer) < 4:  # from an empty folder transformers makes one of the special tokens alone
            raise ValueError("no vocabulary")
        if None in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
            raise ValueError("it lacks a token for start, end or padding")
        if max(tokenizer.get_vocab().values()) >= config.get("vocab_size", len(tokenizer), int, 1, 10**9):
            raise ValueError("it has tokens without a row in the text encoder's table")
    tokenizer.model_max_length = config.get("max_position_embeddings", 77, int, 3, 10_000)  # not what its own file says
    return tokenizer


def load_text_encoder(model, device, dtype=torch.float32, revision=None, variant=None):
    """CLIPTextModel, frozen, of a folder or Hub id. variant: 'fp16' reads the files named *.fp16.*"""
    return _load_frozen(transformers.CLIPTextModel, "text_encoder", model, device, dtype, revision, variant)


def load_vae(model, device, dtype=torch.float32, revision=None, variant=None):
    """AutoencoderKL, frozen."""
    vae = _load_frozen(diffusers.AutoencoderKL, "vae", model, device, dtype, revision, variant)
    settings = Settings(Path(model, "vae/config.json"), vae.config)
    settings.get("scaling_factor", None, float, 1e-6, 1e6)
    settings.get("shift_factor", None, [None, 0])  # of later models
    return vae


def load_unet(model, device, dtype=torch.float32, revision=None, variant=None):
    """UNet2DConditionModel, frozen. UserError if it needs more than latents and one text encoder (SDXL, inpainting)."""
    unet = _load_frozen(diffusers.UNet2DConditionModel, "unet", model, device, dtype, revision, variant)
    extra_inputs = unet.config.addition_embed_type or unet.config.class_embed_type
    if unet.config.in_channels != unet.config.out_channels or extra_inputs:
        raise UserError(f"--model {model} is no plain text-to-image model; take a Stable Diffusion 1 or 2 checkpoint.")
    # channels_last: the same numbers in another order, with which convolutions are faster
    return unet if unet.device.type == "mps" else unet.to(memory_format=torch.channels_last)


def _load_frozen(part_class, part, model, device, dtype, revision, variant):
    names = [path.name for path in Path(model, part).glob("*") if path.suffix in (".safetensors", ".bin")]
    variants = {re.split("[.-]", name)[1] if name.count(".") > 1 else None for name in names}  # model.fp16.safetensors
    variant = variant if variant or None in variants else min(variants, default=None)  # the files that there are
    with _loading(model, part, revision) as options:
        read_json(_fetch("--model", model, f"{part}/config.json", revision))  # an error names it
        # dtype is always given: by default transformers takes the file's, and rows in half precision do not learn.
        # low_cpu_mem_usage=True would need accelerate
        options |= {"dtype": dtype, "variant": variant, "low_cpu_mem_usage": False, "output_loading_info": True}
        module, info = part_class.from_pretrained(str(model), **options)
        if info["missing_keys"]:  # from_pretrained would go on with random numbers
            raise ValueError(f"it lacks weights, {min(info['missing_keys'])} for one")
    del info
    gc.collect()  # a reference cycle keeps the memory-mapped file: gigabytes
    return module.requires_grad_(False).eval().to(device)


@contextmanager
def _loading(model, part, revision):
    """Yield options of from_pretrained. What fails inside becomes a UserError that names the part."""
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity(logging.CRITICAL)  # errors are raised; the log messages add nothing
        library.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()  # downloading gigabytes in silence would look like a hang
    if Path(model).exists():
        _fetch("--model", model, part)
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        with warnings.catch_warnings(action="ignore"):  # deprecations inside the libraries are not the user's concern
            yield {"subfolder": part, "revision": revision, "local_files_only": offline}
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, UserError):
            raise
        why = f"its part '{part}' cannot be loaded ({reason(error)}); is it there and whole?"
        raise UserError(f"--model {model}: {why}") from error


def _fetch(option, name, filename, revision=None):
    """Path of a file (or folder) in a local folder, or of a file of a Hub repository, which is downloaded."""
    path = Path(name, filename)
    if path.is_file() or path.is_dir():  # no fifo, which would be read for ever
        return path
    if Path(name).exists():
        raise UserError(f"{option} {name}: {_other_layout(Path(name), filename)}")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name)):
        raise UserError(f"{option} {name}: no such file or folder (was it moved?), and no Hub id such as 'owner/name'.")
    try:
        return Path(huggingface_hub.hf_hub_download(str(name), filename, revision=revision))
    except Exception as error:
        missing = f"no such folder here, and '{filename}' does not come from the Hub ({reason(error)})."
        raise UserError(f"{option} {name}: {missing}") from error


def _other_layout(path, filename):
    """What a file or a folder without the file `filename` is, and how it becomes a model in diffusers layout."""
    for folder in [*path.glob("snapshots/*"), *path.glob("*")]:  # the Hub's cache keeps a model in snapshots/
        if (folder / filename).exists():
            return f"the model is in the folder {folder}; name that one."
    is_model = (path / "model_index.json").exists()  # it may hold single files as well
    for file in [] if is_model else [path, *path.glob("*.ckpt"), *path.glob("*.safetensors")]:
        if file.suffix in (".ckpt", ".safetensors", ".yaml"):  # a .yaml describes the .ckpt beside it
            weights = file.with_suffix(".ckpt") if file.suffix == ".yaml" else file
            new = weights.with_suffix("").as_posix() + "-diffusers"
            convert = f"from_single_file({weights.as_posix()!r}).save_pretrained({new!r})"
            line = f"python -c {quote(f'import diffusers; diffusers.StableDiffusionPipeline.{convert}')}"
            return f"one file, not a model in diffusers layout; convert it: {line} and give --model {quote(new)}"
    return f"'{filename}' is missing; a model in diffusers layout is needed."


def check_parts(model, text_encoder, unet, latent_channels):
    """UserError if a text encoder, UNet and VAE of different models are together."""
    widths = unet.config.cross_attention_dim
    widths = set(widths) if isinstance(widths, (list, tuple)) else {widths}
    if widths != {text_encoder.config.hidden_size} or unet.config.in_channels != latent_channels:
        raise UserError(f"--model {model}: its parts do not fit: they are of different models; take another.")


def fingerprint(text_encoder, unet):
    """Hash of some of a model's weights, to recognize it wherever it lies."""
    digest = hashlib.sha256()
    for weight in [text_encoder.get_input_embeddings().weight, *unet.parameters()]:
        digest.update(weight[::50].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def vae_factor(vae):
    """Pixels per latent, along one side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def native_size(unet_config, vae):
    """(height, width) in pixels of the images a model was trained on: its UNet's `sample_size`, else its VAE's."""
    size, unit, part = unet_config.get("sample_size"), vae_factor(vae), "unet"
    if size is None:
        size, unit, part = vae.config.sample_size, 1, "vae"
    height, width = size if isinstance(size, (list, tuple)) and len(size) == 2 else (size, size)
    if not all(type(side) is int and 0 < side <= 10_000 for side in (height, width)):
        raise UserError(f"{part}/config.json: 'sample_size' is {size!r}, not one or two numbers up to 10000.")
    return height * unit, width * unit


# --- The noise schedule -----------------------------------------------------------------------------------------------


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

    def to(self, device):
        return self._replace(alphas_cumprod=self.alphas_cumprod.to(device))

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

    def snr(self, timesteps):
        """Signal-to-noise ratio [B] at timesteps [B]."""
        return self.alphas_cumprod[timesteps] / (1 - self.alphas_cumprod[timesteps])


# Entries of scheduler_config.json that change diffusers' sampling, with the values written out here: the default,
# then others that come to the same
SAMPLER_SETTINGS = {
    **dict.fromkeys(["thresholding", "use_karras_sigmas", "use_exponential_sigmas"], [False, None]),
    **dict.fromkeys(["use_beta_sigmas", "use_flow_sigmas", "use_lu_lambdas"], [False, None]),
    "algorithm_type": ["dpmsolver++", "deis"],
    "solver_type": ["midpoint", "logrho", "bh1", "bh2"],
    "solver_order": [2],
    "final_sigmas_type": ["zero"],
    "lambda_min_clipped": [-math.inf],
    "variance_type": ["fixed_small", None],
}


def load_schedule(model, revision=None):
    """NoiseSchedule of the checkpoint's scheduler_config.json. UserError if its noise is not written out here.

    Settings that only change diffusers' sampling are noted on stderr.
    """
    settings = Settings(_fetch("--model", model, "scheduler/scheduler_config.json", revision))
    odd = [name for name, values in SAMPLER_SETTINGS.items() if settings.entries.get(name, values[0]) not in values]
    if odd:
        print(f"note: {settings.path}: {', '.join(odd)} ignored: images differ from diffusers'", file=sys.stderr)
    settings.get("trained_betas", None, [None])
    timesteps = settings.get("num_train_timesteps", 1000, int, 2, 10_000)
    start = settings.get("beta_start", 1e-4, float, 1e-6, 0.999)
    end = settings.get("beta_end", 0.02, float, 1e-6, 0.999)
    if settings.get("beta_schedule", None, ["linear", "scaled_linear"]) == "linear":
        betas = torch.linspace(start, end, timesteps)
    else:  # latent diffusion's own
        betas = torch.linspace(start**0.5, end**0.5, timesteps) ** 2
    alphas_cumprod = (1 - betas).cumprod(0)
    if settings.get("rescale_betas_zero_snr", False, bool):  # Lin et al. 2023, algorithm 1: T is pure noise
        root = alphas_cumprod.sqrt()
        alphas_cumprod = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    if alphas_cumprod[-2] < 2**-24:  # samplers divide by the steps of its logarithm
        raise UserError(f"{settings.path}: its betas turn too many timesteps into pure noise; take another checkpoint.")
    prediction_type = settings.get("prediction_type", "epsilon", ["epsilon", "v_prediction"])
    spacing = settings.get("timestep_spacing", None, ["leading", "linspace", "trailing", None])
    return NoiseSchedule(alphas_cumprod, prediction_type, spacing, settings.get("set_alpha_to_one", True, bool))


# --- The new token and the masked lookup ------------------------------------------------------------------------------


def add_placeholder(tokenizer, placeholder, num_vectors=1, option="--placeholder_token", source=None):
    """Add a token to the tokenizer -> its token_ids, one for each vector (named token, token_1, token_2, ...).

    source: the embedding file that gives the token its name, if not the user's option did.
    UserError if it is empty, has spaces or exists already: the count that add_tokens returns proves nothing, for an
    existing token it is 1 as well, and training would overwrite that token's row.
    """
    what = f"--embedding {source}: its token {placeholder!r}" if source else f"{option} {placeholder!r}"
    remedy = f"choose a name such as {option} '<my-cat>'"
    if not placeholder.isprintable() or placeholder.split() != [placeholder]:
        raise UserError(f"{what} is empty or has spaces or invisible characters; {remedy}.")
    names = [placeholder] + [f"{placeholder}_{i}" for i in range(1, num_vectors)]
    vocabulary = tokenizer.get_vocab()
    pieces = tokenizer(placeholder, add_special_tokens=False, verbose=False).input_ids
    if len(pieces) == 1 or not vocabulary.keys().isdisjoint(names):
        raise UserError(f"{what} is already a token of the model; {remedy}.")
    # normalized=False: found as it is written, before lower-casing. single_word: 'sks' is not found inside 'asks'.
    single_word = bool(re.search(r"^\w|\w$", placeholder))
    tokenizer.add_tokens([transformers.AddedToken(n, normalized=False, single_word=single_word) for n in names])
    return tokenizer.convert_tokens_to_ids(names)


def initializer_ids(tokenizer, text):
    """The token ids of an initializer, [] if it names an embedding file. UserError if it holds none or unknown ones."""
    if Path(text).suffix in EMBEDDING_SUFFIXES:
        return []
    token_ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if not token_ids or set(token_ids) & set(tokenizer.all_special_ids):
        raise UserError(f"--initializer_token {text!r} is no word that the model knows; choose one such as cat.")
    return token_ids


def initial_rows(tokenizer, table, text, num_vectors, seed):
    """The rows [num_vectors, dim] that a token starts with, on the CPU: the initializer's tokens' or embedding file's.

    One vector starts as their mean; several take one each, and repeat them with a little noise if there are fewer.
    """
    token_ids = initializer_ids(tokenizer, text)
    if any(i >= len(table) for i in token_ids):
        raise UserError(f"--initializer_token {text!r} holds the new token itself; choose a word such as cat.")
    if token_ids:
        rows = table[token_ids].float().cpu()
    elif Path(text).exists():  # never from the Hub: a stranger's run may name it
        rows = load_embedding(text, "<initializer>", table.shape[1], "--initializer_token").rows
    else:
        raise UserError(f"--initializer_token {text}: no such file (was it moved?); name an embedding file or a word.")
    if num_vectors == 1:
        return rows.mean(dim=0, keepdim=True)
    noise = torch.randn(num_vectors, table.shape[1], generator=torch.Generator().manual_seed(seed)) * rows.std()
    noise[: len(rows)] = 0
    return rows[torch.arange(num_vectors) % len(rows)] + 0.1 * noise


def tokenize(tokenizer, prompts, placeholders=None):
    """Prompts [B] -> token_ids [B, L], L the tokenizer's model_max_length, padded.

    placeholders: {token: its token_ids from add_placeholder}; a token stands for all its vectors, one after the other.
    What does not fit is cut off and reported on stderr; UserError if a placeholder would be cut.
    """
    vectors_of = {token_ids[0]: list(token_ids) for token_ids in (placeholders or {}).values()}
    token_of = {i: token for token, token_ids in (placeholders or {}).items() for i in token_ids}
    length = tokenizer.model_max_length
    rows = []
    for prompt in prompts:
        ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        # ids, not text, are expanded: no token can be mistaken for the start of another
        body = [vector for i in ids for vector in vectors_of.get(i, [i])]
        cut = body[length - 2 :]
        lost = [token_of[i] for i in cut if i in token_of]
        if lost:
            raise UserError(f"the prompt {prompt!r} is too long for {lost[0]!r}: fewer words or --num_vectors fit.")
        if cut:
            print(f"note: a prompt can have {length - 2} tokens; cut off: {tokenizer.decode(cut)!r}", file=sys.stderr)
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
        # F.embedding: the gradient of learned_rows[row] would add up in no fixed order on several threads
        learned_rows = F.embedding(row.clamp(min=0), self.learned_rows).to(self.weight.dtype)
        frozen_rows = F.embedding(token_ids.clamp(max=len(self.weight) - 1), self.weight)
        return torch.where(is_new, learned_rows, frozen_rows)  # [B, L, dim]


def install_learned_rows(text_encoder, token_ids, init_rows):
    """Replace the encoder's token table -> LearnedEmbedding. All tokens at once: token_ids (n), init_rows [n, dim]."""
    embedding = LearnedEmbedding(text_encoder.get_input_embeddings().weight, token_ids, init_rows)
    text_encoder.set_input_embeddings(embedding)
    return embedding


@torch.no_grad()
def nearest_tokens(tokenizer, table, rows, count=3):
    """The `count` tokens of the table [V, dim] with the largest cosine to each of rows [n, dim] -> n lists."""
    table = table[: len(tokenizer)]  # some tables are longer
    cosines = F.normalize(rows.float(), dim=1) @ F.normalize(table.float(), dim=1).T  # [n, V]
    nearest = cosines.topk(min(count, len(table)), dim=1).indices.tolist()
    return [[token.removesuffix("</w>") for token in tokenizer.convert_ids_to_tokens(ids)] for ids in nearest]


# --- Prompts and images to tensors, and back --------------------------------------------------------------------------


def encode_tokens(text_encoder, token_ids):
    """token_ids [B, L] -> text_embeddings [B, L, dim], the last layer after its layer norm."""
    return text_encoder(token_ids.to(text_encoder.device)).last_hidden_state


@torch.no_grad()
def encode_images(vae, images, batch=4):
    """images [N, 3, H, W] in [-1, 1] -> mean, std [N, 4, h, w] of their latents, fp32, scaled, on images' device.

    A fresh sample, as the UNet takes it, is mean + std * noise.
    """
    posteriors = [vae.encode(chunk.to(vae.device, vae.dtype)).latent_dist for chunk in images.split(batch)]
    mean = torch.cat([posterior.mean for posterior in posteriors]).to(images.device, torch.float32)
    std = torch.cat([posterior.std for posterior in posteriors]).to(images.device, torch.float32)
    return mean * vae.config.scaling_factor, std * vae.config.scaling_factor


@torch.no_grad()
def decode_latents(vae, latents):
    """latents [B, 4, h, w] (scaled) -> images [B, 3, H, W] fp32, about [-1, 1]. UserError if they are not finite.

    As many at a time as have the pixels of one image of 512 x 512: more would set the peak memory of a whole run.
    """
    unscaled = latents / vae.config.scaling_factor
    batch = max(1, 64 * 64 // unscaled[0, 0].numel())
    images = torch.cat([vae.decode(chunk.to(vae.device, vae.dtype)).sample.float() for chunk in unscaled.split(batch)])
    if not images.isfinite().all():  # would be saved as black images
        raise UserError("--precision: the generated image is not finite; use --precision fp32.")
    return images


def to_pil(images):
    """images [B, 3, H, W] in [-1, 1] -> list of B PIL images."""
    pixels = ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(array) for array in pixels.permute(0, 2, 3, 1).cpu().numpy()]


# --- Files and embeddings ---------------------------------------------------------------------------------------------


class Embedding(NamedTuple):
    """A learned token: its name, its rows [n, dim] in fp32, and what the file says of itself."""

    token: str
    rows: torch.Tensor
    metadata: dict


def lock_folder(folder):
    """Lock a folder while the returned file is kept (not on Windows). UserError if another process has it."""
    with suppress(ImportError):
        import fcntl

        file = os.fdopen(os.open(Path(folder, ".lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "rb+", 0)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise UserError(f"--output_dir {folder} is in use by another run: name another folder.") from error
        except OSError:  # a file system without locks
            pass
        return file


def atomic_write(path, write):
    """Let `write(buffer)` fill a BytesIO and move that to `path`: the old file or the new one, never a half."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")  # same folder: a move between disks would be a copy
    buffer = io.BytesIO()
    write(buffer)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as file:  # x: never through a link that somebody has put there
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        remedy = "make room there, close what holds it open, or name another folder"
        raise UserError(f"cannot write {path} ({error.strerror or error}): {remedy}.") from error
    finally:  # also after Ctrl-C
        with suppress(OSError):
            temporary.unlink()


def save_embedding(path, token, rows, base_model):
    """Write rows [n, dim] in diffusers' format, {token: fp32 tensor}, 1-D for a single vector as InvokeAI wants it.

    A path that ends in .bin is written as the pickle of 2022, in .pt as A1111's, which InvokeAI reads for any number of
    vectors, any other as safetensors.
    """
    rows = rows.detach().float().cpu()
    content = {token: (rows[0] if len(rows) == 1 else rows).clone()}
    if Path(path).suffix == ".pt":
        content = {"string_to_token": {"*": 265}, "string_to_param": {"*": rows.clone()}, "name": token}
    if Path(path).suffix in (".bin", ".pt"):
        return atomic_write(path, lambda buffer: _save_pickle(content, buffer))
    serialized = safetensors.torch.save(content, metadata={"base_model": str(base_model)})
    atomic_write(path, lambda buffer: buffer.write(serialized))


def _save_pickle(content, buffer):
    """torch.save without the files of newer PyTorch versions inside, because of which A1111 refuses the whole."""
    whole = io.BytesIO()
    torch.save(content, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(buffer, "w") as target:
        for entry in source.infolist():
            if re.fullmatch(r"archive/(data\.pkl|data/\d+|version)", entry.filename):
                target.writestr(zipfile.ZipInfo(entry.filename), source.read(entry))


def load_embedding(source, token=None, dim=None, option="--embedding"):
    """Read any embedding file there is -> Embedding. `source`: a file, a folder that holds one, or a Hub id.

    Known: diffusers and concept library (one key), A1111, also in a PNG, and the paper's code (string_to_param), kohya,
    InvokeAI and OneTrainer (emb_params, emp_params), SDXL pairs (clip_l is taken), a bare tensor. Nothing in a file can
    run code. token gives or changes the name, or chooses one of several; dim is the width that the model wants;
    option is the one that names the source. UserError says what is wrong.
    """
    path = _find_embedding_file(source, option)
    what = f"{option} {path}"
    content, metadata = _read_tensors(path, what)
    name, rows = _name_and_rows(content, what, token)
    token = token or name
    if not isinstance(token, str) or not token.isprintable() or token in ("", "*"):
        raise UserError(f"{what} does not name its token; give it one: --token '<my-cat>'.")
    shape = list(rows.shape)
    # 10_000: the width can be a lie, too (an expanded tensor that claims terabytes)
    too_large = len(shape) not in (1, 2) or rows.numel() > MAX_VECTORS * min(shape[-1], 10_000)
    if too_large or 0 in shape or not rows.is_floating_point():
        raise UserError(f"{what} holds {rows.dtype} {shape}, not 1 to {MAX_VECTORS} rows of floating-point numbers.")
    if dim not in (None, shape[-1]):
        theirs, ours = (f"{width} ({FAMILIES.get(width, 'no common model')})" for width in (shape[-1], dim))
        raise UserError(f"{what} has rows of width {theirs}, the model wants {ours}; use another --model.")
    rows = torch.atleast_2d(rows.detach().float())  # [n, dim]
    if not rows.isfinite().all():
        raise UserError(f"{what} holds NaN or infinite numbers: its training failed; take another file.")
    return Embedding(token, rows, metadata)


def _find_embedding_file(source, option):
    if Path(source).is_file():
        return Path(source)
    for pattern in ("learned_embeds.safetensors", "learned_embeds.bin", "*.safetensors", "*.bin", "*.pt"):
        found = [path for path in Path(source).glob(pattern) if path.is_file()]
        if len(found) == 1:
            return found[0]
    if Path(source).exists():
        raise UserError(f"{option} {source} holds no learned_embeds.safetensors; name the file itself.")
    with suppress(UserError):
        return _fetch(option, source, "learned_embeds.safetensors")
    return _fetch(option, source, "learned_embeds.bin")


def _read_tensors(path, what):
    """-> what the file holds (dict or tensor), its metadata. The first bytes, not the name, tell its kind."""
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise UserError(f"{what} has {size >> 20} MB, an embedding a few KB: a checkpoint or LoRA?")
    data = path.read_bytes()
    start = data[:512].lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{what} is a git-lfs pointer, not the file itself: run 'git lfs pull' there.")
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(f"{what} is a web page (HTML), not an embedding; use the page's download link.")
    try:
        if data[8:9] == b"{":  # safetensors: 8 bytes of length, a JSON header, the numbers
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            return safetensors.torch.load(data), header.get("__metadata__") or {}
        if data.startswith((b"PK", b"\x80")):
            return load_pickle(data), {}
        if data.startswith(b"\x89PNG"):  # A1111's; the text is read without decoding the image
            with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
                text = image.info.get("sd-ti-embedding")
            if text:
                content = json.loads(base64.b64decode(text))
                ((key, numbers),) = content["string_to_param"].items()
                return content | {"string_to_param": {key: torch.tensor(numbers["TORCHTENSOR"])}}, {}
    except Exception as error:
        raise UserError(f"{what} is damaged, or holds more than an embedding; nothing in it was run.") from error
    raise UserError(f"{what} is no embedding file; it has {size} bytes and begins with {data[:8]!r}.")


def same_form(value, like):
    """Whether what a file holds has the names, types and shapes of `like`; tensors finite, numbers in [0, 2**62)."""
    if type(value) is not type(like):
        return False
    if isinstance(like, dict):
        return value.keys() == like.keys() and all(same_form(value[name], like[name]) for name in like)
    if isinstance(like, torch.Tensor):
        kind = (value.shape, value.dtype, value.layout)
        return kind == (like.shape, like.dtype, like.layout) and bool(value.isfinite().all())
    return isinstance(like, str) or 0 <= value < 2**62


def load_pickle(data):
    """torch.load of bytes, which can run no code. ValueError if it unpacks to too much."""
    if data.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            if sum(entry.file_size for entry in file.infolist()) > MAX_FILE_BYTES:
                raise ValueError("it is too large")
    # weights_only: a pickle may otherwise run any program. ParameterDict: the container in the paper's files
    with torch.serialization.safe_globals([nn.ParameterDict]):
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _name_and_rows(content, what, token):
    """What a file holds -> its token ('*' if it names none), its rows. `token` chooses one of several."""
    content = content if isinstance(content, dict) else {"*": content}
    name = None
    if "string_to_param" in content:  # A1111; the paper's code has no name
        name, params = content.get("name"), content["string_to_param"]
        params = getattr(params, "_parameters", params)  # of a ParameterDict
        content = params if isinstance(params, dict) else {}
    if "clip_l" in content and "clip_g" in content:
        print(f"note: {printable(what)} is for SDXL; taken: clip_l, the half for Stable Diffusion 1", file=sys.stderr)
    for key in ("clip_l", "clip_g", "emb_params", "emp_params"):  # they name no token
        if key in content:
            content = {"*": content[key]}
    if token in content:
        content = {token: content[token]}
    if len(content) != 1 or not isinstance(next(iter(content.values())), torch.Tensor):
        if any(re.search("lora[_.]", str(key)) for key in content):
            raise UserError(f"{what} is a LoRA, which changes the model's weights; name an embedding.")
        raise UserError(f"{what} is no embedding of one token; it holds {list(content)[:6]}: choose one with --token.")
    ((key, rows),) = content.items()
    return (name if isinstance(name, str) and name else key), rows


# --- A model with its learned tokens ----------------------------------------------------------------------------------


class Components(NamedTuple):
    """A loaded model. placeholders: {learned token: its token_ids}."""

    tokenizer: transformers.CLIPTokenizer
    text_encoder: transformers.CLIPTextModel
    vae: diffusers.AutoencoderKL | None  # None while a token is learned
    unet: diffusers.UNet2DConditionModel
    schedule: NoiseSchedule
    placeholders: dict


def load_components(model, device="cpu", dtype=torch.float32, revision=None, variant=None, embeddings=()):
    """Components of a model with the tokens of `embeddings`: (file, run folder or Hub id; another name or None), ..."""
    files = {"revision": revision, "variant": variant}
    tokenizer, text_encoder = load_tokenizer(model, revision), load_text_encoder(model, device, dtype, **files)
    dim = text_encoder.get_input_embeddings().weight.shape[1]
    placeholders, rows = {}, []
    for source, name in embeddings:
        token, token_rows, _ = load_embedding(source, name, dim)
        if token in placeholders:
            raise UserError(f"two embeddings are called {token!r}: give each a --token, in their order.")
        placeholders[token] = add_placeholder(tokenizer, token, len(token_rows), "--token", None if name else source)
        rows.append(token_rows)
    if rows:
        install_learned_rows(text_encoder, sum(placeholders.values(), []), torch.cat(rows))
    vae = load_vae(model, device, torch.float32, **files)  # in half precision some VAEs overflow
    unet, schedule = load_unet(model, device, dtype, **files), load_schedule(model, revision)
    check_parts(model, text_encoder, unet, vae.config.latent_channels)
    return Components(tokenizer, text_encoder, vae, unet, schedule, placeholders)
