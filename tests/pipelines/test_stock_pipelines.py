"""Functions on stock pipelines: they give the results of our methods, and nothing on the pipelines changes."""

import functools

import pytest
import tiny
import torch

import diffusers_fisher
from diffusers_fisher.backbones import backbone_of
from pipelines.backbones import BACKBONES

METHODS = ("log_likelihood", "compare_likelihood", "guide")


def brightness(images, conditions):
    return images.mean((1, 2, 3))


class Functions:
    """Hands a stock pipeline to the functions as the table's helpers call methods."""

    def __init__(self, pipe, conditional=True):
        for name in METHODS:
            setattr(self, name, functools.partial(getattr(diffusers_fisher, name), pipe))
        if not conditional:  # the method of such pipelines begins with the reward
            self.guide = functools.partial(diffusers_fisher.guide, pipe, None)


def pair(backbone):
    """Makes our pipeline, and a stock one of the same components with its own scheduler."""
    ours = backbone.ours()
    scheduler = type(ours.scheduler)
    stock_scheduler = next(each for each in scheduler.__mro__ if each.__module__.startswith("diffusers."))
    parts = {**ours.components, "scheduler": stock_scheduler.from_config(ours.scheduler.config)}
    stock = backbone.stock(**parts)
    assert type(stock).__module__.startswith("diffusers.")
    assert type(stock.scheduler).__module__.startswith("diffusers.")
    backbone.sample(
        stock, **({} if backbone.takes_latents else {"output_type": "np"})
    )  # transformers leaves its hooks
    return ours, stock


def visible(pipe):
    """Returns what a caller sees of the pipeline, without the state of the process's random numbers."""
    return {name: value for name, value in tiny.snapshot(pipe).items() if name != "random numbers"}


@pytest.mark.parametrize("name", BACKBONES)
def test_likelihood_of_a_stock_pipeline(name):
    backbone = BACKBONES[name]
    ours, stock = pair(backbone)
    before = visible(stock)
    latents = 0.5 * backbone.noise()
    expected = backbone.score(ours, latents=latents)
    result = backbone.score(Functions(stock), latents=latents)
    assert torch.equal(result.log_prob, expected.log_prob)
    assert torch.equal(result.bits_per_dim, expected.bits_per_dim)
    assert visible(stock) == before


@pytest.mark.parametrize("name", BACKBONES)
def test_guidance_of_a_stock_pipeline(name):
    backbone = BACKBONES[name]
    ours, stock = pair(backbone)
    before = visible(stock)
    options = {"num_guidance_steps": 2, "num_inference_steps": 3}

    def run_guidance(pipe):
        return backbone.guide(pipe, brightness, generator=torch.Generator().manual_seed(0), **options)

    expected, result = run_guidance(ours), run_guidance(Functions(stock, backbone.condition is not None))
    assert torch.equal(result.rewards, expected.rewards)
    assert torch.equal(result.latents, expected.latents)
    assert visible(stock) == before


def test_comparison_of_a_stock_pipeline():
    backbone = BACKBONES["StableDiffusion"]
    ours, stock = pair(backbone)

    def compare(pipe):
        return pipe.compare_likelihood(
            None, ["a b", "c"], latents=backbone.noise(), num_levels=4, generator=torch.Generator().manual_seed(0)
        )

    assert torch.equal(compare(Functions(stock)).log_prob, compare(ours).log_prob)


@pytest.mark.parametrize("name", BACKBONES)
def test_network_runs_on_the_user_s_pipeline_with_its_scheduler_in_place(name):
    """Nothing on the pipeline changes, not even during a call."""
    backbone = BACKBONES[name]
    _, stock = pair(backbone)
    before, during = visible(stock), []
    network = backbone_of(stock).network
    # The hook itself is on the network, so its modules are left out of the comparison.
    parts = [part for part in before if part not in ("modules", "grad mode")]
    handle = network.register_forward_hook(
        lambda *_: during.append([visible(stock)[part] == before[part] for part in parts])
    )
    try:
        backbone.score(Functions(stock), latents=backbone.noise(), num_probes=1)
        backbone.guide(
            Functions(stock, backbone.condition is not None), brightness, num_guidance_steps=1, num_inference_steps=2
        )
    finally:
        handle.remove()
    assert len(during) > 4
    assert all(all(same) for same in during)
