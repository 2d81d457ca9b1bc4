"""The base class of estimators: its service to composites of users, and the errors of the public functions."""

import dataclasses

import diffusers
import pytest
import tiny
import torch
from cases import Network, latents
from trace_cases import GaussianData, GaussianDenoiser

from diffusers_fisher import (
    AutodiffFisher,
    Covariance,
    DiracMixture,
    DirectFisher,
    EndpointFisher,
    ExactFisher,
    FiniteDifferenceFisher,
    FisherDDIMScheduler,
    FisherEstimator,
    GaussianFisher,
    InputError,
    OneStepFisher,
    PipelineDenoiser,
    StableDiffusionFisherPipeline,
    TraceCorrectedFisher,
    TraceMatchingFisher,
    posterior_guidance,
)
from diffusers_fisher.fisher.estimator import check_estimator
from diffusers_fisher.likelihood import Integration, integrate_log_likelihood, reference_log_likelihood
from diffusers_fisher.studies.transport import denoiser_field

from .problems import state_of_network

PROMPTS = ["a b", "c"]


class AverageFisher(FisherEstimator):
    def __init__(self, first, second):
        self.first, self.second = first, second

    @property
    def components(self):
        return {"first": self.first, "second": self.second}

    def __call__(self, state, endpoint=None):
        return 0.5 * (self.first(state, endpoint) + self.second(state, endpoint))


@dataclasses.dataclass(frozen=True)
class FrozenFisher(FisherEstimator):
    inner: FisherEstimator

    @property
    def components(self):
        return {"inner": self.inner}

    def __call__(self, state, endpoint=None):
        return self.inner(state, endpoint)


def composite(denoiser=None):
    return AverageFisher(FrozenFisher(FiniteDifferenceFisher(denoiser)), DirectFisher())


def reward(images, prompts):
    return images[..., :8].mean((1, 2, 3))


@pytest.fixture(scope="module")
def pipe():
    return tiny.stable_diffusion(StableDiffusionFisherPipeline)


def seeded():
    return torch.Generator().manual_seed(0)


# A user's composite


def test_a_users_composite_gets_the_denoiser_of_guide(pipe):
    options = {"num_guidance_steps": 1, "num_inference_steps": 3, "guidance_scale": 3.0}
    denoiser = PipelineDenoiser(pipe, 3.0, prompt=PROMPTS)
    out, expected = (
        pipe.guide(PROMPTS, reward, estimator=estimator, generator=seeded(), **options)
        for estimator in (composite(), composite(denoiser))
    )
    assert torch.equal(out.gradient_norms, expected.gradient_norms)
    assert out.num_denoiser_calls == expected.num_denoiser_calls == 2 * 3 + 3 + 3  # products, comparisons


def test_a_users_composite_gets_the_denoiser_of_a_likelihood(pipe):
    x = 0.5 * torch.randn(2, 4, 8, 8, generator=seeded())
    estimator = composite()
    out, expected = (
        pipe.log_likelihood(None, PROMPTS, latents=x, estimator=each, num_inference_steps=3, generator=seeded())
        for each in (estimator, composite(PipelineDenoiser(pipe, prompt=PROMPTS)))
    )
    assert torch.equal(out.log_prob, expected.log_prob)
    assert out.trace == "AverageFisher, 1 probe per level"
    assert estimator.lacks_denoiser  # The user's object has not changed.


def test_a_users_composite_gets_the_denoiser_of_a_guided_run():
    pipe = tiny.stable_diffusion()

    def images(estimator, prompts, **options):
        with posterior_guidance(pipe, reward, prompts, estimator=estimator, **options) as guidance:
            return pipe(
                PROMPTS, guidance_scale=3.0, num_inference_steps=3, generator=seeded(), output_type="latent",
                callback_on_step_end=guidance,
            ).images  # fmt: skip

    denoiser = PipelineDenoiser(pipe, 3.0, prompt=PROMPTS)
    expected = images(composite(denoiser), None)
    assert torch.equal(images(composite(), None, denoiser=denoiser), expected)
    assert torch.equal(images(composite(), PROMPTS), expected)
    assert not torch.equal(images(DirectFisher(), PROMPTS), expected)
    with pytest.raises(
        InputError, match=r"AverageFisher needs a denoiser, and no `prompts` are known .* Pass `prompt"
    ):
        images(composite(), None)
    with pytest.raises(
        InputError, match=r"denoiser \(guidance scale 3\) differs from the run's output by 0\.\d+ of its size"
    ):
        images(composite(), "another")


def test_every_run_of_a_block_has_a_denoiser_of_its_own_guidance_scale():
    pipe = tiny.stable_diffusion()
    with posterior_guidance(pipe, reward, PROMPTS, estimator=FiniteDifferenceFisher()) as guidance:
        for scale in (3.0, 1.0):
            pipe(
                PROMPTS, guidance_scale=scale, num_inference_steps=2, output_type="latent",
                callback_on_step_end=guidance,
            )  # fmt: skip
            assert len(guidance.rewards) == 2


def test_binding_copies_composites_and_keeps_estimators_that_need_nothing():
    estimator, network = composite(), Network()
    bound_estimator = estimator.bind(network)
    assert type(bound_estimator) is AverageFisher and type(bound_estimator.first) is FrozenFisher
    assert bound_estimator.first.inner.denoiser is network
    assert bound_estimator.second is estimator.second
    assert estimator.first.inner.denoiser is None
    assert bound_estimator.bind(Network()) is bound_estimator
    for independent in (DirectFisher(), EndpointFisher(), AverageFisher(DirectFisher(), DirectFisher())):
        assert independent.bind(network) is independent


def test_needs_of_a_composite_are_those_of_its_components():
    independent = AverageFisher(DirectFisher(), DirectFisher())
    assert (independent.needs_graph, independent.lacks_denoiser, independent.denoisers) == (False, False, [])
    network = Network()
    composite_estimator = AverageFisher(AutodiffFisher(network), FiniteDifferenceFisher(central=True))
    assert (composite_estimator.needs_graph, composite_estimator.lacks_denoiser, composite_estimator.denoisers) == (
        True,
        True,
        [network],
    )
    assert (composite_estimator.calls_per_state, composite_estimator.calls_per_product) == (1, 2)
    assert not OneStepFisher(AutodiffFisher()).needs_graph  # Its operators take the output as a constant.
    assert OneStepFisher().uses_whole_run and not composite_estimator.uses_whole_run
    gradient = latents()
    assert composite_estimator.through_run(gradient, [state_of_network()]) is gradient


def test_differences_of_a_composite_need_no_output_of_the_run():
    central = composite(Network()).without_model_output()
    assert central.first.inner.central
    assert not composite().first.inner.central
    assert central.without_model_output() is central
    autodiff = AutodiffFisher()
    assert autodiff.without_model_output() is autodiff


def test_trace_is_exact_by_default_where_every_component_knows_it():
    matching, direct = TraceMatchingFisher(GaussianData().model()), DirectFisher()
    assert direct.default_num_probes == AverageFisher(matching, direct).default_num_probes == 1
    assert matching.default_num_probes is None
    assert AverageFisher(matching, matching).default_num_probes is None
    assert TraceCorrectedFisher(direct, matching).default_num_probes is None
    assert TraceCorrectedFisher(matching, direct).default_num_probes == 1
    assert OneStepFisher(matching).default_num_probes is None


# Every estimator


ESTIMATORS = {
    "AutodiffFisher(denoiser=Network(...), forward_mode=False, chunk_size=1)": AutodiffFisher(Network()),
    "AutodiffFisher(denoiser=Network(...), forward_mode=True, chunk_size=1)": AutodiffFisher(Network(), True),
    "FiniteDifferenceFisher(denoiser=Network(...), relative_step=None, central=False)": FiniteDifferenceFisher(
        Network()
    ),
    "FiniteDifferenceFisher(denoiser=Network(...), relative_step=None, central=True)": FiniteDifferenceFisher(
        Network(), central=True
    ),
    "DirectFisher()": DirectFisher(),
    "EndpointFisher(centred=True)": EndpointFisher(True),
    "ExactFisher(distribution=DiracMixture(...))": ExactFisher(DiracMixture(latents())),
    "GaussianFisher(covariance=Covariance(...), mean=Tensor(shape=(3, 2, 2)))": GaussianFisher(
        Covariance.isotropic(0.5, (3, 2, 2))
    ),
    "OneStepFisher(jacobian=DirectFisher(), noise_to_signal=2.0)": OneStepFisher(DirectFisher(), 2.0),
    "TraceCorrectedFisher(prior=DirectFisher(), trace=EndpointFisher(centred=True))": TraceCorrectedFisher(
        DirectFisher(), EndpointFisher(True)
    ),
}


@pytest.mark.parametrize("words", ESTIMATORS)
def test_repr_shows_the_constructors_arguments(words):
    assert repr(ESTIMATORS[words]) == words


def test_repr_shows_no_address_in_memory():
    def network(x, t):
        return x

    assert repr(AutodiffFisher(network)) == "AutodiffFisher(denoiser=network, forward_mode=False, chunk_size=1)"
    model = TraceMatchingFisher(GaussianData().model())
    assert repr(model) == "TraceMatchingFisher(trace_model=FisherTraceModel(...), pooled=None, check=True)"


@pytest.mark.parametrize("words", ESTIMATORS)
def test_costs_are_those_of_the_operators(words):
    estimator, state = ESTIMATORS[words], state_of_network()
    operator = estimator(state, state.sample + 1)
    assert (operator.calls_per_state, operator.calls_per_product) == (
        estimator.calls_per_state, estimator.calls_per_product,
    )  # fmt: skip
    assert estimator.description == type(estimator).__name__


# Errors


NO_ESTIMATORS = {"string": "autodiff", "class": DirectFisher, "function": lambda state, endpoint=None: None}


def enter(block):
    with block:
        pass


FUNCTIONS = {
    "log_likelihood": lambda pipe, x, estimator: pipe.log_likelihood(None, "a", latents=x, estimator=estimator),
    "guide": lambda pipe, x, estimator: pipe.guide("a", reward, estimator=estimator),
    "posterior_guidance": lambda pipe, x, estimator: enter(posterior_guidance(pipe, reward, estimator=estimator)),
    "differentiable": lambda pipe, x, estimator: FisherDDIMScheduler().differentiable(estimator),
    "transport": lambda pipe, x, estimator: denoiser_field(PipelineDenoiser(pipe, prompt="a"), estimator),
    "likelihood of a denoiser": lambda pipe, x, estimator: integrate_log_likelihood(
        PipelineDenoiser(pipe, prompt="a"), x, estimator, Integration()
    ),
    "reference": lambda pipe, x, estimator: reference_log_likelihood(PipelineDenoiser(pipe, prompt="a"), x, estimator),
    "component": lambda pipe, x, estimator: TraceCorrectedFisher(DirectFisher(), estimator),
    "jacobian": lambda pipe, x, estimator: OneStepFisher(estimator),
}


@pytest.mark.parametrize("kind", NO_ESTIMATORS)
@pytest.mark.parametrize("function_name", FUNCTIONS)
def test_objects_that_are_no_estimators_are_refused_by_every_function(function_name, kind, pipe):
    message = r"is .*; (allowed: |pass )a Fisher estimator such as DirectFisher\(\)"
    with pytest.raises(InputError, match=message):
        FUNCTIONS[function_name](pipe, torch.zeros(1, 4, 8, 8), NO_ESTIMATORS[kind])


def test_estimators_are_returned_as_they_are():
    estimator = composite()
    assert check_estimator(estimator) is estimator


def test_estimator_without_a_call_can_not_be_made():
    class Empty(FisherEstimator):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Empty()


def test_trace_model_is_compared_once_per_likelihood(pipe, monkeypatch):
    model = GaussianData((4, 8, 8)).model()
    checks = []
    monkeypatch.setattr(type(model), "check_fingerprint", lambda self, denoiser: checks.append(denoiser))
    x = torch.randn(1, 4, 8, 8, generator=seeded())
    for estimator in (TraceMatchingFisher(model), AverageFisher(TraceMatchingFisher(model), DirectFisher())):
        checks.clear()
        pipe.log_likelihood(None, "a", latents=x, estimator=estimator, num_inference_steps=2)
        assert len(checks) == 1


def test_denoisers_without_conditions_give_no_pooled_vectors():
    data = GaussianData()
    denoiser = GaussianDenoiser(data, diffusers.DDIMScheduler())
    assert TraceMatchingFisher(data.model(pooled_channels=3)).bind(denoiser).pooled is None
