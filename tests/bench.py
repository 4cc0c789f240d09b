"""How long a step takes, side by side: a benchmark, not a test.

    python tests/bench.py                           # the embedded model
    python tests/bench.py --full_size               # Stable Diffusion 1.4's sizes, random weights, 512 px: 12 GB, long
    python tests/bench.py --full_size --memory      # only train.py itself, and what it keeps in memory

All rows are measured in one run, in turns, so that a busy machine slows all of them alike; each is a median.

    ours        one round of train.py's own loop as it runs
    mean        its mean, which has its share of the log lines (each with the loss of the fixed batch) as well
    floor       the bare forward and backward of text encoder and UNet, which nothing can avoid
    classical   the picture encoded at each step, CLIP's whole table trained by AdamW, all but the new row copied back;
                with --precisions bf16 on a CPU that cannot multiply in it, one step alone: at full size it takes long
"""

import argparse
import contextlib
import io
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import diffusers  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402

import data  # noqa: E402
import model_utils as mu  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def resident_gb(name="VmRSS"):
    """Memory of this process now (VmRSS) or at most so far (VmHWM), mapped file pages included."""
    lines = Path("/proc/self/status").read_text().splitlines() if Path("/proc/self/status").exists() else []
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith(name)), float("nan"))


class Classical:
    """The step as diffusers' example script takes it, in its fewest lines."""

    def __init__(self, options, encoder, unet, device, dtype):
        self.tokenizer = mu.load_tokenizer(options.model)
        self.ids = mu.add_placeholder(self.tokenizer, "<classical>")
        self.encoder = encoder  # in fp32, for its table is trained
        self.encoder.resize_token_embeddings(len(self.tokenizer), mean_resizing=False)
        self.table = self.encoder.get_input_embeddings().weight.requires_grad_(True)
        self.original = self.table.detach().clone()
        self.vae = mu.load_vae(options.model, device, dtype)
        self.unet = unet.to(memory_format=torch.contiguous_format)  # as it is loaded
        self.device, self.dtype = device, dtype
        self.noising = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
        self.optimizer = torch.optim.AdamW([self.table], lr=5e-4, weight_decay=1e-2)
        sentences = [template.format("<classical>") for template in data.OBJECT_TEMPLATES]
        self.sentences = mu.tokenize(self.tokenizer, sentences, {"<classical>": self.ids})
        self.images, _ = data.load_images(options.images, options.resolution or self.vae.config.sample_size)
        self.batch_size = options.batch_size

    def step(self):
        picks = torch.randint(len(self.images), (self.batch_size,))
        images = self.images[picks].to(self.device, self.dtype)
        ids = self.sentences[torch.randint(len(self.sentences), (self.batch_size,))].to(self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            latents = self.vae.encode(images).latent_dist.sample() * self.vae.config.scaling_factor
            noise = torch.randn_like(latents)
            timesteps = torch.randint(1000, (self.batch_size,), device=self.device)
            noisy_latents = self.noising.add_noise(latents, noise, timesteps)
            text_embeddings = self.encoder(ids).last_hidden_state
            noise_pred = self.unet(noisy_latents, timesteps, text_embeddings).sample
            loss = (noise_pred.float() - noise.float()).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        others = torch.ones(len(self.table), dtype=torch.bool)
        others[self.ids] = False
        with torch.no_grad():
            self.table[others] = self.original[others]


def bench_training(options, memory_only):
    """Run train.py and, before each of its steps, the others. -> {row: seconds}"""
    times, kept, resident, peaks = {"ours": [], "floor": [], "classical": []}, {}, [], []
    loaders = {part: getattr(mu, part) for part in ("load_unet", "load_text_encoder")}
    for part, load in loaders.items():  # what train.py loads is shared with the others
        keep = lambda *a, load=load, part=part, **k: kept.setdefault(part, load(*a, **k))  # noqa: E731
        setattr(mu, part, keep)
    step_generator, started = train.step_generator, []
    device = mu.choose_device(options.device)
    dtype = mu.choose_dtype(options.precision, device)

    def timed(name, function):
        synchronise(device)
        begun = time.perf_counter()
        function()
        synchronise(device)
        times[name].append(time.perf_counter() - begun)

    def floor():
        unet, encoder = kept["load_unet"], kept["load_text_encoder"]
        with torch.autocast(device.type, dtype, enabled=mu.computes_in_half(dtype, device)):
            text_embeddings = encoder(kept["ids"]).last_hidden_state
            noise_pred = unet(kept["noisy_latents"], kept["timesteps"], text_embeddings).sample
        noise_pred.float().square().mean().backward()
        encoder.get_input_embeddings().learned_rows.grad = None

    def between_steps(seed, step):
        if step == train.FIXED:
            return step_generator(seed, step)
        synchronise(device)
        if started:
            times["ours"].append(time.perf_counter() - started[-1])
            resident.append(resident_gb())
        if not memory_only:
            if "ids" not in kept:
                unet = kept["load_unet"]
                b, c, s = options.batch_size, unet.config.in_channels, unet.config.sample_size
                table_size = kept["load_text_encoder"].get_input_embeddings().weight.shape[0]
                length = kept["load_text_encoder"].config.max_position_embeddings
                kept["ids"] = torch.randint(100, (b, length), device=device)
                kept["ids"][:, 5] = table_size  # the new word
                kept["noisy_latents"] = torch.randn(b, c, s, s, device=device)
                kept["timesteps"] = torch.randint(1000, (b,), device=device)
                widen_when_used, mu.widen_when_used = mu.widen_when_used, lambda module: None
                own = (
                    loaders["load_text_encoder"](options.model, device),
                    loaders["load_unet"](options.model, device, dtype),
                )
                kept["classical"] = Classical(options, *own, device, dtype)
                mu.widen_when_used = widen_when_used
            timed("floor", floor)
            minutes_long = dtype != torch.float32 and not mu.computes_in_half(dtype, device)
            if not (minutes_long and times["classical"]):
                timed("classical", kept["classical"].step)
        if memory_only and not started and Path("/proc/self/clear_refs").exists():
            with contextlib.suppress(OSError):
                peaks.append(resident_gb("VmHWM"))  # of loading
                Path("/proc/self/clear_refs").write_text("5")  # the highest mark begins anew
        started.append(time.perf_counter())
        return step_generator(seed, step)

    train.step_generator = between_steps
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            train.train(options)
    finally:
        train.step_generator = step_generator
        for part, load in loaders.items():
            setattr(mu, part, load)
    if memory_only:
        now, most, loading = statistics.median(resident), resident_gb("VmHWM"), max(peaks, default=float("nan"))
        print(
            f"resident memory: while stepping {now:.2f} GB, at most {most:.2f}; while loading at most {loading:.2f} GB"
        )
        if device.type == "cuda":
            print(f"memory of the card, at most: {torch.cuda.max_memory_allocated() / 2**30:.2f} GB")
    settled = {name: seconds[min(2, len(seconds) - 1) :] for name, seconds in times.items() if seconds}
    return {name: statistics.median(seconds) for name, seconds in settled.items()} | {
        "mean": statistics.fmean(settled["ours"])
    }


def bench_drawing(model, device, precision, rounds):
    """-> {row: seconds for four pictures}, sample.py and diffusers' pipeline with the same sampler and steps."""
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(model, safety_checker=None, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    config = {**pipeline.scheduler.config, "timestep_spacing": "linspace"}
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(config)
    dtype = mu.choose_dtype(precision, device)
    pipeline.to(device, dtype)
    text_encoder, unet = mu.load_text_encoder(model, device, dtype), mu.load_unet(model, device, dtype)
    parts = sample.Parts(
        mu.load_tokenizer(model), text_encoder, mu.load_vae(model, device), unet, mu.load_schedule(model).to(device), {}
    )
    times = {"ours": [], "diffusers": []}
    draw = {
        "ours": lambda: list(sample.draw(parts, ["a photo of a cat"] * 4, range(4), steps=25, progress=False)),
        "diffusers": lambda: pipeline(["a photo of a cat"] * 4, num_inference_steps=25, guidance_scale=7.5),
    }
    for _ in range(rounds):
        for name, function in draw.items():
            synchronise(device)
            begun = time.perf_counter()
            function()
            synchronise(device)
            times[name].append(time.perf_counter() - begun)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full_size", action="store_true", help="Stable Diffusion 1.4's sizes instead of mini_sd's")
    parser.add_argument(
        "--model_folder", type=Path, help="where --full_size keeps its 4 GB (default: made and deleted)"
    )
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, help="steps of each kind (default: 60, with --full_size 6)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--memory", action="store_true", help="only train.py itself")
    parser.add_argument("--no_drawing", action="store_true")
    parser.add_argument("options", nargs="*", help="of train.py, after --")
    args = parser.parse_args()
    rounds = max(2, args.rounds or (6 if args.full_size else 60))
    device = mu.choose_device(args.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} cores {platform.machine()}"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, diffusers {diffusers.__version__}"
    print(f"{name}, {versions}")
    with tempfile.TemporaryDirectory() as temporary:
        model, pictures, batch = mu.DEFAULT_MODEL, str(Path(mu.DEFAULT_MODEL, "concepts", "kat")), 8
        if args.full_size:
            import full_size

            model = args.model_folder or Path(temporary, "model")
            if not (model / "unet").exists():
                full_size.build(model)
            Path(temporary, "pictures").mkdir()
            noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
            Image.fromarray(noise).save(Path(temporary, "pictures", "a.png"))
            model, pictures, batch = str(model), str(Path(temporary, "pictures")), 1
        for precision in args.precisions:
            argv = ["--model", model, "--images", pictures, "--precision", precision, "--device", args.device]
            argv += ["--steps", str(rounds), "--batch_size", str(batch), "--preview_steps", "0", "--no-score"]
            argv += ["--output_dir", str(Path(temporary, precision)), *args.options]
            times = bench_training(train.parse_options(argv), args.memory)
            floor = times.get("floor")
            for row, seconds in times.items():
                against = f"{seconds / floor:6.2f} x floor" if floor else ""
                print(f"{'step':8}{precision:6}{row:12}{1000 * seconds:10.1f} ms {against}", flush=True)
            if "classical" in times:
                print(f"{'step':8}{precision:6}classical / ours  {times['classical'] / times['ours']:.2f}", flush=True)
        if not args.memory and not args.no_drawing:
            drawn = bench_drawing(model, device, args.precisions[0], 2 if args.full_size else 6)
            for row, seconds in drawn.items():
                print(f"{'draw 4':8}{args.precisions[0]:6}{row:12}{1000 * seconds:10.1f} ms", flush=True)


if __name__ == "__main__":
    main()
