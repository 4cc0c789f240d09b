"""Train mini_sd from scratch: a very small but complete Stable Diffusion, on the images of world.py.

    python -m mini_sd.make.pretrain                     # all stages in order
    python -m mini_sd.make.pretrain --stage unet --minutes 60
    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 -m mini_sd.make.pretrain --stage unet # 1.5 times as fast on two cores

Every stage saves its state in --work as it runs and resumes from it when started again. `export` writes the
half-precision weights in diffusers' folder layout; `together`, `scorer` and `decoder` train those further. Progress is
printed and logged to <work>/<stage>.jsonl; the vae stage also writes a contact sheet. `python -m mini_sd.eval.check`
measures the exported model.
"""

import argparse
import json
import math
import os
import random
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import model_utils as mu
import train
from mini_sd.make import world

HERE = Path(__file__).resolve().parent
TRAIN_SEED, TEST_SEED = 1, 2
TEXT_LENGTH = 32
CAPTIONS = 4  # of each image in stage_together
SCHEDULER = {  # Stable Diffusion 1.4's own
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.42.1", "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "prediction_type": "epsilon", "steps_offset": 1,
    "set_alpha_to_one": False, "skip_prk_steps": True, "timestep_spacing": "leading", "clip_sample": False,
}  # fmt: skip
ATTRIBUTES = {  # of a Picture, that a caption may name, and their values
    "kind": world.KINDS, "colour": list(world.COLOURS), "pattern": world.PATTERNS, "second": list(world.COLOURS),
    "accessory": [None, *world.ACCESSORIES], "accessory_colour": list(world.COLOURS), "tone": [None, *world.TONES],
    "background": [*world.BACKGROUNDS, *world.SCENES], "style": world.STYLES, "count": [1, 2],
}  # fmt: skip


# ------------------------------------------------------------------------------------------------- the models


def build_vae():
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=(16, 32, 64), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=64,
    )  # fmt: skip


def build_unet():
    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(48, 96, 128),
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        cross_attention_dim=128, attention_head_dim=4, norm_num_groups=8,
    )  # fmt: skip


def build_clip(tokenizer):
    tower = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": TEXT_LENGTH, "projection_dim": 128, **tower, **ids}
    vision = {"image_size": world.SIZE, "patch_size": 8, "projection_dim": 128, **tower}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def build_tokenizer(sentences):
    """A byte-pair vocabulary of the captions, with CLIP's pre-tokenizer, lower case and `</w>`."""
    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = Regex(r"[a-z]+|[0-9]|[^\s0-9a-z]+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=1200, end_of_word_suffix="</w>", special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator(sentences, trainer)
    model = json.loads(bpe.to_str())["model"]
    # CLIP's tokenizer wants every letter both inside and at the end of a word; the end mark goes last, as in CLIP.
    pieces = [p for p in model["vocab"] if not p.startswith("<|")]
    for letter in pre_tokenizers.ByteLevel.alphabet():
        pieces += [p for p in (letter, letter + "</w>") if p not in pieces]
    vocab = {piece: i for i, piece in enumerate([*sorted(pieces), "<|startoftext|>", "<|endoftext|>"])}
    merges = [tuple(m) for m in model["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_LENGTH)


# ------------------------------------------------------------------------------------------------- the helpers


class Run:
    """State of one stage on disk: weights, optimizer and step, saved every minute, and a log."""

    def __init__(self, args, name, modules, optimizer):
        self.path, self.log_path = args.work / f"{name}.pt", args.work / f"{name}.jsonl"
        self.modules, self.optimizer, self.step, self.spent = modules, optimizer, 0, 0.0
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            for module, weights in zip(modules, state["modules"], strict=True):
                module.load_state_dict(weights)
            optimizer.load_state_dict(state["optimizer"])
            self.step, self.spent = state["step"], state["spent"]
        self.begun, self.saved, self.limit, self.name = time.time(), time.time(), 60 * args.minutes, name
        self.silent = rank_and_workers()[0] > 0  # only the first worker logs and saves

    @property
    def seconds(self):
        return self.spent + time.time() - self.begun

    def progress(self):
        return min(1.0, self.seconds / self.limit)

    def save(self):
        if self.silent:
            return
        state = {"modules": [m.state_dict() for m in self.modules], "optimizer": self.optimizer.state_dict()}
        state |= {"step": self.step, "spent": self.seconds}
        mu.atomic_write(self.path, lambda buffer: torch.save(state, buffer))

    def tick(self, every=50, **values):
        self.step += 1
        if self.step % every == 0 and not self.silent:
            row = {"step": self.step, "minutes": round(self.seconds / 60, 2)}
            row |= {name: round(float(value), 5) for name, value in values.items()}
            print(self.name, json.dumps(row), flush=True)
            with self.log_path.open("a") as log:
                log.write(json.dumps(row) + "\n")
        if time.time() - self.saved > 60:
            self.save()
            self.saved = time.time()
        return self.seconds < self.limit


def rank_and_workers():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def set_lr(optimizer, lr, progress, step, warmup=200):
    """Linear warm-up, then half a cosine down to 2 % over the time that the stage has."""
    for group in optimizer.param_groups:
        group["lr"] = lr * min(1, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def load_pictures(args, split):
    """Images uint8 [N, 3, 64, 64] and their captions."""
    images = torch.from_numpy(np.load(args.work / f"{split}.npy")).permute(0, 3, 1, 2)
    return images, json.loads((args.work / f"{split}.json").read_text())


def to_float(images):
    return images.float().div_(127.5).sub_(1)


def tokens(tokenizer, sentences):
    return tokenizer(
        sentences, padding="max_length", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt"
    ).input_ids


def psnr(a, b):
    """Mean over pictures of the peak signal to noise ratio in dB, for values in [-1, 1]."""
    error = (a.clamp(-1, 1) - b).square().flatten(1).mean(1) / 4
    return (-10 * error.log10()).mean().item()


def save_sheet(rows, path):
    world.sheet(mu.to_pil(torch.cat(rows)), columns=len(rows[0])).save(path)


# --------------------------------------------------------------------------------------------------- the stages


def stage_pictures(args):
    for split, n, seed in (("train", args.pictures, TRAIN_SEED), ("test", 2000, TEST_SEED)):
        if not (args.work / f"{split}.npy").exists():
            images, sentences, _ = world.make_set(n, seed)
            (args.work / f"{split}.json").write_text(json.dumps(sentences))
            mu.atomic_write(args.work / f"{split}.npy", lambda buffer, images=images: np.save(buffer, images))


def stage_tokenizer(args):
    if not (args.work / "tokenizer").exists():
        rng = random.Random(0)
        sentences = [world.caption(world.random_picture(rng), rng) for _ in range(40000)]
        build_tokenizer(sentences).save_pretrained(args.work / "tokenizer")


def stage_vae(args):
    learn_vae(args, "vae", build_vae(), 2e-3)


def stage_decoder(args):
    """The decoder of the exported autoencoder is trained further; the latents, and so the UNet, stay as they are."""
    vae = mu.load_vae(args.out, args.device)
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)
    learn_vae(args, "decoder", vae, 1e-3)
    save_half(vae, args.out / "vae")


def learn_vae(args, name, vae, lr):
    """The training loop of both autoencoder stages."""
    device, images = args.device, load_pictures(args, "train")[0]
    test = to_float(load_pictures(args, "test")[0][:256])
    vae = vae.to(device, memory_format=torch.channels_last).train()
    learned = [weight for weight in vae.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=lr, weight_decay=1e-4, betas=(0.9, 0.99))
    run = Run(args, name, [vae], optimizer)
    generator = torch.Generator().manual_seed(run.step)
    going = run.progress() < 1
    while going:
        picks = torch.randint(len(images), (args.vae_batch,), generator=generator)
        x = to_float(images[picks].to(device)).contiguous(memory_format=torch.channels_last)  # [B, 3, 64, 64]
        with torch.autocast(device, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample.float()
        error = y - x
        # edges matter more than areas of flat colour: also compare differences of neighbouring pixels
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        loss = error.abs().mean() + error.square().mean() + 0.25 * edges + 1e-6 * posterior.kl().mean()
        set_lr(optimizer, lr, run.progress(), run.step, warmup=100)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        going = run.tick(loss=loss.detach(), psnr=psnr(y.detach(), x))
        if run.step % 500 == 0 or not going:
            vae.eval()
            with torch.no_grad():
                y = torch.cat(
                    [vae.decode(vae.encode(x.to(device)).latent_dist.mean).sample.cpu() for x in test.split(64)]
                )
            vae.train()
            print(f"{name}: {psnr(y, test):.2f} dB on held-out images", flush=True)
            save_sheet([test[:12], y[:12], test[12:24], y[12:24]], args.work / f"{name}.png")
    run.save()


def learn_clip(args, name, clip, tokenizer, images, lr, loss_of):
    """The training loop of both CLIP stages. loss_of(picks, progress, rng) -> loss of the images with these indices."""
    test_images, test_sentences = load_pictures(args, "test")
    test_ids = tokens(tokenizer, test_sentences)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=lr, weight_decay=0.05, betas=(0.9, 0.98))
    run = Run(args, name, [clip], optimizer)
    rng, generator = random.Random(run.step), torch.Generator().manual_seed(run.step)
    going = run.progress() < 1
    while going:
        picks = torch.randint(len(images), (args.clip_batch,), generator=generator)
        loss = loss_of(picks, run.progress(), rng)
        set_lr(optimizer, lr, run.progress(), run.step, warmup=50)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        clip.logit_scale.data.clamp_(max=math.log(100))
        going = run.tick(every=20, loss=loss.detach())
        if run.step % 200 == 0 or not going:
            print(f"{name}: top 1 of 500 {clip_top1(clip, test_images, test_ids):.3f}", flush=True)
    run.save()


def compare(clip, images, ids, tokenizer):
    """CLIP's output for uint8 images [B, 3, 64, 64] and token ids [B, L]; padding that all of them have is cut off."""
    ids = ids[:, : int((ids != tokenizer.pad_token_id).sum(1).max()) + 1]
    return clip(input_ids=ids.to(clip.device), pixel_values=to_float(images.to(clip.device)))


def stage_clip(args):
    images, sentences = load_pictures(args, "train")
    tokenizer = CLIPTokenizer.from_pretrained(args.work / "tokenizer")
    ids = tokens(tokenizer, sentences)
    clip = build_clip(tokenizer).to(args.device)

    def loss_of(picks, progress, rng):
        out = compare(clip, images[picks], ids[picks], tokenizer)
        target = torch.arange(len(picks), device=clip.device)
        return (F.cross_entropy(out.logits_per_image, target) + F.cross_entropy(out.logits_per_text, target)) / 2

    learn_clip(args, "clip", clip, tokenizer, images, 1e-3, loss_of)


@torch.no_grad()
def clip_top1(clip, images, ids, n=500):
    """Fraction of n held-out images whose own caption is the nearest of the n."""
    device = clip.device
    out = clip.eval()(input_ids=ids[:n].to(device), pixel_values=to_float(images[:n].to(device)))
    clip.train()
    return (out.logits_per_image.argmax(1).cpu() == torch.arange(n)).float().mean().item()


@torch.no_grad()
def stage_latents(args):
    """The VAE's moments of every image, and the scaling factor that gives the latents unit variance."""
    if (args.work / "latents.pt").exists():
        return
    vae = build_vae().to(args.device)
    vae.load_state_dict(torch.load(args.work / "vae.pt", weights_only=True)["modules"][0])
    vae.eval()
    moments = [
        vae.encode(to_float(x.to(args.device))).latent_dist.parameters.half().cpu()
        for x in load_pictures(args, "train")[0].split(256)
    ]
    mean, logvar = torch.cat(moments).chunk(2, dim=1)
    scale = 1 / (mean.float().var() + logvar.float().exp().mean()).sqrt().item()
    cache = {"mean": mean.clone(), "std": (0.5 * logvar.float()).exp().half(), "scale": scale}
    mu.atomic_write(args.work / "latents.pt", lambda buffer: torch.save(cache, buffer))
    print(f"latents: {len(mean)}, scaling factor {scale:.4f}", flush=True)


@torch.no_grad()
def stage_texts(args):
    """text_embeddings [N + 1, 32, 128] of every caption and, last, of the empty prompt; in half precision."""
    if (args.work / "texts.pt").exists():
        return
    sentences = load_pictures(args, "train")[1]
    tokenizer = CLIPTokenizer.from_pretrained(args.work / "tokenizer")
    clip = build_clip(tokenizer).to(args.device).eval()
    clip.load_state_dict(torch.load(args.work / "clip.pt", weights_only=True)["modules"][0])
    chunks = tokens(tokenizer, [*sentences, ""]).split(512)
    embeddings = [clip.text_model(ids.to(args.device)).last_hidden_state.half().cpu() for ids in chunks]
    mu.atomic_write(args.work / "texts.pt", lambda buffer: torch.save(torch.cat(embeddings), buffer))


def stage_unet(args):
    cache = torch.load(args.work / "latents.pt", weights_only=True)
    embeddings = torch.load(args.work / "texts.pt", weights_only=True, mmap=True)
    unet = build_unet()

    def encode(picks, dropped, generator):
        return embeddings[torch.where(dropped, len(embeddings) - 1, picks)].float().to(args.device)

    learn_unet(args, "unet", [unet], cache, encode, 1e-3)


class NamedEmbedding(torch.nn.Module):
    """The text encoder's token table, and a vector for a name: the sum of the vectors of what it stands for.

    `looks` [B, n], the rows of `parts` to add up for each caption of a batch (row 0 is nothing), is set before each
    forward pass, as the text encoder passes only token_ids.
    """

    def __init__(self, table, name_id, num_parts):
        super().__init__()
        self.weight, self.name_id, self.looks = torch.nn.Parameter(table), name_id, None
        self.parts = torch.nn.Parameter(0.02 * torch.randn(num_parts, table.shape[1]))

    def forward(self, token_ids):
        names = F.embedding(self.looks, self.parts) * (self.looks > 0)[..., None]  # [B, n, dim]
        words = F.embedding(token_ids.clamp(max=len(self.weight) - 1), self.weight)  # [B, L, dim]
        return torch.where((token_ids == self.name_id)[..., None], names.sum(dim=1, keepdim=True), words)


PARTS = [None, *((kind, a, value) for kind, look in world.LOOKS.items() for a in look for value in ATTRIBUTES[a])]


def stage_together(args):
    """The exported UNet and text encoder are trained further, together, on `world.training_picture`.

    Many of its captions call a whole look by a name, one token: so the model learns how much a single vector can say.
    The vector of a name is a sum, so that looks which were never seen have one too. No name stays in the vocabulary.
    """
    rank, _ = rank_and_workers()
    tokenizer, path = CLIPTokenizer.from_pretrained(args.out / "tokenizer"), args.work / f"pictures_{rank}.pt"
    tokenizer.add_tokens([AddedToken(world.NAME, normalized=False)])
    if not path.exists():
        mu.atomic_write(path, lambda buffer: torch.save(encode_pictures(args, tokenizer, rank), buffer))
    cache, empty = torch.load(path, weights_only=True), tokens(tokenizer, [""])
    unet = mu.load_unet(args.out, args.device).requires_grad_(True)
    text_encoder = mu.load_text_encoder(args.out, args.device).requires_grad_(True)
    table, name_id = text_encoder.get_input_embeddings().weight.data, len(tokenizer) - 1
    text_encoder.set_input_embeddings(NamedEmbedding(table, name_id, len(PARTS)).to(args.device))

    def encode(picks, dropped, generator):
        captions = torch.randint(CAPTIONS, picks.shape, generator=generator)
        token_ids = torch.where(dropped[:, None], empty, cache["token_ids"][picks, captions].long())
        text_encoder.get_input_embeddings().looks = cache["looks"][picks].long().to(args.device)
        return mu.encode_tokens(text_encoder, token_ids)

    # every second step favours high noise levels, which decide the background and weigh little in the loss
    samplings = ("uniform", "cubic")
    _, _, unet, text_encoder = learn_unet(args, "together", [unet, text_encoder], cache, encode, 5e-4, samplings)
    if rank == 0:
        table = text_encoder.get_input_embeddings().weight
        text_encoder.set_input_embeddings(torch.nn.Embedding(*table.shape, _weight=table))
        save_half(unet, args.out / "unet")
        save_half(text_encoder, args.out / "text_encoder")


def encode_pictures(args, tokenizer, rank):
    """The training images of one worker: the VAE's moments, captions [N, CAPTIONS, 32], looks [N, 6]."""
    vae, rng = mu.load_vae(args.out, args.device), random.Random(f"together {rank}")
    cache = {"mean": [], "std": [], "token_ids": [], "looks": []}
    for _ in range(0, args.pictures, 500):
        pictures = [world.training_picture(rng) for _ in range(500)]
        images = torch.from_numpy(np.stack([np.asarray(world.draw(p)) for p in pictures])).permute(0, 3, 1, 2)
        mean, std = mu.encode_images(vae, to_float(images), 100)
        cache["mean"].append(mean.half())
        cache["std"].append(std.half())
        captions = [world.caption(picture, rng) for picture in pictures for _ in range(CAPTIONS)]
        cache["token_ids"].append(tokens(tokenizer, captions).short().view(500, CAPTIONS, TEXT_LENGTH))
        cache["looks"].append(torch.tensor([look_of(picture, rng) for picture in pictures]).short())
    return {name: torch.cat(part) for name, part in cache.items()} | {"scale": 1.0}  # mu.encode_images scales


def look_of(picture, rng):
    """The rows of PARTS that the name of a picture's look stands for; each attribute but the first may be left out."""
    attributes = world.LOOKS.get(picture.name_kind, [])
    missing = {"second"} if picture.pattern == "plain" else set()
    missing |= set() if picture.accessory else {"accessory_colour"}
    included = [a for i, a in enumerate(attributes) if a not in missing and (i == 0 or rng.random() < 0.9)]
    rows = [PARTS.index((picture.name_kind, a, getattr(picture, a))) for a in included]
    return rows + [0] * (6 - len(rows))


def learn_unet(args, name, modules, cache, encode, lr, samplings=("uniform",)):
    """The training loop of both UNet stages -> modules (the first is the UNet), then their averages (EMA).

    encode(picks, dropped, generator): text embeddings [B, 32, 128] of the images with these indices, of the empty
    prompt where dropped. samplings: of the timesteps, in turn (see train.sample_timesteps).
    """
    device, (mean, std, scale) = args.device, (cache[name] for name in ("mean", "std", "scale"))
    betas = torch.linspace(SCHEDULER["beta_start"] ** 0.5, SCHEDULER["beta_end"] ** 0.5, 1000) ** 2
    schedule = mu.NoiseSchedule((1 - betas).cumprod(0)).to(device)
    rank, workers = rank_and_workers()
    modules[0].to(device, memory_format=torch.channels_last)  # a tenth faster on a CPU
    averages = [deepcopy(module).requires_grad_(False) for module in modules]
    parameters, averaged = ([p for m in part for p in m.parameters()] for part in (modules, averages))
    # all gradients are views of one tensor, so that they can be exchanged and clipped at once
    gradient = torch.zeros(sum(p.numel() for p in parameters), device=device)
    for p, piece in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
        p.grad = piece.as_strided(p.size(), p.stride())  # in the order that the weights have in memory
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-3, betas=(0.9, 0.99), fused=True)
    run = Run(args, name, [*modules, *averages], optimizer)
    generator = torch.Generator().manual_seed(run.step * workers + rank)
    going = run.progress() < 1
    while going:
        n = args.unet_batch // workers
        picks = torch.randint(len(mean), (n,), generator=generator)
        latents = (
            (mean[picks].float() + std[picks].float() * torch.randn(mean[picks].shape, generator=generator)) * scale
        ).to(device, memory_format=torch.channels_last)
        context = encode(picks, torch.rand(n, generator=generator) < 0.1, generator)
        sampling = samplings[run.step % len(samplings)]
        timesteps = train.sample_timesteps(n, schedule.num_train_timesteps, generator, sampling).to(device)
        noise = torch.randn(latents.shape, generator=generator).to(device)
        noise_pred = modules[0](schedule.add_noise(latents, noise, timesteps), timesteps, context).sample
        error = (noise_pred - noise).square().mean(dim=(1, 2, 3))
        loss = (error * (5 / schedule.snr(timesteps)).clamp(max=1)).mean()  # Min-SNR, Hang et al. 2023, gamma 5
        gradient.zero_()
        loss.backward()
        progress = torch.tensor([run.progress()])
        if workers > 1:  # the mean of all workers' gradients; they also agree on how far they are, so all do the same
            dist.all_reduce(gradient)
            dist.all_reduce(progress)
            gradient /= workers
            progress /= workers
        set_lr(optimizer, lr, progress.item(), run.step)
        gradient *= (1 / (gradient.norm() + 1e-6)).clamp(max=1)  # clipped to norm 1
        optimizer.step()
        decay = min(0.999, (run.step + 1) / (run.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(averaged, parameters, 1 - decay)
        run.tick(mse=error.detach().mean(), weighted=loss.detach())
        going = progress.item() < 1
    run.save()
    return [*modules, *averages]


def save_half(module, folder):
    """Half precision on the disk, which transformers loads as fp32 where no dtype is asked for, like diffusers."""
    module.half().save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text().replace('"float16"', '"float32"'))
    config.pop("_name_or_path", None)
    path.write_text(json.dumps(config, indent=2) + "\n")


def stage_export(args):
    """Write the half-precision model in diffusers' folder layout."""
    out = args.out
    tokenizer = CLIPTokenizer.from_pretrained(args.work / "tokenizer")
    tokenizer.save_pretrained(out / "tokenizer")
    vae, unet, clip = build_vae(), build_unet(), build_clip(tokenizer)
    for module, stage, i in ((vae, "vae", 0), (unet, "unet", 1), (clip, "clip", 0)):  # of the UNet the average (EMA)
        module.load_state_dict(torch.load(args.work / f"{stage}.pt", weights_only=True)["modules"][i])
    vae.register_to_config(scaling_factor=torch.load(args.work / "latents.pt", weights_only=True)["scale"])
    text_encoder = CLIPTextModel(CLIPTextConfig(**clip.config.text_config.to_dict()))
    text_encoder.load_state_dict(clip.text_model.state_dict())
    for module, part in ((vae, "vae"), (unet, "unet"), (text_encoder, "text_encoder"), (clip, "clip")):
        save_half(module, out / part)
    (out / "scheduler").mkdir(exist_ok=True)
    (out / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=2) + "\n")
    preprocess = {"size": {"shortest_edge": world.SIZE}, "crop_size": world.SIZE, "resample": 3}
    preprocess |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (out / "clip" / "preprocessor_config.json").write_text(json.dumps(preprocess, indent=2) + "\n")
    index = {
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1",
        "_sampling": {"guidance": 4.0, "steps": 15},  # sample.py's defaults for this model
        "feature_extractor": [None, None], "safety_checker": [None, None], "requires_safety_checker": False,
        "scheduler": ["diffusers", "PNDMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }  # fmt: skip
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def stage_scorer(args):
    """Train the CLIP for scoring further, on captions that say little, and write the exported `clip` again.

    CLIP-T asks how well "a photo of a on a red background" fits a generated image of a striped cat with a crown there.
    The CLIP of stage_clip expects the caption to name the stripes: with it, the world's own images of such a cat score
    a quarter lower than those of any cat. Here a caption matches every image of the batch that it is true of.
    The text encoder of the model stays as it is.
    """
    images, rng = load_pictures(args, "train")[0], random.Random(TRAIN_SEED)
    pictures = [world.random_picture(rng) for _ in range(len(images))]  # those of stage_pictures
    tones = [tone for tone in world.TONES if tone != world.STYLE_CONCEPTS["mint"].tone]
    for i, picture in enumerate(pictures):  # coarse and of one colour at once, which stage_pictures leaves out
        if picture.style == "pixel art" and rng.random() < 0.5:
            pictures[i] = replace(picture, tone=rng.choice(tones))
            images[i] = torch.from_numpy(np.array(world.draw(pictures[i]))).permute(2, 0, 1)
    attributes = torch.tensor([[values.index(getattr(p, a)) for a, values in ATTRIBUTES.items()] for p in pictures])
    styled = torch.tensor([i for i, picture in enumerate(pictures) if picture.style != "photo"])  # a quarter
    tokenizer = CLIPTokenizer.from_pretrained(args.out / "tokenizer")
    clip = CLIPModel.from_pretrained(args.out / "clip", dtype=torch.float32).to(args.device).train()

    def loss_of(picks, progress, rng):
        if progress > 0.4:  # in the end every second one is a drawing or pixel art
            picks[::2] = styled[picks[::2] % len(styled)]
        sentences, told = [], []
        for i in picks.tolist():
            facts, keep = {}, rng.choice([0.78, rng.random()])  # as stage_clip's captions, or with fewer or more facts
            sentences.append(world.caption(pictures[i], rng, keep, facts))
            told.append([values.index(facts[a]) if a in facts else -1 for a, values in ATTRIBUTES.items()])
        told = torch.tensor(told)  # [B, attributes], -1 where nothing is said
        true = ((told == -1) | (told == attributes[picks][:, None])).all(-1).to(clip.device)  # [picture, sentence]
        out = compare(clip, images[picks], tokens(tokenizer, sentences), tokenizer)
        # every image that a caption is true of is a match; an image's own caption is compared with the untrue ones only
        pictures_of = true.T / true.T.sum(1, keepdim=True)
        of_text = -(pictures_of * out.logits_per_text.log_softmax(1)).sum(1).mean()
        own = torch.eye(len(picks), dtype=torch.bool, device=clip.device)
        others = out.logits_per_image.masked_fill(true & ~own, -torch.inf)
        return (of_text + F.cross_entropy(others, torch.arange(len(picks), device=clip.device))) / 2

    learn_clip(args, "scorer", clip, tokenizer, images, 5e-4, loss_of)
    save_half(clip, args.out / "clip")


DEFAULT_MINUTES = {"vae": 40, "clip": 28, "unet": 112, "together": 114, "scorer": 78, "decoder": 58}
STAGES = {
    "pictures": stage_pictures, "tokenizer": stage_tokenizer, "vae": stage_vae, "latents": stage_latents,
    "clip": stage_clip, "texts": stage_texts, "unet": stage_unet, "export": stage_export, "together": stage_together,
    "scorer": stage_scorer, "decoder": stage_decoder,
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all")
    parser.add_argument(
        "--minutes",
        type=float,
        help=f"training time of the stage (default: {', '.join(f'{m} {s}' for s, m in DEFAULT_MINUTES.items())})",
    )
    parser.add_argument("--work", type=Path, default=HERE / "work", help="folder for data and training state")
    parser.add_argument("--out", type=Path, default=Path(mu.DEFAULT_MODEL), help="folder to export the model to")
    parser.add_argument("--pictures", type=int, default=32000)
    parser.add_argument("--vae_batch", type=int, default=16)
    parser.add_argument("--clip_batch", type=int, default=256)
    parser.add_argument("--unet_batch", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if "WORLD_SIZE" in os.environ:  # started by torchrun
        if args.stage not in ("unet", "together"):
            parser.error("only --stage unet and --stage together can have several workers")
        dist.init_process_group("gloo")
    args.work.mkdir(parents=True, exist_ok=True)
    minutes = args.minutes
    for stage in STAGES if args.stage == "all" else [args.stage]:
        args.minutes = minutes or DEFAULT_MINUTES.get(stage, 0)
        torch.manual_seed(0)
        STAGES[stage](args)


if __name__ == "__main__":
    main()
