"""Settings of a dataset's likelihoods."""

import dataclasses
from typing import Annotated, Any

from pydantic import Field

from ..curvature import BoundOptions
from ..data import ImageData
from ..errors import InputError
from ..jobs.config import flat_settings
from ..jobs.pipelines import DenoiserSettings
from ..likelihood import DEFAULT_SCHEME
from ..likelihood.pipeline import first_grid
from ..likelihood.schemes import scheme_of
from ..settings import ChainVariance, LikelihoodMethod, NotNegative, TraceEstimator, settings_class


@settings_class
class DatasetSettings:
    """Settings on which the numbers depend. A run can be resumed with the same settings only.

    Args:
        denoiser: the pipeline.
        data: the images. Their captions are the prompts, or the class labels for pipelines that take labels.
        prompt: prompt of all images. Without it and without captions, the prompt is empty.
        method: "ode" for `log_likelihood`, or "bound" for `likelihood_bound`.
        num_inference_steps, scheme, bins: arguments of these functions; None: 32 steps, or those of the bound.
        tolerance: argument of `log_likelihood`; None: 0.05 bits/dim, or one grid where `num_inference_steps` is set.
        sample_latents: argument of `log_likelihood`.
        variance, num_draws: arguments of `likelihood_bound`.
        estimator: estimator of the trace: "trace-model" is the pipeline's own, "autodiff" and "finite-difference" use
            probes, and "auto" is the trace model, or "finite-difference" for pipelines without one.
        seed: seed of probes, dequantisation and sampled latents. The draws of an image depend on its content alone.
    """

    denoiser: DenoiserSettings
    data: ImageData
    prompt: str | None = None
    method: LikelihoodMethod = "ode"
    num_inference_steps: Annotated[int, Field(ge=2)] | None = None
    scheme: str = DEFAULT_SCHEME
    tolerance: Annotated[float, Field(gt=0)] | None = None
    estimator: TraceEstimator = "auto"
    num_probes: NotNegative = 1
    bins: int | None = None
    seed: int = 0
    sample_latents: bool = False
    variance: ChainVariance = "optimal"
    num_draws: int | None = None

    def __post_init__(self) -> None:
        scheme_of(self.scheme)
        bound = BoundOptions(self.variance, self.num_inference_steps, self.num_draws)
        others = {"variance": self.variance != "optimal", "num_draws": self.num_draws is not None}
        if self.method == "bound":
            others = {
                "scheme": self.scheme != DEFAULT_SCHEME, "tolerance": self.tolerance is not None,
                "estimator": bound.uses_schedule and self.estimator != "auto",
            }  # fmt: skip
        names = [name for name, is_set in others.items() if is_set]
        if names:
            raise InputError(
                f"`{names[0]}` has no use with method '{self.method}' and variance '{self.variance}'. Leave it out."
            )
        if self.prompt is not None and self.data.caption_column is not None:
            raise InputError("`prompt` and `caption_column` are both set; allowed: one of them. Leave the other out.")


def settings_note(settings: DatasetSettings) -> dict[str, Any]:
    """Returns the settings on which the numbers depend; those of the ODE as before there were bounds."""
    note = flat_settings(dataclasses.asdict(settings))
    del note["data.max_pixels"]  # no number depends on it, and --retry-failed may take another limit
    del note["tolerance"]
    if settings.data.key_column is None:  # as before there were keys
        del note["data.key_column"]
    if settings.method == "ode":
        note["num_inference_steps"], note["tolerance"] = first_grid(
            settings.num_inference_steps, settings.tolerance or "auto", step_halving=False
        )
        for name in ("method", "variance", "num_draws"):
            del note[name]
    return note
