"""Networks whose forward pass or weights were changed after loading: FreeU, float8, quantised and compiled weights."""

import functools

import pytest
import torch

from diffusers_fisher import (
    AutodiffFisher,
    InputError,
    StableDiffusionFisherPipeline,
    UnsupportedError,
    embedded_checkpoint,
    embedded_test_images,
)
from diffusers_fisher.models import denoiser_fingerprint, network_key


class Quantised(torch.Tensor):
    """A weight in 8 bits that, as those of torchao, says it is float32 and has no memory of that type."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    @classmethod
    def quantise(cls, weight):
        scale = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            args = [each.values * each.scale if isinstance(each, cls) else each for each in args]
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)
        raise NotImplementedError(f"{function} of quantised weights")


def quantise(pipe):
    for part in pipe.unet.modules():
        if isinstance(part, torch.nn.Linear):
            weight = Quantised.quantise(part.weight.detach())
            part.weight = torch.nn.Parameter(weight, requires_grad=False)


def cast_to_float8(pipe):
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def compile_network(pipe):
    pipe.unet = torch.compile(pipe.unet, backend="eager")


def enable_freeu(pipe):
    pipe.enable_freeu(0.9, 0.2, 1.1, 1.2)


def make(*changes):
    pipe = StableDiffusionFisherPipeline.from_pretrained(embedded_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    for change in changes:
        change(pipe)
    return pipe


def score(pipe, **options):
    return pipe.log_likelihood(embedded_test_images()[0][:1], num_inference_steps=8, **options)


@functools.cache
def expected_score():
    return score(make())


CHANGES = {"float8": cast_to_float8, "quantised": quantise}


@pytest.mark.parametrize("kind", CHANGES)
def test_trace_model_takes_the_network_with_its_weights_in_8_bits(kind):
    pipe = make(CHANGES[kind])
    out = score(pipe)
    assert out.trace == expected_score().trace
    assert 0 < float((out.bits_per_dim - expected_score().bits_per_dim).abs()) < 0.1  # rounding of the weights
    assert denoiser_fingerprint(pipe)["outputs"]["tolerance"] == 0.1
    assert network_key(pipe.unet) == network_key(pipe.unet)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler warns of torch itself
@pytest.mark.parametrize("kind", [None, *CHANGES])
def test_trace_model_refuses_the_network_with_freeu_whatever_its_weights(kind):
    pipe = make(*([] if kind is None else [CHANGES[kind]]), enable_freeu)
    with pytest.raises(InputError, match=r"trained for another denoiser. What differs: outputs of .* 0\.1\d of their"):
        score(pipe)
    pipe.disable_freeu()
    score(pipe)


def reward(images, prompts):
    return images.mean((1, 2, 3))


def test_weights_in_float8_have_no_backward_pass_and_say_so_before_any_evaluation():
    pipe, calls = make(cast_to_float8), []
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    message = r"UNet2DConditionModel are stored in torch\.float8_e4m3fn \(layerwise casting\), to which they return .*"
    options = {"num_guidance_steps": 1, "num_inference_steps": 2}
    with pytest.raises(UnsupportedError, match=message + r"such as FiniteDifferenceFisher\(\)"):
        score(pipe, estimator=AutodiffFisher())
    for other in ({"estimator": AutodiffFisher()}, {"optimise": ["text"]}):
        with pytest.raises(UnsupportedError, match=message):
            pipe.guide("a photo of a coat", reward, **options, **other)
    assert not calls
    assert torch.isfinite(score(pipe, estimator=AutodiffFisher(forward_mode=True)).bits_per_dim).all()
    out = pipe.guide("a photo of a coat", reward, **options)
    assert (len(out.rewards), out.status) == (2, "completed")
