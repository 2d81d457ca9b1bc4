"""Makes stock calls that take no `latents` start from latents, and return the latents that they end with.

The stock call itself runs, on a shallow copy of the pipeline: only the function by which it draws its noise, its
scheduler and its autoencoder are replaced for that call.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..errors import InputError

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

Owner = TypeVar("Owner")


def make_latents_call(stock: type[DiffusionPipeline]) -> Callable[..., Any]:
    """Makes a function of the stock call's arguments that also takes `latents`, (B, C, h, w) of unit variance.

    Without `latents` the stock call draws the initial noise itself. With `output_type` "latent" the function returns
    the final latents, and no autoencoder runs. The caller decides on the grad mode.

    Args:
        stock: class of the pipelines, whose call takes `batch_size` or `class_labels`.

    Returns:
        The function. It raises `InputError` for latents of another number than the samples', or of other channels than
        the network's.
    """
    stock_call = inspect.unwrap(stock.__call__)
    parameters = list(inspect.signature(stock_call).parameters.values())
    place = -1 if parameters[-1].kind is inspect.Parameter.VAR_KEYWORD else len(parameters)
    parameters.insert(place, inspect.Parameter("latents", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None))
    signature = inspect.Signature(parameters)

    def call_with_latents(*args: Any, **kwargs: Any) -> Any:
        from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

        values = signature.bind(*args, **kwargs)
        values.apply_defaults()
        arguments = values.arguments
        arguments |= arguments.pop("kwargs", {})
        pipe, latents = arguments.pop("self"), arguments.pop("latents")
        if latents is None and arguments["output_type"] != "latent":
            return stock_call(pipe, **arguments)
        count = len(arguments["class_labels"]) if "class_labels" in arguments else arguments["batch_size"]
        scheduler = SchedulerWithMemory(pipe.scheduler, count)
        call = stock_call if latents is None else _call_from(latents, stock_call, pipe, count)
        if arguments["output_type"] != "latent":
            return call(shallow_copy(pipe, scheduler=scheduler), **arguments)
        names = {"vae", "vqvae"} & pipe.components.keys()
        autoencoders = {name: shallow_copy(pipe.components[name], decode=_decode_nothing) for name in names}
        call(shallow_copy(pipe, scheduler=scheduler, **autoencoders), **{**arguments, "output_type": "pt"})
        final: Any = scheduler.last  # a tensor, as other stock calls return against their own types
        return ImagePipelineOutput(images=final) if arguments["return_dict"] else (final,)

    call_with_latents.__signature__ = signature  # type: ignore[attr-defined]
    return call_with_latents


def shallow_copy(owner: Owner, **attributes: Any) -> Owner:
    """Makes a pipeline over the same components, or a module over the same weights, on which `attributes` are set.

    The attributes are written past `__setattr__`, by which a pipeline would note the change in its configuration.
    """
    duplicate = copy.copy(owner)
    vars(duplicate).update(attributes)
    return duplicate


@contextlib.contextmanager
def restore_attributes(owner: object, *names: str) -> Iterator[None]:
    """Restores the instance's own attributes `names` of `owner` after the block, also those that it did not have.

    They are written past `__setattr__`, as in `shallow_copy`.
    """
    before = {name: value for name, value in vars(owner).items() if name in names}
    try:
        yield
    finally:
        for name in names:
            vars(owner).pop(name, None)
        vars(owner).update(before)


def _call_from(latents: torch.Tensor, call: Callable, pipe: DiffusionPipeline, count: int) -> Callable:
    """Returns the function `call` with `latents` in the place of what it draws.

    Its code and its globals are the same, except that `randn_tensor` is another function.
    """
    network = pipe.unet if "unet" in pipe.components else pipe.transformer
    shape, channels = tuple(latents.shape), network.config.in_channels
    if len(shape) != 4 or shape[:2] != (count, channels):
        raise InputError(f"`latents` have shape {shape}; allowed: ({count}, {channels}, h, w).")

    def randn_tensor(shape: Any, generator: Any = None, device: Any = None, dtype: Any = None, **_: Any):
        return latents.to(device=device or latents.device, dtype=dtype or latents.dtype)

    names = {**call.__globals__, "randn_tensor": randn_tensor}
    function = types.FunctionType(call.__code__, names, call.__name__, call.__defaults__, call.__closure__)
    function.__kwdefaults__ = call.__kwdefaults__
    return function


class SchedulerWithMemory:
    """Stands for a pipeline's scheduler, and keeps the last sample that the scheduler returned.

    Some pipelines pass every sample twice (DiT, for classifier-free guidance). They get it back twice, but the
    scheduler's own step gets it once, so that a differentiable run has the shape of the latents.
    """

    def __init__(self, scheduler: Any, count: int):
        self._scheduler = scheduler
        self._count = count
        self.last: torch.Tensor | None = None
        # Pipelines inspect the signature of `step`.
        self.step = functools.update_wrapper(functools.partial(self._step), scheduler.step)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)

    def _step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        copies = len(sample) // self._count
        if copies > 1:
            model_output, sample = model_output[: self._count], sample[: self._count]
        result = self._scheduler.step(model_output, timestep, sample, *args, **kwargs)
        self.last = result[0] if isinstance(result, tuple) else result.prev_sample
        if copies == 1:
            return result
        copied_sample = torch.cat([self.last] * copies)
        if isinstance(result, tuple):
            return (copied_sample, *result[1:])
        result.prev_sample = copied_sample
        return result


def _decode_nothing(*args: Any, **kwargs: Any) -> types.SimpleNamespace:
    """Stands for an autoencoder's `decode`. A real decoding would cost more than a step of most networks."""
    return types.SimpleNamespace(sample=torch.zeros(1, 1, 1, 1))
