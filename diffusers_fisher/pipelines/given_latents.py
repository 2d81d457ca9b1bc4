"""Stock calls that take no `latents`, given them, and asked for the latents that they end with.

The stock call itself runs: only the function by which it draws its noise, and the scheduler that it sees, are put in
its place for one call.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..denoiser import borrowed
from ..errors import InputError


def call_with_latents(
    pipe: Any,
    stock: type,
    count: int,
    latents: torch.Tensor | None,
    output_type: str,
    return_dict: bool,
    **arguments: Any,
) -> Any:
    """The call of class `stock` on `pipe`, from `latents` and, for `output_type` "latent", to the final latents.

    Without either it is the stock call. No autoencoder runs for `output_type` "latent".

    Args:
        count: samples of the call.
        latents: (count, C, h, w) initial noise of unit variance; None: drawn by the stock call.

    Raises:
        InputError: latents of another number or of other channels than the network's.
    """
    from diffusers import ImagePipelineOutput

    call = inspect.unwrap(stock.__call__)  # the caller decides on the grad mode
    if latents is None and output_type != "latent":
        return call(pipe, output_type=output_type, return_dict=return_dict, **arguments)
    if latents is not None:
        _check(pipe, latents, count)
        call = _drawing(call, latents)
    watched = _WatchedScheduler(pipe.scheduler, count)
    with borrowed(pipe, scheduler=watched):
        if output_type != "latent":
            return call(pipe, output_type=output_type, return_dict=return_dict, **arguments)
        with _not_decoding(getattr(pipe, "vae", getattr(pipe, "vqvae", None))):
            call(pipe, output_type="pt", return_dict=return_dict, **arguments)
    return ImagePipelineOutput(images=watched.last) if return_dict else (watched.last,)


def _check(pipe: Any, latents: torch.Tensor, count: int) -> None:
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    shape, channels = tuple(latents.shape), network.config.in_channels
    if len(shape) != 4 or shape[:2] != (count, channels):
        raise InputError(f"`latents` have shape {shape}; allowed: ({count}, {channels}, h, w).")


def _drawing(call: Any, latents: torch.Tensor) -> Callable:
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


@contextlib.contextmanager
def _not_decoding(autoencoder: Any) -> Iterator[None]:
    """Skips the autoencoder's `decode` in the block, which costs more than a step of most networks."""
    if autoencoder is None:
        yield
        return
    nothing = types.SimpleNamespace(sample=torch.zeros(1, 1, 1, 1))
    before = {name: value for name, value in vars(autoencoder).items() if name == "decode"}  # one of the user's own
    autoencoder.decode = lambda *args, **kwargs: nothing
    try:
        yield
    finally:
        del autoencoder.decode
        vars(autoencoder).update(before)
