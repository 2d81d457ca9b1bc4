"""A pipeline as a function: it gives exactly the pipeline's own evaluation, and the pipeline does not change."""

import copy

import diffusers
import pytest
import tiny
import torch
from pipeline_cases import PIPELINES

from diffusers_fisher import InputError, NumericalError, PipelineDenoiser, UnsupportedError, noise_level


def evaluations(case, pipe):
    """Returns (model input, timestep, model output) of each step of the pipeline's own run."""
    records, scheduler = [], pipe.scheduler
    step = type(scheduler).step

    def recording(model_output, t, sample, *args, **kwargs):
        model_input = scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample
        records.append((model_input, t, model_output))
        return step(scheduler, model_output, t, sample, *args, **kwargs)

    scheduler.step = recording
    case.sample(pipe, case.noise())
    del scheduler.step
    return records


def denoiser_of(case, pipe, **changes):
    return PipelineDenoiser(pipe, guidance_scale=case.guidance_scale, **{**case.arguments(), **changes})


@pytest.mark.parametrize("name", PIPELINES)
def test_output_is_the_pipelines_own_evaluation_bit_for_bit(name):
    case = PIPELINES[name]
    pipe = case.make()
    records = evaluations(case, pipe)
    denoiser = denoiser_of(case, pipe)
    assert len(records) == 4
    for x, t, output in records:
        assert torch.equal(denoiser.model_output(x, t), output)
    assert denoiser.num_calls == 4


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_output_is_the_networks_own_with_classifier_free_guidance(guidance_scale):
    """The reference calls the network directly, without the pipeline's loop."""
    pipe = tiny.stable_diffusion()
    x = PIPELINES["SD"].noise()
    denoiser = PipelineDenoiser(pipe, prompt=["a b", "c"], negative_prompt=["", "d"], guidance_scale=guidance_scale)
    with torch.no_grad():
        embeds, negative = pipe.encode_prompt(["a b", "c"], "cpu", 1, guidance_scale > 1, negative_prompt=["", "d"])
        if guidance_scale > 1:
            predictions = pipe.unet(torch.cat([x, x]), 500, torch.cat([negative, embeds])).sample
            unconditional, conditional = predictions.chunk(2)
            expected = unconditional + guidance_scale * (conditional - unconditional)
        else:
            expected = pipe.unet(x, 500, embeds).sample
    assert torch.equal(denoiser.model_output(x, 500), expected)


def snapshot(pipe):
    """Returns everything that a caller can see of a pipeline; objects are compared by identity."""
    components = {name: id(value) for name, value in vars(pipe).items()}
    modules = {name: module for name, module in pipe.components.items() if isinstance(module, torch.nn.Module)}
    hooks = {name: len(module._forward_hooks) for name, module in modules.items()}
    return components, dict(pipe.config), dict(pipe.scheduler.config), dict(vars(pipe.scheduler)), hooks


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("after_a_run", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "enable_grad"])
def test_pipeline_does_not_change(name, after_a_run, grad):
    case = PIPELINES[name]
    pipe = case.make()
    if after_a_run:
        case.sample(pipe, case.noise())
    denoiser, before = denoiser_of(case, pipe), snapshot(pipe)
    with torch.set_grad_enabled(grad):
        denoiser(case.noise(), 500)
        denoiser(case.noise().requires_grad_(), 500)
        assert torch.is_grad_enabled() is grad
    after = snapshot(pipe)
    assert before[:3] == after[:3]
    assert before[3].keys() == after[3].keys()
    assert all(value is after[3][key] for key, value in before[3].items())
    assert before[4] == after[4]


@pytest.mark.parametrize("misfit", ["channels", "prompts", "embeddings"])
def test_pipeline_does_not_change_when_the_call_raises(misfit):
    pipe = tiny.stable_diffusion()
    prompts, x = ["a b", "c"], PIPELINES["SD"].noise()
    if misfit == "channels":
        x = x[:, :3]
    elif misfit == "prompts":
        prompts = ["a", "b", "c"]
    # Embeddings of another width raise in the network.
    condition = {"prompt_embeds": torch.zeros(2, 8, 15)} if misfit == "embeddings" else {"prompt": prompts}
    denoiser, before = PipelineDenoiser(pipe, **condition), snapshot(pipe)
    with pytest.raises(RuntimeError if misfit == "embeddings" else InputError):
        denoiser(x, 500)
    assert snapshot(pipe)[:3] == before[:3]
    assert torch.is_grad_enabled()
    assert denoiser.num_calls == 0
    assert type(pipe.scheduler) is diffusers.DDIMScheduler


@pytest.mark.parametrize(("guidance_scale", "encodings"), [(1.0, 1), (4.0, 2)])
def test_prompts_are_encoded_once(guidance_scale, encodings):
    pipe, calls = tiny.stable_diffusion(), []
    pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    denoiser = PipelineDenoiser(pipe, prompt=["a", "b"], guidance_scale=guidance_scale)
    assert calls == []
    x = PIPELINES["SD"].noise()
    for t in (100, 500, 900):
        denoiser(x, t)
    denoiser(x.requires_grad_(), 500)
    assert len(calls) == encodings
    assert denoiser.num_calls == 4
    pipe(["a", "b"], num_inference_steps=1, output_type="latent")  # the pipeline itself encodes as before
    assert len(calls) > encodings


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("cls", [diffusers.DDIMScheduler, diffusers.EulerDiscreteScheduler])
def test_state_is_in_the_models_own_coordinates(cls, kind):
    """This also holds for k-diffusion style schedulers, whose samples are scaled before the model gets them."""
    if (cls, kind) == (diffusers.EulerDiscreteScheduler, "sample"):
        kind = "epsilon"
    pipe = tiny.stable_diffusion(scheduler=cls.from_config(tiny.scheduler().config, prediction_type=kind))
    denoiser, x = PipelineDenoiser(pipe, prompt=["a", "b"]), PIPELINES["SD"].noise()
    state = denoiser.state(x, 300)
    level = noise_level(tiny.scheduler(), 300)  # variance preserving
    assert float(state.level.alpha) == pytest.approx(float(level.alpha), rel=1e-12)
    assert float(state.level.sigma) == pytest.approx(float(level.sigma), rel=1e-12)
    assert state.prediction.kind == kind
    assert torch.equal(state.model_output, denoiser.model_output(x, 300))
    assert torch.equal(state.epsilon, denoiser(x, 300))
    rebuilt = level.alpha.float() * state.pred_original_sample + level.sigma.float() * state.epsilon
    torch.testing.assert_close(rebuilt, x, rtol=1e-5, atol=1e-5)  # float32 roundings


def test_fractional_timesteps_reach_the_network():
    pipe, x = tiny.stable_diffusion(), PIPELINES["SD"].noise()
    denoiser = PipelineDenoiser(pipe, prompt=["a", "b"])
    with torch.no_grad():
        embeds = pipe.encode_prompt(["a", "b"], "cpu", 1, False)[0]
        expected = pipe.unet(x, torch.tensor(500.5), embeds).sample
    assert torch.equal(denoiser.model_output(x, 500.5), expected)
    assert torch.equal(denoiser.model_output(x, 500.0), denoiser.model_output(x, torch.tensor(500)))
    assert not torch.equal(expected, denoiser.model_output(x, 500))


@pytest.mark.parametrize("name", ["SD guided", "SDXL", "SD3", "Flux"])
def test_graph_is_built_only_where_the_sample_requires_one(name):
    case = PIPELINES[name]
    denoiser, x, weight = denoiser_of(case, case.make()), case.noise(), case.noise().flip(0)
    assert not denoiser(x, 500).requires_grad
    leaf = x.clone().requires_grad_()
    with torch.no_grad():
        assert not denoiser(leaf, 500).requires_grad
    output = denoiser.model_output(leaf, 500)
    assert torch.equal(output.detach(), denoiser.model_output(x, 500))
    (gradient,) = torch.autograd.grad((weight * output).sum(), leaf)
    direction, step = case.noise().roll(1, 1), 1e-2
    forward, backward = (denoiser.model_output(x + sign * step * direction, 500) for sign in (1, -1))
    slope = float((weight * (forward - backward)).double().sum()) / (2 * step)
    # Central differences in float32: step^2 of truncation, 1e-7/step of rounding.
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_result_is_in_the_samples_dtype_and_the_network_in_its_own(dtype):
    pipe, x = tiny.stable_diffusion(), PIPELINES["SD"].noise()
    pipe.to(dtype=dtype)
    denoiser, dtypes = PipelineDenoiser(pipe, prompt=["a", "b"]), []
    pipe.unet.register_forward_pre_hook(lambda module, inputs: dtypes.append(inputs[0].dtype))
    for kind in (torch.float32, torch.float64):
        assert denoiser(x.to(kind), 500).dtype is kind
    assert dtypes == [dtype, dtype]


def test_height_and_width_follow_the_latents():
    pipe = tiny.stable_diffusion()
    x = torch.randn(1, 4, 4, 12, generator=torch.Generator().manual_seed(0))
    assert PipelineDenoiser(pipe, prompt="a")(x, 500).shape == x.shape


def test_fisher_scheduler_and_stock_scheduler_give_the_same_denoiser():
    from diffusers_fisher import FisherDDIMScheduler

    stock, ours, x = tiny.stable_diffusion(), tiny.stable_diffusion(), PIPELINES["SD"].noise()
    ours.scheduler = FisherDDIMScheduler.from_config(ours.scheduler.config)
    outputs = [PipelineDenoiser(pipe, prompt=["a", "b"])(x, 500) for pipe in (stock, ours)]
    assert torch.equal(*outputs)


def test_unknown_argument_is_refused():
    with pytest.raises(InputError, match=r"StableDiffusionPipeline does not take \['promt'\]; it takes .*'prompt'"):
        PipelineDenoiser(tiny.stable_diffusion(), promt="a")


def test_pipeline_without_latents_is_refused():
    pipe = diffusers.RePaintPipeline(unet=tiny.unet(), scheduler=diffusers.RePaintScheduler())
    with pytest.raises(UnsupportedError, match=r"RePaintPipeline takes no `latents`.*such as StableDiffusionPipeline"):
        PipelineDenoiser(pipe)


def test_unknown_scheduler_is_refused():
    pipe = tiny.stable_diffusion(scheduler=diffusers.CMStochasticIterativeScheduler())
    with pytest.raises(UnsupportedError, match="Noise levels of CMStochasticIterativeScheduler are not known"):
        PipelineDenoiser(pipe, prompt="a")


def test_errors_of_the_pipeline_pass_through_unchanged():
    with pytest.raises(ValueError, match="Provide either `prompt` or `prompt_embeds`"):
        PipelineDenoiser(tiny.stable_diffusion())(PIPELINES["SD"].noise(), 500)


def test_output_that_is_not_finite_is_refused():
    pipe = tiny.stable_diffusion()
    torch.nn.init.constant_(pipe.unet.conv_out.bias, float("nan"))
    with pytest.raises(
        NumericalError, match=r"output at timestep 500 is not finite, with weights in torch.float32 and inputs from -"
    ):
        PipelineDenoiser(pipe, prompt=["a", "b"])(PIPELINES["SD"].noise(), 500)


@pytest.mark.parametrize("name", PIPELINES)
def test_one_timestep_per_sample(name):
    """Each row equals that of the whole batch at the row's timestep, up to the rounding of other kernels (1e-5)."""
    case = PIPELINES[name]
    pipe = case.make()
    x, timesteps = case.noise(), torch.tensor([700.0, 30.0])
    denoiser = PipelineDenoiser(pipe, guidance_scale=1.0, **case.arguments())
    batch = denoiser.model_output(x, timesteps)
    for row, timestep in enumerate(timesteps):
        assert torch.allclose(batch[row], denoiser.model_output(x, timestep)[row], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(batch[0], denoiser.model_output(x, timesteps[1])[0], atol=1e-4)
    state = denoiser.state(x, timesteps)
    assert state.level.sigma.shape == (2,) and state.level.sigma[0] > state.level.sigma[1]


def test_timesteps_that_do_not_fit_the_samples_are_refused():
    denoiser = PipelineDenoiser(tiny.stable_diffusion(), prompt=["a b", "c"])
    x = PIPELINES["SD"].noise()
    with pytest.raises(InputError, match="3 timesteps were given for 2 samples"):
        denoiser(x, torch.tensor([1, 2, 3]))
    guided_denoiser = PipelineDenoiser(tiny.stable_diffusion(), guidance_scale=4.0, prompt=["a b", "c"])
    with pytest.raises(UnsupportedError, match="twice the batch"):
        guided_denoiser(x, torch.tensor([1, 2]))


def test_denoiser_can_be_copied_deeply():
    """Some stock calls copy their scheduler deeply, and with it the estimator of a recorded run and its denoiser."""
    denoiser, x = PipelineDenoiser(tiny.stable_diffusion(), prompt=["a", "b"]), PIPELINES["SD"].noise()
    output = denoiser(x, 500)
    assert torch.equal(copy.deepcopy(denoiser)(x, 500), output)
