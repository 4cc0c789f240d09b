"""The command line: recipes, diffusers' names of options, and one sentence for each mistake that people really make."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import options
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

import model_utils as mu
import sample
import train

ROOT = Path(train.__file__).parent


def test_the_bundled_model_names_fast_and_any_other_gets_notebook(tiny_model):
    recipe_of = lambda *argv: train.parse_options([*argv]).recipe  # noqa: E731
    assert recipe_of() == recipe_of("--model", str(ROOT / "mini_sd")) == "fast"
    assert recipe_of("--model", tiny_model) == "notebook" and recipe_of("--recipe", "notebook") == "notebook"
    args = vars(train.parse_options(["--recipe", "notebook", "--steps", "7"]))
    assert {name: args[name] for name in train.RECIPES["notebook"]} == train.RECIPES["notebook"] | {"steps": 7}


def test_the_learning_rate_of_fast_is_the_root_mean_square_of_the_vocabulary(
    tiny_model, image_folder, tmp_path, components
):
    args = train.parse_options(options(tiny_model, image_folder, "--output_dir", str(tmp_path / "run"), steps=1))
    args.lr = train.RECIPES["fast"]["lr"]
    config = mu.read_json(train.train(args) / "config.json")
    table = components.text_encoder.get_input_embeddings().weight
    assert config["lr"] == pytest.approx(table.square().mean().sqrt().item()) and config["resolution"] == 16


def test_a_command_for_diffusers_script_sets_the_same_options():
    pasted = """--pretrained_model_name_or_path=mini_sd --train_data_dir=. --learnable_property=object
        --placeholder_token=<toy> --initializer_token=toy --resolution=512 --train_batch_size=1
        --gradient_accumulation_steps=4 --max_train_steps=3000 --learning_rate=5.0e-04 --scale_lr
        --lr_scheduler=constant --lr_warmup_steps=0 --checkpointing_steps=300 --validation_prompt=hello
        --validation_steps=50 --mixed_precision=no --seed=3 --num_vectors=2"""
    ours = """--model mini_sd --images . --placeholder_token <toy> --initializer_token toy --resolution 512
        --batch_size 1 --grad_accum 4 --steps 3000 --lr 5e-4 --scale_lr --lr_scheduler constant --lr_warmup_steps 0
        --save_steps 300 --preview_prompt hello --preview_steps 50 --precision fp32 --seed 3 --num_vectors 2"""
    args = train.parse_options(pasted.split())
    assert args == train.parse_options(ours.split()) and args.lr == 5e-4
    assert train.build_parser().parse_args(["--resume_from_checkpoint", "latest"]).resume == "latest"
    pasted = "--pretrained_model_name_or_path a --num_inference_steps 9 --guidance_scale 2 --mixed_precision no --out b"
    ours = "--model a --steps 9 --guidance 2 --precision no --output_dir b"
    parse = sample.build_parser().parse_args
    assert parse(pasted.split()) == parse(ours.split()) != parse([])


@pytest.fixture
def place(tmp_path, monkeypatch, model, image_folder):
    """An empty folder to work in, with files to make mistakes with."""
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("damaged").mkdir()
    Path("damaged", "a.png").write_bytes(b"no image")
    Path("one.ckpt").touch()
    Path("templates.txt").write_text("a catkat{}s\n")
    save_file({"<kat>": torch.zeros(768)}, "wide.safetensors")
    save_file({"emb_params": torch.zeros(32)}, "unnamed.safetensors")
    save_file({"<kat>": torch.zeros(32), "<pup>": torch.zeros(32)}, "two.safetensors")
    save_file({"cat": torch.zeros(32)}, "cat.safetensors")
    shutil.copytree(image_folder, "images")
    return tmp_path


TRAIN_MISTAKES = {
    "--images nowhere": ["--images", "nowhere", "no such"],
    "--images empty": ["--images", "empty", "no image"],
    "--images damaged": ["--images", "damaged", "no image"],
    "--initializer_token <|endoftext|>": ["--initializer_token", "no word that the model knows"],
    "--placeholder_token cat": ["--placeholder_token 'cat'", "already a token"],
    "--placeholder_token kat --templates templates.txt": ["--placeholder_token", "no separate word", "catkatkats"],
    "--resolution 17": ["--resolution 17", "multiple of 2"],
    "--model one.ckpt": ["--model", "one file", "from_single_file"],
    "--model nowhere": ["--model nowhere", "no such folder"],
    "--model empty": ["--model", "its part 'text_encoder' cannot be loaded"],
    "--precision fp16": ["--precision fp16", "needs a GPU"],
    "--resume=latest --output_dir new": ["--resume", "new is no folder of a run", "leave out --resume"],
    "--seed=-1": ["--seed -1", "take 0 or"],
    "--batch_size 0": ["--batch_size", "must be 1 or more"],
    "--stpes 3 --push_to_hub": ["unrecognized arguments: --stpes 3 --push_to_hub"],
}


@pytest.mark.parametrize("mistake", TRAIN_MISTAKES)
def test_mistakes_in_training_get_one_sentence_and_write_nothing(mistake, place, refused):
    argv = options("model", "images") + [word for part in mistake.split(" ") for word in part.split("=", 1)]
    sentence = refused(train.main, argv)
    assert all(word in sentence for word in TRAIN_MISTAKES[mistake]), sentence
    assert not Path("runs").exists() and not Path("images/run").exists()


def test_own_images_need_an_initializer_and_photographs_a_model(place, refused, capsys):
    assert "--initializer_token" in refused(train.main, ["--images", "images"])
    notes = {"": True, "--model model": False, f"--images {ROOT}/mini_sd/concepts/pup": False}
    for more, noted in notes.items():
        train.parse_options(["--images", "images", "--initializer_token", "dog", *more.split()])
        assert ("name a --model" in capsys.readouterr().err) == noted, more


SAMPLE_MISTAKES = {
    "--embedding nowhere.bin": ["--embedding nowhere.bin", "no such file"],
    "--embedding empty": ["--embedding empty", "no learned_embeds.safetensors in it"],
    "--embedding wide.safetensors": ["width 768", "wants 32", "--model"],
    "--embedding unnamed.safetensors": ["does not name its token", "--token"],
    "--embedding two.safetensors": ["<kat>, <pup>", "--token"],
    "--embedding cat.safetensors": ["--token 'cat'", "already a token"],
    "--embedding unnamed.safetensors --token *": ["--token '*'", "already a token"],
    "--embedding unnamed.safetensors --token <a> --height 17": ["--height 17", "multiples of 2"],
    "--embedding unnamed.safetensors --token <a> --steps 2000": ["--steps 2000", "1 to 1000"],
    "--embedding unnamed.safetensors --token <a> --score": ["--score", "run folder"],
    "--embedding unnamed.safetensors --token <a> --prompt " + "x" * 200 + "<a>": ["too long for '<a>'"],
    "--prompt x --precision fp16": ["--precision fp16"],
    "--seed 0": ["no run in runs/: train one first"],
    "--stpes 3 --push_to_hub": ["unrecognized arguments: --stpes 3 --push_to_hub"],
}


@pytest.mark.parametrize("mistake", SAMPLE_MISTAKES)
def test_mistakes_in_sampling_get_one_sentence(mistake, place, refused):
    sentence = refused(sample.main, ["--model", "model", *mistake.split(" ")])
    assert all(word in sentence for word in SAMPLE_MISTAKES[mistake]), sentence
    assert len(sentence) < 300


@pytest.mark.parametrize("part", ["tokenizer", "text_encoder", "vae", "unet", "scheduler"])
def test_a_damaged_missing_or_incomplete_part_of_a_model_is_named(part, model, capsys):
    def refused(why):
        with pytest.raises(mu.UserError, match=f"--model .*'{part}' cannot be loaded {why}"):
            mu.load_components(str(model))
        assert capsys.readouterr() == ("", "")

    for file in (model / part).glob("*.safetensors"):
        weights = load_file(file)
        del weights[min(weights)]
        save_file(weights, file, metadata={"format": "pt"})
        refused(".it lacks weights")  # they are not made up
    for file in (model / part).iterdir():
        file.write_bytes(file.read_bytes()[:-100])
    refused("")
    shutil.rmtree(model / part)
    refused("")


@pytest.mark.parametrize("other", [{"in_channels": 9}, {"cross_attention_dim": 64}])
def test_a_model_that_is_no_stable_diffusion_1_or_2_is_refused(other, model):
    config = json.loads((model / "unet" / "config.json").read_text())
    UNet2DConditionModel.from_config(config | other).save_pretrained(model / "unet")
    with pytest.raises(mu.UserError, match=f"no Stable Diffusion 1 or 2.*{[*other.values()][0]}"):
        mu.load_components(str(model))


def test_variants_and_dtypes_reach_every_part(model, tiny_model):
    """fp16 files give fp32 rows."""
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None).to(torch.float16)
    for part in (pipeline.text_encoder, pipeline.vae, pipeline.unet):
        part.get_parameter(next(name for name, _ in part.named_parameters())).data.fill_(0.5)
    pipeline.save_pretrained(model, variant="fp16")
    for variant in (None, "fp16"):
        components = mu.load_components(str(model), variant=variant)
        for network in (components.text_encoder, components.vae, components.unet):
            first = next(network.parameters())
            assert first.dtype == torch.float32 and not first.requires_grad and not network.training
            assert bool((first == 0.5).all()) == bool(variant)
    half = mu.load_components(tiny_model, torch.bfloat16)
    assert (half.unet.dtype, half.text_encoder.dtype, half.vae.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_the_length_of_a_prompt_is_what_the_text_encoder_reads(model):
    file = model / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 10**30}))
    assert mu.load_components(str(model)).tokenizer.model_max_length == 32


@pytest.mark.parametrize("available, chosen", [(["cuda", "mps"], "cuda"), (["mps"], "mps"), ([], "cpu")])
def test_the_fastest_device_is_chosen_and_a_missing_one_refused(available, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in available)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in available)
    assert mu.choose_device("auto") == torch.device(chosen) and mu.choose_device("cpu") == torch.device("cpu")
    for missing in {"cuda", "mps"} - set(available):
        with pytest.raises(mu.UserError, match=f"--device {missing}"):
            mu.choose_device(missing)


@pytest.mark.parametrize("bf16", [True, False])
def test_precision_is_half_on_a_gpu_and_full_elsewhere(bf16, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    cpu, cuda, mps = (torch.device(name) for name in ("cpu", "cuda", "mps"))
    assert mu.choose_precision("auto", cuda) == ("bf16" if bf16 else "fp16")
    chosen = [mu.choose_precision(*pair) for pair in (("auto", cpu), ("auto", mps), ("no", cuda), ("bf16", cpu))]
    assert chosen == ["fp32", "fp32", "fp32", "bf16"]


NO_MEMORY = {
    "--batch_size 4": "take --batch_size 2 --grad_accum 2 (the same result), then --gradient_checkpointing, then "
    "--precision bf16, then a smaller --resolution.",
    "--batch_size 3 --grad_accum 2 --precision bf16": "take --batch_size 1 --grad_accum 6 (the same result), then "
    "--gradient_checkpointing, then a smaller --resolution.",
    "--batch_size 1 --gradient_checkpointing": "take --precision bf16, then a smaller --resolution.",
    "--resume run --steps 9": "take --gradient_checkpointing, then a smaller --resolution (in a new run).",
}


@pytest.mark.parametrize("argv", NO_MEMORY)
def test_out_of_memory_names_options_that_help_and_are_not_in_use(argv, place, refused, monkeypatch, finished):
    errors = [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("can't allocate memory"), MemoryError()]
    shutil.copytree(finished, "run")
    for error in errors:
        monkeypatch.setattr(train, "inversion_loss", Mock(side_effect=error))
        new = [] if "--resume" in argv else options("model", "images")
        sentence = refused(train.main, [*new, *argv.split()])
        assert sentence == f"error: out of memory: {NO_MEMORY[argv]}"
    monkeypatch.setattr(sample, "denoiser", Mock(side_effect=errors[0]))
    assert "--batch_size" in refused(sample.main, ["--model", "model", "--prompt", "a cat"])


def test_a_defect_keeps_its_traceback(place, monkeypatch):
    monkeypatch.setattr(train, "inversion_loss", lambda *_: None)
    with pytest.raises(AttributeError):
        train.main(options("model", "images"))


def test_sample_py_runs_as_a_program_from_any_folder(place):
    """With a model alone. train.py does in test_run.py."""
    argv = [sys.executable, sample.__file__, *"--model model --prompt cat --num_images 1 --steps 1".split()]
    done = subprocess.run(argv, check=True, capture_output=True, text=True)
    assert Path("samples/0000.png").exists() and "note" not in done.stderr
