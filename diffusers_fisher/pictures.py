"""Draws the diffusion Fisher: its diagonal in latents, the effect of its eigenvectors on images, its trace and what
follows from it, and its differences between prompts.

matplotlib is imported when a function is called. Only its `Figure` is used: no backend is chosen, no global state is
changed. Save a figure with `figure.savefig(path)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from .arguments import check_kinds
from .backbones import backbone_of
from .curvature import PosteriorUncertainty
from .curvature.memorisation_output import Memorisation, Score
from .curvature.uncertainty_pipeline import PixelUncertainty
from .errors import InputError
from .fisher.estimate import Estimate, Probes
from .fisher.operator import FisherOperator
from .noise import NoiseLevel, expand

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.lines import Line2D

CELL = 1.5  # width of one picture, in inches


@dataclasses.dataclass(frozen=True)
class _Column:
    """Holds one picture per sample, and a line of text below each: colours (B, H, W, 3), or numbers (B, H, W)."""

    title: str
    pictures: torch.Tensor
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()
    colorbar: bool = False


@check_kinds
def fisher_pictures(
    pipe: DiffusionPipeline | None,
    operator: FisherOperator,
    count: int = 1,
    scale: float = 0.3,
    probes: Probes | None = None,
    decode: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Figure:
    """Draws one row per sample: the posterior mean, the diagonal, and the image moved along extreme eigenvectors.

    The diagonal is that of sigma^2 F, averaged over channels. It is 1 where the noisy sample determines the clean one,
    0 where the clean sample stays as uncertain as the noise (a variance of (sigma/alpha)^2), and negative where the
    clean sample is more uncertain than the noise, for example between modes. Every eigenvector has three pictures:
    E[x_0|x_t] minus a move along the eigenvector, E[x_0|x_t] plus the move, and the difference in brightness (red: the
    latter is brighter; full colour at 1). The number below is sigma^2 times the eigenvalue, on the scale of the
    diagonal. At this noise level the model determines the most curved directions, and leaves the least curved ones
    open.

    Args:
        pipe: latent pipeline whose autoencoder decodes; None is allowed with `decode`.
        operator: Fisher at a state with samples (B, C, H, W). Where it is not symmetric, the mean of the operator and
            its transpose is drawn.
        count: number of eigenvectors at each end of the spectrum.
        scale: length of the move relative to the norm of E[x_0|x_t]; the same for all moves, so that pictures compare.
        probes: probes for the diagonal; None: the exact diagonal, by d products.
        decode: function from latents (B, C, H, W) to images (B, 3, H, W) in [0, 1], used instead of the pipeline's
            autoencoder.

    Returns:
        A matplotlib figure.

    Cost: d products (or one per probe), some tens of products per sample and end, and 4 `count` + 1 decodings.

    Raises:
        InputError: samples are packed, or `count` or `scale` is out of range. UnsupportedError: the operator is not
            symmetric and has products with one side only.
    """
    sample = operator.state.sample
    if sample.ndim != 4:
        raise InputError(f"Samples have shape {tuple(sample.shape)}; allowed: (B, C, H, W), latents before packing.")
    if not 0 < scale < float("inf"):
        raise InputError(f"`scale` is {scale}; allowed: positive, such as 0.3 of the posterior mean's norm.")
    show = decode or (lambda latents: decode_latents(pipe, latents))
    symmetric = operator.symmetrised()
    noise = expand(operator.state.level.sigma**2, sample.double())
    diagonal = (noise * operator.diagonal(probes).value).mean(1).cpu()  # symmetrised, it would be the same
    mean_column = _Column(r"E$[x_0|x_t]$", _pixels(show(operator.state.pred_original_sample.detach())))
    diagonal_column = _Column(r"diagonal of $\sigma^2F$", diagonal, {"cmap": "viridis"}, colorbar=True)
    groups = {"": [mean_column, diagonal_column]}
    for name, largest in (("most curved", True), ("least curved", False)):
        for index, columns in enumerate(_directions(symmetric, show, count, scale, largest), start=1):
            groups[name if count == 1 else f"{name}, {index}"] = columns
    return _draw_groups(groups, len(sample))


@check_kinds
def uncertainty_pictures(
    pipe: DiffusionPipeline | None,
    uncertainty: PosteriorUncertainty,
    pixels: PixelUncertainty | None = None,
    deviations: float = 2.0,
    decode: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Figure:
    """Draws one row per sample: the posterior mean, what is left open of each element, and the leading directions.

    The second picture is the standard deviation, averaged over channels: of the latents or, with `pixels`, of the
    pixels. Every direction has three pictures: the mean minus and plus some standard deviations along the direction,
    and the difference in brightness (red: the latter is brighter; full colour at 1). The number below is the share of
    the total variance.

    Args:
        pipe: latent pipeline whose autoencoder decodes; None is allowed with `decode`.
        uncertainty: of samples (B, C, H, W).
        pixels: the same in pixels, from `decode_uncertainty`.
        deviations: length of a move, in standard deviations along its direction.
        decode: function from latents (B, C, H, W) to images (B, 3, H, W) in [0, 1], used instead of the pipeline's
            autoencoder.

    Returns:
        A matplotlib figure. Cost: 2 n + 1 decodings per sample for n directions.

    Raises:
        InputError: samples are packed, or `deviations` is not positive.
    """
    mean = uncertainty.mean.float()
    if mean.ndim != 4 or deviations <= 0:
        raise InputError(
            f"Samples have shape {tuple(mean.shape)}, and `deviations` is {deviations}; allowed: (B, C, H, W), and a "
            "positive number such as 2."
        )
    show = decode or (lambda latents: decode_latents(pipe, latents))
    deviation = uncertainty.standard_deviation if pixels is None else pixels.standard_deviation
    options = {"cmap": "magma", "vmin": 0}
    columns = [_Column(r"E$[x_0|x_t]$", _pixels(show(mean)))]
    columns.append(_Column("deviation", deviation.mean(1).float(), options, colorbar=True))
    groups = {"": columns}
    rows = zip(uncertainty.eigenvalues, uncertainty.directions, uncertainty.explained, strict=True)
    for number, (variance, vector, shares) in enumerate(rows, start=1):
        move = deviations * expand(variance.clamp_min(0).sqrt(), mean) * vector.float()
        groups[f"direction {number}"] = _moves(mean, move, show, [f"{share:.0%}" for share in shares.tolist()])
    return _draw_groups(groups, len(mean))


@check_kinds
def trace_plot(
    levels: NoiseLevel | Sequence[NoiseLevel],
    estimates: Mapping[str, Sequence[Estimate]],
    dimensions: int | None = None,
) -> Figure:
    """Draws the trace against the noise-to-signal ratio: one line per estimator, the mean of the samples.

    A band of two standard errors shows the error of this mean that the probes cause. Exact traces have no band. A
    single probe has no band either, because its standard error is not known.

    Args:
        levels: noise levels (L,), one per point of every line.
        estimates: trace estimates by name of the estimator, one per level.
        dimensions: number of dimensions d of one sample. With it, the axis shows r = (d - sigma^2 tr F)/d, the mean
            posterior variance of the noise: 1 where the sample says nothing of the noise, 0 where it determines the
            noise. None: the axis shows sigma^2 tr F.

    Returns:
        A matplotlib figure.

    Raises:
        InputError: there are no estimates, the estimates are not traces, or their number is not that of the levels.
    """
    from .figures import finish_curves, make_figure

    levels = [levels] if isinstance(levels, NoiseLevel) else levels
    if not levels:
        raise InputError("There are no noise levels; give at least one.")
    alpha = torch.cat([level.alpha.detach().double().cpu().reshape(-1) for level in levels])
    sigma = torch.cat([level.sigma.detach().double().cpu().reshape(-1) for level in levels])
    _check_estimates(estimates, len(sigma))
    figure, (axes,) = make_figure(6.5, 4)
    curves = [_draw_line(axes, sigma / alpha, sigma, line, dimensions) for line in estimates.values()]
    label = r"$\sigma^2\,\mathrm{tr}\,F$" if dimensions is None else r"$r = (d - \sigma^2\,\mathrm{tr}\,F)/d$"
    finish_curves(axes, label, curves, list(estimates))
    return figure


@check_kinds
def memorisation_pictures(
    memorisation: Memorisation, height: int, width: int, images: torch.Tensor | None = None
) -> Figure:
    """Draws one row per prompt: heat maps of where the conditional law has collapsed, and images if there are any.

    Args:
        memorisation: an output with maps (`maps=True`).
        height, width: size of the images in pixels.
        images: (B, 3, H, W) in [0, 1], images of the prompts, such as results of the pipeline's call.

    Returns:
        A matplotlib figure. The number below each heat map is its mean, the prompt's score, with its standard error.

    Raises:
        InputError: there are no maps, sizes are no multiples of theirs, or images of another number than prompts.
    """
    from matplotlib.figure import Figure

    columns = []
    if images is not None:
        if images.ndim != 4 or len(images) != memorisation.noise.shape[1]:
            raise InputError(
                f"Images have shape {tuple(images.shape)}; allowed: ({memorisation.noise.shape[1]}, 3, H, W), one per "
                "prompt."
            )
        columns.append(_Column("image", _pixels(images)))
    scores: list[tuple[Score, str, torch.Tensor, torch.Tensor]] = [
        ("score", r"$|\epsilon_c - \epsilon_0|^2$", memorisation.score_difference, memorisation.score_error)
    ]
    if memorisation.trace_differences is not None:
        title = r"$\sigma^2(\mathrm{diag} F_c - \mathrm{diag} F_0)$"
        scores.append(("trace", title, memorisation.trace_difference, memorisation.trace_error))
    for by, title, values, errors in scores:
        notes = [f"{value:.3g} +- {error:.2g}" for value, error in zip(values.tolist(), errors.tolist(), strict=True)]
        maps = memorisation.image_maps(height, width, by=by)
        columns.append(_Column(title, maps, {"cmap": "viridis"}, notes, colorbar=True))
    size = (CELL * (1.4 * len(scores) + (images is not None)), (CELL + 0.2) * len(columns[0].pictures) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    _draw_group(figure.subfigures(1, 1, squeeze=False)[0, 0], "", columns)
    return figure


@torch.no_grad()
def decode_latents(pipe: DiffusionPipeline | None, latents: torch.Tensor) -> torch.Tensor:
    """Decodes scaled latents (B, C, h, w) by the pipeline's autoencoder to images (B, 3, H, W) float32 in [0, 1].

    Raises:
        InputError: there is no pipeline.
        UnsupportedError: the pipeline has no autoencoder.
    """
    if pipe is None:
        raise InputError(
            "There is no pipeline to decode with; pass one, or `decode`, a function from latents to images."
        )
    backbone = backbone_of(pipe)
    backbone.check_decoder()
    return backbone.decode(latents)


def _directions(
    operator: FisherOperator, show: Callable[[torch.Tensor], torch.Tensor], count: int, scale: float, largest: bool
) -> list[list[_Column]]:
    """Returns for each eigenvector the columns minus, plus and difference."""
    mean = operator.state.pred_original_sample.detach()
    curvatures, vectors = operator.eigenpairs(count, largest)
    curvatures = operator.state.level.sigma.cpu() ** 2 * curvatures
    length = scale * torch.linalg.vector_norm(mean.flatten(1), dim=1)
    groups = []
    for curvature, vector in zip(curvatures, vectors, strict=True):
        notes = [rf"$\sigma^2\lambda$ = {value:.3g}" for value in curvature.tolist()]
        groups.append(_moves(mean, expand(length, mean) * vector, show, notes))
    return groups


def _moves(
    mean: torch.Tensor, move: torch.Tensor, show: Callable[[torch.Tensor], torch.Tensor], notes: Sequence[str]
) -> list[_Column]:
    """Returns the columns minus, plus and difference of samples (B, C, H, W) that are moved to both sides."""
    minus, plus = _pixels(show(mean - move)), _pixels(show(mean + move))
    difference = _Column("difference", (plus - minus).mean(-1), {"cmap": "RdBu_r", "vmin": -1, "vmax": 1})
    return [_Column("minus", minus), _Column("plus", plus, notes=notes), difference]


def _pixels(images: torch.Tensor) -> torch.Tensor:
    """Converts images (B, 3, H, W) to arrays (B, H, W, 3) on the CPU."""
    return images.detach().float().cpu().permute(0, 2, 3, 1)


def _draw_groups(groups: Mapping[str, list[_Column]], rows: int) -> Figure:
    """Draws groups of columns beside each other, with a title each."""
    from matplotlib.figure import Figure

    widths = [sum(CELL * (1.4 if column.colorbar else 1) for column in group) for group in groups.values()]
    figure = Figure(figsize=(sum(widths), (CELL + 0.2) * rows + 0.5), layout="constrained")
    parts = figure.subfigures(1, len(groups), width_ratios=widths, squeeze=False)[0]
    for index, (part, (name, columns)) in enumerate(zip(parts, groups.items(), strict=True)):
        part.set_facecolor("0.94" if index % 2 else "1.0")
        _draw_group(part, name, columns)
    return figure


def _draw_group(part: SubFigure, name: str, columns: list[_Column]) -> None:
    part.suptitle(name or " ", fontsize=10)  # a blank title takes space too, so that all pictures stand level
    grid = part.subplots(len(columns[0].pictures), len(columns), squeeze=False)
    for column, cells in zip(columns, grid.T, strict=True):
        for row, (axes, picture) in enumerate(zip(cells, column.pictures, strict=True)):
            image = axes.imshow(picture.numpy(), **column.options)
            axes.set(xticks=[], yticks=[])
            axes.set_xlabel(column.notes[row] if column.notes else " ", fontsize=8)
            if row == 0:
                axes.set_title(column.title, fontsize=9)
            if column.colorbar:
                part.colorbar(image, ax=axes, shrink=0.8).ax.tick_params(labelsize=7)


def _draw_line(
    axes: Axes, x: torch.Tensor, sigma: torch.Tensor, line: Sequence[Estimate], dimensions: int | None
) -> Line2D:
    """Draws the line of one estimator with its band; returns the line."""
    offset, factor = (0, sigma**2) if dimensions is None else (1, -(sigma**2) / dimensions)
    mean = offset + factor * torch.stack([estimate.value.mean() for estimate in line]).cpu()
    errors = [estimate.standard_error.square().sum().sqrt() / len(estimate.standard_error) for estimate in line]
    from .figures import draw_curve

    return draw_curve(axes, x, mean, factor.abs() * torch.stack(errors).cpu())


def _check_estimates(estimates: Mapping[str, Sequence[Estimate]], count: int) -> None:
    if not estimates:
        raise InputError("There are no estimates; give at least one name with one trace estimate per level.")
    for name, line in estimates.items():
        if len(line) != count:
            raise InputError(f"'{name}' has {len(line)} estimates for {count} levels; give one per level.")
        shapes = sorted({tuple(estimate.value.shape) for estimate in line if estimate.value.ndim != 1})
        if shapes:
            raise InputError(f"'{name}' has values of shapes {shapes}; allowed: (B,), as of `operator.trace`.")
