"""Pipelines without a backbone: noise, images, guidance and likelihood by what their own call says."""

import inspect

import diffusers
import pytest
import tiny
import torch

from diffusers_fisher import (
    AutodiffFisher,
    InputError,
    StableDiffusionFisherPipeline,
    UnsupportedError,
    backbone_of,
    check,
    guide,
    log_likelihood,
    memorisation,
)
from diffusers_fisher.backbones.any_pipeline import AnyPipelineBackbone, bind_call

from .outside import SET_UPS, awaken, quiet

PACKED = "flux_kontext"
"""Set-up with packed latents; its `height` and `width` are 16."""


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def slope(images, prompts):
    """Brightness of the right minus that of the left: a reward without a network."""
    return (images * torch.linspace(-1, 1, images.shape[-1])).mean((1, 2, 3))


def krea2():
    """Makes a pipeline with packed latents of a video's autoencoder."""
    setup = SET_UPS["krea2"]()
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=24, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.1] * 4, latents_std=[1.5] * 4,
    )  # fmt: skip
    setup.pipe = quiet(diffusers.Krea2Pipeline(**{**setup.pipe.components, "vae": vae}))
    setup.shape = (2, 16, 16)
    return setup


def stock_run(setup, latents):
    """Returns the images of the pipeline's own guided run of four steps, with a graph."""
    call = inspect.unwrap(type(setup.pipe).__call__)
    return call(
        setup.pipe, latents=latents, num_inference_steps=4, output_type="pt", return_dict=False, **setup.arguments()
    )[0]


def run_guidance(setup, **options):
    arguments = setup.arguments()
    return guide(
        setup.pipe, arguments.pop("prompt", None), slope, latents=setup.noise(), num_inference_steps=4,
        output_type="pt", **{**arguments, **options},
    )  # fmt: skip


def check_guidance(setup):
    """Compares the first run of a guidance, its reward and its gradient with the pipeline's own run."""
    latents = setup.noise().requires_grad_()
    images = stock_run(setup, latents)
    rewards = slope(images, None)
    gradient = torch.autograd.grad(rewards.sum(), latents)[0]
    out = run_guidance(setup, estimator=AutodiffFisher(), num_guidance_steps=1, step_size=0.02)
    assert torch.equal(out.initial_images, images.detach())
    torch.testing.assert_close(out.rewards[0], rewards.detach().double(), rtol=0, atol=1e-6)
    # The one step is along the gradient on the noise's sphere.
    moved = out.latents[out.best_runs == 1] - setup.noise()[out.best_runs == 1]
    assert len(moved)
    norms = gradient.flatten(1).norm(dim=1).double()
    torch.testing.assert_close(out.gradient_norms[0], norms, rtol=1e-5, atol=0)
    flat, along = moved.flatten(1), gradient[out.best_runs == 1].flatten(1)
    assert float(torch.cosine_similarity(flat, along).min()) > 0.99
    assert out.shell_distances.abs().max() < 100
    assert out.whiteness.shape == (2, 2)


@pytest.mark.parametrize("name", ["sd_pag", PACKED])
def test_guidance_starts_from_the_pipelines_own_run_and_its_gradient(name):
    check_guidance(SET_UPS[name]())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated")  # Chroma imports it
@pytest.mark.parametrize("name", ["krea2", "chroma", "qwen_image"])
def test_guidance_of_other_pipelines_starts_there_too(name):
    setup = krea2() if name == "krea2" else SET_UPS[name]()
    backbone = AnyPipelineBackbone(setup.pipe)
    bound = bind_call(backbone, setup.arguments())
    images = bound.decode(setup.noise())
    assert images.shape == (2, 3, *bound.image_size())
    if type(backbone_of(setup.pipe)) is AnyPipelineBackbone:
        check_guidance(setup)


def test_what_the_call_says_is_what_a_backbone_of_the_class_knows():
    pipe = tiny.stable_diffusion()
    known, bound = backbone_of(pipe), AnyPipelineBackbone(pipe).with_call({"prompt": ["a b", "c"]})
    before = torch.get_rng_state()
    assert bound.image_size() == known.image_size()
    assert bound.image_channels == 3
    noise = bound.initial_noise(None, 2, (16, 16), seeded())
    assert torch.equal(noise, known.initial_noise(None, 2, (16, 16), seeded()))
    latents = noise.clone().requires_grad_()
    images, expected = bound.decode(latents), known.decode(noise)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)
    assert images.requires_grad
    assert torch.equal(before, torch.get_rng_state())
    networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert not any(part._forward_hooks for part in networks)


def test_tensors_that_are_not_in_the_unit_range_are_brought_there():
    setup = SET_UPS["kandinsky22"]()
    bound = AnyPipelineBackbone(setup.pipe).with_call(setup.arguments())
    arrays = setup.pipe(
        latents=setup.noise(), num_inference_steps=1, output_type="latent", return_dict=False, **setup.arguments()
    )[0]
    images = bound.decode(arrays)
    assert float(images.min()) >= 0
    pixels = setup.pipe.movq.decode(arrays, force_not_quantize=True).sample
    torch.testing.assert_close(images, (pixels.detach() / 2 + 0.5).clamp(0, 1))


def test_noise_that_the_caller_does_not_pass_is_drawn_as_the_call_draws_it():
    setup = SET_UPS["sd_pag"]()
    options = {"num_guidance_steps": 0, "num_inference_steps": 2, "output_type": "pt"}
    out = guide(setup.pipe, ["a b", "c"], slope, generator=seeded(), **options)
    images = setup.pipe(["a b", "c"], num_inference_steps=2, output_type="pt", generator=seeded()).images
    assert torch.equal(out.images, images)
    out = guide(setup.pipe, "a b", slope, num_images_per_prompt=2, generator=seeded(), **options)
    assert out.images.shape == images.shape


def test_latents_without_a_backbone_have_the_likelihood_of_a_backbone():
    """Perturbed attention is off in a likelihood, so the same network has the same one under both classes."""
    setup = SET_UPS["sd_pag"]()
    parts = {**setup.pipe.components, "safety_checker": None}
    known = tiny.quiet(StableDiffusionFisherPipeline(**parts, requires_safety_checker=False))
    latents, options = 0.5 * setup.noise(), {"num_inference_steps": 4, "prompt": ["a b", "c"]}
    out = log_likelihood(setup.pipe, latents=latents, generator=seeded(), **options)
    expected = log_likelihood(known, latents=latents, generator=seeded(), **options)
    torch.testing.assert_close(out.log_prob, expected.log_prob, rtol=1e-6, atol=0)


def test_images_and_the_unconditional_branch_are_refused_in_words():
    pipe = SET_UPS["sd_pag"]().pipe
    message = "StableDiffusionPAGPipeline has no backbone of its own, so {} is not known. Pass `latents`"
    encoding = message.format("how images become its latents")
    with pytest.raises(UnsupportedError, match=encoding):
        log_likelihood(pipe, torch.rand(1, 3, 16, 16), "a")
    with pytest.raises(UnsupportedError, match=encoding):
        check(pipe, torch.rand(1, 3, 16, 16))
    with pytest.raises(UnsupportedError, match=message.format("which size its images have")):
        check(pipe)
    backbone = backbone_of(pipe)
    with pytest.raises(UnsupportedError, match=message.format("how its latents are drawn")):
        backbone.initial_noise(None, 1, (16, 16), None)
    for refused in (backbone.encode, backbone.posterior_of, backbone.samples_of):
        with pytest.raises(UnsupportedError, match=encoding):
            refused(torch.zeros(1, 3, 16, 16))
    with pytest.raises(UnsupportedError, match=message.format("what its unconditional branch is")):
        memorisation(pipe, "a", num_samples=1)


def test_videos_are_no_images():
    setup = SET_UPS["hunyuan_video"]()
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
        mid_block_add_attention=False,
    )  # fmt: skip
    setup.pipe = quiet(diffusers.HunyuanVideoPipeline(**{**setup.pipe.components, "vae": vae}))
    with pytest.raises(UnsupportedError, match=r"returns \(2, 9, 3, 64, 64\), and not images .*scheduler\.diff"):
        run_guidance(setup)


def test_a_pipeline_that_cannot_decode_says_why():
    with pytest.raises(UnsupportedError, match=r"call of Krea2Pipeline uses something that is None .* components vae"):
        run_guidance(SET_UPS["krea2"]())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latents": torch.zeros(2, 4, 4, 4)}, r"have shape \(2, 4, 4, 4\); allowed: a tensor \(2, 4, 8, 8\)"),
        ({"num_images_per_prompt": 2, "prompt_embeds": torch.zeros(2, 8, 16)}, "allowed: 1 with embeddings"),
        ({}, "neither `prompt` nor embeddings"),
    ],
)
def test_bad_arguments_of_a_guidance_are_refused(options, message):
    prompt = ["a", "b"] if "latents" in options else None
    with pytest.raises(InputError, match=message):
        guide(SET_UPS["sd_pag"]().pipe, prompt, slope, num_inference_steps=2, **options)


class NeverDraws(diffusers.StableDiffusionPAGPipeline):
    """A pipeline that does not use its `prepare_latents`."""

    def __call__(self, prompt=None, latents=None, num_inference_steps=1, output_type="pil", return_dict=True):
        return (latents,)


class WithoutMethod(diffusers.DiffusionPipeline):
    """A pipeline that draws its noise within its call."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def __call__(self, latents=None, num_inference_steps=1, output_type="pil", return_dict=True):
        return (latents,)


class ScalesItsResult(diffusers.StableDiffusionPAGPipeline):
    """A pipeline that changes its latents after the last step."""

    @torch.no_grad()
    def __call__(self, *args, latents=None, **kwargs):
        result = super().__call__(*args, latents=latents, **kwargs)
        return (2 * result[0], *result[1:])


class CutsTheGradient(diffusers.StableDiffusionPAGPipeline):
    """A pipeline that decodes without a graph."""

    def __call__(self, *args, latents=None, **kwargs):
        with torch.no_grad():
            return super().__call__(*args, latents=latents, **kwargs)


class Breaks(diffusers.StableDiffusionPAGPipeline):
    """A pipeline that can make latents, but no images."""

    def __call__(self, *args, latents=None, output_type="pil", **kwargs):
        if output_type != "latent":
            raise IndexError("no such place")
        return super().__call__(*args, latents=latents, output_type=output_type, **kwargs)


class TwoScales(diffusers.StableDiffusionPAGPipeline):
    """A pipeline whose tensors and arrays are different images."""

    def __call__(self, *args, latents=None, output_type="pil", **kwargs):
        result = super().__call__(*args, latents=latents, output_type=output_type, **kwargs)
        return (result[0] / 2, *result[1:]) if output_type == "np" else result


def remade(cls):
    parts = {**SET_UPS["sd_pag"]().pipe.components, "safety_checker": None}
    pipe = quiet(cls(**parts, requires_safety_checker=False))
    awaken(pipe.unet)
    return pipe


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (ScalesItsResult, "ends its call with other latents .* than those that its scheduler's last step returns"),
        (CutsTheGradient, "cuts the gradient between its last latents and its images"),
        (
            Breaks,
            "A call of Breaks of one step fails between its noise and its images: IndexError: no such place. Call",
        ),
        (TwoScales, "returns other images as tensors than as arrays, so their scale is not known"),
    ],
)
def test_calls_that_say_too_little_are_refused(cls, message):
    with pytest.raises(UnsupportedError, match=message):
        guide(remade(cls), "a b", slope, num_inference_steps=2)


def test_layouts_that_no_method_draws_are_not_known():
    message = "The layout of the latents of {} is not known, because it{}. Give it a backbone"
    pipe = remade(NeverDraws)
    with pytest.raises(
        UnsupportedError, match=message.format("NeverDraws", "s call does not use its `prepare_latents`")
    ):
        log_likelihood(pipe, latents=torch.zeros(1, 4, 8, 8), prompt="a")
    pipe = WithoutMethod(pipe.unet, pipe.scheduler)
    with pytest.raises(UnsupportedError, match=message.format("WithoutMethod", " has no method `prepare_latents`")):
        log_likelihood(pipe, latents=torch.zeros(1, 4, 8, 8))
