"""The frozen model, the noise schedule and the new word, held against diffusers and the method's classical form."""

import copy
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
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

import model_utils
from model_utils import UserError


@pytest.fixture
def tokenizer(tiny_model):
    return model_utils.load_tokenizer(tiny_model)


def write_schedule(folder, **config):
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return str(folder)


# --- Noise ------------------------------------------------------------------------------------------------------------

SCHEDULES = [
    {"beta_schedule": "linear"},
    {"beta_schedule": "linear", "beta_start": 0.001, "beta_end": 0.01, "num_train_timesteps": 500},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": [0.1, 0.2, 0.3, 0.4], "num_train_timesteps": 4},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "rescale_betas_zero_snr": True},
]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("config", SCHEDULES)
def test_schedule_noise_and_target_equal_diffusers(config, prediction_type, tmp_path):
    config = config | {"prediction_type": prediction_type}
    schedule = model_utils.load_schedule(write_schedule(tmp_path, **config))
    reference = DDPMScheduler(**config)
    assert schedule.num_train_timesteps == len(reference.alphas_cumprod)
    assert schedule.alphas_cumprod.dtype == torch.float32
    torch.testing.assert_close(schedule.alphas_cumprod, reference.alphas_cumprod, rtol=1e-5, atol=1e-7)

    generator = torch.Generator().manual_seed(0)
    timesteps = torch.linspace(0, schedule.num_train_timesteps - 1, 8).long()
    latents, noise = torch.randn(2, 8, 4, 8, 8, generator=generator)
    noisy_latents = schedule.add_noise(latents, noise, timesteps)
    torch.testing.assert_close(noisy_latents, reference.add_noise(latents, noise, timesteps), rtol=1e-5, atol=1e-5)
    target = noise if prediction_type == "epsilon" else reference.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(schedule.target(latents, noise, timesteps), target, rtol=1e-5, atol=1e-5)
    ratio = (reference.alphas_cumprod / (1 - reference.alphas_cumprod))[timesteps]
    torch.testing.assert_close(schedule.snr(timesteps), ratio, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_latents_get_the_noise_of_fp32(dtype):
    """diffusers rounds alphas_cumprod to the latents' dtype: in bf16 the first timesteps then get no noise at all."""
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    reference = DDPMScheduler(**config)
    schedule = model_utils.NoiseSchedule(reference.alphas_cumprod)
    latents, noise = torch.zeros(1, 4, 8, 8, dtype=dtype), torch.ones(1, 4, 8, 8, dtype=dtype)
    for timestep in (0, 1, 10, 500, 999):
        timesteps = torch.tensor([timestep])
        exact = (1 - reference.alphas_cumprod.double()[timestep]).sqrt()
        noisy_latents = schedule.add_noise(latents, noise, timesteps)
        assert noisy_latents.dtype == dtype
        half_a_last_digit = torch.finfo(dtype).eps / 2
        assert abs(noisy_latents.double() / exact - 1).max() <= 1.01 * half_a_last_digit
    if dtype == torch.bfloat16:
        assert reference.add_noise(latents, noise, torch.tensor([0])).abs().max() == 0  # the trap is still there


def test_schedule_reads_what_samplers_need(tiny_model, tmp_path):
    schedule = model_utils.load_schedule(tiny_model)
    kept = (schedule.prediction_type, schedule.timestep_spacing, schedule.steps_offset, schedule.set_alpha_to_one)
    assert kept == ("epsilon", "leading", 1, False)
    folder = write_schedule(tmp_path, beta_schedule="linear", timestep_spacing="trailing", steps_offset=0)
    schedule = model_utils.load_schedule(folder)
    assert (schedule.timestep_spacing, schedule.steps_offset) == ("trailing", 0)
    absent = model_utils.load_schedule(write_schedule(tmp_path, beta_schedule="linear"))
    assert absent.timestep_spacing is None  # then each sampler takes its own, as diffusers' schedulers do
    assert absent.steps_offset == 1  # StableDiffusionPipeline makes it 1 in every scheduler it is given
    theirs = DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert absent.set_alpha_to_one is theirs.config.set_alpha_to_one is True
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"beta_')
    with pytest.raises(UserError, match="scheduler_config.json cannot be read"):
        model_utils.load_schedule(tmp_path)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"beta_schedule": "sigmoid"}, "sigmoid"),
        ({"beta_schedule": "linear", "prediction_type": "sample"}, "sample"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "None"),  # no betas: not a guess of ours
    ],
)
def test_other_schedules_are_refused(config, named, tmp_path):
    with pytest.raises(UserError, match=named):
        model_utils.load_schedule(write_schedule(tmp_path, **config))


def test_missing_schedule_is_named(tmp_path):
    with pytest.raises(UserError, match="scheduler_config.json"):
        model_utils.load_schedule(str(tmp_path))


# --- Loading ----------------------------------------------------------------------------------------------------------

LOADERS = {
    "tokenizer": model_utils.load_tokenizer,
    "text_encoder": lambda model: model_utils.load_text_encoder(model, "cpu"),
    "vae": lambda model: model_utils.load_vae(model, "cpu"),
    "unet": lambda model: model_utils.load_unet(model, "cpu"),
}


def test_parts_are_frozen(tiny_model):
    for part in ("text_encoder", "vae", "unet"):
        module = LOADERS[part](tiny_model)
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_parts_load_in_silence_files_of_another_time_too(tiny_model, tmp_path):
    """In 2022 the text encoders' keys began with text_model and position_ids was one; and options come and go."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    encoder = LOADERS["text_encoder"](tiny_model)
    old = {f"text_model.{key}": tensor for key, tensor in encoder.state_dict().items()}
    old["text_model.embeddings.position_ids"] = torch.arange(32).unsqueeze(0)
    save_file(old, model / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    loaded = LOADERS["text_encoder"](str(model)).state_dict()
    assert loaded.keys() == encoder.state_dict().keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in encoder.state_dict().items())

    config = model / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"of_another_time": 1}))

    program = (  # a process of its own: the libraries' loggers keep the stderr they began with
        "import model_utils as m\n"
        f"model = {str(model)!r}\n"
        "m.load_tokenizer(model), m.load_schedule(model)\n"
        "[load(model, 'cpu') for load in (m.load_text_encoder, m.load_vae, m.load_unet)]"
    )
    folder = Path(model_utils.__file__).parent
    run = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_dtype_is_the_one_asked_for(tiny_model, tmp_path):
    """Since 5.0 transformers loads a file in its own dtype; rows learned in half precision hardly move."""
    encoder = model_utils.load_text_encoder(tiny_model, "cpu", torch.float16)
    assert encoder.get_input_embeddings().weight.dtype == torch.float16
    encoder.save_pretrained(tmp_path / "text_encoder")
    assert model_utils.load_text_encoder(str(tmp_path), "cpu").get_input_embeddings().weight.dtype == torch.float32
    assert model_utils.load_unet(tiny_model, "cpu", torch.bfloat16).dtype == torch.bfloat16


def test_variant_is_read(tiny_model, tmp_path):
    model_utils.load_vae(tiny_model, "cpu", torch.float16).save_pretrained(tmp_path / "vae", variant="fp16")
    with pytest.raises(UserError, match="vae"):
        model_utils.load_vae(str(tmp_path), "cpu")
    assert model_utils.load_vae(str(tmp_path), "cpu", variant="fp16").dtype == torch.float32


@pytest.mark.parametrize("part", LOADERS)
def test_broken_parts_are_named(part, tiny_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    if part == "tokenizer":
        for file in (model / part).iterdir():
            file.unlink()
    else:
        weights = next((model / part).glob("*.safetensors"))
        weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=part):
        LOADERS[part](str(model))
    shutil.rmtree(model / part)
    with pytest.raises(UserError, match=f"'{part}' is missing"):
        LOADERS[part](str(model))
    with pytest.raises(UserError, match="no such file or folder"):
        LOADERS[part](str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match="no-such-owner/no-such-model: .*no such folder here"):
        LOADERS[part]("no-such-owner/no-such-model")


def test_weights_that_are_not_there_are_not_made_up(tiny_model, tmp_path):
    for part in ("text_encoder", "unet"):
        shutil.copytree(Path(tiny_model, part), tmp_path / part)
        weights = next((tmp_path / part).glob("*.safetensors"))
        tensors = load_file(weights)
        dropped = sorted(tensors)[0]
        del tensors[dropped]
        save_file(tensors, weights, metadata={"format": "pt"})
        with pytest.raises(UserError, match=f"'{part}' cannot be loaded .it lacks weights"):
            LOADERS[part](str(tmp_path))


def test_inpainting_unet_is_refused(tiny_model, tmp_path):
    unet = LOADERS["unet"](tiny_model)
    config = dict(unet.config) | {"in_channels": 9}
    type(unet).from_config(config).save_pretrained(tmp_path / "unet")
    with pytest.raises(UserError, match="Stable Diffusion 1 or 2"):
        model_utils.load_unet(str(tmp_path), "cpu")


def test_unknown_sentence_length_becomes_clips(tiny_model, tmp_path):
    shutil.copytree(Path(tiny_model, "tokenizer"), tmp_path / "tokenizer")
    file = tmp_path / "tokenizer" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["model_max_length"]
    file.write_text(json.dumps(config))
    assert model_utils.load_tokenizer(str(tmp_path)).model_max_length == 77


def test_device_and_precision():
    assert model_utils.choose_device("cpu") == torch.device("cpu")
    assert model_utils.choose_device("auto").type in ("cpu", "cuda", "mps")
    if not torch.backends.mps.is_available():
        with pytest.raises(UserError, match="--device mps"):
            model_utils.choose_device("mps")
    assert model_utils.choose_dtype("auto", "cpu") == model_utils.choose_dtype("no", "cpu") == torch.float32
    assert model_utils.choose_dtype("bf16", torch.device("cpu")) == torch.bfloat16
    assert model_utils.choose_dtype("fp16", "cuda") == torch.float16
    with pytest.raises(UserError, match="bf16 or fp32"):
        model_utils.choose_dtype("fp16", torch.device("cpu"))


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Linear(6, 5), (2, 3, 6)),
        (nn.Linear(6, 5, bias=False), (2, 6)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 8)),
        (nn.Conv2d(4, 6, 1, groups=2, bias=False), (1, 4, 5, 5)),
    ],
)
def test_a_widened_layer_is_the_fp32_layer_and_keeps_no_weight(layer, shape):
    """On CPUs that cannot multiply in half: the weights stay in half, the sums are those of fp32."""
    half = copy.deepcopy(layer).requires_grad_(False).bfloat16()
    exact = copy.deepcopy(half).float()  # the same rounded numbers
    model_utils.widen_when_used(half)
    x, kept = torch.randn(shape, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
        model_utils.WidenedLayer.apply(x, half)
    y = half(x)
    assert half.weight.dtype == torch.bfloat16 and y.dtype == torch.float32 and not kept
    torch.testing.assert_close(y, exact(x))
    direction = torch.randn(y.shape)
    (grad,), (expected,) = (torch.autograd.grad(f(x), x, direction) for f in (half, exact))
    torch.testing.assert_close(grad, expected)


def test_what_large_tensors_are_kept_for_the_gradient_is_kept_in_half(monkeypatch):
    block = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.SiLU()).requires_grad_(False).bfloat16()
    exact, kept = copy.deepcopy(block).float(), []
    hooks = torch.autograd.graph.saved_tensors_hooks

    def watched(pack, unpack):
        return hooks(lambda x: kept.append((x.numel(), pack(x)[0].dtype)) or pack(x), unpack)

    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", watched)
    model_utils.widen_when_used(block)
    x = torch.randn(2, 1024, 64, requires_grad=True)
    y, direction = block(x), torch.randn(2, 1024, 64)
    assert {dtype for n, dtype in kept if n == x.numel()} == {torch.bfloat16}  # what LayerNorm and SiLU were given
    assert {dtype for n, dtype in kept if n < x.numel()} == {torch.float32}
    torch.testing.assert_close(y, exact(x))  # forward nothing is lost
    (grad,), (expected,) = (torch.autograd.grad(f, x, direction) for f in (y, exact(x)))
    assert 0 < (grad - expected).norm() < 0.01 * expected.norm()


# --- The word ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "placeholder",
    ["cat", "Cat", "CAT", "ca", "c", "*", "<", "photo</w>", "dog</w>", "<|endoftext|>", "<|startoftext|>"]
    + ["<|EndOfText|>", "", " ", "my cat", "<my\tcat>", "<cat>\n", "<c\u200bat>", "<c\u00a0at>"],
)
def test_placeholder_that_is_no_new_word_is_refused(placeholder, tokenizer):
    before = tokenizer.get_vocab()
    with pytest.raises(UserError, match="--placeholder_token"):
        model_utils.add_placeholder(tokenizer, placeholder)
    assert tokenizer.get_vocab() == before


def test_placeholder_twice_is_refused(tokenizer):
    model_utils.add_placeholder(tokenizer, "<kat>", 3)
    for taken in ("<kat>", "<kat>_1", "<kat>_2"):
        with pytest.raises(UserError, match="--token"):
            model_utils.add_placeholder(tokenizer, taken, option="--token")
    model_utils.add_placeholder(tokenizer, "<dog>_1")
    with pytest.raises(UserError, match="already"):
        model_utils.add_placeholder(tokenizer, "<dog>", 2)  # its second vector would be the other word
    for wrong in (0, -1, 76):
        with pytest.raises(UserError, match="--num_vectors"):
            model_utils.add_placeholder(tokenizer, "<new>", wrong)


@pytest.mark.parametrize(
    "placeholder", ["<kat>", "<Kat>", "sks-1", "kätzchen", "<猫>", "my_cat", "<a|b>", "S*", "<kat"]
)
def test_placeholder_gets_new_rows_and_is_found(placeholder, tokenizer):
    words = tokenizer.get_vocab()
    token_ids = model_utils.add_placeholder(tokenizer, placeholder, 2)
    assert len(set(token_ids)) == 2
    assert not set(token_ids) & set(words.values())
    assert {word: tokenizer.get_vocab()[word] for word in words} == words
    rows = model_utils.tokenize(tokenizer, [f"a photo of {placeholder}, red"], {placeholder: token_ids})
    found = [i for i in rows[0].tolist() if i in token_ids]
    assert found == token_ids


def test_alike_placeholders_find_their_own_rows(tokenizer):
    names = ["<kat>", "<kat2>", "<Kat>", "sks9", "sks9b"]
    placeholders = {
        name: model_utils.add_placeholder(tokenizer, name, n) for name, n in zip(names, (3, 1, 2, 2, 1), strict=True)
    }
    of = placeholders.get
    learned = {i for ids in placeholders.values() for i in ids}

    def found(prompt):
        return [i for i in model_utils.tokenize(tokenizer, [prompt], placeholders)[0].tolist() if i in learned]

    assert found("a <kat> and a <kat2> on <Kat>") == of("<kat>") + of("<kat2>") + of("<Kat>")
    assert found("<kat2><kat><Kat>") == of("<kat2>") + of("<kat>") + of("<Kat>")
    assert found("<KAT> <kat2 > kat") == []
    assert found("two <kat>s, <kat>-like") == of("<kat>") * 2
    assert found("sks9 sks9b, sks9.") == of("sks9") + of("sks9b") + of("sks9")
    assert found("asks9 sks92") == []
    assert found("<kat> <kat>_1 <kat>_2 and <kat>") == of("<kat>") * 2  # as diffusers spells it: not doubled


def test_token_ids_equal_diffusers(tokenizer, capsys):
    prompts = ["", "a photo of a cat", "a photo, of  the RED cat!", "émigré 猫 \U0001f600", "cat " * 30, "cat " * 31]
    kwargs = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
    expected = tokenizer(prompts, return_tensors="pt", **kwargs).input_ids
    assert torch.equal(model_utils.tokenize(tokenizer, prompts), expected)
    said = capsys.readouterr().err
    assert said.count("cut off") == 1
    assert "'cat'" in said


def test_a_long_prompt_says_what_is_cut_and_never_cuts_the_word(tokenizer, capsys):
    placeholders = {"<kat>": model_utils.add_placeholder(tokenizer, "<kat>", 3)}
    row = model_utils.tokenize(tokenizer, ["cat " * 27 + "<kat>"], placeholders)[0].tolist()
    assert row[-4:-1] == placeholders["<kat>"]
    assert capsys.readouterr().err == ""
    row = model_utils.tokenize(tokenizer, ["cat " * 27 + "<kat> red dog"], placeholders)[0].tolist()
    assert row[-4:-1] == placeholders["<kat>"]
    assert "red dog" in capsys.readouterr().err
    for prompt in ("cat " * 28 + "<kat>", "cat " * 40 + "<kat>", "<kat> " + "cat " * 30 + "<kat>"):
        with pytest.raises(UserError, match="too long.*<kat>"):
            model_utils.tokenize(tokenizer, [prompt], placeholders)


def test_initializer_is_one_word(tokenizer):
    assert model_utils.initializer_id(tokenizer, "cat") == tokenizer.get_vocab()["cat</w>"]
    assert model_utils.initializer_id(tokenizer, " Cat ") == tokenizer.get_vocab()["cat</w>"]
    with pytest.raises(UserError, match=r"'red', 'cat'.*--initializer_token red or --initializer_token cat"):
        model_utils.initializer_id(tokenizer, "red cat")
    model_utils.add_placeholder(tokenizer, "<kat>")
    for wrong in ("", "  ", "<kat>", "<|endoftext|>", "zzz"):
        with pytest.raises(UserError, match="--initializer_token"):
            model_utils.initializer_id(tokenizer, wrong)


# --- The masked lookup ------------------------------------------------------------------------------------------------


def make_batch(tokenizer, placeholders, schedule):
    generator = torch.Generator().manual_seed(1)
    latents, noise = torch.randn(2, 2, 4, 8, 8, generator=generator)
    timesteps = torch.randint(0, schedule.num_train_timesteps, (2,), generator=generator)
    prompts = ["a photo of <kat> and a red cat", "two <kat> <dug> in a toy"]
    return latents, noise, timesteps, model_utils.tokenize(tokenizer, prompts, placeholders)


def test_masked_lookup_equals_the_classical_form(tiny_model, tokenizer):
    """Classical: train the whole table, zero every other row's gradient, undo what weight decay does to them."""
    placeholders = {"<kat>": model_utils.add_placeholder(tokenizer, "<kat>", 2)}
    placeholders["<dug>"] = model_utils.add_placeholder(tokenizer, "<dug>")
    token_ids = placeholders["<kat>"] + placeholders["<dug>"]
    unet, schedule = LOADERS["unet"](tiny_model), model_utils.load_schedule(tiny_model)
    ours, classical = LOADERS["text_encoder"](tiny_model), LOADERS["text_encoder"](tiny_model)
    vocabulary = ours.get_input_embeddings().weight.clone()
    init_rows = vocabulary[[tokenizer.get_vocab()[word + "</w>"] for word in ("cat", "toy", "dog")]]

    embedding = model_utils.install_learned_rows(ours, token_ids, init_rows)
    table = classical.resize_token_embeddings(len(tokenizer), mean_resizing=False).weight.requires_grad_(True)
    table.data[token_ids] = init_rows
    start = table.detach().clone()
    others = [i for i in range(len(table)) if i not in token_ids]

    batch = make_batch(tokenizer, placeholders, schedule)
    latents, noise, timesteps, ids = batch
    noisy_latents = DDPMScheduler.from_pretrained(tiny_model, subfolder="scheduler").add_noise(
        latents, noise, timesteps
    )
    optimizers = [torch.optim.AdamW([rows], lr=5e-3, weight_decay=1e-2) for rows in (embedding.learned_rows, table)]
    for _ in range(20):
        for optimizer in optimizers:
            optimizer.zero_grad()
        text_embeddings = model_utils.encode_tokens(ours, ids)
        our_noisy_latents = schedule.add_noise(latents, noise, timesteps)
        our_loss = (unet(our_noisy_latents, timesteps, text_embeddings).sample - noise).pow(2).mean()
        our_loss.backward()
        loss = (unet(noisy_latents, timesteps, classical(ids)[0]).sample - noise).pow(2).mean()
        loss.backward()
        table.grad[others] = 0
        torch.testing.assert_close(our_loss, loss, rtol=1e-6, atol=0)
        scale = table.grad.abs().max()
        assert scale > 0
        assert (embedding.learned_rows.grad - table.grad[token_ids]).abs().max() <= 1e-3 * scale
        for optimizer in optimizers:
            optimizer.step()
        table.data[others] = start[others]
    assert (embedding.learned_rows - table[token_ids]).abs().max() <= 1e-5
    assert (embedding.learned_rows - init_rows).abs().max() > 0.01  # they did move
    assert torch.equal(embedding.weight, vocabulary)


def test_only_the_new_rows_can_learn(tiny_model, tokenizer):
    token_ids = model_utils.add_placeholder(tokenizer, "<kat>")
    encoder = model_utils.load_text_encoder(tiny_model, "cpu", torch.bfloat16)
    vocabulary = encoder.get_input_embeddings().weight.clone()
    init_rows = vocabulary[[7]].float()
    embedding = model_utils.install_learned_rows(encoder, token_ids, init_rows)
    learning = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert learning == {"embeddings.token_embedding.learned_rows"}
    assert embedding.learned_rows.dtype == torch.float32
    ids = torch.tensor([[3, *token_ids, 9]])
    in_half = model_utils.computes_in_half(torch.bfloat16, "cpu")  # else the weights are widened when used
    assert model_utils.encode_tokens(encoder, ids).dtype == (torch.bfloat16 if in_half else torch.float32)
    model_utils.encode_tokens(encoder, ids).float().square().mean().backward()
    torch.optim.AdamW(embedding.parameters(), lr=0.1, weight_decay=0.5).step()
    assert (embedding.learned_rows - init_rows).abs().min() > 0.01
    assert torch.equal(embedding.weight, vocabulary)
    assert torch.equal(embedding(ids)[0, [0, 2]], vocabulary[[3, 9]])
    assert torch.equal(embedding(ids)[0, 1], embedding.learned_rows[0].bfloat16())


def test_lookup_with_rows_of_its_own_order_and_a_longer_table():
    """Some checkpoints' tables are longer than their tokenizers' vocabulary: a new id then lies inside the table."""
    table, rows = torch.randn(10, 4), torch.randn(3, 4)
    embedding = model_utils.LearnedEmbedding(table, [12, 8, 10], rows)
    expected = torch.stack([rows[1], table[9], rows[2], rows[0], table[0]])
    assert torch.equal(embedding(torch.tensor([[8, 9, 10, 12, 0]]))[0], expected)
    rows.zero_()
    assert embedding.learned_rows.abs().min() > 0  # a copy: the caller's tensor is the caller's


def test_nearest_words_are_words(tokenizer):
    table = torch.randn(len(tokenizer) + 3, 4)  # rows that no word has
    rows = torch.stack([table[tokenizer.convert_tokens_to_ids("cat</w>")], table[-1]])
    found = model_utils.nearest_words(tokenizer, table, rows)
    assert found[0][0] == "cat" and all(len(words) == 3 for words in found)


def test_nested_text_models_too():
    """Before transformers 5.6 CLIPTextModel kept its layers in .text_model, as this class still does."""
    config = CLIPTextConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, projection_dim=4
    )
    encoder = CLIPTextModelWithProjection(config).eval()
    ids = torch.tensor([[1, 5, 20, 2]])
    init_rows = encoder.get_input_embeddings().weight[[5]]
    embedding = model_utils.install_learned_rows(encoder, [20], init_rows)
    assert encoder.text_model.embeddings.token_embedding is embedding
    same = model_utils.encode_tokens(encoder, torch.tensor([[1, 5, 5, 2]]))
    assert torch.equal(model_utils.encode_tokens(encoder, ids), same)


# --- Pictures ---------------------------------------------------------------------------------------------------------


def test_pictures_equal_diffusers(tiny_model):
    vae = LOADERS["vae"](tiny_model)
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = model_utils.encode_images(vae, images, batch=2)
    with torch.no_grad():
        reference = vae.encode(images).latent_dist
        torch.testing.assert_close(mean, reference.mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(std, reference.std, rtol=1e-4, atol=0)
        latents = mean * vae.config.scaling_factor
        decoded = model_utils.decode_latents(vae, latents)
        expected = vae.decode(latents / vae.config.scaling_factor).sample
    torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-4)
    theirs = VaeImageProcessor().postprocess(images * 1.2)
    assert [image.tobytes() for image in model_utils.to_pil(images * 1.2)] == [image.tobytes() for image in theirs]


def test_pictures_in_half_come_back_in_fp32(tiny_model):
    vae = model_utils.load_vae(tiny_model, "cpu", torch.bfloat16)
    mean, std = model_utils.encode_images(vae, torch.zeros(1, 3, 16, 16))
    decoded = model_utils.decode_latents(vae, mean)
    assert mean.dtype == std.dtype == decoded.dtype == torch.float32
    assert decoded.shape == (1, 3, 16, 16)
