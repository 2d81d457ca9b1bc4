"""Log-likelihoods of images under several prompts, with the same random draws for all."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..errors import InputError
from ..images import UNIT_RANGE
from ..likelihood import LikelihoodOutput
from ..likelihood.comparison import METHODS, LikelihoodComparison
from ..likelihood.squared_error import squared_error_log_likelihood
from .inputs import check_arguments

NUM_LEVELS = 64
SQUARED_ERROR_OPTIONS = ("prior_mean", "prior_variance", "bins")


def compared_likelihoods(
    pipe: Any,
    score: Callable[..., LikelihoodOutput],
    images: Any,
    prompts: Sequence[Any] | None,
    latents: torch.Tensor | None,
    method: str,
    num_levels: int | None,
    generator: torch.Generator | None,
    options: dict[str, Any],
) -> LikelihoodComparison:
    """See `FisherPipelineMixin.compare_likelihood`, whose `log_likelihood` is `score`."""
    if method not in METHODS:
        raise InputError(f"`method` is {method!r}; allowed: {', '.join(METHODS)}.")
    _check_options(pipe, score, method, num_levels, options)
    candidates = [None] if prompts is None else prompts
    if isinstance(candidates, str) or not len(candidates):
        raise InputError(f"`prompts` is {prompts!r}; allowed: a list of at least one, each for all images.")
    if generator is None:  # not None, by which noise on a GPU would come from its own generator, that is not replayed
        generator = torch.default_generator
    samples = pipe._latents_to_score(images, latents, options.pop("data_range", UNIT_RANGE))
    rows: list[Any]
    if method == "ode":
        rows = [
            score(None, prompt, latents=samples, generator=generator, **options)
            for prompt in _replayed(candidates, generator)
        ]
        errors = torch.stack([row.discretisation_error for row in rows])
        draws = [row.prior_log_prob + row.trace_by_probe for row in rows]
    else:
        count = NUM_LEVELS if num_levels is None else num_levels
        rows = _squared_errors(pipe, samples, candidates, count, generator, options)
        errors = torch.zeros(len(rows), len(samples), dtype=torch.float64)
        draws = [row.contributions for row in rows]
    return LikelihoodComparison(
        log_prob=torch.stack([row.log_prob for row in rows]), contributions=torch.stack(draws, dim=1),
        discretisation_error=errors, dims=rows[0].dims,
        num_denoiser_calls=sum(row.num_denoiser_calls for row in rows), space=rows[0].space, method=method,
    )  # fmt: skip


def _check_options(pipe: Any, score: Callable, method: str, num_levels: int | None, options: dict[str, Any]) -> None:
    """Refuses options that are not the method's, before they are passed on or ignored."""
    if "prompt" in options:
        raise InputError(
            "`compare_likelihood` takes its prompts as `prompts`, a list, each for all images; got `prompt`."
        )
    if method == "ode":
        if num_levels is not None:
            raise InputError("`num_levels` belongs to method 'squared error'; 'ode' takes `num_inference_steps`.")
        return
    others = set(inspect.signature(score).parameters) - {*SQUARED_ERROR_OPTIONS, "data_range"}
    for name in sorted(others & set(options)):
        raise InputError(
            f"`{name}` belongs to method='ode'; 'squared error' takes num_levels, {', '.join(SQUARED_ERROR_OPTIONS)}, "
            "data_range and arguments of the pipeline's call."
        )
    given = {name: value for name, value in options.items() if name not in (*SQUARED_ERROR_OPTIONS, "data_range")}
    check_arguments(pipe, type(pipe).compare_likelihood, given)


def _squared_errors(
    pipe: Any,
    samples: torch.Tensor,
    prompts: Sequence[Any],
    num_levels: int,
    generator: torch.Generator,
    options: dict[str, Any],
) -> list[Any]:
    pipe._check_scheduler()
    given = {name: options.pop(name, None) for name in SQUARED_ERROR_OPTIONS}
    mean, variance = pipe._prior(given["prior_mean"], given["prior_variance"], samples)
    guidance = pipe._likelihood_guidance(options)
    denoisers = [pipe._likelihood_denoiser(samples, guidance, prompt, dict(options)) for prompt in prompts]
    rows = []
    with pipe._loaded(), pipe.progress_bar(total=num_levels * len(denoisers)) as progress:
        for denoiser in _replayed(denoisers, generator):
            out = squared_error_log_likelihood(
                denoiser, pipe._pack(samples), num_levels, mean, variance, generator, pipe._space, progress.update,
                pipe._checked_bins(given["bins"]),
            )  # fmt: skip
            rows.append(out)
    return rows


def _replayed(entries: Sequence[Any], generator: torch.Generator) -> Iterator[Any]:
    """The entries, with the generator in the same state before each, once moved on in the end."""
    state = generator.get_state()
    for entry in entries:
        generator.set_state(state)
        yield entry
