"""Videos and packed latents of pipelines without a backbone: likelihoods against a loop over the network itself."""

import math
from collections.abc import Callable

import diffusers
import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance

from diffusers_fisher import (
    AutodiffFisher,
    FisherError,
    InputError,
    PipelineDenoiser,
    UnsupportedError,
    compare_likelihood,
    log_likelihood,
    noise_level,
)
from diffusers_fisher.likelihood.schemes import noise_grid
from diffusers_fisher.noise import log_noise_to_signal_range, timestep_at

from .outside import SET_UPS, SetUp, awaken, draw, quiet

Network = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""`network(x, t)`: raw output at one sample (1, ...) and a timestep of shape ()."""

VIDEO = {"height": 16, "width": 16, "num_frames": 5}

SMALL = {
    "wan21_unipc": ((1, 4, 2, 2, 2), VIDEO),
    "wan21_euler": ((1, 4, 2, 2, 2), VIDEO),
    "wan22_ti2v5b": ((1, 4, 2, 2, 2), VIDEO),
    "wan22_a14b": ((1, 4, 2, 2, 2), VIDEO),
    "ltx": ((1, 4, 8), {"height": 32, "width": 64, "num_frames": 9}),
    "cogvideox_stock": ((1, 2, 4, 2, 2), VIDEO),
    "hunyuan_video15": ((1, 4, 2, 2, 1), {"height": 32, "width": 16, "num_frames": 5}),
    "hunyuan_video": ((1, 4, 2, 2, 2), VIDEO),
}
"""Shapes of small latents with the arguments that the pipeline's call needs for them."""


def hunyuan_video15() -> SetUp:
    """Makes HunyuanVideo 1.5, which a component guides."""
    torch.manual_seed(0)
    network = awaken(
        diffusers.HunyuanVideo15Transformer3DModel(
            in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
            num_refiner_layers=1, text_embed_dim=16, text_embed_2_dim=16, image_embed_dim=16, rope_axes_dim=(4, 6, 6),
            task_type="t2v",
        )
    )  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1
    )
    pipe = diffusers.HunyuanVideo15Pipeline(
        text_encoder=None, tokenizer=None, transformer=network, vae=vae, text_encoder_2=None, tokenizer_2=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
    )  # fmt: skip
    pipe.vision_num_semantic_tokens = 4  # instead of 729 tokens of an image that there is not
    masks = {f"{sign}prompt_embeds_mask{end}": torch.ones(2, 8) for sign in ("", "negative_") for end in ("", "_2")}
    embeds = {name.replace("_mask", ""): draw(2, 8, 16, seed=seed) for seed, name in enumerate(masks)}
    return SetUp(quiet(pipe), {**embeds, **masks}, {}, (2, 4, 2, 2, 2))


def network_call(name: str, setup: SetUp) -> Network:
    """Returns the network with the conditions of the first sample, called as its own class says."""
    pipe, embeds = setup.pipe, setup.conditions["prompt_embeds"][:1]
    network = pipe.transformer
    if name == "hunyuan_video15":  # latents beside an empty image and its mask
        names = ("prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2")
        mask, embeds_2, mask_2 = (setup.conditions[key][:1] for key in names)
        image = torch.zeros(1, 4, 16)
        return lambda x, t: network(
            torch.cat([x, torch.zeros_like(x), torch.zeros_like(x[:, :1])], 1), t[None], embeds, mask, None, embeds_2,
            mask_2, image,
        ).sample  # fmt: skip
    if name == "ltx":
        mask = setup.conditions["prompt_attention_mask"][:1]
        # 8 frames to one at 25 per second, and 32 pixels to one.
        places = {"num_frames": 2, "height": 1, "width": 2, "rope_interpolation_scale": (8 / 25, 32, 32)}
        return lambda x, t: network(x, embeds, t[None], mask, **places).sample
    if name == "hunyuan_video":
        mask, pooled = (setup.conditions[key][:1] for key in ("prompt_attention_mask", "pooled_prompt_embeds"))
        scale = torch.tensor([6000.0])  # 1000 times the default of the pipeline's call
        return lambda x, t: network(x, t[None], embeds, mask, pooled, scale).sample
    if name.startswith("cogvideox"):
        return lambda x, t: network(x, embeds, t[None]).sample
    if name == "wan22_ti2v5b":  # a timestep for every patch of 1x2x2 latents
        return lambda x, t: network(x, t.expand(1, x[0, 0].numel() // 4), embeds).sample
    if name == "wan22_a14b":  # two networks, for more and for less noise
        return lambda x, t: (network if t >= 500 else pipe.transformer_2)(x, t[None], embeds).sample
    return lambda x, t: network(x, t[None], embeds).sample


def by_hand(scheduler, network: Network, x: torch.Tensor, steps: int) -> float:
    """Returns log p of x (1, ...): Euler in s, the trapezoid in u = log s, full Jacobians of the network.

    Notation: x~ = x/alpha, s = sigma/alpha; d log p~ = sigma tr(d eps/dx) du.
    """
    low, high = log_noise_to_signal_range(scheduler)
    nodes, dimensions = noise_grid(low, high, steps), x.numel()

    def at(x, u):
        """eps and sigma tr(d eps/dx) at x~ = x."""
        t = timestep_at(scheduler, u)
        level = noise_level(scheduler, t)
        alpha, sigma = float(level.alpha), float(level.sigma)
        leaf = (alpha * x).float().requires_grad_()
        out = network(leaf, t.float())
        rows = [torch.autograd.grad(entry, leaf, retain_graph=True)[0].flatten() for entry in out.flatten()]
        trace = float(torch.stack(rows).diagonal().double().sum())
        out, leaf = out.detach().double(), leaf.detach().double()
        if scheduler.config.get("prediction_type") == "v_prediction":  # v = alpha eps - sigma x_0
            return sigma * leaf + alpha * out, sigma * (sigma * dimensions + alpha * trace)
        return leaf + alpha * out, sigma * (dimensions + alpha * trace)  # flow: v = eps - x_0

    x, integral = x.double(), 0.0
    epsilon, trace = at(x, nodes[0])
    for step in range(1, steps + 1):
        x = x + float(nodes[step].exp() - nodes[step - 1].exp()) * epsilon
        epsilon, trace_there = at(x, nodes[step])
        integral += float(nodes[step] - nodes[step - 1]) / 2 * (trace + trace_there)
        trace = trace_there
    variance = 1 + math.exp(2 * high)
    prior = -0.5 * float(x.square().sum()) / variance - dimensions / 2 * math.log(2 * math.pi * variance)
    return prior + integral


def check_likelihood(name: str) -> None:
    setup = hunyuan_video15() if name == "hunyuan_video15" else SET_UPS[name]()
    shape, sizes = SMALL[name]
    conditions = {key: value[:1] for key, value in setup.conditions.items() if isinstance(value, torch.Tensor)}
    x = 0.5 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    out = log_likelihood(
        setup.pipe, latents=x, estimator=AutodiffFisher(), num_probes=None, scheme="euler", num_inference_steps=2,
        **conditions, **sizes,
    )  # fmt: skip
    with torch.enable_grad():
        expected = by_hand(setup.pipe.scheduler, network_call(name, setup), x, 2)
    assert float(out.log_prob[0]) == pytest.approx(expected, rel=1e-5)
    assert (out.space, out.dims, out.latents) == ("latent", x.numel(), "given")


@pytest.mark.filterwarnings("ignore:The discretisation error")
@pytest.mark.parametrize("name", ["wan21_euler", "ltx", "cogvideox_stock", "hunyuan_video"])
def test_likelihood_is_that_of_a_loop_over_the_network_itself(name):
    check_likelihood(name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The discretisation error")
@pytest.mark.parametrize("name", ["wan21_unipc", "wan22_ti2v5b", "wan22_a14b", "hunyuan_video15"])
def test_likelihood_of_other_versions_is_that_of_a_loop_too(name):
    check_likelihood(name)


@pytest.mark.filterwarnings("ignore:The discretisation error")
def test_each_video_of_a_batch_has_the_likelihood_that_it_has_alone():
    setup = SET_UPS["wan21_euler"]()
    latents = 0.5 * torch.randn(2, 4, 2, 2, 2, generator=torch.Generator().manual_seed(1))
    embeds = setup.conditions["prompt_embeds"]
    options = {**VIDEO, "tolerance": 0.01, "num_inference_steps": 4, "max_denoiser_calls": 20}

    def score(rows):
        generator = torch.Generator().manual_seed(0)
        return log_likelihood(
            setup.pipe, latents=latents[rows], prompt_embeds=embeds[rows], generator=generator, **options
        )

    together = score(slice(None))
    assert together.bits_per_dim.tolist() == pytest.approx(
        [float(score(slice(row, row + 1)).bits_per_dim) for row in range(2)], rel=1e-5
    )
    options = {"prompt_embeds": embeds, **VIDEO, "num_levels": 4}
    comparison = compare_likelihood(setup.pipe, latents=latents, **options)
    assert comparison.log_prob.shape == (1, 2)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("wan21_euler", (2, 4, 3, 2, 2), r"\(2, 4, 3, 2, 2\), but .* draws \(2, 4, 2, 2, 2\) for .* num_frames 5"),
        ("wan21_euler", (2, 8, 2, 2, 2), r"\(2, 8, 2, 2, 2\), but the call of WanPipeline draws \(2, 4, 2, 2, 2\)"),
        ("wan21_euler", (2, 4, 2, 2), r"\(2, 4, 2, 2\), but the call of WanPipeline draws"),
        ("wan21_euler", (2, 4), "have shape .*; allowed: a tensor in the layout of the call's `latents`"),
        ("ltx", (2, 6, 8), r"\(2, 6, 8\), but the call of LTXPipeline draws \(2, 2, 8\) for .*height 32"),
    ],
)
def test_latents_of_the_wrong_length_are_refused_in_words(name, shape, message):
    setup = SET_UPS[name]()
    conditions = {key: value for key, value in setup.conditions.items() if isinstance(value, torch.Tensor)}
    sizes = SMALL[name][1] | ({"width": 32} if name == "ltx" else {})
    with pytest.raises(InputError, match=message):
        log_likelihood(setup.pipe, latents=torch.zeros(shape), **conditions, **sizes)


def test_a_denoiser_of_latents_that_fit_no_network_says_what_the_call_draws():
    setup = SET_UPS["wan21_euler"]()
    generator = torch.Generator().manual_seed(3)
    states = [generator.get_state(), torch.get_rng_state()]
    denoiser = PipelineDenoiser(setup.pipe, **{**setup.conditions, **VIDEO}, generator=generator)
    with pytest.raises(InputError, match=r"have shape \(2, 5, 2, 2, 2\), but .* draws \(2, 4, 2, 2, 2\)"):
        denoiser.state(torch.zeros(2, 5, 2, 2, 2), 500.0)
    assert torch.equal(generator.get_state(), states[0])
    assert torch.equal(torch.get_rng_state(), states[1])


def test_one_of_two_networks_is_not_enough():
    setup = SET_UPS["wan22_a14b"]()
    pipe = diffusers.WanPipeline(**{**setup.pipe.components, "transformer_2": None}, boundary_ratio=0.5)
    pipe.set_progress_bar_config(disable=True)
    conditions = {"prompt_embeds": setup.conditions["prompt_embeds"], **VIDEO}
    with pytest.raises(UnsupportedError, match=r"uses something that is None .*, transformer_2 are None"):
        log_likelihood(pipe, latents=torch.zeros(2, 4, 2, 2, 2), **conditions)


def test_embeddings_without_what_belongs_to_them_are_refused():
    setup = SET_UPS["ltx"]()
    embeds = setup.conditions["prompt_embeds"]
    with pytest.raises(FisherError, match="LTXPipeline refuses its arguments: Must provide `prompt_attention_mask`"):
        log_likelihood(setup.pipe, latents=torch.zeros(2, 4, 8), prompt_embeds=embeds, **SMALL["ltx"][1])


def test_images_of_a_video_pipeline_are_refused():
    setup = SET_UPS["wan21_euler"]()
    with pytest.raises(UnsupportedError, match="WanPipeline has no backbone of its own, so how images become its"):
        log_likelihood(setup.pipe, torch.rand(2, 3, 16, 16), **setup.conditions)


def test_samples_at_timesteps_of_their_own_have_the_outputs_that_they_have_alone():
    """The call multiplies its timestep with a mask of two patches in a row, which two timesteps would fit."""
    setup = SET_UPS["wan22_ti2v5b"]()
    embeds, sizes = setup.conditions["prompt_embeds"], {"height": 32, "width": 32, "num_frames": 5}
    x = torch.randn(2, 4, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    denoiser, times = PipelineDenoiser(setup.pipe, prompt_embeds=embeds, **sizes), torch.tensor([200.0, 700.0])
    together = denoiser.model_output(x, times)
    assert denoiser.num_calls == 2
    for row in range(2):
        alone = PipelineDenoiser(setup.pipe, prompt_embeds=embeds[row : row + 1], **sizes)
        torch.testing.assert_close(together[row : row + 1], alone.model_output(x[row : row + 1], times[row]))
