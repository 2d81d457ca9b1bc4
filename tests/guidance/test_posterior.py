"""Guidance step by step in stock pipelines: what a tilt does to a step, which gradient it uses, what it refuses."""

import inspect

import diffusers
import pytest
import tiny
import torch
from cases import FunctionFisher, relative
from pipeline_cases import PIPELINES

from diffusers_fisher import (
    AutodiffFisher,
    DirectFisher,
    EndpointFisher,
    FiniteDifferenceFisher,
    InputError,
    NumericalError,
    OneStepFisher,
    PipelineDenoiser,
    TrajectoryError,
    UnsupportedError,
    posterior_guidance,
)
from diffusers_fisher.noise import state_of

PROMPTS = ["a b", "c"]
WEIGHTS = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def decode(latents):
    return torch.sigmoid(latents[:, :3])


def reward(images, prompts):
    return (images * WEIGHTS.to(images)).flatten(1).sum(1)


def noise(dtype=torch.float64, channels=4):
    return torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def stable_diffusion(name="DDIMScheduler", dtype=torch.float64, **changes):
    pipe = tiny.stable_diffusion().to(dtype)
    config = dict(pipe.scheduler.config) | changes
    pipe.scheduler = getattr(diffusers, name).from_config(config)
    return pipe


def sample(pipe, callback=None, steps=5, latents=None, **options):
    options = {"guidance_scale": 3.0, "generator": torch.Generator().manual_seed(1), **options}
    return pipe(
        PROMPTS, latents=noise(pipe.unet.dtype) if latents is None else latents, num_inference_steps=steps,
        output_type="latent", callback_on_step_end=callback, **options,
    ).images  # fmt: skip


def tilted(cls, strength, direction_of):
    """Makes a scheduler whose model output is that of the tilted score: eps - strength alpha |eps| u, at equal x_t."""

    class Tilted(cls):
        def step(self, model_output, timestep, sample, *args, **kwargs):
            if getattr(self, "step_index", 0) is None:
                self._init_step_index(timestep)
            index = getattr(self, "step_index", 0)
            state = state_of(self, sample, model_output, timestep, index)
            level = state.level
            norm = torch.hypot(level.alpha, level.sigma)
            size = torch.linalg.vector_norm(state.epsilon.flatten(1), dim=1)[:, None, None, None]
            # eps itself; or for flow v = (eps - x)/alpha at a given x, where alpha may be 0.
            factor = 1 / norm if "Flow" in cls.__name__ else level.alpha / norm
            change = -strength * factor.to(sample) * size * direction_of(state)
            return super().step(model_output + change, timestep, sample, *args, **kwargs)

        step.__signature__ = inspect.signature(cls.step)

    return Tilted


def direct(state):
    leaf = state.pred_original_sample.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(reward(decode(leaf), PROMPTS).sum(), leaf)
    return gradient / torch.linalg.vector_norm(gradient.flatten(1), dim=1)[:, None, None, None]


FIRST_ORDER = {
    "DDIM": ("DDIMScheduler", {}),
    "DDIM to the end": ("DDIMScheduler", {"set_alpha_to_one": True}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler, Karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "DPM-Solver++ of order 1": ("DPMSolverMultistepScheduler", {"solver_order": 1}),
    "UniPC of order 1": ("UniPCMultistepScheduler", {"solver_order": 1, "disable_corrector": list(range(99))}),
}


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_callback_is_the_step_with_a_tilted_score(name):
    """For first-order steps, the change after the step equals a change of the model output before the step."""
    scheduler, changes = FIRST_ORDER[name]
    pipe = stable_diffusion(scheduler, **changes)
    with posterior_guidance(pipe, reward, strength=0.3, decode=decode) as guidance:
        guided_sample = sample(pipe, guidance)
    cls = tilted(getattr(diffusers, scheduler), 0.3, direct)
    pipe.scheduler = cls.from_config(dict(pipe.scheduler.config))
    expected, stock_sample = sample(pipe), sample(stable_diffusion(scheduler, **changes))
    assert relative(expected, stock_sample) > 0.01
    # float64; the schedulers' own tables are float32 where ours are not.
    assert relative(guided_sample - stock_sample, expected - stock_sample) < 1e-4


def test_callback_tilts_the_score_of_flow_models_from_pure_noise():
    """Flow matching begins where alpha is 0 and the noise-to-signal ratio infinite."""
    case, start = PIPELINES["SD3"], noise()
    pipe = case.make().to(torch.float64)
    options = {"num_inference_steps": 4, "guidance_scale": 1.0}
    embeds = {key: value.double() for key, value in tiny.embeds(2).items()}

    def run(callback=None):
        return pipe(latents=start, output_type="latent", callback_on_step_end=callback, **embeds, **options).images

    stock_sample = run()
    with posterior_guidance(pipe, reward, strength=0.3, decode=decode) as guidance:
        guided_sample = run(guidance)
    assert len(guidance.rewards) == 4

    cls = tilted(diffusers.FlowMatchEulerDiscreteScheduler, 0.3, direct)
    pipe.scheduler = cls.from_config(dict(pipe.scheduler.config))
    expected = run()
    assert relative(expected, stock_sample) > 0.01
    assert relative(guided_sample - stock_sample, expected - stock_sample) < 1e-4  # the scheduler's sigmas are float32


@pytest.mark.parametrize(
    "name",
    [
        "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
        "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler",
        "LMSDiscreteScheduler", "PNDMScheduler", "SASolverScheduler", "TCDScheduler", "UniPCMultistepScheduler",
    ],
)  # fmt: skip
def test_every_samples_reward_goes_up_on_any_scheduler(name):
    changes = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    pipe = stable_diffusion(name, torch.float32, **changes)
    stock_rewards = reward(decode(sample(pipe)), PROMPTS)
    with posterior_guidance(pipe, reward, strength=0.2, decode=decode) as guidance:
        guided_rewards = reward(decode(sample(pipe, guidance)), PROMPTS)
    assert bool(
        (guided_rewards > stock_rewards + 0.5).all()
    )  # rewards are of order 4; stochastic schedulers saw the same noise
    assert torch.equal(reward(decode(sample(pipe)), PROMPTS), stock_rewards)  # the pipeline has not changed


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler"])
def test_steps_of_two_evaluations_are_tilted_once(name):
    """The second evaluation forgets changes between the two, so the whole step's change comes after the second."""
    pipe = stable_diffusion(name)
    rises = {}
    for scheduler in (name, "EulerDiscreteScheduler"):
        pipe = stable_diffusion(scheduler)
        stock_rewards = reward(decode(sample(pipe, steps=20)), PROMPTS)
        with posterior_guidance(pipe, reward, strength=0.05, decode=decode) as guidance:
            rises[scheduler] = reward(decode(sample(pipe, guidance, steps=20)), PROMPTS) - stock_rewards
        assert len(guidance.rewards) == 20
    # The same tilt of the same ODE, discretised otherwise: 20 steps agree to some percent.
    assert relative(rises[name], rises["EulerDiscreteScheduler"]) < 0.15


def test_guidance_by_the_networks_own_product_is_that_of_dps():
    """The reference is the reward of the predicted clean sample, differentiated through the network by autograd."""
    pipe = stable_diffusion()
    options = {"prompt": PROMPTS, "guidance_scale": 3.0}
    denoiser = PipelineDenoiser(pipe, **options)

    def dps(state):
        leaf = state.sample.detach().requires_grad_()
        with torch.enable_grad():
            output = denoiser.model_output(leaf, state.timestep)
            level = state.level
            clean = (leaf - level.sigma.to(leaf) * output) / level.alpha.to(leaf)
            (gradient,) = torch.autograd.grad(reward(decode(clean), PROMPTS).sum(), leaf)
        return gradient / torch.linalg.vector_norm(gradient.flatten(1), dim=1)[:, None, None, None]

    stock_sample = sample(pipe)
    with posterior_guidance(pipe, reward, strength=0.3, decode=decode, estimator=AutodiffFisher(denoiser)) as guidance:
        guided_sample = sample(pipe, guidance)
    pipe.scheduler = tilted(diffusers.DDIMScheduler, 0.3, dps).from_config(dict(pipe.scheduler.config))
    expected = sample(pipe)
    assert relative(guided_sample - stock_sample, expected - stock_sample) < 1e-4  # the scheduler's table is float32
    difference = relative(guided_sample - stock_sample, sample_direct(0.3) - stock_sample)
    assert difference > 0.05  # the direction differs from that of the direct estimator


def sample_direct(strength):
    pipe = stable_diffusion()
    with posterior_guidance(pipe, reward, strength=strength, decode=decode, estimator=DirectFisher()) as guidance:
        return sample(pipe, guidance)


def test_finite_differences_share_one_call_between_the_samples_of_a_step():
    pipe = stable_diffusion()
    denoiser = PipelineDenoiser(pipe, guidance_scale=3.0, prompt=PROMPTS)
    estimator = FiniteDifferenceFisher(denoiser)
    with posterior_guidance(pipe, reward, decode=decode, estimator=estimator) as guidance:
        sample(pipe, guidance)
    assert denoiser.num_calls == 5 + 1  # at the first step it is also compared with the run


def test_history_belongs_to_the_last_run_and_is_exact():
    pipe = stable_diffusion()
    reward_prompts, reward_images = [], []

    def record_reward(images, prompts):
        reward_prompts.append(list(prompts))
        reward_images.append(images.detach())
        return reward(images, prompts)

    with posterior_guidance(pipe, record_reward, PROMPTS, decode=decode) as guidance:
        sample(pipe, guidance, steps=4)
        sample(pipe, guidance, steps=3)
    assert (
        reward_prompts == [PROMPTS] * 8
    )  # one call is the trial, which the second run of the same size does not repeat
    assert (
        [tuple(row.shape) for row in guidance.rewards]
        == [(2,)] * 3
        == [tuple(row.shape) for row in guidance.gradient_norms]
    )
    for row, images in zip(guidance.rewards, reward_images[5:], strict=True):
        assert torch.equal(row, reward(images, PROMPTS))
    assert bool((torch.stack(guidance.gradient_norms) > 0).all())


def test_autoencoder_of_the_pipeline_decodes_by_default():
    pipe = stable_diffusion(dtype=torch.float32)
    pipe.vae.requires_grad_(False)

    def brightness(images, prompts):
        assert images.shape == (2, 3, 16, 16)
        assert images.requires_grad
        assert bool(((images >= 0) & (images <= 1)).all())
        return images.mean((1, 2, 3))

    def images(callback=None):
        return pipe(
            PROMPTS, latents=noise(torch.float32), num_inference_steps=5, output_type="pt",
            callback_on_step_end=callback,
        ).images.mean((1, 2, 3))  # fmt: skip

    stock_values = images()
    with posterior_guidance(pipe, brightness, strength=0.3) as guidance:
        assert bool((images(guidance) > stock_values).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtype_of_the_latents_does_not_change(dtype):
    pipe = stable_diffusion(dtype=dtype)
    with posterior_guidance(pipe, reward, decode=decode) as guidance:
        assert sample(pipe, guidance, latents=noise(dtype)).dtype == dtype
    assert guidance.rewards[0].dtype == torch.float64


def test_pipeline_does_not_change_even_after_an_error():
    def failing_reward(images, prompts):
        raise ZeroDivisionError("no judge")

    pipe = stable_diffusion()
    sample(pipe)
    sample(pipe, steps=3)
    names, attributes = set(vars(pipe.scheduler)), set(vars(pipe))
    with (
        pytest.raises(ZeroDivisionError, match="no judge"),
        posterior_guidance(pipe, failing_reward, decode=decode) as guidance,
    ):
        sample(pipe, guidance)
    assert set(vars(pipe.scheduler)) == names
    assert set(vars(pipe)) == attributes
    assert pipe.scheduler.step.__func__ is diffusers.DDIMScheduler.step
    with posterior_guidance(pipe, reward, decode=decode):
        pass  # no run at all
    assert set(vars(pipe.scheduler)) == names
    assert set(vars(pipe)) == attributes


# What is refused


@pytest.mark.parametrize("strength", [0.0, -1.0, float("inf"), float("nan")])
def test_strength_must_be_positive(strength):
    with pytest.raises(InputError, match=r"`strength` is .*; allowed: (positive, such as 0\.2|a finite number)"):
        enter(stable_diffusion(), reward, strength=strength)


def enter(pipe, *args, **kwargs):
    with posterior_guidance(pipe, *args, **kwargs):
        pass


def test_pipelines_without_callback_or_autoencoder_are_refused():
    with pytest.raises(UnsupportedError, match=r"DDPMPipeline takes no `callback_on_step_end`, .* its initial noise"):
        enter(tiny.unconditional(), reward)
    pipe = stable_diffusion()
    pipe.vae = None
    with pytest.raises(UnsupportedError, match=r"StableDiffusionPipeline has no autoencoder `vae`; pass `decode`"):
        enter(pipe, reward)


def test_packed_latents_need_a_decoder():
    case = PIPELINES["Flux"]
    pipe = case.make()
    with (
        pytest.raises(UnsupportedError, match=r"FluxPipeline packs its latents to \(2, 16, 16\); pass `decode`"),
        posterior_guidance(pipe, reward) as guidance,
    ):
        case.sample(pipe, case.noise(), callback_on_step_end=guidance)


def test_run_without_the_callback_is_an_error():
    pipe = stable_diffusion()
    with (
        pytest.raises(TrajectoryError, match="ran without guidance: pass it `callback_on_step_end=guidance`"),
        posterior_guidance(pipe, reward, decode=decode),
    ):
        sample(pipe)


def test_error_says_that_the_block_was_not_entered():
    pipe = stable_diffusion()
    with pytest.raises(TrajectoryError, match=r"write `with posterior_guidance\(pipe, reward\) as guidance:`"):
        sample(pipe, posterior_guidance(pipe, reward, decode=decode))


def test_callback_outside_of_the_block_is_an_error():
    pipe = stable_diffusion()
    with posterior_guidance(pipe, reward, decode=decode) as guidance:
        sample(pipe, guidance)
    with pytest.raises(TrajectoryError, match=r"Call the pipeline inside the `with posterior_guidance"):
        sample(pipe, guidance)


@pytest.mark.parametrize("kind", ["is NaN", "has an infinite slope"])
def test_numbers_that_are_not_finite_later_end_the_guidance_and_not_the_run(kind, caplog):
    pipe, calls = stable_diffusion(), []

    def failing(images, prompts):
        calls.append(None)
        values = reward(images, prompts)
        if len(calls) < 4:  # one call is the trial
            return values
        return values * torch.nan if kind == "is NaN" else values + (values - values.detach()).sqrt()

    with posterior_guidance(pipe, failing, decode=decode) as guidance:
        images = sample(pipe, guidance)
        assert len(calls) == 4 and len(guidance.rewards) == 2
        assert guidance.status.startswith("stopped at guided step 2: The ")
        assert f"Guidance {guidance.status} The run goes on without it." in caplog.messages

    def stopping(pipe, index, timestep, arguments):
        return reference_guidance(pipe, index, timestep, arguments) if index < 2 else arguments

    with posterior_guidance(pipe, reward, decode=decode) as reference_guidance:
        expected = sample(pipe, stopping)
        assert reference_guidance.status == "completed"
    assert (torch.as_tensor(images) == torch.as_tensor(expected)).all()


def test_callback_without_latents_is_an_error():
    pipe = stable_diffusion()
    with (
        pytest.raises(InputError, match="The callback was given no latents"),
        posterior_guidance(pipe, reward, decode=decode) as guidance,
    ):
        sample(pipe, guidance, callback_on_step_end_tensor_inputs=["prompt_embeds"])


BAD = {
    "cut": (lambda images, prompts: images.detach().mean((1, 2, 3)), InputError, "is not differentiable"),
    "shape": (lambda images, prompts: images.mean(), InputError, r"returned shape \(\) for 2 images"),
    "nan": (lambda images, prompts: images.mean((1, 2, 3)) * torch.nan, NumericalError, "is not finite"),
    "slope": (
        lambda images, prompts: (images - images.detach()).sum((1, 2, 3)).sqrt(), NumericalError,
        "The gradient of the reward '<lambda>' with respect to the images of guided step 0 is not finite",
    ),
}  # fmt: skip


def record_calls(network):
    """Records the arguments of each call of the network from now on."""
    calls = []
    network.register_forward_pre_hook(lambda module, args: calls.append(args))
    return calls


@pytest.mark.parametrize("kind", BAD)
def test_bad_rewards_are_refused_before_any_evaluation(kind):
    bad_reward, error, message = BAD[kind]
    pipe = stable_diffusion()
    calls = record_calls(pipe.unet)
    with pytest.raises(error, match=message), posterior_guidance(pipe, bad_reward, decode=decode) as guidance:
        sample(pipe, guidance)
    assert len(calls) == (1 if kind == "slope" else 0)  # only the run's own images have infinite slopes


def test_trial_has_the_runs_number_and_size_and_decodes_nothing():
    """A reward with one target per sample passes; a reward that fits only the trial is refused."""
    pipe, reward_calls = stable_diffusion(dtype=torch.float32), []
    calls, decodings = record_calls(pipe.unet), record_calls(pipe.vae.decoder)
    targets = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))

    def per_sample(images, prompts):
        reward_calls.append((tuple(images.shape), list(prompts), len(calls), len(decodings)))
        return -((images - targets) ** 2).mean((1, 2, 3))

    with posterior_guidance(pipe, per_sample, "a b") as guidance:
        pipe("c", height=32, width=32, num_images_per_prompt=3, num_inference_steps=2, callback_on_step_end=guidance)
    shape = (3, 3, 32, 32)
    assert reward_calls == [(shape, ["a b"] * 3, 0, 0), (shape, ["a b"] * 3, 1, 1), (shape, ["a b"] * 3, 2, 2)]
    with pytest.raises(RuntimeError, match="must match"), posterior_guidance(pipe, per_sample) as guidance:
        pipe("c", num_inference_steps=2, callback_on_step_end=guidance)
    assert len(calls) == 2


def test_flow_pipelines_try_the_reward_too():
    pipe = PIPELINES["SD3"].make()
    calls, bad_reward = record_calls(pipe.transformer), BAD["cut"][0]
    with pytest.raises(InputError, match="not differentiable"), posterior_guidance(pipe, bad_reward) as guidance:
        pipe(num_inference_steps=2, guidance_scale=1.0, callback_on_step_end=guidance, **tiny.embeds(2))
    assert calls == []


def test_estimators_own_evaluations_are_no_runs_to_try_the_reward_for():
    pipe, shapes = stable_diffusion(), []

    def record_reward(images, prompts):
        shapes.append(tuple(images.shape))
        return reward(images, prompts)

    denoiser = PipelineDenoiser(pipe, guidance_scale=3.0, prompt=PROMPTS[0])

    def one_only(state, endpoint):
        """Evaluates the denoiser on another number of samples than the run's."""
        denoiser(state.sample[:1], state.timestep)
        return DirectFisher()(state)

    with posterior_guidance(pipe, record_reward, decode=decode, estimator=FunctionFisher(one_only)) as guidance:
        sample(pipe, guidance, steps=2)
    assert denoiser.num_calls == 2
    assert shapes == [(2, 3, 8, 8)] * 3


def test_prompts_of_the_wrong_number_are_refused_at_once():
    pipe = stable_diffusion()
    calls = record_calls(pipe.unet)
    with (
        pytest.raises(InputError, match="3 `prompts` were given for 2 samples; give one, or one each"),
        posterior_guidance(pipe, reward, ["a", "b", "c"], decode=decode) as guidance,
    ):
        sample(pipe, guidance)
    assert calls == []


@pytest.mark.parametrize(("prompts", "expected"), [(None, ["", ""]), ("a", ["a", "a"]), (PROMPTS, PROMPTS)])
def test_prompts_that_the_reward_gets(prompts, expected):
    pipe, reward_prompts = stable_diffusion(), []

    def record_reward(images, image_prompts):
        reward_prompts.append(list(image_prompts))
        return reward(images, image_prompts)

    with posterior_guidance(pipe, record_reward, prompts, decode=decode) as guidance:
        sample(pipe, guidance, steps=1)
    assert reward_prompts == [expected] * 2


def test_estimators_of_the_runs_end_are_refused():
    pipe = stable_diffusion()
    with (
        pytest.raises(InputError, match="EndpointFisher needs the clean end of the run"),
        posterior_guidance(pipe, reward, decode=decode, estimator=EndpointFisher()) as guidance,
    ):
        sample(pipe, guidance)


def test_estimators_of_whole_runs_are_refused():
    pipe = stable_diffusion()
    with (
        pytest.raises(UnsupportedError, match="OneStepFisher takes a whole run, which a single step is not"),
        posterior_guidance(pipe, reward, decode=decode, estimator=OneStepFisher()),
    ):
        pass


def test_error_for_images_that_are_not_finite_names_the_step():
    pipe = stable_diffusion()
    with (
        pytest.raises(NumericalError, match="The images of guided step 0 are not finite"),
        posterior_guidance(pipe, reward, decode=lambda latents: latents[:, :3] / 0) as guidance,
    ):
        sample(pipe, guidance)
