"""Guidance of runs of a single step."""

import pytest
import tiny
import torch

from diffusers_fisher import (
    AutodiffFisher,
    DirectFisher,
    InputError,
    OneStepFisher,
    StableDiffusion3FisherPipeline,
)
from diffusers_fisher.guidance.pipeline import default_estimator


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def guide_one_step(**options):
    pipe = tiny.stable_diffusion_3(StableDiffusion3FisherPipeline)
    tiny.awaken(pipe.transformer)
    return pipe.guide(
        None, brightness, num_guidance_steps=2, num_inference_steps=1, height=16, width=16, guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0), **tiny.embeds(1), **options,
    )  # fmt: skip


def test_default_moves_the_noise_of_one_step_by_the_exact_gradient():
    default, exact = guide_one_step(), guide_one_step(estimator=AutodiffFisher())
    assert default.rewards[-1] > default.rewards[0]
    assert torch.equal(default.rewards, exact.rewards)


def test_an_estimator_that_can_not_move_the_noise_is_refused_by_its_cause():
    with pytest.raises(InputError, match=r"OneStepFisher.*pure noise alone \(alpha = 0\).*AutodiffFisher"):
        guide_one_step(estimator=OneStepFisher())
    assert len(guide_one_step(estimator=DirectFisher()).rewards) == 3


@pytest.mark.parametrize(("steps", "expected"), [(1, AutodiffFisher), (2, OneStepFisher), (25, OneStepFisher)])
def test_default_estimator_depends_on_the_number_of_steps(steps, expected):
    assert type(default_estimator(steps)) is expected
