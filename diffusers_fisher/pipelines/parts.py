"""What our pipelines keep beside the stock components: the training data's statistics, and a trace model."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from ..errors import InputError
from ..models import FisherTraceModel
from ..schedulers import fisher_scheduler
from .persistence import check_folder, load_parts, load_trace_model, save_parts, stock_pipeline
from .space import LatentSpace


class CheckpointParts(LatentSpace):
    """Loads and saves checkpoints with the Fisher parts; stock diffusers reads the same folders."""

    @property
    def latent_statistics(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(mean, variance) of the training data's scaled latents, each of one sample's shape, for the likelihood's
        prior; None where the checkpoint has none. May be set."""
        return self._part("_latent_statistics", lambda source: load_parts(source)[1])

    @latent_statistics.setter
    def latent_statistics(self, value: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        self._latent_statistics = value

    @property
    def trace_model(self) -> FisherTraceModel | None:
        """The `FisherTraceModel` of this checkpoint's denoiser, by which `log_likelihood` knows the trace unless it is
        given an estimator; None where there is none. May be set. It is no component: it follows the pipeline to a
        device (`to`), but keeps its own precision and is not offloaded."""
        return self._part("_trace_model", load_trace_model)

    @trace_model.setter
    def trace_model(self, value: FisherTraceModel | None) -> None:
        if value is not None and not isinstance(value, FisherTraceModel):
            raise InputError(
                f"`trace_model` is a {type(value).__name__}; allowed: a FisherTraceModel, as "
                "FisherTraceModel.from_pretrained gives it, or None."
            )
        self._trace_model = value

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock pipeline's; the trace model goes with it to the device."""
        super().to(*args, **kwargs)
        if self.trace_model is not None:
            self.trace_model.to(self.device)
        return self

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """As the stock pipeline's; restores the Fisher scheduler, the latent statistics and the trace model saved with
        the checkpoint.

        Raises:
            CheckpointError: a local folder with a missing or truncated file.
        """
        check_folder(pretrained_model_name_or_path, given=kwargs)
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        hub = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
        scheduler, pipe.latent_statistics = load_parts(pretrained_model_name_or_path, **hub)
        pipe.trace_model = load_trace_model(pretrained_model_name_or_path, **hub)
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

    def _part(self, name: str, load: Callable[[str], Any]) -> Any:
        """What was set; for a pipeline that a class without our parts loaded, what its folder has."""
        source = self.config.get("_name_or_path")
        if name not in vars(self) and source and os.path.isdir(source):
            setattr(self, name, load(source))
        return vars(self).get(name)
