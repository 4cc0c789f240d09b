"""Options: the recipes, what a command written for diffusers' script does here, and the initializer."""

import json
import shlex

import pytest
import torch
from safetensors.torch import load_file

import model_utils as mu
import train


@pytest.fixture
def learn(tiny_model, image_folder, tmp_path, monkeypatch):
    """learn(command line) trains the tiny model -> the folder of the run."""
    monkeypatch.chdir(tmp_path)

    def run(command, steps="--steps 2 --batch_size 2", quiet="--preview_steps 0 --no-score"):
        options = (
            f"--model {tiny_model} --images {shlex.quote(image_folder)} {steps} {quiet} --overwrite --out run {command}"
        )
        return train.train(train.parse_options(shlex.split(options)))

    return run


def options_of(command):
    return train.parse_options(shlex.split(command))


# --- Recipes ----------------------------------------------------------------------------------------------------------


def test_the_bundled_model_names_fast_and_any_other_gets_notebook(tiny_model, image_folder):
    args = options_of("")
    assert (args.recipe, args.steps, args.batch_size, args.lr, args.lr_scheduler) == ("fast", 250, 8, None, "cosine")
    args = options_of(f"--model {tiny_model} --images '{image_folder}' --initializer_token cat")
    assert (args.recipe, args.steps, args.batch_size, args.lr) == ("notebook", 2000, 4, 2e-3)
    assert (args.lr_scheduler, args.lr_warmup_steps, args.timestep_sampling) == ("constant", 0, "uniform")
    args = options_of("--model CompVis/stable-diffusion-v1-4 --recipe fast --steps 100")
    assert (args.recipe, args.steps, args.batch_size, args.timestep_sampling) == ("fast", 100, 8, "cubic")


def test_the_learning_rate_of_fast_is_the_root_mean_square_of_the_vocabulary(learn, tiny_model):
    config = json.loads((learn("--recipe fast --initializer_token cat") / "config.json").read_text())
    table = mu.load_text_encoder(tiny_model, "cpu").get_input_embeddings().weight
    assert config["lr"] == pytest.approx(table.square().mean().sqrt().item())
    args = options_of("--resume --out run")
    assert (args.lr, args.recipe, args.steps) == (config["lr"], "fast", 2)


def test_a_run_says_what_it_will_do(learn, capsys):
    learn("--initializer_token cat --grad_accum 2 --precision fp32")
    first = capsys.readouterr().out.splitlines()[0]
    for what in ("3 images", "2 steps of 4", "learning rate 0.002 (constant)", "uniform timesteps", "fp32 on cpu"):
        assert what in first


@pytest.mark.parametrize(
    "command, said",
    [
        ("--lr 2e-3 --steps 250 --batch_size 8", True),  # a twelfth of the notebook's way
        ("--scale_lr --steps 250 --batch_size 8", True),
        ("--steps 250 --batch_size 8", False),
    ],
)
def test_learning_rates_that_add_up_to_something_else_are_told(command, said, learn, monkeypatch, capsys):
    monkeypatch.setattr(train.Run, "has_converged", lambda run: True)  # no step is needed
    learn(f"--recipe fast --initializer_token cat {command}")
    assert ("learning rates add up to" in capsys.readouterr().out) == said


# --- A command written for diffusers' script --------------------------------------------------------------------------

README_LINE = """--learnable_property="object" --placeholder_token="<cat-toy>" --initializer_token="toy"
--resolution=512
--train_batch_size=1 --gradient_accumulation_steps=4 --max_train_steps=3000 --learning_rate=5.0e-04 --scale_lr
--lr_scheduler="constant" --lr_warmup_steps=0 --push_to_hub --output_dir="textual_inversion_cat" """
REST = """--save_steps 500 --save_as_full_pipeline --num_vectors 2 --revision main --variant fp16 --tokenizer_name x
--repeats 100 --seed 42 --center_crop --num_train_epochs 3 --gradient_checkpointing --lr_num_cycles 1
--dataloader_num_workers 0 --adam_beta1 0.9 --adam_beta2 0.999 --adam_weight_decay 1e-2 --adam_epsilon 1e-08
--hub_token x --hub_model_id x/y --logging_dir logs --mixed_precision no --allow_tf32 --report_to wandb
--validation_prompt "a <cat-toy>" --num_validation_images 4 --validation_steps 100 --validation_epochs 5
--local_rank -1 --checkpointing_steps 500 --checkpoints_total_limit 3 --use_8bit_adam
--enable_xformers_memory_efficient_attention --no_safe_serialization"""


def test_a_command_written_for_diffusers_script_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = options_of(
        f"--pretrained_model_name_or_path=a/b --train_data_dir=cat {README_LINE} {REST}".replace("\n", " ")
    )
    assert (args.model, args.images, args.placeholder_token, args.initializer_token) == (
        "a/b",
        "cat",
        "<cat-toy>",
        "toy",
    )
    assert (args.batch_size, args.grad_accum, args.steps, args.lr, args.scale_lr) == (1, 4, 3000, 5e-4, True)
    assert (args.resolution, args.num_vectors, args.seed, args.variant) == (512, 2, 42, "fp16")
    assert (args.save_steps, args.preview_steps, args.preview_prompt) == (500, 100, "a <cat-toy>")
    assert args.save_bin and args.gradient_checkpointing and args.output_dir == "textual_inversion_cat"
    assert train.learning_rate(0, args) == train.learning_rate(2999, args) == pytest.approx(2e-3)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: without effect here: --push_to_hub, --save_as_full_pipeline, --tokenizer_name")
    assert "--report_to wandb" in line and "--save_steps" not in line


def test_epochs_are_steps(image_folder):
    command = f"--images '{image_folder}' --initializer_token cat --num_train_epochs 2 --batch_size 8 --grad_accum 2"
    assert options_of(command).steps == 2 * 19  # 3 images, 100 times an epoch, 16 a step
    assert options_of(command + " --repeats 10").steps == 4
    assert options_of(command + " --max_train_steps 7").steps == 7
    with pytest.raises(mu.UserError, match="--num_train_epochs 2: that is 150000000 steps"):
        options_of(command + " --repeats 400000000")


@pytest.mark.parametrize("schedule", ["constant", "constant_with_warmup", "linear", "cosine", "polynomial"])
def test_schedules_are_those_of_diffusers(schedule):
    from diffusers.optimization import get_scheduler

    args = options_of(f"--lr 1 --lr_scheduler {schedule} --lr_warmup_steps 4 --steps 14")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1)
    theirs = get_scheduler(schedule, optimizer, num_warmup_steps=4, num_training_steps=14)
    for step in range(4 if schedule != "constant" else 0, 14):  # our warm-up reaches the peak a step earlier
        while theirs.last_epoch < step:
            optimizer.step(), theirs.step()
        assert train.learning_rate(step, args) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-6)
    if schedule == "constant":
        assert train.learning_rate(0, args) == 1


@pytest.mark.parametrize(
    "command, said",
    [
        ("--learnin_rate 3", "unknown option --learnin_rate; did you mean --learning_rate?"),
        ("--xyzzy=3", "unknown option --xyzzy; see --help."),
        ("--images somewhere", "--images needs --initializer_token"),
    ],
)
def test_mistakes_are_one_line(command, said, capsys):
    with pytest.raises(SystemExit):
        train.main(shlex.split(command))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")


# --- The initializer --------------------------------------------------------------------------------------------------


def test_an_initializer_of_several_tokens(tiny_model):
    tokenizer, table = (
        mu.load_tokenizer(tiny_model),
        mu.load_text_encoder(tiny_model, "cpu").get_input_embeddings().weight,
    )
    red, cat = table[mu.initializer_ids(tokenizer, "red cat")]
    torch.testing.assert_close(mu.initial_rows(tokenizer, table, "red cat", 1, 0), (red + cat)[None] / 2)
    rows = mu.initial_rows(tokenizer, table, "red cat", 5, 0)
    assert torch.equal(rows[:2], torch.stack([red, cat]))
    assert len(rows.unique(dim=0)) == 5 and torch.cosine_similarity(rows[2], red, dim=0) > 0.9
    assert torch.equal(rows, mu.initial_rows(tokenizer, table, "red cat", 5, 0))


def test_learned_rows_are_an_initializer(learn, capsys):
    folder = learn("--initializer_token cat --num_vectors 2 --lr 1e-2")
    rows = load_file(folder / "learned_embeds.safetensors")["<kat>"]
    rows = rows.clone()
    (folder / "learned_embeds.safetensors").rename("kept.safetensors")
    again = learn("--initializer_token kept.safetensors --num_vectors 2 --lr 1e-9", steps="--steps 1 --batch_size 2")
    torch.testing.assert_close(load_file(again / "learned_embeds.safetensors")["<kat>"], rows, atol=1e-7, rtol=0)
