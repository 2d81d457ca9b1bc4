"""The face that our pipeline classes add to stock ones."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from ..backbones.parts import (
    LatentStatistics,
    checkpoint_parts,
    load_parts,
    load_scheduler_name,
    loaded_parts,
    set_checkpoint_parts,
)
from ..curvature.memorisation_pipeline import memorisation
from ..curvature.pipeline import intrinsic_dimension, likelihood_bound
from ..curvature.pixel_bound import pixel_likelihood_bound
from ..curvature.uncertainty_pipeline import posterior_uncertainty
from ..errors import CheckpointError, InputError
from ..files import read_table
from ..guidance import pipeline as guidance
from ..likelihood import pipeline as likelihood
from ..models import FisherTraceModel
from ..schedulers import fisher_scheduler, fisher_scheduler_named
from .persistence import check_folder, check_scheduler, save_parts, stock_pipeline

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
else:
    DiffusionPipeline = object  # at run time the mixin stands before the stock class

HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only")


class FisherPipelineMixin(DiffusionPipeline):
    """Adds likelihood and guidance to a stock pipeline class, and saves folders that stock diffusers reads.

    The methods are the functions `diffusers_fisher.log_likelihood`, `compare_likelihood`, `likelihood_bound`,
    `pixel_likelihood_bound`, `intrinsic_dimension`, `posterior_uncertainty`, `memorisation` and `guide`, which take
    any pipeline that has a backbone, stock ones too.
    """

    scheduler: Any  # diffusers' schedulers share no class that has a `config`
    if TYPE_CHECKING:
        # diffusers' own method accepts any name, so a misspelt name would pass a type checker.
        __getattr__: None  # type: ignore[misc, assignment]

    log_likelihood = likelihood.log_likelihood
    compare_likelihood = likelihood.compare_likelihood
    likelihood_bound = likelihood_bound
    pixel_likelihood_bound = pixel_likelihood_bound
    intrinsic_dimension = intrinsic_dimension
    posterior_uncertainty = posterior_uncertainty
    memorisation = memorisation
    guide = guidance.guide

    @property
    def latent_statistics(self) -> LatentStatistics | None:
        """Mean and variance of the training data's scaled latents, each of one sample's shape, for the likelihood's
        prior; None where the checkpoint has none. It can be set."""
        return checkpoint_parts(self).latent_statistics

    @latent_statistics.setter
    def latent_statistics(self, value: LatentStatistics | None) -> None:
        parts = checkpoint_parts(self)
        set_checkpoint_parts(self, dataclasses.replace(parts, latent_statistics=value, latent_spectrum=None))

    @property
    def latent_spectrum(self) -> torch.Tensor | None:
        """Variances of the coefficients of the discrete cosine transform of the training data's scaled latents, (C, h,
        w), for the likelihood's prior; None where the checkpoint has none. It can be set after `latent_statistics`,
        whose mean it needs; setting `latent_statistics` removes it."""
        return checkpoint_parts(self).latent_spectrum

    @latent_spectrum.setter
    def latent_spectrum(self, value: torch.Tensor | None) -> None:
        parts = checkpoint_parts(self)
        mean = None if parts.latent_statistics is None else parts.latent_statistics[0]
        if value is not None and (mean is None or mean.shape != value.shape or value.ndim != 3):
            shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (value, mean)]
            raise InputError(
                f"`latent_spectrum` has shape {shapes[0]}, the mean of `latent_statistics` {shapes[1]}; allowed: one "
                "shape (C, h, w) for both. Set `latent_statistics` first."
            )
        set_checkpoint_parts(self, dataclasses.replace(parts, latent_spectrum=value))

    @property
    def trace_model(self) -> FisherTraceModel | None:
        """The `FisherTraceModel` of this checkpoint's denoiser; None where there is none. It can be set.
        `log_likelihood` takes the trace from it unless an estimator is passed. It is not a component: it follows the
        pipeline to a device (`to`), but keeps its own precision and is not offloaded."""
        return checkpoint_parts(self).trace_model

    @trace_model.setter
    def trace_model(self, value: FisherTraceModel | None) -> None:
        if value is not None and not isinstance(value, FisherTraceModel):
            raise InputError(
                f"`trace_model` is a {type(value).__name__}; allowed: a FisherTraceModel, as "
                "FisherTraceModel.from_pretrained gives it, or None."
            )
        set_checkpoint_parts(self, dataclasses.replace(checkpoint_parts(self), trace_model=value))

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moves the pipeline as the stock class does; the trace model goes with it to the device."""
        super().to(*args, **kwargs)
        parts = loaded_parts(self)
        if parts is not None and parts.trace_model is not None:
            torch.nn.Module.to(parts.trace_model, self.device)
        return self

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self:
        """Loads a pipeline as the stock class does, with the Fisher scheduler, the latent statistics and the trace
        model that were saved with the checkpoint. Components that were saved as None need not be passed.

        Raises:
            CheckpointError: a local folder with a missing or truncated file, or one that was saved with a scheduler
                that it can't restore.
        """
        source = pretrained_model_name_or_path
        check_folder(source, kwargs)
        pipe = super().from_pretrained(source, **{**_missing_components(source), **kwargs})
        hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
        set_checkpoint_parts(pipe, load_parts(source, **hub))
        scheduler_name = load_scheduler_name(source, **hub)
        if scheduler_name is not None and "scheduler" not in kwargs:
            if fisher_scheduler_named(scheduler_name) is None:  # releases before the check at saving wrote it
                raise CheckpointError(
                    f"'{source}' was saved with the scheduler {scheduler_name}, which is not of diffusers and was not "
                    "saved with it. Pass it: from_pretrained(folder, scheduler=...)."
                )
            pipe.scheduler = fisher_scheduler(type(pipe.scheduler)).from_config(pipe.scheduler.config)
        return pipe

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike, **kwargs: Any
    ) -> None:
        """Saves the stock pipeline, readable by any diffusers, with the Fisher parts beside its index.

        Args:
            **kwargs: as the stock pipeline's `save_pretrained`.

        Raises:
            InputError: an upload, or another form than safetensors.
            UnsupportedError: a scheduler of your own, which the folder could not restore. Nothing is written.
        """
        if kwargs.get("push_to_hub") or kwargs.get("safe_serialization") is False:
            raise InputError("Save to a folder, in safetensors; push the finished folder with huggingface_hub.")
        check_scheduler(self.scheduler)
        stock_pipeline(self).save_pretrained(save_directory, **kwargs)
        save_parts(Path(save_directory), self.scheduler, checkpoint_parts(self))


def _missing_components(source: str | os.PathLike) -> dict[str, None]:
    """Returns the components that a local folder's index has as [null, null].

    diffusers drops such entries and then asks for every component outside the class's `_optional_components`. Those of
    Stable Diffusion 3 do not contain `text_encoder_3` and `tokenizer_3`.
    """
    index = Path(source) / "model_index.json"
    table = read_table(index) if index.is_file() else {}
    return {name: None for name, value in table.items() if value == [None, None]}
