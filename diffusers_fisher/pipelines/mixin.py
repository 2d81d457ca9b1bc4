"""Likelihood and guidance over a stock pipeline."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch

from ..denoiser import PipelineDenoiser, borrowed
from ..errors import InputError, UnsupportedError
from ..fisher.autodiff import AutodiffFisher
from ..fisher.estimator import FisherEstimator, check_estimator
from ..fisher.trace_matching import TraceMatchingFisher
from ..guidance.checks import Reward
from ..guidance.movers import OptimizerFactory
from ..guidance.noise_ascent import GuidanceOutput
from ..images import UNIT_RANGE
from ..likelihood import DEFAULT_SCHEME, LikelihoodOutput, log_likelihood
from ..likelihood.comparison import LikelihoodComparison
from .compared import compared_likelihoods
from .conditions import NEGATIVE_PROMPTS, text_conditions
from .guided import GuidanceOptions, guided_images
from .inputs import check_arguments, check_likelihood
from .parts import CheckpointParts


class FisherPipelineMixin(CheckpointParts):
    """Adds `log_likelihood` and `guide` to a stock pipeline class, and saves folders that stock diffusers reads.

    What a backbone overrides is in `LatentSpace`, and here `_conditions`, `_pooled` and `_likelihood_guidance`.
    """

    def log_likelihood(
        self,
        images: Any = None,
        prompt: str | Sequence[str] | None = None,
        *,
        latents: torch.Tensor | None = None,
        num_inference_steps: int = 32,
        estimator: FisherEstimator | None = None,
        num_probes: int | Literal["auto"] | None = "auto",
        noised: bool = False,
        step_halving: bool = False,
        prior_mean: torch.Tensor | float | None = None,
        prior_variance: torch.Tensor | float | None = None,
        generator: torch.Generator | None = None,
        scheme: str = DEFAULT_SCHEME,
        data_range: tuple[float, float] = UNIT_RANGE,
        bins: int | None = None,
        **call_arguments: Any,
    ) -> LikelihoodOutput:
        """Log-likelihood of images under the checkpoint, without classifier-free guidance.

        With an autoencoder a density of the latents, not of pixels (the output's `space`): comparable between images
        of one size under one autoencoder. The mean of the autoencoder's posterior stands for the image.

        Args:
            images: PIL images, arrays (B, H, W, 3) or tensors (B, 3, H, W), in `data_range`; height and width
                multiples of 8 and of the autoencoder's factor.
            prompt: one for all, or one an image; None: the empty prompt.
            latents: (B, C, h, w) scaled latents, instead of `images`.
            num_inference_steps: steps of the integration.
            estimator: gives the trace of the diffusion Fisher; None: `TraceMatchingFisher(pipe.trace_model)`, or where
                the pipeline has no trace model the network's own trace, `AutodiffFisher()`.
            num_probes: Hutchinson probes; None: the exact trace, with `AutodiffFisher` by C*h*w backward passes a
                step; "auto": None for trace models, else 2.
            noised, step_halving, generator, scheme: see `diffusers_fisher.likelihood.log_likelihood`.
            prior_mean, prior_variance: of the training data's latents; None: the checkpoint's `latent_statistics`, or
                0 and 1 where it has none. The output says which.
            data_range: what arrays and tensors of images reach from and to, such as (0, 255).
            bins: for pipelines in pixels, the number of values an image can have, 256 for 8 bits: each pixel is moved
                to a random point of its bin, and `bits_per_dim` is that of the discrete image. None: of the density.
            **call_arguments: to the pipeline's call, such as `prompt_embeds` with what belongs to them. Negative
                prompts count for nothing without guidance, and are refused.

        Returns:
            `LikelihoodOutput`. Cost: `num_inference_steps` + 1 evaluations, half as many again with `step_halving`,
            each with a backward pass a probe, or with one of the trace model. Warns where the discretisation error
            exceeds 0.05 bits/dim (`CoarseGridWarning`).

        Raises:
            InputError: images, latents or conditions of the wrong kind, size, range or number; guidance; a trace model
                of another denoiser. UnsupportedError: a scheduler of another family than the model's.
        """
        guidance = self._check_likelihood(num_inference_steps, bins, call_arguments)
        samples = self._latents_to_score(images, latents, data_range)
        denoiser = self._likelihood_denoiser(samples, guidance, prompt, call_arguments)
        trace_estimator, probes = self._trace_estimator(estimator, num_probes)
        mean, variance = self._prior(prior_mean, prior_variance, samples)
        nodes = num_inference_steps + 1 + (num_inference_steps // 2 + 1 if step_halving else 0)
        with self._loaded(), self.progress_bar(total=nodes) as progress:
            return log_likelihood(
                denoiser, self._pack(samples), trace_estimator, num_inference_steps, probes, mean, variance,
                noised, step_halving, generator, space=self._space, on_step=progress.update, scheme=scheme, bins=bins,
            )  # fmt: skip

    def compare_likelihood(
        self,
        images: Any = None,
        prompts: Sequence[Any] | None = None,
        *,
        latents: torch.Tensor | None = None,
        method: str = "squared error",
        num_levels: int | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> LikelihoodComparison:
        """Which prompt fits an image, and which image is likelier: every image under every prompt, with equal draws.

        "squared error" needs no graph: the denoiser's squared errors at random levels, as diffusion classifiers take
        them (Li et al., 2303.16203), weighted to a log-likelihood. "ode" is `log_likelihood` for every prompt, with
        the same grid and probes. Differences and their standard errors are methods of the output; between images those
        of "ode" are no smaller than each side's, as every image has probes of its own.

        Args:
            images, latents: as in `log_likelihood`.
            prompts: each for all images (class labels where the pipeline takes those); None: unconditional.
            method: "squared error" or "ode".
            num_levels: draws of "squared error", even; None: 64.
            generator: its draws are repeated for every prompt. Without one the numbers change from call to call.
            **options: "ode": of `log_likelihood`. "squared error": `prior_mean`, `prior_variance`, `data_range`,
                `bins`, and arguments of the pipeline's call.

        Returns:
            `LikelihoodComparison`. Cost: for every prompt `num_levels` evaluations, or those of `log_likelihood`.

        Raises:
            InputError: no prompts, an unknown method, options of the other method; else as `log_likelihood`.
        """
        score = functools.partial(FisherPipelineMixin.log_likelihood, self)
        return compared_likelihoods(self, score, images, prompts, latents, method, num_levels, generator, options)

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
        optimise: Sequence[str] = ("noise",),
        optimizer: str | OptimizerFactory | None = None,
        patience: int | None = None,
        held_out_reward: Reward | None = None,
        adjoint_guidance_scale: float | None = None,
        decoder: Any = None,
        checkpoint_decoder: bool = False,
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
            estimator: of the diffusion Fisher; None: `OneStepFisher()`, for one denoiser call a guidance step.
            num_inference_steps, guidance_scale: of the sampling runs; None: the stock call's own defaults.
            latents: initial noise of unit variance, (B, C, h, w), or packed where the pipeline's own are; None: drawn
                with `generator` as the stock call does.
            output_type: "pil", "np", "pt".
            optimise: what moves: "noise"; "text", the prompts' embedding, by the network's own derivative (a graph of
                one evaluation at a time); "control", added to the model's output at every step.
            optimizer: None for normalised ascent, which keeps the noise on its sphere; or a name in torch.optim, with
                `step_size` as its learning rate, or a factory from parameters to an optimiser.
            patience: stops after so many runs in which no sample reached a new best; None: never.
            held_out_reward: reported beside the reward and not optimised: where it falls, the reward is being gamed.
            adjoint_guidance_scale: guidance scale of the denoiser in the backward pass, 1.0 to keep classifier-free
                guidance out of it; None: as in the runs. Nothing to estimators without a denoiser.
            decoder: decodes for the reward in the autoencoder's place, such as an `AutoencoderTiny`; the images that
                are returned are the autoencoder's.
            checkpoint_decoder: recomputes the decoder's activations in its backward pass instead of keeping them.
            **call_arguments: to the pipeline's call, such as `negative_prompt`.

        Returns:
            `GuidanceOutput`. Cost: `num_guidance_steps + 1` ordinary runs with decoding, and a decoder and reward
            gradient a guidance step; see the estimator for its own.

        Raises:
            InputError: before sampling, arguments out of range, latents of the wrong shape, a reward that is not
                differentiable or of the wrong shape.
            TrajectoryError: torch.inference_mode, latents changed between steps, a model with learned variance.
            NumericalError: in the first run, images or a reward that are not finite. In later ones, and where a
                gradient is not, the best so far is returned, and `status` says what happened.
        """
        options = GuidanceOptions(
            num_guidance_steps, step_size, estimator, optimise, optimizer, patience, held_out_reward,
            adjoint_guidance_scale, decoder, checkpoint_decoder, output_type,
        )  # fmt: skip
        check_arguments(self, FisherPipelineMixin.guide, call_arguments)
        output = guided_images(
            self, prompt, reward, options, (height, width), num_inference_steps, guidance_scale,
            num_images_per_prompt, generator, latents, call_arguments,
        )  # fmt: skip
        return output if return_dict else output.to_tuple()

    def _likelihood_denoiser(
        self, samples: torch.Tensor, guidance_scale: float, prompt: Any, call_arguments: dict[str, Any]
    ) -> PipelineDenoiser:
        """The pipeline's denoiser for (B, C, h, w) samples with one condition each."""
        negative = [name for name, text in call_arguments.items() if name in NEGATIVE_PROMPTS and text]
        if negative:
            raise InputError(
                f"`{negative[0]}` is {call_arguments[negative[0]]!r}; a likelihood is without guidance, where "
                "negative prompts count for nothing. Leave it out; `compare_likelihood` compares two prompts."
            )
        _, conditions = self._conditions(prompt, call_arguments, len(samples))
        sizes = self._size_arguments((samples.shape[-2] * self._factor, samples.shape[-1] * self._factor))
        return PipelineDenoiser(self, guidance_scale, **{**sizes, **call_arguments, **conditions})

    def _check_likelihood(self, num_inference_steps: int, bins: int | None, call_arguments: dict[str, Any]) -> float:
        """Refuses what `log_likelihood` can't use; returns the guidance scale, taken out of `call_arguments`."""
        check_likelihood(num_inference_steps)
        self._check_scheduler()
        self._checked_bins(bins)
        guidance = self._likelihood_guidance(call_arguments)
        check_arguments(self, FisherPipelineMixin.log_likelihood, call_arguments)
        return guidance

    def _trace_estimator(
        self, estimator: FisherEstimator | None, num_probes: int | Literal["auto"] | None
    ) -> tuple[FisherEstimator, int | None]:
        """Returns a likelihood's estimator and its number of probes."""
        if estimator is None:
            estimator = AutodiffFisher() if self.trace_model is None else TraceMatchingFisher(self.trace_model)
        if num_probes == "auto":
            num_probes = check_estimator(estimator).default_num_probes
        return estimator, num_probes

    def _prior(self, mean: Any, variance: Any, samples: torch.Tensor) -> tuple[Any, Any]:
        """The given moments of the data, or else the checkpoint's, in the layout of the pipeline's latents."""
        if mean is None and variance is None and self.latent_statistics is not None:
            mean, variance = (_fit(value, samples[0]) for value in self.latent_statistics)
        return self._pack_statistic(mean, samples), self._pack_statistic(variance, samples)

    def _pooled(self, conditions: dict[str, Any]) -> torch.Tensor:
        """A vector a sample, (B, width), that stands for its condition, for trace models with `pooled_channels`.

        Args:
            conditions: the call's arguments, with a condition a sample as `_conditions` gives them.
        """
        raise UnsupportedError(
            f"{type(self).__name__} has no conditions, so no pooled vector for a trace model with `pooled_channels`. "
            "Use a trace model with pooled_channels=None."
        )

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


def _fit(statistic: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A per-element statistic for latents of its own size; its mean over space for others."""
    if statistic.shape == like.shape:
        return statistic
    return statistic.mean(dim=(-2, -1), keepdim=True)
