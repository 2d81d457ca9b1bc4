"""A run's gradient by the denoiser's Jacobian at one noise level, against that Jacobian and in closed form."""

import dataclasses
import math

import diffusers
import pytest
import torch
from cases import STABLE_DIFFUSION, Network, latents, relative, sampling_run

from diffusers_fisher import (
    AutodiffFisher,
    Covariance,
    DirectFisher,
    ExactFisher,
    GaussianMixture,
    InputError,
    OneStepFisher,
    fisher_scheduler,
)

SCHEDULERS = {
    "DDIM": (diffusers.DDIMScheduler, {**STABLE_DIFFUSION, "clip_sample": False}),
    "Euler": (diffusers.EulerDiscreteScheduler, STABLE_DIFFUSION),
    "flow matching": (diffusers.FlowMatchEulerDiscreteScheduler, {}),  # no signal at the first state
}
WEIGHTS = latents(seed=7)


def run(name, estimator):
    """Returns the states of a run, and the gradient of a fixed linear loss of its result at the noise."""
    cls, config = SCHEDULERS[name]
    scheduler = fisher_scheduler(cls)(**config)
    with torch.no_grad(), scheduler.differentiable(estimator) as trajectory:
        result = sampling_run(scheduler, Network(), latents())[-1]
    with torch.enable_grad():
        loss = (WEIGHTS * result).sum()
    return trajectory.states, trajectory.gradient(loss)


@pytest.mark.parametrize("at", [0.05, 1.2, 1e6])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_gradient_is_the_direct_one_times_the_jacobian_of_the_clean_sample(name, at):
    states, direct = run(name, DirectFisher())
    _, gradient = run(name, OneStepFisher(AutodiffFisher(Network()), at))
    ratios = torch.stack([state.level.noise_to_signal for state in states])
    distances = (ratios.log() - math.log(at)).abs()
    state = states[int(distances.argmin())]
    assert torch.isfinite(state.level.noise_to_signal).all()
    sample = state.sample.detach().requires_grad_()
    output = Network()(state.input_scale * sample, state.timestep)
    clean = dataclasses.replace(state, sample=sample, model_output=output).pred_original_sample
    (expected,) = torch.autograd.grad(clean, sample, direct)
    assert relative(gradient, state.level.alpha * expected) < 1e-10  # float64
    assert relative(gradient, direct) > 1e-3


def test_directions_in_which_the_data_do_not_vary_are_left_out():
    variances = torch.linspace(0.01, 2, 12, dtype=torch.float64).view(1, 3, 2, 2)
    law = GaussianMixture(torch.zeros(1, 3, 2, 2, dtype=torch.float64), Covariance.diagonal(variances))
    states, direct = run("DDIM", DirectFisher())
    _, gradient = run("DDIM", OneStepFisher(ExactFisher(law)))
    ratios = torch.tensor([float(state.level.noise_to_signal) for state in states])
    ratio = float(ratios[(ratios.log()).abs().argmin()])
    torch.testing.assert_close(gradient / direct, (variances / (variances + ratio**2)).expand_as(direct))


def test_component_is_the_estimator_of_the_jacobian():
    estimator = OneStepFisher(noise_to_signal=0.7)
    assert estimator.components == {"jacobian": estimator.jacobian}
    copy = estimator.map_components(lambda component: DirectFisher())
    assert isinstance(copy.jacobian, DirectFisher)
    assert copy.noise_to_signal == 0.7


@pytest.mark.parametrize("at", [0.0, -1.0, math.inf, math.nan])
def test_levels_that_no_state_has_are_refused(at):
    with pytest.raises(InputError, match="noise_to_signal"):
        OneStepFisher(noise_to_signal=at)
