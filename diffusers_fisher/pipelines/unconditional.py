"""What unconditional pipelines share: no prompts, and a number of samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import InputError
from ..guidance.checks import Reward
from ..guidance.noise_ascent import GuidanceOutput
from ..likelihood import LikelihoodOutput
from .mixin import FisherPipelineMixin


class UnconditionalMixin(FisherPipelineMixin):
    """`FisherPipelineMixin` without prompts."""

    def log_likelihood(self, images: Any = None, **options: Any) -> LikelihoodOutput:  # type: ignore[override]
        """As `FisherPipelineMixin.log_likelihood`, without a prompt."""
        return super().log_likelihood(images, **options)

    def guide(  # type: ignore[override]
        self, reward: Reward, batch_size: int = 1, **options: Any
    ) -> GuidanceOutput | tuple:
        """As `FisherPipelineMixin.guide`, for `batch_size` samples; a reward's prompts are empty strings."""
        if batch_size < 1:
            raise InputError(f"`batch_size` is {batch_size}; allowed: at least 1.")
        return super().guide(None, reward, batch_size=batch_size, **options)

    def _conditions(
        self, prompt: Any, call_arguments: dict[str, Any], count: int | None, num_images_per_prompt: int = 1
    ) -> tuple[Sequence[str], dict[str, Any]]:
        if prompt is not None:
            raise InputError(f"{type(self).__name__} is unconditional; it takes no `prompt`.")
        number = count if count is not None else call_arguments["batch_size"] * num_images_per_prompt
        return [""] * number, {"batch_size": number}
