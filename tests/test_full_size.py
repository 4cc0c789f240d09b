"""Stable Diffusion 1.4's own sizes with random weights. Minutes and gigabytes: python -m pytest -m slow"""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

import model_utils as mu
import sample
import train

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
    "projection_dim": 768,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_one_training_step_and_one_sampling_step(tiny_model, dtype):
    torch.manual_seed(0)
    with torch.device("meta"):
        parts = UNet2DConditionModel(**UNET), CLIPTextModel(CLIPTextConfig(**TEXT)), AutoencoderKL(**VAE)
    assert sum(p.numel() for p in parts[0].parameters()) == 859_520_964
    for part in parts:  # small random weights: the sizes are what is tested
        part.to_empty(device="cpu").to(dtype).requires_grad_(False).eval()
        for weight in part.parameters():
            weight.normal_(0, 0.02)
    unet, text_encoder, vae = parts
    text_encoder.embeddings.position_ids.copy_(torch.arange(77)[None])
    schedule = mu.load_schedule(tiny_model)
    rows = text_encoder.get_input_embeddings().weight[[320]]
    learned = mu.install_learned_rows(text_encoder, [49408], rows).learned_rows
    token_ids = torch.tensor([[49406, 320, 49408] + [49407] * 74])

    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(1, 4, 64, 64, generator=generator) for _ in range(2))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        embeddings = mu.encode_tokens(text_encoder, token_ids)
        loss = train.inversion_loss(unet, latents, noise, torch.tensor([500]), embeddings, schedule)
    loss.mean().backward()
    assert learned.grad.shape == (1, 768) and learned.grad.isfinite().all() and learned.grad.abs().max() > 0

    with torch.no_grad():
        embeddings = mu.encode_tokens(text_encoder, token_ids)
    drawn = sample.sample_latents(unet, schedule, embeddings, embeddings, latents, 1, 7.5, "ddim")
    images = mu.decode_latents(vae, drawn)
    assert images.shape == (1, 3, 512, 512) and images.isfinite().all()
