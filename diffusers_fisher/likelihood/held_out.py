"""Likelihoods of held-out images in a training loop, where the overfitting of a network shows at once."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from ..arguments import check_kinds
from ..backbones.conditions import Condition
from ..backbones.stock_calls import shallow_copy
from ..errors import InputError
from ..fisher.estimator import FisherEstimator
from ..fisher.finite_difference import FiniteDifferenceFisher
from ..images import ImageLike
from .pipeline import log_likelihood
from .traces import scatter_error


@dataclasses.dataclass(frozen=True)
class ImageSetLikelihood:
    """Holds the bits/dim of a set of images at one step of a training, and their change since the first record.

    Args:
        bits_per_dim: (B,), lower is likelier.
        standard_error: (B,) bits/dim, by the probes.
        change: (B,) bits/dim, difference from the first record by the same directions; zero in the first record.
    """

    bits_per_dim: torch.Tensor
    standard_error: torch.Tensor
    change: torch.Tensor

    @property
    def mean(self) -> float:
        """Mean over the images, bits/dim."""
        return float(self.bits_per_dim.mean())

    @property
    def mean_standard_error(self) -> float:
        """Standard error of `mean` by the probes, for these very images, bits/dim."""
        return float(self.standard_error.square().sum().sqrt()) / len(self.standard_error)

    @property
    def mean_change(self) -> float:
        """Mean of `change` over the images, bits/dim: positive where the images have become less likely."""
        return float(self.change.mean())

    @property
    def change_error(self) -> float:
        """Standard error of `mean_change` by the scatter over the images, bits/dim; infinite for a single image."""
        return float(scatter_error(self.change))


@dataclasses.dataclass(frozen=True)
class HeldOutRecord:
    """Holds the likelihoods at one step of a training. `str` makes one line of it.

    Args:
        step: the step.
        first_step: the step of the first record.
        held_out: likelihoods of the held-out images.
        training: likelihoods of training images; None where none were passed.
    """

    step: int
    first_step: int
    held_out: ImageSetLikelihood
    training: ImageSetLikelihood | None

    def __str__(self) -> str:
        texts = []
        for name, images in (("held-out", self.held_out), ("training", self.training)):
            if images is not None:
                texts.append(f"{name} {images.mean:.4f} +- {images.mean_standard_error:.4f} bits/dim")
                if self.step != self.first_step:
                    texts[-1] += (
                        f" ({images.mean_change:+.4f} +- {images.change_error:.4f} since step {self.first_step})"
                    )
        return f"step {self.step}: {', '.join(texts)}"


class HeldOutLikelihood:
    """Computes the bits/dim of held-out images during a training, by the same random directions at every step.

        callback = HeldOutLikelihood(images, prompts, pipe=pipe, every=500, training_images=some_training_images)
        for step in range(num_steps):
            callback(step, {"unet": unet})  # the network in training, in the place of the pipeline's own
            ...

    Where the training images become likelier and the held-out ones do not, the network overfits. The networks are in
    eval mode during the evaluation. The modes, the random states, the gradients and the grad mode are left as they
    were.

    Args:
        images: held-out images, as in `log_likelihood`.
        prompts: one prompt for all of them, or one per image.
        pipe: the pipeline whose components the modules of a call replace; None where calls pass whole pipelines.
        every: evaluate at the steps that are multiples of this number.
        training_images, training_prompts: images of the training data, to compare with; None: held-out images alone.
        estimator: gives the trace; None: `FiniteDifferenceFisher()`, because a trace model belongs to the network
            before the training.
        seed: seed of the random directions, which are the same at every step.
        report: gets the line of each record; None: nothing is printed.
        **options: options of `log_likelihood`, such as `num_inference_steps`, and arguments of the pipeline's call.
            Without `tolerance` all steps of the training have one grid.

    Attributes:
        history: the records so far.

    Raises:
        InputError: `every` is below 1.
    """

    history: list[HeldOutRecord]

    @check_kinds
    def __init__(
        self,
        images: ImageLike,
        prompts: Condition = None,
        *,
        pipe: DiffusionPipeline | None = None,
        every: int = 100,
        training_images: ImageLike | None = None,
        training_prompts: Condition = None,
        estimator: FisherEstimator | None = None,
        seed: int = 0,
        report: Callable[[str], object] | None = print,
        **options: Any,
    ):
        if every < 1:
            raise InputError(f"`every` is {every}; allowed: 1 or more steps from one evaluation to the next.")
        self.every = every
        self.history = []
        self._sets = {"held_out": (images, prompts)}
        if training_images is not None:
            self._sets["training"] = (training_images, training_prompts)
        self._pipe, self._seed, self._report = pipe, seed, report
        own = FiniteDifferenceFisher() if estimator is None else estimator
        self._options = {"estimator": own, "tolerance": None, **options}

    @check_kinds
    def __call__(
        self, step: int, pipe_or_modules: DiffusionPipeline | Mapping[str, torch.nn.Module]
    ) -> HeldOutRecord | None:
        """Computes the likelihoods at steps that are multiples of `every`, and reports them in one line.

        Args:
            step: number of the training step.
            pipe_or_modules: the pipeline, or modules by the names of the components that they replace.

        Returns:
            The record, or None at other steps. Cost: that of `log_likelihood` for all images.

        Raises:
            InputError: modules without `pipe`, or of names that the pipeline lacks; else as `log_likelihood`.
        """
        if step % self.every:
            return None
        pipe = self._pipeline(pipe_or_modules)
        first = self.history[0] if self.history else None
        with evaluation_mode(pipe):
            images = {
                name: self._evaluate(pipe, *pair, vars(first)[name] if first else None)
                for name, pair in self._sets.items()
            }
        record = HeldOutRecord(step, first.first_step if first else step, images["held_out"], images.get("training"))
        self.history.append(record)
        if self._report is not None:
            self._report(str(record))
        return record

    def _pipeline(self, pipe_or_modules: DiffusionPipeline | Mapping[str, torch.nn.Module]) -> DiffusionPipeline:
        """Returns a copy of the pipeline with the modules, without a progress bar."""
        hidden = {"_progress_bar_config": {"disable": True}}
        if isinstance(pipe_or_modules, DiffusionPipeline):
            return shallow_copy(pipe_or_modules, **hidden)
        if self._pipe is None:
            raise InputError(
                f"The call has the modules {sorted(pipe_or_modules)}, but no pipeline that they belong to. Pass "
                "`pipe=...` to HeldOutLikelihood, or a whole pipeline to the call."
            )
        unknown = sorted(pipe_or_modules.keys() - self._pipe.components.keys())
        if unknown:
            raise InputError(
                f"The call has the modules {unknown}, which {type(self._pipe).__name__} lacks; allowed: "
                f"{sorted(self._pipe.components)}."
            )
        return shallow_copy(self._pipe, **pipe_or_modules, **hidden)

    def _evaluate(
        self, pipe: DiffusionPipeline, images: ImageLike, prompts: Condition, first: ImageSetLikelihood | None
    ) -> ImageSetLikelihood:
        generator = torch.Generator().manual_seed(self._seed)
        out = log_likelihood(pipe, images, prompts, generator=generator, **self._options)
        bits = out.bits_per_dim
        change = torch.zeros_like(bits) if first is None else bits - first.bits_per_dim
        return ImageSetLikelihood(bits, out.to_bits(out.standard_error), change)


@contextlib.contextmanager
def evaluation_mode(pipe: DiffusionPipeline) -> Iterator[None]:
    """Puts the pipeline's networks into eval mode for the block, and every part of them back into its own mode."""
    components = [component for component in pipe.components.values() if isinstance(component, torch.nn.Module)]
    before = [(part, part.training) for component in components for part in component.modules()]
    try:
        for component in components:
            component.eval()
        yield
    finally:
        for part, training in before:
            part.training = training
