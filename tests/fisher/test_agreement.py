"""An estimator's denoiser is compared with the run whose Jacobian it gives."""

import diffusers
import pytest
import tiny
import torch
from cases import relative
from diffusers.hooks import FirstBlockCacheConfig

from diffusers_fisher import (
    AutodiffFisher,
    DirectFisher,
    FiniteDifferenceFisher,
    InputError,
    OneStepFisher,
    PipelineDenoiser,
    fisher_scheduler,
    guide,
    posterior_guidance,
)

PROMPTS = ["a b", "c"]
ESTIMATORS = {
    "differences": FiniteDifferenceFisher,
    "central differences": lambda denoiser: FiniteDifferenceFisher(denoiser, central=True),
    "reverse mode": AutodiffFisher,
    "forward mode": lambda denoiser: AutodiffFisher(denoiser, forward_mode=True),
    "one step": lambda denoiser: OneStepFisher(FiniteDifferenceFisher(denoiser)),
    "one step, reverse mode": lambda denoiser: OneStepFisher(AutodiffFisher(denoiser)),
}


def noise(count=2):
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def pipeline(make=tiny.stable_diffusion, dtype=torch.float32, scheduler=None):
    pipe = make()
    tiny.awaken(pipe.components.get("unet") or pipe.components["transformer"])
    pipe.to(dtype)
    pipe.scheduler = fisher_scheduler(scheduler or type(pipe.scheduler)).from_config(pipe.scheduler.config)
    return pipe


def gradient(pipe, estimator, options=None, steps=2, **arguments):
    """Returns the gradient of a run's weighted sum with respect to its noise."""
    arguments = {"prompt": PROMPTS, "guidance_scale": 4.0, **arguments}
    with pipe.scheduler.differentiable(estimator, **options or {}) as trajectory:
        result = pipe(latents=noise().to(pipe.dtype), num_inference_steps=steps, output_type="latent", **arguments)
    return trajectory.gradient((result.images * noise()).sum())


OTHERS = {
    "guidance scale": {"guidance_scale": 1.0},
    "prompt": {"prompt": ["d e f", "c"]},  # of one sample of two
    "negative prompt": {"negative_prompt": ["e f", "g"]},
}


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        *((kind, "guidance scale") for kind in ESTIMATORS),
        ("differences", "prompt"),
        ("reverse mode", "negative prompt"),
    ],
)
def test_denoiser_of_another_function_is_refused(kind, change):
    pipe = pipeline()
    arguments = {"prompt": PROMPTS, "guidance_scale": 4.0, **OTHERS[change]}
    estimator = ESTIMATORS[kind](PipelineDenoiser(pipe, **arguments))
    scale = f"{arguments['guidance_scale']:g}"
    message = rf"denoiser \(guidance scale {scale}\) differs from the run's output by [\d.]+ of its size at timestep"
    with pytest.raises(InputError, match=message):
        gradient(pipe, estimator)


def test_function_without_a_guidance_scale_is_compared_too():
    pipe = pipeline()
    denoiser = PipelineDenoiser(pipe, prompt=PROMPTS)
    with pytest.raises(InputError, match=r"The estimator's denoiser differs .* Make it with the arguments of the run"):
        gradient(pipe, AutodiffFisher(denoiser.model_output))
    with pytest.raises(InputError, match=r"returned the shape \(2, 1, 8, 8\) where the run's output has \(2, 4, 8, 8"):
        gradient(pipe, FiniteDifferenceFisher(lambda x, t: denoiser.model_output(x, t)[:, :1]))


def test_dropout_is_refused():
    pipe = pipeline()
    for part in pipe.unet.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.5
    pipe.unet.train()
    with pytest.raises(InputError, match=r"usual causes are .* dropout"):
        gradient(pipe, FiniteDifferenceFisher(PipelineDenoiser(pipe, 4.0, prompt=PROMPTS)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_rounding_is_no_difference(dtype, scale):
    pipe = pipeline(dtype=dtype, scheduler=diffusers.EulerDiscreteScheduler)  # which rounds its scaled input
    denoiser = PipelineDenoiser(pipe, scale, prompt=PROMPTS)
    for estimator in (AutodiffFisher(denoiser), FiniteDifferenceFisher(denoiser)):
        assert torch.isfinite(gradient(pipe, estimator, steps=3, guidance_scale=scale)).all()


def test_autocast_is_no_difference():
    pipe = pipeline(scheduler=diffusers.EulerDiscreteScheduler)
    denoiser = PipelineDenoiser(pipe, 7.5, prompt=PROMPTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for estimator in (AutodiffFisher(denoiser), FiniteDifferenceFisher(denoiser)):
            assert torch.isfinite(gradient(pipe, estimator, guidance_scale=7.5)).all()


def test_unguided_denoiser_is_refused_in_half_precision():
    for dtype in (torch.float16, torch.bfloat16):
        pipe = pipeline(dtype=dtype, scheduler=diffusers.EulerDiscreteScheduler)
        with pytest.raises(InputError, match=r"differs from the run's output by"):
            gradient(pipe, AutodiffFisher(PipelineDenoiser(pipe, prompt=PROMPTS)), guidance_scale=7.5)


def test_cache_of_the_run_is_refused_and_leaves_the_denoiser_its_own_function():
    pipe = tiny.flux()
    pipe.transformer = diffusers.FluxTransformer2DModel.from_config(dict(pipe.transformer.config, num_layers=3)).eval()
    tiny.awaken(pipe.transformer)
    pipe.scheduler = fisher_scheduler(type(pipe.scheduler)).from_config(pipe.scheduler.config)
    arguments = {**tiny.embeds(2), "guidance_scale": 3.5, "height": 16, "width": 16}
    denoiser = PipelineDenoiser(pipe, **arguments)
    packed = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = denoiser(packed, 500.0)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    for estimator in (AutodiffFisher(denoiser), FiniteDifferenceFisher(denoiser)):
        with pipe.scheduler.differentiable(estimator) as trajectory:
            latents = pipe(latents=packed, num_inference_steps=4, output_type="latent", **arguments).images
        with pytest.raises(InputError, match=r"usual causes are .* a cache"):
            trajectory.gradient(latents.sum())
    assert torch.equal(denoiser(packed, 500.0), expected)


# What is allowed


def test_another_guidance_scale_is_allowed_on_purpose():
    pipe = pipeline()
    denoiser = PipelineDenoiser(pipe, 1.0, prompt=PROMPTS)
    options = {"adjoint_guidance_scale": 1.0}
    exact = gradient(pipe, AutodiffFisher(denoiser), options)
    differences = gradient(pipe, FiniteDifferenceFisher(denoiser), options)
    assert torch.equal(differences, gradient(pipe, FiniteDifferenceFisher(denoiser, central=True), options))
    guided = gradient(pipe, AutodiffFisher(PipelineDenoiser(pipe, 4.0, prompt=PROMPTS)))
    assert relative(exact, guided) > 0.01
    with pytest.raises(InputError, match=r"`adjoint_guidance_scale` is 2, and the estimator's .* scale 1\. Pass"):
        pipe.scheduler.differentiable(AutodiffFisher(denoiser), adjoint_guidance_scale=2.0)
    assert torch.equal(gradient(pipe, DirectFisher(), options), gradient(pipe, DirectFisher()))


def test_comparison_takes_three_calls_per_run_of_differences_and_none_of_automatic_differentiation():
    pipe = pipeline()
    for estimator, calls in ((AutodiffFisher, 5), (FiniteDifferenceFisher, 5 + 3), (ESTIMATORS["one step"], 1 + 1)):
        denoiser = PipelineDenoiser(pipe, 4.0, prompt=PROMPTS)
        gradient(pipe, estimator(denoiser), steps=5)
        assert denoiser.num_calls == calls
    with pipe.scheduler.differentiable(FiniteDifferenceFisher(denoiser)) as trajectory:
        arguments = {"prompt": PROMPTS, "guidance_scale": 4.0, "output_type": "latent"}
        total = pipe(latents=noise(), num_inference_steps=5, **arguments).images.sum()
    before = denoiser.num_calls
    for _ in range(2):
        trajectory.gradient(total, retain_graph=True)
    assert denoiser.num_calls - before == 3 + 2 * 5


def reward(images, prompts):
    return images.mean((1, 2, 3))


def test_guide_compares_a_denoiser_that_the_estimator_brings():
    pipe = pipeline()
    options = {"num_guidance_steps": 1, "num_inference_steps": 2, "guidance_scale": 4.0}
    estimator = FiniteDifferenceFisher(PipelineDenoiser(pipe, prompt=PROMPTS))
    with pytest.raises(InputError, match=r"denoiser \(guidance scale 1\) differs .* pass `adjoint_guidance_scale`"):
        guide(pipe, PROMPTS, reward, estimator=estimator, **options)
    guide(pipe, PROMPTS, reward, estimator=estimator, adjoint_guidance_scale=1.0, **options)
    with pytest.raises(InputError, match="`adjoint_guidance_scale` is 2, and"):
        guide(pipe, PROMPTS, reward, estimator=estimator, adjoint_guidance_scale=2.0, **options)


@pytest.mark.parametrize("cls", [FiniteDifferenceFisher, AutodiffFisher])
def test_guidance_per_step_compares_a_denoiser_at_its_first_step(cls):
    pipe = pipeline()

    def run(estimator, **options):
        with posterior_guidance(pipe, reward, PROMPTS, estimator=estimator, **options) as guidance:
            return pipe(
                PROMPTS, latents=noise(), guidance_scale=4.0, num_inference_steps=2, output_type="latent",
                callback_on_step_end=guidance,
            ).images  # fmt: skip

    denoiser = PipelineDenoiser(pipe, prompt=PROMPTS)
    with pytest.raises(InputError, match=r"denoiser \(guidance scale 1\) differs from the run's output"):
        run(cls(denoiser))
    expected = run(cls(denoiser), adjoint_guidance_scale=1.0)
    assert torch.equal(run(cls(), adjoint_guidance_scale=1.0), expected)
    with (
        pytest.raises(InputError, match=r"denoiser \(guidance scale 4\) differs from the run's output"),
        posterior_guidance(pipe, reward, ["x", "y"], estimator=cls()) as guidance,
    ):
        pipe(PROMPTS, latents=noise(), guidance_scale=4.0, num_inference_steps=2, callback_on_step_end=guidance)
