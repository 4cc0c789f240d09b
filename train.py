"""Textual inversion (Gal et al. 2022, arXiv:2208.01618): teach a frozen Stable Diffusion a new token from a few images.

    python train.py                         # on the bundled model, without a network: two minutes on two CPU cores
    python train.py --model CompVis/stable-diffusion-v1-4 --images my_cat --placeholder_token "<kat>" \\
        --initializer_token cat             # on a real checkpoint

All that is learned is the new token's row (or rows) in the text encoder's token table. Read this file from the top down
to the loop in `train`, then LearnedEmbedding and NoiseSchedule in model_utils.py, and draw_examples in data.py.
"""

import argparse
import hashlib
import itertools
import json
import math
import shlex
import signal
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import data
import model_utils as mu
import sample
from model_utils import UserError

# --- The method -------------------------------------------------------------------------------------------------------


def inversion_loss(unet, latents, noise, timesteps, text_embeddings, schedule):
    """Denoising loss of each image [B]. Edit this to try another loss.

    latents, noise [B, 4, h, w]; timesteps [B]; text_embeddings [B, L, dim], through which the gradient reaches the new
    token. Equation 2 of Gal et al. 2022, the mean squared error of DDPM (Ho et al. 2020, equation 14).
    """
    noisy_latents = schedule.add_noise(latents, noise, timesteps)  # [B, 4, h, w]
    noise_pred = unet(noisy_latents, timesteps, text_embeddings).sample  # [B, 4, h, w]
    target = schedule.target(latents, noise, timesteps)  # the noise itself, or v
    return (noise_pred.float() - target.float()).square().mean(dim=(1, 2, 3))  # [B]


def sample_timesteps(batch_size, num_train_timesteps, generator, sampling):
    """Timesteps [B], stratified: one from each of B equally likely intervals, so that they cover the whole range.

    sampling "uniform": as in the paper. "cubic": favours high noise levels (t = 1 - u^3), where the caption decides
    what the image shows (T2I-Adapter, Mou et al. 2023, arXiv:2302.08453).
    """
    u = (torch.arange(batch_size) + torch.rand(batch_size, generator=generator)) / batch_size  # in [0, 1)
    t = u if sampling == "uniform" else 1 - u**3
    return (t * num_train_timesteps).long().clamp(max=num_train_timesteps - 1)


def learning_rate(step, args):
    """The learning rate of step 0, 1, ... --steps - 1: linear warm-up, then the schedule."""
    peak = args.lr * (args.batch_size * args.grad_accum if args.scale_lr else 1)
    if step < args.lr_warmup_steps:
        return peak * (step + 1) / args.lr_warmup_steps
    done = (step - args.lr_warmup_steps) / max(1, args.steps - args.lr_warmup_steps)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}
    return peak * factor[args.lr_scheduler]


def step_generator(seed, step):
    """All randomness of a step is seeded by (seed, step), so resuming needs no saved RNG state."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1)[0]))


# --- Training ---------------------------------------------------------------------------------------------------------

EVAL_SEED = 2**32  # in place of a step's number, and larger than any: seeds the evaluation batch
MAX_BAD_STEPS = 20  # gradients in a row that are not finite


class Dataset(NamedTuple):
    cache: data.LatentCache  # the images as latents
    template_ids: torch.Tensor  # [T, L], the captions as tokens
    fingerprint: str  # of the images, to recognize them on resume
    examples: list  # the first four as PIL images


class Batch(NamedTuple):
    latents: torch.Tensor  # [B, 4, h, w]
    noise: torch.Tensor  # [B, 4, h, w]
    timesteps: torch.Tensor  # [B]
    token_ids: torch.Tensor  # [B, L]


def load_dataset(args, tokenizer, placeholders, device):
    """Encode images and captions once. The VAE is freed again; --resolution is set to the model's own if not given."""
    templates = data.STYLE_TEMPLATES if args.learnable_property == "style" else data.OBJECT_TEMPLATES
    captions = [template.format(args.placeholder_token) for template in templates]
    template_ids = mu.tokenize(tokenizer, captions, placeholders)
    vae = mu.load_vae(args.model, device, revision=args.revision, variant=args.variant)
    factor = mu.vae_factor(vae)
    args.resolution = args.resolution or min(mu.native_size(mu.read_unet_config(args.model, args.revision), vae))
    if args.resolution % factor:
        raise UserError(f"--resolution {args.resolution}: this model needs a multiple of {factor} pixels.")
    images = data.load_images(args.images, args.resolution)  # [N, 3, R, R]
    fingerprint = hashlib.sha256(images.numpy()).hexdigest()
    return Dataset(data.encode_dataset(vae, images), template_ids, fingerprint, mu.to_pil(images[:4]))


def draw_batch(dataset, batch_size, schedule, step, args):
    """Everything random in a step -> Batch, on the CPU."""
    generator = step_generator(args.seed, step)
    latents, noise, token_ids = data.draw_examples(dataset.cache, dataset.template_ids, batch_size, generator)
    timesteps = sample_timesteps(batch_size, schedule.num_train_timesteps, generator, args.timestep_sampling)
    return Batch(latents, noise, timesteps, token_ids)


def batch_loss(components, batch):
    """The loss [B] of a batch, which is moved to the device here."""
    device, dtype = components.unet.device, components.unet.dtype
    latents, noise, timesteps, token_ids = (mu.to_device(tensor, device) for tensor in batch)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        text_embeddings = mu.encode_tokens(components.text_encoder, token_ids)  # [B, L, dim]
        return inversion_loss(components.unet, latents, noise, timesteps, text_embeddings, components.schedule).float()


@torch.no_grad()
def evaluation_loss(components, batch, batch_size):
    """The mean loss of the evaluation batch: always the same examples, while the loss of the steps is noisy."""
    parts = zip(*(tensor.split(batch_size) for tensor in batch), strict=True)
    return torch.cat([batch_loss(components, Batch(*part)) for part in parts]).mean().item()


def has_converged(eval_losses, window=15, fraction=0.15):
    """True once the evaluation loss has plateaued.

    Either the variance of its last `window` values is below `fraction` of that of all ("Is This Loss Informative?",
    Voronov et al. 2023, arXiv:2302.04841). Or, for a noisy loss, their mean is not below that of the `window` before
    by more than the standard error of the difference.
    """
    before, last = eval_losses[-2 * window : -window], eval_losses[-window:]
    varies_little = len(eval_losses) > window and np.var(last) < fraction * np.var(eval_losses)
    if len(before) < window:
        return varies_little
    error = math.sqrt((np.var(before) + np.var(last)) / (window - 1))
    return varies_little or np.mean(before) - np.mean(last) < error


def describe_rows(learned_rows, init_rows, table, tokenizer):
    """What the log says of the embedding: norm, cosine to the initializer, nearest tokens of the vocabulary."""
    return {
        "embedding_norm": learned_rows.norm(dim=1).mean().item(),
        "vocabulary_norm": table.float().norm(dim=1).median().item(),
        "cosine_to_init": torch.cosine_similarity(learned_rows, init_rows).mean().item(),
        "nearest": mu.nearest_tokens(tokenizer, table, learned_rows),
    }


def with_vae(components, args):
    """The components with the VAE, which is loaded to generate images only, and waits on the CPU."""
    return components._replace(vae=mu.load_vae(args.model, "cpu", revision=args.revision, variant=args.variant))


def preview(components, run):
    """Add four images of the token as it is now to preview.png. One that fails is reported and costs no step."""
    args = run.args
    prompt = args.preview_prompt or sample.PHOTO_PROMPT[args.learnable_property].format(args.placeholder_token)
    settings = {**mu.sampling_defaults(args.model), "height": args.resolution, "width": args.resolution}
    seeds = range(args.seed, args.seed + 4)
    try:
        images = sample.generate(with_vae(components, args), [prompt] * 4, seeds, progress=False, **settings)
        run.add_preview(list(images))
    except (UserError, RuntimeError, MemoryError) as error:  # no memory left, a full disk
        print(f"warning: no preview of step {run.step} ({error})", file=sys.stderr)


@contextmanager
def catch_ctrl_c():
    """Yield a list that the first Ctrl-C fills, to be checked once per step; the second ends the program."""
    pressed = []

    def press(*_):
        pressed.append(True)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield pressed
        return
    previous = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, previous)


def train(args):
    """Learn the token -> the run's folder. UserError if it cannot be done; SystemExit (130) after Ctrl-C."""
    # 1. The data, and the frozen model with new rows, which start as copies of the initializer token's
    device = mu.choose_device(args.device)
    dtype = mu.choose_dtype(args.precision, device)
    args.precision = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]  # kept on resume
    tokenizer = mu.load_tokenizer(args.model, args.revision)
    init_id = mu.initializer_id(tokenizer, args.initializer_token)
    token_ids = mu.add_placeholder(tokenizer, args.placeholder_token, args.num_vectors)
    placeholders = {args.placeholder_token: token_ids}
    schedule = mu.load_schedule(args.model, args.revision).to(device)
    dataset = load_dataset(args, tokenizer, placeholders, device)
    text_encoder = mu.load_text_encoder(args.model, device, dtype, args.revision, args.variant)
    unet = mu.load_unet(args.model, device, dtype, args.revision, args.variant)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    table = text_encoder.get_input_embeddings().weight  # [V, dim]
    init_rows = table[[init_id] * args.num_vectors].float()  # [n, dim]
    learned_rows = mu.install_learned_rows(text_encoder, token_ids, init_rows).learned_rows
    components = mu.Components(tokenizer, text_encoder, None, unet, schedule, placeholders)
    training = components._replace(unet=mu.compile_unet(unet)) if args.compile else components

    # 2. The optimizer, and the run's folder, which restores what learns if it is resumed
    optimizer = torch.optim.AdamW([learned_rows], lr=args.lr, weight_decay=0.0, fused=True)  # fused: no wait for CUDA
    # fp16 gradients are scaled up so that they do not vanish; else the scale is 1 and only infinite ones are skipped
    fp16 = dtype == torch.float16
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16 if fp16 else 1.0)
    run = Run(args, dataset, learned_rows, optimizer, scaler)
    if args.preview_steps and run.step == 0:
        preview(components, run)

    # 3. The loop
    eval_batch = draw_batch(dataset, args.batch_size * math.ceil(4 / args.batch_size), schedule, EVAL_SEED, args)
    loss_sums = torch.zeros(2, 4, device=device)  # losses and number of images, by quarter of the timesteps
    bad_steps = torch.zeros((), device=device)  # steps in a row whose gradient was not finite
    bar = tqdm(total=args.steps, initial=run.step, desc=f"learning {args.placeholder_token}", disable=None)
    finished = run.step >= args.steps or run.has_converged()
    with catch_ctrl_c() as interrupted, bar:
        while not finished:
            batch = draw_batch(dataset, args.batch_size * args.grad_accum, schedule, run.step, args)
            for i in range(args.grad_accum):  # strided: each micro-batch covers the whole range of timesteps
                micro_batch = Batch(*(tensor[i :: args.grad_accum] for tensor in batch))
                loss = batch_loss(training, micro_batch)  # [B]
                scaler.scale(loss.mean() / args.grad_accum).backward()  # reaches learned_rows: all else is frozen
                quarters = mu.to_device(micro_batch.timesteps * 4 // schedule.num_train_timesteps, device)
                loss_sums.index_add_(1, quarters, torch.stack([loss.detach(), torch.ones_like(loss)]))
            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_([learned_rows], 1.0)
            lr = optimizer.param_groups[0]["lr"] = learning_rate(run.step, args)
            scaler.step(optimizer)  # skipped if the gradient is not finite
            scaler.update(None if fp16 else 1.0)
            optimizer.zero_grad()
            bad_steps = torch.where(grad_norm.isfinite(), 0, bad_steps + 1)
            run.step += 1
            bar.update()

            finished = run.step == args.steps or bool(interrupted)
            if not (finished or any(run.is_due(n) for n in (args.log_steps, args.save_steps, args.preview_steps))):
                continue
            run.refuse_broken_rows()  # from here on the loop waits for the device
            sums, counts = loss_sums.tolist()
            loss_sums.zero_()
            row = {"step": run.step, "loss": sum(sums) / sum(counts)}
            row["eval_loss"] = evaluation_loss(components, eval_batch, args.batch_size)
            row["loss_by_timestep"] = [part / n if n else None for part, n in zip(sums, counts, strict=True)]
            row |= {"lr": lr, "grad_norm": grad_norm.item(), "skipped_steps": run.skipped_steps()}
            run.log(row | describe_rows(learned_rows, init_rows, table, tokenizer), bar)
            finished = finished or run.has_converged()
            if args.preview_steps and (finished or run.is_due(args.preview_steps)) and not interrupted:
                preview(components, run)
            if finished or run.is_due(args.save_steps) or bad_steps >= MAX_BAD_STEPS:
                run.save()
            if bad_steps >= MAX_BAD_STEPS:
                count = int(bad_steps)
                raise UserError(f"{count} gradients in a row were not finite: try --precision fp32 or a lower --lr.")

    # 4. How well it went
    if interrupted:
        folder = shlex.quote(run.folder.as_posix())
        command = f"python train.py --resume --output_dir {folder}"
        print(f"stopped after step {run.step}, all is saved; continue with: {command}")
        sys.exit(130)
    if run.step < args.steps:
        print(f"converged after step {run.step} (--early_stop)")
    if args.score and Path(args.model, "clip").is_dir():
        options = ["--score", "--embedding", str(run.folder), "--seed", str(args.seed), "--device", args.device]
        sample.run(sample.build_parser().parse_args([*options, "--batch_size", "32"]))
    run.finish()
    return run.folder


# --- The run's folder -------------------------------------------------------------------------------------------------

EMBEDDING_FILES = ["learned_embeds.safetensors", "learned_embeds.bin"]
RUN_FILES = ["state.pt", *EMBEDDING_FILES, "log.jsonl", "preview.png", "curves.png", "scores.json", "config.json"]
PREVIEW_ROWS = 20  # the newest ones: a preview takes as long at step 100,000 as at step 100


class Run:
    """The folder of a run: checkpoint, embedding, log, preview. One that is resumed restores what learns."""

    def __init__(self, args, dataset, learned_rows, optimizer, scaler):
        self.args, self.dataset, self.folder = args, dataset, claim_folder(args)
        self.learned_rows, self.optimizer, self.scaler = learned_rows, optimizer, scaler
        self.step, self.log_rows, self.tensorboard = 0, [], None
        if args.resume and (self.folder / "state.pt").exists():  # if it was killed before its first save it starts anew
            self.restore()
            self.save()  # a kill can have come between the checkpoint and the embedding
        else:
            self.clear()
        config = {name: value for name, value in vars(args).items() if name not in ("resume", "overwrite")}
        config["images"] = str(Path(args.images).resolve())  # found from any folder
        config["model"] = mu.name_of_model(args.model)
        self.write("config.json", json.dumps(config, indent=1, ensure_ascii=False))
        self.write("log.jsonl", "".join(json.dumps(row) + "\n" for row in self.log_rows))
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(self.folder, purge_step=self.step + 1)

    def write(self, name, text):
        mu.atomic_write(self.folder / name, lambda buffer: buffer.write(text.encode()))

    def clear(self):
        """Remove what an earlier run left behind (--overwrite)."""
        try:
            events = self.folder.glob("events.out.tfevents*") if self.args.overwrite else []
            for path in [*(self.folder / name for name in RUN_FILES), *events]:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"--output_dir {self.folder} ({error.strerror}): choose another folder.") from error

    def restore(self):
        """Load the checkpoint, and the log up to its step. UserError if the images are others."""
        state = load_state(self.folder)
        if state["images"] != self.dataset.fingerprint:
            raise UserError(f"--images {self.args.images}: these are not the images that {self.folder} began with.")
        self.learned_rows.data.copy_(state["rows"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        log_path = self.folder / "log.jsonl"
        for line in log_path.read_text().splitlines() if log_path.exists() else []:
            with suppress(ValueError):  # a kill or a full disk can leave half a line at the end
                row = json.loads(line)
                self.log_rows += [row] if row["step"] <= self.step else []

    def refuse_broken_rows(self):
        """UserError if the embedding is not finite: it is never saved."""
        if not self.learned_rows.isfinite().all():
            lr = self.args.lr
            raise UserError(
                f"--lr {lr}: the embedding is not finite any more; try a lower one. What was saved is kept."
            )

    def save(self):
        """Write the checkpoint (a few KB: rows, optimizer, scaler, step), then the embedding."""
        self.refuse_broken_rows()
        state = {"rows": self.learned_rows.detach().cpu(), "optimizer": self.optimizer.state_dict()}
        state |= {"scaler": self.scaler.state_dict(), "step": self.step, "images": self.dataset.fingerprint}
        mu.atomic_write(self.folder / "state.pt", lambda buffer: torch.save(state, buffer))
        for name in EMBEDDING_FILES if self.args.save_bin else EMBEDDING_FILES[:1]:
            base_model = mu.name_of_model(self.args.model)
            mu.save_embedding(self.folder / name, self.args.placeholder_token, self.learned_rows, base_model)

    def log(self, row, bar):
        """Add a line to log.jsonl; NaN and infinite numbers become null. Without a terminal the line is printed too."""
        row = json.loads(json.dumps(row), parse_constant=lambda name: None)
        self.log_rows.append(row)
        try:
            with (self.folder / "log.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise UserError(f"cannot write log.jsonl ({error.strerror}): make room, then --resume.") from error
        if self.tensorboard:
            for name, value in row.items():
                if isinstance(value, float):
                    self.tensorboard.add_scalar(name, value, self.step)
        losses = {"loss": row["loss"], "eval_loss": row["eval_loss"], "norm": row["embedding_norm"]}
        bar.set_postfix(losses, refresh=False)
        if bar.disable:
            print(f"step {self.step}/{self.args.steps}", *(f"{k} {v}" for k, v in losses.items()), file=sys.stderr)

    def is_due(self, every):
        return every > 0 and self.step % every == 0

    def skipped_steps(self):
        """How many steps the optimizer has skipped, of all."""
        return self.step - int(self.optimizer.state[self.learned_rows]["step"] if self.optimizer.state else 0)

    def has_converged(self):
        rows = [row for row in self.log_rows if row["step"] % self.args.log_steps == 0]  # evenly spaced
        return self.args.early_stop and has_converged([row["eval_loss"] for row in rows])

    def add_preview(self, images):
        """Add a row of PIL images to preview.png, below the training images and the earlier rows."""
        row = sample.image_grid(images, 4, [f"step {self.step}"])
        steps, rows = [], [sample.image_grid(self.dataset.examples, 4, ["training images"])]
        with suppress(Exception):  # there is none yet, or it is damaged: begin anew
            with Image.open(self.folder / "preview.png") as sheet:
                for i, step in enumerate(json.loads(sheet.text["steps"])[1 - PREVIEW_ROWS :], 1):
                    if step < self.step:  # later ones are from before the resume
                        rows.append(sheet.crop((0, i * row.height, row.width, (i + 1) * row.height)))
                        steps.append(step)
        sheet = Image.new("RGB", (row.width, row.height * (len(rows) + 1)), "white")
        for i, strip in enumerate([*rows, row]):
            sheet.paste(strip, (0, i * row.height))
        sample.save_png(sheet, self.folder / "preview.png", {"steps": json.dumps([*steps, self.step])})

    def finish(self):
        """Plot the log and say where everything is, and what to do next."""
        titles = {
            "eval_loss": "evaluation loss", "loss": "training loss", "grad_norm": "norm of the gradient",
            "embedding_norm": "norm of the embedding", "cosine_to_init": "cosine to the initializer",
        }  # fmt: skip
        panels = {title: [(row["step"], row[name]) for row in self.log_rows] for name, title in titles.items()}
        sample.plot_curves(panels, self.folder / "curves.png")
        if self.tensorboard:
            self.tensorboard.close()
        files = {"embedding": "learned_embeds.safetensors", "log": "log.jsonl", "curves": "curves.png"}
        for title, name in (files | {"preview": "preview.png"}).items():
            if (self.folder / name).exists():
                print(f"{title:11}{self.folder / name}")
        prompt = {"object": "a photo of a {} on the moon", "style": "a picture of a house in the style of {}"}
        prompt = prompt[self.args.learnable_property].format(self.args.placeholder_token)
        print(f'{"try next":11}python sample.py --embedding {shlex.quote(self.folder.as_posix())} --prompt "{prompt}"')


def claim_folder(args):
    """Make the run's folder: --output_dir, else the next free of runs/<token>, runs/<token>-2, ... -> its path."""
    token = "".join(c for c in args.placeholder_token if c.isalnum() or c in "-_") or "token"
    names = (f"{token}-{i}" if i > 1 else token for i in itertools.count(1))
    folders = [Path(args.output_dir)] if args.output_dir else (Path("runs", name) for name in names)
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=bool(args.output_dir))
            args.output_dir = str(folder)
            return folder
        except FileExistsError:
            continue  # of another run, perhaps begun at the same moment
        except OSError as error:
            raise UserError(f"--output_dir {folder} ({error.strerror}): choose another folder.") from error
    raise UserError(f"--output_dir {args.output_dir} is a file: name a folder.")


def load_state(folder):
    """The checkpoint of a run. UserError if there is none or it is damaged."""
    path = Path(folder, "state.pt")
    if not path.is_file():
        raise UserError(f"--resume: there is no checkpoint {path}; name a run's folder or use --overwrite.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {name: state[name] for name in ("rows", "optimizer", "scaler", "step", "images")}
    except Exception as error:
        raise UserError(f"--resume: the checkpoint {path} is damaged; start anew with --overwrite.") from error


# --- Options ----------------------------------------------------------------------------------------------------------

# What may change when a run is resumed. Anything else would change its course (more --steps stretch a decaying rate).
FREE_TO_CHANGE = {"steps", "save_steps", "log_steps", "preview_steps", "preview_prompt", "save_bin", "score", "device"}
FREE_TO_CHANGE |= {"output_dir", "resume", "overwrite", "gradient_checkpointing", "early_stop", "tensorboard"}
FREE_TO_CHANGE |= {"images"}  # the folder may have moved: the images themselves are compared

FLAG = argparse.BooleanOptionalAction  # --flag and --no-flag: a resumed run can switch it off again
COUNT, NATURAL = mu.number(int, 1, 2**31 - 1), mu.number(int, 0, 2**31 - 1)


def build_parser():
    parser = mu.Parser("Teach a frozen Stable Diffusion a new token from a few images (textual inversion).")
    concept = str(Path(mu.DEFAULT_MODEL, "concepts", "kat"))
    add = parser.add_argument_group("model and concept").add_argument
    # fmt: off
    add("--model", "--pretrained_model_name_or_path", default=mu.DEFAULT_MODEL, help="folder or Hub id")
    add("--revision", help="revision of a Hub id")
    add("--variant", help="variant of the weight files, such as fp16")
    add("--images", "--train_data_dir", default=concept, help="folder of training images; 3 to 9 are usual")
    add("--placeholder_token", default="<kat>", help="the new token")
    add("--initializer_token", default="cat", help="token of the model that the new one starts as a copy of")
    add("--learnable_property", choices=["object", "style"], default="object", help="what the token stands for")
    add("--num_vectors", type=COUNT, default=1, help="embedding vectors of the token")
    add("--resolution", type=COUNT, help="size of the training images in pixels (default: the model's own)")
    add("--center_crop", action="store_true", help=argparse.SUPPRESS)  # images are always cropped
    add = parser.add_argument_group("optimization").add_argument
    add("--steps", "--max_train_steps", type=COUNT, default=250, help="optimizer steps")
    add("--batch_size", "--train_batch_size", type=COUNT, default=8, help="images per forward and backward pass")
    add("--grad_accum", "--gradient_accumulation_steps", type=COUNT, default=1, help="passes per optimizer step")
    add("--lr", "--learning_rate", type=mu.number(float, 1e-12, 1e6), default=2e-2,
        help="peak learning rate; 2e-3 is usual with Stable Diffusion 1 and 2")
    add("--scale_lr", action="store_true", help="multiply the learning rate by the images per step")
    add("--lr_scheduler", choices=["constant", "linear", "cosine"], default="cosine", help="decay after the warm-up")
    add("--lr_warmup_steps", type=NATURAL, default=10, help="steps of linear warm-up")
    add("--timestep_sampling", choices=["cubic", "uniform"], default="cubic",
        help="cubic favours high noise levels and learns sooner; uniform is the paper's")
    add("--early_stop", action=FLAG, default=False, help="stop once the evaluation loss has plateaued")
    add("--seed", type=mu.number(int, 0, 2**63 - 1), default=0, help="random seed")
    add = parser.add_argument_group("hardware").add_argument
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="device to train on")
    add("--precision", "--mixed_precision", choices=["auto", "no", "fp32", "fp16", "bf16"], default="auto",
        help="precision of the frozen weights and of autocast")
    add("--gradient_checkpointing", action=FLAG, default=False, help="save memory, with a slower backward pass")
    add("--compile", action="store_true", help="compile the UNet: minutes for the first step, then faster ones")
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", "--out", help="folder of the run (default: the next free of runs/TOKEN, runs/TOKEN-2, ...)")
    add("--overwrite", action="store_true", help="start anew in an --output_dir that holds a run")
    add("--resume", "--resume_from_checkpoint", nargs="?", const="latest", metavar="FOLDER",
        help="continue the run in this folder, in --output_dir, or the newest one")
    add("--save_steps", "--checkpointing_steps", type=COUNT, default=100, help="steps between checkpoints")
    add("--save_bin", action=FLAG, default=False, help="also write learned_embeds.bin")
    add("--log_steps", type=COUNT, default=20, help="steps between lines of log.jsonl")
    add("--tensorboard", action=FLAG, default=False, help="also log to TensorBoard")
    add("--preview_steps", "--validation_steps", type=NATURAL, default=100, help="steps between previews (0: none)")
    add("--preview_prompt", "--validation_prompt", help="prompt of the previews (default: a photo of the token)")
    add("--score", action=FLAG, default=True, help="compute CLIP scores at the end, if the model has a clip/")
    # fmt: on
    return parser


def parse_options(argv=None):
    """Command line -> options; those of a resumed run are read first, as if they stood before the others.

    UserError if they do not fit together or would overwrite something.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(argv)
    if args.resume and args.overwrite:
        raise UserError("--resume continues a run, --overwrite starts it anew: choose one.")
    if args.resume:
        args = resumed_options(args, argv)
    elif args.output_dir and not args.overwrite:
        refuse_to_overwrite(args.output_dir)
    if args.tensorboard:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise UserError("--tensorboard is not installed: pip install tensorboard, or leave it out.") from error
    if args.early_stop and args.steps <= 15 * args.log_steps:
        print(
            f"note: --early_stop needs more than {15 * args.log_steps} --steps, or fewer --log_steps", file=sys.stderr
        )
    return args


def resumed_options(args, argv):
    """The options of the run's config.json, followed by those of the command line. UserError if its course changes."""
    folder = args.output_dir or args.resume
    if folder == "latest":
        named = any(word.startswith("--placeholder_token") for word in argv)
        runs = sorted(Path("runs").glob("*/config.json"), key=lambda path: path.stat().st_mtime)
        tokens = {path.parent: mu.read_config(path.parent).get("placeholder_token") for path in runs}
        runs = [run for run, token in tokens.items() if token and (token == args.placeholder_token or not named)]
        if not runs:
            raise UserError("--resume: there is no such run in runs/; name its folder with --output_dir.")
        folder = str(runs[-1])
    config = mu.read_config(folder)
    if not config or Path(folder, EMBEDDING_FILES[0]).exists():
        load_state(folder)
    if not config:
        raise UserError(f"--resume: {folder} has no config.json with the options it began with; start another run.")
    config_argv = []
    for action in build_parser()._actions:
        value, name = config.get(action.dest), action.option_strings[0]
        if action.nargs == 0:  # a flag
            config_argv += [s for s in action.option_strings if s.startswith("--no-") != bool(value)][:1]
        elif value is not None:
            config_argv.append(f"{name}={value}")
    try:
        before = build_parser().parse_args(config_argv)
    except UserError as error:
        raise UserError(f"{Path(folder, 'config.json')}: {error}; correct it or start another run.") from error
    args = build_parser().parse_args([*config_argv, *argv])
    args.output_dir = folder
    args.precision = {"auto": before.precision, "no": "fp32"}.get(args.precision, args.precision)
    for name, value in vars(before).items():
        if name not in FREE_TO_CHANGE and getattr(args, name) != value:
            was = f"--{name} was {value!r} and is now {getattr(args, name)!r}"
            raise UserError(f"--resume would change the course of {folder}: {was}; leave it or start another run.")
    return args


def refuse_to_overwrite(folder):
    """UserError if a folder holds a run or files of another program."""
    held = [name for name in RUN_FILES if Path(folder, name).exists()]
    is_run = bool(mu.read_config(folder))
    if not held or (is_run and not {"state.pt", *EMBEDDING_FILES} & set(held)):  # a run that failed before it saved
        return
    what, also = ("a run", " --resume or") if is_run else (f"'{held[0]}'", "")
    raise UserError(f"--output_dir {folder} holds {what}: add{also} --overwrite or name another.")


def main(argv=None):
    advice = "take a smaller --batch_size and a larger --grad_accum, --gradient_checkpointing, --precision bf16 or fp16"
    mu.run_main(lambda argv: train(parse_options(argv)), argv, advice)


if __name__ == "__main__":
    main()
