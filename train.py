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
import warnings
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
    mu.check_parts(args.model, vae)
    factor = mu.vae_factor(vae)
    args.resolution = args.resolution or min(mu.native_size(mu.read_unet_config(args.model, args.revision), vae))
    if args.resolution % factor:
        raise UserError(f"--resolution {args.resolution}: this model needs a multiple of {factor} pixels.")
    images, masks, paths = data.load_training_images(args.images, args.resolution, args.masks)
    templates = data.STYLE_TEMPLATES if args.learnable_property == "style" else data.OBJECT_TEMPLATES
    captions, choices, source = data.load_captions(paths, args.placeholder_token, templates, args.templates)
    token_ids = mu.tokenize(tokenizer, captions, placeholders)  # [captions, L]
    for caption, ids in zip(captions, token_ids.tolist(), strict=True):
        if placeholders[args.placeholder_token][0] not in ids:  # it would learn nothing
            what = f"--placeholder_token {args.placeholder_token!r} is no word of its own in the caption {caption!r}"
            raise UserError(f"{what}; put spaces around it, or take a token such as '<kat>'.")
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
    device, dtype = components.unet.device, components.unet.dtype
    latents, noise, timesteps, token_ids, mask = (mu.to_device(tensor, device) for tensor in batch)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        text_embeddings = mu.encode_tokens(components.text_encoder, token_ids)  # [B, L, dim]
        schedule = components.schedule
        return inversion_loss(components.unet, latents, noise, timesteps, text_embeddings, schedule, mask).float()


def backward(components, batch, total, size, scaler, learned_rows):
    """Add this batch's part to the gradient of the mean loss of `total` images -> losses [B], the size that fits.

    `size` images go through the UNet at a time: half as many when the device runs out of memory, with the same result.
    """
    while True:
        losses = torch.zeros(len(batch.latents), device=components.unet.device)
        parts = math.ceil(len(losses) / size)
        try:
            for i in range(parts):
                loss = batch_loss(components, batch.strided(i, parts))  # [size]
                scaler.scale(loss.sum() / total).backward()  # reaches learned_rows: all else is frozen
                losses[i::parts] = loss.detach()
            return losses, size
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        # outside the except block, whose traceback keeps the activations
        size = math.ceil(min(size, len(losses)) / 2)
        learned_rows.grad = None
        torch.cuda.empty_cache()
        print(f"note: out of memory; a step now takes {size} of its images at a time, with the same result")


def exchange_gradient(learned_rows, interrupted):
    """Sum the gradient over all processes (a few KB) -> True if Ctrl-C has come to one of them."""
    flag = torch.tensor([float(interrupted)], device=learned_rows.device)
    total = mu.sum_over_processes(torch.cat([learned_rows.grad.flatten(), flag]))
    learned_rows.grad.copy_(total[:-1].view_as(learned_rows))
    return bool(total[-1] > 0)


@torch.no_grad()
def evaluation_loss(components, batch, size):
    """The mean loss of the evaluation batch: always the same examples, while the loss of the steps is noisy."""
    parts = zip(*(tensor.split(size) for tensor in batch), strict=True)
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
    args, step = run.args, f"from step {run.step} to " if run.step else ""
    rates = learning_rates(args)
    what = f"{step}{args.steps} steps of {args.batch_size * args.grad_accum}"
    what += f", learning rate {max(rates):.2g} ({args.lr_scheduler}), {args.timestep_sampling} timesteps"
    concept = f"{args.placeholder_token} on {Path(args.model).name}: {run.dataset.summary}"
    print(mu.printable(f"training   {concept}, {what}, {args.precision} on {device}"))
    recipe = argparse.Namespace(**(vars(args) | RECIPES[args.recipe] | {"scale_lr": False}))
    recipe.lr = recipe.lr or vocabulary_rms
    total, usual = args.steps * np.mean(rates), recipe.steps * np.mean(learning_rates(recipe))
    if args.steps >= 50 and not 0.4 < total / usual < 2.5:
        far = f"--steps and --lr are far from --recipe {args.recipe}: the token may be under- or overfitted"
        print(f"note: {far} (the learning rates add up to {total:.2g} and {usual:.2g})")


def learning_rates(args):
    """The learning rates of all steps, or of at least 10,000 evenly spaced ones."""
    return [learning_rate(step, args) for step in range(0, args.steps, max(1, args.steps // 10_000))]


def describe_rows(learned_rows, init_rows, table, vocabulary_norm, tokenizer):
    """Logged statistics of the embedding: norm, cosine to the initializer, nearest tokens of the vocabulary."""
    return {
        "embedding_norm": learned_rows.norm(dim=1).mean().item(),
        "vocabulary_norm": vocabulary_norm,
        "cosine_to_init": torch.cosine_similarity(learned_rows, init_rows).mean().item(),
        "nearest": mu.nearest_tokens(tokenizer, table, learned_rows),
    }


def preview(components, run):
    """Add images of the token as it is now to preview.png. A preview that fails is reported and costs no step."""
    args = run.args
    if run.rank > 0:
        return
    prompt = args.preview_prompt or sample.PHOTO_PROMPT[args.learnable_property].format(args.placeholder_token)
    settings = {**mu.sampling_defaults(args.model), "height": args.resolution, "width": args.resolution}
    seeds = range(args.seed, args.seed + args.num_validation_images)
    try:
        vae = mu.load_vae(args.model, "cpu", revision=args.revision, variant=args.variant)  # not kept while training
        components = components._replace(vae=vae)
        images = sample.generate(components, [prompt] * len(seeds), seeds, progress=False, **settings)
        run.add_preview(list(images))
    except (UserError, OSError, RuntimeError, MemoryError) as error:  # no memory left, a full disk
        print(mu.printable(f"warning: no preview of step {run.step} ({error})"), file=sys.stderr)


def train(args):
    """Learn the token -> the run's folder. UserError if it cannot be done; SystemExit (130) after Ctrl-C."""
    # 1. The data, and the frozen model with new rows, which start as the initializer token's
    device = mu.choose_device(args.device)
    rank, processes = mu.join_processes(device)
    if processes > args.batch_size * args.grad_accum:
        raise UserError(f"--batch_size {args.batch_size}: a step has fewer images than the {processes} processes.")
    dtype = mu.choose_dtype(args.precision, device)
    args.precision = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]  # kept on resume
    tokenizer = mu.load_tokenizer(args.model, args.revision)
    mu.initializer_ids(tokenizer, args.initializer_token)  # fails early
    token_ids = mu.add_placeholder(tokenizer, args.placeholder_token, args.num_vectors)
    placeholders = {args.placeholder_token: token_ids}
    schedule = mu.load_schedule(args.model, args.revision).to(device)
    dataset = load_dataset(args, tokenizer, placeholders, device)
    text_encoder = mu.load_text_encoder(args.model, device, dtype, args.revision, args.variant)
    unet = mu.load_unet(args.model, device, dtype, args.revision, args.variant)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    mu.check_parts(args.model, None, text_encoder, unet, dataset.cache.mean[:1, 0])
    table = text_encoder.get_input_embeddings().weight  # [V, dim]
    vocabulary_rms = table.float().square().mean().sqrt().item()
    if not 0 < vocabulary_rms < math.inf:
        raise UserError(f"--model {args.model}: its token table is zero or not finite; take another checkpoint.")
    args.lr = args.lr or vocabulary_rms  # of --recipe fast
    init_rows = mu.initial_rows(tokenizer, table, args.initializer_token, args.num_vectors, args.seed)  # [n, dim]
    learned_rows = mu.install_learned_rows(text_encoder, token_ids, init_rows).learned_rows
    components = mu.Components(tokenizer, text_encoder, None, unet, schedule, placeholders)
    training = components
    if args.compile:
        warnings.filterwarnings("ignore", message="Dynamo detected")  # about diffusers' code, not the user's
        training = components._replace(unet=torch.compile(unet))

    # 2. The optimizer, and the run's folder, which restores what learns if it is resumed
    optimizer = torch.optim.AdamW([learned_rows], lr=args.lr, weight_decay=0.0, fused=True)  # fused: no sync with CUDA
    # fp16 gradients are scaled up so that they do not vanish; else the scale is 1 and only infinite ones are skipped
    fp16 = dtype == torch.float16
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16 if fp16 else 1.0)
    run = Run(args, dataset, mu.fingerprint(text_encoder, unet), learned_rows, optimizer, scaler, rank)
    announce(run, device, vocabulary_rms)
    if args.preview_prompt and rank == 0:
        sample.check_prompts(components, [args.preview_prompt])
    if args.preview_steps and run.step == 0:
        preview(components, run)

    # 3. The loop
    total, size = args.batch_size * args.grad_accum, args.batch_size  # images in a step, and at a time
    eval_batch = draw_batch(dataset, args.batch_size * math.ceil(4 / args.batch_size), schedule, EVAL_SEED, args)
    loss_sums = torch.zeros(2, 4, device=device)  # losses and number of images, by quarter of the timesteps
    bad_steps = torch.zeros((), device=device)  # steps in a row whose gradient was not finite
    bar = tqdm(total=args.steps, initial=run.step, unit="step", disable=rank > 0 or None)  # None: if no terminal
    vocabulary_norm = table.float().norm(dim=1).median().item()
    start, finished, stopped = run.step, run.step >= args.steps or run.has_converged(), False
    with mu.catch_ctrl_c() as interrupted, bar:
        while not finished:
            batch = draw_batch(dataset, total, schedule, run.step, args).strided(rank, processes)
            losses, size = backward(training, batch, total, size, scaler, learned_rows)  # [B]
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
            if not (finished or any(run.is_due(n) for n in (args.log_steps, args.save_steps, args.preview_steps))):
                continue
            run.refuse_broken_rows()  # synchronizes with the device, as does all below
            sums, counts = mu.sum_over_processes(loss_sums).tolist()
            loss_sums.zero_()
            eval_loss = mu.sum_over_processes(evaluation_loss(components, eval_batch, size)).item() / processes
            row = {"step": run.step, "loss": sum(sums) / sum(counts), "eval_loss": eval_loss}
            row["loss_by_timestep"] = [part / n if n else None for part, n in zip(sums, counts, strict=True)]
            row |= {"lr": lr, "grad_norm": grad_norm.item()}
            row["skipped_steps"] = run.step - int(run.moments["step"])
            run.log(row | describe_rows(learned_rows, init_rows, table, vocabulary_norm, tokenizer), bar)
            finished = finished or run.has_converged()
            if args.preview_steps and (finished or run.is_due(args.preview_steps)) and not stopped:
                preview(components, run)
            bad = int(bad_steps)
            last = finished or bad >= MAX_BAD_STEPS
            if last or run.is_due(args.save_steps):
                run.save(last)
            if bad >= MAX_BAD_STEPS:
                raise UserError(f"{bad} gradients in a row were not finite: try --precision fp32 or a lower --lr.")

    # 4. How well it went
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if stopped or interrupted:
        command = f"python train.py --resume --output_dir {mu.quote(run.folder.as_posix())}"
        print(f"stopped after step {run.step}, all is saved; continue with: {command}")
        sys.exit(130)
    if run.step < args.steps:
        print(f"converged after step {run.step} (--early_stop)")
    try:
        is_new = run.step > start or not (run.folder / "scores.json").exists()
        if args.score and Path(args.model, "clip").is_dir() and rank == 0 and is_new:
            print("scoring    with 128 images of each token (--no-score leaves it out)")
            options = ["--score", "--embedding", str(run.folder), "--seed", str(args.seed), "--device", args.device]
            sample.run(sample.build_parser().parse_args([*options, "--batch_size", "32"]))
    finally:
        run.finish()
    return run.folder


# --- The run's folder -------------------------------------------------------------------------------------------------

EMBEDDING_FILES = ["learned_embeds.safetensors", "learned_embeds.bin"]
RUN_FILES = ["state.pt", *EMBEDDING_FILES, "log.jsonl", "preview.png", "curves.png", "scores.json", "config.json"]
CURVES = {
    "eval_loss": "evaluation loss", "loss": "training loss", "grad_norm": "norm of the gradient",
    "embedding_norm": "norm of the embedding", "cosine_to_init": "cosine to the initializer",
}  # fmt: skip
PREVIEW_ROWS = 20  # the newest ones: a preview takes as long at step 100,000 as at step 100


class Run:
    """The folder of a run: checkpoint, embedding, log, preview. One that is resumed restores what learns.

    Of several processes only the one of rank 0 writes.
    """

    def __init__(self, args, dataset, model_fingerprint, learned_rows, optimizer, scaler, rank):
        self.args, self.dataset, self.model_fingerprint, self.rank = args, dataset, model_fingerprint, rank
        self.learned_rows, self.scaler = learned_rows, scaler
        self.step, self.log_rows, self.unwritten, self.previews, self.tensorboard = 0, [], "", [], None
        # AdamW makes its moments at the first step; made here, a checkpoint has the same form from the start
        self.moments = {name: torch.zeros_like(learned_rows) for name in ("exp_avg", "exp_avg_sq")}
        self.moments["step"] = torch.zeros((), device=learned_rows.device)  # steps that were not skipped
        optimizer.state[learned_rows] = self.moments
        self.folder, self.lock = Path(args.output_dir or "runs"), None
        if rank == 0:
            self.folder = claim_folder(args)
            self.lock = mu.lock_folder(self.folder)
            if not args.resume:  # another run may have begun and ended since the options were read
                refuse_to_overwrite(self.folder, args.overwrite)
        resumed = args.resume and (self.folder / "state.pt").exists()  # killed before its first save: anew
        if resumed:
            self.restore()
        if rank > 0:
            return
        config = {name: value for name, value in vars(args).items() if name not in NOT_STORED}
        for name in ("images", "masks", "templates"):  # absolute: the run can be resumed from any folder
            config[name] = config[name] and str(Path(config[name]).resolve())
        config["model"] = mu.name_of_model(args.model)
        text = json.dumps(config, indent=1, ensure_ascii=False).encode()
        if not resumed:  # with --overwrite an earlier run may have left its files
            events = self.folder.glob("events.out.tfevents*") if args.overwrite else []
            for path in [*(self.folder / name for name in RUN_FILES), *events]:
                path.unlink(missing_ok=True)
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
        content = path.read_bytes()
        began_with = {
            "images": f"--images {self.args.images}: these are not the images, masks or captions",
            "model": f"--model {self.args.model}: this is not the model",
            "token": f"{path}: {own['token']!r} in config.json is not the token",
        }
        try:
            state = mu.load_pickle(content)
            for name, what in began_with.items():
                if isinstance(state[name], str) and state[name] != own[name]:
                    raise UserError(f"{what} that {self.folder} began with.")
            if not mu.same_form(state, own):
                raise ValueError
        except UserError:
            raise
        except Exception as error:
            remedy = "start anew with --overwrite"
            raise UserError(f"--resume: {path} is damaged, or of another version; {remedy}.") from error
        for name, value in own.items():
            if isinstance(value, torch.Tensor):
                value.copy_(state[name])
        self.scaler.load_state_dict(state["scaler"])
        self.step, log = state["step"], self.folder / "log.jsonl"
        for line in log.read_text(errors="replace").splitlines() if log.is_file() else []:
            with suppress(Exception):  # an incomplete or foreign line
                row = json.loads(line)
                if 0 < row["step"] <= self.step and all(isinstance(row[name], float | None) for name in CURVES):
                    self.log_rows.append(row)
        self.restore_previews()

    def refuse_broken_rows(self):
        """UserError if the embedding is not finite: it is never saved."""
        if not self.learned_rows.isfinite().all():
            raise UserError(f"--lr {self.args.lr}: the embedding is not finite any more; try a lower one.")

    def save(self, last=True):
        """Write the checkpoint, then the embedding.

        UserError if that fails at the last save of a run; before it another follows.
        """
        self.refuse_broken_rows()
        if self.rank > 0:
            return
        token, base_model = self.args.placeholder_token, mu.name_of_model(self.args.model)
        base_model = Path(base_model).name if Path(self.args.model).exists() else base_model  # no folders of one's own
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
        if self.tensorboard:
            for name, value in row.items():
                if isinstance(value, float):
                    self.tensorboard.add_scalar(name, value, self.step)
        names = ("loss", "eval_loss", "embedding_norm")
        text = ", ".join(f"{name} {float('nan') if row[name] is None else row[name]:.4f}" for name in names)
        bar.set_postfix_str(text, refresh=False)
        if bar.disable:
            print(f"step {self.step}/{self.args.steps}: {text}", file=sys.stderr)

    def is_due(self, every):
        return every > 0 and self.step % every == 0

    def has_converged(self):
        losses = [row["eval_loss"] for row in self.log_rows if row["step"] % self.args.log_steps == 0]  # evenly spaced
        return self.args.early_stop and has_converged([loss for loss in losses if loss is not None])

    def add_preview(self, images):
        """Add a row of PIL images to preview.png, below the training images; the newest rows stay."""
        row = sample.image_grid(images, len(images), [f"step {self.step}"])
        self.previews = [*self.previews, (self.step, row)][-PREVIEW_ROWS:]
        strips = [sample.image_grid(self.dataset.examples, len(images), ["training"])]
        strips += [strip for _, strip in self.previews]
        sheet = Image.new("RGB", (row.width, row.height * len(strips)), "white")
        for i, strip in enumerate(strips):
            sheet.paste(strip, (0, i * row.height))
        steps = json.dumps([step for step, _ in self.previews])
        sample.save_png(sheet, self.folder / "preview.png", {"steps": steps})

    def restore_previews(self):
        """Read the rows of preview.png up to the step of the checkpoint; none if it is not there or damaged."""
        path = self.folder / "preview.png"
        if not path.is_file():
            return
        with suppress(Exception), Image.open(path) as sheet:
            steps = json.loads(sheet.text["steps"])
            height = sheet.height // (1 + len(steps))
            strips = [sheet.crop((0, i * height, sheet.width, (i + 1) * height)) for i in range(1, 1 + len(steps))]
            self.previews = [pair for pair in zip(steps, strips, strict=True) if pair[0] <= self.step]

    def finish(self):
        """Say where everything is and what to do next, and plot the log."""
        if self.rank > 0:
            return
        if self.tensorboard:
            self.tensorboard.close()
        print(f"{'embedding':11}{self.folder / EMBEDDING_FILES[0]}")
        for name in ["log.jsonl", "curves.png"] + ["preview.png"] * bool(self.previews):
            print(f"{Path(name).stem:11}{self.folder / name}")
        prompt = sample.EDITING_PROMPTS[self.args.learnable_property][-1].format(self.args.placeholder_token)
        options = f"--embedding {mu.quote(self.folder.as_posix())} --prompt {mu.quote(prompt)}"
        print(f"{'try next':11}python sample.py {options}")
        panels = {title: [(row["step"], row[name]) for row in self.log_rows] for name, title in CURVES.items()}
        sample.plot_curves(panels, self.folder / "curves.png")


def claim_folder(args):
    """Make the run's folder: --output_dir, else the next free of runs/<token>, runs/<token>-2, ... -> its path.

    UserError if it cannot be made.
    """
    token = "".join(c for c in args.placeholder_token if c.isalnum() or c in "-_")[:60] or "token"
    names = (f"{token}-{i}" if i > 1 else token for i in itertools.count(1))
    for folder in [Path(args.output_dir)] if args.output_dir else (Path("runs", name) for name in names):
        try:
            folder.mkdir(parents=True, exist_ok=bool(args.output_dir))
        except FileExistsError:
            if folder.is_dir():
                continue  # of another run, perhaps begun at the same moment
            raise UserError(f"--output_dir {folder} cannot be made: a file or broken link is in its way.") from None
        args.output_dir = str(folder)
        return folder


# --- Options ----------------------------------------------------------------------------------------------------------

# Two sets of defaults; an option that is given overrides its entry. The bundled model's folder names "fast", which was
# found on it; "notebook" is what most people have used with Stable Diffusion 1 and 2 (Hugging Face's notebook).
RECIPES = {
    "notebook": {
        "steps": 2000, "batch_size": 4, "lr": 2e-3, "lr_scheduler": "constant", "lr_warmup_steps": 0,
        "timestep_sampling": "uniform",
    },
    "fast": {
        "steps": 250, "batch_size": 8, "lr": None,  # None: the root mean square of the vocabulary's entries
        "lr_scheduler": "cosine", "lr_warmup_steps": 10, "timestep_sampling": "cubic",
    },
}  # fmt: skip

# What may change when a run is resumed; anything else would change its course. More --steps stretch a decaying rate.
# Of the files, which may have moved, the contents are compared: images, masks, captions, weights.
FREE_TO_CHANGE = {*"steps save_steps log_steps preview_steps preview_prompt num_validation_images save_bin".split()}
FREE_TO_CHANGE |= {*"score tensorboard early_stop compile gradient_checkpointing device output_dir".split()}
FREE_TO_CHANGE |= {*"images masks templates model".split()}
NOT_STORED = {*"resume overwrite num_train_epochs repeats report_to no_effect".split()}

# Options of diffusers' script that change nothing here: accepted, and named in one line.
NO_EFFECT = """--center_crop --push_to_hub --hub_token --hub_model_id --allow_tf32 --use_8bit_adam --tokenizer_name
--enable_xformers_memory_efficient_attention --save_as_full_pipeline --logging_dir --dataloader_num_workers --adam_beta1
--adam_beta2 --adam_weight_decay --adam_epsilon --checkpoints_total_limit --validation_epochs --local_rank
--lr_num_cycles""".split()

FLAG = argparse.BooleanOptionalAction  # --flag and --no-flag: a resumed run can switch it off again
COUNT, COUNT_OR_ZERO = mu.number(int, 1, 2**31 - 1), mu.number(int, 0, 2**31 - 1)


def initializer(text):
    """Type of --initializer_token: a word, or the full path of an embedding file."""
    name = mu.path(text)
    return str(Path(name).resolve()) if Path(name).suffix in mu.EMBEDDING_SUFFIXES else name


def build_parser():
    parser = mu.Parser("Teach a frozen Stable Diffusion a new token from a few images (textual inversion).")
    add = parser.add_argument_group("model and concept").add_argument
    # fmt: off
    add("--model", "--pretrained_model_name_or_path", type=mu.path, default=mu.DEFAULT_MODEL,
        help="folder or Hub id (default: the bundled mini_sd)")
    add("--revision", help="revision of a Hub id")
    add("--variant", help="variant of the weight files, such as fp16")
    add("--images", "--train_data_dir", type=mu.path, help="folder of training images, 3 to 9 are usual, or one image; "
        "transparent parts do not count (default: the bundled kat)")
    add("--masks", type=mu.path, help="folder of masks with the names of the images: white parts count, black ones do "
        "not")
    add("--templates", type=mu.path, help="file of captions, one a line, with {} for the token (default: built-in "
        "ones, or for NAME.jpg the lines of NAME.txt beside it, where the token is put in front if there is no {})")
    add("--placeholder_token", default="<kat>", help="the new token")
    add("--initializer_token", type=initializer,
        help="word (or embedding file) that the new token starts as (default: cat, for the kat)")
    add("--learnable_property", choices=["object", "style"], default="object", help="what the token stands for")
    add("--num_vectors", type=mu.number(int, 1, mu.MAX_VECTORS), default=1, help="embedding vectors of the token")
    add("--resolution", type=mu.number(int, 1, 8192), help="size of the training images (default: the model's own)")
    add = parser.add_argument_group("optimization (defaults by --recipe)").add_argument
    add("--recipe", choices=RECIPES, help="set of defaults (default: fast for the bundled model, else notebook)")
    add("--steps", "--max_train_steps", type=COUNT, help="optimizer steps (notebook: 2000, fast: 250)")
    add("--batch_size", "--train_batch_size", type=mu.number(int, 1, 4096),
        help="images per pass, split when memory runs out (notebook: 4, fast: 8)")
    add("--grad_accum", "--gradient_accumulation_steps", type=mu.number(int, 1, 4096), default=1,
        help="passes per optimizer step")
    add("--lr", "--learning_rate", type=mu.number(float, 1e-12, 1e6), help="peak learning rate "
        "(notebook: 2e-3, fast: root mean square of the vocabulary's entries, .02 for the bundled model)")
    add("--scale_lr", action="store_true", help="multiply the learning rate by the images per step")
    add("--lr_scheduler", choices=["constant", "constant_with_warmup", "linear", "cosine", "polynomial"],
        help="learning rate schedule (notebook: constant, fast: cosine)")
    add("--lr_warmup_steps", type=COUNT_OR_ZERO, help="steps of linear warm-up (notebook: 0, fast: 10)")
    add("--timestep_sampling", choices=["uniform", "cubic"], help="uniform is the paper's; cubic favours high noise "
        "levels and learns sooner (notebook: uniform, fast: cubic)")
    add("--early_stop", action=FLAG, default=False, help="stop once the evaluation loss has plateaued")
    add("--seed", type=mu.number(int, 0, 2**63 - 1), default=0, help="random seed")
    add = parser.add_argument_group("hardware").add_argument
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="device to train on")
    add("--precision", "--mixed_precision", choices=["auto", "no", "fp32", "fp16", "bf16"], default="auto",
        help="precision of the frozen weights and of autocast")
    add("--gradient_checkpointing", action=FLAG, default=False, help="save memory, with a slower backward pass")
    add("--compile", action=FLAG, default=False, help="compile the UNet: minutes for the first step, then faster ones")
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", "--out", type=mu.path,
        help="folder of the run (default: the next free of runs/TOKEN, runs/TOKEN-2, ...)")
    add("--overwrite", action="store_true", help="start anew in an --output_dir that holds a run")
    add("--resume", "--resume_from_checkpoint", type=mu.path, nargs="?", const="latest", metavar="FOLDER",
        help="continue the run in this folder, in --output_dir, or the newest one")
    add("--save_steps", "--checkpointing_steps", type=COUNT, default=100, help="steps between checkpoints")
    add("--save_bin", action=FLAG, default=False, help="also write learned_embeds.bin")
    add("--log_steps", type=COUNT, default=20, help="steps between lines of log.jsonl")
    add("--tensorboard", action=FLAG, default=False, help="also log to TensorBoard")
    add("--preview_steps", "--validation_steps", type=COUNT_OR_ZERO, default=100, help="steps between previews")
    add("--preview_prompt", "--validation_prompt", help="prompt of the previews (default: a photo of the token)")
    add("--score", action=FLAG, default=True, help="compute CLIP scores at the end, if the model has a clip/")
    # What else commands for diffusers' script may hold: it means the same here, or is named as without effect
    hidden = {"help": argparse.SUPPRESS}
    add("--no_safe_serialization", action="store_true", dest="save_bin", default=argparse.SUPPRESS, **hidden)
    add("--report_to", **hidden)
    add("--num_validation_images", type=COUNT, default=4, **hidden)
    add("--num_train_epochs", type=COUNT, **hidden)
    add("--repeats", type=COUNT, default=100, **hidden)  # of the images in an epoch
    for option in NO_EFFECT:
        name = {"const": option, "type": lambda value, option=option: option}  # instead of its value
        add(option, nargs="?", action="append", dest="no_effect", **name, **hidden)
    # fmt: on
    return parser


def parse_options(argv):
    """Command line -> options; those of a resumed run are read first, as if they stood before the others.

    UserError if they do not fit together or would overwrite something.
    """
    args = build_parser().parse_args(argv)
    if args.resume and args.overwrite:
        raise UserError("--resume continues a run, --overwrite starts it anew: choose one.")
    if args.resume:
        args = resumed_options(args, argv)
    elif args.output_dir:
        refuse_to_overwrite(args.output_dir, args.overwrite)
    if args.images and not args.initializer_token:
        what = "a word for what they show, such as cat; the token starts as it"
        raise UserError(f"--images needs --initializer_token: {what}.")
    if args.images and args.model == mu.DEFAULT_MODEL and not Path(args.images).resolve().is_relative_to(args.model):
        note = "note: the bundled model knows a picture book of 64 px; for photographs name another --model"
        print(f"{note}, such as CompVis/stable-diffusion-v1-4", file=sys.stderr)
    args.images = args.images or str(Path(mu.DEFAULT_MODEL, "concepts", "kat"))
    args.initializer_token = args.initializer_token or "cat"
    if args.output_dir and not args.resume:
        folder, images = Path(args.output_dir).resolve(), Path(args.images).resolve()
        if images in [folder, *folder.parents] or (images.is_file() and images.parent == folder):
            why = f"lies in --images {args.images}: its images would be mixed up with them"
            raise UserError(f"--output_dir {args.output_dir} {why}; name a folder elsewhere.")
    epochs = 0 if args.steps else args.num_train_epochs
    if not args.recipe:
        args.recipe = mu.Settings(Path(args.model, "model_index.json")).get("_recipe", "notebook", list(RECIPES))
    for name, value in RECIPES[args.recipe].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if epochs:
        examples, per_step = len(data.list_images(args.images)) * args.repeats, args.batch_size * args.grad_accum
        args.steps = epochs * math.ceil(examples / per_step)
    if args.report_to == "tensorboard":
        args.tensorboard = True
    elif args.report_to not in (None, "none"):
        args.no_effect = [*(args.no_effect or []), f"--report_to {args.report_to}"]
    if args.no_effect:
        print(mu.printable(f"note: without effect here: {', '.join(args.no_effect)}"), file=sys.stderr)
    if args.tensorboard:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise UserError("--tensorboard is not installed: pip install tensorboard, or leave it out.") from error
    if args.early_stop and args.steps <= 15 * args.log_steps:
        more = f"more than {15 * args.log_steps} --steps, or a smaller --log_steps"
        print(f"note: --early_stop cannot take effect here: it needs {more}", file=sys.stderr)
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
    learned = any(Path(folder, name).exists() for name in EMBEDDING_FILES)
    if not Path(folder, "state.pt").is_file() and (learned or not config):
        raise UserError(f"--resume: there is no checkpoint {Path(folder, 'state.pt')}; name the folder of a run.")
    if not config:
        raise UserError(f"--resume: {folder} has no config.json with the options it began with; start another run.")
    config_argv = []
    for action in build_parser()._actions:
        value = config.get(action.dest) if action.dest in args else None  # --help is not
        if action.nargs == 0:  # a flag
            config_argv += [s for s in action.option_strings if s.startswith("--no-") != bool(value)][:1]
        elif value is not None:
            config_argv.append(f"{action.option_strings[0]}={value}")
    try:
        before = build_parser().parse_args(config_argv)
    except UserError as error:
        raise UserError(f"{Path(folder, 'config.json')}: {error}; correct it or start another run.") from error
    args = build_parser().parse_args([*config_argv, *argv])
    if args.model == before.model:
        mu.refuse_download(args.model, args.revision, args.variant)
    shown = f"{args.placeholder_token}, model {args.model}, images {args.images}"
    print(f"resuming   {mu.printable(folder)}: {mu.printable(shown)}")
    args.output_dir = folder
    args.precision = {"auto": before.precision, "no": "fp32"}.get(args.precision, args.precision)
    for name, value in vars(before).items():
        if name not in FREE_TO_CHANGE | NOT_STORED and getattr(args, name) != value:
            was = f"--{name} was {value!r} and is now {getattr(args, name)!r}"
            raise UserError(f"--resume would change the course of {folder}: {was}; leave it or start another run.")
    return args


def refuse_to_overwrite(folder, overwrite=False):
    """UserError if a folder holds a run, unless that may be overwritten, or files of another program."""
    held = [name for name in RUN_FILES if Path(folder, name).exists()]
    is_run = bool(mu.read_config(folder)) and not any(Path(folder, name).is_dir() for name in held)
    has_learned = bool({"state.pt", *EMBEDDING_FILES} & set(held))  # else it failed before it saved
    if not held or (is_run and (overwrite or not has_learned)):
        return
    what = "a run: add --resume or --overwrite, or" if is_run else f"'{held[0]}' and is not a run's folder:"
    raise UserError(f"--output_dir {folder} holds {what} name another.")


def main(argv=None):
    advice = "take a smaller --batch_size and a larger --grad_accum, --gradient_checkpointing, --precision bf16 or fp16"
    mu.run_main(lambda argv: train(parse_options(argv)), argv, advice)


if __name__ == "__main__":
    main()
