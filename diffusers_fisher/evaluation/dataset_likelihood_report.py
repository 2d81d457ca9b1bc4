"""What a dataset's likelihoods are reported as: one file of records, a summary, a histogram and a page."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch

from ..data import Images, ImageStream
from ..errors import CheckpointError
from ..files import atomic_path, save_figure, write_json
from ..jobs.pages import Page
from ..jobs.records import Records
from ..likelihood.solver import COARSE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
SHOWN = 24  # images of each end on the page
NAMED = 100  # images left out that summary and page name; likelihoods.jsonl has them all
CAPTIONS = 50  # most different captions for which means are told
FILE = "file"  # of a record: the hash by which its image is known again
PICTURE = 256  # pixels of a picture's longer side on the page


class Collected:
    """The records of all images, in the order of the data, read from their files as they are asked for.

    Args:
        records: of groups of images, {"method", "seconds", "records": [...]}.

    Attributes:
        seconds: of evaluation, the sum over all processes and runs.
        failed: positions of images whose record is an error.
        method: what the likelihoods say of themselves; None where there are none yet.

    Raises:
        CheckpointError: a damaged file.
    """

    def __init__(self, records: Records):
        self.records, self.seconds = records, 0.0
        self.method: dict[str, Any] | None = None
        self.failed: set[int] = set()
        self._places: dict[int, tuple[str, int]] = {}
        for key in sorted(records.done()):  # those of later attempts come last
            group = records.read(key)
            self.seconds += group["seconds"]
            self.method = self.method or group["method"]
            for number, row in enumerate(group["records"]):
                self._places[row["position"]] = (key, number)
                (self.failed.add if "error" in row else self.failed.discard)(row["position"])

    @property
    def count(self) -> int:
        return len(self._places)

    @property
    def positions(self) -> frozenset[int]:
        return frozenset(self._places)

    def check(self, total: int) -> None:
        """Raises `CheckpointError` unless there is a record of every image."""
        missing = sorted(set(range(total)) - self._places.keys())
        if missing or len(self._places) > total:
            raise CheckpointError(
                f"'{self.records.folder}' has {len(self._places)} records of {total} images, none of those at "
                f"positions {missing[:5]}; run the same command again. Processes on several machines need one folder "
                "that all of them see."
            )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        left = Counter(key for key, _ in self._places.values())
        files: dict[str, list[dict[str, Any]]] = {}  # neighbours lie in as many as there were processes
        for position in sorted(self._places):
            key, number = self._places[position]
            if key not in files:
                files[key] = self.records.read(key)["records"]
            yield files[key][number]
            left[key] -= 1
            if not left[key]:
                del files[key]

    def __getitem__(self, position: int) -> dict[str, Any]:
        key, number = self._places[position]
        return self.records.read(key)["records"][number]


def write_results(records: Records, images: Images, total: int, run: Mapping[str, Any]) -> dict[str, Any]:
    """Writes `likelihoods.jsonl`, `summary.json`, `histogram.png` and `index.html`; returns the summary.

    Args:
        images: of which the likeliest and least likely are shown.
        total: number of images.
        run: processes, batch_size, seconds, images of the run that has ended.
    """
    collected, folder = Collected(records), records.folder
    collected.check(total)
    positions, captions, columns, failed = _table(collected, folder / "likelihoods.jsonl")
    bits = columns["bits_per_dim"]
    summary = _summary(collected, columns, failed, run)
    summary["without_caption"] = captions.count(None) if records.settings["data.caption_column"] else 0
    summary["by_caption"] = _by_caption(captions, bits)
    summary["files_not_read"] = {"count": len(images.files_left_out), "names": images.files_left_out[:NAMED]}
    write_json(folder / "summary.json", summary)
    figure = histogram(bits, summary)
    save_figure(figure, folder / "histogram.png")
    order = bits.argsort(kind="stable")
    ends = {"Most likely": order[:SHOWN], "Least likely": order[::-1][:SHOWN]}
    chosen = {title: [collected[positions[index]] for index in indices] for title, indices in ends.items()}
    _page(summary, records.settings, figure, chosen, images).write(folder / "index.html")
    print(_told(summary, folder), flush=True)
    return summary


def _table(
    collected: Collected, path: Path
) -> tuple[list[int], list[Any], dict[str, numpy.ndarray], list[dict[str, Any]]]:
    """Writes the file of all records; returns what summaries need: positions, captions and numbers of the images that
    have a likelihood, and the records of those that have none."""
    names = ("bits_per_dim", "discretisation_error", "standard_error", "dims")
    positions: list[int] = []
    captions: list[Any] = []
    values: list[list[float]] = []
    failed = []
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for row in collected:
            told = {name: value for name, value in row.items() if name != FILE}
            file.write(json.dumps(told, ensure_ascii=False, allow_nan=False) + "\n")
            if "error" in row:
                failed.append(row)
                continue
            positions.append(row["position"])
            captions.append(row["caption"])
            values.append([math.inf if row[name] is None else row[name] for name in names])
    columns = numpy.array(values, dtype=numpy.float64).T
    return positions, captions, dict(zip(names, columns, strict=True)), failed


def _summary(
    collected: Collected,
    columns: Mapping[str, numpy.ndarray],
    failed: Sequence[dict[str, Any]],
    run: Mapping[str, Any],
) -> dict[str, Any]:
    bits, nats = columns["bits_per_dim"], columns["dims"] * math.log(2)  # nats of one bit/dim
    steps, probes = columns["discretisation_error"] / nats, columns["standard_error"] / nats
    deviation = float(bits.std(ddof=1)) if len(bits) > 1 else None
    settings = collected.records.settings
    return {
        "images": collected.count, "evaluated": len(bits), "left_out": len(failed),
        "left_out_images": [{"name": row["name"], "error": row["error"]} for row in failed[:NAMED]],
        "bits_per_dim": {
            "mean": float(bits.mean()), "standard_deviation": deviation,
            "standard_error": None if deviation is None else deviation / len(bits) ** 0.5, "least": float(bits.min()),
            "greatest": float(bits.max()),
            "quantiles": dict(zip(map(str, QUANTILES), numpy.quantile(bits, QUANTILES).tolist(), strict=True)),
        },
        "errors_in_bits_per_dim": {
            "discretisation_mean": float(steps.mean()), "discretisation_greatest": float(steps.max()),
            "probes_mean": float(probes.mean()) if numpy.isfinite(probes).all() else None,
        },
        "images_on_a_coarse_grid": int((steps > COARSE).sum()),
        "several_sizes": len(set(columns["dims"].tolist())) > 1,
        "method": collected.method, "evaluations_an_image": settings["num_inference_steps"] + 1,
        "process_seconds": collected.seconds,
        "images_per_process_second": collected.count / max(collected.seconds, 1e-9),
        "last_run": {**run, "images_per_second": run["images"] / max(run["seconds"], 1e-9)},
    }  # fmt: skip


def _by_caption(captions: Sequence[Any], bits: numpy.ndarray) -> list[dict[str, Any]]:
    """Mean and deviation for each caption, the likeliest first; none where there are many captions, or one."""
    groups: dict[Any, list[float]] = defaultdict(list)
    for caption, value in zip(captions, bits.tolist(), strict=True):
        groups[caption].append(value)
        if len(groups) > CAPTIONS:
            return []
    if len(groups) < 2:
        return []
    rows = [
        {"caption": caption, "images": len(values), "mean": float(numpy.mean(values)),
         "standard_deviation": float(numpy.std(values, ddof=1)) if len(values) > 1 else None}
        for caption, values in groups.items()
    ]  # fmt: skip
    return sorted(rows, key=lambda row: row["mean"])


def histogram(bits: numpy.ndarray, summary: Mapping[str, Any]) -> Figure:
    """The distribution of the images' bits/dim: a matplotlib figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.hist(bits, bins=min(80, max(10, round(len(bits) ** 0.5))), color="C0", alpha=0.8)
    mean = summary["bits_per_dim"]["mean"]
    axes.axvline(mean, color="C1", label=f"mean {mean:.3f}")
    quantiles = summary["bits_per_dim"]["quantiles"]
    for index, name in enumerate(("0.05", "0.95")):
        label = "5% and 95%" if index == 0 else None
        axes.axvline(quantiles[name], color="C1", linestyle=":", label=label)
    axes.set(xlabel=f"bits/dim of the {summary['method']['space']} (lower is likelier)", ylabel="images")
    axes.legend()
    return figure


def _page(
    summary: Mapping[str, Any],
    settings: Mapping[str, Any],
    figure: Figure,
    ends: Mapping[str, Sequence[dict[str, Any]]],
    images: Images,
) -> Page:
    page = Page("Log-likelihoods of a dataset")
    method, bits, errors = summary["method"], summary["bits_per_dim"], summary["errors_in_bits_per_dim"]
    page.paragraph(
        f"Pipeline {settings['denoiser.path']}, data {settings['data.path']} (split {settings['data.split']}): "
        f"{summary['evaluated']} of {summary['images']} images evaluated, {summary['left_out']} left out. Density of "
        f"the {method['space']}, {method['density']}; prior {method['prior']}; trace {method['trace']}; scheme "
        f"{method['scheme']}, {summary['evaluations_an_image']} evaluations of the denoiser an image."
    )
    for sentence in _warnings(summary):
        page.paragraph(sentence)
    rows = [("mean", bits["mean"]), ("standard deviation", bits["standard_deviation"])]
    rows += [("standard error of the mean", bits["standard_error"]), ("least", bits["least"])]
    rows += [(f"quantile {name}", value) for name, value in bits["quantiles"].items()]
    rows += [("greatest", bits["greatest"]), ("error by the steps, mean", errors["discretisation_mean"])]
    rows += [("error by the steps, greatest", errors["discretisation_greatest"])]
    rows += [("error by the probes, mean", errors["probes_mean"])]
    page.table(("bits/dim (lower is likelier)", ""), rows)
    page.figure(figure, "Images by bits/dim.")
    if summary["by_caption"]:
        page.heading("By caption")
        page.table(
            ("caption", "images", "mean bits/dim", "standard deviation"),
            [tuple(row.values()) for row in summary["by_caption"]],
        )
    pictures = _pictures(images, {row["position"] for end in ends.values() for row in end})
    for title, end in ends.items():
        page.heading(title)
        page.pictures([(pictures[row["position"]], _caption(row)) for row in end])
    if summary["left_out"]:
        page.heading("Left out")
        page.paragraph(f"{summary['left_out']} images have no likelihood, among them:")
        page.table(("image", "why"), [(row["name"], row["error"]) for row in summary["left_out_images"]])
    return page


def _caption(row: Mapping[str, Any]) -> str:
    said = "" if row["caption"] is None else f", {row['caption']}"
    return f"{row['bits_per_dim']:.3f} bits/dim: {row['name']}{said}"


def _pictures(images: Images, positions: set[int]) -> dict[int, torch.Tensor]:
    """Pictures (3, H, W) of some images; a stream is read again as far as the last of them."""
    if not isinstance(images, ImageStream):
        return {position: _small(images[position].pixels) for position in sorted(positions)}
    found = {}
    for position, row in enumerate(images.undecoded()):
        if position in positions:
            found[position] = _small(images.example(row, position).pixels)
        if len(found) == len(positions):
            break
    return found


def _small(pixels: torch.Tensor) -> torch.Tensor:
    """(C, H, W) as colours, at most `PICTURE` pixels wide and high."""
    pixels = pixels.expand(3, -1, -1)
    shrink = PICTURE / max(pixels.shape[-2:])
    if shrink >= 1:
        return pixels
    sides = [max(1, round(side * shrink)) for side in pixels.shape[-2:]]
    return torch.nn.functional.interpolate(pixels[None], sides, mode="area")[0]


def _told(summary: Mapping[str, Any], folder: Path) -> str:
    bits = summary["bits_per_dim"]
    lines = [
        f"{summary['evaluated']} of {summary['images']} images: {bits['mean']:.4f} bits/dim on average, from "
        f"{bits['least']:.4f} to {bits['greatest']:.4f}"
    ]
    if summary["left_out"]:
        first = summary["left_out_images"][0]["error"]
        lines.append(f"{summary['left_out']} images left out, named in summary.json; the first: {first}")
    return "\n".join([*lines, *_warnings(summary), f"The report is {(folder / 'index.html').resolve()}"])


def _warnings(summary: Mapping[str, Any]) -> list[str]:
    """What a reader of the numbers must know."""
    sentences, coarse, unread = [], summary["images_on_a_coarse_grid"], summary["files_not_read"]
    if coarse:
        worst = summary["errors_in_bits_per_dim"]["discretisation_greatest"]
        sentences.append(
            f"The grid is coarse for {coarse} images: their error by the steps is estimated at up to {worst:.3f} "
            "bits/dim. Take more steps."
        )
    if summary["several_sizes"]:
        sentences.append("The images are of several sizes, whose likelihoods can't be compared; set a resolution.")
    if unread["count"]:
        sentences.append(
            f"{unread['count']} files of the folder are not among the images, because its metadata do not list them "
            f"or their ending is not known; the first: {', '.join(unread['names'][:5])}."
        )
    if summary["without_caption"]:
        sentences.append(f"{summary['without_caption']} images have no caption and were given the empty prompt.")
    return sentences
