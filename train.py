"""Textual inversion (Gal et al. 2022, arXiv:2208.01618): teach a frozen Stable Diffusion a new token from a few images.

    python train.py                         # on the bundled model, without a network: a minute or two on two cores
    python train.py --model CompVis/stable-diffusion-v1-4 --images my_cat --placeholder_token "<kat>" \\
        --initializer_token cat             # on a real checkpoint

All that is learned is the new token's row (or rows) in the text encoder's token table. Read this file from the top down
to the loop in `train`, then LearnedEmbedding and NoiseSchedule in model_utils.py, and draw_examples in data.py.
"""

import signal
import sys

if __name__ == "__main__":  # until training begins, also during the imports, Ctrl-C ends the program quietly
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))

import argparse
import hashlib
import itertools
import json
import math
from contextlib import suppress
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


def inversion_loss(unet, latents, noise, timesteps, text_embeddings, schedule, mask=None):
    """Denoising loss of each image [B]. Edit this to try another loss.

    latents, noise [B, 4, h, w]; timesteps [B]; text_embeddings [B, L, dim], through which the gradient reaches the new
    token; mask [B, 1, h, w], how much each latent pixel counts (all equally if None). Equation 2 of Gal et al. 2022,
    the mean squared error of DDPM (Ho et al. 2020, equation 14).
    """
    noisy_latents = schedule.add_noise(latents, noise, timesteps)  # [B, 4, h, w]
    noise_pred = unet(noisy_latents, timesteps, text_embeddings).sample  # [B, 4, h, w]
    target = schedule.target(latents, noise, timesteps)  # the noise itself, or v
    error = (noise_pred.float() - target.float()).square()  # [B, 4, h, w]
    weight = torch.ones_like(error) if mask is None else mask
    return (weight * error).mean(dim=(1, 2, 3)) / weight.mean(dim=(1, 2, 3))  # [B]


def sample_timesteps(batch_size, num_train_timesteps, generator, sampling):
    """Timesteps [B], stratified: one from each of B equally likely intervals, so that they cover the whole range.

    sampling "uniform": as in the paper. "cubic": favours high noise levels (t = 1 - u^3), where the caption decides
    what the image shows (T2I-Adapter, Mou et al. 2023, arXiv:2302.08453).
    """
    u = (torch.arange(batch_size) + torch.rand(batch_size, generator=generator)) / batch_size  # in [0, 1)
    t = u if sampling == "uniform" else 1 - u**3
    return (t * num_train_timesteps).long().clamp(max=num_train_timesteps - 1)


def learning_rate(step, args):
    """The learning rate of step 0, 1, ... --steps - 1: linear warm-up (not with "constant"), then the schedule."""
    peak = args.lr * (args.batch_size * args.grad_accum if args.scale_lr else 1)
    if step < args.lr_warmup_steps and args.lr_scheduler != "constant":
        return peak * (step + 1) / args.lr_warmup_steps
    done = (step - args.lr_warmup_steps) / max(1, args.steps - args.lr_warmup_steps)
    factor = {"linear": 1 - done, "polynomial": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}
    return peak * factor.get(args.lr_scheduler, 1.0)


def step_generator(seed, step):
    """All randomness of a step is seeded by (seed, step), so resuming needs no saved RNG state."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1)[0]))


# --- Training ---------------------------------------------------------------------------------------------------------

EVAL_SEED = 2**32  # in place of a step's number, and larger than any: seeds the evaluation batch
MAX_BAD_STEPS = 20  # gradients in a row that are not finite


class Dataset(NamedTuple):
    cache: data.LatentCache  # the images as latents
    token_ids: torch.Tensor  # [N, T, L], T captions of each image as tokens
    fingerprint: str  # of the images, masks and captions, to recognize them on resume
    examples: list  # the first ones as PIL images, for the previews
    summary: str  # description of the data, printed at the start


class Batch(NamedTuple):
    latents: torch.Tensor  # [B, 4, h, w]
    noise: torch.Tensor  # [B, 4, h, w]
    timesteps: torch.Tensor  # [B]
    token_ids: torch.Tensor  # [B, L]
    mask: torch.Tensor  # [B, 1, h, w]

    def strided(self, start, stride):
        """Every stride-th example: like the whole batch, they cover the whole range of timesteps."""
        return Batch(*(tensor[start::stride] for tensor in self))


def load_dataset(args, tokenizer, placeholders, device):
    """Encode images and captions once. The VAE is freed afterwards. Sets args.resolution if it is not given."""
    vae = mu.load_vae(args.model, device, revision=args.revision, variant=args.variant)
    factor, token = mu.vae_factor(vae), args.placeholder_token
    args.resolution = args.resolution or min(mu.native_size(mu.read_unet_config(args.model, args.revision), vae))
    if args.resolution % factor:
        raise UserError(f"--resolution {args.resolution}: this model needs a multiple of {factor} pixels.")
    images, masks, paths = data.load_training_images(args.images, args.resolution, args.masks)
    templates = data.STYLE_TEMPLATES if args.learnable_property == "style" else data.OBJECT_TEMPLATES
    captions, choices, source = data.load_captions(paths, token, templates, args.templates)
    token_ids = mu.tokenize(tokenizer, captions, placeholders)  # [captions, L]
    lost = [caption for caption, ids in zip(captions, token_ids, strict=True) if placeholders[token][0] not in ids]
    if lost:  # it would learn nothing
        raise UserError(f"--placeholder_token: {token!r} is no separate word in the caption {lost[0]!r}; add spaces.")
    fingerprint, summary = hashlib.sha256(images.numpy()), f"{len(images)} images"
    if source:
        fingerprint.update(repr((captions, choices.tolist())).encode())
        summary += f", {source}"
    if (masks < 1).any():
        fingerprint.update(masks.numpy())
        summary += f", {sum(mask.min() < 1 for mask in masks)} of them masked or transparent in parts"
    cache, examples = data.encode_dataset(vae, images, masks), mu.to_pil(images[: args.num_validation_images])
    return Dataset(cache, token_ids[choices], fingerprint.hexdigest(), examples, summary)


def draw_batch(dataset, batch_size, schedule, step, args):
    """Everything random in a step -> Batch, on the CPU."""
    generator = step_generator(args.seed, step)
    latents, noise, token_ids, mask = data.draw_examples(dataset.cache, dataset.token_ids, batch_size, generator)
    timesteps = sample_timesteps(batch_size, schedule.num_train_timesteps, generator, args.timestep_sampling)
    return Batch(latents, noise, timesteps, token_ids, mask)


def batch_loss(components, batch):
    """The loss [B] of a batch, which is moved to the device here."""
    unet, schedule = components.unet, components.schedule
    latents, noise, timesteps, token_ids, mask = (mu.to_device(tensor, unet.device) for tensor in batch)
    with torch.autocast(unet.device.type, unet.dtype, enabled=unet.dtype != torch.float32):
        text_embeddings = mu.encode_tokens(components.text_encoder, token_ids)  # [B, L, dim]
        return inversion_loss(unet, latents, noise, timesteps, text_embeddings, schedule, mask).float()


def backward(components, batch, step_images, at_once, scaler, learned_rows):
    """Accumulate this batch's part of the gradient of the mean loss of `step_images` images -> losses [B], at_once.

    `at_once` images go through the UNet at a time, half as many when the device runs out of memory. Together they are
    one step, as if all did.
    """
    while True:
        losses = torch.zeros(len(batch.latents), device=components.unet.device)
        parts = math.ceil(len(batch.latents) / at_once)
        try:
            for i in range(parts):
                loss = batch_loss(components, batch.strided(i, parts))  # [at_once]
                scaler.scale(loss.sum() / step_images).backward()  # reaches learned_rows: all else is frozen
                losses[i::parts] = loss.detach()
            return losses, at_once
        except torch.OutOfMemoryError:
            if at_once == 1:
                raise
        # here, after the except block: its traceback, like the loss, would keep the saved activations
        loss = learned_rows.grad = None
        torch.cuda.empty_cache()
        at_once = math.ceil(min(at_once, len(batch.latents)) / 2)
        print(f"note: out of memory; a step now takes {at_once} of its images at a time, with the same result")


def exchange_gradient(learned_rows, interrupted):
    """Sum the gradient over all processes (a few KB) -> True if Ctrl-C has come to one of them."""
    flag = torch.tensor([float(interrupted)], device=learned_rows.device)
    total = mu.sum_over_processes(torch.cat([learned_rows.grad.flatten(), flag]))
    learned_rows.grad.copy_(total[:-1].view_as(learned_rows))
    return bool(total[-1] > 0)


@torch.no_grad()
def evaluation_loss(components, batch, at_once):
    """The mean loss of the evaluation batch: always the same examples, while the loss of the steps is noisy."""
    parts = zip(*(tensor.split(at_once) for tensor in batch), strict=True)
    return torch.cat([batch_loss(components, Batch(*part)) for part in parts]).mean()


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


def announce(run, device, vocabulary_rms):
    """Print what the run will do, and a note if its learning rates add up to far less or more than its recipe's."""
    args, resumed = run.args, f"from step {run.step} to " if run.step else ""
    recipe = argparse.Namespace(**(vars(args) | RECIPES[args.recipe] | {"scale_lr": False}))
    recipe.lr = recipe.lr or vocabulary_rms
    rates = [learning_rate(step, args) for step in range(args.steps)]
    total, usual = sum(rates), sum(learning_rate(step, recipe) for step in range(recipe.steps))
    concept = f"{args.placeholder_token} on {Path(args.model).name}: {run.dataset.summary}"
    steps = f"{resumed}{args.steps} steps of {args.batch_size * args.grad_accum}, {args.timestep_sampling} timesteps"
    rate = f"learning rate {max(rates):.2g} ({args.lr_scheduler})"
    print(mu.printable(f"training   {concept}, {steps}, {rate}, {args.precision} on {device}"))
    if args.steps >= 50 and not 0.4 * usual < total < 2.5 * usual:  # the token may be under- or overfitted
        print(f"note: learning rates add up to {total:.2g} ({usual:.2g} in --recipe {args.recipe}): see --lr, --steps")


def train(args):
    """Learn the token -> the run's folder. UserError if it cannot be done; SystemExit (130) after Ctrl-C.

    args is completed on the way (precision, resolution, lr, output_dir), and stored in the run's config.json.
    """
    # 1. The data, and the frozen model with new rows, which start as the initializer token's
    device = mu.choose_device(args.device)
    rank, processes = mu.join_processes(device)
    step_images, at_once = args.batch_size * args.grad_accum, args.batch_size
    if processes > step_images:
        raise UserError(f"--batch_size {args.batch_size}: a step has fewer images than the {processes} processes.")
    dtype = mu.choose_dtype(args.precision, device)
    args.precision = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]  # kept on resume
    tokenizer = mu.load_tokenizer(args.model, args.revision)
    mu.initializer_ids(tokenizer, args.initializer_token)  # an unknown word fails here, before images are encoded
    token_ids = mu.add_placeholder(tokenizer, args.placeholder_token, args.num_vectors)
    placeholders = {args.placeholder_token: token_ids}
    schedule = mu.load_schedule(args.model, args.revision).to(device)
    dataset = load_dataset(args, tokenizer, placeholders, device)
    text_encoder = mu.load_text_encoder(args.model, device, dtype, args.revision, args.variant)
    unet = mu.load_unet(args.model, device, dtype, args.revision, args.variant)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    mu.check_parts(args.model, text_encoder, unet, dataset.cache.mean.shape[2])
    table = text_encoder.get_input_embeddings().weight  # [V, dim]
    vocabulary_rms = table.float().square().mean().sqrt().item()
    args.lr = args.lr or vocabulary_rms  # --recipe fast leaves it open
    init_rows = mu.initial_rows(tokenizer, table, args.initializer_token, args.num_vectors, args.seed).to(device)
    learned_rows = mu.install_learned_rows(text_encoder, token_ids, init_rows).learned_rows
    components = mu.Components(tokenizer, text_encoder, None, unet, schedule, placeholders)
    training = components._replace(unet=torch.compile(unet)) if args.compile else components

    # 2. The optimizer, and the run's folder, which restores what learns if it is resumed
    optimizer = torch.optim.AdamW([learned_rows], lr=args.lr, weight_decay=0.0, fused=True)  # fused: no sync with CUDA
    # fp16: the loss is scaled up so that small gradients do not vanish. Else the scale stays 1, and the scaler only
    # skips steps whose gradient is not finite
    fp16 = dtype == torch.float16
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16 if fp16 else 1.0)
    run = Run(args, dataset, mu.fingerprint(text_encoder, unet), learned_rows, optimizer, scaler, rank)
    announce(run, device, vocabulary_rms)
    if rank == 0 and args.preview_prompt:
        sample.check_prompts(components, [args.preview_prompt])
    if rank == 0 and args.preview_steps and run.step == 0:
        run.preview(components)

    # 3. The loop
    eval_batch = draw_batch(dataset, max(4, args.batch_size), schedule, EVAL_SEED, args)
    loss_sums = torch.zeros(2, 4, device=device)  # losses and number of images, by quarter of the timesteps
    bad_steps = torch.zeros((), device=device)  # steps in a row whose gradient was not finite
    bar = tqdm(total=args.steps, initial=run.step, unit="step", disable=rank > 0 or None)  # None: if no terminal
    intervals = (args.log_steps, args.save_steps, args.preview_steps)
    vocabulary_norm = table.float().norm(dim=1).median().item()
    start, stopped = run.step, False
    finished = run.step >= args.steps or run.has_converged()
    with mu.catch_ctrl_c() as interrupted, bar:
        while not finished:
            batch = draw_batch(dataset, step_images, schedule, run.step, args).strided(rank, processes)
            losses, at_once = backward(training, batch, step_images, at_once, scaler, learned_rows)  # [B]
            stopped = bool(interrupted)  # checked once per step
            if processes > 1:
                stopped = exchange_gradient(learned_rows, stopped)
            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_([learned_rows], 1.0)
            lr = optimizer.param_groups[0]["lr"] = learning_rate(run.step, args)
            scaler.step(optimizer)  # skipped if the gradient is not finite
            scaler.update(None if fp16 else 1.0)
            optimizer.zero_grad()
            quarters = mu.to_device(batch.timesteps * 4 // schedule.num_train_timesteps, device)
            loss_sums.index_add_(1, quarters, torch.stack([losses, torch.ones_like(losses)]))
            bad_steps = torch.where(grad_norm.isfinite(), 0, bad_steps + 1)
            run.step += 1
            bar.update()

            finished = run.step == args.steps or stopped
            is_log_step, is_save_step, is_preview_step = (n > 0 and run.step % n == 0 for n in intervals)
            if not (finished or is_log_step or is_save_step or is_preview_step):
                continue
            if not learned_rows.isfinite().all():  # synchronizes with the device, as does all below
                raise UserError(f"--lr {args.lr}: the embedding is not finite any more; try a lower one.")
            sums, counts = mu.sum_over_processes(loss_sums).tolist()
            loss_sums.zero_()
            # every process computes all of it: the average is the same number in each, so all stop at the same step
            eval_loss = mu.sum_over_processes(evaluation_loss(components, eval_batch, at_once)).item() / processes
            row = {"step": run.step, "loss": sum(sums) / sum(counts), "eval_loss": eval_loss}
            row["loss_by_timestep"] = [part / n if n else None for part, n in zip(sums, counts, strict=True)]
            row |= {"lr": lr, "grad_norm": grad_norm.item(), "skipped_steps": run.step - int(run.moments["step"])}
            row |= {"embedding_norm": learned_rows.norm(dim=1).mean().item(), "vocabulary_norm": vocabulary_norm}
            row["cosine_to_init"] = torch.cosine_similarity(learned_rows, init_rows).mean().item()
            row["nearest"] = mu.nearest_tokens(tokenizer, table, learned_rows)
            run.log(row, bar)
            finished = finished or run.has_converged()
            broken = bool(bad_steps >= MAX_BAD_STEPS)
            if rank == 0 and (is_preview_step or finished and args.preview_steps) and not stopped:
                run.preview(components)
            if rank == 0 and (is_save_step or finished or broken):
                run.save(last=finished or broken)
            if broken:
                raise UserError(f"{MAX_BAD_STEPS} gradients in a row not finite: try --precision fp32 or a lower --lr.")

    # 4. How well it went
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if stopped or interrupted:
        command = f"python train.py --resume --output_dir {mu.quote(run.folder.as_posix())}"
        print(f"stopped after step {run.step}, all is saved; continue with: {command}")
        sys.exit(130)
    if rank > 0:
        return run.folder
    if run.step < args.steps:
        print(f"converged after step {run.step} (--early_stop)")
    try:
        is_new = run.step > start or not (run.folder / "scores.json").exists()
        if args.score and is_new and Path(args.model, "clip").is_dir():
            print("scoring    with 128 images of each token (--no-score leaves it out)")
            options = ["--score", "--embedding", str(run.folder), "--seed", str(args.seed), "--device", args.device]
            sample.run(sample.build_parser().parse_args([*options, "--batch_size", "32"]))
    finally:
        run.finish()
    return run.folder


# --- The run's folder -------------------------------------------------------------------------------------------------

EMBEDDING_FILES = ["learned_embeds.safetensors", "learned_embeds.bin"]
RUN_FILES = ["state.pt", *EMBEDDING_FILES, "log.jsonl", "preview.png", "curves.png", "scores.json", "config.json"]
CURVES = ["eval_loss", "loss", "grad_norm", "embedding_norm", "cosine_to_init"]  # of log.jsonl
PREVIEW_ROWS = 20  # the newest ones: a preview takes as long at step 100,000 as at step 100


class Run:
    """The folder of a run, written by rank 0: checkpoint, embedding, log, previews. Restored if it is resumed."""

    def __init__(self, args, dataset, model_fingerprint, learned_rows, optimizer, scaler, rank):
        self.args, self.dataset, self.model_fingerprint, self.rank = args, dataset, model_fingerprint, rank
        self.learned_rows, self.scaler = learned_rows, scaler
        self.step, self.log_rows, self.unwritten, self.previews, self.tensorboard = 0, [], "", {}, None
        # AdamW makes its moments at the first step; made here, a checkpoint has the same form from the start
        self.moments = {name: torch.zeros_like(learned_rows) for name in ("exp_avg", "exp_avg_sq")}
        self.moments["step"] = torch.zeros((), device=learned_rows.device)  # steps that were not skipped
        optimizer.state[learned_rows] = self.moments
        self.folder = claim_folder(args) if rank == 0 else Path(args.output_dir or "runs")
        if rank == 0:
            self.lock = mu.lock_folder(self.folder)
            if not args.resume:  # another run may have begun and ended since the options were read
                refuse_to_overwrite(self.folder, args.overwrite)
        resumed = args.resume and (self.folder / "state.pt").is_file()  # killed before its first save: anew
        if resumed:
            self.restore()
        if rank > 0:
            return
        for name in [*RUN_FILES, "events.out.tfevents*"] if args.overwrite else []:
            for path in self.folder.glob(name):
                path.unlink()
        config = {name: value for name, value in vars(args).items() if name not in NOT_STORED}
        paths = {name: str(Path(config[name]).resolve()) for name in ("images", "masks", "templates") if config[name]}
        config |= paths | {"model": mu.name_of_model(args.model)}  # absolute: the run can be resumed from any folder
        text = json.dumps(config, indent=1).encode()
        mu.atomic_write(self.folder / "config.json", lambda buffer: buffer.write(text))
        lines = "".join(json.dumps(row) + "\n" for row in self.log_rows)
        mu.atomic_write(self.folder / "log.jsonl", lambda buffer: buffer.write(lines.encode()))
        if resumed:
            self.save()  # a kill can have come between the checkpoint and the embedding
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(self.folder, purge_step=self.step + 1)

    def checkpoint(self):
        """What state.pt holds (a few KB): what learns, the number of steps done, and what it belongs to."""
        learned = {"rows": self.learned_rows.data} | {f"adamw_{name}": x for name, x in self.moments.items()}
        belongs_to = {"token": self.args.placeholder_token, "images": self.dataset.fingerprint}
        belongs_to["model"] = self.model_fingerprint
        return {"step": self.step, "scaler": self.scaler.state_dict(), **learned, **belongs_to}

    def restore(self):
        """Load the checkpoint, and log and previews up to its step. UserError if it is damaged or of another run."""
        path, own = self.folder / "state.pt", self.checkpoint()
        intact, content = False, path.read_bytes()
        with suppress(Exception):  # anything can be in it
            state = mu.load_pickle(content)
            intact = mu.same_form(state, own)
        if not intact:
            raise UserError(f"--resume: {path} is damaged or of another model or version; start anew: --overwrite.")
        for name, what in {"images": "images, masks or captions", "model": "weights", "token": "tokens"}.items():
            if state[name] != own[name]:
                same = "name the same (--images, --masks, --templates, --model), or start another run"
                raise UserError(f"--resume: {path} is of a run with other {what}; {same}.")
        for name, value in own.items():
            if isinstance(value, torch.Tensor):
                value.copy_(state[name])
        self.scaler.load_state_dict(state["scaler"])
        self.step, log, preview = state["step"], self.folder / "log.jsonl", self.folder / "preview.png"
        for line in log.read_text(errors="replace").splitlines() if log.is_file() else []:
            with suppress(Exception):  # an incomplete or foreign line
                row = json.loads(line)
                if 0 < row["step"] <= self.step and all(isinstance(row[name], float | None) for name in CURVES):
                    self.log_rows.append(row)
        if preview.is_file():
            with suppress(Exception), Image.open(preview) as sheet:  # a damaged or foreign image
                steps = json.loads(sheet.text["steps"])
                height = sheet.height // (1 + len(steps))
                for i, step in enumerate(steps, start=1):
                    if step <= self.step:
                        self.previews[step] = sheet.crop((0, i * height, sheet.width, (i + 1) * height))

    def save(self, last=True):
        """Write the checkpoint, then the embedding. UserError if the last save of a run fails, else a warning."""
        token, model = self.args.placeholder_token, self.args.model
        base_model = Path(model).resolve().name if Path(model).exists() else model  # no folders of one's own
        try:
            mu.atomic_write(self.folder / "state.pt", lambda buffer: torch.save(self.checkpoint(), buffer))
            for name in EMBEDDING_FILES if self.args.save_bin else EMBEDDING_FILES[:1]:
                mu.save_embedding(self.folder / name, token, self.learned_rows, base_model)
        except UserError as error:  # a full disk; on Windows also a file that another program holds open
            if last:
                raise
            print(f"warning: step {self.step} is not saved, a later one will be ({error})", file=sys.stderr)

    def log(self, row, bar):
        """Add a line to log.jsonl; NaN and infinite numbers become null. Without a terminal the line is printed too."""
        text = ", ".join(f"{name} {row[name]:.4f}" for name in ("loss", "eval_loss", "embedding_norm"))
        row = json.loads(json.dumps(row), parse_constant=lambda name: None)
        self.log_rows.append(row)
        if self.rank > 0:
            return
        self.unwritten += json.dumps(row) + "\n"
        try:
            with (self.folder / "log.jsonl").open("a") as file:
                file.write(self.unwritten)
            self.unwritten = ""
        except OSError as error:
            print(f"warning: cannot write log.jsonl yet ({error.strerror})", file=sys.stderr)
        for name, value in row.items() if self.tensorboard else ():
            if isinstance(value, float):
                self.tensorboard.add_scalar(name, value, self.step)
        bar.set_postfix_str(text, refresh=False)
        if bar.disable:
            print(f"step {self.step}/{self.args.steps}: {text}", file=sys.stderr)

    def has_converged(self):
        losses = [row["eval_loss"] for row in self.log_rows if row["step"] % self.args.log_steps == 0]  # evenly spaced
        return self.args.early_stop and has_converged([loss for loss in losses if loss is not None])

    def preview(self, components):
        """Add images of the token as it is now to preview.png. A preview that fails is reported and costs no step."""
        args, count = self.args, self.args.num_validation_images
        prompt = args.preview_prompt or sample.PHOTO_PROMPT[args.learnable_property].format(args.placeholder_token)
        settings = {**mu.sampling_defaults(args.model), "height": args.resolution, "width": args.resolution}
        seeds = range(args.seed, args.seed + count)
        try:
            vae = mu.load_vae(args.model, "cpu", revision=args.revision, variant=args.variant)  # not kept
            images = sample.generate(components._replace(vae=vae), [prompt] * count, seeds, progress=False, **settings)
            self.previews[self.step] = row = sample.image_grid([*images], count, [f"step {self.step}"])
            self.previews = dict([*self.previews.items()][-PREVIEW_ROWS:])
            rows = [sample.image_grid(self.dataset.examples, count, ["training"]), *self.previews.values()]
            sheet = Image.new("RGB", (row.width, row.height * len(rows)), "white")
            for i, strip in enumerate(rows):
                sheet.paste(strip, (0, i * row.height))
            sample.save_png(sheet, self.folder / "preview.png", {"steps": json.dumps([*self.previews])})
        except (UserError, OSError, RuntimeError, MemoryError) as error:  # no memory left, a full disk
            print(mu.printable(f"warning: no preview of step {self.step} ({error})"), file=sys.stderr)

    def finish(self):
        """Say where everything is and what to do next, and plot the log."""
        if self.tensorboard:
            self.tensorboard.close()
        print(f"{'embedding':11}{self.folder / EMBEDDING_FILES[0]}")
        for name in ["log.jsonl", "curves.png"] + ["preview.png"] * bool(self.previews):
            print(f"{Path(name).stem:11}{self.folder / name}")
        prompt = sample.EDITING_PROMPTS[self.args.learnable_property][-1].format(self.args.placeholder_token)
        options = f"--embedding {mu.quote(self.folder.as_posix())} --prompt {mu.quote(prompt)}"
        print(f"{'try next':11}python sample.py {options}")
        panels = {name: [(row["step"], row[name]) for row in self.log_rows] for name in CURVES}
        sample.plot_curves(panels, self.folder / "curves.png")


def claim_folder(args):
    """Make the run's folder, --output_dir or the next of runs/<token>, runs/<token>-2, ... UserError if it fails."""
    token = "".join(c for c in args.placeholder_token if c.isalnum() or c in "-_")[:60] or "token"
    free = (Path("runs", f"{token}-{i}" if i > 1 else token) for i in itertools.count(1))
    for folder in [Path(args.output_dir)] if args.output_dir else free:
        with suppress(FileExistsError):
            folder.mkdir(parents=True, exist_ok=bool(args.output_dir))
            args.output_dir = str(folder)
            return folder
        if not folder.is_dir():  # else of another run, perhaps begun at the same moment
            raise UserError(f"--output_dir {folder} cannot be made: a file or broken link is in its way.")


def refuse_to_overwrite(folder, overwrite=False):
    """UserError if a folder holds a run, unless that may be overwritten, or files of another program."""
    held = [name for name in RUN_FILES if Path(folder, name).exists()]
    is_run = bool(mu.read_config(folder)) and not any(Path(folder, name).is_dir() for name in held)
    if held and not is_run:
        raise UserError(f"--output_dir {folder} holds '{held[0]}' and is not a run's folder: name another.")
    if not overwrite and {"state.pt", *EMBEDDING_FILES} & set(held):  # else it failed before it saved
        raise UserError(f"--output_dir {folder} holds a run: add --resume or --overwrite, or name another.")


# --- Options ----------------------------------------------------------------------------------------------------------

# Two sets of defaults; an option that is given overrides its entry. The bundled model's folder names "fast", which was
# found on it; "notebook" is what most people have used with Stable Diffusion 1 and 2 (Hugging Face's notebook).
RECIPES = {
    "notebook": {"steps": 2000, "batch_size": 4, "lr": 2e-3, "lr_scheduler": "constant", "lr_warmup_steps": 0,
                 "timestep_sampling": "uniform"},
    "fast": {"steps": 250, "batch_size": 8, "lr": None, "lr_scheduler": "cosine", "lr_warmup_steps": 10,
             "timestep_sampling": "cubic"},  # lr None: the root mean square of the vocabulary's entries
}  # fmt: skip

# What may change when a run is resumed; anything else would change its course. More --steps stretch a decaying rate.
# Of the files, which may have moved, the contents are compared: images, masks, captions, weights.
FREE_TO_CHANGE = """steps save_steps log_steps preview_steps preview_prompt num_validation_images save_bin score
tensorboard early_stop compile gradient_checkpointing device output_dir images masks templates model""".split()
NOT_STORED = {"resume", "overwrite", "num_train_epochs", "repeats", "report_to", "no_effect"}

# Options of diffusers' script that change nothing here: accepted, and named in one line.
NO_EFFECT = """--center_crop --push_to_hub --hub_token --hub_model_id --allow_tf32 --use_8bit_adam --tokenizer_name
--enable_xformers_memory_efficient_attention --save_as_full_pipeline --logging_dir --dataloader_num_workers --adam_beta1
--adam_beta2 --adam_weight_decay --adam_epsilon --checkpoints_total_limit --validation_epochs --local_rank
--lr_num_cycles""".split()

MAX_STEPS = 10**6
FLAG = argparse.BooleanOptionalAction  # --flag and --no-flag: a resumed run can switch it off again
COUNT, COUNT_OR_ZERO = mu.number(int, 1, 2**31 - 1), mu.number(int, 0, 2**31 - 1)
STEPS, IMAGES, RATE = mu.number(int, 1, MAX_STEPS), mu.number(int, 1, 4096), mu.number(float, 1e-12, 1e6)
SCHEDULES = ["constant", "constant_with_warmup", "linear", "cosine", "polynomial"]


def initializer(text):
    """Type of --initializer_token: a word, or the full path of an embedding file."""
    name = mu.path(text)
    return str(Path(name).resolve()) if Path(name).suffix in mu.EMBEDDING_SUFFIXES else name


def build_parser():
    parser = mu.Parser("Teach a frozen Stable Diffusion a new token from a few images (textual inversion).")
    # fmt: off
    add = parser.add_argument_group("model and concept").add_argument
    add("--model", "--pretrained_model_name_or_path", type=mu.path, default=mu.DEFAULT_MODEL, help="folder or Hub id")
    add("--revision", help="revision of a Hub id")
    add("--variant", help="variant of the weight files, such as fp16")
    add("--images", "--train_data_dir", type=mu.path, help="folder of 3 to 9 images, or one image (default: the kat)")
    add("--masks", type=mu.path, help="folder of masks named as the images; black and transparent parts do not count")
    add("--templates", type=mu.path, help="file of captions with {} for the token (default: built in, or NAME.txt)")
    add("--placeholder_token", default="<kat>", help="the new token")
    add("--initializer_token", type=initializer, help="word or embedding file that it starts as (default: cat)")
    add("--learnable_property", choices=["object", "style"], default="object", help="what the token stands for")
    add("--num_vectors", type=mu.number(int, 1, mu.MAX_VECTORS), default=1, help="embedding vectors of the token")
    add("--resolution", type=mu.number(int, 1, 8192), help="size of the training images (default: the model's own)")
    add = parser.add_argument_group("optimization (defaults by --recipe)").add_argument
    add("--recipe", choices=RECIPES, help="set of defaults (default: fast for the bundled model, else notebook)")
    add("--steps", "--max_train_steps", type=STEPS, help="optimizer steps (notebook 2000, fast 250)")
    add("--batch_size", "--train_batch_size", type=IMAGES, help="images a pass, split if need be (notebook 4, fast 8)")
    add("--grad_accum", "--gradient_accumulation_steps", type=IMAGES, default=1, help="passes per optimizer step")
    add("--lr", "--learning_rate", type=RATE, help="peak learning rate (notebook 2e-3, fast: the vocabulary's rms)")
    add("--scale_lr", action=FLAG, default=False, help="multiply the learning rate by the images per step")
    add("--lr_scheduler", choices=SCHEDULES, help="learning rate schedule (notebook constant, fast cosine)")
    add("--lr_warmup_steps", type=COUNT_OR_ZERO, help="steps of linear warm-up (notebook 0, fast 10)")
    add("--timestep_sampling", choices=["uniform", "cubic"], help="cubic: higher noise (notebook uniform, fast cubic)")
    add("--early_stop", action=FLAG, default=False, help="stop once the evaluation loss has plateaued")
    add("--seed", type=mu.number(int, 0, 2**63 - 1), default=0, help="random seed")
    add = parser.add_argument_group("hardware").add_argument
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="device to train on")
    add("--precision", "--mixed_precision", choices=mu.PRECISIONS, default="auto", help="precision of the weights")
    add("--gradient_checkpointing", action=FLAG, default=False, help="save memory, with a slower backward pass")
    add("--compile", action=FLAG, default=False, help="compile the UNet: minutes for the first step, then faster ones")
    output = parser.add_argument_group("output")
    add, either = output.add_argument, output.add_mutually_exclusive_group().add_argument
    add("--output_dir", "--out", type=mu.path, help="folder of the run (default: runs/TOKEN, then runs/TOKEN-2, ...)")
    either("--overwrite", action="store_true", help="start anew in an --output_dir that holds a run")
    either("--resume", "--resume_from_checkpoint", type=mu.path, nargs="?", const="latest", metavar="FOLDER",
           help="continue the run in this folder, in --output_dir, or the newest one")
    add("--save_steps", "--checkpointing_steps", type=COUNT, default=100, help="steps between checkpoints")
    add("--save_bin", action=FLAG, default=False, help="also write learned_embeds.bin")
    add("--log_steps", type=COUNT, default=20, help="steps between lines of log.jsonl")
    add("--tensorboard", action=FLAG, default=False, help="also log to TensorBoard")
    add("--preview_steps", "--validation_steps", type=COUNT_OR_ZERO, default=100, help="steps between previews")
    add("--preview_prompt", "--validation_prompt", help="prompt of the previews (default: a photo of the token)")
    add("--score", action=FLAG, default=True, help="compute CLIP scores at the end, if the model has a clip/")
    # Options of diffusers' script alone: taken as far as they mean something here, else named as without effect
    hidden = {"help": argparse.SUPPRESS}
    add("--no_safe_serialization", action="store_true", dest="save_bin", default=argparse.SUPPRESS, **hidden)
    add("--report_to", default="none", **hidden)
    add("--num_validation_images", type=IMAGES, default=4, **hidden)
    add("--num_train_epochs", type=COUNT, **hidden)
    add("--repeats", type=COUNT, default=100, **hidden)  # of the images in an epoch
    add(*NO_EFFECT, nargs="?", dest="no_effect", **hidden)
    # fmt: on
    return parser


def parse_options(argv):
    """Command line -> options. UserError if they do not fit together or would overwrite something."""
    args = build_parser().parse_args(argv)
    if args.resume:
        args = resumed_options(args, argv)
    elif args.output_dir:
        refuse_to_overwrite(args.output_dir, args.overwrite)
    if args.images and not args.initializer_token:
        raise UserError("--images needs --initializer_token: the word for what they show, such as cat, to start from.")
    args.images = args.images or str(Path(mu.DEFAULT_MODEL, "concepts", "kat"))
    args.initializer_token = args.initializer_token or "cat"
    images, folder = Path(args.images).resolve(), Path(args.output_dir or "").resolve()
    if args.model == mu.DEFAULT_MODEL and not images.is_relative_to(Path(args.model).resolve()):
        print("note: the bundled model knows only a picture book of 64 px; for photos name a --model", file=sys.stderr)
    inside = images in [folder, *folder.parents] or (images.is_file() and images.parent == folder)
    if inside and args.output_dir and not args.resume:  # its images would be mixed up with them
        raise UserError(f"--output_dir {args.output_dir} lies in --images {args.images}; name a folder elsewhere.")
    if not args.recipe:
        args.recipe = mu.Settings(Path(args.model, "model_index.json")).get("_recipe", "notebook", list(RECIPES))
    epochs = 0 if args.steps else args.num_train_epochs
    for name, value in RECIPES[args.recipe].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if epochs:
        examples = len(data.list_images(args.images)) * args.repeats
        args.steps = epochs * math.ceil(examples / (args.batch_size * args.grad_accum))
        if args.steps > MAX_STEPS:
            raise UserError(f"--num_train_epochs {epochs}: that is {args.steps} steps; take at most {MAX_STEPS}.")
    args.tensorboard |= args.report_to == "tensorboard"
    no_effect = [name for name in (word.split("=")[0] for word in argv) if name in NO_EFFECT]
    if args.report_to not in ("none", "tensorboard"):
        no_effect.append(f"--report_to {args.report_to}")
    if no_effect:
        print(mu.printable(f"note: without effect here: {', '.join(no_effect)}"), file=sys.stderr)
    if args.tensorboard:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise UserError("--tensorboard is not installed: pip install tensorboard, or leave it out.") from error
    if args.early_stop and args.steps <= 15 * args.log_steps:
        print(f"note: --early_stop needs over {15 * args.log_steps} --steps here: see --log_steps", file=sys.stderr)
    return args


def resumed_options(args, argv):
    """The options of the run's config.json, followed by those of the command line. UserError if its course changes."""
    folder = args.output_dir or args.resume
    if folder == "latest":
        runs = [path for path in Path("runs").glob("*/config.json") if mu.read_config(path.parent)]
        if not runs:
            raise UserError("--resume: there is no run in runs/; name its folder with --output_dir.")
        folder = str(max(runs, key=lambda path: path.stat().st_mtime).parent)
    config = mu.read_config(folder)
    learned = any(Path(folder, name).exists() for name in EMBEDDING_FILES)
    if not config or (learned and not Path(folder, "state.pt").is_file()):
        raise UserError(f"--resume: {folder} has no checkpoint state.pt, or no config.json; name the folder of a run.")
    stored = {name: value for name, value in config.items() if name in args and value is not None}
    flags = [f"--{'' if value else 'no-'}{name}" for name, value in stored.items() if isinstance(value, bool)]
    config_argv = flags + [f"--{name}={value}" for name, value in stored.items() if not isinstance(value, bool)]
    try:
        before = build_parser().parse_args(config_argv)
    except UserError as error:
        raise UserError(f"{Path(folder, 'config.json')}: {error}; correct it or start another run.") from error
    args = build_parser().parse_args([*config_argv, *argv])
    if args.model == before.model:
        mu.refuse_download(args.model, args.revision, args.variant)
    print(mu.printable(f"resuming   {folder}: {args.placeholder_token}, model {args.model}, images {args.images}"))
    args.output_dir = folder
    args.precision = {"auto": before.precision, "no": "fp32"}.get(args.precision, args.precision)
    for name, was in vars(before).items():
        if name not in FREE_TO_CHANGE and name not in NOT_STORED and getattr(args, name) != was:
            change = f"--{name} was {was!r} and is now {getattr(args, name)!r}"
            raise UserError(f"--resume would change the course of {folder}: {change}; leave it, or name another run.")
    return args


def main(argv=None):
    advice = "take a smaller --batch_size and a larger --grad_accum, --gradient_checkpointing, --precision bf16 or fp16"
    mu.run_main(lambda argv: train(parse_options(argv)), argv, advice)


if __name__ == "__main__":
    main()
