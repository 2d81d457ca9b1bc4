"""Variants without a class of ours: what works through the scheduler, what through the denoiser, what is refused."""

import inspect

import diffusers
import pytest
import tiny
import torch
from cases import relative

from diffusers_fisher import (
    AutodiffFisher,
    DirectFisher,
    PipelineDenoiser,
    TrajectoryError,
    UnsupportedError,
    fisher_scheduler,
)
from diffusers_fisher.backbones import backbone_of

GRADIENT = 1e-5  # float32, the same products in another order
PROMPTS = ["a b", "c"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(seed=0):
    return torch.randn(2, 4, 8, 8, generator=seeded(seed))


def pictures(seed=5):
    return torch.rand(2, 3, 16, 16, generator=seeded(seed))


def masks():
    mask = torch.zeros(2, 1, 16, 16)
    mask[..., 8:] = 1
    return mask


def controlnet(xl=False):
    changes = {} if not xl else {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 16,
    }  # fmt: skip
    torch.manual_seed(1)
    net = diffusers.ControlNetModel(
        in_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=32 if xl else 16,
        attention_head_dim=2, norm_num_groups=4, conditioning_embedding_out_channels=(4, 4), **changes,
    )  # fmt: skip
    tiny.awaken(net)
    return net


def pipeline(kind, xl, **components):
    """Makes a variant of the tiny components, whose scheduler is the Fisher version of DDIM."""
    prefix = "StableDiffusionXL" if xl else "StableDiffusion"
    cls = getattr(diffusers, f"{prefix}{kind}Pipeline")
    base = tiny.stable_diffusion_xl() if xl else tiny.stable_diffusion()
    parts = {
        **base.components,
        "scheduler": fisher_scheduler(diffusers.DDIMScheduler).from_config(tiny.scheduler().config),
    }
    parameters = inspect.signature(cls.__init__).parameters
    settings = {"requires_safety_checker": False, "add_watermarker": False}
    parts = {**parts, **components, **settings}
    return tiny.quiet(cls(**{name: part for name, part in parts.items() if name in parameters}))


def run(pipe, call=None, guidance_scale=4.0, **arguments):
    arguments = {
        "prompt": PROMPTS, "num_inference_steps": 4, "output_type": "latent", "return_dict": False,
        "guidance_scale": guidance_scale, "generator": seeded(3), **arguments,
    }  # fmt: skip
    return (call or type(pipe).__call__)(pipe, **arguments)[0]


def weight():
    return noise(9)


VERSIONS = pytest.mark.parametrize("xl", [False, True], ids=["SD", "SDXL"])


# Image to image: the run starts from a noised image


@VERSIONS
@pytest.mark.parametrize("cls", [diffusers.DDIMScheduler, diffusers.EulerDiscreteScheduler])
def test_image_to_image_is_bit_for_bit_and_differentiable_at_its_first_sample(xl, cls):
    """The call takes no `latents`: the gradient is with respect to the run's first sample, the noised image."""
    pipe = pipeline("Img2Img", xl, scheduler=fisher_scheduler(cls).from_config(tiny.scheduler().config))
    arguments = {"image": pictures(), "strength": 0.8}
    expected = run(pipe, **arguments)
    base = (tiny.stable_diffusion_xl if xl else tiny.stable_diffusion)()
    base.scheduler = pipe.scheduler
    denoiser = PipelineDenoiser(base, 4.0, prompt=PROMPTS)
    with pipe.scheduler.differentiable(AutodiffFisher(denoiser)) as trajectory:
        result = run(pipe, **arguments)
    assert torch.equal(result.detach(), expected)
    assert len(trajectory.states) == 3  # 0.8 of 4 steps
    leaf = trajectory.initial_sample.detach().clone().requires_grad_()
    scheduler, x = cls.from_config(pipe.scheduler.config), leaf
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps[-3:]:  # the rest of the run, with the network in the graph
        x = scheduler.step(denoiser.model_output(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    torch.testing.assert_close(x, result, rtol=1e-4, atol=1e-4)
    (exact,) = torch.autograd.grad((weight() * x).sum(), leaf)
    loss = (weight() * result).sum()
    (gradient,) = torch.autograd.grad(loss, trajectory.initial_sample, retain_graph=True)
    assert relative(gradient, exact) < GRADIENT
    assert torch.equal(trajectory.gradient(loss), gradient)  # no factor, though Euler's init_noise_sigma is 14.6


def test_image_to_image_as_a_denoiser_is_refused():
    pipe = pipeline("Img2Img", xl=False)
    with pytest.raises(UnsupportedError, match="takes no `latents`, so it can't be evaluated at a sample"):
        PipelineDenoiser(pipe, prompt=PROMPTS, image=pictures())
    with pytest.raises(UnsupportedError, match=r"\{'strength': 0.8\} acts by the step's index within a run"):
        PipelineDenoiser(pipeline("Img2Img", xl=True), prompt=PROMPTS, image=pictures(), strength=0.8)


@pytest.mark.parametrize("cls", [diffusers.DDIMScheduler, diffusers.EulerDiscreteScheduler])
def test_image_to_image_of_stable_diffusion_xl_at_strength_1_is_text_to_image(cls):
    """Its call takes `latents`, as the first sample itself, and then does not look at the image."""
    pipe, text = (
        pipeline(kind, xl=True, scheduler=fisher_scheduler(cls).from_config(tiny.scheduler().config))
        for kind in ("Img2Img", "")
    )
    denoiser = PipelineDenoiser(pipe, 4.0, prompt=PROMPTS, image=pictures())
    assert torch.equal(denoiser(noise(), 500), PipelineDenoiser(text, 4.0, prompt=PROMPTS)(noise(), 500))
    leaf = noise().requires_grad_()
    reference = run(text, inspect.unwrap(type(text).__call__), latents=leaf)
    (exact,) = torch.autograd.grad((weight() * reference).sum(), leaf)
    with pipe.scheduler.differentiable(AutodiffFisher(denoiser)) as trajectory:
        result = run(pipe, latents=noise() * text.scheduler.init_noise_sigma, image=pictures(), strength=1.0)
    assert torch.equal(result.detach(), reference.detach())
    assert relative(trajectory.gradient((weight() * result).sum()), exact) < GRADIENT


# Inpainting: by a network that sees the mask, or by blending after every step


@VERSIONS
def test_inpainting_with_its_own_network_works_as_a_run_and_as_a_denoiser(xl):
    """The network has nine channels: latents, mask, masked image. The image's encoding is random, so it is passed."""
    changes = {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 16, "cross_attention_dim": 32,
    } if xl else {}  # fmt: skip
    torch.manual_seed(2)
    pipe = pipeline("Inpaint", xl, unet=tiny.unet(in_channels=9, **changes))
    fixed = {
        "image": pictures(), "mask_image": masks(), "height": 16, "width": 16, "strength": 1.0,
        "masked_image_latents": noise(4),
    }  # fmt: skip
    leaf = noise().requires_grad_()
    reference = run(pipe, inspect.unwrap(type(pipe).__call__), latents=leaf, **fixed)
    (exact,) = torch.autograd.grad((weight() * reference).sum(), leaf)
    denoiser = PipelineDenoiser(pipe, 4.0, prompt=PROMPTS, **fixed)
    with pipe.scheduler.differentiable(AutodiffFisher(denoiser)) as trajectory:
        result = run(pipe, latents=noise(), **fixed)
    assert torch.equal(result.detach(), reference.detach())
    assert relative(trajectory.gradient((weight() * result).sum()), exact) < GRADIENT


@VERSIONS
def test_inpainting_by_blending_is_refused_after_the_first_step(xl):
    pipe = pipeline("Inpaint", xl)
    arguments = {"image": pictures(), "mask_image": masks(), "height": 16, "width": 16, "strength": 1.0}
    run(pipe, **arguments)  # untracked it runs
    with (
        pytest.raises(
            TrajectoryError,
            match=r"Step 1 received other latents than step 0 returned, by [\d.]+ of .* inpainting blend",
        ),
        pipe.scheduler.differentiable(DirectFisher()),
    ):
        run(pipe, **arguments)
    denoiser = PipelineDenoiser(pipe, prompt=PROMPTS, **arguments)
    with pytest.raises(
        UnsupportedError, match=r"returned other latents than its scheduler's step, by [\d.]+ of their size"
    ):
        denoiser(noise(), 500)


# ControlNet


@VERSIONS
def test_controlnet_works_as_a_run_and_as_a_denoiser(xl):
    pipe = pipeline("ControlNet", xl, controlnet=controlnet(xl))
    fixed = {"image": pictures(), "controlnet_conditioning_scale": 0.7}
    leaf = noise().requires_grad_()
    reference = run(pipe, inspect.unwrap(type(pipe).__call__), latents=leaf, **fixed)
    (exact,) = torch.autograd.grad((weight() * reference).sum(), leaf)
    denoiser = PipelineDenoiser(pipe, 4.0, prompt=PROMPTS, **fixed)
    with pipe.scheduler.differentiable(AutodiffFisher(denoiser)) as trajectory:
        result = run(pipe, latents=noise(), **fixed)
    assert torch.equal(result.detach(), reference.detach())
    assert relative(trajectory.gradient((weight() * result).sum()), exact) < GRADIENT
    assert not torch.equal(result, run(pipe, latents=noise(), image=pictures(6), controlnet_conditioning_scale=0.7))


@VERSIONS
@pytest.mark.parametrize("window", [{"control_guidance_end": 0.5}, {"control_guidance_start": [0.5, 0.0]}], ids=str)
def test_controlnet_for_a_part_of_the_run_is_refused_as_a_denoiser(xl, window):
    pipe = pipeline("ControlNet", xl, controlnet=controlnet(xl))
    name = next(iter(window))
    with pytest.raises(
        UnsupportedError, match=rf"\{{'{name}': .* acts by the step's index within a run, which a single"
    ):
        PipelineDenoiser(pipe, prompt=PROMPTS, image=pictures(), **window)
    neutral = {"control_guidance_start": 0.0, "control_guidance_end": [1.0]}
    PipelineDenoiser(pipe, prompt=PROMPTS, image=pictures(), **neutral)
    if name == "control_guidance_end":  # a run with an estimator that needs no denoiser goes
        with pipe.scheduler.differentiable(DirectFisher()) as trajectory:
            result = run(pipe, latents=noise(), image=pictures(), **window)
        assert float(trajectory.gradient((weight() * result).sum()).norm()) > 0


def test_run_that_is_cut_short_is_refused_as_a_denoiser():
    pipe = tiny.stable_diffusion_xl()
    with pytest.raises(UnsupportedError, match=r"\{'denoising_end': 0.5\} acts by the step's index"):
        PipelineDenoiser(pipe, prompt=PROMPTS, denoising_end=0.5)

    class Interrupted(diffusers.StableDiffusionPipeline):
        interrupt = True  # as a callback may set it

    pipe = tiny.stable_diffusion(Interrupted)
    with pytest.raises(UnsupportedError, match="Interrupted ended its call without a step of its scheduler"):
        PipelineDenoiser(pipe, prompt=PROMPTS)(noise(), 500)


# Adapters


class ScaledAttention(torch.nn.Module):
    """A user's attention processor: the stock processor with a small addition."""

    def __init__(self):
        super().__init__()
        self.stock = diffusers.models.attention_processor.AttnProcessor()

    def __call__(self, attention, hidden_states, *args, **kwargs):
        return self.stock(attention, hidden_states, *args, **kwargs) + 0.5 * hidden_states


def test_attention_processors_act_in_runs_and_in_denoisers():
    from diffusers_fisher import StableDiffusionFisherPipeline

    stock, pipe = (tiny.stable_diffusion(StableDiffusionFisherPipeline) for _ in range(2))
    pipe.unet.set_attn_processor(ScaledAttention())
    values = [PipelineDenoiser(each, prompt=PROMPTS)(noise(), 500) for each in (stock, pipe)]
    assert not torch.equal(*values)
    options = {"num_inference_steps": 2, "num_probes": 1, "step_halving": False, "latents": noise()}
    scores = [each.log_likelihood(None, PROMPTS, generator=seeded(), **options).log_prob for each in (stock, pipe)]
    assert not torch.equal(*scores)
    leaf = noise().requires_grad_()
    reference = run(pipe, inspect.unwrap(type(pipe).__call__), latents=leaf)
    (exact,) = torch.autograd.grad((weight() * reference).sum(), leaf)
    pipe.scheduler = fisher_scheduler(type(pipe.scheduler)).from_config(pipe.scheduler.config)
    with pipe.scheduler.differentiable(AutodiffFisher(PipelineDenoiser(pipe, 4.0, prompt=PROMPTS))) as trajectory:
        result = run(pipe, latents=noise())
    assert relative(trajectory.gradient((weight() * result).sum()), exact) < GRADIENT


# Half precision of trained weights


@pytest.mark.slow
def test_bfloat16_weights_of_the_trained_checkpoint():
    """Bits per dimension are within 0.02 of float32; gradients have a cosine above 0.99 (the default: 0.95)."""
    from diffusers_fisher import (
        OneStepFisher,
        StableDiffusionFisherPipeline,
        embedded_checkpoint,
        embedded_prompt,
        embedded_test_images,
    )

    def load(dtype):
        return tiny.quiet(StableDiffusionFisherPipeline.from_pretrained(embedded_checkpoint(), dtype=dtype))

    images, labels = embedded_test_images()
    images, prompts = images[:4], [embedded_prompt(int(label)) for label in labels[:4]]
    latents = backbone_of(load(torch.float32)).samples_of(images)  # for both: the density of the same latents
    start, half = torch.randn(latents.shape, generator=seeded(1)), images.shape[-1] // 2
    bits, gradients = [], {"direct": [], "autodiff": [], "default": []}
    for dtype in (torch.float32, torch.bfloat16):
        pipe = load(dtype)
        options = {"num_inference_steps": 12, "num_probes": 4, "step_halving": False, "generator": seeded()}
        bits.append(pipe.log_likelihood(None, prompts, latents=latents, **options).bits_per_dim)
        pipe.scheduler = fisher_scheduler(type(pipe.scheduler)).from_config(pipe.scheduler.config)
        options = {"num_inference_steps": 12, "guidance_scale": 1.0, "output_type": "latent"}
        denoiser = PipelineDenoiser(pipe, prompt=prompts)
        estimators = {
            "direct": DirectFisher(), "autodiff": AutodiffFisher(denoiser),
            "default": OneStepFisher().bind(denoiser),
        }  # fmt: skip
        for name, estimator in estimators.items():
            with pipe.scheduler.differentiable(estimator) as trajectory:
                result = pipe(prompts, latents=start.to(dtype), **options).images
            decoded_images = backbone_of(pipe).decode(result)
            loss = (decoded_images[..., :half] - decoded_images[..., half:]).mean((1, 2, 3)).sum()
            gradients[name].append(trajectory.gradient(loss).flatten(1).float())
    assert 0 < float((bits[1] - bits[0]).abs().max()) < 0.02
    for name, pair in gradients.items():
        assert (0.95 if name == "default" else 0.99) < float(torch.cosine_similarity(*pair).min()) < 1
