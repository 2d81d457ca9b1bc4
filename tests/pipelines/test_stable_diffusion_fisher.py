"""The pipeline's call is the stock one; `guide` starts from the stock image and climbs by the run's own gradient."""

import inspect

import diffusers
import numpy
import pytest
import tiny
import torch
from cases import relative

from diffusers_fisher import (
    AutodiffFisher,
    ClassifierReward,
    DirectFisher,
    FiniteDifferenceFisher,
    OneStepFisher,
    PipelineDenoiser,
    StableDiffusionFisherPipeline,
    embedded_checkpoint,
    embedded_prompt,
    fisher_scheduler,
)

PROMPTS = ["a b", "c"]
WEIGHTS = torch.randn(16, 16, generator=torch.Generator().manual_seed(5))
SAMPLERS = {
    "DDIM": (diffusers.DDIMScheduler, {}),
    "DDIM v": (diffusers.DDIMScheduler, {"prediction_type": "v_prediction"}),
    "DPM++ Karras": (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "Euler": (diffusers.EulerDiscreteScheduler, {}),
    "Euler v": (diffusers.EulerDiscreteScheduler, {"prediction_type": "v_prediction"}),
    "Euler ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "DDPM": (diffusers.DDPMScheduler, {}),
    "PNDM": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
}
STOCHASTIC = ["Euler ancestral", "DDPM"]


def make(sampler="DDIM", cls=StableDiffusionFisherPipeline, **components):
    kind, changes = SAMPLERS[sampler]
    return tiny.stable_diffusion(cls, scheduler=kind.from_config(tiny.scheduler().config, **changes), **components)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(count=2):
    return torch.randn(count, 4, 8, 8, generator=seeded())


def projection(images, prompts):
    """Returns linear rewards with another weight for each pixel."""
    return (images * WEIGHTS).mean(1).flatten(1).sum(1)


def flat(images, prompts):
    """Returns rewards whose gradient is zero."""
    return images.detach().mean((1, 2, 3)) + 0 * images.mean((1, 2, 3))


def guide(pipe, prompt=PROMPTS, reward=projection, **options):
    options = {
        "num_inference_steps": 4,
        "num_guidance_steps": 2,
        "guidance_scale": 4.0,
        "output_type": "pt",
        **options,
    }
    return pipe.guide(prompt, reward, **options)


def stock(pipe, prompt=PROMPTS, **options):
    options = {"num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "pt", **options}
    return pipe(prompt, **options).images


# The call


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_call_is_the_stock_pipelines_bit_for_bit(sampler, guidance_scale):
    reference = make(sampler, diffusers.StableDiffusionPipeline)
    ours, other = make(sampler), make(sampler)
    other.scheduler = fisher_scheduler(type(ours.scheduler)).from_config(ours.scheduler.config)
    options = {"guidance_scale": guidance_scale, "negative_prompt": ["d", ""], "num_images_per_prompt": 2}
    expected = stock(reference, generator=seeded(), **options)
    assert torch.equal(stock(ours, generator=seeded(), **options), expected)
    assert torch.equal(stock(other, generator=seeded(), **options), expected)
    assert not torch.equal(stock(ours, generator=seeded(1), **options), expected)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_call_gives_every_output_type_of_the_stock_pipeline(output_type):
    expected, images = (
        stock(make(cls=cls), generator=seeded(), output_type=output_type)
        for cls in (diffusers.StableDiffusionPipeline, StableDiffusionFisherPipeline)
    )
    assert type(images) is type(expected)
    assert all(numpy.array_equal(numpy.asarray(a), numpy.asarray(b)) for a, b in zip(images, expected, strict=True))


def test_call_has_the_stock_signature():
    signatures = [
        inspect.signature(cls.__call__) for cls in (StableDiffusionFisherPipeline, diffusers.StableDiffusionPipeline)
    ]
    assert signatures[0] == signatures[1]


# Guidance starts from the stock image


ARGUMENTS = {
    "one prompt": lambda: {"prompt": "a b", "negative_prompt": "d", "generator": seeded()},
    "batch": lambda: {"generator": seeded(), "negative_prompt": ["d", "e"]},
    "without guidance": lambda: {"generator": seeded(), "guidance_scale": 1.0},
    "several an prompt": lambda: {
        "generator": seeded(), "num_images_per_prompt": 2, "negative_prompt": ["d", "e f"]
    },
    "list of generators": lambda: {"generator": [seeded(1), seeded(2)]},
    "latents": lambda: {"latents": noise()},
    "size": lambda: {"generator": seeded(), "height": 24, "width": 32},
    "rescaled guidance": lambda: {"generator": seeded(), "guidance_rescale": 0.7},
    "eta": lambda: {"generator": seeded(), "eta": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_first_image_is_the_stock_image_whatever_the_arguments(kind):
    images = guide(make(), reward=flat, num_guidance_steps=0, **ARGUMENTS[kind]()).images
    assert torch.equal(images, stock(make(), **ARGUMENTS[kind]()))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_first_image_is_the_stock_image_with_every_sampler(sampler):
    pipe, generators = make(sampler), [seeded(), seeded()]
    out = guide(pipe, reward=flat, num_guidance_steps=2, generator=generators[0])
    assert torch.equal(out.images, stock(pipe, generator=generators[1]))
    assert torch.equal(generators[0].get_state(), generators[1].get_state())  # advanced as by one stock call


@pytest.mark.parametrize(
    "grid", [{"timesteps": [901, 501, 101]}, {"sigmas": [9.0, 2.0, 0.3, 0.0]}], ids=["timesteps", "sigmas"]
)
def test_first_image_is_the_stock_image_on_a_grid_of_the_callers(grid):
    pipe = make("Euler")
    out = guide(pipe, generator=seeded(), estimator=AutodiffFisher(), num_guidance_steps=1, **grid)
    assert out.num_denoiser_calls == 3 + 3 + 3
    images = guide(pipe, reward=flat, generator=seeded(), num_guidance_steps=0, **grid).images
    assert torch.equal(images, stock(pipe, generator=seeded(), **grid))


def test_first_image_is_the_stock_image_where_the_networks_own_size_is_not_square():
    pipe = make(unet=tiny.unet(sample_size=(8, 12)))
    out = guide(pipe, reward=flat, generator=seeded(), num_guidance_steps=0)
    assert out.images.shape == (2, 3, 16, 24)
    assert torch.equal(out.images, stock(pipe, generator=seeded()))


def test_first_image_is_the_stock_image_of_the_global_seed_where_no_generator_is_given():
    pipe = make()
    torch.manual_seed(4)
    expected = stock(pipe)
    torch.manual_seed(4)
    assert torch.equal(guide(pipe, reward=flat, num_guidance_steps=0).images, expected)


def test_one_negative_prompt_serves_for_all():
    texts = ["d", ["d", "d"]]
    single, several = (guide(make(), negative_prompt=text, generator=seeded()) for text in texts)
    assert torch.equal(single.images, several.images)
    assert not torch.equal(single.images, guide(make(), generator=seeded()).images)


# Guidance climbs


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_rewards_go_up_and_latents_give_the_best_images_again(sampler):
    pipe = make(sampler)
    out = guide(pipe, latents=noise(), generator=seeded(), num_guidance_steps=3, step_size=0.1)
    assert bool((out.best_rewards > out.rewards[0]).all())
    assert torch.equal(out.best_rewards, out.rewards.max(0).values)
    images = stock(pipe, latents=out.latents, generator=seeded())
    assert torch.equal(images, out.images)
    # The images passed no rounding on their way.
    torch.testing.assert_close(projection(images, PROMPTS).double(), out.best_rewards, rtol=0, atol=1e-6)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_with_the_true_jacobian_the_first_step_is_that_of_full_back_propagation(sampler, guidance_scale):
    pipe, start = make(sampler), noise()
    options = {"num_inference_steps": 4, "guidance_scale": guidance_scale, "negative_prompt": ["d", ""]}
    leaf = start.clone().requires_grad_()
    call = inspect.unwrap(type(pipe).__call__)
    latents = call(pipe, PROMPTS, latents=leaf, generator=seeded(), output_type="latent", **options).images
    images = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample / 2 + 0.5
    (gradient,) = torch.autograd.grad(projection(images.clamp(0, 1), PROMPTS).sum(), leaf)

    out = guide(
        pipe,
        latents=start,
        generator=seeded(),
        estimator=AutodiffFisher(),
        num_guidance_steps=1,
        step_size=0.02,
        **options,
    )
    assert bool((out.rewards[1] > out.rewards[0]).all())  # so that `latents` are those after the step
    norms = [torch.linalg.vector_norm(x.flatten(1), dim=1)[:, None, None, None] for x in (start, gradient)]
    target = start + 0.02 * norms[0] * gradient / norms[1]
    expected = target * norms[0] / torch.linalg.vector_norm(target.flatten(1), dim=1)[:, None, None, None]
    # The same products in another order through four steps and the decoder, in float32.
    assert relative(out.gradient_norms[0], norms[1].flatten()) < 1e-5
    # The step is 1/50 of the noise, so its rounding is 50 times that of float32.
    assert relative(out.latents - start, expected - start) < 1e-5


GENERATORS = {"one": seeded, "list": lambda: [seeded(1), seeded(2)], "none": lambda: None}


@pytest.mark.parametrize("generators", GENERATORS)
@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_stochastic_samplers_see_the_same_noise_in_every_run(sampler, generators):
    pipe = make(sampler)
    out = guide(pipe, reward=flat, latents=noise(), generator=GENERATORS[generators](), num_guidance_steps=2)
    assert torch.equal(out.rewards[0], out.rewards[1])
    assert torch.equal(out.rewards[0], out.rewards[2])
    other = guide(pipe, reward=flat, latents=noise(), generator=seeded(7), num_guidance_steps=0)
    assert not torch.equal(out.rewards[0], other.rewards[0])  # there is noise


def test_output_fields():
    out = guide(make(), generator=seeded(), num_guidance_steps=3, num_images_per_prompt=2)
    assert out.images.shape == (4, 3, 16, 16)
    assert (out.rewards.shape, out.rewards.dtype) == ((4, 4), torch.float64)
    assert (out.gradient_norms.shape, out.gradient_norms.dtype) == ((3, 4), torch.float64)
    assert (out.latents.shape, out.latents.dtype) == ((4, 4, 8, 8), torch.float32)
    assert (out.seconds.shape, bool((out.seconds > 0).all())) == ((4,), True)
    assert out.nsfw_content_detected == []
    tensors = [out.images, out.rewards, out.best_rewards, out.latents, out.gradient_norms]
    assert not any(tensor.requires_grad for tensor in tensors)


@pytest.mark.parametrize(
    ("estimator", "calls_per_step", "comparisons"),  # denoiser calls per gradient of four steps, and once
    [
        (None, 1, 1),
        (DirectFisher(), 0, 0),
        (OneStepFisher(), 1, 1),
        (OneStepFisher(AutodiffFisher()), 1, 0),
        (AutodiffFisher(), 4, 0),
        (FiniteDifferenceFisher(), 4, 3),
        (FiniteDifferenceFisher(central=True), 8, 3),
    ],
    ids=["default", "direct", "one step", "one step, autodiff", "autodiff", "forward", "central"],
)
@pytest.mark.parametrize("with_denoiser", [False, True], ids=["bound", "own denoiser"])
def test_denoiser_calls_are_counted(estimator, calls_per_step, comparisons, with_denoiser):
    pipe, calls = make(), []
    if with_denoiser and hasattr(estimator, "bind"):
        denoiser = PipelineDenoiser(pipe, prompt=PROMPTS, guidance_scale=4.0)
        denoiser(noise(), 500)  # earlier calls do not count
        estimator = estimator.bind(denoiser)
    pipe.unet.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    out = guide(pipe, generator=seeded(), estimator=estimator, num_guidance_steps=3)
    assert out.num_denoiser_calls == len(calls) == 4 * 4 + 3 * calls_per_step + comparisons


def test_reward_sees_a_prompt_for_every_image_in_order():
    reward_calls = []

    def reward(images, prompts):
        reward_calls.append((len(images), prompts))
        return projection(images, prompts)

    guide(make(), reward=reward, generator=seeded(), num_images_per_prompt=2, num_guidance_steps=1)
    assert reward_calls == [(4, ["a b", "a b", "c", "c"])] * 3  # a trial, and two runs


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_output_types_hold_the_same_images(output_type):
    reference = guide(make(), generator=seeded()).images
    images = guide(make(), generator=seeded(), output_type=output_type).images
    expected = reference.permute(0, 2, 3, 1).numpy()
    if output_type == "pil":
        arrays = numpy.stack([numpy.asarray(image) for image in images])
        assert numpy.array_equal(arrays, (expected * 255).round().astype(numpy.uint8))
    else:
        assert numpy.array_equal(images if output_type == "np" else images.permute(0, 2, 3, 1).numpy(), expected)


def test_without_return_dict_the_fields_come_as_a_tuple():
    out = guide(make(), generator=seeded())
    values = guide(make(), generator=seeded(), return_dict=False)
    assert torch.equal(values[0], out.images)
    assert torch.equal(values[1], out.rewards)


def test_half_precision_pipeline():
    pipe = make()
    pipe.to(dtype=torch.bfloat16)
    out = guide(pipe, reward=flat, generator=seeded(), num_guidance_steps=1)
    expected_latents = torch.randn(2, 4, 8, 8, generator=seeded(), dtype=torch.bfloat16)
    assert torch.equal(out.latents, expected_latents.float())
    # A differentiable run steps in float32, the stock one in bfloat16, whose unit is 2^-8 here: measured two of them.
    difference = out.images - stock(pipe, generator=seeded()).float()
    assert float(difference.abs().max()) <= 2**-6
    assert (out.images.dtype, pipe.unet.dtype, pipe.vae.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    long_run = guide(pipe, generator=seeded(), num_guidance_steps=3, step_size=0.1)
    assert bool((long_run.best_rewards > long_run.rewards[0]).all())


def test_callbacks_that_change_nothing_are_called_in_every_run():
    calls = []

    def callback(pipe, index, timestep, arguments):
        calls.append((index, arguments["latents"].shape))
        return arguments

    options = {"generator": seeded(), "num_guidance_steps": 1, "callback_on_step_end": callback}
    guide(make(), estimator=AutodiffFisher(), **options)
    assert calls == [(index, (2, 4, 8, 8)) for index in range(4)] * 2  # the estimator's own evaluations are no steps


@pytest.mark.parametrize("sampler", ["DDIM", "Euler ancestral"])
@pytest.mark.parametrize("grad", [True, False], ids=["enable_grad", "no_grad"])
def test_nothing_of_the_caller_changes(sampler, grad):
    pipe = make(sampler)
    stock(pipe)
    with torch.set_grad_enabled(grad):
        before = tiny.snapshot(pipe)
        out = guide(pipe, generator=seeded(), estimator=AutodiffFisher(), num_guidance_steps=1)
        assert tiny.snapshot(pipe) == before
    assert float(out.gradient_norms.min()) > 0


def test_progress_bar_is_shown_and_can_be_disabled(capsys):
    pipe = make()
    pipe.set_progress_bar_config()
    guide(pipe, generator=seeded(), num_guidance_steps=2)
    text = capsys.readouterr().err
    assert "3/3" in text
    assert "reward=" in text
    assert "/4 " not in text  # one bar, not one for every run of four steps
    pipe.set_progress_bar_config(disable=True)
    guide(pipe, generator=seeded(), num_guidance_steps=2)
    assert capsys.readouterr().err == ""


# The safety checker


def test_safety_checker_blackens_what_the_stock_call_would():
    pipe = make(safety_checker=tiny.safety_checker(2.0), feature_extractor=tiny.feature_extractor())
    options = {"latents": 3 * noise(4), "prompt": ["a", "b", "c", "d"]}
    reference = guide(pipe, reward=flat, num_guidance_steps=0, **options)
    assert reference.nsfw_content_detected == [False] * 4
    assert torch.equal(reference.images, stock(pipe, **options))
    middle = tiny.similarities(pipe, reference.images).sort().values[1:3].mean()
    pipe.safety_checker.concept_embeds_weights.data.fill_(float(middle))
    out = guide(pipe, reward=flat, num_guidance_steps=0, **options)
    assert sorted(out.nsfw_content_detected) == [False, False, True, True]
    assert torch.equal(out.images, stock(pipe, **options))
    assert [not bool(image.any()) for image in out.images] == out.nsfw_content_detected
    assert torch.equal(out.rewards, reference.rewards)


# The trained checkpoint


def test_embedded_checkpoint_is_steered_to_another_class():
    pipe = StableDiffusionFisherPipeline.from_pretrained(embedded_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    reward = ClassifierReward.from_pretrained(f"{embedded_checkpoint()}/classifier", target="ankle boot")
    out = guide(
        pipe, [embedded_prompt(7)] * 2, reward, generator=seeded(), num_inference_steps=8, num_guidance_steps=4,
        guidance_scale=2.0,
    )  # fmt: skip
    assert bool((out.rewards[0] < -2).all())  # sneakers, as prompted
    # Nats: the probability grew at least sevenfold. Other seeds gain from 3 to 5.
    assert bool((out.best_rewards - out.rewards[0] > 2).all())
