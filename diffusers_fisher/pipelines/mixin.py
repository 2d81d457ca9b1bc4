"""Likelihood and guidance over a stock text-to-image latent pipeline."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..denoiser import PipelineDenoiser
from ..errors import InputError
from ..fisher.autodiff import AutodiffFisher
from ..fisher.direct import DirectFisher
from ..fisher.operator import FisherEstimator
from ..guidance.adjoint import GuidanceOutput, NoiseAscent, Reward, ascend_noise, check_differentiable
from ..likelihood import LikelihoodOutput, log_likelihood
from ..schedulers.mixin import fisher_scheduler
from .inputs import check_guidance, check_likelihood, image_tensor, one_each, prompt_list
from .persistence import check_folder, load_parts, save_parts, stock_pipeline
from .run import SamplingRun

if TYPE_CHECKING:
    from typing import Any as _Stock  # a stock pipeline class, which the mixin stands before
else:
    _Stock = object


class FisherPipelineMixin(_Stock):
    """Adds `log_likelihood` and `guide` to a stock pipeline class, and saves folders that stock diffusers reads."""

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
    ) -> LikelihoodOutput:
        """Log-likelihood of images' latents under the checkpoint, without classifier-free guidance.

        A density of the latents, not of pixels: comparable between images of one size under one autoencoder. The mean
        of the autoencoder's posterior stands for the image.

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

        Returns:
            `LikelihoodOutput`. Cost: about 1.5 * `num_inference_steps` evaluations with a backward pass a probe.

        Raises:
            InputError: images or latents of the wrong kind, size, range or number.
        """
        check_likelihood(num_inference_steps)
        samples = self._latents_to_score(images, latents)
        prompts = one_each("prompt", "" if prompt is None else prompt, len(samples))
        denoiser = PipelineDenoiser(self, prompt=prompts, guidance_scale=1.0)
        bound = _bound(estimator if estimator is not None else AutodiffFisher(), denoiser)
        if prior_mean is None and prior_variance is None and self.latent_statistics is not None:
            prior_mean, prior_variance = (_fit(value, samples[0]) for value in self.latent_statistics)
        nodes = num_inference_steps + 1 + (num_inference_steps // 2 + 1 if step_halving else 0)
        with self.progress_bar(total=nodes) as progress:
            return log_likelihood(
                denoiser, samples, bound, num_inference_steps, num_probes, prior_mean, prior_variance, noised,
                step_halving, generator, space="latent", on_step=progress.update,
            )  # fmt: skip

    def guide(
        self,
        prompt: str | Sequence[str],
        reward: Reward,
        *,
        num_guidance_steps: int = 10,
        step_size: float = 0.2,
        estimator: FisherEstimator | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
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
            prompt: one, or several.
            reward: `reward(images, prompts) -> (B,)`, images (B, 3, H, W) in [0, 1] with a graph, higher is better.
            num_guidance_steps: gradient steps; 0 samples and scores.
            step_size: length of a step relative to the noise's norm.
            estimator: of the diffusion Fisher; None: `DirectFisher()`, the best reward a second as measured.
            latents: (B, C, h, w) initial noise of unit variance; None: drawn with `generator` as the stock call does.
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
        check_guidance(num_guidance_steps, step_size, num_inference_steps, output_type)
        given = prompt_list(prompt, num_images_per_prompt)
        prompts = [text for text in given for _ in range(num_images_per_prompt)]
        if call_arguments.get("negative_prompt") is not None:
            negative = one_each("negative_prompt", call_arguments["negative_prompt"], len(given), "prompt")
            call_arguments["negative_prompt"] = [text for text in negative for _ in range(num_images_per_prompt)]
        pixels = self._image_size(height, width)
        noise = self._initial_noise(latents, len(prompts), pixels, generator)
        check_differentiable(reward, (len(prompts), 3, *pixels), prompts, noise.device)
        call_arguments |= {"height": pixels[0], "width": pixels[1], "guidance_scale": guidance_scale}
        without_callbacks = {key: value for key, value in call_arguments.items() if not key.startswith("callback")}
        denoiser = PipelineDenoiser(self, prompt=prompts, **without_callbacks)
        bound = _bound(estimator if estimator is not None else DirectFisher(), denoiser)
        counted = getattr(bound, "denoiser", denoiser)  # the estimator's own, where it brought one
        calls_before = getattr(counted, "num_calls", 0)
        scheduler = fisher_scheduler(type(self.scheduler)).from_config(self.scheduler.config)
        call_arguments["num_inference_steps"] = num_inference_steps
        run = SamplingRun(self, scheduler, denoiser, prompts, generator, self._noise_dtype(), **call_arguments)
        with self.progress_bar(total=num_guidance_steps + 1) as progress:

            def show(rewards: torch.Tensor) -> None:
                progress.set_postfix(reward=f"{float(rewards.mean()):.3f}")
                progress.update()

            ascent = ascend_noise(
                run, self._decode, reward, noise, prompts, scheduler, bound, num_guidance_steps, step_size, show
            )
        calls = ascent.num_sampling_calls + getattr(counted, "num_calls", 0) - calls_before
        output = self._guidance_output(ascent, output_type, calls)
        return output if return_dict else output.to_tuple()

    def _guidance_output(self, ascent: NoiseAscent, output_type: str, num_calls: int) -> GuidanceOutput:
        images = ascent.best_images
        flagged: list[bool] = []
        if getattr(self, "safety_checker", None) is not None:
            checked, found = self.run_safety_checker(2 * images - 1, images.device, self.dtype)
            flagged = [bool(entry) for entry in found]
            # As in the stock call, what the checker puts in place (black) is taken as it is.
            images = torch.where(torch.tensor(flagged, device=images.device)[:, None, None, None], checked, images)
        processor = self.image_processor
        empty = torch.zeros(0, len(images), dtype=torch.float64)
        return GuidanceOutput(
            images=processor.postprocess(images, output_type, do_denormalize=[False] * len(images)),
            rewards=torch.stack(ascent.rewards), best_rewards=ascent.best_rewards, latents=ascent.best_noise,
            gradient_norms=torch.stack(ascent.gradient_norms) if ascent.gradient_norms else empty,
            seconds=torch.tensor(ascent.seconds, dtype=torch.float64),
            num_denoiser_calls=num_calls, nsfw_content_detected=flagged,
        )  # fmt: skip

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents to images (B, 3, H, W) in [0, 1], float32, differentiable."""
        vae = self.vae
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        decoded = vae.decode((latents / vae.config.scaling_factor + shift).to(vae.dtype)).sample
        return (decoded.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def _latents_to_score(self, images: Any, latents: torch.Tensor | None) -> torch.Tensor:
        """Scaled latents float32 of what `log_likelihood` was given, checked."""
        vae, device = self.vae, self._execution_device
        if (images is None) == (latents is None):
            raise InputError("Give either `images` or `latents`: exactly one of them.")
        channels = vae.config.latent_channels
        if latents is not None:
            multiple = self._size_multiple() // self.vae_scale_factor
            shape = tuple(latents.shape) if isinstance(latents, torch.Tensor) else ()
            if len(shape) != 4 or shape[1] != channels or any(side % multiple for side in shape[2:]):
                got = f"have shape {shape}" if isinstance(latents, torch.Tensor) else f"are a {type(latents).__name__}"
                raise InputError(
                    f"Latents {got}; allowed: a tensor (B, {channels}, h, w), h and w multiples of {multiple}."
                )
            return latents.to(device, torch.float32)
        tensor = image_tensor(images, self._size_multiple())
        posterior = vae.encode((2 * tensor - 1).to(device, vae.dtype)).latent_dist
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        return (posterior.mode().float() - shift) * vae.config.scaling_factor

    def _size_multiple(self) -> int:
        """What the pipeline's own check and its autoencoder ask of heights and widths."""
        return math.lcm(8, self.vae_scale_factor)

    def _image_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        default = self.unet.config.sample_size
        sides = (default, default) if isinstance(default, int) else tuple(default)
        factor, multiple = self.vae_scale_factor, self._size_multiple()
        size = (height or sides[0] * factor, width or sides[1] * factor)
        if any(side <= 0 or side % multiple for side in size):
            raise InputError(f"`height` and `width` are {size}; allowed: positive multiples of {multiple}.")
        return size

    def _noise_dtype(self) -> torch.dtype:
        return self.unet.dtype

    def _initial_noise(
        self, latents: torch.Tensor | None, count: int, pixels: tuple[int, int], generator: Any
    ) -> torch.Tensor:
        """Initial noise float32, drawn as the stock call draws it."""
        from diffusers.utils.torch_utils import randn_tensor

        factor, channels = self.vae_scale_factor, self.unet.config.in_channels
        shape = (count, channels, pixels[0] // factor, pixels[1] // factor)
        device = self._execution_device
        if latents is None:
            if isinstance(generator, list) and len(generator) != count:
                raise InputError(f"{len(generator)} generators were given for {count} images; give one, or as many.")
            return randn_tensor(shape, generator=generator, device=device, dtype=self._noise_dtype()).float()
        if not isinstance(latents, torch.Tensor) or latents.shape != shape or not torch.isfinite(latents).all():
            got = (
                f"have shape {tuple(latents.shape)}"
                if isinstance(latents, torch.Tensor)
                else f"are a {type(latents).__name__}"
            )
            raise InputError(f"`latents` {got}; allowed: a tensor {shape}, finite, of unit variance.")
        return latents.detach().to(device, torch.float32)


def _bound(estimator: Any, denoiser: PipelineDenoiser) -> FisherEstimator:
    """The estimator with `denoiser` where it needs one and has none."""
    return estimator.bind(denoiser) if hasattr(estimator, "bind") else estimator


def _fit(statistic: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A per-element statistic for latents of its own size; its mean over space for others."""
    if statistic.shape == like.shape:
        return statistic
    return statistic.mean(dim=(-2, -1), keepdim=True)
