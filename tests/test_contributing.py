"""The recipes of CONTRIBUTING.md run as they stand there, and what they make is held against independent numbers."""

import math
import re
from pathlib import Path

import diffusers
import pytest
import tiny
import torch
from pipelines.backbones import GaussianFlow

from diffusers_fisher import (
    Backbone,
    NoiseSchedule,
    PipelineDenoiser,
    UnsupportedError,
    backbone_of,
    guide,
    log_likelihood,
    noise_schedule,
    register_backbone,
)
from diffusers_fisher.backbones import registry as backbones
from diffusers_fisher.backbones.any_pipeline import AnyPipelineBackbone
from diffusers_fisher.noise import registry as schedules

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def section(title):
    """Returns the text under one heading."""
    (text,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE)
    return text


def run(title):
    """Runs the code of one section, and returns its names."""
    (block,) = BLOCK.findall(section(title))
    names = {"__name__": title}
    exec(compile(block, f"CONTRIBUTING.md: {title}", "exec"), names)
    return names


def copy_registries(patch):
    """Puts copies in the place of both registries, so that what a recipe registers is gone afterwards."""
    patch.setattr(backbones, "BACKBONES", dict(backbones.BACKBONES))
    patch.setattr(schedules, "_SCHEDULES", dict(schedules._SCHEDULES))


@pytest.fixture
def own_registries(monkeypatch):
    copy_registries(monkeypatch)


def test_paths_and_links_of_the_page_exist():
    paths = re.findall(r"`((?:diffusers_fisher|tests|docs|examples)/[\w/.]+)`", TEXT)
    paths += re.findall(r"\]\(([^)#]+)", TEXT)
    assert len(paths) > 20
    for path in paths:
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize(
    ("title", "base", "least_count"),
    [("Adding a noise schedule", NoiseSchedule, 10), ("Adding a backbone", Backbone, 15)],
)
def test_members_in_the_tables_are_those_of_the_base_class(title, base, least_count):
    rows = re.findall(r"^\| .*\? \| (.*?) \|", section(title), re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert len(names) >= least_count
    for name in names:
        assert hasattr(base, name), name


def test_every_block_belongs_to_a_recipe_that_is_tested_here():
    recipes = ["Adding a reward", "Adding a noise schedule", "Adding a backbone"]
    assert re.findall(r"^## (.*)", TEXT, re.MULTILINE) == ["Adding an estimator", *recipes]
    assert len(BLOCK.findall(TEXT)) == len(recipes)


def test_reward():
    names = run("Adding a reward")
    best, target = names["best"], names["images"][0]
    by_hand = -((best.initial_images - target) ** 2).flatten(1).mean(1)
    assert torch.allclose(best.rewards[0].float(), by_hand, rtol=1e-5)  # float32
    assert float(best.best_rewards) > float(best.rewards[0])
    assert type(names["pipe"]) is diffusers.StableDiffusionPipeline


@pytest.mark.usefixtures("own_registries")
def test_noise_schedule():
    """For data N(0, I) every step multiplies the sample by a number."""
    names = run("Adding a noise schedule")
    levels = [math.exp(3 - 6 * step / 9) for step in range(10)]
    factor = math.exp(3)
    for s, after in zip(levels, [*levels[1:], 0.0], strict=True):
        factor *= 1 + (after - s) * s / (1 + s**2)
    assert torch.allclose(names["x"], factor * names["noise"], rtol=1e-12)
    assert torch.allclose(names["gradient"], torch.full_like(names["noise"], factor), rtol=1e-12)


def test_noise_schedule_of_the_recipe_is_registered_nowhere_else():
    class LogScheduler:
        pass

    with pytest.raises(UnsupportedError, match="Noise levels of LogScheduler are not known"):
        noise_schedule(LogScheduler())


@pytest.fixture(scope="module")
def recipe():
    """The names of the recipe for a backbone, which is run once; its backbone is registered for the run alone."""
    with pytest.MonkeyPatch.context() as patch:
        copy_registries(patch)
        return run("Adding a backbone")


@pytest.fixture
def aura_flow(recipe, own_registries):
    register_backbone(diffusers.AuraFlowPipeline, recipe["AuraFlowBackbone"])
    return recipe


def test_backbone_gives_a_likelihood_and_guidance(aura_flow):
    scores, best = aura_flow["scores"], aura_flow["best"]
    assert scores.space == "latent"
    assert scores.dims == 4 * 8 * 8
    assert torch.isfinite(scores.bits_per_dim).all()
    assert (best.best_rewards > best.rewards[0]).all()
    assert type(aura_flow["pipe"]) is diffusers.AuraFlowPipeline


def test_predicted_noise_is_that_of_the_transformer_called_by_hand(aura_flow):
    pipe, prompts = aura_flow["pipe"], ["a b", "c"]
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        tokens = pipe.tokenizer(prompts, padding="max_length", max_length=256, return_tensors="pt")
        states = pipe.text_encoder(**tokens)[0] * tokens.attention_mask[..., None]
        velocity = pipe.transformer(x, encoder_hidden_states=states, timestep=torch.full((2,), 0.6)).sample
    epsilon = PipelineDenoiser(pipe, prompt=prompts)(x, 600)  # x = 0.4 x_0 + 0.6 eps, velocity = eps - x_0
    assert torch.allclose(epsilon, x + 0.4 * velocity, atol=1e-5)  # float32


def test_likelihood_of_gaussian_data_is_the_closed_form(aura_flow):
    pipe = tiny.aura_flow()
    pipe.transformer = GaussianFlow(pipe.transformer, 1.0)  # data N(0.3, 0.5 I)
    x = 0.3 + 0.7 * torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    out = log_likelihood(
        pipe, latents=x, num_inference_steps=160, num_probes=1, prior_mean=0.3, prior_variance=0.5,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    density = torch.distributions.Normal(0.3, math.sqrt(0.5 + 999.0**-2))
    exact = density.log_prob(x.double()).flatten(1).sum(1)
    assert float((out.log_prob - exact).abs().max()) < 1e-3  # nats of 300: what the steps leave


def test_run_of_guidance_is_the_stock_call(aura_flow):
    pipe = aura_flow["pipe"]
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    options = {"latents": noise, "height": 16, "width": 16, "num_inference_steps": 3, "output_type": "pt"}
    expected = pipe(["a b", "c"], **options).images
    got = guide(pipe, ["a b", "c"], aura_flow["brightness"], num_guidance_steps=0, **options)
    assert torch.equal(got.images, expected)


def test_sizes_that_the_patches_do_not_divide_are_refused(aura_flow):
    with pytest.raises(ValueError, match="allowed: positive multiples of 4"):
        guide(aura_flow["pipe"], "a b", aura_flow["brightness"], height=18, width=16)


def test_backbone_of_the_recipe_is_registered_nowhere_else():
    assert type(backbone_of(tiny.aura_flow())) is AnyPipelineBackbone
