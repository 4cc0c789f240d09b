"""Noise schedules, samplers, guidance and images are those of diffusers.

Where no tolerance is stated, equal means the same numbers. Two correct programs round differently in fp32: the parts
are compared to about its precision, images to one of 255 levels of a pixel.
"""

import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor

import model_utils as mu
from sample import SAMPLERS, denoiser, generate, inference_timesteps

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
STABLE_DIFFUSION |= {"clip_sample": False, "set_alpha_to_one": False}
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
SCHEDULERS = {"ddim": diffusers.DDIMScheduler, "ddpm": diffusers.DDPMScheduler}
SCHEDULERS["dpm++"] = diffusers.DPMSolverMultistepScheduler
SPACINGS = ["leading", "linspace", "trailing", None]  # Stable Diffusion 1.4's file names none
PROMPTS = ["a photo of a <kat> and a <pup>", "two dogs at night"]


def given(config):
    """A scheduler_config.json as a dict, without the entries that are None."""
    return {name: value for name, value in config.items() if value is not None}


def start(batch=3):
    """Pure noise [B, 4, 6, 6], and the generators that it came from."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(batch)]
    return torch.cat([torch.randn(1, 4, 6, 6, generator=generator) for generator in generators]), generators


def assert_near(ours, theirs, tolerance=1e-4):
    """No number is further off than tolerance x the largest one."""
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


NOISE_LEVELS = [{}, {"beta_schedule": "scaled_linear"}, STABLE_DIFFUSION, STABLE_DIFFUSION | ZERO_SNR]
NOISE_LEVELS += [{"beta_schedule": "linear", "beta_start": 0.001, "beta_end": 0.01, "num_train_timesteps": 500}]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("config", NOISE_LEVELS)
def test_noise_levels_noise_and_targets_equal_diffusers(config, prediction_type):
    config = config | {"prediction_type": prediction_type}
    schedule, theirs = mu.make_schedule(config), diffusers.DDPMScheduler.from_config(config)
    timesteps = torch.linspace(0, len(theirs.alphas_cumprod) - 1, 8).long()
    latents, noise = torch.randn(2, 8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert_near(schedule.alphas_cumprod, theirs.alphas_cumprod, 1e-6)
    assert_near(schedule.add_noise(latents, noise, timesteps), theirs.add_noise(latents, noise, timesteps), 1e-6)
    target = noise if prediction_type == "epsilon" else theirs.get_velocity(latents, noise, timesteps)
    assert_near(schedule.target(latents, noise, timesteps), target, 1e-6)
    for dtype in (torch.float16, torch.bfloat16):  # the noise level is not rounded with them
        half = latents.to(dtype), noise.to(dtype)
        for function in (schedule.add_noise, schedule.target):
            assert torch.equal(function(*half, timesteps), function(*(x.float() for x in half), timesteps).to(dtype))


def test_a_schedule_keeps_what_the_checkpoint_says_and_what_it_leaves_out_has_diffusers_default():
    told = mu.make_schedule(STABLE_DIFFUSION | ZERO_SNR | {"timestep_spacing": "trailing"})
    assert told[1:] == ("v_prediction", "trailing", False) and told.alphas_cumprod[-1] == 0
    defaults = diffusers.DDIMScheduler().config
    assert mu.make_schedule({})[1:] == (defaults.prediction_type, None, defaults.set_alpha_to_one)


@pytest.mark.parametrize(
    "entry", [{"beta_schedule": "squaredcos_cap_v2"}, {"prediction_type": "sample"}, {"trained_betas": "trained"}]
)
def test_noise_that_is_not_written_out_is_refused(entry):
    with pytest.raises(ValueError, match=next(iter(entry.values()))):
        mu.make_schedule(STABLE_DIFFUSION | entry)


@pytest.mark.parametrize("total", [1000, 500])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_timesteps_are_diffusers_integers(sampler, spacing, total):
    config = given(STABLE_DIFFUSION | {"num_train_timesteps": total, "timestep_spacing": spacing})
    schedule, scheduler = mu.make_schedule(config), SCHEDULERS[sampler].from_config(config)
    differ = []
    for steps in [*range(1, 120), *range(120, total - 2, 37), total - 2, total - 1, total]:
        scheduler.set_timesteps(steps)
        theirs, timesteps = scheduler.timesteps.tolist(), inference_timesteps(schedule, steps, sampler)
        assert len(timesteps) == steps and timesteps == sorted(set(timesteps), reverse=True)
        assert 0 <= timesteps[-1] and timesteps[0] < total
        if timesteps != theirs[:steps]:  # a rounding error can give them one too many
            differ.append(steps)
    usual = spacing or ("linspace" if sampler == "dpm++" else "leading")
    impossible = {("leading", "ddim"): 1, ("leading", "ddpm"): 1, ("leading", "dpm++"): 2, ("linspace", "dpm++"): 1}
    # theirs: the timestep `total`, which does not exist, or one timestep twice
    assert differ == [total - 1, total][2 - impossible.get((usual, sampler), 0) :]


def toy(x, t):
    """A smooth stand-in for the UNet that depends on its image and on t."""
    mix = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)) / 2
    image = torch.linspace(-1, 1, len(x)).view(-1, 1, 1, 1)
    mixed = torch.einsum("ij,bjhw->bihw", mix, x)
    return 0.6 * torch.sin(mixed + float(t) / 300) + 0.5 * x + 0.3 * math.cos(float(t) / 150) * image


def trajectory(sampler, schedule, steps):
    """{t: the latents that the sampler hands to the denoiser}, with its result as -1."""
    (latents, generators), visited = start(), {}

    def watched(x, t):
        visited[t] = x
        return toy(x, t)

    timesteps = inference_timesteps(schedule, steps, sampler)
    return visited | {-1: SAMPLERS[sampler](watched, latents, timesteps, schedule, generators)}


def their_trajectory(sampler, config, steps):
    scheduler, (latents, generators), visited = SCHEDULERS[sampler].from_config(config), start(), {}
    scheduler.set_timesteps(steps)
    noise_source = {} if sampler == "dpm++" else {"generator": generators}
    for t in scheduler.timesteps:
        visited[t.item()] = latents
        latents = scheduler.step(toy(latents, t), t, latents, **noise_source).prev_sample
    return visited | {-1: latents}


@pytest.mark.parametrize("changes", [{}, {"prediction_type": "v_prediction", "set_alpha_to_one": True}, ZERO_SNR])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_trajectories_equal_diffusers_step_by_step(sampler, spacing, changes):
    config = given(STABLE_DIFFUSION | changes | {"timestep_spacing": spacing})
    for steps in (1, 2, 3, 14, 15, 25):
        ours, theirs = trajectory(sampler, mu.make_schedule(config), steps), their_trajectory(sampler, config, steps)
        assert list(ours) == list(theirs)
        for t in ours:
            assert_near(ours[t], theirs[t])


def load_both(model, folder):
    """A folder's components and diffusers' pipeline, both with <kat> of three vectors and <pup> of one."""
    components = mu.load_components(model)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(model, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    table = components.text_encoder.get_input_embeddings().weight
    rows = table.std() * torch.randn(4, table.shape[1], generator=torch.Generator().manual_seed(3))
    tokens = [("<kat>", rows[:3]), ("<pup>", rows[3:])]
    for token, vectors in tokens:
        mu.save_embedding(folder / "embedding.safetensors", [(token, vectors)], "a model")
        pipeline.load_textual_inversion(str(folder / "embedding.safetensors"))
    mu.add_tokens(components, tokens, "--token")
    return components, pipeline


@pytest.fixture(scope="module")
def tiny(tiny_model, tmp_path_factory):
    return load_both(tiny_model, tmp_path_factory.mktemp("tiny"))


def assert_same_pixels(images, others):
    for image, other in zip(images, others, strict=True):
        image, other = np.asarray(image, dtype=int), np.asarray(other, dtype=int)
        assert image.shape == other.shape and np.abs(image - other).max() <= 1
        assert image.std() > 5  # something is in it


def compare(both, sampler, steps, guidance, negative_prompt="", changes=(), **size):
    """Generate PROMPTS with both programs from the same seeds, with changes to the checkpoint's schedule."""
    components, pipeline = both
    config = given(STABLE_DIFFUSION | {"timestep_spacing": "leading"} | dict(changes))
    pipeline.scheduler = SCHEDULERS[sampler].from_config(config)
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    settings = {"num_inference_steps": steps, "guidance_scale": guidance, "negative_prompt": [negative_prompt] * 2}
    expected = pipeline(PROMPTS, generator=generators, **settings, **size).images
    components = components._replace(schedule=mu.make_schedule(config))
    ours = list(generate(components, PROMPTS, [7, 8], negative_prompt, steps, guidance, sampler, **size))
    assert_same_pixels(ours, expected)


@pytest.mark.parametrize("guidance, size", [(0.0, 2), (1.0, 2), (1.01, 4), (7.5, 4)])
def test_guidance_is_one_call_of_the_unet_for_both_halves(tiny, guidance, size):
    """At a scale of one or less the prompts alone are used."""
    calls, finished = [], []
    hook = tiny[0].unet.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    denoiser(tiny[0], PROMPTS, "a toy", guidance, lambda: finished.append(1))(start(2)[0], 500)
    hook.remove()
    assert calls == [size] and finished == [1]


@pytest.mark.parametrize("guidance, negative_prompt", [(0.0, ""), (1.0, "a toy"), (7.5, ""), (7.5, "a red toy")])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_images_equal_diffusers(tiny, sampler, guidance, negative_prompt):
    compare(tiny, sampler, 1, guidance, negative_prompt)
    compare(tiny, sampler, 6, guidance, negative_prompt, height=24, width=16)
    changes = {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    compare(tiny, sampler, 5, guidance, negative_prompt, changes)


def test_images_of_the_bundled_model_equal_diffusers(tmp_path):
    both = load_both(mu.DEFAULT_MODEL, tmp_path)
    for sampler in SAMPLERS:
        compare(both, sampler, 4, 4.0, "a red hat")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_does_not_depend_on_its_batch(tiny, sampler):
    prompts, seeds = [*PROMPTS, "a <pup>", "a cat", "a toy"], [5, 9, 2, 7, 7]
    settings = {"negative_prompt": "a red toy", "steps": 5, "sampler": sampler}
    together = list(generate(tiny[0], prompts, seeds, batch_size=5, **settings))
    assert together[3].tobytes() != together[4].tobytes()
    for size in (1, 2):  # matrices of another size may be summed in another order
        assert_same_pixels(generate(tiny[0], prompts, seeds, batch_size=size, **settings), together)


def test_pixels_are_those_of_diffusers():
    images = torch.rand(5, 3, 24, 16, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    ours, theirs = mu.to_pil(images), VaeImageProcessor().postprocess(images)
    assert [(image.size, image.tobytes()) for image in ours] == [((16, 24), image.tobytes()) for image in theirs]
