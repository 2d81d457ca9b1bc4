"""Do a recorded run and single evaluations of a pipeline give what the pipeline's own run gives?"""

from __future__ import annotations

from typing import Any

import torch

from ..backbones import Backbone, PipelineDenoiser
from ..backbones.networks import cache_hooks
from ..fisher import DirectFisher
from ..fisher.agreement import output_difference
from ..noise import DenoisingState, expand
from ..schedulers import fisher_scheduler
from .lines import CheckLine
from .subject import Subject, run_arguments

NUM_STEPS = 4
SAME_RUN = 1e-4
"""Relative difference of the results of two equal runs. They are equal bit for bit on most devices."""


def check_runs(subject: Subject) -> CheckLine:
    """Compares three ways through one run at the call's own guidance, step by step.

    The pipeline's own run has its own scheduler, the recorded run the differentiable one, and the denoiser is
    evaluated at each recorded state by itself. Cost: three runs of four steps.
    """
    backbone, count = subject.backbone, min(2, len(subject.samples))
    pixels = (subject.samples.shape[2] * backbone.factor, subject.samples.shape[3] * backbone.factor)
    arguments = run_arguments(backbone, subject.some_prompts(0, count), count, pixels)
    noise = backbone.pack(subject.noise(subject.samples[:count], "run"))
    own, _ = sampling_run(subject, noise, arguments, recorded=False)
    result, states = sampling_run(subject, noise, arguments, recorded=True)
    change = float((result - own).norm() / own.norm().clamp_min(1e-30))
    denoiser = PipelineDenoiser(backbone, **arguments)
    pairs = [output_difference(denoiser, state, _evaluate(denoiser, state)) for state in states]
    differences, tolerances = ([float(value) for value in values] for values in zip(*pairs, strict=True))
    is_same = all(each <= most for each, most in pairs)
    scale = "" if denoiser.guidance_scale is None else f" at guidance scale {denoiser.guidance_scale:g}"
    words = (
        f"{len(states)} steps{scale}: single evaluations differ by {max(differences):.1e} of the run's outputs at "
        f"most (rounding explains {min(tolerances):.1e}), the recorded run's result by {change:.1e}"
    )
    figures = {
        "guidance_scale": denoiser.guidance_scale, "differences": differences, "tolerances": tolerances,
        "recorded_run": change,
    }  # fmt: skip
    if is_same and change <= SAME_RUN:
        return CheckLine("ok", words, figures=figures)
    return CheckLine("failed", words, *_cause(backbone, is_same), figures=figures)


def check_unguided(subject: Subject) -> CheckLine:
    """Asks whether the call without guidance evaluates the network once per sample, and gives finite outputs."""
    denoiser = subject.denoiser(0, 1)
    state, _, _ = subject.states[1]
    with torch.no_grad():
        denoiser.state(state.sample[:1], state.known_timestep)
    scale = denoiser.guidance_scale
    words = "one evaluation of the network per sample" + ("" if scale is None else f" at guidance scale {scale:g}")
    return CheckLine("ok", words, figures={"guidance_scale": scale})


def sampling_run(
    subject: Subject, noise: torch.Tensor, arguments: dict[str, Any], recorded: bool, num_steps: int = NUM_STEPS
) -> tuple[torch.Tensor, list[DenoisingState]]:
    """Returns the last latents of a run of the pipeline's call, and the states of its steps where it is recorded.

    Args:
        noise: initial noise in the pipeline's layout.
        arguments: arguments of the call.
    """
    backbone = subject.backbone
    options = {"num_inference_steps": num_steps, "output_type": "latent", "return_dict": False, **arguments}
    options["generator"] = subject.generator("run")
    kind: Any = type(backbone.scheduler)
    scheduler = (fisher_scheduler(kind) if recorded else kind).from_config(backbone.pipe.scheduler.config)
    noise = noise.to(backbone.noise_dtype or backbone.dtype)
    with torch.no_grad():
        if not recorded:
            return backbone.call(scheduler, noise, **options)[0].float(), []
        with scheduler.differentiable(DirectFisher()) as trajectory:
            return backbone.call(scheduler, noise, **options)[0].detach().float(), trajectory.states


@torch.no_grad()
def _evaluate(denoiser: PipelineDenoiser, state: DenoisingState) -> torch.Tensor:
    return denoiser.model_output(expand(state.input_scale, state.sample) * state.sample, state.known_timestep)


def _cause(backbone: Backbone, is_same: bool) -> tuple[str, str]:
    """Returns the likely cause of a difference between the ways, and its cure."""
    network = backbone.network
    if network is not None and cache_hooks(network):
        return (
            "The network has a cache, with which a step of the run depends on the steps before it.",
            "Turn it off with the network's `disable_cache()`.",
        )
    if network is not None and network.training:
        return "The network is in training mode, in which dropout is random.", "Put it into eval mode."
    if is_same:
        return (
            "The differentiable scheduler makes other steps than the pipeline's own, which must not be.",
            "Report it with the name and the configuration of the scheduler.",
        )
    return (
        "A step of the run depends on more than its latents and its timestep: something acts by the step's index.",
        "Leave out what acts by the step, such as a guidance interval or a callback.",
    )
