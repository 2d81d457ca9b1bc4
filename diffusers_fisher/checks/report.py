"""The command `diffusers-fisher check`: loads a checkpoint and images, and writes a page and JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from matplotlib.figure import Figure

from ..backbones import backbone_of
from ..backbones.conditions import Condition
from ..checkpoints import embedded_prompt, embedded_test_images
from ..console import say
from ..data import ImageData, open_images
from ..errors import InputError
from ..figures import make_figure
from ..files import write_json
from ..jobs.pages import Page
from ..jobs.pipelines import EMBEDDED, DenoiserSettings, load_pipeline
from .lines import CheckReport
from .pipeline import check

MAX_LISTED = 100  # images of the reference's table


def run_check(
    output: Path, denoiser: DenoiserSettings, data: ImageData | None, prompt: str | None = None,
    reference: Path | None = None, batch_size: int = 16,
) -> CheckReport:  # fmt: skip
    """Checks a checkpoint, prints the table, and writes `check.json` and `index.html`.

    Args:
        output: folder of the files.
        denoiser: the checkpoint.
        data: the images, of which the first are taken; None: the test images of an embedded checkpoint, and for other
            checkpoints samples that the model draws itself.
        prompt: prompt of all images, instead of captions.
        reference, batch_size: arguments of `check`.

    Raises:
        InputError: the checkpoint or the data can't be opened, or the images do not fit the checkpoint.
        UnsupportedError: a pipeline without a Fisher version.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = load_pipeline(denoiser).to(device)
    images, prompts = _images(pipe, denoiser, data)
    report = check(
        pipe, images, prompt if prompt is not None else prompts, reference=reference, batch_size=batch_size,
        on_line=lambda line: say(f"{line.name}: {line.status} ({line.seconds:.1f} s)"),
    )  # fmt: skip
    say(str(report))
    write_json(output / "check.json", report.as_json())
    check_page(report).write(output / "index.html")
    say(f"Written: {output / 'index.html'} and {output / 'check.json'}.")
    return report


def _images(
    pipe: DiffusionPipeline, denoiser: DenoiserSettings, data: ImageData | None
) -> tuple[torch.Tensor | None, Condition]:
    """Returns the images (N, C, H, W) in [0, 1] and their captions; None for what there is not."""
    if data is None:
        if denoiser.path not in EMBEDDED:
            return None, None
        images, labels = embedded_test_images()
        return images, [embedded_prompt(int(label)) for label in labels]
    backbone = backbone_of(pipe)
    source = open_images(data, backbone.image_channels, backbone.takes_text)
    examples = [source[index] for index in range(len(source))]
    sizes = sorted({tuple(example.pixels.shape[:0:-1]) for example in examples})
    if len(sizes) != 1:
        raise InputError(
            f"The images of '{data.path}' have {len(sizes)} sizes, such as {sizes[0]} and {sizes[-1]}; a check takes "
            "images of one size. Set `resolution`."
        )
    captions = [example.caption for example in examples]
    known = [caption for caption in captions if caption is not None]
    pixels = torch.stack([example.pixels for example in examples])
    return pixels, ["" if caption is None else caption for caption in captions] if known else None


def check_page(report: CheckReport) -> Page:
    """Makes the page of a check: the lines, pictures of the scored images, and a figure of the calibration."""
    page = Page(f"Check of {report.model}")
    counts = ", ".join(report.failed) or "none"
    page.paragraph(f"Device: {report.device}. Lines that failed: {counts}.")
    columns = ["line", "status", "measured", "cause", "what to do", "seconds"]
    page.table(columns, [
        [line.name, line.status, line.measured or None, line.cause or None, line.cure or None, line.seconds]
        for line in report.lines
    ])  # fmt: skip
    figures = {line.name: line.figures for line in report.lines}
    if figures.get("calibration"):
        page.heading("Calibration")
        figure = calibration_figure(figures["calibration"]["levels"])
        page.figure(figure, "Slope and squared error of the predicted noise by level")
    if figures.get("estimators"):
        page.heading("Estimators")
        estimators = figures["estimators"]["estimators"]
        levels = [f"cosine at {level:g}" for level in figures["estimators"]["noise_to_signal"]]
        page.table(["estimator", *levels, "calls per product", "seconds per product"], [
            [name, *row["cosine"], row["calls_per_product"], sum(row["seconds"]) / len(row["seconds"])]
            for name, row in estimators.items()
            if len(row["cosine"]) == len(levels)
        ])  # fmt: skip
    if figures.get("likelihood"):
        _add_likelihoods(page, report, figures["likelihood"])
    if figures.get("reference"):
        places = figures["reference"]["images"]
        page.heading("Place among the reference")
        page.table(["image", "bits/dim", "percentile", "p-value"], [
            [index, row["bits_per_dim"], row["percentile"], row["p_value"]]
            for index, row in enumerate(places[:MAX_LISTED])
        ])  # fmt: skip
    return page


def _add_likelihoods(page: Page, report: CheckReport, figures: Mapping[str, Any]) -> None:
    """Adds the likelihoods of the scored images, with their pictures."""
    page.heading("Likelihoods")
    columns = ("bits_per_dim", "total_error", "other", "bound")
    rows = list(zip(*(figures[column] for column in columns), strict=True))
    page.table(["image", "bits/dim", "within", "by another estimator", "bound"], [
        [index, *row] for index, row in enumerate(rows)
    ])  # fmt: skip
    if report.images is not None:
        pictures = [image.expand(3, -1, -1) if len(image) == 1 else image for image in report.images]
        page.pictures(
            (picture, f"image {index}: {row[0]:.4f} bits/dim")
            for index, (picture, row) in enumerate(zip(pictures, rows, strict=True))
        )


def calibration_figure(levels: Sequence[Mapping[str, float]]) -> Figure:
    """Draws slope and squared error of the predicted noise by level, with the Gaussian predictor's error."""
    ratios = [math.exp(level["log_noise"]) for level in levels]
    figure, (left, right) = make_figure(10, 3.5, 1, 2)
    left.errorbar(
        ratios, [level["slope"] for level in levels], [3 * level["slope_error"] for level in levels], fmt="o-"
    )
    left.axhline(1, color="black", linewidth=0.8)
    left.set(xscale="log", xlabel="sigma/alpha", ylabel="slope of the noise on the predicted noise (1 is right)")
    right.plot(ratios, [level["squared_error"] for level in levels], "o-", label="this checkpoint")
    right.plot(ratios, [level["gaussian"] for level in levels], "--", color="black", label="Gaussian")
    right.set(xscale="log", yscale="log", xlabel="sigma/alpha", ylabel="squared error per dimension")
    right.legend()
    return figure
