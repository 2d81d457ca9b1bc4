"""Devices without float64 (Apple's): the likelihood's float64 stays on the CPU.

There is no such device here. Tensors of a subclass stand for it: they say that they are on "mps", compute on the CPU,
and refuse float64 in every operation.
"""

import math

import pytest
import torch
from cases import STABLE_DIFFUSION
from diffusers import DDIMScheduler
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from diffusers_fisher import FiniteDifferenceFisher, TraceMatchingFisher
from diffusers_fisher.denoiser import Denoiser
from diffusers_fisher.likelihood import Integration, integrate_log_likelihood
from diffusers_fisher.likelihood.squared_error import squared_error_log_likelihood


class Elsewhere(torch.Tensor):
    """A tensor on a device without float64."""

    @staticmethod
    def __new__(cls, inner):
        if inner.dtype is torch.float64:
            raise TypeError("float64 on a device that has none")
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device="mps"
        )

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):
        return f"Elsewhere({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


def is_elsewhere(value):
    return isinstance(value, Elsewhere) or (isinstance(value, (str, torch.device)) and str(value).startswith("mps"))


def compute(function, args, kwargs):
    result_is_elsewhere = any(isinstance(value, Elsewhere) for value in tree_leaves((args, kwargs)))
    if kwargs.get("device") is not None:
        result_is_elsewhere = is_elsewhere(kwargs["device"])
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map(lambda value: value.inner if isinstance(value, Elsewhere) else value, (args, kwargs))
    result = function(*args, **kwargs)
    if not result_is_elsewhere:
        return result
    return tree_map(lambda value: Elsewhere(value) if isinstance(value, torch.Tensor) else value, result)


class Operations(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(is_elsewhere(value) for value in tree_leaves((args, kwargs))):
            return compute(function, args, kwargs)
        return function(*args, **kwargs)


class Moves(TorchFunctionMode):
    """Moves to the device and indexing on it, for which torch would look for the device's backend."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.__getitem__ and isinstance(args[0], Elsewhere):
            return Elsewhere(args[0].inner[args[1]])
        targets = [*args[1:], *kwargs.values()]
        if function is torch.Tensor.to and any(is_elsewhere(value) for value in targets):
            inner = args[0].inner if isinstance(args[0], Elsewhere) else args[0]
            likes = [value.dtype for value in targets if isinstance(value, torch.Tensor)]
            dtypes = [value for value in targets if isinstance(value, torch.dtype)] + likes
            return Elsewhere(inner.to(dtypes[0]) if dtypes else inner)
        return function(*args, **kwargs)


class Network(Denoiser):
    """The predicted noise of data N(0, 1/4), with a bend that keeps the Jacobian from being a multiple of identity."""

    def model_output(self, x, timestep):
        self.num_calls += 1
        level = self.level(timestep)
        gain = float(level.sigma / (0.25 * level.alpha**2 + level.sigma**2))
        return gain * x + 0.01 * torch.tanh(x.roll(1, -1))


class ConstantTrace:
    """A trace model whose r depends on the level alone."""

    config = {"output": "trace", "basis": "pixel", "pooled_channels": None}  # noqa: RUF012
    target = "jacobian"

    def evaluate(self, state, pooled=None):
        level = state.level
        logit = math.log(0.25 * float(level.alpha) ** 2 / float(level.sigma) ** 2)
        return type("Output", (), {"logits": state.sample.flatten(1)[:, 0] * 0 + logit, "second_moment": None})

    def check_fingerprint(self, denoiser):
        pass


def likelihood(samples, estimator, num_probes):
    integration = Integration(8, num_probes, generator=torch.Generator().manual_seed(0))
    return integrate_log_likelihood(Network(DDIMScheduler(**STABLE_DIFFUSION)), samples, estimator, integration)


@pytest.mark.parametrize(
    ("make", "num_probes"), [(FiniteDifferenceFisher, 1), (lambda: TraceMatchingFisher(ConstantTrace()), None)]
)
def test_likelihood_on_a_device_without_float64_is_that_on_the_cpu(make, num_probes):
    samples = 0.5 * torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    expected = likelihood(samples, make(), num_probes)
    with torch.no_grad(), Moves(), Operations():
        out = likelihood(Elsewhere(samples), make(), num_probes)
    assert type(out.log_prob) is torch.Tensor and out.log_prob.dtype is torch.float64
    torch.testing.assert_close(out.log_prob, expected.log_prob, rtol=0, atol=1e-9)  # the same operations
    torch.testing.assert_close(out.standard_error, expected.standard_error, rtol=0, atol=1e-9)


def test_squared_errors_on_a_device_without_float64_are_those_on_the_cpu():
    samples = 0.5 * torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))

    def score(samples):
        denoiser = Network(DDIMScheduler(**STABLE_DIFFUSION))
        return squared_error_log_likelihood(denoiser, samples, 8, generator=torch.Generator().manual_seed(0))

    expected = score(samples)
    with torch.no_grad(), Moves(), Operations():
        out = score(Elsewhere(samples))
    torch.testing.assert_close(out.log_prob, expected.log_prob, rtol=0, atol=1e-9)


def test_the_device_refuses_float64():
    with Moves(), Operations():
        tensor = torch.ones(2, device="mps")
        assert tensor.device.type == "mps" and type(tensor.cpu()) is torch.Tensor
        with pytest.raises(TypeError, match="float64 on a device that has none"):
            tensor.double()
        with pytest.raises(TypeError, match="float64 on a device that has none"):
            torch.ones(2, dtype=torch.float64).to("mps")
