"""Pipelines without a backbone: their denoisers, gradients, levels and guidance against the pipelines' own runs."""

import dataclasses
import inspect

import pytest
import torch

from diffusers_fisher import AutodiffFisher, FisherError, PipelineDenoiser, fisher_scheduler
from diffusers_fisher.backbones.networks import denoising_networks
from diffusers_fisher.features import count_evaluations
from diffusers_fisher.noise import noise_level

from .outside import SET_UPS, SetUp, forget_backbones

pytestmark = [
    pytest.mark.filterwarnings("ignore:In CPU autocast"),  # Mochi computes in float32 by an autocast
]


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    forget_backbones(monkeypatch)


REFUSED = {
    "cogview4": "timesteps that are not those of its scheduler's sigmas",
    "consistency": "a denoiser returns a tensor",
    "flux2_dev": "changes the layout of its latents",
    "flux2_klein": "changes the layout of its latents",
    "lumina2_trunc": "cfg_trunc_ratio.* acts by the step's index",
    "ltx2": "changes the layout of its latents",
}
"""Set-ups whose states a `PipelineDenoiser` refuses, with what its message says."""

QUICK = ("mochi", "sd_pag", "cosmos25", "wan21_euler", "ltx", "cogvideox_stock", "hunyuan_video")
"""Set-ups that are tested in every run of the suite, each particular in a way of its own."""

ROUNDED_TIMESTEPS = {"cosmos25": 1e-3}
"""Relative errors of denoisers whose pipeline tells its network a sigma that its rounded timestep does not give."""

KNOWN_OUTPUTS = ("cogview4",)
"""Refused set-ups whose outputs and gradients are right: their levels are known in runs alone."""


def run(setup: SetUp, latents: torch.Tensor, call=None) -> torch.Tensor:
    """Returns the latents at the end of a run of four steps with guidance."""
    call = call or type(setup.pipe).__call__
    return call(
        setup.pipe, latents=latents, num_inference_steps=4, output_type="latent", return_dict=False,
        **setup.arguments(),
    )[0]  # fmt: skip


@dataclasses.dataclass
class Comparison:
    """How far the library is from a set-up's own run of four steps; each a largest relative error."""

    outputs: float
    gradient: float
    levels: float
    unguided_evaluations: float  # per sample


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


def compare(setup: SetUp) -> Comparison:
    """Compares denoiser, gradient and levels with a guided run, and counts the evaluations of an unguided call."""
    latents = setup.noise().requires_grad_()
    end = run(setup, latents, inspect.unwrap(type(setup.pipe).__call__))
    weights = torch.randn(end.shape, generator=torch.Generator().manual_seed(5))
    expected = torch.autograd.grad((end * weights).sum(), latents)[0]

    pipe = setup.pipe
    pipe.scheduler = fisher_scheduler(type(pipe.scheduler)).from_config(pipe.scheduler.config)
    denoiser = PipelineDenoiser(pipe, **setup.arguments())
    with pipe.scheduler.differentiable(AutodiffFisher(denoiser)) as trajectory:
        end = run(setup, setup.noise())
    gradient = trajectory.gradient((end * weights).sum())
    outputs, levels = [], []
    for state in trajectory.states:
        output = denoiser.model_output(state.sample * state.input_scale.float(), state.timestep)
        outputs.append(relative_error(output, state.model_output))
        level = noise_level(pipe.scheduler, state.timestep)
        levels.append(float((level.sigma - state.level.sigma).abs() / state.level.norm))
    assert all(bool(state.level.alpha / state.level.norm < 0.5) for state in trajectory.states[:1])

    plain = PipelineDenoiser(pipe, **setup.conditions)
    with count_evaluations(denoising_networks(pipe.components).values()) as evaluations:
        plain.model_output(setup.noise(), trajectory.states[1].timestep)
    return Comparison(
        max(outputs), relative_error(gradient, expected), max(levels), sum(evaluations) / len(setup.noise())
    )


def check(name: str) -> None:
    comparison = compare(SET_UPS[name]())
    tolerance = ROUNDED_TIMESTEPS.get(name, 1e-5)
    assert comparison.outputs < tolerance
    assert comparison.gradient < 10 * tolerance
    assert comparison.levels < 0.005 or name in KNOWN_OUTPUTS
    assert comparison.unguided_evaluations == 1


@pytest.mark.parametrize("name", QUICK)
def test_denoiser_gradient_levels_and_guidance_are_those_of_the_pipeline(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SET_UPS if name not in {*REFUSED, *QUICK} - {*KNOWN_OUTPUTS}])
def test_every_other_set_up_is_right_too(name):
    check(name)


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_denoiser_can_not_know_is_refused_in_words(name):
    setup = SET_UPS[name]()
    with pytest.raises(FisherError, match=REFUSED[name]):
        PipelineDenoiser(setup.pipe, **setup.conditions, **setup.guidance).state(setup.noise(), 500.0)
