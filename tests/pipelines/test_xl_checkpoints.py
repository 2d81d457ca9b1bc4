"""Checkpoints of Stable Diffusion XL with other schedulers: Playground (EDM), SDXL-Turbo, LCM."""

import dataclasses
import itertools
import math

import diffusers
import pytest
import tiny
import torch

from diffusers_fisher import AutodiffFisher, DistilledNetworkWarning
from diffusers_fisher.likelihood.schemes import noise_grid
from pipelines import test_backbones
from pipelines.backbones import BACKBONES


def line(scheduler, **changes):
    """Returns the table's line of Stable Diffusion XL with another scheduler."""

    def make(cls):
        pipe = tiny.stable_diffusion_xl(cls)
        config = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
        pipe.scheduler = scheduler.from_config(config | changes)
        return pipe

    return dataclasses.replace(BACKBONES["StableDiffusionXL"], make=make)


TURBO = line(diffusers.EulerAncestralDiscreteScheduler, timestep_spacing="trailing")
LCM = line(diffusers.LCMScheduler)
PLAYGROUND = line(diffusers.EDMEulerScheduler, sigma_data=0.5, sigma_min=0.002, sigma_max=80.0)


@pytest.mark.slow
def test_turbo():
    test_backbones.test_likelihood_is_that_of_a_loop_over_the_network_itself(TURBO)
    test_backbones.test_images_are_those_of_the_stock_pipeline(TURBO)
    test_backbones.test_gradient_of_a_run_is_that_of_back_propagation(TURBO, guided=False)


@pytest.mark.slow
def test_lcm():
    with pytest.warns(DistilledNetworkWarning, match="its scheduler is LCMScheduler"):
        test_backbones.test_likelihood_is_that_of_a_loop_over_the_network_itself(LCM)
    test_backbones.test_images_are_those_of_the_stock_pipeline(LCM)
    test_backbones.test_gradient_of_a_run_is_that_of_back_propagation(LCM, guided=True)


def test_playground():
    """EDM's preconditioning by its formulas (Karras et al., 2022, table 1), with the coordinates x~ of `by_hand`."""
    test_backbones.test_images_are_those_of_the_stock_pipeline(PLAYGROUND)
    test_backbones.test_gradient_of_a_run_is_that_of_back_propagation(PLAYGROUND, guided=True)
    pipe, data = PLAYGROUND.ours(), 0.5
    x = 0.5 * PLAYGROUND.noise(1)
    network = test_backbones.network_call(PLAYGROUND, pipe)
    nodes = noise_grid(math.log(0.002), math.log(80.0), 3)

    def at(point, u):
        """Predicted noise, and its trace times s."""
        s = float(u.exp())
        total = s**2 + data**2
        leaf = point.float().requires_grad_()
        clean = data**2 / total * leaf + s * data / total**0.5 * network(leaf / total**0.5, (u / 4).float())
        rows = [torch.autograd.grad(entry, leaf, retain_graph=True)[0].flatten() for entry in clean.flatten()]
        trace = x.numel() - float(torch.stack(rows).diagonal().double().sum())
        return (leaf.double() - clean.double()).detach() / s, trace

    point, integral = x.double(), 0.0
    epsilon, trace = at(point, nodes[0])
    for start, end in itertools.pairwise(nodes):
        point = point + float(end.exp() - start.exp()) * epsilon
        before = trace
        epsilon, trace = at(point, end)
        integral += float(end - start) / 2 * (before + trace)
    variance = 1 + 80.0**2
    prior = -0.5 * float(point.square().sum()) / variance - x.numel() / 2 * math.log(2 * math.pi * variance)
    out = PLAYGROUND.score(pipe, 1, latents=x, estimator=AutodiffFisher(), num_probes=None, scheme="euler")
    assert float(out.log_prob[0]) == pytest.approx(prior + integral, rel=1e-5)
