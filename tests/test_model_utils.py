"""The frozen model, the noise schedule and the new token, compared with diffusers and the classical method."""

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.image_processor import VaeImageProcessor
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

import model_utils as mu
from model_utils import UserError

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.fixture
def tokenizer(tiny_model):
    return mu.load_tokenizer(tiny_model)


def write_schedule(folder, **config):
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return str(folder)


# --- The noise schedule -----------------------------------------------------------------------------------------------

SCHEDULES = [
    {"beta_schedule": "linear"},  # all else is diffusers' default
    {"beta_schedule": "linear", "beta_start": 0.001, "beta_end": 0.01, "num_train_timesteps": 500},
    STABLE_DIFFUSION,
    STABLE_DIFFUSION | {"rescale_betas_zero_snr": True},
]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("config", SCHEDULES)
def test_schedule_noise_and_target_equal_diffusers(config, prediction_type, tmp_path):
    config = config | {"prediction_type": prediction_type}
    schedule, reference = mu.load_schedule(write_schedule(tmp_path, **config)), DDPMScheduler(**config)
    assert schedule.num_train_timesteps == len(reference.alphas_cumprod)
    torch.testing.assert_close(schedule.alphas_cumprod, reference.alphas_cumprod, rtol=1e-5, atol=1e-7)

    timesteps = torch.linspace(0, schedule.num_train_timesteps - 1, 8).long()
    latents, noise = torch.randn(2, 8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    noisy_latents = schedule.add_noise(latents, noise, timesteps)
    torch.testing.assert_close(noisy_latents, reference.add_noise(latents, noise, timesteps), rtol=1e-5, atol=1e-5)
    target = noise if prediction_type == "epsilon" else reference.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(schedule.target(latents, noise, timesteps), target, rtol=1e-5, atol=1e-5)
    snr = (reference.alphas_cumprod / (1 - reference.alphas_cumprod))[timesteps]
    torch.testing.assert_close(schedule.snr(timesteps), snr, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_latents_in_half_precision_get_the_noise_level_of_fp32(dtype):
    """diffusers rounds alphas_cumprod to the latents' dtype: in bf16 the first timesteps then get no noise at all."""
    schedule = mu.NoiseSchedule(DDPMScheduler(**STABLE_DIFFUSION).alphas_cumprod)
    latents, noise = torch.zeros(5, 4, 8, 8, dtype=dtype), torch.ones(5, 4, 8, 8, dtype=dtype)
    timesteps = torch.tensor([0, 1, 10, 500, 999])
    exact = (1 - schedule.alphas_cumprod.double()[timesteps]).sqrt().view(5, 1, 1, 1)
    noisy_latents = schedule.add_noise(latents, noise, timesteps)
    assert noisy_latents.dtype == dtype
    assert (noisy_latents.double() / exact - 1).abs().max() <= 1.01 * torch.finfo(dtype).eps / 2  # half a last digit


def test_the_schedule_tells_samplers_what_the_checkpoint_says(tiny_model, tmp_path):
    schedule = mu.load_schedule(tiny_model)
    told = (schedule.prediction_type, schedule.timestep_spacing, schedule.set_alpha_to_one)
    assert told == ("epsilon", "leading", False)
    assert (
        mu.load_schedule(write_schedule(tmp_path, beta_schedule="linear", timestep_spacing="trailing")).timestep_spacing
        == "trailing"
    )
    silent = mu.load_schedule(write_schedule(tmp_path, beta_schedule="linear"))
    assert silent.timestep_spacing is None  # each sampler then takes its usual one, as diffusers' schedulers do
    theirs = DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert silent.set_alpha_to_one is theirs.config.set_alpha_to_one is True


# --- Loading the frozen model -----------------------------------------------------------------------------------------

LOADERS = {
    "tokenizer": mu.load_tokenizer,
    "text_encoder": lambda model: mu.load_text_encoder(model, "cpu"),
    "vae": lambda model: mu.load_vae(model, "cpu"),
    "unet": lambda model: mu.load_unet(model, "cpu"),
}


@pytest.fixture
def model(tiny_model, tmp_path):
    """A copy of the tiny model that a test may change."""
    return shutil.copytree(tiny_model, tmp_path / "model")


@pytest.mark.parametrize("part", ["text_encoder", "vae", "unet"])
def test_modules_are_frozen_and_in_fp32(part, tiny_model):
    module = LOADERS[part](tiny_model)
    assert not module.training
    assert {(p.requires_grad, p.dtype) for p in module.parameters()} == {(False, torch.float32)}


def test_models_load_in_silence_old_files_too(model):
    """In 2022 the text encoders' keys began with text_model and position_ids was one; and options come and go."""
    weights = load_file(model / "text_encoder" / "model.safetensors")
    old = {f"text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in weights.items()}
    old["text_model.embeddings.position_ids"] = torch.arange(32).unsqueeze(0)
    save_file(old, model / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    loaded = LOADERS["text_encoder"](model).state_dict()
    assert len(loaded) == len(weights)
    assert all(torch.equal(loaded[key.removeprefix("text_model.")], tensor) for key, tensor in weights.items())

    config = model / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"of_another_time": 1}))
    program = (  # a process of its own: the libraries' loggers keep the stderr they began with
        f"import model_utils as mu\nmodel = {str(model)!r}\nmu.load_tokenizer(model), mu.load_schedule(model)\n"
        "[load(model, 'cpu') for load in (mu.load_text_encoder, mu.load_vae, mu.load_unet)]"
    )
    folder = Path(mu.__file__).parent
    run = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_the_dtype_is_the_one_asked_for(tiny_model, tmp_path):
    """By default transformers loads a file in its own dtype; rows learned in half precision hardly move."""
    encoder = mu.load_text_encoder(tiny_model, "cpu", torch.float16)
    assert encoder.get_input_embeddings().weight.dtype == torch.float16
    encoder.save_pretrained(tmp_path / "text_encoder")
    assert LOADERS["text_encoder"](tmp_path).get_input_embeddings().weight.dtype == torch.float32
    assert mu.load_unet(tiny_model, "cpu", torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("part", LOADERS)
def test_damaged_and_missing_parts_are_named(part, model):
    if part == "tokenizer":
        for file in (model / part).iterdir():
            file.unlink()
    else:
        weights = next((model / part).glob("*.safetensors"))
        weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"'{part}' cannot be loaded"):
        LOADERS[part](model)
    shutil.rmtree(model / part)
    with pytest.raises(UserError, match=f"'{part}' is missing"):
        LOADERS[part](model)
    with pytest.raises(UserError, match="no such file or folder"):
        LOADERS[part](model / "elsewhere")
    with pytest.raises(UserError, match="no-such-owner/no-such-model: .*no such folder here"):
        LOADERS[part]("no-such-owner/no-such-model")


@pytest.mark.parametrize("part", ["text_encoder", "vae", "unet"])
def test_missing_weights_are_not_made_up(part, model):
    file = next((model / part).glob("*.safetensors"))
    weights = load_file(file)
    del weights[min(weights)]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"'{part}' cannot be loaded .it lacks weights"):
        LOADERS[part](model)


@pytest.mark.parametrize("other", [{"in_channels": 9}, {"class_embed_type": "timestep"}])
def test_a_unet_with_other_inputs_is_refused(other, tiny_model, tmp_path):
    unet = LOADERS["unet"](tiny_model)
    type(unet).from_config(dict(unet.config) | other).save_pretrained(tmp_path / "unet")
    with pytest.raises(UserError, match="Stable Diffusion 1 or 2"):
        LOADERS["unet"](tmp_path)


@pytest.mark.parametrize("widths, fits", [(32, True), ([32, 32], True), (48, False), ([32, 48], False)])
def test_parts_fit_if_every_block_has_the_width_of_the_text_encoder(widths, fits, tiny_model):
    unet, text_encoder = LOADERS["unet"](tiny_model), LOADERS["text_encoder"](tiny_model)
    unet.register_to_config(cross_attention_dim=widths)
    with contextlib.nullcontext() if fits else pytest.raises(UserError, match="its parts do not fit"):
        mu.check_parts(tiny_model, text_encoder, unet, 4)


def test_the_length_of_a_prompt_is_what_the_text_encoder_reads(model):
    file = model / "text_encoder" / "config.json"
    config = json.loads(file.read_text())
    assert mu.load_tokenizer(model).model_max_length == config["max_position_embeddings"] == 32
    file.write_text(json.dumps(config | {"max_position_embeddings": 20}))
    assert mu.load_tokenizer(model).model_max_length == 20


# --- Device and precision ---------------------------------------------------------------------------------------------

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("available, chosen", [(["cuda", "mps"], "cuda"), (["mps"], "mps"), ([], "cpu")])
def test_the_fastest_device_is_chosen_and_a_missing_one_refused(available, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in available)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in available)
    assert mu.choose_device("auto") == torch.device(chosen)
    assert mu.choose_device("cpu") == CPU
    for missing in {"cuda", "mps"} - set(available):
        with pytest.raises(UserError, match=f"--device {missing}"):
            mu.choose_device(missing)


def test_precision(monkeypatch):
    assert mu.choose_dtype("auto", CPU) == mu.choose_dtype("no", CPU) == mu.choose_dtype("fp32", CUDA) == torch.float32
    assert mu.choose_dtype("fp16", CUDA) == torch.float16
    with pytest.raises(UserError, match="--precision fp16 needs a GPU.* fp32"):
        mu.choose_dtype("fp16", CPU)
    for bf16 in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, bf16=bf16: bf16)
        assert mu.choose_dtype("auto", CUDA) == (torch.bfloat16 if bf16 else torch.float16)


def test_bf16_is_refused_on_a_cpu_that_cannot_multiply_in_it(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert mu.choose_dtype("bf16", CPU) == torch.bfloat16
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.raises(UserError, match="--precision bf16: this CPU.*--precision fp32"):
        mu.choose_dtype("bf16", CPU)


# --- The new token ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "placeholder",
    ["cat", "CAT", "ca", "c", "*", "photo</w>", "<|endoftext|>"]
    + ["", " ", "my cat", "<my\tcat>", "<cat>\n", "<c\u200bat>", "<c\u00a0at>"],
)
def test_a_placeholder_that_is_no_new_token_is_refused(placeholder, tokenizer):
    before = tokenizer.get_vocab()
    with pytest.raises(UserError, match="--placeholder_token"):
        mu.add_placeholder(tokenizer, placeholder)
    assert tokenizer.get_vocab() == before


def test_a_placeholder_that_exists_is_refused(tokenizer):
    mu.add_placeholder(tokenizer, "<kat>", 3)
    for taken in ("<kat>", "<kat>_1", "<kat>_2"):
        with pytest.raises(UserError, match="--token"):
            mu.add_placeholder(tokenizer, taken, option="--token")
    mu.add_placeholder(tokenizer, "<dog>_1")
    with pytest.raises(UserError, match="already"):
        mu.add_placeholder(tokenizer, "<dog>", 2)  # its second vector would be the other token


@pytest.mark.parametrize(
    "placeholder", ["<kat>", "<Kat>", "sks-1", "kätzchen", "<猫>", "my_cat", "<a|b>", "S*", "<kat"]
)
def test_a_placeholder_gets_new_ids_and_is_found(placeholder, tokenizer):
    vocabulary = tokenizer.get_vocab()
    token_ids = mu.add_placeholder(tokenizer, placeholder, 2)
    assert len(set(token_ids)) == 2 and not set(token_ids) & set(vocabulary.values())
    assert vocabulary.items() <= tokenizer.get_vocab().items()
    row = mu.tokenize(tokenizer, [f"a photo of {placeholder}, red"], {placeholder: token_ids})[0].tolist()
    assert [i for i in row if i in token_ids] == token_ids


def test_similar_placeholders_are_told_apart(tokenizer):
    counts = {"<kat>": 3, "<kat2>": 1, "<Kat>": 2, "sks9": 2, "sks9b": 1}
    ids = {token: mu.add_placeholder(tokenizer, token, count) for token, count in counts.items()}
    for prompt, found in {
        "a <kat> and a <kat2> on <Kat>": ["<kat>", "<kat2>", "<Kat>"],
        "<kat2><kat><Kat>": ["<kat2>", "<kat>", "<Kat>"],
        "<KAT> <kat2 > kat": [],
        "two <kat>s, <kat>-like": ["<kat>", "<kat>"],
        "sks9 sks9b, sks9.": ["sks9", "sks9b", "sks9"],
        "asks9 sks92": [],
    }.items():
        row = mu.tokenize(tokenizer, [prompt], ids)[0].tolist()
        learned = sum(ids.values(), [])
        assert [i for i in row if i in learned] == sum((ids[token] for token in found), []), prompt


def test_token_ids_equal_diffusers(tokenizer, capsys):
    prompts = ["", "a photo of a cat", "a photo, of  the RED cat!", "émigré 猫 \U0001f600", "cat " * 30, "cat " * 31]
    options = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
    expected = tokenizer(prompts, return_tensors="pt", **options).input_ids
    assert torch.equal(mu.tokenize(tokenizer, prompts), expected)
    assert capsys.readouterr().err == "note: a prompt can have 30 tokens; cut off: 'cat'\n"


def test_a_long_prompt_is_cut_with_a_note_but_never_in_the_placeholder(tokenizer, capsys):
    placeholders = {"<kat>": mu.add_placeholder(tokenizer, "<kat>", 3)}
    for end, note in (("<kat>", ""), ("<kat> red dog", "note: a prompt can have 30 tokens; cut off: 'red dog'\n")):
        row = mu.tokenize(tokenizer, ["cat " * 27 + end], placeholders)[0].tolist()
        assert row[-4:-1] == placeholders["<kat>"] and capsys.readouterr().err == note
    for prompt in ("cat " * 28 + "<kat>", "cat " * 40 + "<kat>", "<kat> " + "cat " * 30 + "<kat>"):
        with pytest.raises(UserError, match="too long.*<kat>"):
            mu.tokenize(tokenizer, [prompt], placeholders)


def test_the_initializer_is_any_text_that_the_model_knows(tokenizer):
    red, cat = (tokenizer.get_vocab()[word + "</w>"] for word in ("red", "cat"))
    assert mu.initializer_ids(tokenizer, " Cat ") == [cat] and mu.initializer_ids(tokenizer, "red cat") == [red, cat]
    assert mu.initializer_ids(tokenizer, "runs/kat/learned_embeds.safetensors") == []
    for wrong in ("", "  ", "<|endoftext|>", "cat <|endoftext|>"):
        with pytest.raises(UserError, match="--initializer_token"):
            mu.initializer_ids(tokenizer, wrong)


# --- The masked lookup ------------------------------------------------------------------------------------------------


def test_the_masked_lookup_trains_as_the_classical_method(tiny_model, tokenizer):
    """Classical: train the whole table, zero every other row's gradient, undo what weight decay does to them."""
    placeholders = {"<kat>": mu.add_placeholder(tokenizer, "<kat>", 2), "<dug>": mu.add_placeholder(tokenizer, "<dug>")}
    token_ids = sum(placeholders.values(), [])
    unet, ours, classical = (LOADERS[part](tiny_model) for part in ("unet", "text_encoder", "text_encoder"))
    vocabulary = ours.get_input_embeddings().weight.clone()
    init_rows = vocabulary[[tokenizer.get_vocab()[word + "</w>"] for word in ("cat", "toy", "dog")]]
    embedding = mu.install_learned_rows(ours, token_ids, init_rows)
    table = classical.resize_token_embeddings(len(tokenizer), mean_resizing=False).weight.requires_grad_(True)
    table.data[token_ids] = init_rows
    start = table.detach().clone()
    others = [i for i in range(len(table)) if i not in token_ids]

    latents, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    timesteps = torch.tensor([100, 700])
    ids = mu.tokenize(tokenizer, ["a photo of <kat> and a red cat", "two <kat> <dug> in a toy"], placeholders)
    noisy_latents = mu.load_schedule(tiny_model).add_noise(latents, noise, timesteps)
    optimizers = [torch.optim.AdamW([rows], lr=5e-3, weight_decay=1e-2) for rows in (embedding.learned_rows, table)]
    for _ in range(5):
        losses = []
        for text_embeddings in (mu.encode_tokens(ours, ids), classical(ids).last_hidden_state):
            losses.append((unet(noisy_latents, timesteps, text_embeddings).sample - noise).square().mean())
            losses[-1].backward()
        table.grad[others] = 0
        torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
        scale = table.grad.abs().max()
        assert scale > 0 and (embedding.learned_rows.grad - table.grad[token_ids]).abs().max() <= 1e-3 * scale
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        table.data[others] = start[others]
    assert (embedding.learned_rows - table[token_ids]).abs().max() <= 1e-5
    assert (embedding.learned_rows - init_rows).abs().max() > 0.01  # they did move
    assert torch.equal(embedding.weight, vocabulary)


def test_only_the_new_rows_learn_and_they_do_in_fp32(tiny_model, tokenizer):
    token_ids = mu.add_placeholder(tokenizer, "<kat>")
    encoder = mu.load_text_encoder(tiny_model, "cpu", torch.bfloat16)
    vocabulary = encoder.get_input_embeddings().weight.clone()
    init_rows = vocabulary[[7]].float()
    embedding = mu.install_learned_rows(encoder, token_ids, init_rows)
    learning = {name: p.dtype for name, p in encoder.named_parameters() if p.requires_grad}
    assert learning == {"embeddings.token_embedding.learned_rows": torch.float32}
    ids = torch.tensor([[3, *token_ids, 9]])
    mu.encode_tokens(encoder, ids).float().square().mean().backward()
    torch.optim.AdamW(embedding.parameters(), lr=0.1, weight_decay=0.5).step()
    assert (embedding.learned_rows - init_rows).abs().min() > 0.01
    assert torch.equal(embedding.weight, vocabulary)
    expected = torch.stack([vocabulary[3], embedding.learned_rows[0].bfloat16(), vocabulary[9]])
    assert torch.equal(embedding(ids)[0], expected)


def test_ids_may_be_in_any_order_and_inside_a_table_longer_than_the_vocabulary():
    table, rows = torch.randn(10, 4), torch.randn(3, 4)
    embedding = mu.LearnedEmbedding(table, [12, 8, 10], rows)
    expected = torch.stack([rows[1], table[9], rows[2], rows[0], table[0]])
    assert torch.equal(embedding(torch.tensor([[8, 9, 10, 12, 0]]))[0], expected)
    rows.zero_()
    assert embedding.learned_rows.abs().min() > 0  # a copy: the caller's tensor is the caller's


def test_nearest_tokens_are_of_the_vocabulary(tokenizer):
    table = torch.randn(len(tokenizer) + 3, 4)  # rows that no token has
    rows = torch.stack([table[tokenizer.convert_tokens_to_ids("cat</w>")], table[-1]])
    nearest = mu.nearest_tokens(tokenizer, table, rows)
    assert nearest[0][0] == "cat" and all(len(tokens) == 3 for tokens in nearest)


def test_text_encoders_with_nested_layers_work_too():
    """Before transformers 5.6 CLIPTextModel kept its layers in .text_model, as this class still does."""
    tiny = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "projection_dim": 4}
    encoder = CLIPTextModelWithProjection(CLIPTextConfig(num_attention_heads=2, **tiny)).eval()
    mu.install_learned_rows(encoder, [20], encoder.get_input_embeddings().weight[[5]])
    new, copied = (mu.encode_tokens(encoder, torch.tensor([[1, 5, i, 2]])) for i in (20, 5))
    assert torch.equal(new, copied)


# --- Images -----------------------------------------------------------------------------------------------------------


def test_encoded_and_decoded_images_equal_diffusers(tiny_model):
    vae = LOADERS["vae"](tiny_model)
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = mu.encode_images(vae, images, batch=2)
    with torch.no_grad():
        reference = vae.encode(images).latent_dist
        torch.testing.assert_close(mean, reference.mean * 0.7, rtol=0, atol=1e-5)
        torch.testing.assert_close(std, reference.std * 0.7, rtol=1e-4, atol=0)
        expected = vae.decode(mean / 0.7).sample
    torch.testing.assert_close(mu.decode_latents(vae, mean), expected, rtol=0, atol=1e-4)
    theirs = VaeImageProcessor().postprocess(images * 1.2)
    assert [image.tobytes() for image in mu.to_pil(images * 1.2)] == [image.tobytes() for image in theirs]


def test_a_vae_in_half_precision_gives_fp32(tiny_model):
    vae = mu.load_vae(tiny_model, "cpu", torch.bfloat16)
    mean, std = mu.encode_images(vae, torch.zeros(1, 3, 16, 16))
    assert mean.dtype == std.dtype == mu.decode_latents(vae, mean).dtype == torch.float32


def test_images_that_are_not_finite_are_refused(tiny_model):
    with pytest.raises(UserError, match="--precision.*not finite"):
        mu.decode_latents(LOADERS["vae"](tiny_model), torch.full((1, 4, 8, 8), torch.nan))
