"""What one call of a pipeline says of its family: the noise that it draws, and how it decodes latents.

The call runs on a shallow copy of the pipeline, with a scheduler whose step returns the sample that it was given. So
the call ends with the latents that it began with, and what it makes of them is their decoding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from ..errors import FisherError, InputError, UnsupportedError
from ..noise import noise_schedule
from .echo import EchoScheduler, echo_scheduler
from .first_call import CALL_STEPS, RecordedNetworks, random_state
from .networks import denoising_networks
from .stock_calls import shallow_copy

if TYPE_CHECKING:
    from .base import Backbone

Encode = Callable[..., tuple]
"""Takes the place of `encode_prompt`, which is its first argument."""

PREPARE = "prepare_latents"
"""Name of the method by which pipelines of diffusers draw their noise."""


class _NoiseDrawn(Exception):
    """Ends a call when it has drawn its noise."""

    def __init__(self, noise: torch.Tensor):
        super().__init__()
        self.noise = noise


def drawn_noise(backbone: Backbone, encode_prompt: Encode | None, arguments: Mapping[str, Any]) -> torch.Tensor:
    """Returns the noise that the pipeline's call draws for these arguments: of unit variance, in its own layout.

    The call ends there, so no denoising network is evaluated.

    Raises:
        InputError: the call refuses its arguments.
        UnsupportedError: the pipeline does not draw its noise by a method `prepare_latents`.
    """
    if PREPARE not in dir(type(backbone.pipe)):
        raise _layout_error(backbone, f"it has no method `{PREPARE}`")
    scheduler = _middle_scheduler(backbone)
    prepare = shallow_copy(backbone.pipe, scheduler=scheduler).prepare_latents

    def stop(*args: Any, **kwargs: Any) -> NoReturn:
        result = prepare(*args, **kwargs)
        noise = result[0] if isinstance(result, tuple) else result
        if not isinstance(noise, torch.Tensor):
            raise _layout_error(backbone, f"its `{PREPARE}` returns a {type(noise).__name__}")
        raise _NoiseDrawn(noise)

    try:
        backbone.call(scheduler, None, encode_prompt=encode_prompt, components={PREPARE: stop}, **_options(arguments))
    except _NoiseDrawn as drawn:
        return drawn.noise
    except (ValueError, TypeError) as error:
        if isinstance(error, FisherError):
            raise
        raise InputError(f"The call of {backbone.name} refuses its arguments: {error}") from error
    raise _layout_error(backbone, f"its call does not use its `{PREPARE}`")


@dataclasses.dataclass(frozen=True)
class RecordedCall:
    """Holds what one call of a pipeline gave, so that further calls evaluate no network and encode no prompt.

    Args:
        arguments: arguments of the call.
        noise: the noise that the call drew.
        networks: what its denoising networks returned.
        encoded: results of its `encode_prompt`, in their order.
    """

    arguments: Mapping[str, Any]
    noise: torch.Tensor
    networks: RecordedNetworks
    encoded: list[tuple]

    @classmethod
    def of(cls, backbone: Backbone, arguments: Mapping[str, Any]) -> RecordedCall:
        """Calls the pipeline once, from noise that it draws itself. Cost: one evaluation of the network.

        Random generators are left as they were.

        Raises:
            InputError: the call refuses its arguments.
            UnsupportedError: the layout of its noise is not known, or it ends with other latents than those that its
                scheduler's step returns.
        """
        encoded: list[tuple] = []

        def keep(encode: Encode, *args: Any, **kwargs: Any) -> tuple:
            encoded.append(encode(*args, **kwargs))
            return encoded[-1]

        restore_random = random_state(dict(arguments), backbone.device)
        try:
            noise = drawn_noise(backbone, keep, arguments)
            encoded.clear()  # a call may draw its noise before it encodes its prompts
            networks = RecordedNetworks(denoising_networks(backbone.pipe.components))
            scheduler = _middle_scheduler(backbone)
            with networks.recording():
                result = backbone.call(
                    scheduler, noise, encode_prompt=keep, **_options(arguments), output_type="latent",
                    return_dict=False,
                )[0]  # fmt: skip
        finally:
            restore_random()
        if not isinstance(result, torch.Tensor) or result.shape != noise.shape or not torch.equal(result, noise):
            form = tuple(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
            raise UnsupportedError(
                f"{backbone.name} ends its call with other latents ({form}) than those that its scheduler's last step "
                f"returns ({tuple(noise.shape)}), so what it decodes is not known. Differentiate its runs by a loss "
                "of `trajectory.final_sample`."
            )
        return cls(arguments, noise, networks, encoded)

    def drawn_noise(self, backbone: Backbone, generator: object) -> torch.Tensor:
        """Returns noise as `drawn_noise` does, for another random generator (None: torch's own)."""
        return drawn_noise(backbone, self._replayed_prompts(), {**self.arguments, "generator": generator})

    def decode(self, backbone: Backbone, latents: torch.Tensor, output_type: str = "pt") -> Any:
        """Returns what the pipeline's call makes of latents at its end; with a graph where `latents` asks for one."""
        with_graph = torch.is_grad_enabled() and latents.requires_grad
        restore_random = random_state(dict(self.arguments), backbone.device)
        try:
            return backbone.call(
                _middle_scheduler(backbone), latents.to(self.noise.dtype), with_graph, self._replayed_prompts(),
                self.networks.replayed(), **_options(self.arguments), output_type=output_type, return_dict=False,
            )[0]  # fmt: skip
        finally:
            restore_random()

    def _replayed_prompts(self) -> Encode:
        results = iter(self.encoded)
        return lambda encode, *args, **kwargs: next(results)


def _middle_scheduler(backbone: Backbone) -> EchoScheduler:
    """Returns a scheduler of one step, from the middle of the noise levels, that returns its sample."""
    timestep = noise_schedule(backbone.scheduler).spread_timesteps(3)[1].float()
    return echo_scheduler(backbone.scheduler, timestep, holds_sample=True)


def _options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a call of one step: without those that belong to its run."""
    kept = {name: value for name, value in arguments.items() if not name.startswith("callback")}
    return {**kept, "num_inference_steps": CALL_STEPS}


def _layout_error(backbone: Backbone, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"The layout of the latents of {backbone.name} is not known, because {reason}. Give it a backbone with "
        "register_backbone, or use PipelineDenoiser(pipe, ...) and integrate_log_likelihood."
    )
