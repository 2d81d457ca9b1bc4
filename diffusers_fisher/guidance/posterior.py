"""Guidance step by step inside one sampling run: a callback that tilts the score toward a reward.

Notation: x_t = alpha x_0 + sigma eps, s = sigma/alpha, x0hat = E[x_0|x_t], J = d x0hat/d x_t = (alpha/sigma^2) C.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging

from ..arguments import check_kinds
from ..backbones import PipelineDenoiser, backbone_of
from ..backbones.networks import check_no_cache
from ..backbones.stock_calls import restore_attributes
from ..denoiser import Denoiser
from ..errors import InputError, NumericalError, TrajectoryError, UnsupportedError, check_floats
from ..fisher.agreement import check_states
from ..fisher.direct import DirectFisher
from ..fisher.estimator import FisherEstimator
from ..noise import DenoisingState, NoiseLevel, Timestep, expand, noise_schedule, state_of
from . import checks
from .checks import Reward, normalise, norms
from .output import COMPLETED

logger = logging.get_logger(f"diffusers.{__name__}")


@check_kinds
def posterior_guidance(
    pipe: Any,
    reward: Reward,
    prompts: str | Sequence[str] | None = None,
    *,
    strength: float = 0.2,
    estimator: FisherEstimator | None = None,
    decode: Callable[[torch.Tensor], torch.Tensor] | None = None,
    denoiser: Denoiser | None = None,
    adjoint_guidance_scale: float | None = None,
) -> PosteriorGuidance:
    """Makes a context manager that guides the runs of any pipeline inside its block, by `callback_on_step_end`.

        with posterior_guidance(pipe, reward, strength=0.2) as guidance:
            images = pipe(prompt, callback_on_step_end=guidance).images

    At every step the reward's gradient at the predicted clean sample, g = d reward(decode(x0hat))/d x0hat, is carried
    to the noisy sample by the denoiser's Jacobian, J^T g, and the score is tilted in that direction. With
    `DirectFisher`, where J = I/alpha, it is the gradient of MPGD (He et al., 2311.16424); with `AutodiffFisher`, the
    network's own vector-Jacobian product, that of DPS (Chung et al., 2209.14687) and FreeDoM (Yu et al., 2303.09833).
    `FiniteDifferenceFisher` and `GaussianFisher` lie between; endpoint forms need the run's end and are refused.

    Inside the block the guidance watches the scheduler's `step`, so that the callback knows the state from which a
    step began. It also watches the pipeline's `prepare_latents`: after this method it tries the reward on images of
    the run's number and size, before the denoiser's first evaluation. After the block the pipeline is as before.

    Args:
        pipe: a pipeline whose call takes `callback_on_step_end`; used as it is.
        reward: `reward(images, prompts) -> (B,)`, images (B, 3, H, W) in [0, 1] with a graph.
        prompts: prompts for the reward, one for all samples or one per sample; None: an empty prompt per sample, which
            rewards that compare images with their prompts refuse. The pipeline's own prompts are not read.
        strength: the tilt's size relative to the score: the score becomes score + strength alpha |score| u, with u
            the unit direction and alpha that of the variance-preserving sample. The predicted clean sample so moves
            by `strength` sigma |eps|, less than `strength` standard deviations of the noise at any level.
        estimator: estimator of the diffusion Fisher; None: `DirectFisher()`.
        decode: differentiable function from latents in the pipeline's layout to images (B, 3, H, W) in [0, 1]; None:
            the pipeline's autoencoder decodes. Packed latents (Flux) need the function.
        denoiser: bound to an estimator that needs a denoiser and has none. It must be the run's own function, with
            the call's prompts and guidance scale. None: at the first guided step of every run a denoiser is made of
            `prompts` and the call's guidance scale. Either is compared with the run's output there, by one evaluation.
        adjoint_guidance_scale: guidance scale of the estimator's denoiser where it is another than the call's on
            purpose; a denoiser that the estimator brings is then not compared. None: the call's.

    Returns:
        A context manager that gives its block the `PosteriorGuidance`, which is passed as `callback_on_step_end`.
        Cost: one decoding, one reward and their backward pass per step, and the estimator's product; once per size of
        images a reward and its backward pass for the trial, and with `decode` a decoding, for the images' size.

    Raises:
        InputError: `strength` not positive, something else than an estimator, a trace model of another denoiser;
            before the run's first evaluation, a reward of the wrong shape or not differentiable, prompts of the wrong
            number; at the first guided step, an estimator without a denoiser where there are no `prompts`, or where
            the denoiser made of them does not give the run's output.
        UnsupportedError: a pipeline without callbacks or autoencoder, a scheduler that is not known.
        TrajectoryError: the run did not get the callback, or the callback is called outside of the block; the
            scheduler is guided by another block, or used in another thread; torch.inference_mode.
        NumericalError: in the trial a reward, or at the first guided step images, a reward or a gradient that are not
            finite. At later ones the run goes on without guidance, and its `status` says so.
    """
    backbone_of(pipe)
    checks.check_callable(reward)
    if not 0 < strength < math.inf:
        raise InputError(f"`strength` is {strength}; allowed: positive, such as 0.2 of the score's norm.")
    noise_schedule(pipe.scheduler)
    if "callback_on_step_end" not in inspect.signature(type(pipe).__call__).parameters:
        raise UnsupportedError(
            f"{type(pipe).__name__} takes no `callback_on_step_end`, so it can't be guided step by step; guide its "
            "initial noise instead: fisher_pipeline(pipe).guide(...)."
        )
    estimator = DirectFisher() if estimator is None else estimator
    if estimator.uses_whole_run:
        raise UnsupportedError(
            f"{type(estimator).__name__} takes a whole run, which a single step is not. Take one of the "
            "denoiser's Jacobian: FiniteDifferenceFisher(PipelineDenoiser(pipe, ...)), or DirectFisher()."
        )
    estimator.check_denoiser(pipe)
    estimator = estimator if denoiser is None else estimator.bind(denoiser)
    if adjoint_guidance_scale is not None:
        estimator = estimator.at_guidance_scale(adjoint_guidance_scale)
    return PosteriorGuidance(pipe, reward, prompts, strength, estimator, decode, adjoint_guidance_scale)


@contextlib.contextmanager
def _watch_method(owner: Any, name: str, watch: Callable) -> Iterator[None]:
    """Calls `watch(method, ...)` in the place of a method of `owner` in the block, and then restores the method.

    The attribute is set past any `__setattr__`. Pipelines inspect the method's signature, which stays the same.
    """
    with restore_attributes(owner, name):  # a user may have set the attribute
        vars(owner)[name] = _WatchedMethod(watch, getattr(owner, name))
        yield


class _WatchedMethod:
    """Calls `watch(method, ...)`. A deep copy of the method's owner has the method itself, and nobody watches it."""

    def __init__(self, watch: Callable, method: Callable):
        functools.update_wrapper(self, method)
        self._watch, self._method = watch, method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._watch(self._method, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, object]) -> Callable:
        return copy.deepcopy(self._method, memo)


_GUIDED: weakref.WeakSet[SchedulerMixin] = weakref.WeakSet()
_GUIDED_LOCK = threading.Lock()


@contextlib.contextmanager
def _only_guidance_of(scheduler: SchedulerMixin) -> Iterator[None]:
    """Refuses a second guidance of a scheduler in the block, which would tilt the first one's run."""
    with _GUIDED_LOCK:
        if scheduler in _GUIDED:
            raise TrajectoryError(
                "The pipeline's scheduler is already guided by `posterior_guidance`, by an enclosing block or in "
                "another thread. Leave that block first, or take a pipeline with a scheduler of its own."
            )
        _GUIDED.add(scheduler)
    try:
        yield
    finally:
        _GUIDED.discard(scheduler)


class PosteriorGuidance(contextlib.AbstractContextManager):
    """Guides the runs of a pipeline in its block as their callback, and records the last run.

    Attributes:
        rewards: rewards of the predicted clean samples before every guided step, a list of (B,) float64.
        gradient_norms: |J^T g| at every guided step, a list of (B,) float64.
        status: "completed", or at which step a number that was not finite ended the guidance, after which the run went
            on without it.
    """

    def __init__(
        self,
        pipe: Any,
        reward: Reward,
        prompts: str | Sequence[str] | None,
        strength: float,
        estimator: FisherEstimator,
        decode: Callable[[torch.Tensor], torch.Tensor] | None,
        adjoint_guidance_scale: float | None = None,
    ):
        self.rewards: list[torch.Tensor] = []
        self.gradient_norms: list[torch.Tensor] = []
        self.status = COMPLETED
        self._pipe = pipe
        self._block: contextlib.ExitStack | None = None
        self._thread = threading.get_ident()
        self._reward = reward
        self._prompts = prompts
        self._strength = strength
        self._estimator = estimator
        self._adjoint_guidance_scale = adjoint_guidance_scale
        self._run_estimator: FisherEstimator | None = None  # the estimator with a denoiser of the present run
        self._decode = decode or _decoder(pipe)
        self._has_pixel_shape = decode is None
        self._tried_shapes: set[tuple[int, ...]] = set()
        self._scheduler: Any = None
        self._timesteps: Any = None
        self._state: DenoisingState | None = None  # from which the last step began
        self._begin_level: NoiseLevel | None = None  # level at which the present step began
        self._steps = self._calls = 0
        self._is_evaluating = False  # then the pipeline is called by the estimator, and not for a run

    def __enter__(self) -> PosteriorGuidance:
        with contextlib.ExitStack() as block:
            block.enter_context(_only_guidance_of(self._pipe.scheduler))
            self._scheduler, self._thread, self._block = self._pipe.scheduler, threading.get_ident(), block.pop_all()
        self._block.enter_context(_watch_method(self._scheduler, "step", self._step))
        for name in ("set_timesteps", "scale_model_input"):
            if hasattr(self._scheduler, name):
                self._block.enter_context(_watch_method(self._scheduler, name, self._in_its_thread))
        if hasattr(self._pipe, "prepare_latents"):  # else the first guided step reports a bad reward
            self._block.enter_context(_watch_method(self._pipe, "prepare_latents", self._prepare_latents))
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._block is not None:
            self._block.close()
        self._scheduler = None
        if exception[0] is None and self._steps and not self._calls:
            raise TrajectoryError(
                "The pipeline ran without guidance: pass it `callback_on_step_end=guidance`, what the block yields."
            )

    def __call__(
        self, pipe: Any, step_index: int, timestep: Timestep, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Returns the tilted latents after a step: it is diffusers' callback."""
        if self._block is None:
            raise TrajectoryError(
                "posterior_guidance is a context manager: write `with posterior_guidance(pipe, reward) as guidance:`, "
                "and in the block pass `callback_on_step_end=guidance`."
            )
        state = self._state
        if self._scheduler is None or state is None:
            raise TrajectoryError(
                "The guidance was called without a step that it had watched. Call the pipeline inside the "
                "`with posterior_guidance(pipe, ...)` block, with the same pipeline and scheduler."
            )
        self._calls += 1
        if "latents" not in callback_kwargs:
            raise InputError(
                "The callback was given no latents; leave `callback_on_step_end_tensor_inputs` out, or name latents."
            )
        schedule = noise_schedule(self._scheduler)
        if schedule.awaits_second_stage:
            return callback_kwargs  # the second evaluation of a step forgets what is changed after the first
        begin, end = self._begin_level or state.level, schedule.level_after_step(state.known_timestep)
        self._begin_level, self._state = end, None
        if self.status != COMPLETED:
            return callback_kwargs
        self._is_evaluating = True
        try:
            if self._run_estimator is None:
                self._run_estimator = self._with_denoiser(pipe, state)
            direction = self._direction(state, self._run_estimator, len(self.rewards))
        except NumericalError as error:
            if not self.rewards:  # no step was guided before
                raise
            self.status = f"stopped at guided step {len(self.rewards)}: {error}"
            logger.warning("Guidance %s The run goes on without it.", self.status)
            return callback_kwargs
        finally:
            self._is_evaluating = False
        tilt = expand(_rotation(begin, end) * self._strength, direction) * norms(state.epsilon) * direction
        latents = callback_kwargs["latents"]
        return callback_kwargs | {"latents": (latents + tilt).to(latents.dtype)}

    def _direction(self, state: DenoisingState, estimator: FisherEstimator, step: int) -> torch.Tensor:
        """Returns the unit direction in which the score is tilted, (B, ...)."""
        clean = state.pred_original_sample.detach().requires_grad_()
        prompts = self._prompts_of(len(clean))
        with torch.enable_grad():
            images = self._decode(clean)
            values = checks.reward_in_run(self._reward, images, prompts, f"guided step {step}", clean)
            if not values.requires_grad:
                raise checks.gradient_error(self._reward)
            (gradient,) = torch.autograd.grad(values.sum(), clean)
        product = estimator(state).original_jacobian(gradient)
        if not torch.isfinite(product).all():
            raise NumericalError(
                f"The gradient at guided step {step} is not finite after the product of {type(estimator).__name__} in "
                f"{state.model_output.dtype}, at noise-to-signal {state.level.noise_to_signal.tolist()}; the reward's "
                f"own gradient was {'finite' if torch.isfinite(gradient).all() else 'not finite either'}."
            )
        direction, length = normalise(product)
        self.rewards.append(values.detach().double().cpu())
        self.gradient_norms.append(length)
        return direction

    def _with_denoiser(self, pipe: Any, state: DenoisingState) -> FisherEstimator:
        """Returns the estimator, with a denoiser of the running call where it needs one and has none.

        Raises:
            InputError: there are no prompts, or the denoiser does not give the run's output at `state`.
        """
        if self._estimator.denoisers or self._estimator.lacks_denoiser:
            backbone = backbone_of(pipe)
            check_no_cache(backbone.name, backbone.network, "an evaluation inside the run would empty the run's cache")
        if not self._estimator.lacks_denoiser:
            self._estimator.check_outputs([state])
            return self._estimator
        name, scale = type(self._estimator).__name__, getattr(pipe, "guidance_scale", 1.0)
        if self._prompts is None:
            raise InputError(
                f"{name} needs a denoiser, and no `prompts` are known to make one of. Pass `prompts`, or the run's "
                "own: posterior_guidance(pipe, ..., denoiser=PipelineDenoiser(pipe, guidance_scale, prompt=...))."
            )
        prompts = list(self._prompts_of(len(state.sample)))
        denoiser = PipelineDenoiser(pipe, scale, prompt=prompts)
        check_states(denoiser, [state])
        if self._adjoint_guidance_scale is not None:
            denoiser = PipelineDenoiser(pipe, self._adjoint_guidance_scale, prompt=prompts)
        return self._estimator.without_comparison().bind(denoiser)

    def _prompts_of(self, count: int) -> Sequence[str]:
        """Returns one prompt per sample."""
        if self._prompts is None or isinstance(self._prompts, str):
            return [self._prompts or ""] * count
        if len(self._prompts) != count:
            raise InputError(f"{len(self._prompts)} `prompts` were given for {count} samples; give one, or one each.")
        return self._prompts

    def _prepare_latents(self, prepare: Callable, *args: Any, **kwargs: Any) -> Any:
        """Calls the pipeline's `prepare_latents`, and tries the reward once per number and size of images."""
        result = prepare(*args, **kwargs)
        latents = result[0] if isinstance(result, (tuple, list)) else result
        if self._is_evaluating or not isinstance(latents, torch.Tensor):
            return result
        shape = _pixel_shape(self._pipe, latents) if self._has_pixel_shape else None
        if shape is None:
            with torch.no_grad():
                images = self._decode(latents)
            check_floats("The result of `decode`", images)
            shape = tuple(images.shape)
        if shape not in self._tried_shapes:
            checks.check_differentiable(self._reward, shape, self._prompts_of(shape[0]), latents.device)
            self._tried_shapes.add(shape)
        return result

    def _in_its_thread(self, method: Callable, *args: Any, **kwargs: Any) -> Any:
        """Calls a method of the scheduler, whose state another thread would change below the guided run."""
        if threading.get_ident() != self._thread:
            raise TrajectoryError(
                "The pipeline was called in one thread while it is guided by `posterior_guidance` in another. Its "
                "scheduler keeps the state of one run: give each thread a pipeline with a scheduler of its own."
            )
        return method(*args, **kwargs)

    def _step(
        self, step: Callable, model_output: torch.Tensor, timestep: Timestep, sample: torch.Tensor, *args: Any,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Keeps the state that the scheduler's `step` begins from, and calls it."""
        self._in_its_thread(lambda: None)
        scheduler = self._scheduler
        if scheduler.timesteps is not self._timesteps:  # another run
            self._timesteps, self._begin_level, self._run_estimator = scheduler.timesteps, None, None
            self.rewards, self.gradient_norms, self.status = [], [], COMPLETED
        carrier = sample.detach().to(torch.promote_types(sample.dtype, torch.float32))
        index = noise_schedule(scheduler).start_step(timestep)
        self._state = state_of(scheduler, carrier, model_output.detach().to(carrier.dtype), timestep, index)
        if self._begin_level is None:
            self._begin_level = self._state.level
        self._steps += 1
        return step(model_output, timestep, sample, *args, **kwargs)


def _decoder(pipe: DiffusionPipeline) -> Callable[[torch.Tensor], torch.Tensor]:
    """Makes a function from scaled latents (B, C, h, w) to images (B, 3, H, W) float32 in [0, 1], with a graph.

    Raises:
        UnsupportedError: the pipeline has no autoencoder, or packs its latents (at the first call).
    """
    backbone = backbone_of(pipe)
    backbone.check_decoder()

    def decode(latents: torch.Tensor) -> torch.Tensor:
        if latents.ndim != 4:
            raise UnsupportedError(
                f"{backbone.name} packs its latents to {tuple(latents.shape)}; pass `decode`, which unpacks them and "
                "decodes them to images (B, 3, H, W) in [0, 1]."
            )
        return backbone.decode(latents)

    return decode


def _pixel_shape(pipe: DiffusionPipeline, latents: torch.Tensor) -> tuple[int, ...] | None:
    """Returns the shape of the images of latents (B, C, h, w) without decoding; None where the pipeline lacks it."""
    factor = vars(pipe).get("vae_scale_factor")
    if factor is None or latents.ndim != 4:
        return None
    channels = pipe.vae.config.get("out_channels", 3)
    return (len(latents), channels, *(int(side * factor) for side in latents.shape[-2:]))


def _rotation(begin: NoiseLevel, end: NoiseLevel) -> torch.Tensor:
    """Returns how far a unit tilt of eps by alpha moves the sample in a first-order step of the ODE, float64.

    d x~/ds = eps, so a change -alpha d of eps moves the carried sample by alpha_end (s_begin - s_end) alpha d, with
    alpha that of the variance-preserving sample, which keeps it finite where s_begin is infinite: for those samples
    it is the sine of the angle that the step turns them by.
    """
    cosine, sine = begin.alpha / begin.norm, begin.sigma / begin.norm
    return end.alpha * sine - end.sigma * cosine
