"""Likelihoods of networks that look distilled to few steps warn with the sign that shows it."""

import warnings

import diffusers
import pytest
import tiny
import torch

from diffusers_fisher import (
    DistilledNetworkWarning,
    StableDiffusionFisherPipeline,
    backbone_of,
    compare_likelihood,
    likelihood_bound,
    log_likelihood,
)
from diffusers_fisher.backbones.distilled import DISTILLED_SCHEDULERS, sign_of_distillation

LATENTS = torch.zeros(1, 4, 8, 8)


def pipeline(scheduler=diffusers.LCMScheduler):
    pipe = tiny.stable_diffusion(StableDiffusionFisherPipeline)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    return pipe


@pytest.mark.parametrize(
    "score",
    [
        lambda pipe: log_likelihood(pipe, latents=LATENTS, num_inference_steps=4),
        lambda pipe: pipe.log_likelihood(latents=LATENTS, num_inference_steps=4),
        lambda pipe: likelihood_bound(pipe, latents=LATENTS, num_inference_steps=2, num_draws=1),
        lambda pipe: compare_likelihood(pipe, latents=LATENTS, prompts=["a b", "c"], num_levels=4),
    ],
    ids=["log_likelihood", "method", "likelihood_bound", "compare_likelihood"],
)
@pytest.mark.filterwarnings("ignore::diffusers_fisher.CoarseGridWarning")  # few calls are enough here
def test_every_density_warns_at_the_users_line(score):
    with pytest.warns(DistilledNetworkWarning, match=r"\(its scheduler is LCMScheduler\).*not the score") as caught:
        score(pipeline())
    lines = {warning.filename for warning in caught if warning.category is DistilledNetworkWarning}
    assert lines == {__file__}


@pytest.mark.filterwarnings("ignore::diffusers_fisher.CoarseGridWarning")
def test_other_schedulers_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error", DistilledNetworkWarning)
        log_likelihood(pipeline(diffusers.DDPMScheduler), latents=LATENTS, num_inference_steps=4)


def test_an_input_for_the_guidance_scale_is_a_sign_too():
    pipe = tiny.stable_diffusion()
    assert sign_of_distillation(backbone_of(pipe)) is None
    pipe.unet = tiny.unet(time_cond_proj_dim=32)
    assert "UNet2DConditionModel takes a guidance scale" in sign_of_distillation(backbone_of(pipe))


def test_the_named_schedulers_are_those_of_diffusers():
    assert all(issubclass(getattr(diffusers, name), diffusers.SchedulerMixin) for name in DISTILLED_SCHEDULERS)
