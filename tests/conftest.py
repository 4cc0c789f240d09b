"""A Stable Diffusion of random numbers in the real layout, small enough to be built in a second."""

import gc
import json
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported: no test asks the network
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import torch
import transformers
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel

WORDS = "a an the of in on and photo picture painting drawing style cat dog toy red blue two night background".split()
SENTENCE_LENGTH, TEXT_WIDTH = 32, 32


def pytest_configure():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # started in the background (&), Ctrl-C would be ignored


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # what the libraries brought: loading a model has garbage collected, and would go through it each time


def build_tokenizer(size=None, length=SENTENCE_LENGTH):
    """CLIP's vocabulary in small: all bytes, all bytes ending a word, the merges that spell WORDS, start and end.

    size: filled up to so many pieces. length: tokens a sentence.
    """
    letters = sorted(ByteLevel.alphabet())
    pieces, merges = letters + [letter + "</w>" for letter in letters], []
    for word in WORDS:
        symbols = [*word[:-1], word[-1] + "</w>"]
        whole = symbols[0]
        for symbol in symbols[1:]:
            if (whole, symbol) not in merges:
                merges.append((whole, symbol))
                pieces.append(whole + symbol)
            whole += symbol
    pieces += [f"filler{i}</w>" for i in range(len(pieces), (size or 0) - 2)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Path of a random model: 16 px pictures, latents [4, 8, 8], 32 tokens a sentence, rows 32 wide, with its CLIP."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    for word in WORDS:
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1, word
    tower = {"hidden_size": TEXT_WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = tower | ends | {"vocab_size": len(tokenizer), "max_position_embeddings": SENTENCE_LENGTH}
    vision = tower | {"image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    clip = transformers.CLIPModel(config)
    text_encoder = transformers.CLIPTextModel(clip.config.text_config)
    text_encoder.load_state_dict(clip.text_model.state_dict())
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.7,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=TEXT_WIDTH,
    )
    scheduler = PNDMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        skip_prk_steps=True,
        steps_offset=1,
    )
    scheduler.register_to_config(clip_sample=False)  # as in Stable Diffusion 1.4's file
    folder = tmp_path_factory.mktemp("model") / "tiny"
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    clip.save_pretrained(folder / "clip")
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": 16},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 16, "width": 16},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "do_convert_rgb": True,
    }
    (folder / "clip" / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return str(folder)
