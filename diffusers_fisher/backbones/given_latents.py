"""Stock calls that take no `latents`, made to start from latents and to return the latents that they end with.

The stock call itself runs, on a shallow copy of the pipeline: only the function by which it draws its noise, its
scheduler and its autoencoder are others for that call.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from ..errors import InputError


def call_with_latents(
    pipe: DiffusionPipeline,
    stock: type[DiffusionPipeline],
    count: int,
    latents: torch.Tensor | None,
    output_type: str,
    return_dict: bool,
    **arguments: Any,
) -> Any:
    """Runs the call of class `stock` from `latents` and, for `output_type` "latent", up to the final latents.

    Without either it is the stock call. No autoencoder runs for `output_type` "latent". The caller decides on the
    grad mode.

    Args:
        count: samples of the call.
        latents: (count, C, h, w) initial noise of unit variance; None: drawn by the stock call.

    Raises:
        InputError: latents of another number or of other channels than the network's.
    """
    from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

    call = inspect.unwrap(stock.__call__)
    if latents is None and output_type != "latent":
        return call(pipe, output_type=output_type, return_dict=return_dict, **arguments)
    if latents is not None:
        _check(pipe, latents, count)
        call = _drawing(call, latents)
    watched = _WatchedScheduler(pipe.scheduler, count)
    if output_type != "latent":
        return call(
            shallow_copy(pipe, scheduler=watched), output_type=output_type, return_dict=return_dict, **arguments
        )
    silent = {name: _NoDecoder(pipe.components[name]) for name in ("vae", "vqvae") if name in pipe.components}
    call(shallow_copy(pipe, scheduler=watched, **silent), output_type="pt", return_dict=return_dict, **arguments)
    final: Any = watched.last  # a tensor, as stock calls give for `output_type` "latent" against their own types
    return ImagePipelineOutput(images=final) if return_dict else (final,)


def shallow_copy(pipe: DiffusionPipeline, **attributes: Any) -> DiffusionPipeline:
    """A pipeline over the same components, with `attributes` of its own.

    They are written past the pipeline's `__setattr__`, which would note the change in the configuration.
    """
    made = copy.copy(pipe)
    vars(made).update(attributes)
    return made


def _check(pipe: DiffusionPipeline, latents: torch.Tensor, count: int) -> None:
    network = pipe.unet if "unet" in pipe.components else pipe.transformer
    shape, channels = tuple(latents.shape), network.config.in_channels
    if len(shape) != 4 or shape[:2] != (count, channels):
        raise InputError(f"`latents` have shape {shape}; allowed: ({count}, {channels}, h, w).")


def _drawing(call: Callable, latents: torch.Tensor) -> Callable:
    """The function `call` with `latents` for what it draws: its code, over names of which one means another thing."""

    def randn_tensor(shape: Any, generator: Any = None, device: Any = None, dtype: Any = None, **_: Any):
        return latents.to(device=device or latents.device, dtype=dtype or latents.dtype)

    names = {**call.__globals__, "randn_tensor": randn_tensor}
    made = types.FunctionType(call.__code__, names, call.__name__, call.__defaults__, call.__closure__)
    made.__kwdefaults__ = call.__kwdefaults__
    return made


class _WatchedScheduler:
    """A pipeline's scheduler, which keeps the last sample it returned.

    A pipeline that hands it every sample twice (DiT, for classifier-free guidance) gets it back twice, but the
    scheduler's own step sees it once: so a differentiable run has the shape of the latents.
    """

    def __init__(self, scheduler: Any, count: int):
        self._scheduler = scheduler
        self._count = count
        self.last: torch.Tensor | None = None

        @functools.wraps(scheduler.step)  # pipelines inspect its signature
        def step(*args: Any, **kwargs: Any) -> Any:
            return self._step(*args, **kwargs)

        self.step = step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)

    def _step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        copies = len(sample) // self._count
        if copies > 1:
            model_output, sample = model_output[: self._count], sample[: self._count]
        result = self._scheduler.step(model_output, timestep, sample, *args, **kwargs)
        following = result[0] if isinstance(result, tuple) else result.prev_sample
        self.last = following
        if copies == 1:
            return result
        repeated = torch.cat([following] * copies)
        if isinstance(result, tuple):
            return (repeated, *result[1:])
        result.prev_sample = repeated
        return result


class _NoDecoder:
    """An autoencoder in whose place nothing is decoded, which would cost more than a step of most networks."""

    def __init__(self, autoencoder: torch.nn.Module):
        self._autoencoder = autoencoder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._autoencoder, name)

    def decode(self, *args: Any, **kwargs: Any) -> types.SimpleNamespace:
        return types.SimpleNamespace(sample=torch.zeros(1, 1, 1, 1))
