r"""Textual inversion (Gal et al. 2022, arXiv:2208.01618): teach a frozen Stable Diffusion a token from a few images.

    python train.py                         # on the bundled model, without a network: half a minute
    python train.py --model CompVis/stable-diffusion-v1-4 --images my_cat --placeholder_token "<kat>" \
        --initializer_token cat             # on a real checkpoint

All that is learned is the new token's row (or rows) in the text encoder's token table. Read this file from the top down
to the loop in `train`, then NoiseSchedule and LearnedEmbedding in model_utils.py, and draw_examples in data.py.
"""

import io
import json
import math
import os
import sys
import time
from argparse import BooleanOptionalAction
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

import data
import model_utils as mu
import sample
from model_utils import UserError

# --- The method -------------------------------------------------------------------------------------------------------


def inversion_loss(components, latents, noise, timesteps, token_ids, mask):
    """The whole objective: encode, add noise, predict, compare -> the loss of each image [B]. Edit this to try another.

    latents, noise [B, 4, h, w]; timesteps [B]; token_ids [B, L], captions with the new token; mask [B, 1, h, w], how
    much each latent pixel counts: 0 where the image is transparent. Equation 2 of Gal et al. 2022, the mean squared
    error of DDPM (Ho et al. 2020, equation 14).

    Nothing here may be random: a draw would have no seed, and so break resuming and the evaluation loss. Noise and
    captions are drawn in `data.draw_examples`; a limit on the rows goes into `train`, after `scaler.step`.
    """
    unet, schedule = components.unet, components.schedule
    text_embeddings = mu.encode(components, token_ids)  # [B, L, dim], through which the gradient reaches the new token
    noisy_latents = schedule.add_noise(latents, noise, timesteps)  # [B, 4, h, w]
    noise_pred = unet(noisy_latents.to(unet.dtype), timesteps, text_embeddings).sample.float()  # [B, 4, h, w]
    target = schedule.target(latents, noise, timesteps)  # the noise itself, or v of a v-prediction model
    error = (noise_pred - target).square()  # [B, 4, h, w]
    return (mask * error).mean(dim=(1, 2, 3)) / mask.mean(dim=(1, 2, 3))  # [B], the mean over what counts


def sample_timesteps(batch_size, num_train_timesteps, generator, sampling):
    """Timesteps [B], stratified: one from each of B equally likely intervals, so that they cover the whole range.

    "uniform": as in the paper. "cubic": t = 1 - u^3 favours high noise levels (Mou et al. 2023, arXiv:2302.08453).
    "mixed": every other example cubic, so that neither the layout of an image nor its details are neglected.
    """
    u = (torch.arange(batch_size) + torch.rand(batch_size, generator=generator)) / batch_size  # in [0, 1)
    is_cubic = torch.arange(batch_size) % 2 == 1 if sampling == "mixed" else torch.tensor(sampling == "cubic")
    t = torch.where(is_cubic, 1 - u**3, u)
    return (t * num_train_timesteps).long().clamp(max=num_train_timesteps - 1)  # t can be 1


def learning_rate(step, args):
    """The learning rate of step 0, 1, ... --steps - 1: linear warm-up (not with "constant"), then the schedule."""
    peak = args.lr * (args.batch_size * args.grad_accum if args.scale_lr else 1)
    if step < args.lr_warmup_steps and args.lr_scheduler != "constant":
        return peak * (step + 1) / args.lr_warmup_steps
    progress = (step - args.lr_warmup_steps) / max(1, args.steps - args.lr_warmup_steps)
    factor = {"linear": 1 - progress, "cosine": 0.5 + 0.5 * math.cos(math.pi * progress)}
    return peak * factor.get(args.lr_scheduler, 1.0)


def step_generator(seed, step):
    """All randomness of a step is seeded by (seed, step), so resuming needs no saved RNG state."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1)[0]))


# --- Training ---------------------------------------------------------------------------------------------------------

EVAL_SEED = 2**32  # in place of a step's number, and larger than any: seeds the evaluation batch


def draw_batch(dataset, batch_size, schedule, step, args):
    """All that is random in a step (its number, or EVAL_SEED), on the CPU: the examples that inversion_loss takes."""
    generator = step_generator(args.seed, step)
    latents, noise, token_ids, mask = data.draw_examples(dataset, batch_size, generator)
    timesteps = sample_timesteps(batch_size, schedule.num_train_timesteps, generator, args.timestep_sampling)
    return latents, noise, timesteps, token_ids, mask


def part_of(batch, index, count, device):
    """One of `count` parts of a batch, on the device: every count-th example, so timesteps from the whole range."""
    part = [tensor[index::count].contiguous() for tensor in batch]
    on_cuda = device.type == "cuda"  # a copy from pinned memory does not wait for the GPU
    return [(tensor.pin_memory() if on_cuda else tensor).to(device, non_blocking=on_cuda) for tensor in part]


@torch.no_grad()
def measure(components, eval_batch, learned_rows, init_rows):
    """Evaluation loss of the rows that components hold; norm and cosine of learned_rows, the same. For the log."""
    eval_loss = inversion_loss(components, *eval_batch).mean()
    norm, cosine = learned_rows.norm(dim=1).mean(), torch.cosine_similarity(learned_rows, init_rows).mean()
    return {"eval_loss": eval_loss.item(), "embedding_norm": norm.item(), "cosine_to_init": cosine.item()}


def join_processes(device):
    """Under torchrun, join the other processes of the run -> rank, number of processes; without it 0, 1."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size()


def train(args):
    """Learn the token -> the run's folder. args: of parse_options; what is still None is filled in here."""
    # 1. The frozen model with the new token's rows, which start as the initializer's, and the data
    device = mu.choose_device(args.device)
    rank, processes = join_processes(device)
    dtype = mu.DTYPES[args.precision]
    components = mu.load_components(args.model, dtype, args.revision, args.variant, device)
    if args.gradient_checkpointing:
        components.unet.enable_gradient_checkpointing()
    rows = mu.initial_rows(components, args.initializer_token, args.num_vectors, args.seed)  # [n, dim]
    args.num_vectors = len(rows)
    if args.lr is None:  # --recipe fast: AdamW moves an entry by about lr a step; here the rms of the token table
        args.lr = components.text_encoder.get_input_embeddings().weight.float().square().mean().sqrt().item()
    learned_rows = mu.add_tokens(components, [(args.placeholder_token, rows)], "--placeholder_token")  # all that learns
    init_rows = learned_rows.detach().clone()
    args.resolution = args.resolution or components.resolution
    if args.resolution % components.pixels_per_latent:
        raise UserError(f"--resolution {args.resolution}: take a multiple of {components.pixels_per_latent} pixels.")
    dataset = data.load_dataset(
        components, args.images, args.resolution, args.placeholder_token, args.learnable_property, args.templates
    )
    # For the steps alone: without a gradient (evaluation, previews) the UNet would be compiled once more
    compiled = components._replace(unet=torch.compile(components.unet)) if args.compile else components

    # 2. The optimizer, and the run's folder, from which a resumed run is restored
    # Another optimizer is this one line; fused, AdamW can skip a step without waiting for the GPU (not so on MPS)
    optimizer = torch.optim.AdamW([learned_rows], lr=args.lr, weight_decay=0.0, fused=device.type != "mps")
    # fp16: the loss is scaled up so that small gradients do not vanish
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    scaler.scale(torch.zeros((), device=device))  # makes its scale; a process that has no part of a step needs it too
    name = "".join(c for c in args.placeholder_token if c.isalnum() or c in "-_") or "token"
    folder = Path(args.output_dir) if args.output_dir else sample.next_free("runs", sample.numbered(name))
    first_step, log = restore(folder, learned_rows, optimizer, scaler) if args.resume else (0, [])
    images_per_step = args.batch_size * args.grad_accum  # however many processes
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        args.output_dir = str(folder)
        mu.write_whole(folder / "config.json", json.dumps(vars(args), indent=1).encode())
        print(f"run        {folder}, {args.precision} on {device}, steps {first_step} to {args.steps}")
        print(f"training   {args.placeholder_token} from {args.initializer_token!r}, {len(dataset.images)} images")
        if args.preview_steps and first_step == 0:
            save_preview(components, dataset, folder, 0, args)
        if processes > images_per_step:
            print(f"note: {processes} processes, but a step has only {images_per_step} images", file=sys.stderr)

    # 3. The loop. A step is cut into parts of batch_size images or fewer, which the processes share
    num_parts = processes * math.ceil(args.grad_accum / processes)
    eval_draw = draw_batch(dataset, max(4, args.batch_size), components.schedule, EVAL_SEED, args)
    eval_batch = part_of(eval_draw, 0, 1, device)
    log = log or [{"step": 0} | measure(components, eval_batch, learned_rows, init_rows)]
    intervals = (args.log_steps, args.save_steps, args.preview_steps)
    loss_sum = torch.zeros((), device=device)
    learned_rows.grad = torch.zeros_like(learned_rows)  # a tensor also in a process that has no part of a step
    # disable=None: hidden unless stderr is a terminal
    bar = tqdm(total=args.steps, initial=first_step, unit="step", disable=rank > 0 or None)
    mu.peak_memory(device)  # forget what encoding the images took
    memory, seconds, start = "", 0.0, time.perf_counter()
    for step in range(first_step, args.steps):
        # Draw all that is random for the whole step, on the CPU. Then the step goes through in parts that fit in memory
        batch = draw_batch(dataset, images_per_step, components.schedule, step, args)
        for index in range(rank, min(num_parts, images_per_step), processes):
            losses = inversion_loss(compiled, *part_of(batch, index, num_parts, device))  # [B]
            # A term on the rows is one line: losses = losses + 0.01 * (learned_rows - init_rows).square().sum()
            # The gradients of all parts add up to that of the mean loss of the step's images
            scaler.scale(losses.sum() / images_per_step).backward()
            loss_sum += losses.detach().sum()
        if processes > 1:
            dist.all_reduce(learned_rows.grad)  # the sum over the processes

        # Unscale before clipping, so that the norm is the gradient's own. In fp16 a step that overflowed is skipped
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_([learned_rows], 1.0)
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step, args)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=False)

        done = step + 1
        bar.update()
        log_step, save_step, preview_step = (n > 0 and (done % n == 0 or done == args.steps) for n in intervals)
        if not (log_step or save_step or preview_step):
            continue

        # Now and then: log, preview, checkpoint; each adds to the log. The only place that waits for the device
        if processes > 1:
            dist.all_reduce(loss_sum)
        loss = loss_sum.item() / ((done - log[-1]["step"]) * images_per_step)
        seconds += time.perf_counter() - start
        memory = memory or mu.peak_memory(device)  # of the steps alone
        entry = {"step": done, "loss": loss, "lr": lr, "grad_norm": grad_norm.item()}
        entry |= measure(components, eval_batch, learned_rows, init_rows)
        if not math.isfinite(entry["eval_loss"]):  # nor is it if the rows are not finite: stop before anything is saved
            remedy = "" if args.precision == "fp32" else "--precision fp32 or "
            raise UserError(f"the loss is not finite at step {done}: try {remedy}an --lr below {args.lr}.")
        log.append({name: value for name, value in entry.items() if math.isfinite(value)})  # JSON knows no NaN
        if rank == 0:
            save_log(folder, log, bar)
            if preview_step:
                save_preview(components, dataset, folder, done, args)
            if save_step:
                save(folder, done, args, components.placeholders, learned_rows, optimizer, scaler)
        loss_sum.zero_()
        start = time.perf_counter()
    bar.close()

    # 4. How well it went
    if processes > 1:
        dist.destroy_process_group()
    if rank > 0:
        return folder
    if args.score and Path(args.model, "clip").is_dir():
        settings = sample.sampling_settings(args.model, {"batch_size": 32})
        sample.score_run(components, folder / "scores.json", vars(args), num_images=24, seed=args.seed, **settings)
    if args.recipe == "fast" and log[-1]["eval_loss"] > 0.98 * log[0]["eval_loss"]:  # it falls by 4 to 13 % there
        print("note: eval_loss has hardly fallen; if images show it too: more --steps, another --seed", file=sys.stderr)
    prompt = sample.EDITING_PROMPTS[args.learnable_property][-1].format(args.placeholder_token)
    print(f"embedding  {folder / 'learned_embeds.safetensors'}")
    print(f"speed      {seconds / (args.steps - first_step):.3f} s a step{memory}")
    print(f'try next   python sample.py --embedding "{folder}" --prompt "{prompt}"')
    return folder


# --- The run's folder -------------------------------------------------------------------------------------------------

CURVES = ["eval_loss", "loss", "grad_norm", "embedding_norm", "cosine_to_init"]  # of log.jsonl


def save(folder, step, args, placeholders, learned_rows, optimizer, scaler):
    """Write the embedding, then the checkpoint: after a kill in between, steps since the last one are repeated."""
    rows_of = learned_rows.split([len(token_ids) for token_ids in placeholders.values()])  # of each token
    model = Path(args.model).name if Path(args.model).exists() else args.model  # the user's folders are private
    kept = [f"learned_embeds-steps-{step}.safetensors"] if step % args.save_steps == 0 else []
    for name in [*kept, "learned_embeds.safetensors"]:
        mu.save_embedding(folder / name, zip(placeholders, rows_of, strict=True), model)
    state = {"step": step, "rows": learned_rows.data, "optimizer": optimizer.state_dict()}
    buffer = io.BytesIO()
    torch.save(state | {"scaler": scaler.state_dict()}, buffer)
    mu.write_whole(folder / "state.pt", buffer.getvalue())


def restore(folder, learned_rows, optimizer, scaler):
    """Restore what learns from a run's checkpoint -> the number of steps done, the log up to there."""
    if not (folder / "state.pt").exists():  # the run ended before its first save
        return 0, []
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    learned_rows.data.copy_(state["rows"].view_as(learned_rows))  # not broadcast
    # A pickle holds equal strings once if they are one object: interned, the next checkpoint has the same bytes
    moments = state["optimizer"]["state"].items()
    interned = {i: {sys.intern(key): value for key, value in x.items()} for i, x in moments}
    optimizer.load_state_dict(state["optimizer"] | {"state": interned})
    scaler.load_state_dict(state["scaler"])
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return state["step"], [entry for entry in log if entry["step"] <= state["step"]]


def save_log(folder, log, bar):
    """Write log.jsonl and curves.png, and print the last entry above the progress bar."""
    mu.write_whole(folder / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in log).encode())
    points = {name: [(entry["step"], entry[name]) for entry in log if name in entry] for name in CURVES}
    sample.plot_curves(points, folder / "curves.png")
    text = ", ".join(f"{name} {log[-1].get(name, math.nan):.4f}" for name in ("loss", "eval_loss", "embedding_norm"))
    bar.write(f"step {log[-1]['step']}/{bar.total}: {text}", file=sys.stderr)


def save_preview(components, dataset, folder, step, args):
    """Add images of the token as it is now to preview.png, below those of earlier steps. A failure is only a note."""
    path = folder / "preview.png"
    prompt = args.preview_prompt or sample.PHOTO_PROMPT[args.learnable_property].format(args.placeholder_token)
    settings = sample.sampling_settings(args.model, {"height": args.resolution, "width": args.resolution})
    seeds = range(args.seed, args.seed + 4)
    try:
        above = Image.open(path) if path.exists() else sample.image_grid(mu.to_pil(dataset.images[:4]), 4, ["training"])
        if int(above.info.get("step", -1)) >= step:  # made before the run was interrupted
            return
        images = list(sample.generate(components, [prompt] * 4, seeds, progress=False, **settings))
        below = sample.image_grid(images, 4, [f"step {step}"])
        sheet = Image.new("RGB", (below.width, above.height + below.height), "white")
        sheet.paste(above, (0, 0))
        sheet.paste(below, (0, above.height))
        sample.save_png(sheet, path, {"step": step})
    except Exception as error:  # no memory left, a full disk
        components.vae.to("cpu")  # it may have failed on the device
        print(f"note: no preview of step {step} ({mu.reason(error)})", file=sys.stderr)


# --- Options ----------------------------------------------------------------------------------------------------------

# Two sets of defaults; an option that is given overrides its entry. The bundled model's folder names "fast", which was
# found on it; "notebook" is what most people have used with Stable Diffusion 1 and 2 (Hugging Face's notebook).
RECIPES = {
    "notebook": {"steps": 2000, "batch_size": 4, "lr": 2e-3, "lr_scheduler": "constant", "lr_warmup_steps": 0,
                 "timestep_sampling": "uniform"},
    "fast": {"steps": 175, "batch_size": 8, "lr": None, "lr_scheduler": "cosine", "lr_warmup_steps": 30,
             "timestep_sampling": "mixed"},  # lr: from the vocabulary, see train
}  # fmt: skip

# What may change when a run is resumed; all else would change its course. More --steps stretch the schedule.
FREE_TO_CHANGE = """steps save_steps log_steps preview_steps preview_prompt score compile gradient_checkpointing device
output_dir resume""".split()
# What a run writes: a folder that holds any of it is left alone
RUN_FILES = ["config.json", "log.jsonl", "learned_embeds*", "state.pt", "scores*.json", "curves.png", "preview.png"]


def build_parser():
    parser = mu.make_parser("Teach a frozen Stable Diffusion a new token from a few images (textual inversion).")
    flag = {"action": BooleanOptionalAction}  # --flag and --no-flag: a resumed run can switch it off again
    # fmt: off
    add = parser.add_argument_group("model and concept").add_argument
    add("--model", "--pretrained_model_name_or_path", type=mu.full_path, default=mu.DEFAULT_MODEL,
        help="folder or Hub id")
    add("--revision", help="revision of a Hub id")
    add("--variant", help="variant of the weight files, such as fp16")
    add("--images", "--train_data_dir", type=mu.full_path, help="folder of images, or one (default: the bundled kat)")
    add("--templates", type=mu.full_path, help="file of captions with {} for the token (default: built in)")
    add("--placeholder_token", default="<kat>", help="the new token (default: <kat>)")
    add("--initializer_token", help="word, embedding file or run folder to start as (default: cat)")
    add("--learnable_property", choices=["object", "style"], default="object", help="what it is (default: object)")
    add("--num_vectors", type=mu.one_or_more, help="vectors of the token (1; those of an embedding that it starts as)")
    add("--resolution", type=mu.one_or_more, help="size of the training images (default: the model's own)")
    add = parser.add_argument_group("optimization (defaults by --recipe)").add_argument
    add("--recipe", choices=RECIPES, help="set of defaults (default: fast for the bundled model, else notebook)")
    add("--steps", "--max_train_steps", type=mu.one_or_more, help="optimizer steps (notebook 2000, fast 175)")
    add("--batch_size", "--train_batch_size", type=mu.one_or_more, help="most images per pass (notebook 4, fast 8)")
    add("--grad_accum", "--gradient_accumulation_steps", type=mu.one_or_more, default=1,
        help="images per step, in units of --batch_size (1)")
    add("--lr", "--learning_rate", type=float, help="peak learning rate (notebook 2e-3, fast: the vocabulary's rms)")
    add("--scale_lr", **flag, default=False, help="multiply the learning rate by the images per step")
    add("--lr_scheduler", choices=["constant", "constant_with_warmup", "linear", "cosine"],
        help="learning rate schedule (notebook constant, fast cosine)")
    add("--lr_warmup_steps", type=int, help="steps of linear warm-up (notebook 0, fast 30)")
    add("--timestep_sampling", choices=["uniform", "cubic", "mixed"],
        help="cubic: higher noise, mixed: half of each (notebook uniform, fast mixed)")
    add("--seed", type=int, default=0, help="random seed (0)")
    add = parser.add_argument_group("hardware").add_argument
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="device to train on")
    add("--precision", "--mixed_precision", choices=mu.PRECISIONS, default="auto", help="precision of the weights")
    add("--gradient_checkpointing", **flag, default=False, help="save memory, with a slower backward pass")
    add("--compile", **flag, default=False, help="compile the UNet: minutes for the first step, then faster ones")
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", "--out", help="folder of the run (default: runs/TOKEN, then runs/TOKEN-2, ...)")
    add("--resume", "--resume_from_checkpoint", nargs="?", const="latest", metavar="FOLDER",
        help="continue the run in this folder, in --output_dir, or the newest one")
    add("--save_steps", "--checkpointing_steps", type=mu.one_or_more, default=100, help="steps between saves (100)")
    add("--log_steps", type=mu.one_or_more, default=20, help="steps between lines of log.jsonl (20)")
    add("--preview_steps", "--validation_steps", type=int, default=100, help="steps between previews (100; 0: none)")
    add("--preview_prompt", "--validation_prompt", help="prompt of the previews (default: a photo of the token)")
    add("--score", **flag, default=True, help="compute CLIP scores at the end, if the model has a clip/")
    # fmt: on
    return parser


def parse_options(argv=None):
    """Command line -> options. UserError if they do not fit together, or to the run that they resume."""
    parser = build_parser()
    args = parser.parse_args(argv)
    config = {}
    if args.resume:  # the run's options are the defaults of the command line
        folder = Path(args.output_dir or (mu.newest_run("config.json") if args.resume == "latest" else args.resume))
        config = mu.read_json(folder / "config.json")
        if "placeholder_token" not in config:
            raise UserError(f"--resume: {folder} is no folder of a run; to start one, leave out --resume.")
        parser.set_defaults(**config)
        args = parser.parse_args(argv)
        args.output_dir = str(folder)
    elif args.output_dir and any(any(Path(args.output_dir).glob(name)) for name in RUN_FILES):
        raise UserError(f"--output_dir {args.output_dir} holds a run: add --resume, or name another folder.")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: take 0 or a larger number.")
    if args.images and not args.initializer_token:
        raise UserError("--images needs --initializer_token: the word for what they show, such as cat, to start from.")
    args.images = args.images or mu.full_path(Path(mu.DEFAULT_MODEL, "concepts", "kat"))
    if args.model == mu.DEFAULT_MODEL and not Path(args.images).is_relative_to(mu.DEFAULT_MODEL):
        print("note: the bundled model has never seen a photograph: name a --model that has", file=sys.stderr)
    args.initializer_token = args.initializer_token or "cat"
    if mu.is_embedding_path(args.initializer_token):
        args.initializer_token = mu.full_path(args.initializer_token)
    args.recipe = args.recipe or mu.read_json(Path(args.model, "model_index.json")).get("_recipe", "notebook")
    for name, value in RECIPES[args.recipe].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.precision = mu.choose_precision(args.precision, mu.choose_device(args.device))
    if args.resume:
        check_resumed(args, config)
    return args


def check_resumed(args, config):
    """UserError if an option differs from config and changes the run's course. Exits if the run is complete."""
    changed = [name for name, value in config.items() if name not in FREE_TO_CHANGE and getattr(args, name) != value]
    if changed:
        changes = ", ".join(f"--{name} was {config[name]!r} and is now {getattr(args, name)!r}" for name in changed)
        raise UserError(f"--resume would change the course of {args.output_dir}: {changes}; leave that, or start anew.")
    path = Path(args.output_dir, "state.pt")
    done = torch.load(path, map_location="cpu", weights_only=True)["step"] if path.exists() else 0
    if args.steps <= done:
        print(f"complete at step {done}: --steps N trains on")
        sys.exit()


def memory_advice(args):
    """What to change when memory has run out: what gives the same result first. A resumed run can change one thing."""
    smaller = args.batch_size // 2 if args.batch_size % 2 == 0 else 1
    same = f"--batch_size {smaller} --grad_accum {args.batch_size * args.grad_accum // smaller} (the same result)"
    helps = {same: args.batch_size > 1 and not args.resume, "--gradient_checkpointing": not args.gradient_checkpointing}
    helps |= {"--precision bf16": args.precision == "fp32" and not args.resume, "a smaller --resolution": True}
    return f"take {', then '.join(filter(helps.get, helps))}{' (in a new run)' if args.resume else ''}"


def main(argv=None):
    with mu.one_sentence_errors():
        args = parse_options(argv)
    with mu.one_sentence_errors(memory_advice(args)):
        try:
            train(args)
        except KeyboardInterrupt:
            print("\nstopped")
            if args.output_dir and Path(args.output_dir, "config.json").exists():
                print(f'python train.py --resume "{args.output_dir}" goes on from the last checkpoint')
            sys.exit(130)


if __name__ == "__main__":
    main()
