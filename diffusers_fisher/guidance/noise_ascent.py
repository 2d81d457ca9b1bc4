"""Generation steered by a differentiable reward: ascent on the initial noise, through the whole sampling run."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Sequence

import torch
from diffusers.utils import logging

from ..errors import InputError, NumericalError, TrajectoryError
from ..fisher.estimator import FisherEstimator
from ..schedulers import FisherSchedulerMixin, Trajectory
from . import checks
from .checks import Prompts, Reward
from .movers import NormalisedAscent, OptimizerFactory, TorchAscent, Variables, shell_distance
from .output import COMPLETED
from .text import TextEmbedding
from .whiteness import NoiseLayout, NoiseWhiteness, noise_whiteness

logger = logging.get_logger(f"diffusers.{__name__}")

VARIABLES = ("noise", "text", "control")


@dataclasses.dataclass
class NoiseAscent:
    """Holds the best samples so far, and the history. `ascend_noise` fills it.

    Args:
        best_rewards: (B,) float64.
        best: tensors of the best samples: "images", "latents" (the run's end), "noise" and other optimised variables.
        initial: "images" and "latents" of the first run.
        first_run: number of the first run; that of a later phase of a guidance is not 0.
        mover: what takes the steps; None before the first step.
    """

    best_rewards: torch.Tensor
    best: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    initial: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    rewards: list[torch.Tensor] = dataclasses.field(default_factory=list)
    held_out_rewards: list[torch.Tensor] = dataclasses.field(default_factory=list)
    shell_distances: list[torch.Tensor] = dataclasses.field(default_factory=list)
    whiteness: list[NoiseWhiteness] = dataclasses.field(default_factory=list)
    gradient_norms: list[torch.Tensor] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    num_sampling_calls: int = 0
    runs_without_gain: int = 0
    first_run: int = 0
    mover: NormalisedAscent | TorchAscent | None = None
    status: str = COMPLETED

    @classmethod
    def after(cls, start: NoiseAscent | None, count: int) -> NoiseAscent:
        """Makes an ascent of `count` samples without runs, whose runs are numbered on from those of `start`."""
        first_run = 0 if start is None else start.first_run + len(start.rewards)
        mover = None if start is None else start.mover
        return cls(torch.full((count,), -torch.inf, dtype=torch.float64), first_run=first_run, mover=mover)

    def stop(self, status: str) -> None:
        """Ends the ascent because of an error, and warns."""
        self.status = status
        logger.warning("Guidance %s The best so far is returned.", status)

    def record(
        self, rewards: torch.Tensor, held_out: torch.Tensor | None, whiteness: NoiseWhiteness,
        tensors: dict[str, torch.Tensor],
    ) -> torch.Tensor:  # fmt: skip
        """Records one run's rewards and keeps, sample by sample, the better of old and new.

        Returns:
            (B,) bool: whether the run's reward is the sample's best so far.
        """
        rewards = rewards.detach().double().cpu()
        self.rewards.append(rewards)
        if held_out is not None:
            self.held_out_rewards.append(held_out)
        self.shell_distances.append(shell_distance(tensors["noise"]))
        self.whiteness.append(whiteness)
        is_best = rewards > self.best_rewards
        self.best_rewards = torch.where(is_best, rewards, self.best_rewards)
        self.runs_without_gain = 0 if bool(is_best.any()) else self.runs_without_gain + 1
        if not self.best:
            self.best = {name: tensor.detach().clone() for name, tensor in tensors.items()}
            self.initial = {name: self.best[name].clone() for name in ("images", "latents")}
        for name, tensor in tensors.items():
            mask = is_best.to(tensor.device)
            self.best[name][mask] = tensor.detach()[mask]
        return is_best


@dataclasses.dataclass
class GuidedRun:
    """Runs the sampling once, with its rewards and their gradients, as a function of the optimised variables.

    Args:
        sample: function from noise (B, ...) to final latents, one run of `scheduler`.
        decode: differentiable function from latents to images (B, 3, H, W) in [0, 1].
        reward: function of images and prompts.
        prompts: one prompt or class label per sample.
        scheduler: differentiable scheduler that `sample` runs on.
        estimator: estimator of the diffusion Fisher, which takes the place of the denoiser's Jacobian.
        held_out_reward: reward that is recorded and not optimised.
        optimise: names of the variables that move: "noise", "text" (with `text`), "control" (added to the model's
            output at every step, zero at first).
        text: embedding that `sample` and `estimator` use.
        layout: brings the noise to (B, C, ...) and back, for its whiteness.
    """

    sample: Callable[[torch.Tensor], torch.Tensor]
    decode: Callable[[torch.Tensor], torch.Tensor]
    reward: Reward
    prompts: Prompts
    scheduler: FisherSchedulerMixin
    estimator: FisherEstimator
    held_out_reward: Reward | None = None
    optimise: Collection[str] = ("noise",)
    text: TextEmbedding | None = None
    layout: NoiseLayout = dataclasses.field(default_factory=NoiseLayout)

    def __call__(
        self, variables: dict[str, torch.Tensor], step: int, with_gradient: bool, ascent: NoiseAscent
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, torch.Tensor]]:
        """Runs the sampling, and records its rewards and images in `ascent`.

        Args:
            variables: "noise", and from the second run on "text" and "control" where they are optimised.

        Returns:
            All variables; whether the reward is the sample's best so far, (B,); and the gradients of the variables
            that are optimised (none without `with_gradient`).
        """
        controls = self._set_variables(variables)
        # The runs differ in their noise alone, so the first one shows whether the denoiser is theirs.
        estimator = self.estimator.without_comparison() if ascent.rewards else self.estimator
        with self.scheduler.differentiable(estimator, controls=controls) as trajectory:
            latents = self.sample(variables["noise"])
        _check_end(latents, trajectory, step)
        ascent.num_sampling_calls += len(trajectory.states)
        variables = dict(variables)
        if controls is not None:
            variables["control"] = torch.stack([control.detach() for control in controls], dim=1)
        if self.text is not None:
            variables["text"] = self.text.value.detach()
        with torch.set_grad_enabled(with_gradient):
            images = self.decode(latents)
            rewards = checks.reward_in_run(self.reward, images, self.prompts, f"run {step}", latents)
            total = rewards.sum()  # here, because the caller may be under no_grad
        held_out = self._evaluate_held_out(images.detach().clone(), step, ascent)  # the reward may change its images
        whiteness = noise_whiteness(self.layout.unpack(variables["noise"]))
        is_best = ascent.record(rewards, held_out, whiteness, {**variables, "images": images, "latents": latents})
        if not with_gradient:
            return variables, is_best, {}
        if trajectory.states and not latents.requires_grad:
            raise TrajectoryError(
                f"In run {step}, something replaced the latents after the scheduler's last step, a callback say, and "
                "with them the way back to the noise. Leave what the last step returns as it is."
            )
        if not rewards.requires_grad:
            raise checks.gradient_error(self.reward)
        return variables, is_best, self._gradients(trajectory, total, variables["noise"].dtype)

    @torch.no_grad()
    def try_held_out_reward(self, noise: torch.Tensor) -> None:
        """Refuses a held-out reward of the wrong shape before the first run. Raises `InputError`."""
        if self.held_out_reward is not None:
            image = self.decode(noise[:1])  # only its size and device are used
            checks.check_reported(self.held_out_reward, (len(noise), *image.shape[1:]), self.prompts, image.device)

    @torch.no_grad()
    def _evaluate_held_out(self, images: torch.Tensor, step: int, ascent: NoiseAscent) -> torch.Tensor | None:
        """Returns the held-out rewards (B,) float64, NaN where they are not finite; None without such a reward."""
        if self.held_out_reward is None:
            return None
        values = checks.checked_reward(self.held_out_reward, images, self.prompts, finite=False).double().cpu()
        finite = torch.isfinite(values)
        if not finite.all() and all(bool(torch.isfinite(row).all()) for row in ascent.held_out_rewards):
            logger.warning(
                "The held-out reward %s is not finite in run %d: %s. Such values are recorded as NaN, here and in "
                "later runs; the guidance goes on.", checks.name_of(self.held_out_reward), step, values.tolist(),
            )  # fmt: skip
        return torch.where(finite, values, torch.nan)

    def _set_variables(self, variables: dict[str, torch.Tensor]) -> list[torch.Tensor] | None:
        """Sets the text for a run, and returns the controls as the scheduler takes them; None without controls."""
        if self.text is not None:
            self.text.gradient = None
            if "text" in variables:
                self.text.value = variables["text"]
        if "control" not in self.optimise:
            return None
        before = variables["control"].unbind(1) if "control" in variables else ()
        return [control.clone().requires_grad_() for control in before]

    def _gradients(
        self, trajectory: Trajectory, total: torch.Tensor, noise_dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        if "control" in self.optimise:
            noise, controls = trajectory.gradients(total)
            gradients = {"noise": noise, "control": torch.stack(controls, dim=1)}
        else:
            gradients = {"noise": trajectory.gradient(total)}
        gradients["noise"] = gradients["noise"].to(noise_dtype)  # a run in float64 starts from noise in float32
        if self.text is not None and self.text.gradient is not None:
            gradients["text"] = self.text.gradient
        for name, gradient in gradients.items():
            if not torch.isfinite(gradient).all():
                raise NumericalError(f"The gradient of the {name} is not finite.")
        gradients = {name: gradients[name] for name in VARIABLES if name in self.optimise}
        stand_still = not any(bool(gradient.any()) for gradient in gradients.values())
        is_closed_form = not (self.estimator.needs_graph or self.estimator.calls_per_product)
        if stand_still and is_closed_form and bool((trajectory.states[0].level.alpha == 0).all()):
            raise InputError(
                f"With {type(self.estimator).__name__} the gradient is zero: the noise reaches the image through a "
                "prediction at pure noise alone (alpha = 0), which it takes to be the same for every noise. Use "
                "AutodiffFisher(), or more steps."
            )
        return gradients


@dataclasses.dataclass(frozen=True)
class AscentSettings:
    """Says how far and by which steps an ascent goes.

    Args:
        num_guidance_steps: number of gradient steps; 0 samples and scores.
        step_size: step size of normalised ascent, see `NormalisedAscent`.
        optimizer: makes an optimiser of torch.optim, instead of normalised ascent.
        patience: number of runs without a new best of any sample after which the ascent stops; None: it never does.
        noise_projection: how every step brings the noise back to white noise, see `project_to_white`; None: it does
            not.
    """

    num_guidance_steps: int = 10
    step_size: float = 0.2
    optimizer: OptimizerFactory | None = None
    patience: int | None = None
    noise_projection: str | None = None

    def make_mover(self, variables: Variables, noise: torch.Tensor) -> NormalisedAscent | TorchAscent:
        """Makes what takes the steps, from the first values of the variables and from the initial noise."""
        if self.optimizer is None:
            return NormalisedAscent(variables, noise, self.step_size)
        return TorchAscent(variables, self.optimizer)


OnRun = Callable[[NoiseAscent], bool | None]
"""`on_run(ascent)` is called after every run, and returns True to stop the guidance."""


def ascend_noise(
    run: GuidedRun,
    noise: torch.Tensor,
    settings: AscentSettings,
    on_run: OnRun = lambda ascent: None,
    start: NoiseAscent | None = None,
) -> NoiseAscent:
    """Raises the reward by gradient steps on the initial noise, and on request on other variables of the run.

    Args:
        run: sampling run with its reward. The shape of a held-out reward is tried before the first run, for which one
            sample is decoded.
        noise: (B, ...) float32 initial noise.
        on_run: called after each of the `num_guidance_steps + 1` runs.
        start: an earlier ascent, from whose best variables this one goes on; None: it begins with `noise`.

    Cost: `num_guidance_steps + 1` sampling runs and decodes, `num_guidance_steps` decoder and reward gradients, and
    the estimator's products. The denoiser never builds a graph, unless the estimator does, or the text is optimised.

    Raises:
        InputError: noise that is all zero, a reward of the wrong kind. TrajectoryError: `sample` returns other latents
            than the scheduler's last step. NumericalError: in the first run, images or a reward that are not
            finite; later, and for gradients, the ascent stops there, and its `status` says so.
    """
    steps, patience = settings.num_guidance_steps, settings.patience
    ascent = NoiseAscent.after(start, len(noise))
    best = {"noise": noise} if start is None else start.best
    variables = {name: best[name] for name in VARIABLES if name in best}
    noise = variables["noise"]
    if steps > 0 and settings.optimizer is None and not bool((checks.norms(noise) > 0).all()):
        raise InputError(
            "A sample of the initial noise is all zero, so there is no sphere to move it on; draw it anew."
        )
    if start is None:
        run.try_held_out_reward(noise)
    for step in range(steps + 1):
        begin, number = time.perf_counter(), ascent.first_run + step
        try:
            variables, is_best, gradients = run(variables, number, step < steps, ascent)
            if gradients:
                parts = torch.stack([checks.normalise(gradient)[1] for gradient in gradients.values()])
                ascent.gradient_norms.append(torch.linalg.vector_norm(parts, dim=0))
                if ascent.mover is None:
                    _warn_of_flat_rewards(ascent.gradient_norms[0], run.reward)
                moving = {name: variables[name] for name in gradients}
                ascent.mover = ascent.mover or settings.make_mover(moving, noise)
                variables |= ascent.mover.move(moving, gradients, is_best)
                if settings.noise_projection is not None and "noise" in moving:
                    variables["noise"] = run.layout.project(variables["noise"], settings.noise_projection)
        except NumericalError as error:
            if not ascent.rewards:  # nothing to return
                raise
            ascent.stop(f"stopped in run {number}: {error}")
        if len(ascent.rewards) == step + 1:
            ascent.seconds.append(time.perf_counter() - begin)
            if on_run(ascent) and ascent.status == COMPLETED and step < steps:
                ascent.status = f"stopped by the callback after run {number}"
        if patience is not None and ascent.runs_without_gain >= patience and step < steps:
            ascent.status = f"stopped after {patience} runs without a new best"
        if ascent.status != COMPLETED:
            break
    return ascent


def score_candidates(run: GuidedRun, candidates: Sequence[torch.Tensor], on_run: OnRun) -> NoiseAscent:
    """Returns the best of several initial noises, (B, ...) each, sample by sample, after one run of each.

    Raises `InputError` and `NumericalError` as `ascend_noise` does.
    """
    ascent = NoiseAscent.after(None, len(candidates[0]))
    run.try_held_out_reward(candidates[0])
    for number, noise in enumerate(candidates):
        begin = time.perf_counter()
        try:
            run({"noise": noise}, number, False, ascent)
        except NumericalError as error:
            if not ascent.rewards:  # nothing to return
                raise
            ascent.stop(f"stopped in run {number}: {error}")
            break
        ascent.seconds.append(time.perf_counter() - begin)
        if on_run(ascent) and number + 1 < len(candidates):
            ascent.status = f"stopped by the callback after run {number}"
            break
    return ascent


def _check_end(latents: torch.Tensor, trajectory: Trajectory, step: int) -> None:
    """Refuses the end of run `step` if it is not finite. Raises `NumericalError`, which names what came first."""
    if torch.isfinite(latents).all():
        return
    states = trajectory.states
    finite = [bool(torch.isfinite(state.model_output).all()) for state in states]
    if all(finite):
        cause = "All outputs of the network are finite, so check the settings of the scheduler and its number of steps"
    else:
        first = finite.index(False)
        size = float(states[first].sample.abs().max())
        cause = f"The network's output is not finite from evaluation {first} on, where its sample reaches {size:.3g}"
    raise NumericalError(
        f"The latents at the end of run {step} are not finite, after {len(states)} evaluations in {latents.dtype}. "
        f"{cause}."
    )


def _warn_of_flat_rewards(gradient_norms: torch.Tensor, reward: Reward) -> None:
    """Warns of samples that can't move because their first gradient is zero."""
    indices = (gradient_norms == 0).nonzero().flatten().tolist()
    if indices:
        logger.warning(
            "The gradient of the reward %s is zero for samples %s, which do not move: the reward does not change with "
            "the image there, or its gradient is lost to rounding.", checks.name_of(reward), indices,
        )  # fmt: skip
