"""The phases of a guidance: candidates for the noise, an ascent by cheap runs, and full runs at the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_lcm import LCMScheduler
from diffusers.schedulers.scheduling_tcd import TCDScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..backbones import Backbone
from ..backbones.stock_calls import shallow_copy
from ..backbones.unconditional import DDIMBackbone
from ..errors import FisherError, InputError, UnsupportedError
from ..noise import noise_schedule
from ..schedulers import FisherSchedulerMixin
from .checks import check_num_steps
from .noise_ascent import AscentSettings, GuidedRun, NoiseAscent, OnRun, ascend_noise, score_candidates
from .output import COMPLETED


@dataclasses.dataclass(frozen=True)
class CheapRuns:
    """Says by which runs the guidance climbs, where they are not the full ones.

    Args:
        backbone: a backbone of the pipeline with the scheduler of the cheap runs.
        num_inference_steps: their number of steps.
    """

    backbone: Backbone
    num_inference_steps: int

    @property
    def scheduler_name(self) -> str:
        return type(self.backbone.scheduler).__name__

    @property
    def scheduler_and_steps(self) -> tuple[FisherSchedulerMixin, int]:
        return self.backbone.differentiable_scheduler(), self.num_inference_steps

    def checked(self, run: GuidedRun) -> GuidedRun:
        """Returns the run with words for a pipeline's call that can't work with the scheduler.

        Such a call raises at the first timesteps or the first step, before the guidance has begun.
        """
        has_worked = False

        def sample(noise: torch.Tensor) -> torch.Tensor:
            nonlocal has_worked
            try:
                result = run.sample(noise)
            except FisherError:
                raise
            except (TypeError, ValueError, AttributeError) as error:
                if has_worked:
                    raise
                raise UnsupportedError(
                    f"{self.backbone.name} can't run on the `guidance_scheduler` {self.scheduler_name}: {error} Pass "
                    "another one, such as the pipeline's own."
                ) from error
            has_worked = True
            return result

        return dataclasses.replace(run, sample=sample)


def cheap_runs(
    backbone: Backbone, num_guidance_inference_steps: int | None, guidance_scheduler: SchedulerMixin | None,
    num_full_iterations: int, num_guidance_steps: int, optimise: Sequence[str], call_arguments: Mapping[str, object],
) -> CheapRuns | None:  # fmt: skip
    """Returns the cheap runs that the arguments of `guide` ask for, checked; None without any.

    Raises:
        InputError: arguments out of range or at odds with each other, or a scheduler of another model.
        UnsupportedError: a scheduler that the pipeline's network can't use.
    """
    if not 0 <= num_full_iterations <= num_guidance_steps:
        raise InputError(
            f"`num_full_iterations` is {num_full_iterations}; allowed: 0 to `num_guidance_steps`, which is "
            f"{num_guidance_steps}."
        )
    if num_guidance_inference_steps is None:
        if guidance_scheduler is not None or num_full_iterations:
            raise InputError(
                "`guidance_scheduler` and `num_full_iterations` are for runs of fewer steps; give "
                "`num_guidance_inference_steps` too, such as 5, or leave them out."
            )
        return None
    if num_guidance_inference_steps < 1:
        raise InputError(f"`num_guidance_inference_steps` is {num_guidance_inference_steps}; allowed: at least 1.")
    if "control" in optimise:
        raise InputError(
            '`optimise` has "control", which has one tensor per step, but `num_guidance_inference_steps` gives the '
            "runs two numbers of steps. Leave one of them out."
        )
    fixed = [name for name in ("timesteps", "sigmas") if call_arguments.get(name) is not None]
    if fixed:
        raise InputError(
            f"`{fixed[0]}` fixes the steps of every run, so `num_guidance_inference_steps` has no effect. Leave one "
            "of them out."
        )
    scheduler = few_step_scheduler(backbone) if guidance_scheduler is None else guidance_scheduler
    with_scheduler = type(backbone)(shallow_copy(backbone.pipe, scheduler=scheduler))
    with_scheduler.check_scheduler()
    _check_levels(backbone, scheduler)
    check_num_steps(with_scheduler, num_guidance_inference_steps, "num_guidance_inference_steps")
    return CheapRuns(with_scheduler, num_guidance_inference_steps)


def few_step_scheduler(backbone: Backbone) -> SchedulerMixin:
    """Returns a scheduler for few steps of the pipeline's network, with the noise levels of the pipeline's own.

    It is DPM-Solver++ (Lu et al., 2211.01095), on steps that begin in pure noise. Flow matching keeps the pipeline's
    scheduler, which takes Euler steps along nearly straight paths. So do consistency models, and pipelines whose call
    passes arguments to the scheduler's step that DPM-Solver++ does not know.
    """
    own = backbone.scheduler
    if backbone.predicts_flow or isinstance(own, (LCMScheduler, TCDScheduler)) or isinstance(backbone, DDIMBackbone):
        return own
    return DPMSolverMultistepScheduler.from_config(backbone.pipe.scheduler.config, timestep_spacing="trailing")


def _check_levels(backbone: Backbone, scheduler: SchedulerMixin) -> None:
    """Refuses a scheduler whose timesteps have other noise levels, or other outputs, than those of the pipeline's.

    Raises `InputError`.
    """
    own, other = noise_schedule(backbone.scheduler), noise_schedule(scheduler)
    is_same = own.prediction == other.prediction
    if is_same and not backbone.predicts_flow:  # the shift of a flow moves its timesteps, and its levels with them
        timesteps = own.spread_timesteps(5)[1:-1]
        difference = own.log_noise_to_signal_at(timesteps) - other.log_noise_to_signal_at(timesteps)
        is_same = float(difference.abs().max()) < 1e-3
    if not is_same:
        name = type(scheduler).__name__
        raise InputError(
            f"`guidance_scheduler` is a {name} with other noise levels or another prediction type than the pipeline's "
            f"{type(backbone.scheduler).__name__}. Make it by {name}.from_config(pipe.scheduler.config)."
        )


@dataclasses.dataclass(frozen=True)
class GuidanceStep:
    """Holds what a callback gets after every run of a guidance. Its tensors are copies.

    Args:
        run: number of the run, from 0.
        num_runs: number of runs, if nothing stops the guidance.
        rewards: (B,) float64, of this run.
        held_out_rewards: (B,) float64, of this run; None without a held-out reward.
        whiteness: (B,) float64, of the noise of this run.
        best_rewards: (B,) float64, the best so far among the candidates, the cheap runs or the full runs, whichever of
            these the run belongs to.
        best_images: (B, 3, H, W) in [0, 1], the images of `best_rewards`, as the reward saw them.
        best_latents: (B, ...) float32, initial noise of these images in the pipeline's layout.
    """

    run: int
    num_runs: int
    rewards: torch.Tensor
    held_out_rewards: torch.Tensor | None
    whiteness: torch.Tensor
    best_rewards: torch.Tensor
    best_images: torch.Tensor
    best_latents: torch.Tensor

    @classmethod
    def after(cls, ascent: NoiseAscent, num_runs: int) -> GuidanceStep:
        """Returns the step of the last run of `ascent`."""
        held_out = ascent.held_out_rewards[-1].clone() if ascent.held_out_rewards else None
        return cls(
            ascent.first_run + len(ascent.rewards) - 1, num_runs, ascent.rewards[-1].clone(), held_out,
            ascent.whiteness[-1].p_values.clone(), ascent.best_rewards.clone(), ascent.best["images"].clone(),
            ascent.best["noise"].clone(),
        )  # fmt: skip


GuidanceCallback = Callable[[GuidanceStep], bool | None]
"""`callback(step)` is called after every run of the guidance, and returns True to stop it."""


@dataclasses.dataclass(frozen=True)
class Phases:
    """Says which runs follow each other.

    Args:
        full: the run of the pipeline's own scheduler and number of steps, which makes the images.
        cheap: the run by which the guidance climbs; None: the full one.
        num_full_iterations: number of the last gradient steps that are taken by the full run.
        settings: settings of the ascent, with the number of gradient steps of all phases.
        unguided: the run of the first `num_unguided_iterations` gradient steps, which has no classifier-free guidance;
            None: there are no such steps.
    """

    full: GuidedRun
    cheap: GuidedRun | None
    num_full_iterations: int
    settings: AscentSettings
    unguided: GuidedRun | None = None
    num_unguided_iterations: int = 0

    def num_runs(self, num_candidates: int) -> int:
        """Returns the number of sampling runs, if nothing stops the guidance."""
        climbs = num_candidates == 1 or self._climbing_steps > 0
        candidates = num_candidates if num_candidates > 1 else 0
        full = 0 if self.cheap is None else self.num_full_iterations + 1
        return candidates + climbs * (self._climbing_steps + 1) + full + (self.unguided is not None)

    @property
    def _climbing_steps(self) -> int:
        return self.settings.num_guidance_steps - self.num_full_iterations

    def run(self, candidates: Sequence[torch.Tensor], on_run: OnRun) -> list[NoiseAscent]:
        """Returns the ascents of all phases. The last one has the images.

        A phase goes on from the best variables of the phase before. After a phase that stopped early, the full run
        draws the images, without further gradient steps.

        Args:
            candidates: initial noises, (B, ...) each, from which the best is taken for every sample.
            on_run: see `ascend_noise`.
        """
        climbing = self.full if self.cheap is None else self.cheap
        ascents: list[NoiseAscent] = []

        def ascend(run: GuidedRun, num_steps: int) -> None:
            settings = dataclasses.replace(self.settings, num_guidance_steps=num_steps)
            ascents.append(ascend_noise(run, candidates[0], settings, on_run, ascents[-1] if ascents else None))

        def stopped() -> bool:
            return any(each.status != COMPLETED for each in ascents)

        if len(candidates) > 1:
            ascents.append(score_candidates(climbing, candidates, on_run))
        if self.unguided is not None:
            ascend(self.unguided, self.num_unguided_iterations if not stopped() else 0)
            ascend(climbing, self._climbing_steps - self.num_unguided_iterations if not stopped() else 0)
        elif not ascents or (self._climbing_steps > 0 and not stopped()):
            ascend(climbing, self._climbing_steps)
        if self.cheap is not None:
            ascend(self.full, self.num_full_iterations if not stopped() else 0)
        return ascents


def reordered_pairs(cheap: torch.Tensor, full: torch.Tensor) -> list[tuple[int, int]]:
    """Returns the pairs of samples that two rewards (B,) each rank in different orders."""
    order = (cheap[:, None] - cheap).sign() * (full[:, None] - full).sign()
    return [(int(first), int(second)) for first, second in (order < 0).triu().nonzero().tolist()]
