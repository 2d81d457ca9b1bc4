"""Baselines of guidance by a reward: best of N, noise optimisation, guidance step by step, particles.

Every method is a generator `method(task, strength)` that yields images, one per prompt, whenever it has new ones. Most
of them never end: whoever iterates stops at the end of the budget. All run on one deterministic sampler, which is DDIM
for diffusion and Euler for flow matching, and count in `task.counts` how many samples they evaluate. Gradients are
divided by their norm, so that a strength means the same for every reward.

Notation: x_t = alpha x_0 + sigma eps.
"""

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from diffusers_fisher import PipelineDenoiser
from diffusers_fisher.backbones import backbone_of
from diffusers_fisher.guidance.checks import normalise, norms
from diffusers_fisher.guidance.movers import NormalisedAscent
from diffusers_fisher.noise import noise_schedule

FEW_STEPS = 5  # of the cheap runs of `guide`
CLIPPED_NORM, NORM_WEIGHT, MOMENTUM = 0.1, 0.01, 0.9  # of ReNO
TRAVEL_ROUNDS = 2  # of FreeDoM: how often each step in the middle of the run is taken
RESAMPLINGS = 5  # of FK steering: number of equal parts of the run, at whose ends particles are resampled
MIN_PARTICLES = 8

Images = Iterator[torch.Tensor]


class Sampler:
    """Runs a pipeline's network by first-order steps, and counts the samples that it evaluates.

    Args:
        pipe: a pipeline that has a backbone.
        counts: gets the numbers of samples of each kind: `name` "denoise" or "decode", with " backward" behind it
            where a graph is built.
        name: stands before the kinds.
    """

    def __init__(
        self, pipe: Any, prompts: Sequence[str], guidance_scale: float, steps: int, counts: Counter[str],
        name: str = "",
    ):  # fmt: skip
        self._denoiser = PipelineDenoiser(pipe, guidance_scale=guidance_scale, prompt=list(prompts))
        self._decode, self._counts, self._name = backbone_of(pipe).decode, counts, name
        scheduler = copy.deepcopy(pipe.scheduler)
        scheduler.set_timesteps(steps)
        schedule = noise_schedule(scheduler)
        self._timesteps = list(scheduler.timesteps)
        levels = [*map(schedule.level_at, self._timesteps), schedule.final_level()]
        self.alphas, self.sigmas = ([float(getattr(level, key)) for level in levels] for key in ("alpha", "sigma"))

    def __len__(self) -> int:
        return len(self._timesteps)

    def predict(self, x: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the predicted clean sample and the predicted noise, with a graph where `x` asks for one."""
        self._count("denoise", x)
        state = self._denoiser.state(x, self._timesteps[step])
        return state.pred_original_sample, state.epsilon

    def move(
        self, clean: torch.Tensor, noise: torch.Tensor, step: int, fresh: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns the sample after a step; with `fresh` noise the step is ancestral (DDIM with eta = 1)."""
        (alpha, next_alpha), (sigma, next_sigma) = self.alphas[step : step + 2], self.sigmas[step : step + 2]
        if fresh is None:
            return next_alpha * clean + next_sigma * noise
        variance = next_sigma**2 * (1 - (alpha * next_sigma / (next_alpha * sigma)) ** 2)
        return next_alpha * clean + (next_sigma**2 - variance) ** 0.5 * noise + variance**0.5 * fresh

    def back(self, x: torch.Tensor, step: int, fresh: torch.Tensor) -> torch.Tensor:
        """Returns a sample at the beginning of a step, from one at its end, by adding noise."""
        ratio = self.alphas[step] / self.alphas[step + 1]
        return ratio * x + (self.sigmas[step] ** 2 - (ratio * self.sigmas[step + 1]) ** 2) ** 0.5 * fresh

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        self._count("decode", x)
        return self._decode(x)

    def images(self, noise: torch.Tensor) -> torch.Tensor:
        """Returns the images of a whole run, with a graph where `noise` asks for one."""
        x = noise
        for step in range(len(self)):
            x = self.move(*self.predict(x, step), step)
        return self.decode(x)

    def _count(self, kind: str, x: torch.Tensor) -> None:
        backward = " backward" * (x.requires_grad and torch.is_grad_enabled())
        self._counts[f"{self._name}{kind}{backward}"] += len(x)


@dataclasses.dataclass
class Task:
    """Holds what a method guides.

    Args:
        pipe: the pipeline, which has the method `guide`.
        reward: `reward(images, prompts) -> (B,)`.
        noise: (B, C, h, w) first initial noise.
        spread: standard deviation of the reward over images without guidance.
        budget: cost that the method may have, by `prices`.
        prices: seconds per sample of every kind that `Sampler` counts.
        student: a pipeline that makes images in one step; None: there is none.
        seed: seed of all noise but the first.
    """

    pipe: Any
    reward: Callable[[torch.Tensor, Any], torch.Tensor]
    prompts: Sequence[str]
    noise: torch.Tensor
    steps: int
    guidance_scale: float
    spread: float = 1.0
    budget: float = float("inf")
    prices: dict[str, float] = dataclasses.field(default_factory=dict)
    student: Any = None
    seed: int = 0
    counts: Counter[str] = dataclasses.field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)

    @property
    def cost(self) -> float:
        return sum(self.prices[kind] * count for kind, count in self.counts.items())

    def sampler(self, copies: int = 1) -> Sampler:
        """Returns the sampler of `copies` samples per prompt: all prompts, and then all of them again."""
        return Sampler(self.pipe, list(self.prompts) * copies, self.guidance_scale, self.steps, self.counts)

    def draw(self, copies: int = 1) -> torch.Tensor:
        """Draws noise; the next draws are others."""
        return torch.randn(copies * len(self.noise), *self.noise.shape[1:], generator=self._generator)

    def noises(self) -> Iterator[torch.Tensor]:
        """Yields the first initial noise, and then further ones."""
        yield self.noise
        while True:
            yield self.draw()

    def rewards(self, images: torch.Tensor) -> torch.Tensor:
        return self.reward(images, list(self.prompts))

    def gradient(self, sampler: Sampler, clean: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
        """Returns the unit gradient with respect to `leaf` of the reward of a clean sample that depends on it."""
        return normalise(torch.autograd.grad(self.rewards(sampler.decode(clean)).sum(), leaf)[0])[0]


def best_of_n(task: Task, strength: float | None) -> Images:
    """Draws noise after noise."""
    sampler = task.sampler()
    for noise in task.noises():
        yield sampler.images(noise)


def exact_ascent(task: Task, strength: float) -> Images:
    """Steps of `strength` noise norms along the exact gradient, on the noise's sphere, halved after a loss."""
    sampler, noise, best = task.sampler(), task.noise, torch.full((len(task.noise),), -torch.inf)
    ascent = NormalisedAscent({"noise": noise}, noise, strength)
    while True:
        with torch.enable_grad():
            images = sampler.images(noise.requires_grad_())
            rewards = task.rewards(images)
            total = rewards.sum()
        yield images.detach()
        (gradient,) = torch.autograd.grad(total, noise)
        is_best, best = rewards > best, torch.maximum(rewards.detach(), best)
        noise = ascent.move({"noise": noise.detach()}, {"noise": gradient}, is_best)["noise"]


def direct_noise_optimisation(task: Task, strength: float) -> Images:
    """DNO (Tang et al., 2405.18881): Adam of rate `strength` on the noise, by back-propagation through the run."""
    sampler, noise = task.sampler(), task.noise.clone().requires_grad_()
    optimizer = torch.optim.Adam([noise], lr=strength)
    while True:
        with torch.enable_grad():
            images = sampler.images(noise)
            total = task.rewards(images).sum()
        yield images.detach()
        (gradient,) = torch.autograd.grad(total, noise)
        noise.grad = -gradient
        optimizer.step()


def reno(task: Task, strength: float) -> Images:
    """ReNO (Eyring et al., 2406.04312): ascent of rate `strength` on the noise of a model of one step.

    A likelihood of the noise's norm holds it near its sphere. Gradients are cut to a norm of 0.1.
    """
    scale = 1.0  # the teacher's guidance is part of the student
    sampler = Sampler(task.student, task.prompts, scale, 1, task.counts, "student ")
    noise = task.noise.clone().requires_grad_()
    optimizer = torch.optim.SGD([noise], lr=strength, momentum=MOMENTUM, nesterov=True)
    while True:
        with torch.enable_grad():
            images = sampler.decode(sampler.predict(noise, 0)[0])
        yield images.detach()
        with torch.enable_grad():
            norm = norms(noise).flatten()
            likelihood = (noise[0].numel() - 1) * norm.log() - norm**2 / 2
            loss = -task.rewards(images).sum() / task.spread - NORM_WEIGHT * likelihood.sum()
        (gradient,) = torch.autograd.grad(loss, noise)
        noise.grad = gradient * (CLIPPED_NORM / norms(gradient).clamp(min=CLIPPED_NORM))
        optimizer.step()


def mpgd(task: Task, strength: float) -> Images:
    """MPGD (He et al., 2311.16424): every predicted clean sample moves along the reward's gradient at it."""
    sampler = task.sampler()
    for x in task.noises():
        for step in range(len(sampler)):
            clean, noise = sampler.predict(x, step)
            with torch.enable_grad():
                leaf = clean.detach().requires_grad_()
                direction = task.gradient(sampler, leaf, leaf)
            length = strength * sampler.sigmas[step] * norms(noise)
            x = sampler.move(clean + length * direction, noise, step)
        yield sampler.decode(x)


def dps(task: Task, strength: float) -> Images:
    """DPS (Chung et al., 2209.14687): after every step the sample moves along the gradient through the network.

    The move has the same length at all steps, as theirs has, which is divided by the root of the loss.
    """
    sampler = task.sampler()
    for x in task.noises():
        for step in range(len(sampler)):
            x, direction = _step_and_direction(task, sampler, x, step)
            x = x + strength * norms(task.noise) * direction
        yield sampler.decode(x)


def freedom(task: Task, strength: float) -> Images:
    """FreeDoM (Yu et al., 2303.09833): as DPS, but moves shrink with the noise, and steps in the middle are repeated.

    Before a step is repeated ("time travel"), noise brings the sample back to the step's beginning.
    """
    sampler = task.sampler()
    for x in task.noises():
        for step in range(len(sampler)):
            is_middle = 0.3 <= step / len(sampler) <= 0.7
            for round_index in range(TRAVEL_ROUNDS if is_middle else 1):
                if round_index:
                    x = sampler.back(x, step, task.draw())
                x, direction = _step_and_direction(task, sampler, x, step)
                x = x + strength * sampler.sigmas[step] * norms(task.noise) * direction
        yield sampler.decode(x)


def _step_and_direction(task: Task, sampler: Sampler, x: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the sample after a step, and the unit gradient of the predicted clean sample's reward at `x`."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        clean, noise = sampler.predict(leaf, step)
        direction = task.gradient(sampler, clean, leaf)
    return sampler.move(clean.detach(), noise.detach(), step), direction


def fk_steering(task: Task, strength: float) -> Images:
    """FK steering (Singhal et al., 2501.06848): particles of an ancestral sampler, resampled by their rewards.

    A particle's weight is exp(strength r / spread), with r the largest reward of its predicted clean samples so far.
    There are as many particles as the budget allows, at least 8. It yields once, the best particle of every prompt.
    """
    run_cost = task.steps * task.prices["denoise"] + (RESAMPLINGS + 1) * task.prices["decode"]
    particles = max(MIN_PARTICLES, int(task.budget / (run_cost * len(task.prompts))))
    sampler, x = task.sampler(particles), task.draw(particles)
    best = torch.full((particles, len(task.prompts)), -torch.inf)
    generator = torch.Generator().manual_seed(1)
    resampled = {round(len(sampler) * part / RESAMPLINGS) for part in range(1, RESAMPLINGS)} - {0}
    for step in range(len(sampler)):
        clean, noise = sampler.predict(x, step)
        if step in resampled:
            best = torch.maximum(best, _particle_rewards(task, sampler.decode(clean), particles))
            ancestors = resample(strength * best / task.spread, generator)
            best = best.gather(0, ancestors)
            clean, noise = (choose(each, ancestors) for each in (clean, noise))
        x = sampler.move(clean, noise, step, task.draw(particles))
    images = sampler.decode(x)
    winner = _particle_rewards(task, images, particles).argmax(0, keepdim=True)
    yield choose(images, winner)


def _particle_rewards(task: Task, images: torch.Tensor, particles: int) -> torch.Tensor:
    """Returns the rewards (particles, B) of images (particles B, ...)."""
    return torch.stack([task.rewards(each) for each in images.chunk(particles)]).float()


def resample(log_weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draws the ancestors (particles, B) of new particles by log weights (particles, B)."""
    return torch.multinomial(log_weights.softmax(0).T, len(log_weights), replacement=True, generator=generator).T


def choose(x: torch.Tensor, particles: torch.Tensor) -> torch.Tensor:
    """Returns for every prompt the particles (n, B) of x (particles B, ...), as (n B, ...)."""
    count = particles.shape[1]
    return x[(particles * count + torch.arange(count)).flatten()]


def guided(task: Task, strength: float, few_steps: bool = False) -> Images:
    """`guide` with its defaults, or with cheap runs; it takes as many steps as the budget allows, and yields once."""
    steps = FEW_STEPS if few_steps else task.steps
    price, count = task.prices, len(task.prompts)
    full_run = (task.steps * price["denoise"] + price["decode"]) * count
    step_cost = ((steps + 1) * price["denoise"] + price["decode backward"]) * count
    iterations = max(1, int((task.budget - full_run) / step_cost))
    out = task.pipe.guide(
        list(task.prompts), task.reward, latents=task.noise, num_guidance_steps=iterations, step_size=strength,
        num_inference_steps=task.steps, guidance_scale=task.guidance_scale, output_type="pt",
        num_guidance_inference_steps=steps if few_steps else None, generator=torch.Generator().manual_seed(task.seed),
    )  # fmt: skip
    task.counts["denoise"] += out.num_denoiser_calls * count
    task.counts["decode backward"] += iterations * count
    task.counts["decode"] += (1 + few_steps) * count
    yield out.images


def guided_by_few_steps(task: Task, strength: float) -> Images:
    return guided(task, strength, few_steps=True)


@dataclasses.dataclass(frozen=True)
class Method:
    """Holds a method, the strengths among which its own is searched, and whether it ends with its budget."""

    run: Callable[[Task, Any], Images]
    strengths: tuple[float | None, ...]
    yields_once: bool = False


STEP_SIZES = (0.05, 0.1, 0.2, 0.4, 0.8)
METHODS: dict[str, Method] = {
    "guide, few steps": Method(guided_by_few_steps, STEP_SIZES, yields_once=True),
    "guide, full runs": Method(guided, STEP_SIZES, yields_once=True),
    "best of N": Method(best_of_n, (None,)),
    "exact ascent": Method(exact_ascent, STEP_SIZES),
    "DNO": Method(direct_noise_optimisation, (0.02, 0.05, 0.1, 0.2, 0.4)),
    "ReNO, student": Method(reno, (0.3, 1.0, 3.0, 10.0, 30.0)),
    "MPGD": Method(mpgd, (0.1, 0.2, 0.4, 0.8, 1.6)),
    "DPS": Method(dps, (0.01, 0.02, 0.05, 0.1, 0.2)),
    "FreeDoM": Method(freedom, (0.02, 0.05, 0.1, 0.2, 0.4)),
    "FK steering": Method(fk_steering, (0.5, 1.0, 2.0, 4.0, 8.0), yields_once=True),
}
NEEDS_STUDENT = ("ReNO, student",)
