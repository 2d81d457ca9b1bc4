"""Reports the likelihoods of a dataset: one file of records, a summary, a histogram and a page."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas
import torch
from matplotlib.figure import Figure
from pydantic import BaseModel, FiniteFloat

from ..console import say
from ..data import FILE_ROWS, Caption, Images, ImageStream
from ..errors import CheckpointError
from ..figures import make_figure
from ..files import finite_number, save_figure, write_json
from ..image_folders import printable_name
from ..jobs.identity import Note
from ..jobs.pages import Page
from ..jobs.records import Records
from ..likelihood.output import DISAGREES
from ..likelihood.solver import COARSE
from ..settings import NotNegative, Positive
from .record_files import write_lines

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
IMAGES_PER_END = 24  # images of each end on the page
MAX_NAMES = 100  # the summary and the page name this many left-out images at most; likelihoods.jsonl names all
CAPTIONS = 50  # the summary has means by caption if there are at most this many different captions
# Numbers of a record in the table. Records of earlier versions lack the total error.
NUMBERS = ["bits_per_dim", "discretisation_error", "standard_error", "total_error", "dims"]
FILE = "file"  # key of a record's hash, which identifies the image
PICTURE = 256  # pixels of a picture's longer side on the page


class FailedImage(BaseModel):
    """Record of an image without a likelihood."""

    position: NotNegative
    name: str
    error: str


class ImageLikelihood(BaseModel):
    """What the report reads of an image's record."""

    position: NotNegative
    name: str
    caption: Caption
    bits_per_dim: FiniteFloat
    discretisation_error: FiniteFloat
    standard_error: FiniteFloat | None
    total_error: FiniteFloat | None = None
    trace_check: str | None = None
    dims: Positive


class LikelihoodMethod(BaseModel):
    """How likelihoods were computed."""

    space: str
    density: str
    prior: str
    trace: str
    scheme: str
    evaluations: Positive | None = None


class ImageGroup(BaseModel):
    """A file of records."""

    method: LikelihoodMethod | None
    seconds: FiniteFloat
    records: list[ImageLikelihood | FailedImage]
    file_number: NotNegative | None = None  # of a file of a stream, which has `length` images
    length: NotNegative | None = None


class ImageRecords:
    """The records of all images in the order of the data. A file is read when its first record is needed.

    Args:
        records: records of the kind `ImageGroup`.

    Attributes:
        seconds: seconds of evaluation, summed over all processes and runs.
        positions: positions of all images that have a record.
        failed: positions of images whose record is an error.
        method: space, density, prior, trace and scheme of the likelihoods; None while there is no likelihood.
        lengths: numbers of images of those files of a stream that have been read to their ends.

    Raises:
        CheckpointError: a file is damaged.
    """

    def __init__(self, records: Records):
        self.records, self.seconds = records, 0.0
        self.method: dict[str, Any] | None = None
        self.failed_positions: set[int] = set()
        self.lengths: dict[int, int] = {}
        self._places: dict[int, tuple[str, int]] = {}
        for key in sorted(records.done()):  # records of later attempts come last
            group = records.read(key)
            self.seconds += group["seconds"]
            self.method = self.method or group["method"]
            if group.get("length") is not None:
                self.lengths[group["file_number"]] = group["length"]
            for number, row in enumerate(group["records"]):
                self._places[row["position"]] = (key, number)
                (self.failed_positions.add if "error" in row else self.failed_positions.discard)(row["position"])
        self.positions = frozenset(self._places)

    def check(self, positions: frozenset[int]) -> None:
        """Raises `CheckpointError` unless the images at `positions` have a record, and no others."""
        missing = sorted(positions - self.positions)
        if missing or len(self.positions) > len(positions):
            raise CheckpointError(
                f"'{self.records.folder}' has {len(self.positions)} records of {len(positions)} images, none of those "
                f"at positions {missing[:5]}; run the same command again. Processes on several machines need one "
                "folder that all of them see."
            )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        counts = Counter(key for key, _ in self._places.values())
        # Neighbours lie in as many files as there were processes, so several files are open at a time.
        files: dict[str, list[dict[str, Any]]] = {}
        for position in sorted(self._places):
            key, number = self._places[position]
            if key not in files:
                files[key] = self.records.read(key)["records"]
            yield files[key][number]
            counts[key] -= 1
            if not counts[key]:
                del files[key]


def write_results(results: ImageRecords, images: Images, run: Note, parquet: bool = False) -> dict[str, Any]:
    """Writes `likelihoods.jsonl`, `summary.json`, `histogram.png` and `index.html`; returns the summary.

    Args:
        results: one record per image of the data.
        images: the dataset; the page shows its most and least likely images.
        run: entries of the summary about the run that has ended.
        parquet: also write `likelihoods.parquet`. One that is there already is always written anew.
    """
    folder, settings = results.records.folder, results.records.settings
    parquet = parquet or (folder / "likelihoods.parquet").exists()
    table, failures = _write_table(results, folder, parquet)
    summary = _summarise(results, table, failures, run)
    summary["without_caption"] = int(table["caption"].isna().sum()) if settings["data.caption_column"] else 0
    summary["transparent"] = int(table["transparent"].sum())
    summary["by_caption"] = _by_caption(table)
    summary["files_not_read"] = {"count": len(images.files_left_out), "names": images.files_left_out[:MAX_NAMES]}
    write_json(folder / "summary.json", summary)
    figure = histogram(table["bits_per_dim"], summary)
    save_figure(figure, folder / "histogram.png")
    order = table.sort_values("bits_per_dim", kind="stable")
    ends = {"Most likely": order[:IMAGES_PER_END], "Least likely": order[::-1][:IMAGES_PER_END]}
    _page(summary, settings, figure, ends, images).write(folder / "index.html")
    say(_outline(summary, folder))
    return summary


def _write_table(
    results: ImageRecords, folder: Path, parquet: bool
) -> tuple[pandas.DataFrame, list[Mapping[str, Any]]]:
    """Writes the files of all records. Returns a table with one row per image that has a likelihood, and the records
    of the images that have none.

    The positions of the lines count the images. Those of the table are the positions in the data, where the files of
    a stream are far apart.
    """
    rows, failures, columns = [], [], ["name", "caption", *NUMBERS, "trace_check"]
    lines = (
        {name: value for name, value in {**record, "position": number}.items() if name != FILE}
        for number, record in enumerate(results)
    )
    for position, record in zip(sorted(results.positions), write_lines(lines, folder, parquet), strict=True):
        if "error" in record:
            failures.append(record)
        else:
            rows.append([position, *map(record.get, columns), record.get("transparent", False)])
    # As objects first, because captions that are labels or None must not become floating-point numbers.
    table = pandas.DataFrame(rows, columns=["position", *columns, "transparent"], dtype=object)
    table[NUMBERS] = table[NUMBERS].astype(float).fillna(math.inf)  # null: an error that is not known
    return table, failures


def _summarise(
    results: ImageRecords, table: pandas.DataFrame, failures: Sequence[Mapping[str, Any]], run: Note
) -> dict[str, Any]:
    bits, nats = table["bits_per_dim"], table["dims"] * math.log(2)  # nats of one bit/dim
    steps, probes, whole = (table[name] / nats for name in ("discretisation_error", "standard_error", "total_error"))
    return {
        "images": len(results.positions), "evaluated": len(bits), "left_out": len(failures),
        "left_out_images": [{"name": row["name"], "error": row["error"]} for row in failures[:MAX_NAMES]],
        "bits_per_dim": {
            "mean": float(bits.mean()), "standard_deviation": finite_number(bits.std()),
            "standard_error": finite_number(bits.sem()), "least": float(bits.min()), "greatest": float(bits.max()),
            "quantiles": {str(share): value for share, value in bits.quantile(QUANTILES).items()},
        },
        "errors_in_bits_per_dim": {
            "discretisation_mean": float(steps.mean()), "discretisation_greatest": float(steps.max()),
            "probes_mean": finite_number(probes.mean()), "total_mean": finite_number(whole.mean()),
        },
        "images_on_a_coarse_grid": int((steps > COARSE).sum()),
        "images_with_a_wrong_trace_model": int((table["trace_check"] == DISAGREES).sum()),
        "several_sizes": table["dims"].nunique() > 1,
        "method": results.method, "levels": _levels(results),
        "process_seconds": results.seconds,
        "images_per_process_second": len(results.positions) / max(results.seconds, 1e-9),
        **run,
    }  # fmt: skip


def _levels(results: ImageRecords) -> int:
    """Returns the number of evaluations of the denoiser per image, those of its trace and of checks not counted."""
    evaluations: int | None = (results.method or {}).get("evaluations")
    return results.records.settings["num_inference_steps"] + 1 if evaluations is None else evaluations


def _by_caption(table: pandas.DataFrame) -> list[dict[str, Any]]:
    """Returns mean and deviation per caption, the likeliest first; an empty list for one caption or for many."""
    numbers, captions = pandas.factorize(table["caption"].to_numpy(), use_na_sentinel=False)  # labels stay integers
    if not 2 <= len(captions) <= CAPTIONS:
        return []
    rows = table["bits_per_dim"].groupby(numbers).agg(images="size", mean="mean", standard_deviation="std")
    rows.insert(0, "caption", captions)
    rows = rows.sort_values("mean", kind="stable").astype(object)
    return rows.where(rows.notna(), None).to_dict("records")


def histogram(bits: pandas.Series, summary: Note) -> Figure:
    """Draws the distribution of the images' bits/dim."""
    figure, (axes,) = make_figure(7, 3.5)
    axes.hist(bits, bins=min(80, max(10, round(len(bits) ** 0.5))), color="C0", alpha=0.8)
    mean = summary["bits_per_dim"]["mean"]
    axes.axvline(mean, color="C1", label=f"mean {mean:.3f}")
    quantiles = summary["bits_per_dim"]["quantiles"]
    axes.axvline(quantiles["0.05"], color="C1", linestyle=":", label="5% and 95%")
    axes.axvline(quantiles["0.95"], color="C1", linestyle=":")
    axes.set(xlabel=f"bits/dim of the {summary['method']['space']} (lower is likelier)", ylabel="images")
    axes.legend()
    return figure


def _page(summary: Note, settings: Note, figure: Figure, ends: Mapping[str, pandas.DataFrame], images: Images) -> Page:
    page = Page("Log-likelihoods of a dataset")
    method, bits, errors = summary["method"], summary["bits_per_dim"], summary["errors_in_bits_per_dim"]
    page.paragraph(
        f"Pipeline {settings['denoiser.path']}, data {printable_name(settings['data.path'])} (split "
        f"{settings['data.split']}): {summary['evaluated']} of {summary['images']} images evaluated, "
        f"{summary['left_out']} left out. Density of the {method['space']}, {method['density']}; prior "
        f"{method['prior']}; trace {method['trace']}; scheme "
        f"{method['scheme']}, {summary['levels']} noise levels."
    )
    for sentence in _warnings(summary):
        page.paragraph(sentence)
    rows = [("mean", bits["mean"]), ("standard deviation", bits["standard_deviation"])]
    rows += [("standard error of the mean", bits["standard_error"]), ("least", bits["least"])]
    rows += [(f"quantile {name}", value) for name, value in bits["quantiles"].items()]
    rows += [("greatest", bits["greatest"]), ("discretisation error, mean", errors["discretisation_mean"])]
    rows += [("discretisation error, greatest", errors["discretisation_greatest"])]
    rows += [("error by the probes, mean", errors["probes_mean"])]
    rows += [("total error (95%), mean", errors["total_mean"])]
    page.table(("bits/dim (lower is likelier)", ""), rows)
    page.figure(figure, "Images by bits/dim.")
    if summary["by_caption"]:
        page.heading("By caption")
        means = [tuple(row.values()) for row in summary["by_caption"]]
        page.table(("caption", "images", "mean bits/dim", "standard deviation"), means)
    pictures = _read_pictures(images, set(pandas.concat(ends)["position"]))
    for title, end in ends.items():
        page.heading(title)
        page.pictures([(pictures[row["position"]], _caption(row)) for row in end.to_dict("records")])
    if summary["left_out"]:
        page.heading("Left out")
        page.paragraph(f"{summary['left_out']} images have no likelihood, among them:")
        page.table(("image", "why"), [(row["name"], row["error"]) for row in summary["left_out_images"]])
    return page


def _caption(row: Note) -> str:
    caption = "" if row["caption"] is None else f", {row['caption']}"
    return f"{row['bits_per_dim']:.3f} bits/dim: {row['name']}{caption}"


def _read_pictures(images: Images, positions: set[int]) -> dict[int, torch.Tensor]:
    """Returns pictures (3, H, W) by position. The files of a stream are read again up to the last of the positions."""
    if not isinstance(images, ImageStream):
        return {position: _shrink(images[position].pixels) for position in sorted(positions)}
    pictures = {}
    for file, places in itertools.groupby(sorted(positions), lambda position: position // FILE_ROWS):
        wanted = {*places}
        rows = enumerate(images.file_rows(file), file * FILE_ROWS)
        for position, row in itertools.islice((row for row in rows if row[0] in wanted), len(wanted)):
            pictures[position] = _shrink(images.example(row, position).pixels)
    return pictures


def _shrink(pixels: torch.Tensor) -> torch.Tensor:
    """Returns a picture (C, H, W) in colours (3, H, W), at most `PICTURE` pixels wide and high."""
    pixels = pixels.expand(3, -1, -1)
    shrink = PICTURE / max(pixels.shape[-2:])
    if shrink >= 1:
        return pixels
    sides = [max(1, round(side * shrink)) for side in pixels.shape[-2:]]
    return torch.nn.functional.interpolate(pixels[None], sides, mode="area")[0]


def _outline(summary: Note, folder: Path) -> str:
    """Returns the text that the console shows at the end."""
    bits = summary["bits_per_dim"]
    span = f"from {bits['least']:.4f} to {bits['greatest']:.4f}"
    lines = [f"{summary['evaluated']} of {summary['images']} images: {bits['mean']:.4f} bits/dim on average, {span}"]
    if summary["left_out"]:
        first = summary["left_out_images"][0]["error"]
        lines.append(f"{summary['left_out']} images left out, named in summary.json; the first: {first}")
    page = printable_name(str((folder / "index.html").resolve()))
    return "\n".join([*lines, *_warnings(summary), f"The report is {page}"])


def _warnings(summary: Note) -> list[str]:
    """Returns the sentences that warn a reader of the numbers."""
    sentences, coarse, files = [], summary["images_on_a_coarse_grid"], summary["files_not_read"]
    wrong = summary["images_with_a_wrong_trace_model"]
    if coarse:
        worst = summary["errors_in_bits_per_dim"]["discretisation_greatest"]
        sentences.append(
            f"The grid is coarse for {coarse} images: their discretisation error is estimated at up to {worst:.3f} "
            "bits/dim. Take more steps."
        )
    if wrong:
        sentences.append(
            f"The trace model disagrees with differences of its denoiser for {wrong} images, whose `total_error` says "
            "how far off they may be. Take another estimator for them."
        )
    if summary["several_sizes"]:
        sentences.append("The images are of several sizes, whose likelihoods can't be compared; set a resolution.")
    if files["count"]:
        sentences.append(
            f"{files['count']} files of the folder are not among the images, because its metadata do not list them, "
            "their ending is not known, they belong to no split, or a link leads to them a second time; the first: "
            f"{', '.join(files['names'][:5])}."
        )
    if summary["transparent"]:
        sentences.append(f"{summary['transparent']} images have transparent pixels, which were composed on black.")
    if summary["without_caption"]:
        sentences.append(f"{summary['without_caption']} images have no caption and were given the empty prompt.")
    return sentences
