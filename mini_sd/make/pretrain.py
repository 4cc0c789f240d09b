"""Train mini_sd from nothing: a very small but complete Stable Diffusion, on the pictures of world.py.

    python mini_sd/pretrain.py                      # all of it, stage by stage
    python mini_sd/pretrain.py --stage unet --minutes 60
    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 mini_sd/pretrain.py --stage unet      # 1.5 times as fast on two cores

Every stage saves its state in --work as it goes and goes on from there when it is started again. `export` writes the
half-precision weights in diffusers' folder layout. Progress is printed and kept in <work>/<stage>.jsonl; the vae and
check stages leave a contact sheet to look at.
"""

import argparse
import json
import math
import os
import random
import sys
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # so that `python mini_sd/pretrain.py` finds the scripts
sys.path.insert(0, str(HERE))

import world  # noqa: E402

TRAIN_SEED, TEST_SEED = 1, 2
TEXT_LENGTH = 32
STAGES = ["pictures", "tokenizer", "vae", "latents", "clip", "texts", "unet", "export", "scorer", "check"]
SCHEDULER = {  # Stable Diffusion 1.4's own
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.42.1", "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "prediction_type": "epsilon", "steps_offset": 1,
    "set_alpha_to_one": False, "skip_prk_steps": True, "timestep_spacing": "leading", "clip_sample": False,
}  # fmt: skip
ATTRIBUTES = {  # of a Picture, that a sentence may name, and their values
    "kind": world.KINDS, "colour": list(world.COLOURS), "pattern": world.PATTERNS, "second": list(world.COLOURS),
    "accessory": [None, *world.ACCESSORIES], "accessory_colour": list(world.COLOURS), "tone": [None, *world.TONES],
    "background": [*world.BACKGROUNDS, *world.SCENES], "style": world.STYLES, "count": [1, 2],
}  # fmt: skip


# ------------------------------------------------------------------------------------------------- the models


def build_vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=(16, 32, 64), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=64,
    )  # fmt: skip


def build_unet():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(48, 96, 128),
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        cross_attention_dim=128, attention_head_dim=4, norm_num_groups=8,
    )  # fmt: skip


def build_clip(tokenizer):
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": TEXT_LENGTH, "projection_dim": 128, **tower, **ids}
    vision = {"image_size": world.SIZE, "patch_size": 8, "projection_dim": 128, **tower}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def build_tokenizer(sentences):
    """A byte-pair vocabulary of the world's own sentences, with CLIP's pre-tokenizer, lower case and `</w>`."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

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


def write_whole(path, write):
    """write(file) into a file beside it, which then takes the place of `path`: what is there is always complete."""
    with path.with_suffix(".tmp").open("wb") as file:
        write(file)
    path.with_suffix(".tmp").replace(path)


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
        self.silent = dist.is_initialized() and dist.get_rank() > 0  # of several workers the first one speaks

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
        write_whole(self.path, lambda file: torch.save(state, file))

    def tick(self, every=50, **values):
        self.step += 1
        if self.step % every == 0 and not self.silent:
            row = {
                "step": self.step,
                "minutes": round(self.seconds / 60, 2),
                **{k: round(float(v), 5) for k, v in values.items()},
            }
            print(self.name, json.dumps(row), flush=True)
            with self.log_path.open("a") as log:
                log.write(json.dumps(row) + "\n")
        if time.time() - self.saved > 60:
            self.save()
            self.saved = time.time()
        return self.seconds < self.limit


def set_lr(optimizer, lr, progress, step, warmup=200):
    """Linear warm-up, then half a cosine down to 2 % over the time that the stage has."""
    for group in optimizer.param_groups:
        group["lr"] = lr * min(1, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def load_pictures(args, split, device=None):
    """uint8 [N, 3, 64, 64] and the sentences."""
    images = torch.from_numpy(np.load(args.work / f"{split}.npy")).permute(0, 3, 1, 2)
    return images if device is None else images.to(device), json.loads((args.work / f"{split}.json").read_text())


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


def save_sheet(rows, path, zoom=2):
    from PIL import Image

    pictures = [
        Image.fromarray(p) for r in rows for p in r.clamp(-1, 1).add(1).mul(127.5).byte().permute(0, 2, 3, 1).numpy()
    ]
    world.sheet(pictures, columns=len(rows[0]), zoom=zoom).save(path)


# --------------------------------------------------------------------------------------------------- the stages


def stage_pictures(args):
    for split, n, seed in (("train", args.pictures, TRAIN_SEED), ("test", 2000, TEST_SEED)):
        if not (args.work / f"{split}.npy").exists():
            images, sentences, _ = world.make_set(n, seed)
            (args.work / f"{split}.json").write_text(json.dumps(sentences))
            write_whole(args.work / f"{split}.npy", lambda file, images=images: np.save(file, images))


def stage_tokenizer(args):
    if not (args.work / "tokenizer").exists():
        rng = random.Random(0)
        sentences = [world.caption(world.random_picture(rng), rng) for _ in range(40000)]
        build_tokenizer(sentences).save_pretrained(args.work / "tokenizer")


def stage_vae(args):
    device, images = args.device, load_pictures(args, "train")[0]
    test = to_float(load_pictures(args, "test")[0][:256])
    vae = build_vae().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4, betas=(0.9, 0.99))
    run = Run(args, "vae", [vae], optimizer)
    generator = torch.Generator().manual_seed(run.step)
    going = run.progress() < 1
    while going:
        picks = torch.randint(len(images), (args.vae_batch,), generator=generator)
        x = to_float(images[picks].to(device)).contiguous(memory_format=torch.channels_last)  # [B, 3, 64, 64]
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        error = y - x
        # edges of the drawing matter more than areas of flat colour: also compare differences of neighbours
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        loss = error.abs().mean() + error.square().mean() + 0.25 * edges + 1e-6 * posterior.kl().mean()
        set_lr(optimizer, 2e-3, run.progress(), run.step, warmup=100)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        going = run.tick(loss=loss.detach(), psnr=psnr(y.detach(), x))
        if run.step % 500 == 0 or not going:
            vae.eval()
            with torch.no_grad():
                y = torch.cat(
                    [vae.decode(vae.encode(x.to(device)).latent_dist.mean).sample.cpu() for x in test.split(64)]
                )
            vae.train()
            print(f"vae: {psnr(y, test):.2f} dB on pictures it has not seen", flush=True)
            save_sheet([test[:12], y[:12], test[12:24], y[12:24]], args.work / "vae.png")
    run.save()


def learn_clip(args, name, clip, tokenizer, images, lr, loss_of):
    """The loop of both stages of CLIP. loss_of(picks, progress, rng) -> loss of the pictures with these numbers."""
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
    """CLIP's answer for uint8 images [B, 3, 64, 64] and token ids [B, L]; padding that all of them have is cut off."""
    ids = ids[:, : int((ids != tokenizer.pad_token_id).sum(1).max()) + 1]
    return clip(input_ids=ids.to(clip.device), pixel_values=to_float(images.to(clip.device)))


def stage_clip(args):
    from transformers import CLIPTokenizer

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
    """Share of n unseen pictures whose own sentence is the nearest of the n."""
    device = clip.device
    out = clip.eval()(input_ids=ids[:n].to(device), pixel_values=to_float(images[:n].to(device)))
    clip.train()
    return (out.logits_per_image.argmax(1).cpu() == torch.arange(n)).float().mean().item()


@torch.no_grad()
def stage_latents(args):
    """The moments of every picture, once, and the factor that makes latents of unit variance."""
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
    write_whole(args.work / "latents.pt", lambda file: torch.save(cache, file))
    print(f"latents: {len(mean)}, scaling factor {scale:.4f}", flush=True)


@torch.no_grad()
def stage_texts(args):
    """text_embeddings of every sentence [N, 32, 128], once, and of the empty one, last; in half precision."""
    from transformers import CLIPTokenizer

    if (args.work / "texts.pt").exists():
        return
    sentences = load_pictures(args, "train")[1]
    tokenizer = CLIPTokenizer.from_pretrained(args.work / "tokenizer")
    clip = build_clip(tokenizer).to(args.device).eval()
    clip.load_state_dict(torch.load(args.work / "clip.pt", weights_only=True)["modules"][0])
    chunks = tokens(tokenizer, [*sentences, ""]).split(512)
    embeddings = [clip.text_model(ids.to(args.device)).last_hidden_state.half().cpu() for ids in chunks]
    write_whole(args.work / "texts.pt", lambda file: torch.save(torch.cat(embeddings), file))


def stage_unet(args):
    device, cache = args.device, torch.load(args.work / "latents.pt", weights_only=True)
    mean, std, scale = cache["mean"], cache["std"], cache["scale"]
    embeddings = torch.load(args.work / "texts.pt", weights_only=True, mmap=True)
    betas = torch.linspace(SCHEDULER["beta_start"] ** 0.5, SCHEDULER["beta_end"] ** 0.5, 1000) ** 2
    alphas_cumprod = (1 - betas).cumprod(0).to(device)
    rank, workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    unet = build_unet().to(device, memory_format=torch.channels_last)  # a tenth faster on a CPU
    ema = deepcopy(unet).requires_grad_(False)
    parameters = list(unet.parameters())
    # all gradients are views of one tensor, so that they can be exchanged and clipped at once
    gradient = torch.zeros(sum(p.numel() for p in parameters), device=device)
    for p, piece in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
        p.grad = piece.as_strided(p.size(), p.stride())  # in the order that the weights have in memory
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, weight_decay=1e-3, betas=(0.9, 0.99), fused=True)
    run = Run(args, "unet", [unet, ema], optimizer)
    generator = torch.Generator().manual_seed(run.step * workers + rank)
    going = run.progress() < 1
    while going:
        n = args.unet_batch // workers
        picks = torch.randint(len(mean), (n,), generator=generator)
        latents = (
            (mean[picks].float() + std[picks].float() * torch.randn(mean[picks].shape, generator=generator)) * scale
        ).to(device, memory_format=torch.channels_last)
        dropped = torch.rand(n, generator=generator) < 0.1
        context = embeddings[torch.where(dropped, len(mean), picks)].float().to(device)
        # one timestep from each of n equal parts of the range: less noise in the gradient than n independent draws
        timesteps = ((torch.arange(n) + torch.rand(n, generator=generator)) * 1000 / n).long().to(device)
        noise = torch.randn(latents.shape, generator=generator).to(device)
        abar = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noise_pred = unet(abar.sqrt() * latents + (1 - abar).sqrt() * noise, timesteps, context).sample
        error = (noise_pred - noise).square().mean(dim=(1, 2, 3))
        snr = (abar / (1 - abar)).flatten()
        loss = (error * (5 / snr).clamp(max=1)).mean()  # Min-SNR weighting, Hang et al. 2023, gamma 5
        gradient.zero_()
        loss.backward()
        progress = torch.tensor([run.progress()])
        if workers > 1:  # the mean of all workers' gradients; they also agree on how far they are, so all do the same
            dist.all_reduce(gradient)
            dist.all_reduce(progress)
            gradient /= workers
            progress /= workers
        set_lr(optimizer, 1e-3, progress.item(), run.step)
        gradient *= (1 / (gradient.norm() + 1e-6)).clamp(max=1)  # clipped to length 1
        optimizer.step()
        decay = min(0.999, (run.step + 1) / (run.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), parameters, 1 - decay)
        run.tick(mse=error.detach().mean(), weighted=loss.detach())
        going = progress.item() < 1
    run.save()


def stage_export(args):
    """Write the half-precision model in diffusers' folder layout."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    out = args.out
    tokenizer = CLIPTokenizer.from_pretrained(args.work / "tokenizer")
    tokenizer.save_pretrained(out / "tokenizer")
    load = lambda name, i: torch.load(args.work / f"{name}.pt", weights_only=True)["modules"][i]  # noqa: E731
    vae, unet, clip = build_vae(), build_unet(), build_clip(tokenizer)
    vae.load_state_dict(load("vae", 0))
    vae.register_to_config(scaling_factor=torch.load(args.work / "latents.pt", weights_only=True)["scale"])
    unet.load_state_dict(load("unet", 1))
    clip.load_state_dict(load("clip", 0))
    text_encoder = CLIPTextModel(CLIPTextConfig(**clip.config.text_config.to_dict()))
    text_encoder.load_state_dict(clip.text_model.state_dict())
    for module, part in ((vae, "vae"), (unet, "unet"), (text_encoder, "text_encoder"), (clip, "clip")):
        module.half().save_pretrained(out / part)
    (out / "scheduler").mkdir(exist_ok=True)
    (out / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=2) + "\n")
    preprocess = {
        "size": {"shortest_edge": world.SIZE},
        "crop_size": world.SIZE,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "resample": 3,
    }
    (out / "clip" / "preprocessor_config.json").write_text(json.dumps(preprocess, indent=2) + "\n")
    index = {
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1",
        "_sampling": {"guidance": 4.0, "steps": 15},  # what sample.py draws with where nothing else is asked
        "feature_extractor": [None, None], "safety_checker": [None, None], "requires_safety_checker": False,
        "scheduler": ["diffusers", "PNDMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }  # fmt: skip
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def stage_scorer(args):
    """The CLIP that scores goes on learning, with sentences that say little: the exported `clip` is written anew.

    CLIP-T asks how well "a photo of a on a red background" fits a drawing of a striped cat with a crown there. By
    stage_clip's CLIP, which takes stripes for words that are missing, the world's own pictures of such a cat score a
    quarter lower than those of any cat. Here a sentence belongs to each picture of the batch that it is true of, alike.
    The text encoder of the model stays as it is.
    """
    from transformers import CLIPModel, CLIPTokenizer

    images, rng = load_pictures(args, "train")[0], random.Random(TRAIN_SEED)
    pictures = [world.random_picture(rng) for _ in range(len(images))]  # those that were drawn
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
            facts, keep = {}, rng.choice([0.78, rng.random()])  # as stage_clip's sentences, or with less, or with more
            sentences.append(world.caption(pictures[i], rng, keep, facts))
            told.append([values.index(facts[a]) if a in facts else -1 for a, values in ATTRIBUTES.items()])
        told = torch.tensor(told)  # [B, attributes], -1 where nothing is said
        true = ((told == -1) | (told == attributes[picks][:, None])).all(-1).to(clip.device)  # [picture, sentence]
        out = compare(clip, images[picks], tokens(tokenizer, sentences), tokenizer)
        # all pictures that a sentence is true of are right; a picture's own sentence is compared with what is not true
        pictures_of = true.T / true.T.sum(1, keepdim=True)
        of_text = -(pictures_of * out.logits_per_text.log_softmax(1)).sum(1).mean()
        own = torch.eye(len(picks), dtype=torch.bool, device=clip.device)
        others = out.logits_per_image.masked_fill(true & ~own, -torch.inf)
        return (of_text + F.cross_entropy(others, torch.arange(len(picks), device=clip.device))) / 2

    learn_clip(args, "scorer", clip, tokenizer, images, 5e-4, loss_of)
    clip.half().save_pretrained(args.out / "clip")


def clip_t_of_true_pictures(clip, name, rng, count):
    """CLIP-T of pictures drawn by the world itself, `count` for each sentence -> three means.

    Of any such thing (or any drawing or pixel art) that is as the sentence says, of the concept `name` that is, and of
    the concept that is not. A CLIP that asks for no more than the sentence gives the second as much as the first, and
    the third little.
    """
    import judge

    import sample

    concept, learnable_property, cosines = world.concept_picture(name, 0), judge.kind_of(name), []
    same_thing = {"kind": concept.kind} if learnable_property == "object" else {}
    asked, prompts = judge.ASKED[learnable_property], sample.EDITING_PROMPTS[learnable_property]
    for (question, value), prompt in zip(asked, prompts, strict=True):
        scene, sentence = {question: value}, " ".join(prompt.replace("{}", "").split())
        plain = []
        while len(plain) < count:
            picture = world.random_picture(rng)
            plain += [replace(picture, tone=None, count=1)] if picture.style == concept.style else []
        own = [replace(world.concept_picture(name, rng.getrandbits(31)), count=1) for _ in range(count)]
        groups = [[replace(p, **same_thing, **scene) for p in plain], [replace(p, **scene) for p in own]]
        groups += [[p for p in own if replace(p, **scene) != p]]
        images, texts = sample.embed(clip, [world.draw(p) for group in groups for p in group], [sentence])
        parts = (images @ texts[0]).split([len(group) for group in groups])
        cosines.append(torch.stack([part.mean() for part in parts]))
    return torch.stack(cosines).mean(dim=0).tolist()


def stage_check(args):
    """Draw from sentences it has not seen, and count what a reader of the world's pictures finds right."""
    import reader

    import model_utils as mu
    import sample

    tokenizer, text_encoder = mu.load_tokenizer(args.out), mu.load_text_encoder(args.out, args.device)
    vae, unet = mu.load_vae(args.out, args.device), mu.load_unet(args.out, args.device)
    parts = sample.Parts(tokenizer, text_encoder, vae, unet, mu.load_schedule(args.out), {})
    rng, pictures = random.Random(TEST_SEED + 1), []
    while len(pictures) < 96:  # of one thing, in its own colours
        picture = world.random_picture(rng)
        pictures += [picture] if picture.count == 1 and picture.style == "photo" and not picture.tone else []
    sentences = ["a photo of a " + world.noun_phrase(picture, rng, keep=1.0) for picture in pictures]
    how = sample.sampling_defaults(args.out)
    images = list(sample.draw(parts, sentences, range(96), batch_size=24, **how))
    found = reader.read(reader.load_reader(), images)
    right = {
        q: [a == getattr(p, q) for a, p in zip(found[q], pictures, strict=True)] for q in found if q != "accessory"
    }
    right["kind, colour and background"] = [
        all(three) for three in zip(right["kind"], right["colour"], right["background"], strict=True)
    ]
    for question, answers in right.items():
        print(f"{question}: {sum(answers)} of {len(answers)} right")
    world.sheet(images, 12).save(args.work / "check.png")
    (args.work / "check.txt").write_text("\n".join(sentences))
    print(f"look at {args.work / 'check.png'}, twelve a row, and at the sentences in check.txt")
    print("CLIP-T of the world's own pictures: of any such, of the concept, of the concept not as the sentence says")
    clip = sample.load_clip(args.out)
    for name in world.INITIALIZERS:
        found = clip_t_of_true_pictures(clip, name, random.Random(TEST_SEED), 64)
        print(f"{name:8}" + "".join(f"{cosine:8.3f}" for cosine in found))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all")
    parser.add_argument(
        "--minutes", type=float, help="training time of the stage (default: 40 vae, 28 clip, 112 unet, 78 scorer)"
    )
    parser.add_argument("--work", type=Path, default=HERE / "work", help="folder for data and training state")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to export the model to")
    parser.add_argument("--pictures", type=int, default=32000)
    parser.add_argument("--vae_batch", type=int, default=16)
    parser.add_argument("--clip_batch", type=int, default=256)
    parser.add_argument("--unet_batch", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if "WORLD_SIZE" in os.environ:  # started by torchrun
        if args.stage != "unet":
            parser.error("only --stage unet can have several workers")
        dist.init_process_group("gloo")
    args.work.mkdir(parents=True, exist_ok=True)
    minutes = args.minutes
    for stage in STAGES if args.stage == "all" else [args.stage]:
        args.minutes = minutes or {"vae": 40, "clip": 28, "unet": 112, "scorer": 78}.get(stage, 0)
        torch.manual_seed(0)
        globals()[f"stage_{stage}"](args)


if __name__ == "__main__":
    main()
