"""A checkpoint of Stable Diffusion 1.4's exact sizes with random weights, 4 GB on disk: for tests and benchmarks."""

import gc
import json

import torch
from conftest import build_tokenizer
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

UNET = {
    "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8, "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
}  # fmt: skip
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "sample_size": 512,
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
}  # fmt: skip
TEXT = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "projection_dim": 768, "vocab_size": 49408,
}  # fmt: skip


def build(folder, dtype=torch.float32):
    """Write the checkpoint in diffusers' layout to the path `folder`."""
    torch.manual_seed(0)
    makers = {
        "unet": lambda: UNet2DConditionModel(**UNET),
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**TEXT)),
        "vae": lambda: AutoencoderKL(**VAE),
    }
    for name, make in makers.items():
        with torch.device("meta"):  # the usual random numbers would take minutes: small ones do, the sizes matter
            part = make()
        part.to_empty(device="cpu").to(dtype)
        for weight in part.parameters():
            weight.data.uniform_(-0.02, 0.02)
        if name == "text_encoder":
            part.embeddings.position_ids.copy_(torch.arange(77)[None])
        part.save_pretrained(folder / name)
        del part
        gc.collect()
    build_tokenizer(size=TEXT["vocab_size"], length=77).save_pretrained(folder / "tokenizer")
    schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    PNDMScheduler(**schedule, skip_prk_steps=True, steps_offset=1).save_pretrained(folder / "scheduler")
    libraries = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": "PNDMScheduler"}
    index = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    index |= {name: ["diffusers", kind] for name, kind in libraries.items()}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
