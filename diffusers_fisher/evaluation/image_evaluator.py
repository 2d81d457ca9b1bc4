"""Computes the likelihoods of a few images at a time, and makes a record of each: of its numbers or of its error."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..backbones import backbone_of
from ..curvature import BoundOptions, LikelihoodBound
from ..curvature.pipeline import likelihood_bound
from ..data import Caption, Example
from ..errors import CoarseGridWarning, InputError, NumericalError, TraceModelWarning
from ..fisher import AutodiffFisher, FiniteDifferenceFisher, FisherEstimator
from ..likelihood import LikelihoodOutput
from ..likelihood.pipeline import log_likelihood
from ..settings import TraceEstimator
from .dataset_records import image_record, method_of

if TYPE_CHECKING:
    from ..pipelines import FisherPipelineMixin
    from .dataset_settings import DatasetSettings

ESTIMATORS: dict[str, type[FisherEstimator]] = {
    "autodiff": AutodiffFisher,
    "finite-difference": FiniteDifferenceFisher,
}
Group = Sequence[tuple[int, Example]]
"""Images with their positions."""


class ImageEvaluator:
    """Evaluates images by a pipeline.

    Args:
        pipe: the pipeline, on the device that computes.
        settings: settings of the likelihoods. Their estimator may be "auto".

    Attributes:
        settings: the settings, with the estimator that "auto" stands for.
        method: description of the likelihoods; None before the first one.
        refusals: errors of images that the pipeline has refused before the first likelihood.
        memory_shortages: number of groups for which there was not enough memory.

    Raises:
        InputError: the pipeline does not take the resolution, the bins or the estimator of the settings.
    """

    def __init__(self, pipe: FisherPipelineMixin, settings: DatasetSettings):
        self.pipe, self.backbone = pipe, backbone_of(pipe)
        resolution, multiple = settings.data.resolution, self.backbone.size_multiple
        if resolution is not None and resolution % multiple:
            raise InputError(f"`resolution` is {resolution}; allowed for this pipeline: multiples of {multiple}.")
        self.backbone.check_bins(settings.bins)
        uses_trace = settings.method == "ode" or not BoundOptions(settings.variance).uses_schedule
        name = chosen_estimator(pipe, settings.estimator) if uses_trace else settings.estimator
        self.settings = dataclasses.replace(settings, estimator=name)
        self.method: dict[str, Any] | None = None
        self.refusals: list[str] = []
        self.memory_shortages = 0

    def evaluate(self, examples: Group) -> Iterator[dict[str, Any]]:
        """Yields the records of images, in an order of its own. Images of the same size are evaluated together.

        An image whose size does not fit the pipeline, that the pipeline refuses, for which there is not enough memory
        or that has no finite likelihood gets a record with `error`.
        """
        groups: dict[torch.Size, list[tuple[int, Example]]] = {}
        multiple = self.backbone.size_multiple
        for position, example in examples:
            height, width = example.pixels.shape[-2:]
            if height % multiple or width % multiple:
                text = (
                    f"Image '{example.name}' has {width}x{height} pixels; this pipeline takes multiples of "
                    f"{multiple}. Set `resolution`."
                )
                yield {"position": position, "name": example.name, "error": text}
            else:
                groups.setdefault(example.pixels.shape, []).append((position, example))
        for (_, height, width), group in groups.items():
            size = len(group)
            if self.settings.data.resolution is None:  # the images may be large, and their memory must be bounded
                size = min(size, max(1, int(self.settings.data.pixel_limit / (height * width))))
            for start in range(0, len(group), size):
                yield from self._evaluate_group(group[start : start + size])

    def _evaluate_group(self, group: Group) -> Iterator[dict[str, Any]]:
        settings = self.settings
        captions = [settings.prompt if settings.prompt is not None else example.caption for _, example in group]
        error: Exception | None = None
        try:
            out = self._likelihood(torch.stack([example.pixels for _, example in group]), captions)
        # diffusers raises ValueError, of which InputError is a subclass.
        except (ValueError, NumericalError, MemoryError, RuntimeError) as exception:
            if isinstance(exception, RuntimeError) and not is_out_of_memory(exception):
                raise
            self.memory_shortages += is_out_of_memory(exception)
            error = exception.with_traceback(None)  # the traceback would keep the tensors
        if error is not None:
            yield from self._evaluate_singly(group, error)
            return
        if self.method is None:
            self.method = method_of(out)
        for row, ((position, example), caption) in enumerate(zip(group, captions, strict=True)):
            yield image_record(position, example, caption, out, row)

    def _likelihood(self, pixels: torch.Tensor, captions: Sequence[Caption]) -> LikelihoodOutput | LikelihoodBound:
        """Returns the likelihoods of images (B, C, H, W) of one size."""
        settings = self.settings
        generator = torch.Generator().manual_seed(settings.seed)
        options: dict[str, Any] = {"bins": settings.bins, "generator": generator}
        options["num_inference_steps"] = settings.num_inference_steps
        if any(caption is not None for caption in captions):
            options["prompt"] = [self._condition(caption) for caption in captions]
        if settings.estimator in ESTIMATORS:
            options |= {"estimator": ESTIMATORS[settings.estimator](), "num_probes": settings.num_probes or None}
        # The summary warns once, for all images.
        with warnings.catch_warnings():
            for category in (CoarseGridWarning, TraceModelWarning):
                warnings.simplefilter("ignore", category)
            # The conditions in `options` may be prompts, labels or none.
            if settings.method == "ode":
                return log_likelihood(
                    self.pipe, pixels, scheme=settings.scheme, sample_latents=settings.sample_latents,
                    tolerance=settings.tolerance or "auto", **options,
                )  # fmt: skip
            variance, draws = settings.variance, settings.num_draws
            return likelihood_bound(self.pipe, pixels, variance=variance, num_draws=draws, **options)

    def _condition(self, caption: Caption) -> str | int:
        """Returns the condition for a caption.

        An image without a caption in a batch with captions has the empty prompt. A number as the prompt of a pipeline
        without texts is a class label.
        """
        if isinstance(caption, str) and not self.backbone.takes_text and caption.isdecimal():
            return int(caption)
        return "" if caption is None else caption

    def _evaluate_singly(self, group: Group, error: Exception) -> Iterator[dict[str, Any]]:
        """Evaluates each image of a group by itself, because the group failed; yields the records.

        The record of a group of one image is the error.
        """
        if len(group) > 1:
            for entry in group:
                yield from self._evaluate_group([entry])
            return
        ((position, example),) = group
        text = f"Image '{example.name}': {error}"
        # The message of `torch.OutOfMemoryError` says more itself.
        if is_out_of_memory(error) and not isinstance(error, torch.OutOfMemoryError):
            size = "x".join(map(str, example.pixels.shape[:0:-1]))
            text = f"Image '{example.name}' of {size} pixels: there is not enough memory for it. Set `resolution`."
        if self.method is None and not isinstance(error, NumericalError):
            self.refusals.append(text)
        yield {"position": position, "name": example.name, "error": text}


def chosen_estimator(pipe: FisherPipelineMixin, name: TraceEstimator) -> TraceEstimator:
    """Returns the estimator, with "auto" resolved. Raises `InputError` if a trace model is wanted and missing."""
    if name == "auto":
        return "finite-difference" if pipe.trace_model is None else "trace-model"
    if name == "trace-model" and pipe.trace_model is None:
        raise InputError(
            "The estimator is 'trace-model', but the pipeline has none; allowed: 'autodiff' or 'finite-difference'. "
            "Train one with diffusers_fisher.training.trace_matching and keep it in the pipeline's folder."
        )
    return name


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether there was too little memory. The allocator of the CPU says so by a `RuntimeError`."""
    words = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)
