"""Speed and memory, side by side: a benchmark, not a test.

    python tests/bench.py                           # the bundled model
    python tests/bench.py --full_size               # Stable Diffusion 1.4's sizes, random weights, 512 px: 12 GB, long
    python tests/bench.py --full_size --memory      # train.py alone, and its memory

All rows are measured in one run, in turns, so that a busy machine slows all of them alike. Each is a median.

    ours              one step of the loop in train.py
    ours, mean        the mean of the same, with its share of the log (and its evaluation loss)
    passes alone      the forward and backward pass of text encoder and UNet: a lower bound without --compile
    diffusers' way    images encoded at each step, the whole table trained with AdamW, all other rows restored
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


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def resident_gb(name="VmRSS"):
    """Memory of this process now (VmRSS) or its peak (VmHWM), mapped file pages included."""
    lines = Path("/proc/self/status").read_text().splitlines() if Path("/proc/self/status").exists() else []
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith(name)), float("nan"))


class Stopwatch:
    """Collects seconds by row."""

    def __init__(self, device):
        self.device, self.seconds = device, {}

    def measure(self, row, function):
        synchronize(self.device)
        start = time.perf_counter()
        function()
        synchronize(self.device)
        self.seconds.setdefault(row, []).append(time.perf_counter() - start)


class DiffusersWay:
    """The step of diffusers' example script in as few lines as possible."""

    def __init__(self, args, device, dtype):
        self.tokenizer = mu.load_tokenizer(args.model)
        self.token_ids = mu.add_placeholder(self.tokenizer, "<new>")
        self.text_encoder = mu.load_text_encoder(args.model, device)  # fp32: its table is trained
        self.text_encoder.resize_token_embeddings(len(self.tokenizer), mean_resizing=False)
        self.table = self.text_encoder.get_input_embeddings().weight.requires_grad_(True)
        self.original = self.table.detach().clone()
        self.vae = mu.load_vae(args.model, device, dtype)
        unet = mu.load_unet(args.model, device, dtype)
        self.unet = unet.to(memory_format=torch.contiguous_format)  # as diffusers loads it
        self.device, self.dtype, self.batch_size = device, dtype, args.batch_size
        self.schedule = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
        self.optimizer = torch.optim.AdamW([self.table], lr=5e-4, weight_decay=1e-2)
        captions = [template.format("<new>") for template in data.OBJECT_TEMPLATES]
        self.template_ids = mu.tokenize(self.tokenizer, captions, {"<new>": self.token_ids})
        self.images = data.load_training_images(args.images, args.resolution or self.vae.config.sample_size)[0]

    def step(self):
        images = self.images[torch.randint(len(self.images), (self.batch_size,))].to(self.device, self.dtype)
        token_ids = self.template_ids[torch.randint(len(self.template_ids), (self.batch_size,))].to(self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            latents = self.vae.encode(images).latent_dist.sample() * self.vae.config.scaling_factor
            noise = torch.randn_like(latents)
            timesteps = torch.randint(1000, (self.batch_size,), device=self.device)
            noisy_latents = self.schedule.add_noise(latents, noise, timesteps)
            text_embeddings = self.text_encoder(token_ids).last_hidden_state
            noise_pred = self.unet(noisy_latents, timesteps, text_embeddings).sample
            loss = (noise_pred.float() - noise.float()).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        others = torch.ones(len(self.table), dtype=torch.bool)
        others[self.token_ids] = False
        with torch.no_grad():
            self.table[others] = self.original[others]


def passes_alone(text_encoder, unet, batch_size, device, dtype):
    """A function that makes the forward and backward pass of a step and nothing else."""
    embedding, size = text_encoder.get_input_embeddings(), unet.config.sample_size
    token_ids = torch.randint(100, (batch_size, text_encoder.config.max_position_embeddings), device=device)
    token_ids[:, 5] = len(embedding.weight)  # the placeholder token
    noisy_latents = torch.randn(batch_size, unet.config.in_channels, size, size, device=device)
    timesteps = torch.randint(1000, (batch_size,), device=device)

    def passes():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            noise_pred = unet(noisy_latents, timesteps, text_encoder(token_ids).last_hidden_state).sample
        noise_pred.float().square().mean().backward()
        embedding.learned_rows.grad = None

    return passes


def reset_peak():
    """The peak of memory begins anew -> the peak so far, of loading. NaN where the system cannot."""
    with contextlib.suppress(OSError):
        peak = resident_gb("VmHWM")
        Path("/proc/self/clear_refs").write_text("5")
        return peak
    return float("nan")


def bench_training(args, memory_only):
    """Run train.py and, before each of its steps, the others. -> {row: seconds}"""
    device = mu.choose_device(args.device)
    dtype = mu.choose_dtype(args.precision, device)
    watch, loaded, starts, resident = Stopwatch(device), {}, [], []
    load_unet, load_text_encoder, step_generator = mu.load_unet, mu.load_text_encoder, train.step_generator
    mu.load_unet = lambda *a: loaded.setdefault("unet", load_unet(*a))  # what train.py loads is shared
    mu.load_text_encoder = lambda *a: loaded.setdefault("text_encoder", load_text_encoder(*a))
    peak_of_loading = float("nan")

    def before_each_step(seed, step):
        nonlocal peak_of_loading
        if step == train.EVAL_SEED:
            return step_generator(seed, step)
        synchronize(device)
        if starts:
            watch.seconds.setdefault("ours", []).append(time.perf_counter() - starts[-1])
            resident.append(resident_gb())
        elif memory_only:
            peak_of_loading = reset_peak()
        else:
            mu.load_unet, mu.load_text_encoder = load_unet, load_text_encoder
            loaded["passes"] = passes_alone(loaded["text_encoder"], loaded["unet"], args.batch_size, device, dtype)
            loaded["diffusers"] = DiffusersWay(args, device, dtype)
        if not memory_only:
            watch.measure("passes alone", loaded["passes"])
            watch.measure("diffusers' way", loaded["diffusers"].step)
        starts.append(time.perf_counter())
        return step_generator(seed, step)

    train.step_generator = before_each_step
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            train.train(args)
    finally:
        train.step_generator, mu.load_unet, mu.load_text_encoder = step_generator, load_unet, load_text_encoder
    if memory_only:
        now, peak = statistics.median(resident), resident_gb("VmHWM")
        print(
            f"memory: {peak_of_loading:.2f} GB while loading, {now:.2f} GB between steps, {peak:.2f} GB at most in them"
        )
        if device.type == "cuda":
            print(f"memory of the GPU: {torch.cuda.max_memory_allocated() / 2**30:.2f} GB at most")
    seconds = {row: times[min(2, len(times) - 1) :] for row, times in watch.seconds.items()}  # without the warm-up
    return {row: statistics.median(times) for row, times in seconds.items()} | {
        "ours, mean": statistics.fmean(seconds["ours"])
    }


def bench_sampling(model, device, precision, rounds):
    """-> {row: seconds for four images}: sample.py and diffusers' pipeline with the same sampler and steps."""
    dtype = mu.choose_dtype(precision, device)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(model, safety_checker=None, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    config = {**pipeline.scheduler.config, "timestep_spacing": "linspace"}
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(config)
    pipeline.to(device, dtype)
    components, prompts = mu.load_components(model, device, dtype), ["a photo of a cat"] * 4
    watch = Stopwatch(device)
    for _ in range(rounds):
        watch.measure("ours", lambda: list(sample.generate(components, prompts, range(4), steps=25, progress=False)))
        watch.measure("diffusers", lambda: pipeline(prompts, num_inference_steps=25, guidance_scale=7.5))
    return {row: statistics.median(times[1:]) for row, times in watch.seconds.items()}


def make_full_size(folder, temporary):
    """-> model, images: Stable Diffusion 1.4's sizes with random weights, made unless it is there, and one image."""
    import full_size

    model, images = folder or Path(temporary, "model"), Path(temporary, "images")
    if not (model / "unet").exists():
        full_size.build(model)
    images.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    Image.fromarray(noise).save(images / "a.png")
    return str(model), str(images)


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--full_size", action="store_true", help="Stable Diffusion 1.4's sizes instead of the bundled model")
    add("--model_folder", type=Path, help="where --full_size keeps its 4 GB (default: made and deleted)")
    add("--precisions", nargs="+", default=["fp32", "bf16"])
    add("--rounds", type=int, help="steps of each kind (default: 60, with --full_size 6)")
    add("--device", default="auto")
    add("--memory", action="store_true", help="train.py alone, and its memory")
    add("--no_sampling", action="store_true", help="training alone")
    add("options", nargs="*", help="of train.py, after --")
    return parser


def main():
    args = build_parser().parse_args()
    rounds = max(2, args.rounds or (6 if args.full_size else 60))
    device = mu.choose_device(args.device)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} cores {platform.machine()}"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, diffusers {diffusers.__version__}"
    print(f"{machine}, {versions}")
    with tempfile.TemporaryDirectory() as temporary:
        model, images, batch_size = mu.DEFAULT_MODEL, str(Path(mu.DEFAULT_MODEL, "concepts", "kat")), 8
        if args.full_size:
            (model, images), batch_size = make_full_size(args.model_folder, temporary), 1
        for precision in args.precisions:
            argv = ["--model", model, "--images", images, "--initializer_token", "cat", "--precision", precision]
            argv += ["--device", args.device, "--steps", str(rounds), "--batch_size", str(batch_size)]
            argv += ["--preview_steps", "0", "--no-score", "--output_dir", str(Path(temporary, precision))]
            try:
                times = bench_training(train.parse_options([*argv, *args.options]), args.memory)
            except mu.UserError as error:  # a CPU without bf16
                print(f"training step  {precision:6}{error}", flush=True)
                continue
            for row, seconds in times.items():
                ratio = f"{seconds / times['passes alone']:6.2f} x passes alone" if "passes alone" in times else ""
                print(f"training step  {precision:6}{row:16}{1000 * seconds:10.1f} ms {ratio}", flush=True)
            if "diffusers' way" in times:
                ratio = times["diffusers' way"] / times["ours"]
                print(f"training step  {precision:6}diffusers' way / ours  {ratio:.2f}", flush=True)
        if not args.memory and not args.no_sampling:
            times = bench_sampling(model, device, args.precisions[0], 2 if args.full_size else 6)
            for row, seconds in times.items():
                print(f"four images    {args.precisions[0]:6}{row:16}{1000 * seconds:10.1f} ms", flush=True)


if __name__ == "__main__":
    main()
