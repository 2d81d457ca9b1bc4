"""Likelihood and guidance over a stock pipeline."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..denoiser import PipelineDenoiser, borrowed
from ..errors import InputError
from ..fisher.autodiff import AutodiffFisher
from ..fisher.direct import DirectFisher
from ..fisher.operator import FisherEstimator
from ..guidance.adjoint import GuidanceOutput, NoiseAscent, Reward, ascend_noise, check_differentiable
from ..likelihood import LikelihoodOutput, log_likelihood
from ..schedulers.mixin import fisher_scheduler
from .conditions import text_conditions
from .inputs import check_guidance, check_likelihood
from .persistence import check_folder, load_parts, save_parts, stock_pipeline
from .run import SamplingRun
from .space import LatentSpace


class FisherPipelineMixin(LatentSpace):
    """Adds `log_likelihood` and `guide` to a stock pipeline class, and saves folders that stock diffusers reads.

    What a backbone overrides is in `LatentSpace`, and here `_conditions` and `_likelihood_guidance`.
    """

    _latent_statistics: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def latent_statistics(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(mean, variance) of the training data's scaled latents, each of one sample's shape, for the likelihood's
        prior; None where the checkpoint has none. May be set."""
        source = self.config.get("_name_or_path")
        if self._latent_statistics is None and source and os.path.isdir(source):
            self._latent_statistics = load_parts(source)[1]  # loaded by a class that knows nothing of our parts
        return self._latent_statistics

    @latent_statistics.setter
    def latent_statistics(self, value: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        self._latent_statistics = value

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """As the stock pipeline's; restores the Fisher scheduler and latent statistics saved with the checkpoint.

        Raises:
            CheckpointError: a local folder with a missing or truncated file.
        """
        check_folder(pretrained_model_name_or_path, given=kwargs)
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        hub = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
        scheduler, pipe.latent_statistics = load_parts(pretrained_model_name_or_path, **hub)
        if scheduler is not None and "scheduler" not in kwargs:
            made = fisher_scheduler(type(pipe.scheduler))
            pipe.scheduler = made.from_config(pipe.scheduler.config)
        return pipe

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Saves the stock pipeline, readable by any diffusers, with the Fisher parts beside its index.

        Args:
            **kwargs: as the stock pipeline's `save_pretrained` (safetensors only).
        """
        if kwargs.get("push_to_hub") or kwargs.get("safe_serialization") is False:
            raise InputError("Save to a folder, in safetensors; push the finished folder with huggingface_hub.")
        stock_pipeline(self).save_pretrained(save_directory, **kwargs)
        save_parts(self, save_directory)

    def log_likelihood(
        self,
        images: Any = None,
        prompt: str | Sequence[str] | None = None,
        *,
        latents: torch.Tensor | None = None,
        num_inference_steps: int = 32,
        estimator: FisherEstimator | None = None,
        num_probes: int | None = 2,
        noised: bool = False,
        step_halving: bool = True,
        prior_mean: torch.Tensor | float | None = None,
        prior_variance: torch.Tensor | float | None = None,
        generator: torch.Generator | None = None,
        **call_arguments: Any,
    ) -> LikelihoodOutput:
        """Log-likelihood of images under the checkpoint, without classifier-free guidance.

        For pipelines with an autoencoder a density of the latents, not of pixels: comparable between images of one
        size under one autoencoder. The mean of the autoencoder's posterior stands for the image. The output's `space`
        says which it is.

        Args:
            images: PIL images, arrays (B, H, W, 3) or tensors (B, 3, H, W), in [0, 1]; height and width multiples of
                8 and of the autoencoder's factor.
            prompt: one for all, or one an image; None: the empty prompt.
            latents: (B, C, h, w) scaled latents, instead of `images`.
            num_inference_steps: steps of the integration.
            estimator: gives the trace of the diffusion Fisher; None: the model's own, by automatic differentiation.
            num_probes: Hutchinson probes; None: the exact trace, C*h*w backward passes a step.
            noised, step_halving, generator: see `diffusers_fisher.likelihood.log_likelihood`.
            prior_mean, prior_variance: of the training data's latents; None: the checkpoint's `latent_statistics`, or
                0 and 1 where it has none. The output says which.
            **call_arguments: to the pipeline's call, such as `prompt_embeds` with what belongs to them.

        Returns:
            `LikelihoodOutput`. Cost: about 1.5 * `num_inference_steps` evaluations with a backward pass a probe.

        Raises:
            InputError: images, latents or conditions of the wrong kind, size, range or number; guidance.
            UnsupportedError: a scheduler of another family than the model's.
        """
        check_likelihood(num_inference_steps)
        self._check_scheduler()
        guidance = self._likelihood_guidance(call_arguments)
        samples = self._latents_to_score(images, latents)
        _, conditions = self._conditions(prompt, call_arguments, len(samples))
        sizes = self._size_arguments((samples.shape[-2] * self._factor, samples.shape[-1] * self._factor))
        denoiser = PipelineDenoiser(self, guidance, **{**sizes, **call_arguments, **conditions})
        bound = _bound(estimator if estimator is not None else AutodiffFisher(), denoiser)
        if prior_mean is None and prior_variance is None and self.latent_statistics is not None:
            prior_mean, prior_variance = (_fit(value, samples[0]) for value in self.latent_statistics)
        mean, variance = (self._pack_statistic(value, samples) for value in (prior_mean, prior_variance))
        nodes = num_inference_steps + 1 + (num_inference_steps // 2 + 1 if step_halving else 0)
        with self._loaded(), self.progress_bar(total=nodes) as progress:
            return log_likelihood(
                denoiser, self._pack(samples), bound, num_inference_steps, num_probes, mean, variance, noised,
                step_halving, generator, space=self._space, on_step=progress.update,
            )  # fmt: skip

    def guide(
        self,
        prompt: str | Sequence[str] | None,
        reward: Reward,
        *,
        num_guidance_steps: int = 10,
        step_size: float = 0.2,
        estimator: FisherEstimator | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **call_arguments: Any,
    ) -> GuidanceOutput | tuple:
        """Steers generation by a reward, by ascent on the initial noise through the whole sampling run.

        The denoiser builds no graph: its place in the backward pass is taken by `estimator`. The best image of every
        sample is kept.

        Args:
            prompt: one, or several; None where `prompt_embeds` are given.
            reward: `reward(images, prompts) -> (B,)`, images (B, 3, H, W) in [0, 1] with a graph, higher is better.
            num_guidance_steps: gradient steps; 0 samples and scores.
            step_size: length of the first step relative to the noise's norm; halved for a sample whose reward is no
                better than its best before.
            estimator: of the diffusion Fisher; None: `DirectFisher()`, the best reward a second as measured.
            num_inference_steps, guidance_scale: of the sampling runs; None: the stock call's own defaults.
            latents: initial noise of unit variance, (B, C, h, w), or packed where the pipeline's own are; None: drawn
                with `generator` as the stock call does.
            output_type: "pil", "np", "pt".
            **call_arguments: to the pipeline's call, such as `negative_prompt`.

        Returns:
            `GuidanceOutput`. Cost: `num_guidance_steps + 1` ordinary runs with decoding, and a decoder and reward
            gradient a guidance step; see the estimator for its own.

        Raises:
            InputError: before sampling, arguments out of range, latents of the wrong shape, a reward that is not
                differentiable or of the wrong shape.
            TrajectoryError: torch.inference_mode, latents changed between steps, a model with learned variance.
            NumericalError: images, a reward or a gradient that are not finite.
        """
        defaults = inspect.signature(type(self).__call__).parameters
        steps = defaults["num_inference_steps"].default if num_inference_steps is None else num_inference_steps
        check_guidance(num_guidance_steps, step_size, steps, output_type)
        self._check_scheduler()
        prompts, conditions = self._conditions(prompt, call_arguments, None, num_images_per_prompt)
        pixels = self._image_size(height, width)
        noise = self._initial_noise(latents, len(prompts), pixels, generator)
        check_differentiable(reward, (len(prompts), self._image_channels(), *pixels), prompts, noise.device)
        call_arguments |= {**conditions, **self._size_arguments(pixels)}
        if "guidance_scale" in defaults:
            default = defaults["guidance_scale"].default
            call_arguments["guidance_scale"] = default if guidance_scale is None else guidance_scale
        without_callbacks = {key: value for key, value in call_arguments.items() if not key.startswith("callback")}
        denoiser = PipelineDenoiser(self, **without_callbacks)
        bound = _bound(estimator if estimator is not None else DirectFisher(), denoiser)
        counted = getattr(bound, "denoiser", denoiser)  # the estimator's own, where it brought one
        calls_before = getattr(counted, "num_calls", 0)
        scheduler = fisher_scheduler(type(self.scheduler)).from_config(self.scheduler.config)
        call_arguments["num_inference_steps"] = steps
        run = SamplingRun(self, scheduler, denoiser, generator, self._noise_dtype(), **call_arguments)
        decode = functools.partial(self._decode, pixels=pixels)
        with self._loaded(), self.progress_bar(total=num_guidance_steps + 1) as progress:

            def show(rewards: torch.Tensor) -> None:
                progress.set_postfix(reward=f"{float(rewards.mean()):.3f}")
                progress.update()

            ascent = ascend_noise(
                run, decode, reward, noise, prompts, scheduler, bound, num_guidance_steps, step_size, show
            )
        calls = ascent.num_sampling_calls + getattr(counted, "num_calls", 0) - calls_before
        output = self._guidance_output(ascent, output_type, calls)
        return output if return_dict else output.to_tuple()

    def _guidance_output(self, ascent: NoiseAscent, output_type: str, num_calls: int) -> GuidanceOutput:
        from diffusers.image_processor import VaeImageProcessor

        images, flagged = self._finished(ascent.best_images)
        processor = getattr(self, "image_processor", None) or VaeImageProcessor()
        empty = torch.zeros(0, len(images), dtype=torch.float64)
        return GuidanceOutput(
            images=processor.postprocess(images, output_type, do_denormalize=[False] * len(images)),
            rewards=torch.stack(ascent.rewards), best_rewards=ascent.best_rewards, latents=ascent.best_noise,
            gradient_norms=torch.stack(ascent.gradient_norms) if ascent.gradient_norms else empty,
            seconds=torch.tensor(ascent.seconds, dtype=torch.float64),
            num_denoiser_calls=num_calls, nsfw_content_detected=flagged,
        )  # fmt: skip

    def _conditions(
        self, prompt: Any, call_arguments: dict[str, Any], count: int | None, num_images_per_prompt: int = 1
    ) -> tuple[Sequence[Any], dict[str, Any]]:
        """What a reward is told of every sample, and the call arguments that say it; see `text_conditions`."""
        return text_conditions(self, prompt, call_arguments, count, num_images_per_prompt)

    def _likelihood_guidance(self, call_arguments: dict[str, Any]) -> float:
        """The guidance scale of a likelihood, taken out of `call_arguments`: 1, for a guided output is no score."""
        scale = call_arguments.pop("guidance_scale", 1.0)
        if scale != 1.0:
            raise InputError(
                f"`guidance_scale` is {scale}; a likelihood is at 1.0, because a guided output is the score of no "
                "density. Leave it out."
            )
        return 1.0

    def _size_arguments(self, pixels: tuple[int, int]) -> dict[str, int]:
        taken = inspect.signature(type(self).__call__).parameters
        return dict(zip(("height", "width"), pixels, strict=True)) if "height" in taken else {}

    def _pack_statistic(self, value: Any, samples: torch.Tensor) -> Any:
        """A statistic of one sample (C, h, w), or a number, in the layout of the pipeline's latents."""
        if not isinstance(value, torch.Tensor) or value.ndim == 0 or self._pack(samples).shape == samples.shape:
            return value
        return self._pack(value.expand(1, *samples.shape[1:]))[0]

    @contextlib.contextmanager
    def _loaded(self) -> Iterator[None]:
        """Under model offload the network stays on its device between the block's calls, and is offloaded after."""
        if not getattr(self, "_all_hooks", None):
            yield
            return
        try:
            with borrowed(self, maybe_free_model_hooks=lambda: None):
                yield
        finally:
            self.maybe_free_model_hooks()


def _bound(estimator: Any, denoiser: PipelineDenoiser) -> FisherEstimator:
    """The estimator with `denoiser` where it needs one and has none."""
    return estimator.bind(denoiser) if hasattr(estimator, "bind") else estimator


def _fit(statistic: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A per-element statistic for latents of its own size; its mean over space for others."""
    if statistic.shape == like.shape:
        return statistic
    return statistic.mean(dim=(-2, -1), keepdim=True)
