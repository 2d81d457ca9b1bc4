"""What `guide` of the pipelines does: guidance through the whole run, from prompts to images."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..denoiser import Denoiser, PipelineDenoiser, borrowed
from ..errors import InputError
from ..fisher.estimator import FisherEstimator, check_estimator
from ..fisher.finite_difference import FiniteDifferenceFisher
from ..fisher.one_step import OneStepFisher
from ..guidance.checks import Reward, check_differentiable
from ..guidance.movers import optimizer_factory
from ..guidance.noise_ascent import VARIABLES, GuidanceOutput, NoiseAscent, ascend_noise
from ..guidance.text import TextEmbedding, TextGradientEstimator
from ..schedulers import fisher_scheduler
from .inputs import check_guidance
from .run import SamplingRun

HALF_PRECISION_STEPS = {torch.float16: 0.05, torch.bfloat16: 0.1}
"""Relative lengths of the default estimator's differences. On the embedded checkpoint in bfloat16 a gradient's cosine
with the exact product is 0.85 by 0.1, 0.82 by 0.05, and 0.43 by the 0.01 that float32 has (there 0.90)."""


@dataclasses.dataclass(frozen=True)
class GuidanceOptions:
    """The arguments of `guide` that are no arguments of the pipeline's call. See there."""

    num_guidance_steps: int
    step_size: float
    estimator: FisherEstimator | None
    optimise: Sequence[str]
    optimizer: Any
    patience: int | None
    held_out_reward: Reward | None
    adjoint_guidance_scale: float | None
    decoder: Any
    checkpoint_decoder: bool
    output_type: str

    def check(self, pipe: Any, num_inference_steps: int) -> None:
        """Refuses values out of range.

        Raises:
            InputError: says which.
        """
        if self.estimator is not None:
            check_estimator(self.estimator)
        check_guidance(self.num_guidance_steps, self.step_size, num_inference_steps, self.output_type)
        if isinstance(self.optimise, str) or not self.optimise or not set(self.optimise) <= set(VARIABLES):
            raise InputError(f"`optimise` is {self.optimise!r}; allowed: some of {', '.join(VARIABLES)}, as a list.")
        if self.patience is not None and self.patience < 1:
            raise InputError(f"`patience` is {self.patience}; allowed: at least 1 run, or None.")
        if (self.decoder is not None or self.checkpoint_decoder) and not hasattr(pipe, "vae"):
            raise InputError(
                f"{type(pipe).__name__} has no autoencoder `vae`; leave out `decoder` and `checkpoint_decoder`."
            )
        if "text" in self.optimise and self.estimator is not None and self.estimator.denoiser is not None:
            raise InputError(
                "The estimator has a denoiser of its own, whose prompts stay as they are while the text embedding is "
                f"optimised. Make it without: {type(self.estimator).__name__}()."
            )


def guided_images(
    pipe: Any,
    prompt: Any,
    reward: Reward,
    options: GuidanceOptions,
    size: tuple[int | None, int | None],
    num_inference_steps: int | None,
    guidance_scale: float | None,
    num_images_per_prompt: int,
    generator: torch.Generator | list[torch.Generator] | None,
    latents: torch.Tensor | None,
    call_arguments: dict[str, Any],
) -> GuidanceOutput:
    """See `FisherPipelineMixin.guide`."""
    defaults = inspect.signature(type(pipe).__call__).parameters
    steps = defaults["num_inference_steps"].default if num_inference_steps is None else num_inference_steps
    options.check(pipe, steps)
    optimizer = optimizer_factory(options.optimizer, options.step_size)
    pipe._check_scheduler()
    prompts, conditions = pipe._conditions(prompt, call_arguments, None, num_images_per_prompt)
    pixels = pipe._image_size(*size)
    noise = pipe._initial_noise(latents, len(prompts), pixels, generator)
    check_differentiable(reward, (len(prompts), pipe._image_channels(), *pixels), prompts, noise.device)
    call_arguments = {**call_arguments, **conditions, **pipe._size_arguments(pixels)}
    if "guidance_scale" in defaults:
        default = defaults["guidance_scale"].default
        call_arguments["guidance_scale"] = default if guidance_scale is None else guidance_scale
    denoisers = _Denoisers(pipe, options, call_arguments)
    scheduler = fisher_scheduler(type(pipe.scheduler)).from_config(pipe.scheduler.config)
    run = SamplingRun(
        pipe, scheduler, denoisers.forward, generator, pipe._noise_dtype(), denoisers.backward,
        num_inference_steps=steps, **call_arguments,
    )  # fmt: skip
    with pipe._loaded():
        if options.decoder is not None:
            _check_decoder(pipe, options.decoder, noise, pixels)
        with (
            _decoding(pipe, options.decoder, options.checkpoint_decoder),
            _progress(pipe, options.num_guidance_steps + 1) as show,
        ):
            ascent = ascend_noise(
                run, functools.partial(pipe._decode, pixels=pixels), reward, noise, prompts, scheduler,
                denoisers.estimator, options.num_guidance_steps, options.step_size, show, optimizer=optimizer,
                patience=options.patience, held_out_reward=options.held_out_reward, optimise=options.optimise,
                text=denoisers.text,
            )  # fmt: skip
        if options.decoder is not None:
            _decode_anew(pipe, ascent, pixels)
    return _output(pipe, ascent, options.output_type, ascent.num_sampling_calls + denoisers.calls())


class _Denoisers:
    """The denoiser of the sampling run, that of the backward pass, and the estimator bound to the latter."""

    def __init__(self, pipe: Any, options: GuidanceOptions, call_arguments: dict[str, Any]):
        arguments = {key: value for key, value in call_arguments.items() if not key.startswith("callback")}
        self.forward = self.backward = PipelineDenoiser(pipe, **arguments)
        estimator = options.estimator if options.estimator is not None else default_estimator(pipe._noise_dtype())
        scale = options.adjoint_guidance_scale
        if scale is not None and scale != arguments.get("guidance_scale", scale):
            self.backward = PipelineDenoiser(pipe, **{**arguments, "guidance_scale": scale})
            estimator = estimator.without_model_output()
        self.estimator = estimator.bind(self.backward)
        own = [entry for entry in self.estimator.denoisers if isinstance(entry, Denoiser)]
        self.text = TextEmbedding() if "text" in options.optimise else None
        parts = {id(entry): entry for entry in (self.forward, self.backward)}.values()
        if self.text is not None:
            for denoiser in parts:
                self.text.attach(denoiser)
            self.estimator = TextGradientEstimator(self.estimator, self.text, self.backward)
        counted = {id(entry): entry for entry in (*parts, *own)}.values()
        self._counted = [(entry, entry.num_calls) for entry in counted]

    def calls(self) -> int:
        """Evaluations since this was made, besides the sampling runs'."""
        return sum(entry.num_calls - before for entry, before in self._counted)


def default_estimator(dtype: torch.dtype) -> OneStepFisher:
    """Differences long enough to stand out of the rounding of a network of `dtype`."""
    step = HALF_PRECISION_STEPS.get(dtype)
    return OneStepFisher(None if step is None else FiniteDifferenceFisher(relative_step=step))


@contextlib.contextmanager
def _progress(pipe: Any, total: int) -> Iterator[Callable[[torch.Tensor], None]]:
    with pipe.progress_bar(total=total) as progress:

        def show(rewards: torch.Tensor) -> None:
            progress.set_postfix(reward=f"{float(rewards.mean()):.3f}")
            progress.update()

        yield show


@contextlib.contextmanager
def _decoding(pipe: Any, decoder: Any, checkpointed: bool) -> Iterator[None]:
    """For the block: `decoder` in the autoencoder's place, and its activations recomputed rather than kept."""
    with contextlib.ExitStack() as stack:
        if decoder is not None:
            stack.enter_context(borrowed(pipe, vae=decoder))
        if checkpointed:
            stack.enter_context(_checkpointed(pipe.vae))
        yield


@torch.no_grad()
def _check_decoder(pipe: Any, decoder: Any, noise: torch.Tensor, pixels: tuple[int, int]) -> None:
    """Refuses what decodes to images of another size, by one sample."""
    if not hasattr(decoder, "decode"):
        raise InputError(f"`decoder` is a {type(decoder).__name__}; allowed: an autoencoder, such as AutoencoderTiny.")
    with _decoding(pipe, decoder, False):
        found = tuple(pipe._decode(noise[:1], pixels=pixels).shape[-2:])
    if found != tuple(pixels):
        raise InputError(
            f"`decoder` makes {found[0]}x{found[1]} pixels of this pipeline's latents, whose autoencoder makes "
            f"{pixels[0]}x{pixels[1]}; give a decoder of the same latents."
        )


@contextlib.contextmanager
def _checkpointed(autoencoder: Any) -> Iterator[None]:
    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    before = [(part, {k: v for k, v in vars(part).items() if k in names}) for part in autoencoder.modules()]
    try:
        autoencoder.enable_gradient_checkpointing()
        yield
    finally:
        for part, values in before:
            for name in names:
                vars(part).pop(name, None)
            vars(part).update(values)


@torch.no_grad()
def _decode_anew(pipe: Any, ascent: NoiseAscent, pixels: tuple[int, int]) -> None:
    """The images by the pipeline's own autoencoder, where another decoded them for the reward."""
    for kept in (ascent.best, ascent.initial):
        kept["images"] = pipe._decode(kept["latents"], pixels=pixels)


def _output(pipe: Any, ascent: NoiseAscent, output_type: str, num_calls: int) -> GuidanceOutput:
    from diffusers.image_processor import VaeImageProcessor

    processor = getattr(pipe, "image_processor", None) or VaeImageProcessor()
    finished, initial = (pipe._finished(kept["images"]) for kept in (ascent.best, ascent.initial))
    count = len(ascent.best_rewards)

    def shown(images: torch.Tensor) -> Any:
        return processor.postprocess(images, output_type, do_denormalize=[False] * count)

    def rows(history: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(history) if history else torch.zeros(0, count, dtype=torch.float64)

    return GuidanceOutput(
        images=shown(finished[0]), rewards=rows(ascent.rewards), best_rewards=ascent.best_rewards,
        latents=ascent.best_noise, gradient_norms=rows(ascent.gradient_norms),
        seconds=torch.tensor(ascent.seconds, dtype=torch.float64), num_denoiser_calls=num_calls,
        nsfw_content_detected=finished[1], initial_images=shown(initial[0]),
        held_out_rewards=rows(ascent.held_out_rewards), shell_distances=rows(ascent.shell_distances),
        status=ascent.status, prompt_embeds=ascent.best.get("text"), controls=ascent.best.get("control"),
    )  # fmt: skip
