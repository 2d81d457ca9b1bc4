"""Generation steered by a differentiable reward: ascent on the initial noise, through the whole sampling run."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.utils import BaseOutput

from ..errors import InputError, NumericalError, TrajectoryError
from ..fisher.operator import FisherEstimator

Reward = Callable[[torch.Tensor, Sequence[str]], torch.Tensor]
"""`reward(images, prompts) -> rewards`: images (B, 3, H, W) in [0, 1] with a graph, rewards (B,), higher is better."""


@dataclasses.dataclass
class GuidanceOutput(BaseOutput):
    """The best image of every sample, and how it was reached.

    Args:
        images: PIL images, array or tensor, by `output_type`.
        rewards: (guidance steps + 1, B) float64, of the image that each step started from; the last row is the end.
        best_rewards: (B,) float64, the largest of each column.
        latents: (B, ...) float32 initial noise of the best images; pass it as `latents` to get them again.
        gradient_norms: (guidance steps, B) float64, norm of d reward / d noise.
        seconds: (guidance steps + 1,) float64, wall time of each sampling run with its gradient.
        num_denoiser_calls: evaluations of the denoiser by the sampling runs and the estimator together.
        nsfw_content_detected: per image, where the pipeline has a safety checker; empty otherwise.
    """

    images: Any
    rewards: torch.Tensor
    best_rewards: torch.Tensor
    latents: torch.Tensor
    gradient_norms: torch.Tensor
    seconds: torch.Tensor
    num_denoiser_calls: int
    nsfw_content_detected: list[bool] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class NoiseAscent:
    """The best found so far, and the history. Filled by `ascend_noise`."""

    best_images: torch.Tensor
    best_noise: torch.Tensor
    best_rewards: torch.Tensor
    rewards: list[torch.Tensor] = dataclasses.field(default_factory=list)
    gradient_norms: list[torch.Tensor] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    num_sampling_calls: int = 0

    def record(self, noise: torch.Tensor, images: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
        """Notes one run's rewards and keeps, sample by sample, the better of old and new.

        Returns:
            (B,) bool on the images' device: where the new is the best so far.
        """
        rewards = rewards.detach().double().cpu()
        self.rewards.append(rewards)
        better = rewards > self.best_rewards
        chosen = better.to(images.device)
        self.best_rewards = torch.where(better, rewards, self.best_rewards)
        if len(self.rewards) == 1:
            self.best_images = images.detach().clone()
        self.best_images[chosen] = images.detach()[chosen]
        self.best_noise[chosen] = noise[chosen]
        return chosen


def ascend_noise(
    sample: Callable[[torch.Tensor], torch.Tensor],
    decode: Callable[[torch.Tensor], torch.Tensor],
    reward: Reward,
    noise: torch.Tensor,
    prompts: Sequence[str],
    scheduler: Any,
    estimator: FisherEstimator,
    num_guidance_steps: int,
    step_size: float,
    on_step: Callable[[torch.Tensor], None] = lambda rewards: None,
) -> NoiseAscent:
    """Normalised gradient ascent of the reward on the noise's sphere.

    Each step moves every sample along its own gradient and projects back to the norm it had, which keeps Gaussian
    noise typical. The first step's length is `step_size` times the norm; a sample's step is halved whenever its reward
    was no better than the best before, so that near an optimum it does not overshoot for ever.

    Args:
        sample: noise (B, ...) to final latents, one run of `scheduler`.
        decode: latents to images (B, 3, H, W) in [0, 1], differentiable.
        noise: (B, ...) float32 initial noise.
        scheduler: the differentiable scheduler that `sample` runs on.
        on_step: called with the rewards (B,) after each of the `num_guidance_steps + 1` runs.

    Cost: `num_guidance_steps + 1` sampling runs and decodes, `num_guidance_steps` decoder and reward gradients, and
    the estimator's products. The denoiser never builds a graph, unless the estimator does.

    Raises:
        InputError: noise that is all zero, a reward of the wrong kind. TrajectoryError: `sample` gives other latents
            than the scheduler's last step did. NumericalError: images, a reward or a gradient that are not finite.
    """
    norms = _norms(noise)
    if num_guidance_steps > 0 and not bool((norms > 0).all()):
        raise InputError(
            "A sample of the initial noise is all zero, so there is no sphere to move it on; draw it anew."
        )
    nothing = torch.full((len(noise),), -torch.inf, dtype=torch.float64)
    ascent = NoiseAscent(best_images=noise.new_empty(0), best_noise=noise.clone(), best_rewards=nothing)
    lengths = step_size * norms
    for step in range(num_guidance_steps + 1):
        begin = time.perf_counter()
        with scheduler.differentiable(estimator) as trajectory:
            latents = sample(noise)
        ascent.num_sampling_calls += len(trajectory.states)
        with torch.set_grad_enabled(step < num_guidance_steps):
            images = decode(latents)
            _check_images(images, step)
            rewards = checked_reward(reward, images, prompts)
            total = rewards.sum()  # here, because the caller may be under no_grad
        improved = ascent.record(noise, images, rewards).reshape(norms.shape).to(norms.device)
        lengths = torch.where(improved, lengths, lengths / 2)
        if step < num_guidance_steps:
            _check_connected(trajectory, latents, rewards, reward, step)
            direction, length = _unit(trajectory.gradient(total))
            ascent.gradient_norms.append(length)
            moved = noise + lengths * direction
            noise = (moved * (norms / _norms(moved))).detach()  # where nothing moved, bit for bit
        ascent.seconds.append(time.perf_counter() - begin)
        on_step(ascent.rewards[-1])
    return ascent


def checked_reward(reward: Reward, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """Calls the reward and checks its shape and values.

    Raises:
        InputError: not a tensor of shape (B,). NumericalError: not finite.
    """
    values = reward(images, prompts)
    if not isinstance(values, torch.Tensor) or values.shape != (len(images),):
        got = f"shape {tuple(values.shape)}" if isinstance(values, torch.Tensor) else f"a {type(values).__name__}"
        raise InputError(
            f"The reward {name_of(reward)} returned {got} for {len(images)} images; it must return a tensor of shape "
            f"({len(images)},), one number an image, higher is better."
        )
    if not torch.isfinite(values).all():
        raise NumericalError(f"The reward {name_of(reward)} is not finite: {values.detach().cpu().tolist()}.")
    return values


def check_differentiable(reward: Reward, shape: Sequence[int], prompts: Sequence[str], device: torch.device) -> None:
    """Tries the reward on smooth ramps before any sampling.

    Raises:
        InputError: autograd finds no way from the images to the reward. TrajectoryError: torch.inference_mode is on.
    """
    if torch.is_inference_mode_enabled():
        raise TrajectoryError(
            "Guidance needs gradients, which torch.inference_mode forbids whatever is set inside it; use "
            "torch.no_grad instead, or nothing: the denoiser builds no graph in any case."
        )
    with torch.enable_grad():
        # No two pixels alike: a reward that divides by the images' contrast is fine on real ones.
        ramp = torch.linspace(0.25, 0.75, math.prod(shape), device=device)
        images = ramp.reshape(tuple(shape)).requires_grad_()
        values = checked_reward(reward, images, prompts)
        connected = values.requires_grad and (
            torch.autograd.grad(values.sum(), images, allow_unused=True)[0] is not None
        )
    if not connected:
        raise _not_differentiable(reward)


def name_of(reward: Any) -> str:
    """The reward's name for messages."""
    return f"'{getattr(reward, '__name__', type(reward).__name__)}'"


def _not_differentiable(reward: Reward) -> InputError:
    return InputError(
        f"The reward {name_of(reward)} is not differentiable with respect to the images: it returned a tensor without "
        "a graph to them. Keep to torch operations on the tensor; processors that go through PIL or numpy, `.item()`, "
        "`.detach()`, argmax and torch.no_grad cut gradients."
    )


def _check_connected(trajectory: Any, latents: torch.Tensor, rewards: torch.Tensor, reward: Reward, step: int) -> None:
    """Refuses a run whose latents, or a reward whose values, have lost the graph to the noise."""
    if trajectory.states and not latents.requires_grad:
        raise TrajectoryError(
            f"In run {step}, something replaced the latents after the scheduler's last step, a callback say, and with "
            "them the way back to the noise. Leave what the last step returns as it is."
        )
    if not rewards.requires_grad:
        raise _not_differentiable(reward)


def _check_images(images: torch.Tensor, step: int) -> None:
    if not torch.isfinite(images).all():
        raise NumericalError(
            f"The images of run {step} are not finite. Half-precision autoencoders and denoisers are the usual cause: "
            "load the pipeline in float32 or bfloat16."
        )


def _unit(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every sample divided by its norm (zero where that is zero), and the norms (B,) float64 on the CPU.

    Scaled by the largest element first: squares of 1e20, which some estimators' gradients reach, overflow in float32.
    """
    flat = x.flatten(1)
    largest = flat.abs().amax(1, keepdim=True)
    scaled = flat / torch.where(largest > 0, largest, 1)
    norms = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    unit = (scaled / torch.where(norms > 0, norms, 1)).view_as(x)
    return unit, (largest.cpu().double() * norms.cpu().double())[:, 0]


def _norms(x: torch.Tensor) -> torch.Tensor:
    """Norm of every sample, (B, 1, ...)."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1).reshape(-1, *[1] * (x.ndim - 1))
