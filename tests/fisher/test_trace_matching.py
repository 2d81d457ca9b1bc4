"""`TraceMatchingFisher` as an operator, in likelihoods and in differentiable runs, on data for which it is exact."""

import dataclasses

import diffusers
import pytest
import tiny
import torch
from cases import STABLE_DIFFUSION, relative
from trace_cases import IMAGE, TOKENS, GaussianData, GaussianDenoiser, disturb

from diffusers_fisher import (
    AutodiffFisher,
    Covariance,
    DenoisingState,
    ExactFisher,
    FisherDDIMScheduler,
    FisherTraceModel,
    GaussianFisher,
    InputError,
    NoiseLevel,
    PipelineDenoiser,
    StableDiffusionFisherPipeline,
    TraceCorrectedFisher,
    TraceMatchingFisher,
)
from diffusers_fisher.backbones import backbone_of
from diffusers_fisher.likelihood import Integration, integrate_log_likelihood, reference_log_likelihood
from diffusers_fisher.noise import Prediction
from diffusers_fisher.studies.transport import denoiser_field
from diffusers_fisher.testing import MixtureOracle, OracleDenoiser, check_fisher

KINDS = {
    "diagonal": (IMAGE, "pixel", {"output": "diagonal"}),
    "diagonal in DCT": (IMAGE, "dct", {"output": "diagonal"}),
    "diagonal of tokens": (TOKENS, "pixel", {"output": "diagonal"}),
    "trace": (IMAGE, "pixel", {}),
    "second moment": (IMAGE, "pixel", {"target": "norm"}),
}
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def vp(cls=diffusers.DDIMScheduler, **changes):
    return cls(**{**STABLE_DIFFUSION, "clip_sample": False, "set_alpha_to_one": False, **changes})


def isotropic(shape=IMAGE, basis="pixel"):
    data = GaussianData(shape, basis)
    data.variance.fill_(0.3)
    return data


def state_of(data, prediction="epsilon", timestep=500.0, count=2, dtype=torch.float64):
    denoiser = GaussianDenoiser(data, vp(prediction_type=prediction))
    level = denoiser.level(timestep)
    noise = torch.randn(count, *data.shape, generator=seeded(1), dtype=torch.float64)
    return denoiser.state((level.alpha * data.sample(count, seeded()) + level.sigma * noise).to(dtype), timestep)


# The operator


@pytest.mark.parametrize("timestep", [50.0, 500.0, 900.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_contract_and_agreement_with_the_exact_fisher(kind, prediction, timestep):
    shape, basis, settings = KINDS[kind]
    diagonal = settings.get("output") == "diagonal"
    data = GaussianData(shape, basis) if diagonal else isotropic(shape, basis)  # multiples of the identity else
    state = state_of(data, prediction, timestep)
    estimator = TraceMatchingFisher(data.model(**settings))
    exact = ExactFisher(data.distribution)(state)
    # The model's logits are float32; a second moment is multiplied by the signal-to-noise ratio, here at most 20.
    tolerance = 1e-4 if kind == "second moment" else 1e-5
    check_fisher(estimator(state), exact, tolerance, estimator=estimator, rounding=1e-5, num_estimates=20)


def test_products_and_traces_need_no_denoiser_call():
    for shape, basis, settings in KINDS.values():
        operator = TraceMatchingFisher(disturb(GaussianData(shape, basis).model(**settings), 0.1))(
            state_of(GaussianData(shape, basis))
        )
        for estimate in (operator.trace(), operator.diagonal()):
            assert estimate.num_probes == estimate.num_denoiser_calls == 0
            assert estimate.value.dtype is torch.float64
            assert bool((estimate.standard_error == 0).all())
        assert relative(operator.diagonal().value.flatten(1).sum(1), operator.trace().value) < 1e-12


def test_trace_is_that_of_r():
    data = GaussianData()
    state = state_of(data)
    model = disturb(data.model())
    expected = 32 * (1 - model.unexplained_noise_fraction(state)) / state.level.sigma**2
    assert relative(TraceMatchingFisher(model)(state).trace().value, expected) < 1e-12


def test_norm_target_gives_the_trace_by_the_paper_s_formula():
    data = GaussianData()
    state, model = state_of(data), disturb(data.model(target="norm"))
    alpha, sigma, d = state.level.alpha, state.level.sigma, 32
    moment = model.evaluate(state).second_moment.double()
    clean = state.pred_original_sample.square().flatten(1).sum(1)
    expected = d / sigma**2 - alpha**2 / sigma**4 * (d * moment - clean)
    assert relative(TraceMatchingFisher(model)(state).trace().value, expected) < 1e-12


def test_solve_and_damping_are_closed():
    data = GaussianData(basis="dct")
    operator = TraceMatchingFisher(data.model(output="diagonal"))(state_of(data))
    v = torch.randn(2, *IMAGE, generator=seeded(3), dtype=torch.float64)
    assert relative(operator.matvec(operator.solve(v)), v) < 1e-10
    damped = operator.damped(0.7)
    assert relative(damped.matvec(damped.solve(v)), v) < 1e-10


def test_one_level_per_sample():
    data = GaussianData()
    denoiser = GaussianDenoiser(data, vp())
    timesteps = torch.tensor([100.0, 500.0, 900.0])
    x = torch.randn(3, *IMAGE, generator=seeded(), dtype=torch.float64)
    state = denoiser.state(x, timesteps)
    for output in ("trace", "diagonal"):
        trace = TraceMatchingFisher(data.model(output=output))(state).trace().value
        assert torch.allclose(trace, 32 * (1 - data.r(state.level, 3)) / state.level.sigma**2, rtol=1e-5)


def test_pure_noise_has_the_data_s_covariance():
    """At alpha = 0 the posterior is the prior; the model sees log(sigma/alpha) = 20 there."""
    data = isotropic()
    x = torch.randn(2, *IMAGE, generator=seeded(), dtype=torch.float64)
    level = NoiseLevel(torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64))
    for settings in ({}, {"output": "diagonal"}):
        operator = TraceMatchingFisher(data.model(**settings))(
            DenoisingState(x, 0 * x, level, Prediction("v_prediction"))
        )
        assert relative(operator.covariance(x), 0.3 * x) < 1e-5
        assert relative(operator.matvec(x), x) < 1e-12
        assert float(operator.original_jacobian(x).abs().max()) < 1e-7


@pytest.mark.parametrize("basis", ["pixel", "dct"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_products_have_the_vector_s_dtype(dtype, basis):
    data = GaussianData(basis=basis)
    state = state_of(data, dtype=torch.float32)
    model = data.model(output="diagonal").to(dtype)
    v = torch.randn(2, *IMAGE, generator=seeded(3))
    product = TraceMatchingFisher(model)(state).matvec(v.to(dtype))
    assert product.dtype is dtype
    exact = ExactFisher(data.distribution)(state).matvec(v)
    assert relative(product, exact) < {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 5e-2}[dtype]


# In use


def test_likelihood_is_the_exact_one_at_the_cost_of_the_ode_alone():
    data = GaussianData()
    samples = data.sample(3, seeded(2))
    denoiser, exact_denoiser = (GaussianDenoiser(data, vp()) for _ in range(2))
    options = {"num_steps": 10, "num_probes": None, "trace_checks": 0}
    out = integrate_log_likelihood(denoiser, samples, TraceMatchingFisher(data.model()), Integration(**options))
    reference = integrate_log_likelihood(
        exact_denoiser, samples, AutodiffFisher(exact_denoiser), Integration(**options)
    )
    assert torch.allclose(out.log_prob, reference.log_prob, atol=1e-3)  # nats; float32 logits in 32 dimensions
    assert out.num_denoiser_calls == denoiser.num_calls == 11
    assert bool((out.standard_error == 0).all())
    assert out.trace == "TraceMatchingFisher (target residual), no probes"


@pytest.mark.parametrize("sampler", ["DDIM", "DPM++", "Euler"])
def test_gradient_through_a_run_is_the_exact_one_where_the_model_is(sampler):
    from diffusers_fisher import FisherDPMSolverMultistepScheduler, FisherEulerDiscreteScheduler

    kind = {
        "DDIM": FisherDDIMScheduler, "DPM++": FisherDPMSolverMultistepScheduler, "Euler": FisherEulerDiscreteScheduler,
    }[sampler]  # fmt: skip
    data = GaussianData(basis="dct")
    noise = torch.randn(2, *IMAGE, generator=seeded(4), dtype=torch.float64)
    gradients = []
    for make in (lambda network: TraceMatchingFisher(data.model(output="diagonal")), AutodiffFisher):
        scheduler = kind.from_config(vp().config)
        network = GaussianDenoiser(data, scheduler)
        with scheduler.differentiable(make(network)) as trajectory, torch.no_grad():
            scheduler.set_timesteps(8)
            x = noise * scheduler.init_noise_sigma
            for t in scheduler.timesteps:
                output = network.model_output(scheduler.scale_model_input(x, t), t)
                x = scheduler.step(output, t, x).prev_sample
        weights = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view(x.shape)
        gradients.append(trajectory.gradient((x * weights).sum()))
    # Karras-free schedulers round their sigmas to float32, and the logits are float32.
    assert relative(*gradients) < 1e-3


@pytest.fixture(scope="module")
def pipe():
    return tiny.one_channel(StableDiffusionFisherPipeline)


@pytest.fixture(scope="module")
def model(pipe):
    trace_model = FisherTraceModel(in_channels=1, block_out_channels=(4, 8))
    trace_model.set_fingerprint(pipe)
    return trace_model


def test_pipeline_s_likelihood_takes_it(pipe, model):
    latents = torch.randn(2, 1, 8, 8, generator=seeded())
    out = pipe.log_likelihood(
        latents=latents, prompt="a", num_inference_steps=4, estimator=TraceMatchingFisher(model), num_probes=None
    )
    assert bool(torch.isfinite(out.log_prob).all())
    assert out.num_denoiser_calls == 5 + 4  # four of the five levels are checked
    assert bool(((out.unexplained_noise_fraction > 0) & (out.unexplained_noise_fraction < 1)).all())


def test_pipeline_s_guidance_takes_it(pipe, model):
    out = pipe.guide(
        "a", lambda images, prompts: images.mean((1, 2, 3)), estimator=TraceMatchingFisher(model), height=16, width=16,
        num_inference_steps=3, num_guidance_steps=1, guidance_scale=1.0, generator=seeded(), output_type="pt",
    )  # fmt: skip
    assert float(out.gradient_norms.min()) > 0


def test_pipeline_of_another_checkpoint_is_refused(model):
    other = tiny.one_channel(
        StableDiffusionFisherPipeline, unet=tiny.unet(in_channels=1, out_channels=1, sample_size=4, norm_num_groups=2)
    )
    latents = torch.randn(1, 1, 8, 8, generator=seeded())
    options = {"latents": latents, "num_inference_steps": 2, "num_probes": None}
    with pytest.raises(
        InputError, match=r"was trained for another denoiser\. What differs: configuration of the denois"
    ):
        other.log_likelihood(estimator=TraceMatchingFisher(model), **options)
    out = other.log_likelihood(estimator=TraceMatchingFisher(model, check=False), **options)
    assert bool(torch.isfinite(out.log_prob).all())


CORE = {
    "log_likelihood": lambda denoiser, x, estimator: integrate_log_likelihood(
        denoiser, x, estimator, Integration(2, None)
    ),
    "denoiser_field": lambda denoiser, x, estimator: denoiser_field(denoiser, estimator),
}


def combine(estimator):
    return TraceCorrectedFisher(GaussianFisher(Covariance.isotropic(0.5, (1, 4, 4))), estimator)


@pytest.mark.parametrize("wrap", [lambda estimator: estimator, combine], ids=["plain", "combined"])
@pytest.mark.parametrize("name", CORE)
def test_denoisers_of_another_checkpoint_are_refused_without_a_pipeline_of_ours(name, wrap, pipe, model):
    x = torch.randn(1, 1, 4, 4, generator=seeded())
    stock = tiny.one_channel()
    other = tiny.one_channel()
    with torch.no_grad():
        for parameter in other.unet.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=seeded(1))
    estimator = wrap(TraceMatchingFisher(model))
    CORE[name](PipelineDenoiser(stock, prompt="a"), x, estimator)
    foreign = PipelineDenoiser(other, prompt="a")
    with pytest.raises(InputError, match=r"trained for another denoiser\. What differs: weights of the denoiser"):
        CORE[name](foreign, x, estimator)
    assert foreign.num_calls == 0
    with pytest.raises(InputError, match="trained for another denoiser"):
        reference_log_likelihood(foreign, x, estimator)
    CORE[name](foreign, x, wrap(TraceMatchingFisher(model, check=False)))


def test_denoisers_without_a_network_are_known_by_their_schedule():
    data, model = GaussianData(), GaussianData().model()
    model.set_fingerprint(GaussianDenoiser(data, vp()))
    samples = data.sample(2, seeded(2))
    out = integrate_log_likelihood(
        GaussianDenoiser(data, vp()), samples, TraceMatchingFisher(model), Integration(4, None)
    )
    assert bool(torch.isfinite(out.log_prob).all())
    with pytest.raises(InputError, match="What differs: schedule"):
        integrate_log_likelihood(
            GaussianDenoiser(data, vp(beta_end=0.02)), samples, TraceMatchingFisher(model), Integration(4, None)
        )
    model.set_fingerprint(tiny.stable_diffusion(scheduler=vp(steps_offset=1)))  # an oracle has no network
    identity = torch.eye(samples[0].numel(), dtype=torch.float64)
    oracle = OracleDenoiser(MixtureOracle(torch.zeros(1, len(identity)).double(), identity[None]), vp())
    assert bool(
        torch.isfinite(
            integrate_log_likelihood(oracle, samples, TraceMatchingFisher(model), Integration(4, None)).log_prob
        ).all()
    )


def test_estimators_get_the_denoiser_of_a_likelihood_and_of_a_field():
    data = GaussianData()
    denoiser, samples = GaussianDenoiser(data, vp()), data.sample(2, seeded(2))
    outs = [
        integrate_log_likelihood(denoiser, samples, AutodiffFisher(argument, forward_mode=True), Integration(4, None))
        for argument in (None, denoiser)
    ]
    assert torch.equal(outs[0].log_prob, outs[1].log_prob)
    level, v = denoiser.level(500.0), torch.ones(1, 2, *IMAGE, dtype=torch.float64)
    fields = [denoiser_field(denoiser, AutodiffFisher(argument, forward_mode=True)) for argument in (None, denoiser)]
    products = [field(samples, level)[1](v) for field in fields]
    assert torch.equal(*products)


def test_pooled_vectors_are_those_of_our_pipeline_s_conditions(pipe):
    pooled_model = FisherTraceModel(in_channels=1, block_out_channels=(4, 8), pooled_channels=16)
    disturb(pooled_model)
    x = torch.randn(1, 1, 4, 4, generator=seeded())
    denoiser = PipelineDenoiser(pipe, prompt="a")
    out = integrate_log_likelihood(denoiser, x, TraceMatchingFisher(pooled_model), Integration(2, None))
    estimator = TraceMatchingFisher(pooled_model, pooled=backbone_of(pipe).pooled({"prompt": ["a"]}))
    assert torch.equal(out.log_prob, integrate_log_likelihood(denoiser, x, estimator, Integration(2, None)).log_prob)
    stock = PipelineDenoiser(diffusers.StableDiffusionPipeline(**pipe.components), prompt="a")
    stock_out = integrate_log_likelihood(stock, x, TraceMatchingFisher(pooled_model), Integration(2, None))
    assert torch.equal(stock_out.log_prob, out.log_prob)


def test_pooled_vectors_reach_the_model():
    data = GaussianData()
    model = disturb(data.model(pooled_channels=3))
    state = state_of(data)
    pooled = torch.randn(2, 3, generator=seeded())
    traces = [TraceMatchingFisher(model, pooled=value)(state).trace().value for value in (pooled, pooled.flip(0))]
    assert not torch.equal(*traces)
    single_trace = TraceMatchingFisher(model, pooled=pooled[:1])(state).trace().value
    assert single_trace[0] == pytest.approx(float(traces[0][0]))


def test_description_names_the_target_of_the_model():
    assert TraceMatchingFisher(GaussianData().model(target="jacobian")).description == (
        "TraceMatchingFisher (target jacobian)"
    )


# Bad input


def test_objects_that_are_no_trace_models_are_refused():
    with pytest.raises(InputError, match="takes a FisherTraceModel, got Linear"):
        TraceMatchingFisher(torch.nn.Linear(1, 1))


def test_pooled_vectors_that_are_missing_are_refused():
    data = GaussianData()
    with pytest.raises(InputError, match=r"`pooled` has shape None; allowed: \(2, 3\)"):
        TraceMatchingFisher(data.model(pooled_channels=3))(state_of(data)).trace()


def test_damaged_models_are_refused():
    data = GaussianData()
    model = data.model()
    with torch.no_grad():
        model.head.last.bias.fill_(float("nan"))
    with pytest.raises(InputError, match="trace model's output is not finite"):
        TraceMatchingFisher(model)(state_of(data)).trace()


def test_state_without_noise_has_products_but_no_trace():
    data = GaussianData()
    state = state_of(data)
    clean = dataclasses.replace(state, level=NoiseLevel(torch.ones((), dtype=torch.float64), 0 * state.level.sigma))
    operator = TraceMatchingFisher(data.model())(clean)
    with pytest.raises(InputError, match="sigma = 0"):
        operator.trace()
    assert float(operator.covariance(state.sample).abs().max()) == 0.0
