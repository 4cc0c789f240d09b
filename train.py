"""Textual inversion (Gal et al. 2022, arXiv:2208.01618): teach a frozen Stable Diffusion a word from a few pictures.

python train.py                         # on the embedded model, no network: minutes on two CPU cores
python train.py --model CompVis/stable-diffusion-v1-4 --images my_cat --placeholder_token "<kat>" \\
    --initializer_token cat             # the real thing

All that is learned is the new word's row (or rows) in the text encoder's token table. The reading order:
`inversion_loss` below, `train`, then LearnedEmbedding and NoiseSchedule in model_utils.py, draw_batch in data.py.
"""

import argparse
import hashlib
import itertools
import json
import math
import shlex
import signal
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import data
import model_utils as mu
import sample
from model_utils import UserError

FIXED = 2**32  # larger than any number of a step: seeds the batch that never changes


def inversion_loss(unet, latents, noise, timesteps, text_embeddings, schedule):
    """How wrong the frozen UNet is about the noise in each picture -> loss [B]. The place to experiment.

    latents, noise [B, 4, h, w]; timesteps [B]; text_embeddings [B, L, dim], through which the gradient reaches the new
    word. Equation 2 of Gal et al. 2022, the mean squared error of DDPM (Ho et al. 2020, equation 14).
    """
    noisy_latents = schedule.add_noise(latents, noise, timesteps)  # [B, 4, h, w]
    noise_pred = unet(noisy_latents, timesteps, text_embeddings).sample  # [B, 4, h, w]
    target = schedule.target(latents, noise, timesteps)  # the noise itself, or v
    return (noise_pred.float() - target.float()).square().mean(dim=(1, 2, 3))  # [B]


def draw_timesteps(batch_size, num_train_timesteps, generator, sampling):
    """Timesteps [B], one from each of B equally likely parts of the range: together they are spread evenly over it.

    sampling "uniform": as in the paper. "cubic": the noisier the likelier, for there the sentence decides what is to
    come (T2I-Adapter, Mou et al. 2023, arXiv:2302.08453).
    """
    u = (torch.arange(batch_size) + torch.rand(batch_size, generator=generator)) / batch_size  # in [0, 1)
    t = u if sampling == "uniform" else 1 - u**3
    return (t * num_train_timesteps).long().clamp(max=num_train_timesteps - 1)


def learning_rate(step, args):
    """The rate of step 0, 1, ... --steps - 1."""
    peak = args.lr * (args.batch_size * args.grad_accum if args.scale_lr else 1)
    if step < args.lr_warmup_steps:
        return peak * (step + 1) / args.lr_warmup_steps
    done = (step - args.lr_warmup_steps) / max(1, args.steps - args.lr_warmup_steps)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}
    return peak * factor[args.lr_scheduler]


def step_generator(seed, step):
    """All that is random in a step comes from (seed, step): a resumed run needs no saved random state."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1)[0]))


def has_settled(eval_losses, window=15, share=0.15):
    """True once the loss of the fixed batch only wavers.

    Either its last `window` values vary less than `share` of all do: the rule of "Is This Loss Informative?" (Voronov
    et al. 2023, arXiv:2302.04841). Or, for a loss that wavers as much as it has fallen, they are no lower than the
    `window` before them by more than chance: the standard error of the difference of the two means.
    """
    before, last = eval_losses[-2 * window : -window], eval_losses[-window:]
    varies_little = len(eval_losses) > window and np.var(last) < share * np.var(eval_losses)
    if len(before) < window:
        return varies_little
    chance = math.sqrt((np.var(before) + np.var(last)) / (window - 1))
    return varies_little or np.mean(before) - np.mean(last) < chance


def train(args):
    """Learn the word -> the folder that holds it. UserError if it cannot be done; SystemExit (130) after Ctrl-C."""
    # 1. The pictures, and what the VAE makes of them: then the VAE is gone
    device = mu.choose_device(args.device)
    dtype = mu.choose_dtype(args.precision, device)
    args.precision = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]  # kept on resume
    source = {"revision": args.revision, "variant": args.variant}
    tokenizer = mu.load_tokenizer(args.model, args.revision)
    start_id = mu.initializer_id(tokenizer, args.initializer_token)
    token_ids = mu.add_placeholder(tokenizer, args.placeholder_token, args.num_vectors)
    placeholders = {args.placeholder_token: token_ids}
    templates = data.STYLE_TEMPLATES if args.learnable_property == "style" else data.OBJECT_TEMPLATES
    sentences = [template.format(args.placeholder_token) for template in templates]
    most = tokenizer.model_max_length - max(map(len, tokenizer(sentences).input_ids)) + 1
    if args.num_vectors > most:
        raise UserError(f"--num_vectors {args.num_vectors}: the model's sentences have room for {most}.")
    template_ids = mu.tokenize(tokenizer, sentences, placeholders)  # [T, L]
    schedule = mu.load_schedule(args.model, args.revision).to(device)
    vae = mu.load_vae(args.model, device, **source)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    args.resolution = args.resolution or mu.native_resolution(args.model, factor, args.revision)
    if args.resolution % factor:
        raise UserError(f"--resolution {args.resolution}: this model needs a multiple of {factor} pixels.")
    images, _ = data.load_images(args.images, args.resolution, args.center_crop)  # [N, 3, R, R]
    cache = data.encode_dataset(vae, images, mu.encode_images)
    fingerprint = hashlib.sha256(images.numpy()).hexdigest()
    examples = mu.to_pil(images[:4])
    del vae, images

    # 2. The frozen model and the rows that learn, which begin as the initializer word
    text_encoder = mu.load_text_encoder(args.model, device, dtype, **source)
    unet = mu.load_unet(args.model, device, dtype, **source)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    table = text_encoder.get_input_embeddings().weight
    start_rows = table[[start_id] * args.num_vectors].float()  # [n, dim]
    vocabulary_norm = table.float().norm(dim=1).median().item()
    learned_rows = mu.install_learned_rows(text_encoder, token_ids, start_rows).learned_rows

    # fused: the optimizer itself skips a step with infinite gradients and the loop never waits for the device
    optimizer = torch.optim.AdamW([learned_rows], lr=args.lr, weight_decay=0.0, fused=True)
    # fp16 gradients are scaled up lest they vanish; otherwise the scale stays 1 and it only looks out for infinite ones
    fp16 = dtype == torch.float16
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16 if fp16 else 1.0)
    run = Run(args, fingerprint, learned_rows, optimizer, scaler)  # its folder; restores them if it is resumed
    if args.resume:
        print(f"resumed    {run.folder} at step {run.step}")

    # 3. What a step computes, and what is looked at now and then
    unet_to_train = mu.compile_unet(unet) if args.compile else unet

    def loss_of(model, batch, timesteps):  # moves a batch to the device, encodes its sentences -> loss [B]
        tensors = (batch.latents, batch.noise, timesteps, batch.token_ids)
        latents, noise, t, ids = (mu.send(x, device) for x in tensors)
        with torch.autocast(device.type, dtype, enabled=mu.computes_in_half(dtype, device)):
            text_embeddings = mu.encode_tokens(text_encoder, ids)  # [B, L, dim]
            return inversion_loss(model, latents, noise, t, text_embeddings, schedule).float()

    # The loss of a step is mostly chance: each has other pictures, timesteps and noise. That of one batch that never
    # changes is a curve that can be read.
    generator, fixed_size = step_generator(args.seed, FIXED), args.batch_size * -(-4 // args.batch_size)  # 4 or more
    fixed_batch = data.draw_batch(cache, template_ids, fixed_size, generator)
    num_timesteps = schedule.num_train_timesteps
    fixed_timesteps = draw_timesteps(fixed_size, num_timesteps, generator, args.timestep_sampling)
    tensors = zip(*(x.split(args.batch_size) for x in fixed_batch), strict=True)
    fixed = list(zip(map(data.Batch._make, tensors), fixed_timesteps.split(args.batch_size), strict=True))
    loss_sums, loss_counts = torch.zeros(4, device=device), torch.zeros(4)  # of each quarter of the timesteps

    def measure(step, grad_norm, skipped_steps):  # -> one line of the log; begins new sums
        sums, counts = loss_sums.tolist(), loss_counts.tolist()
        loss_sums.zero_()
        loss_counts.zero_()
        with torch.no_grad():  # never compiled: that would be a second time, for the case without gradient
            eval_losses = [loss_of(unet, batch, timesteps) for batch, timesteps in fixed]
        return {
            "step": step, "loss": sum(sums) / sum(counts), "eval_loss": torch.cat(eval_losses).mean().item(),
            "loss_by_timestep": [part / n if n else None for part, n in zip(sums, counts, strict=True)],
            "lr": learning_rate(step - 1, args), "grad_norm": grad_norm,
            "row_norm": learned_rows.norm(dim=1).mean().item(), "vocabulary_norm": vocabulary_norm,
            "cosine_to_start": torch.cosine_similarity(learned_rows, start_rows).mean().item(),
            "nearest": mu.nearest_words(tokenizer, table, learned_rows), "skipped_steps": skipped_steps,
        }  # fmt: skip

    def load_drawing_parts():  # what sample.py draws with; the VAE is there only as long as this is kept
        vae = mu.load_vae(args.model, "cpu", **source)
        return sample.Parts(tokenizer, text_encoder, vae, unet, schedule, placeholders)

    def preview(step):
        prompt = args.preview_prompt or sample.PHOTO_PROMPT[args.learnable_property].format(args.placeholder_token)
        how = sample.sampling_defaults(args.model) | {"height": args.resolution, "width": args.resolution}
        drawings = list(
            sample.draw(load_drawing_parts(), [prompt] * 4, range(args.seed, args.seed + 4), **how, progress=False)
        )
        run.add_preview_row(drawings, step)

    if args.preview_steps and not run.preview_path.exists():
        run.begin_preview(examples)
    if args.preview_steps and run.step == 0:
        preview(0)

    # 4. The loop
    stop = []  # Ctrl-C asks for an end after the step under way; a second one ends at once
    previous = signal.signal(
        signal.SIGINT, lambda *_: (stop.append(True), signal.signal(signal.SIGINT, signal.SIG_DFL))
    )
    # the optimizer's own count, without skipped steps; the step at which it was last seen to grow
    steps_taken, last_progress = run.steps_taken(), run.step
    stopping, settled = False, args.early_stop and has_settled(run.eval_losses())
    bar = tqdm(total=args.steps, initial=run.step, desc=f"learning {args.placeholder_token}", unit="step", disable=None)
    step = run.step
    try:
        while step < args.steps and not stopping and not settled:
            generator = step_generator(args.seed, step)
            batch = data.draw_batch(cache, template_ids, args.batch_size * args.grad_accum, generator)
            timesteps = draw_timesteps(len(batch.latents), num_timesteps, generator, args.timestep_sampling)
            for i in range(args.grad_accum):  # dealt out in turns: each micro-batch has timesteps of the whole range
                micro_batch, t = data.Batch(*(x[i :: args.grad_accum] for x in batch)), timesteps[i :: args.grad_accum]
                loss = loss_of(unet_to_train, micro_batch, t)  # [B]
                scaler.scale(loss.mean() / args.grad_accum).backward()  # reaches learned_rows: nothing else can learn
                quarters = t * 4 // num_timesteps
                loss_sums.index_add_(0, mu.send(quarters, device), loss.detach())
                loss_counts += quarters.bincount(minlength=4)
            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_([learned_rows], 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
            scaler.step(optimizer)  # not if a gradient is infinite or NaN
            scaler.update(None if fp16 else 1.0)
            optimizer.zero_grad(set_to_none=True)
            step += 1
            bar.update()

            stopping = bool(stop)  # asked once: a Ctrl-C that comes later is for the next step
            logging = step % args.log_steps == 0
            saving = step % args.save_steps == 0 or step == args.steps or stopping
            if logging or saving or step - last_progress >= 20:  # here alone the loop waits for the device
                if run.steps_taken() > steps_taken:
                    steps_taken, last_progress = run.steps_taken(), step
                if not learned_rows.isfinite().all():
                    raise UserError(
                        f"--lr {args.lr}: the word is not finite any more: try a lower one. What was saved is kept."
                    )
            if logging or saving:
                row = measure(step, grad_norm.item(), step - steps_taken)
                run.log(row)
                bar.set_postfix(eval_loss=f"{row['eval_loss']:.4f}", norm=f"{row['row_norm']:.2f}")
                settled = args.early_stop and has_settled(run.eval_losses())
            previewing = args.preview_steps and (step % args.preview_steps == 0 or step == args.steps or settled)
            if previewing and not stopping:
                try:
                    preview(step)
                except Exception:  # no memory left to draw with, a full disk: what was learned is kept
                    run.save(step)
                    raise
            if saving or settled or step - last_progress >= 20:
                run.save(step)
            if step - last_progress >= 20:
                raise UserError(
                    f"{step - last_progress} gradients running were not finite: try --precision fp32 or a lower --lr."
                )
    finally:
        bar.close()
        signal.signal(signal.SIGINT, previous)
    if settled:
        print(f"settled   after step {step} (--early_stop)")
    elif step < args.steps:
        folder = shlex.quote(run.folder.as_posix())
        print(f"stopped after step {step}, all is saved; go on with: python train.py --resume --output_dir {folder}")
        sys.exit(130)

    # 5. How well it went, where a CLIP is at hand
    if (Path(args.model) / "clip").is_dir() and args.score:
        words = [args.initializer_token, args.placeholder_token]
        pictures = mu.to_pil(data.load_images(args.images, args.resolution, args.center_crop)[0])
        how = {**sample.sampling_defaults(args.model), "batch_size": 32}
        judge = sample.load_clip(args.model, device=device)
        scores = sample.score_embedding(
            load_drawing_parts(), judge, pictures, words, args.learnable_property, seed=args.seed, **how
        )
        sample.report_scores(scores, run.folder / "scores.json")
    run.finish()
    sentence = {"object": "a photo of a {} on the moon", "style": "a picture of a house in the style of {}"}
    prompt = sentence[args.learnable_property].format(args.placeholder_token)
    print(f'try next   python sample.py --embedding {shlex.quote(run.folder.as_posix())} --prompt "{prompt}"')
    return run.folder


# --- The run's folder -------------------------------------------------------------------------------------------------


class Run:
    """The folder of a run: checkpoint, embedding files, log, previews. A resumed one restores what learns to `step`."""

    def __init__(self, args, fingerprint, learned_rows, optimizer, scaler):
        self.args, self.folder, self.fingerprint = args, claim_folder(args), fingerprint
        self.learned_rows, self.optimizer, self.scaler = learned_rows, optimizer, scaler
        self.step, self.log_rows, self.previews, self.tensorboard = 0, [], [], None
        paths = (self.folder / name for name in ("state.pt", "log.jsonl", "preview.png", "curves.png"))
        self.state_path, self.log_path, self.preview_path, self.curves_path = paths
        if args.resume and self.state_path.exists():  # if it was killed before its first checkpoint it begins anew
            self.restore()
            self.save(self.step)  # a kill can have come between the checkpoint and the word
        else:
            self.clear()
        config = {name: value for name, value in vars(args).items() if name not in ("resume", "overwrite")}
        config["images"] = str(Path(args.images).absolute())  # --score looks for them from anywhere
        config["model"] = mu.name_of_model(args.model)
        text = json.dumps(config, indent=1, ensure_ascii=False)
        mu.atomic_write(self.folder / "config.json", lambda buffer: buffer.write(text.encode()))
        lines = "".join(json.dumps(row) + "\n" for row in self.log_rows)
        mu.atomic_write(self.log_path, lambda buffer: buffer.write(lines.encode()))
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(self.folder, purge_step=self.step + 1)

    def clear(self):
        """Remove what an earlier run left behind (--overwrite)."""
        try:
            events = self.folder.glob("events.out.tfevents*") if self.args.overwrite else []
            for path in [*(self.folder / name for name in RUN_FILES), *events]:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"--output_dir {self.folder} ({error.strerror}): choose another folder.") from error

    def restore(self):
        """Take up the checkpoint, and the log as far as it goes. UserError if the pictures are others."""
        state = load_state(self.state_path)
        if state["images"] != self.fingerprint:
            raise UserError(f"--images {self.args.images}: the pictures are not those that {self.folder} began with.")
        self.learned_rows.data.copy_(state["rows"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.previews = state["step"], state["previews"]
        for line in self.log_path.read_text().splitlines() if self.log_path.exists() else []:
            with suppress(ValueError):  # a kill or a full disk can leave half a line at the end
                self.log_rows += [row] if (row := json.loads(line))["step"] <= self.step else []

    def save(self, step):
        """Write the checkpoint, then the word."""
        state = {"rows": self.learned_rows.detach().cpu(), "optimizer": self.optimizer.state_dict()}
        state |= {"scaler": self.scaler.state_dict(), "step": step, "images": self.fingerprint}
        state["previews"] = self.previews
        mu.atomic_write(self.state_path, lambda buffer: torch.save(state, buffer))
        word = (self.args.placeholder_token, self.learned_rows, mu.name_of_model(self.args.model), {"step": step})
        mu.save_embedding(self.folder / "learned_embeds.safetensors", *word)
        if self.args.save_bin:
            mu.save_embedding(self.folder / "learned_embeds.bin", *word, bin=True)

    def log(self, row):
        """Add a line to log.jsonl."""
        self.log_rows.append(row)
        try:
            with self.log_path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.log_path} ({error.strerror}): make room, then --resume.") from error
        if self.tensorboard:
            parts = {f"loss_by_timestep/{i}": loss for i, loss in enumerate(row["loss_by_timestep"])}
            for name, value in (row | parts).items():
                if isinstance(value, float):
                    self.tensorboard.add_scalar(name, value, row["step"])
            self.tensorboard.flush()

    def steps_taken(self):
        """How many steps the optimizer has not skipped. Waits for the device."""
        return int(self.optimizer.state[self.learned_rows]["step"]) if self.optimizer.state else 0

    def eval_losses(self):
        """Of the fixed batch, at even distances (not where Ctrl-C or a checkpoint logged out of turn)."""
        return [row["eval_loss"] for row in self.log_rows if row["step"] % self.args.log_steps == 0]

    def begin_preview(self, examples):
        """Write a sheet with the training pictures alone."""
        self.previews = []
        row = sample.image_grid(examples, 4, ["training pictures"])
        mu.atomic_write(self.preview_path, lambda buffer: row.save(buffer, format="PNG"))

    def add_preview_row(self, drawings, step):
        """Add PIL pictures to the sheet, below the training pictures and the rows of earlier steps."""
        self.previews = [earlier for earlier in self.previews if earlier < step]  # later ones are from a lost try
        row, keep = sample.image_grid(drawings, 4, [f"step {step}"]), 1 + len(self.previews)
        sheet = Image.new("RGB", (row.width, (keep + 1) * row.height), "white")
        if self.preview_path.exists():
            with Image.open(self.preview_path) as old:
                sheet.paste(old.crop((0, 0, row.width, min(old.height, keep * row.height))))
        sheet.paste(row, (0, keep * row.height))
        mu.atomic_write(self.preview_path, lambda buffer: sheet.save(buffer, format="PNG"))
        self.previews.append(step)

    def finish(self):
        """Draw the curves and say where everything is."""
        curve = lambda name: [(row["step"], row[name]) for row in self.log_rows]  # noqa: E731
        panels = {
            "loss of the fixed batch": curve("eval_loss"), "loss of the steps": curve("loss"),
            "length of the gradient": curve("grad_norm"), "length of the row": curve("row_norm"),
            "cosine to the start": curve("cosine_to_start"),
        }  # fmt: skip
        sample.plot_curves(panels, self.curves_path)
        if self.tensorboard:
            self.tensorboard.close()
        print(f"embedding  {self.folder / 'learned_embeds.safetensors'}")
        print(f"log        {self.log_path}, drawn in {self.curves_path}")
        if self.preview_path.exists():
            print(f"preview    {self.preview_path}")


def claim_folder(args):
    """Make the run's folder, where none is named the next free of runs/<word>, runs/<word>-2, ... -> its path."""
    try:
        for run in [Path(args.output_dir)] if args.output_dir else free_folders(args.placeholder_token):
            with suppress(FileExistsError):  # another run, begun at the same moment, was faster
                run.mkdir(parents=True, exist_ok=bool(args.output_dir))
                args.output_dir = str(run)
                return run
        raise UserError(f"--output_dir {args.output_dir} is a file: name a folder.")
    except OSError as error:
        raise UserError(f"--output_dir {run} ({error.strerror}): choose another folder.") from error


def free_folders(placeholder_token):
    """Yield the folders runs/<word>, runs/<word>-2, ... that are not there."""
    name = "".join(c for c in placeholder_token if c.isalnum() or c in "-_") or "word"
    runs = (Path("runs", f"{name}-{i}" if i > 1 else name) for i in itertools.count(1))
    return (run for run in runs if not run.exists())


def load_state(path):
    """The checkpoint of a run. UserError if there is none or it is damaged."""
    if not path.exists():
        raise UserError(
            f"--resume: there is no checkpoint {path}; name a run's folder, or begin anew with --overwrite."
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {name: state[name] for name in ("rows", "optimizer", "scaler", "step", "images", "previews")}
    except Exception as error:
        raise UserError(f"--resume: the checkpoint {path} is damaged; begin anew with --overwrite.") from error


# --- Options ----------------------------------------------------------------------------------------------------------

# what may differ when a run is resumed; anything else would change its course (more --steps stretch a decaying rate)
FREE_TO_CHANGE = {"steps", "save_steps", "log_steps", "preview_steps", "preview_prompt", "save_bin", "score", "device"}
FREE_TO_CHANGE |= {"output_dir", "resume", "overwrite", "gradient_checkpointing", "early_stop", "tensorboard"}
FREE_TO_CHANGE |= {"images"}  # the folder may have moved: the pictures themselves are compared
WORD_FILES = ["learned_embeds.safetensors", "learned_embeds.bin"]
RUN_FILES = ["state.pt", *WORD_FILES, "log.jsonl", "preview.png", "curves.png", "scores.json", "config.json"]

FLAG = argparse.BooleanOptionalAction  # --flag and --no-flag: a resumed run can switch it off again


class Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):  # no "(default: None)"
        return action.help if action.default is None else super()._get_help_string(action)


def build_parser():
    parser = argparse.ArgumentParser(
        description="Teach a frozen Stable Diffusion a new word.", allow_abbrev=False, formatter_class=Help
    )
    concept = str(Path(mu.DEFAULT_MODEL) / "concepts" / "kat")
    add = parser.add_argument_group("the model and the word").add_argument
    add(
        "--model",
        "--pretrained_model_name_or_path",
        default=mu.DEFAULT_MODEL,
        help="folder or Hub id, diffusers layout",
    )
    add("--revision", help="of a Hub id")
    add("--variant", help="of the weight files, such as fp16")
    add("--images", "--train_data_dir", default=concept, help="folder of pictures, 3 to 9 are usual")
    add("--placeholder_token", default="<kat>", help="the new word")
    add("--initializer_token", default="cat", help="the word it begins as")
    add("--learnable_property", choices=["object", "style"], default="object", help="what the word means")
    add("--num_vectors", type=int, default=1, help="rows of the table that the word is given")
    add("--resolution", type=int, help="pixels, default: the model's own")
    add("--center_crop", action="store_true", help="always done, accepted for old notes: pictures are never squashed")
    add = parser.add_argument_group("learning").add_argument
    add("--steps", "--max_train_steps", type=int, default=250, help="steps of the optimizer")
    add("--batch_size", "--train_batch_size", type=int, default=8, help="pictures at a time")
    add("--grad_accum", "--gradient_accumulation_steps", type=int, default=1, help="batches in a step")
    add("--lr", "--learning_rate", type=float, default=2e-2, help="learning rate (with Stable Diffusion 1 and 2: 2e-3)")
    add("--scale_lr", action="store_true", help="multiply --lr by pictures a step")
    add("--lr_scheduler", choices=["constant", "linear", "cosine"], default="cosine", help="after the warm-up")
    add("--lr_warmup_steps", type=int, default=10, help="steps to reach --lr in")
    add(
        "--timestep_sampling",
        choices=["cubic", "uniform"],
        default="cubic",
        help="cubic: mostly noisy ones, which teach the word sooner; uniform: the paper's",
    )
    add(
        "--early_stop",
        action=FLAG,
        default=False,
        help="end before --steps once the loss of the fixed batch has settled",
    )
    add("--seed", type=int, default=0, help="of all that is random")
    add = parser.add_argument_group("the machine").add_argument
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to compute")
    add(
        "--precision",
        "--mixed_precision",
        choices=["auto", "no", "fp32", "fp16", "bf16"],
        default="auto",
        help="of the frozen weights",
    )
    add("--gradient_checkpointing", action=FLAG, default=False, help="less memory, slower")
    add("--compile", action="store_true", help="compile the UNet: minutes at first, then faster steps")
    add = parser.add_argument_group("the run's folder").add_argument
    add("--output_dir", "--out", help="default: the next free of runs/<word>, runs/<word>-2, ...")
    add("--overwrite", action="store_true", help="begin anew in an --output_dir that holds a run")
    add(
        "--resume",
        "--resume_from_checkpoint",
        nargs="?",
        const="latest",
        help="go on with a run: this folder, --output_dir or the newest",
    )
    add("--save_steps", "--checkpointing_steps", type=int, default=100, help="between checkpoints")
    add("--save_bin", action=FLAG, default=False, help="write learned_embeds.bin too")
    add("--log_steps", type=int, default=20, help="between lines of log.jsonl")
    add("--tensorboard", action=FLAG, default=False, help="log for TensorBoard too")
    add("--preview_steps", "--validation_steps", type=int, default=100, help="between previews, 0 for none")
    add("--preview_prompt", "--validation_prompt", help="default: a photo of the word")
    add("--score", action=FLAG, default=True, help="at the end, if the model has a clip/")
    return parser


def parse_options(argv=None):
    """Options from the command line; a resumed run takes its own where none are given. UserError if they cannot be."""
    parser = build_parser()
    args = parser.parse_args(argv)
    for name in ("num_vectors", "steps", "batch_size", "grad_accum", "save_steps", "log_steps"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be 1 or more.")
    for name in ("preview_steps", "lr_warmup_steps", "seed"):
        if not 0 <= getattr(args, name) < 2**63:
            raise UserError(f"--{name} {getattr(args, name)}: must be 0 or more (and below 2**63).")
    if not 0 < args.lr < math.inf:
        raise UserError(f"--lr {args.lr}: must be above 0, and finite.")
    if args.resume and args.overwrite:
        raise UserError("--resume goes on with a run, --overwrite begins it anew: choose one.")
    if args.resolution is not None and args.resolution < 1:
        raise UserError(f"--resolution {args.resolution}: must be 1 or more.")
    if args.tensorboard:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise UserError("--tensorboard is not installed: pip install tensorboard, or leave it out.") from error
    if args.resume:
        given = any(word.startswith("--placeholder_token") for word in (sys.argv[1:] if argv is None else argv))
        folder = args.output_dir or (args.resume if args.resume != "latest" else None)
        if folder is None:
            begun = sorted(Path("runs").glob("*/config.json"), key=lambda path: path.stat().st_mtime)
            words = {path: mu.read_config(path.parent).get("placeholder_token") for path in begun}
            begun = [path for path, word in words.items() if word and (word == args.placeholder_token or not given)]
            if not begun:
                raise UserError("--resume: there is no such run in runs/; name its folder with --output_dir.")
            folder = str(begun[-1].parent)
        config = mu.read_config(folder)
        if not config or Path(folder, "learned_embeds.safetensors").exists():
            load_state(Path(folder, "state.pt"))
        if not config:
            raise UserError(f"--resume: {folder} has no config.json, the options it began with; begin another run.")
        parser.set_defaults(**config)
        args = parser.parse_args(argv)
        args.output_dir = folder
        args.precision = {"auto": config.get("precision"), "no": "fp32"}.get(args.precision, args.precision)
        changed = [k for k, v in config.items() if k not in FREE_TO_CHANGE and getattr(args, k, v) != v]
        if changed:
            said = ", ".join(f"--{k} was {config[k]!r} and is now {getattr(args, k)!r}" for k in changed)
            raise UserError(f"--resume would change the course of {folder}: {said}; leave it or begin another run.")
    elif args.output_dir and not args.overwrite:
        held = [name for name in RUN_FILES if Path(args.output_dir, name).exists()]
        is_run = bool(mu.read_config(args.output_dir))
        nothing_saved = is_run and not {"state.pt", *WORD_FILES} & {*held}  # it failed, or was killed
        if held and not nothing_saved:
            what = "a run" if is_run else f"'{held[0]}'"
            also = " --resume or" if is_run else ""
            raise UserError(f"--output_dir {args.output_dir} holds {what}: add{also} --overwrite or name another.")
    return args


def main(argv=None):
    try:
        train(parse_options(argv))
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
