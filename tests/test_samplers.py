"""The samplers against diffusers' schedulers, over whole trajectories, and against an exact solution."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from model_utils import NoiseSchedule, UserError
from sample import SAMPLERS, inference_timesteps, sample_latents

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
SPACINGS = ["leading", "linspace", "trailing"]


def reference(sampler, **config):
    """diffusers' scheduler, configured as for Stable Diffusion."""
    if sampler == "ddim":
        return DDIMScheduler(**STABLE_DIFFUSION | {"clip_sample": False, "set_alpha_to_one": False} | config)
    if sampler == "ddpm":
        return DDPMScheduler(**STABLE_DIFFUSION | {"clip_sample": False} | config)
    return DPMSolverMultistepScheduler(**STABLE_DIFFUSION | config)


def ours(**config):
    """The same schedule as a NoiseSchedule, built from diffusers' numbers."""
    scheduler = DDIMScheduler(**STABLE_DIFFUSION | config)
    config = {"timestep_spacing": "leading", "set_alpha_to_one": False} | config
    config.pop("rescale_betas_zero_snr", None)  # is in the numbers already
    return NoiseSchedule(scheduler.alphas_cumprod, **config)


def toy(condition):
    """A smooth stand-in for a UNet that depends on x, t and the condition; it counts its calls."""
    mix = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)) / 2

    def denoise(x, t):
        denoise.calls += 1
        mixed = torch.einsum("ij,bjhw->bihw", mix, x)
        return 0.6 * torch.sin(mixed + float(t) / 300) + 0.5 * x + 0.3 * math.cos(float(t) / 150) * condition

    denoise.calls = 0
    return denoise


def start(batch=3):
    generators = [torch.Generator().manual_seed(seed) for seed in range(batch)]
    return torch.cat([torch.randn(1, 4, 6, 6, generator=g) for g in generators]), generators


def reference_trajectory(scheduler, steps, denoise, latents, generators):
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        noise_source = {} if isinstance(scheduler, DPMSolverMultistepScheduler) else {"generator": generators}
        latents = scheduler.step(denoise(latents, t), t, latents, **noise_source).prev_sample
    return latents


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_timesteps_are_diffusers_integers(sampler, spacing):
    schedule, scheduler = ours(timestep_spacing=spacing), reference(sampler, timestep_spacing=spacing)
    differ = []
    for steps in range(1, 1001):
        scheduler.set_timesteps(steps)
        theirs, timesteps = scheduler.timesteps.tolist(), inference_timesteps(schedule, steps, sampler)
        assert len(timesteps) == len(set(timesteps)) == steps
        assert timesteps == sorted(timesteps, reverse=True) and 0 <= timesteps[-1] and timesteps[0] <= 999
        if timesteps != theirs[:steps]:  # theirs can have one too many
            differ.append(steps)
    # theirs: timestep 1000, which does not exist, or one timestep twice
    assert differ == {("leading", "ddim"): [1000], ("leading", "ddpm"): [1000], ("leading", "dpm++"): [999, 1000],
                      ("linspace", "dpm++"): [1000]}.get((spacing, sampler), [])  # fmt: skip


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_schedule_without_a_spacing_gets_the_samplers_usual_one(sampler):
    scheduler = reference(sampler)  # with the spacing that is this class's default in diffusers
    scheduler.set_timesteps(20)
    assert inference_timesteps(ours(timestep_spacing=None), 20, sampler) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_steps_are_refused(steps):
    with pytest.raises(UserError, match="--steps"):
        inference_timesteps(ours(), steps)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_trajectories_equal_diffusers(sampler, spacing, prediction_type):
    config = {"timestep_spacing": spacing, "prediction_type": prediction_type}
    condition = torch.linspace(-1, 1, 3).view(3, 1, 1, 1)
    for steps in (1, 2, 3, 14, 15, 25):
        latents, generators = start()
        denoise, schedule = toy(condition), ours(**config)
        timesteps = inference_timesteps(schedule, steps, sampler)
        result = SAMPLERS[sampler](denoise, latents, timesteps, schedule, generators)
        assert denoise.calls == steps
        latents, generators = start()
        expected = reference_trajectory(reference(sampler, **config), steps, toy(condition), latents, generators)
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_schedules_that_end_in_pure_noise(sampler):
    config = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    schedule, (latents, _) = ours(**config), start()
    assert schedule.alphas_cumprod[-1] == 0
    result = SAMPLERS[sampler](toy(1.0), latents, inference_timesteps(schedule, 20, sampler), schedule, None)
    expected = reference_trajectory(reference(sampler, **config), 20, toy(1.0), latents, None)
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_ddim_ends_where_the_checkpoint_says(set_alpha_to_one):
    schedule, (latents, _) = ours(set_alpha_to_one=set_alpha_to_one), start()
    result = SAMPLERS["ddim"](toy(1.0), latents, inference_timesteps(schedule, 5, "ddim"), schedule)
    scheduler = reference("ddim", set_alpha_to_one=set_alpha_to_one)
    expected = reference_trajectory(scheduler, 5, toy(1.0), latents, None)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_step_counts_that_diffusers_cannot_do_give_finite_latents(sampler, spacing):
    schedule = ours(timestep_spacing=spacing)
    for steps in (61, 999, 1000):
        latents, generators = start(batch=1)
        timesteps = inference_timesteps(schedule, steps, sampler)
        assert SAMPLERS[sampler](toy(0.0), latents, timesteps, schedule, generators).isfinite().all(), steps


def test_the_exact_solution_is_approached():
    """For data from N(0, 0.5^2) the trajectory is known: x shrinks with its standard deviation."""
    schedule, spread, (latents, _) = ours(timestep_spacing="trailing"), 0.5, start()

    def deviation(t):
        return math.sqrt(schedule.alphas_cumprod[t].item() * (spread**2 - 1) + 1)

    def denoise(x, t):
        return math.sqrt(1 - schedule.alphas_cumprod[t].item()) / deviation(t) ** 2 * x

    def error(sampler, steps):  # at timestep 199, four fifths of the way
        timesteps, seen = inference_timesteps(schedule, steps, sampler), {}

        def watched(x, t):
            seen[t] = x
            return denoise(x, t)

        SAMPLERS[sampler](watched, latents, timesteps, schedule)
        return (seen[199] - latents * deviation(199) / deviation(999)).abs().max().item()

    ddim, dpm = ([error(sampler, steps) for steps in (25, 100)] for sampler in ("ddim", "dpm++"))
    assert ddim[0] / ddim[1] == pytest.approx(4, rel=0.2)  # first order: four times the steps, a quarter of the error
    assert dpm[0] / dpm[1] == pytest.approx(16, rel=0.3) and dpm[0] < ddim[0] / 4  # second order: a sixteenth


class CountingUNet(torch.nn.Module):
    """In place of diffusers' UNet: linear in the condition, and remembers the batches it was called with."""

    dtype = torch.float32

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, x, t, encoder_hidden_states):
        self.batches.append(len(x))
        out = 0.1 * x + encoder_hidden_states.mean(dim=(1, 2)).view(-1, 1, 1, 1)
        return type("Output", (), {"sample": out})


@pytest.mark.parametrize(
    "guidance, batch, with_negative", [(0.0, 2, True), (1.0, 2, True), (1.01, 4, True), (7.5, 4, True), (7.5, 2, False)]
)
def test_guidance_doubles_the_batch_only_above_one(guidance, batch, with_negative):
    unet, (latents, _), calls = CountingUNet(), start(2), []
    text, negative = torch.full((2, 5, 8), 0.3), torch.zeros(2, 5, 8) if with_negative else None
    options = {"callback": lambda: calls.append(1)}
    result = sample_latents(unet, ours(), text, negative, latents, 7, guidance, "ddim", **options)
    assert unet.batches == [batch] * 7 and len(calls) == 7
    condition = 0.3 * (guidance if batch == 4 else 1)  # the prediction is linear in it, and the negative one is 0
    timesteps = inference_timesteps(ours(), 7, "ddim")
    expected = SAMPLERS["ddim"](lambda x, t: 0.1 * x + condition, latents, timesteps, ours())
    torch.testing.assert_close(result, expected)
