"""Seconds of a training step, side by side: a benchmark, not a test.

python tests/bench.py                                   # the bundled model
python tests/bench.py --model FOLDER --batch_size 1     # any other
python tests/bench.py --rounds 5 --precision bf16

All are measured in turns, so that a busy machine slows them alike. Each figure is a median.

    ours         the step of train.py: draw, loss, backward pass, clip, AdamW
    bare         the forward and backward pass of text encoder and UNet alone: a lower bound
    classical    images encoded at each step, the whole table trained with AdamW, then all other rows restored
"""

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import diffusers  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

import data  # noqa: E402
import model_utils as mu  # noqa: E402
import train  # noqa: E402


def prepare(args, device):
    """A model with the new token <new>, its learned rows, the data set of the kat."""
    components = mu.load_components(args.model, mu.DTYPES[args.precision], device=device)
    learned_rows = mu.add_tokens(components, [("<new>", mu.initial_rows(components, "cat", 1, 0))], "--token")
    folder = Path(mu.DEFAULT_MODEL, "concepts", "kat")
    return components, learned_rows, data.load_dataset(components, folder, components.resolution, "<new>")


def our_step(args, device):
    """A function that makes the step of train.py's loop."""
    components, learned_rows, dataset = prepare(args, device)
    optimizer = torch.optim.AdamW([learned_rows], lr=1e-3, weight_decay=0.0, fused=True)
    options = train.parse_options(["--batch_size", str(args.batch_size), "--lr", "1e-3"])

    def step(i):
        batch = train.draw_batch(dataset, args.batch_size, components.schedule, i, options)
        (train.inversion_loss(components, *train.part_of(batch, 0, 1, device)).sum() / args.batch_size).backward()
        torch.nn.utils.clip_grad_norm_([learned_rows], 1.0)
        optimizer.param_groups[0]["lr"] = train.learning_rate(i, options)
        optimizer.step()
        optimizer.zero_grad()

    return step


def bare_step(args, device):
    """A function that makes the forward and backward pass and nothing else."""
    components, learned_rows, dataset = prepare(args, device)
    options = train.parse_options(["--batch_size", str(args.batch_size)])
    batch = train.draw_batch(dataset, args.batch_size, components.schedule, 0, options)
    latents, _, timesteps, token_ids, _ = (tensor.to(device) for tensor in batch)
    latents = latents.to(components.unet.dtype)

    def step(i):
        text_embeddings = components.text_encoder(token_ids).last_hidden_state
        components.unet(latents, timesteps, text_embeddings).sample.float().square().mean().backward()
        learned_rows.grad = None

    return step


def classical_step(args, device):
    """A function that makes a step of the usual scripts, in as few lines as possible."""
    components, _, dataset = prepare(args, device)
    (token_id,) = components.placeholders["<new>"]
    old = components.text_encoder.get_input_embeddings().weight.float()
    embedding = torch.nn.Embedding(len(components.tokenizer), old.shape[1], device=device)  # fp32: it is trained
    embedding.weight.data[: len(old)] = old
    components.text_encoder.float().set_input_embeddings(embedding)  # and so is the whole text encoder
    original, others = embedding.weight.detach().clone(), torch.arange(len(embedding.weight)) != token_id
    optimizer = torch.optim.AdamW(embedding.parameters(), lr=1e-3)
    vae, unet = components.vae.to(device), components.unet
    images, token_ids = dataset.images.to(device), dataset.token_ids.flatten(0, 1).to(device)

    def step(i):
        picks = torch.randint(len(images), (args.batch_size,))
        captions = token_ids[torch.randint(len(token_ids), (args.batch_size,))]
        with torch.no_grad():
            latents = vae.encode(images[picks]).latent_dist.sample() * vae.config.scaling_factor
        noise, timesteps = torch.randn_like(latents), torch.randint(1000, (args.batch_size,), device=device)
        text_embeddings = components.text_encoder(captions).last_hidden_state.to(unet.dtype)
        noisy_latents = components.schedule.add_noise(latents, noise, timesteps).to(unet.dtype)
        noise_pred = unet(noisy_latents, timesteps, text_embeddings).sample.float()
        (noise_pred - noise).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        embedding.weight.data[others] = original[others]

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=mu.DEFAULT_MODEL)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--precision", default="fp32", choices=mu.DTYPES)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    device = mu.choose_device(args.device)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, diffusers {diffusers.__version__}"
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {device}, {versions}")
    steps = {"ours": our_step(args, device), "bare": bare_step(args, device), "classical": classical_step(args, device)}
    seconds = {name: [] for name in steps}
    for i in range(args.rounds + 2):  # two to warm up
        for name, step in steps.items():
            start = time.perf_counter()
            step(i)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times[2:]) for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"{name:12}{1000 * median:10.1f} ms   {median / medians['bare']:.2f} x bare")


if __name__ == "__main__":
    main()
