"""Bad input gives a clear error before it does harm, and afterwards nothing has changed."""

import contextlib

import diffusers
import numpy
import pytest
import tiny
import torch
from diffusers.callbacks import SDCFGCutoffCallback
from PIL import Image

from diffusers_fisher import (
    AutodiffFisher,
    DirectFisher,
    FiniteDifferenceFisher,
    InputError,
    NumericalError,
    StableDiffusionFisherPipeline,
    TrajectoryError,
    UnsupportedError,
    fisher_scheduler,
)

PROMPTS = ["a b", "c"]
NAN = float("nan")


def make(**components):
    return tiny.stable_diffusion(StableDiffusionFisherPipeline, **components)


def seeded():
    return torch.Generator().manual_seed(0)


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def guide(pipe, prompt=PROMPTS, reward=brightness, **options):
    options = {
        "num_inference_steps": 3,
        "num_guidance_steps": 2,
        "guidance_scale": 4.0,
        "generator": seeded(),
        **options,
    }
    return pipe.guide(prompt, reward, **options)


def score(pipe, images=None, prompt=PROMPTS, **options):
    options = {"num_inference_steps": 2, "step_halving": False, "generator": seeded(), **options}
    return pipe.log_likelihood(images, prompt=prompt, **options)


@contextlib.contextmanager
def check_refusal(pipe, error, message, evaluations=0):
    """Checks that the block raises `error` after so many evaluations of the UNet, and that the pipeline stays."""
    calls = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    before = tiny.snapshot(pipe)
    with pytest.raises(error, match=message):
        yield
    assert tiny.snapshot(pipe) == before
    hook.remove()
    assert len(calls) == evaluations


# Guidance, before any sampling


GUIDANCE = {
    "no prompt": (lambda: {"prompt": []}, "0 prompts were given with `num_images_per_prompt` 1; allowed: at least 1"),
    "prompt is None": (lambda: {"prompt": None}, "`prompt` is None; allowed: a string, or a list of strings"),
    "prompt is a number": (lambda: {"prompt": [3]}, r"`prompt` is \[3\]; allowed: a string, or a list of strings"),
    "no image": (lambda: {"num_images_per_prompt": 0}, "2 prompts were given with `num_images_per_prompt` 0"),
    "negative prompts": (
        lambda: {"negative_prompt": ["a", "b", "c"]},
        "`negative_prompt` has 3 entries for 2 prompts; give one string, or one for each prompt",
    ),
    "generators": (lambda: {"generator": [seeded()]}, "1 generators were given for 2 images; give one, or as many"),
    "height": (lambda: {"height": 20}, r"`height` and `width` are \(20, 16\); allowed: positive multiples of 8"),
    "width": (lambda: {"width": -8}, r"`height` and `width` are \(16, -8\); allowed: positive multiples of 8"),
    "latents' number": (
        lambda: {"latents": torch.randn(3, 4, 8, 8)},
        r"`latents` have shape \(3, 4, 8, 8\); allowed: a tensor \(2, 4, 8, 8\), finite, of unit variance",
    ),
    "latents' size": (
        lambda: {"latents": torch.randn(2, 4, 8, 8), "height": 32},
        r"`latents` have shape \(2, 4, 8, 8\); allowed: a tensor \(2, 4, 16, 8\)",
    ),
    "latents' channels": (lambda: {"latents": torch.randn(2, 3, 8, 8)}, r"`latents` have shape \(2, 3, 8, 8\)"),
    "latents are NaN": (lambda: {"latents": torch.full((2, 4, 8, 8), NAN)}, r"allowed: a tensor .*, finite"),
    "latents are zero": (lambda: {"latents": torch.zeros(2, 4, 8, 8)}, "A sample of the initial noise is all zero"),
    "latents are an array": (
        lambda: {"latents": numpy.zeros((2, 4, 8, 8))},
        "`latents` is a ndarray; allowed: a tensor or None",
    ),
    "no steps": (lambda: {"num_inference_steps": 0}, "`num_guidance_steps` is 2, `num_inference_steps` 0; allowed"),
    "guidance steps": (lambda: {"num_guidance_steps": -1}, "`num_guidance_steps` is -1, .* at least 0 and at least 1"),
    "step size": (lambda: {"step_size": 0.0}, "`step_size` is 0.0; allowed: positive, such as 0.2"),
    "step size is NaN": (lambda: {"step_size": NAN}, r"`step_size` is nan \(float\); allowed: a finite number"),
    "output type": (lambda: {"output_type": "latent"}, "`output_type` is 'latent'; allowed: pil, np, pt"),
    "reward of images alone": (
        lambda: {"reward": lambda images: images.mean((1, 2, 3))},
        r"reward '<lambda>' can't be called as reward\(images, prompts\): too many positional arguments. It must take",
    ),
    "reward is an unknown name": (
        lambda: {"reward": "brightness"},
        "The reward is 'brightness'; allowed: classifier:PATH:CLASS",
    ),
    "half a step": (lambda: {"num_guidance_steps": 1.5}, "`num_guidance_steps` is 1.5 .*; allowed: a whole number"),
    "no decoder": (lambda: {"decoder": object()}, "`decoder` is a object; allowed: a torch module or None"),
    "unknown argument": (lambda: {"promptt": "a"}, r"`guide` does not take `promptt`. Did you mean `prompt`"),
}


@pytest.mark.parametrize("kind", GUIDANCE)
def test_guidance_refuses_arguments_before_any_sampling(kind):
    arguments, message = GUIDANCE[kind]
    pipe, arguments = make(), arguments()
    with check_refusal(pipe, InputError, message):
        guide(pipe, **arguments)


def test_guidance_with_an_unknown_scheduler_is_refused_before_any_sampling():
    pipe = make(scheduler=diffusers.CMStochasticIterativeScheduler())
    with check_refusal(pipe, UnsupportedError, "Noise levels of CMStochasticIterativeScheduler are not known"):
        guide(pipe)


REWARDS = {
    "one number": (lambda images: images.mean(), InputError, r"'reward' returned shape \(\) for 2 images"),
    "a column": (lambda images: images.mean((1, 2, 3))[:, None], InputError, r"returned shape \(2, 1\) for 2 images"),
    "no tensor": (lambda images: [0.0, 1.0], InputError, "'reward' returned a list for 2 images; it must return a"),
    "NaN": (lambda images: images.mean((1, 2, 3)) * NAN, NumericalError, r"'reward' is not finite: \[nan, nan\]"),
    "no graph": (lambda images: images.detach().mean((1, 2, 3)), InputError, "'reward' is not differentiable with"),
    "through numpy": (
        lambda images: torch.tensor([numpy.asarray(image.detach()).mean() for image in images]),
        InputError,
        "'reward' is not differentiable with respect to the images: .* PIL or",
    ),
    "its own error": (lambda images: images.mean((1, 2, 3)) / [], TypeError, "unsupported operand"),
}


@pytest.mark.parametrize("kind", REWARDS)
def test_guidance_tries_the_reward_before_any_sampling(kind):
    value, error, message = REWARDS[kind]

    def reward(images, prompts):
        return value(images)

    pipe = make()
    with check_refusal(pipe, error, message):
        guide(pipe, reward=reward)


def test_guidance_under_inference_mode_says_so_before_any_sampling():
    pipe, calls = make(), []

    def reward(images, prompts):
        calls.append(1)
        return brightness(images, prompts)

    with (
        torch.inference_mode(),
        check_refusal(pipe, TrajectoryError, "torch.inference_mode forbids .* torch.no_grad instead"),
    ):
        guide(pipe, reward=reward)
    assert calls == []
    guide(pipe)


def test_latents_from_inference_mode_are_accepted():
    pipe = make()
    with torch.inference_mode():
        latents = torch.randn(2, 4, 8, 8, generator=seeded())
    assert bool((guide(pipe, latents=latents, output_type="pt").rewards[0] > 0).all())
    assert score(pipe, latents=latents).log_prob.shape == (2,)


# Guidance, on the way


class Failing:
    """Makes a reward that fails at its `call`-th call. The first call is a trial before sampling."""

    def __init__(self, call, fault):
        self.call, self.fault, self.count = call, fault, 0

    def __call__(self, images, prompts):
        self.count += 1
        values = brightness(images, prompts)
        return self.fault(values) if self.count == self.call else values


def raise_error(values):
    raise ZeroDivisionError("the judge is gone")


def interrupt(values):
    raise KeyboardInterrupt("by hand")


FAULTS = {
    "raises": (raise_error, ZeroDivisionError, "the judge is gone"),
    "is interrupted": (interrupt, KeyboardInterrupt, "by hand"),
    "is NaN": (
        lambda values: values * torch.tensor([1.0, NAN]),
        NumericalError,
        r"'Failing' is not finite: \[0.*, nan",
    ),
    "has another shape": (lambda values: values[:1], InputError, r"'Failing' returned shape \(1,\) for 2 images"),
    "loses its graph": (lambda values: values.detach(), InputError, "'Failing' is not differentiable"),
    "has an infinite gradient": (
        lambda values: (values - values.detach()).sqrt(),
        NumericalError,
        "gradient through 3",
    ),
}


SCHEDULERS = [diffusers.DDIMScheduler, fisher_scheduler(diffusers.EulerDiscreteScheduler)]
FAILURES = [
    (fault, call)
    for fault in FAULTS
    for call in (2, 3)
    if FAULTS[fault][1] is not NumericalError or (fault == "is NaN" and call == 2)
]


@pytest.mark.parametrize(("fault", "call"), FAILURES)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_reward_that_fails_half_way_leaves_the_pipeline_as_it_was(scheduler, fault, call):
    pipe = make(scheduler=scheduler.from_config(tiny.scheduler().config))
    pipe(PROMPTS, num_inference_steps=2)
    fault, error, message = FAULTS[fault]
    # Runs, gradients, and before the first gradient a comparison.
    with check_refusal(pipe, error, message, evaluations=3 * (call - 1) + call - 2 + (call > 2)):
        guide(pipe, reward=Failing(call, fault))
    assert guide(pipe).rewards.shape == (3, 2)


@pytest.mark.parametrize(
    ("fault", "run"), [("is NaN", 1), ("has an infinite gradient", 0), ("has an infinite gradient", 1)]
)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_numbers_that_are_not_finite_once_there_is_a_reward_leave_the_pipeline_as_it_was(scheduler, fault, run):
    pipe = make(scheduler=scheduler.from_config(tiny.scheduler().config))
    pipe(PROMPTS, num_inference_steps=2)
    before = tiny.snapshot(pipe)
    out = guide(pipe, reward=Failing(2 + run, FAULTS[fault][0]))
    assert out.status.startswith(f"stopped in run {run}: ")
    assert len(out.rewards) == (run if fault == "is NaN" else run + 1)
    assert tiny.snapshot(pipe) == before


@pytest.mark.parametrize("estimator", [DirectFisher(), AutodiffFisher()], ids=["direct", "autodiff"])
def test_latents_that_a_callback_changes_between_steps_are_refused(estimator):
    def callback(pipe, index, timestep, arguments):
        return {"latents": 1.01 * arguments["latents"]}

    pipe = make()
    with check_refusal(
        pipe, TrajectoryError, r"Step 1 received other latents than step 0 returned, by .*: a callback", 2
    ):
        guide(pipe, estimator=estimator, callback_on_step_end=callback)


def test_latents_that_a_callback_changes_after_the_last_step_are_refused():
    def callback(pipe, index, timestep, arguments):
        return {"latents": 1.01 * arguments["latents"]} if index == 2 else {}

    pipe = make()
    with check_refusal(
        pipe, TrajectoryError, "In run 0, something replaced the latents after the scheduler's last step", 3
    ):
        guide(pipe, callback_on_step_end=callback)


def cut_off_guidance(pipe, index, timestep, arguments):
    """A common callback: from some step on it turns guidance off and halves the embeddings."""
    if index != 1:
        return {}
    pipe._guidance_scale = 0.0
    return {"prompt_embeds": arguments["prompt_embeds"].chunk(2)[-1]}


def other_prompt(pipe, index, timestep, arguments):
    return {**arguments, "prompt_embeds": -3 * arguments["prompt_embeds"]} if index == 1 else arguments


def other_prompt_in_place(pipe, index, timestep, arguments):
    if index == 1:
        arguments["prompt_embeds"].mul_(-3)
    return {}


def other_embeddings(pipe, index, timestep, arguments):
    return {"prompt_embeds": torch.zeros(2, 8, 16)} if index == 1 else {}


CALLBACKS = {
    "guidance is cut off": (
        cut_off_guidance,
        ["prompt_embeds"],
        r"\['guidance_scale', 'prompt_embeds'\] after step 1",
    ),
    "another prompt": (other_prompt, ["latents", "prompt_embeds"], r"\['prompt_embeds'\] after step 1"),
    "another prompt in place": (other_prompt_in_place, ["prompt_embeds"], r"\['prompt_embeds'\] after step 1"),
    "another prompt, not asked for": (other_embeddings, ["latents"], r"\['prompt_embeds'\] after step 1"),
    "diffusers' own": (SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1), None, "after step 1 of the"),
}


@pytest.mark.parametrize("kind", CALLBACKS)
def test_estimators_that_evaluate_the_network_refuse_callbacks_that_change_its_conditions(kind):
    callback, inputs, message = CALLBACKS[kind]
    options = {"prompt": "a b", "callback_on_step_end": callback}  # diffusers' own takes one prompt
    if inputs is not None:
        options["callback_on_step_end_tensor_inputs"] = inputs
    pipe = make()
    for estimator in (AutodiffFisher(), FiniteDifferenceFisher()):
        with pytest.raises(UnsupportedError, match="A callback changed .*" + message):
            guide(pipe, estimator=estimator, **options)
    with pytest.raises(UnsupportedError, match="A callback changed .*" + message):
        guide(pipe, estimator=AutodiffFisher(), adjoint_guidance_scale=1.0, **options)
    out = guide(pipe, estimator=DirectFisher(), **options)
    assert not torch.equal(out.rewards[0], guide(pipe, "a b", estimator=DirectFisher()).rewards[0])


def test_callback_that_raises_leaves_the_pipeline_as_it_was():
    def callback(pipe, index, timestep, arguments):
        return arguments if index == 0 else raise_error(None)

    pipe = make()
    with check_refusal(pipe, ZeroDivisionError, "the judge is gone", 2):
        guide(pipe, callback_on_step_end=callback)


def test_error_for_images_that_are_not_finite_does_not_name_the_reward():
    pipe = make()
    torch.nn.init.constant_(pipe.vae.decoder.conv_out.bias, NAN)
    with check_refusal(
        pipe,
        NumericalError,
        r"images of run 0 are not finite; their latents are, up to \d.* dtype of the decoder",
        3,
    ):
        guide(pipe)


def test_denoiser_whose_output_is_not_finite_is_refused():
    pipe = make()
    torch.nn.init.constant_(pipe.unet.conv_out.bias, NAN)
    with check_refusal(
        pipe,
        NumericalError,
        "latents at the end of run 0 are not finite, .* network's output is not .* evaluation 0 on",
        3,
    ):
        guide(pipe)
    with check_refusal(pipe, NumericalError, "The denoiser's output at timestep 0.* is not finite", 1):
        score(pipe, latents=torch.zeros(2, 4, 8, 8))


# Learned variance


def learned_variance():
    return make(unet=tiny.unet(out_channels=8))


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_guidance_of_a_model_with_learned_variance_is_refused_at_the_first_step(guidance_scale):
    pipe = learned_variance()
    message = r"output has shape \(2, 8, 8, 8\), the sample \(2, 4, 8, 8\): models with learned variance are not"
    with check_refusal(pipe, TrajectoryError, message, 1):
        guide(pipe, guidance_scale=guidance_scale)


@pytest.mark.parametrize(
    "estimator", [None, DirectFisher(), FiniteDifferenceFisher()], ids=["autodiff", "direct", "fd"]
)
def test_likelihood_of_a_model_with_learned_variance_is_refused_at_the_first_node(estimator):
    pipe = learned_variance()
    message = r"output has shape \(2, 8, 8, 8\); allowed: \(2, 4, 8, 8\)\. Models with learned var"
    with check_refusal(pipe, InputError, message, 1):
        score(pipe, latents=torch.zeros(2, 4, 8, 8), estimator=estimator)


# Likelihood


def image(value=0.5, size=(2, 3, 16, 16)):
    return torch.full(size, value)


def latents(*size, value=0.5):
    return torch.full(size, value)


IMAGES = {
    "nothing": (lambda: {}, "Give either `images` or `latents`: exactly one of them"),
    "both": (lambda: {"images": image(), "latents": latents(2, 4, 8, 8)}, "Give either `images` or `latents`"),
    "too many prompts": (lambda: {"images": image(), "prompt": ["a"] * 3}, "`prompt` has 3 entries for 2 images"),
    "too few prompts": (lambda: {"images": image(), "prompt": ["a"]}, "`prompt` has 1 entries for 2 images; give one"),
    "prompt is a number": (lambda: {"images": image(), "prompt": 3}, "`prompt` is 3; allowed: a string, or a list of"),
    "size": (lambda: {"images": image(size=(2, 3, 16, 20))}, "Images are 16x20 pixels; .* multiples of 8. Resize"),
    "PIL size": (lambda: {"images": [Image.new("RGB", (12, 8))] * 2}, "Images are 8x12 pixels; .* multiples of 8"),
    "several sizes": (
        lambda: {"images": [Image.new("RGB", (8, 8)), Image.new("RGB", (16, 8))]},
        r"Images of one call must have one size, got \[\(8, 8, 3\), \(8, 16, 3\)\]; call once per size",
    ),
    "no batch": (lambda: {"images": image(size=(16, 16))}, r"Images are of shape \(16, 16\); allowed: RGB as"),
    "no image": (lambda: {"images": []}, r"Images are a list \[\]; allowed: RGB as PIL, array \(B, H, W, 3\) or t"),
    "empty batch": (lambda: {"images": image(size=(0, 3, 16, 16))}, r"Images are of shape \(0, 3, 16, 16\); allowed"),
    "grey tensor": (lambda: {"images": image(size=(2, 1, 16, 16))}, r"Images are of shape \(2, 1, 16, 16\); allowed"),
    "array by channels": (lambda: {"images": image().numpy()}, r"Images are of shape \(2, 3, 16, 16\); allowed"),
    "file names": (lambda: {"images": ["a.png", "b.png"]}, "Images are a list of str; allowed: PIL images, arrays or"),
    "of two kinds": (
        lambda: {"images": [image()[0], Image.new("RGB", (16, 16))]}, "Images are a list of Tensor, ndarray; allowed"
    ),
    "one name": (lambda: {"images": "a.png"}, "Images are a str 'a.png'; allowed: RGB as PIL"),
    "array of objects": (lambda: {"images": numpy.array([None])}, "Images are a ndarray array.* allowed: RGB as PIL"),
    "above 1": (lambda: {"images": image(1.5)}, "values from 1.5 to 1.5; allowed: floating point in .0, 1., without"),
    "below 0": (lambda: {"images": image(-0.1)}, "values from -0.1 to -0.1; allowed: floating point in .0, 1."),
    "NaN": (lambda: {"images": image(NAN)}, "values from nan to nan; allowed: floating point in .0, 1., without NaN"),
    "8 bits": (
        lambda: {"images": image().to(torch.uint8)},
        r"dtype torch.uint8 .* in, such as `data_range=\(0, 255\)` or \(-1, 1\)",
    ),
    "negative prompt": (
        lambda: {"images": image(), "negative_prompt": "d"},
        "`negative_prompt` is 'd'; likelihoods and curvature are without guidance, where negative prompts",
    ),
    "misspelt option": (
        lambda: {"images": image(), "num_probe": 3}, "`log_likelihood` does not take `num_probe`. Did you mean `num_p"
    ),
    "option of nobody": (lambda: {"images": image(), "zzz": 3}, "`log_likelihood` does not take `zzz`. It takes bins"),
    "latents' channels": (
        lambda: {"latents": latents(2, 3, 8, 8)},
        r"Latents have shape \(2, 3, 8, 8\); allowed: a tensor \(B, 4, h, w\), h and w multiples of 4",
    ),
    "latents' size": (lambda: {"latents": latents(2, 4, 8, 6)}, r"Latents have shape \(2, 4, 8, 6\); .* multiples of"),
    "latents without batch": (lambda: {"latents": latents(4, 8, 8)}, r"Latents have shape \(4, 8, 8\); allowed"),
    "latents are an array": (lambda: {"latents": numpy.zeros((2, 4, 8, 8))}, "`latents` is a ndarray; allowed: a"),
    "latents are NaN": (lambda: {"latents": latents(2, 4, 8, 8, value=NAN)}, "must be finite floating-point numbers"),
    "no latents": (lambda: {"latents": latents(0, 4, 8, 8), "prompt": "a"}, r"\(0, 4, 8, 8\); allowed"),
    "no steps": (lambda: {"images": image(), "num_inference_steps": 0}, "`num_inference_steps` is 0; allowed: at"),
    "one step": (lambda: {"images": image(), "num_inference_steps": 1}, "`num_inference_steps` is 1; allowed: at"),
    "no probes": (lambda: {"images": image(), "num_probes": 0}, "`num_probes` is 0; allowed: at least 1, or None"),
    "half a prior": (lambda: {"images": image(), "prior_mean": 0.0}, "Give both `prior_mean` and `prior_variance`"),
}  # fmt: skip


@pytest.mark.parametrize("kind", IMAGES)
def test_likelihood_refuses_arguments_before_any_evaluation(kind):
    arguments, message = IMAGES[kind]
    pipe, arguments = make(), arguments()
    with check_refusal(pipe, InputError, message):
        score(pipe, **arguments)


@pytest.mark.parametrize("kind", ["PIL", "array", "tensor"])
def test_one_image_without_a_batch_axis_is_accepted(kind):
    pipe, grey = make(), image(size=(3, 16, 16))
    log_probs = {
        "PIL": Image.new("RGB", (16, 16), (51, 51, 51)), "array": numpy.full((16, 16, 3), 0.2, dtype=numpy.float32),
        "tensor": torch.full_like(grey, 0.2),
    }[kind]  # fmt: skip
    expected = score(pipe, image(0.2, (1, 3, 16, 16)), "a b").log_prob
    assert torch.equal(score(pipe, log_probs, "a b").log_prob, expected)


def test_likelihood_under_inference_mode_says_so_where_a_graph_is_needed():
    pipe, x = make(), latents(2, 4, 8, 8)
    with (
        torch.inference_mode(),
        check_refusal(pipe, InputError, "torch.inference_mode forbids .* use torch.no_grad instead"),
    ):
        score(pipe, latents=x, estimator=AutodiffFisher())
    expected = score(pipe, latents=x)
    with torch.inference_mode():
        out = score(pipe, latents=x)
    assert torch.equal(out.log_prob, expected.log_prob)


def test_likelihood_with_an_unknown_scheduler_is_refused_before_any_evaluation():
    pipe = make(scheduler=diffusers.CMStochasticIterativeScheduler())
    with check_refusal(pipe, UnsupportedError, "Noise levels of CMStochasticIterativeScheduler are not known"):
        score(pipe, image())


@pytest.mark.parametrize("call", [1, 2, 3])
def test_likelihood_that_is_interrupted_leaves_the_pipeline_as_it_was(call):
    pipe, count = make(), []

    def interrupting(module, inputs):
        count.append(1)
        if len(count) == call:
            raise KeyboardInterrupt("by hand")

    hook = pipe.unet.register_forward_pre_hook(interrupting)
    with check_refusal(pipe, KeyboardInterrupt, "by hand", call - 1):
        score(pipe, image())
    hook.remove()
    assert score(pipe, image()).log_prob.shape == (2,)
