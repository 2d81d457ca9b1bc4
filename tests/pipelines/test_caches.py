"""Networks with one of diffusers' caches: each evaluation is that of the network itself, or is refused in words."""

import functools

import pytest
import tiny
import torch
from diffusers import FluxTransformer2DModel
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)

from diffusers_fisher import (
    AutodiffFisher,
    DirectFisher,
    FluxFisherPipeline,
    PipelineDenoiser,
    UnsupportedError,
    posterior_guidance,
)

BLOCKS = ("transformer_blocks",)
CACHES = {
    "first block": lambda pipe: FirstBlockCacheConfig(threshold=10.0),
    "Taylor": lambda pipe: TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1),
    "magnitudes": lambda pipe: MagCacheConfig(
        num_inference_steps=4, threshold=0.2, max_skip_steps=2, retention_ratio=0.2, mag_ratios=torch.ones(4)
    ),
}
CACHES_BY_TIMESTEP = {
    "pyramid": lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(100, 800),
        current_timestep_callback=lambda: pipe.current_timestep, spatial_attention_block_identifiers=BLOCKS,
    ),
    "faster": lambda pipe: FasterCacheConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 681),
        current_timestep_callback=lambda: pipe.current_timestep, attention_weight_callback=lambda _: 0.3,
        is_guidance_distilled=True, spatial_attention_block_identifiers=BLOCKS,
    ),
}  # fmt: skip


def make(cache=None):
    torch.manual_seed(0)
    pipe = tiny.flux(FluxFisherPipeline)
    pipe.transformer = FluxTransformer2DModel.from_config(dict(pipe.transformer.config, num_layers=3)).eval()
    tiny.awaken(pipe.transformer)
    if cache is not None:
        pipe.transformer.enable_cache(cache(pipe))
    return pipe


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def score(pipe):
    return pipe.log_likelihood(
        latents=noise(2, 4, 8, 8), num_inference_steps=3, num_probes=1,
        generator=torch.Generator().manual_seed(3), **tiny.embeds(2),
    ).bits_per_dim  # fmt: skip


def reward(images, prompts):
    return images.mean((1, 2, 3))


def guide(pipe, **options):
    return pipe.guide(
        None, reward, num_guidance_steps=1, num_inference_steps=3, height=16, width=16,
        generator=torch.Generator().manual_seed(0), **tiny.embeds(1), **options,
    )  # fmt: skip


@functools.cache
def expected_score():
    return score(make())


@pytest.mark.parametrize("offload", [False, True], ids=["loaded", "offloaded"])
@pytest.mark.parametrize("name", CACHES)
def test_likelihood_is_that_of_the_network_without_its_cache(name, offload):
    pipe = make(CACHES[name])
    if offload:
        pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(score(pipe), expected_score())
    assert pipe.transformer.is_cache_enabled


def test_what_an_interrupted_call_left_in_a_cache_is_not_used():
    pipe = make(CACHES["first block"])
    arguments = {**tiny.embeds(2), "height": 16, "width": 16}
    packed = noise(2, 16, 16)
    expected = PipelineDenoiser(make(), **arguments)(packed, 500.0)

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe(latents=noise(2, 16, 16) + 1, num_inference_steps=2, callback_on_step_end=interrupt, **arguments)
    assert torch.equal(PipelineDenoiser(pipe, **arguments)(packed, 500.0), expected)


@pytest.mark.parametrize("name", CACHES_BY_TIMESTEP)
def test_caches_that_read_the_users_pipeline_are_refused(name):
    pipe = make(CACHES_BY_TIMESTEP[name])
    for call in (score, functools.partial(guide, estimator=DirectFisher())):
        with pytest.raises(
            UnsupportedError, match=r"of FluxFisherPipeline has a cache \(\w+Hook\) that reads the tim"
        ):
            call(pipe)
    pipe.transformer.disable_cache()
    assert torch.equal(score(pipe), expected_score())


@pytest.mark.parametrize("name", CACHES)
def test_guidance_with_a_cache_needs_an_estimator_without_a_denoiser(name):
    pipe = make(CACHES[name])
    for estimator in (None, AutodiffFisher()):
        with pytest.raises(UnsupportedError, match=r"has a cache \(\w+\), with which a run is another function than"):
            guide(pipe, estimator=estimator)
    out = guide(pipe, estimator=DirectFisher())
    assert out.rewards[1] > out.rewards[0]


def test_guidance_per_step_does_not_empty_the_cache_of_its_run():
    pipe = make(CACHES["first block"])
    arguments = {**tiny.embeds(1), "height": 16, "width": 16, "num_inference_steps": 3, "output_type": "latent"}

    def decode(latents):
        return latents[:, None, :, :12].expand(-1, 3, -1, -1).sigmoid()

    denoiser = PipelineDenoiser(pipe, 3.5, **tiny.embeds(1), height=16, width=16)
    with (
        pytest.raises(UnsupportedError, match="an evaluation inside the run would empty the run's cache"),
        posterior_guidance(pipe, reward, decode=decode, estimator=AutodiffFisher(denoiser)) as guidance,
    ):
        pipe(callback_on_step_end=guidance, latents=noise(1, 16, 16), **arguments)
    with posterior_guidance(pipe, reward, decode=decode) as guidance:
        pipe(callback_on_step_end=guidance, latents=noise(1, 16, 16), **arguments)
    assert len(guidance.rewards) == 3
