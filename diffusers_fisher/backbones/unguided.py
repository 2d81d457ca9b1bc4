"""What guides a pipeline's call, and what switches the guidance off."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..arguments import fit
from ..errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from diffusers.guiders import BaseGuidance

Parameters = Mapping[str, inspect.Parameter]
"""Parameters of a call by name."""

SWITCHED_OFF: dict[str, float | None] = {
    "guidance_scale": 1.0, "guidance_schedule": None, "true_cfg_scale": 1.0, "pag_scale": 0.0, "sag_scale": 0.0,
    "stg_scale": 0.0, "modality_scale": 1.0, "audio_guidance_scale": 1.0, "audio_stg_scale": 0.0,
    "audio_modality_scale": 1.0, "min_guidance_scale": 1.0, "max_guidance_scale": 1.0,
}  # fmt: skip
"""Arguments by which calls of diffusers' pipelines guide, each with the value that switches its guidance off."""

OFF_AT_ZERO = ("ZImage", "Krea2")
"""Beginnings of the names of pipelines whose classifier-free guidance is on at every `guidance_scale` above 0."""

EMBEDDED = ("guidance_embeds", "time_cond_proj_dim")
"""Entries of the configurations of networks that take the guidance scale as an input (distilled guidance)."""

STEADY_GUIDERS = ("ClassifierFreeGuidance", "TangentialClassifierFreeGuidance")
"""Guiders whose result depends on the present evaluation alone, where they start and stop with the run."""


def embeds_guidance(config: Mapping[str, Any]) -> bool:
    """Returns whether the network of this configuration takes the guidance scale as an input."""
    return any(config.get(name) for name in EMBEDDED)


def check_unconditional_branch(pipeline: str, config: Mapping[str, Any]) -> None:
    """Refuses a network that has no unconditional branch.

    Args:
        pipeline: class of the pipeline.
        config: configuration of its network.

    Raises:
        UnsupportedError: the network takes the guidance scale as an input.
    """
    if embeds_guidance(config):
        raise UnsupportedError(
            f"The network of {pipeline} takes the guidance scale as an input (distilled guidance), so it has no "
            "unconditional branch to compare prompts with. Use a pipeline with classifier-free guidance."
        )


def switched_off(pipeline: type, parameters: Parameters, config: Mapping[str, Any]) -> dict[str, float | None]:
    """Returns the arguments by which a pipeline's call guides, each with the value that switches its guidance off.

    A guidance scale that is an input of the network is left out: the call's default is one of its values.

    Args:
        pipeline: class of the pipeline.
        parameters: parameters of its call.
        config: configuration of its network.
    """
    values = {name: value for name, value in SWITCHED_OFF.items() if name in parameters}
    if "guidance_scale" in values:
        # Calls have no default for a guidance scale that is an input of some of their networks.
        is_input = parameters["guidance_scale"].default is None and "guidance_schedule" not in values
        if is_input or embeds_guidance(config):
            del values["guidance_scale"]
        elif any(parent.__name__.startswith(OFF_AT_ZERO) for parent in pipeline.__mro__):
            values["guidance_scale"] = 0.0
    return values


def default_guidance(parameters: Parameters) -> dict[str, Any]:
    """Returns the arguments by which a call of these parameters guides, each with the call's own default."""
    return {name: parameters[name].default for name in SWITCHED_OFF if name in parameters}


def asks_for_guidance(values: Mapping[str, float | None], arguments: Mapping[str, Any]) -> bool:
    """Returns whether a call's arguments switch any guidance on.

    A scale of 1 never does: some calls guide at 1, but nobody who passes it means that.

    Args:
        values: result of `switched_off`.
    """
    scales = {name: arguments[name] for name in values if arguments.get(name) is not None}
    return any(
        not isinstance(scale, (int, float)) or (scale != 1 and scale > (values[name] or 0.0))
        for name, scale in scales.items()
    )


def pop_unguided(
    pipeline: type, parameters: Parameters, config: Mapping[str, Any], arguments: dict[str, Any]
) -> float | None:
    """Removes the scales of guidance from a call's `arguments`. The other arguments are those of `switched_off`.

    Returns:
        The guidance scale at which the output is a score; None for the default of a scale that is the network's input.

    Raises:
        InputError: a scale guides.
    """
    values = switched_off(pipeline, parameters, config)
    if "guidance_scale" not in parameters:
        values["guidance_scale"] = 1.0
    for name, off in values.items():
        scale = arguments.pop(name, off)
        if (scale if off is None else fit(name, scale, {name: float})) != off:
            raise InputError(
                f"`{name}` is {scale}; likelihoods and curvature are at {off}, because a guided output is the "
                "score of no density. Leave it out."
            )
    return arguments.pop("guidance_scale", values.get("guidance_scale"))


def check_evaluations(pipeline: str, parameters: Parameters, evaluations: list[int], count: int) -> None:
    """Refuses an output that is guided where nothing asked for guidance.

    Args:
        pipeline: class of the pipeline.
        parameters: parameters of its call.
        evaluations: number of samples in every evaluation of the network in one call.
        count: number of samples of the call.

    Raises:
        UnsupportedError: the network was evaluated more than once per sample.
    """
    if sum(evaluations) <= count:
        return
    names = [name for name in parameters if "guidance" in name or "cfg" in name or name in SWITCHED_OFF]
    raise UnsupportedError(
        f"{pipeline} evaluated its network on {sum(evaluations)} samples for {count}, although no guidance was "
        f"asked for: its output is guided, and the score of no density. Pass what switches its guidance off (its call "
        f"takes {', '.join(names) or 'no such argument'}), or the guidance scale if you mean a guided output."
    )


def guiders_of(pipeline: str, components: Mapping[str, object], scale: float | None) -> dict[str, BaseGuidance]:
    """Returns copies of a pipeline's guiders for one evaluation, by the names of the components.

    Args:
        pipeline: class of the pipeline.
        scale: guidance scale of the copies; None or 1: they are switched off.

    Raises:
        UnsupportedError: a guider that acts by the step's index within a run.
    """
    from diffusers.guiders import BaseGuidance

    guiders = {}
    for name, part in components.items():
        if not isinstance(part, BaseGuidance):
            continue
        guiders[name] = guider = copy.copy(part)
        if scale is None or scale == 1:
            guider.disable()
            continue
        if type(guider).__name__ not in STEADY_GUIDERS or (guider._start, guider._stop) != (0.0, 1.0):
            raise UnsupportedError(
                f"The guider {type(guider).__name__} of {pipeline} (from {guider._start} to {guider._stop} of a "
                "run) acts by the step's index within a run, which a single evaluation does not have. Give the "
                "pipeline a ClassifierFreeGuidance from 0 to 1, or use an estimator that needs no denoiser, such as "
                "DirectFisher()."
            )
        vars(guider)["guidance_scale"] = scale
    return guiders
