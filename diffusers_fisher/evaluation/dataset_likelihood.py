"""Computes log-likelihoods of a dataset's images over many processes, for `diffusers-fisher likelihood`."""

import dataclasses
import itertools
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate import PartialState
from pydantic import Field
from tqdm.auto import tqdm

from ..backbones import backbone_of
from ..curvature import BoundOptions, LikelihoodBound
from ..curvature.pipeline import likelihood_bound
from ..data import Caption, Example, ImageData, Images, ImageStream, no_images, open_images
from ..errors import CoarseGridWarning, InputError, NumericalError, TraceModelWarning
from ..files import read_table, write_json
from ..fisher import AutodiffFisher, FiniteDifferenceFisher, FisherEstimator
from ..jobs.config import flat_settings
from ..jobs.folder_lock import locked_folder
from ..jobs.identity import images_digest, pipeline_digests, row_digest
from ..jobs.pipelines import DenoiserSettings, load_pipeline
from ..jobs.processes import process_state
from ..jobs.records import SETTINGS, Records, shard
from ..likelihood import DEFAULT_SCHEME, LikelihoodOutput
from ..likelihood.pipeline import first_grid, log_likelihood
from ..likelihood.schemes import scheme_of
from ..pipelines import FisherPipelineMixin
from ..settings import ChainVariance, LikelihoodMethod, NotNegative, TraceEstimator, settings_class
from .dataset_likelihood_report import FILE, ImageGroup, ImageRecords, write_results
from .dataset_records import image_record, method_of

ESTIMATORS: dict[str, type[FisherEstimator]] = {
    "autodiff": AutodiffFisher,
    "finite-difference": FiniteDifferenceFisher,
}
ATTEMPTS = 64  # number of refused images after which a run stops, if no image could be evaluated
WRITE_SECONDS = (1.0, 60.0)  # shortest and longest time between two files of records
WRITE_FRACTION = 0.01  # time between two files as a fraction of the time so far: a kill loses little
RETRY = "retry-"  # beginning of the names of later attempts' records, which sort after those of the first attempt


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


def evaluate_dataset(
    output: Path, settings: DatasetSettings, batch_size: int = 16, retry_failed: bool = False
) -> dict[str, Any] | None:
    """Computes the log-likelihoods of all images of a dataset and writes one record per image, a summary and a report.

    With `accelerate launch`, each of n processes evaluates every n-th image, on the same grid. Records are written
    from time to time, so that the next run continues a killed one. A kill loses at most a hundredth of the run's time,
    a minute or one batch. In float32 the number of an image is the same to 1e-5 bits/dim for every batch size and
    every number of processes; with finite differences, which divide the rounding by their step, to 1e-3. An image that
    can't be read, does not fit the pipeline or has no finite likelihood gets a record with the error.

    Args:
        output: folder of `likelihoods.jsonl` (one line per image, in the order of the data), `summary.json`,
            `histogram.png` and `index.html`, and of `records/` and `settings.json`, from which a run is resumed. All
            processes must see it.
        batch_size: number of images that are evaluated at once.
        retry_failed: evaluate the images whose record is an error again, because their files have been repaired.
            All other images must be unchanged. For a stream, only the number of images is compared.

    Returns:
        The content of `summary.json` on the main process, None on the others.

    Cost: `num_inference_steps` + 1 evaluations of the denoiser per image, each with one backward pass per probe, or
    with one evaluation of the trace model.

    Raises:
        InputError: the data or the pipeline can't be opened, there are no images, the output lies in the folder of the
            data, `output` belongs to another run that has not ended or has records of other settings, or no image
            could be evaluated (a run stops after 64 refused images).
        UnsupportedError: the pipeline has no likelihood.
        CheckpointError: a checkpoint or record is damaged.
    """
    if batch_size < 1:
        raise InputError(f"`batch_size` is {batch_size}; allowed: at least 1.")
    folder = settings.data.path
    if Path(folder).is_dir() and output.resolve().is_relative_to(Path(folder).resolve()):
        raise InputError(
            f"The output '{output}' lies in the folder of the data, '{folder}', so its pictures would become data; "
            "name another folder."
        )
    state = process_state()
    with locked_folder(output, state):
        return _evaluate(output, settings, batch_size, retry_failed, state)


def _evaluate(
    output: Path, settings: DatasetSettings, batch_size: int, retry_failed: bool, state: PartialState
) -> dict[str, Any] | None:
    """Evaluates the images of a dataset in a folder that belongs to this launch."""
    pipe = load_pipeline(settings.denoiser).to(state.device)
    backbone, resolution = backbone_of(pipe), settings.data.resolution
    multiple = backbone.size_multiple
    if resolution is not None and resolution % multiple:
        raise InputError(f"`resolution` is {resolution}; allowed for this pipeline: multiples of {multiple}.")
    backbone.check_bins(settings.bins)
    uses_trace = settings.method == "ode" or not BoundOptions(settings.variance).uses_schedule
    name = chosen_estimator(pipe, settings.estimator) if uses_trace else settings.estimator
    with state.main_process_first():  # the other processes use the files that the main process has downloaded
        images = open_images(settings.data, backbone.image_channels, backbone.takes_text)
        note = {**_settings_note(settings), "estimator": name, "images": images_digest(images)}
        records = _open_records(output, {**note, **pipeline_digests(pipe)}, images, retry_failed)
        before = ImageRecords(records)
    begin = time.perf_counter()
    share = ImageShare(pipe, images, dataclasses.replace(settings, estimator=name), records, batch_size, state)
    positions = before.positions
    if retry_failed and before.failed_positions:
        positions -= before.failed_positions
        share.attempt = 1 + sum(key.startswith(RETRY) for key in records.done())
    count = share.run(positions, before.method)
    if not state.is_main_process:
        return None
    seconds = time.perf_counter() - begin
    run = {"processes": state.num_processes, "batch_size": batch_size, "seconds": seconds}
    return write_results(records, images, count, run | {"images": count - len(positions)})


def _settings_note(settings: DatasetSettings) -> dict[str, Any]:
    """Returns the settings on which the numbers depend; those of the ODE as before there were bounds."""
    note = flat_settings(dataclasses.asdict(settings))
    del note["data.max_pixels"]  # no number depends on it, and --retry-failed may take another limit
    del note["tolerance"]
    if settings.method == "ode":
        note["num_inference_steps"], note["tolerance"] = first_grid(
            settings.num_inference_steps, settings.tolerance or "auto", step_halving=False
        )
        for name in ("method", "variance", "num_draws"):
            del note[name]
    return note


def _open_records(output: Path, note: dict[str, Any], images: Images, retry_failed: bool) -> Records:
    """Opens the records of a run. With `retry_failed`, files of the images may have changed, but not their number."""
    file = output / SETTINGS
    before = read_table(file).get("images") if file.is_file() else None
    same_number = before is not None and before.split(",")[0] == note["images"].split(",")[0]
    if retry_failed and same_number:
        records = Records(output, {**note, "images": before}, ImageGroup)
        _refuse_changed_images(records, images)
        write_json(file, note)
        return records
    try:
        return Records(output, note, ImageGroup)
    except InputError as error:
        if not same_number or before == note["images"]:
            raise
        raise InputError(
            f"{error} Some files of the data have changed; if they have been repaired, --retry-failed takes them."
        ) from error


def _refuse_changed_images(records: Records, images: Images) -> None:
    """Refuses images that have changed since their likelihood was recorded. Images that failed may have changed."""
    if isinstance(images, ImageStream):
        return
    for record in ImageRecords(records):
        position = record["position"]
        if "error" not in record and record[FILE] != row_digest(images, images.rows[position], position):
            raise InputError(
                f"Image '{record['name']}' has changed since its likelihood was recorded in '{records.folder}'; only "
                "images that failed are tried again. Name another folder."
            )


def chosen_estimator(pipe: FisherPipelineMixin, name: TraceEstimator) -> TraceEstimator:
    """Returns the estimator, with "auto" resolved. Raises `InputError` if a trace model is wanted and missing."""
    if name == "auto":
        return "finite-difference" if pipe.trace_model is None else "trace-model"
    if name == "trace-model" and pipe.trace_model is None:
        raise InputError(
            "The estimator is 'trace-model', but the pipeline has none; allowed: 'autodiff' or 'finite-difference'. "
            "Train one with diffusers_fisher.training.trace_matching and keep it in the pipeline's folder."
        )
    return name


@dataclasses.dataclass
class ImageShare:
    """Evaluates the images of one process.

    Args:
        settings: settings whose estimator is not "auto".
        batch_size: number of images that are evaluated at once.
        state: accelerate's state of the process.
        attempt: number of the attempt at images that failed before.
    """

    pipe: FisherPipelineMixin
    images: Images
    settings: DatasetSettings
    records: Records
    batch_size: int
    state: PartialState
    attempt: int = 0

    def __post_init__(self) -> None:
        self.backbone = backbone_of(self.pipe)
        self.early_errors: list[str] = []  # errors of images before the first likelihood
        self.pending: list[dict[str, Any]] = []  # records that are in no file yet
        self.total = 0 if isinstance(self.images, ImageStream) else len(self.images)

    def run(self, positions: frozenset[int], method: dict[str, Any] | None) -> int:
        """Evaluates the images of this process that have no record, and waits for the other processes.

        Args:
            positions: positions of the images that have a record.
            method: method in these records; None without records.

        Returns:
            The number of images of all processes.

        Raises:
            InputError: there are no images, or no image of the whole data could be evaluated.
        """
        self.method = method  # description of the likelihoods; None before the first one
        begin = self.last = time.perf_counter()
        index, number = self.state.process_index, self.state.num_processes
        rows = self._read_rows(positions)
        expected = len(shard(range(self.total), index, number)) or None  # a stream has no known length
        num_done = sum(position % number == index for position in positions)
        with tqdm(total=expected, initial=num_done, desc="images", disable=not self.state.is_main_process) as progress:
            for batch in iter(lambda: list(itertools.islice(rows, self.batch_size)), []):
                self.pending += self._evaluate(batch)
                progress.update(len(batch))
                duration, low, high = time.perf_counter() - self.last, *WRITE_SECONDS
                if duration >= min(high, max(low, WRITE_FRACTION * (self.last - begin))):
                    self._write()
            self._write()
        self.state.wait_for_everyone()
        if not self.total:
            raise no_images(self.settings.data)
        if self.pending:  # this process has evaluated no image, but another process may have
            if not self.records.done():
                first = [*self.early_errors, self.pending[0]["error"]][0]  # an error of the pipeline, if there is one
                raise InputError(f"Not one image could be evaluated. The first: {first}")
            self._write(failed_only=True)
        self.state.wait_for_everyone()
        return self.total

    def _read_rows(self, known_positions: frozenset[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields positions and undecoded rows of this process that have no record."""
        index, number = self.state.process_index, self.state.num_processes
        if isinstance(self.images, ImageStream):
            for position, row in enumerate(self.images.undecoded()):
                self.total = position + 1
                if position % number == index and position not in known_positions:
                    yield position, row
        else:
            positions = shard(range(self.total), index, number)
            yield from (
                (position, self.images.rows[position]) for position in positions if position not in known_positions
            )

    def _evaluate(self, batch: Sequence[tuple[int, dict[str, Any]]]) -> list[dict[str, Any]]:
        """Returns the records of a batch. Images of the same size are evaluated together."""
        records: list[dict[str, Any]] = []
        groups: dict[torch.Size, list[tuple[int, Example]]] = {}
        for position, row in batch:
            try:
                example = self._read_example(row, position)
                groups.setdefault(example.pixels.shape, []).append((position, example))
            except InputError as error:
                name = self.images.row_name(row, position)
                records.append({"position": position, "name": name, "error": str(error)})
        for (_, height, width), group in groups.items():
            size = len(group)
            if self.settings.data.resolution is None:  # the images may be large, and their memory must be bounded
                size = min(size, max(1, int(self.settings.data.pixel_limit / (height * width))))
            for start in range(0, len(group), size):
                records += self._evaluate_group(group[start : start + size])
        rows = dict(batch)
        for record in records:
            record[FILE] = row_digest(self.images, rows[record["position"]], record["position"])
        return records

    def _read_example(self, row: dict[str, Any], position: int) -> Example:
        """Decodes a row. Raises `InputError` if its image can't be read or its size does not fit the pipeline."""
        example, multiple = self.images.example(row, position), self.backbone.size_multiple
        height, width = example.pixels.shape[-2:]
        if height % multiple or width % multiple:
            raise InputError(
                f"Image '{example.name}' has {width}x{height} pixels; this pipeline takes multiples of {multiple}. "
                "Set `resolution`."
            )
        return example

    def _evaluate_group(self, group: Sequence[tuple[int, Example]]) -> list[dict[str, Any]]:
        settings = self.settings
        captions = [settings.prompt if settings.prompt is not None else example.caption for _, example in group]
        generator = torch.Generator().manual_seed(settings.seed)
        options: dict[str, Any] = {"bins": settings.bins, "generator": generator}
        options["num_inference_steps"] = settings.num_inference_steps
        if any(caption is not None for caption in captions):
            options["prompt"] = [self._condition(caption) for caption in captions]
        if settings.estimator in ESTIMATORS:
            options |= {"estimator": ESTIMATORS[settings.estimator](), "num_probes": settings.num_probes or None}
        error: Exception | None = None
        try:
            # The summary warns once, for all images.
            with warnings.catch_warnings():
                for category in (CoarseGridWarning, TraceModelWarning):
                    warnings.simplefilter("ignore", category)
                # The conditions in `options` may be prompts, labels or none.
                pixels = torch.stack([example.pixels for _, example in group])
                out: LikelihoodOutput | LikelihoodBound
                if settings.method == "ode":
                    out = log_likelihood(
                        self.pipe, pixels, scheme=settings.scheme, sample_latents=settings.sample_latents,
                        tolerance=settings.tolerance or "auto", **options,
                    )  # fmt: skip
                else:
                    variance, draws = settings.variance, settings.num_draws
                    out = likelihood_bound(self.pipe, pixels, variance=variance, num_draws=draws, **options)
        # diffusers raises ValueError, of which InputError is a subclass.
        except (ValueError, NumericalError, MemoryError, RuntimeError) as exception:
            if isinstance(exception, RuntimeError) and not is_out_of_memory(exception):
                raise
            error = exception.with_traceback(None)  # the traceback would keep the tensors
        if error is not None:
            return self._evaluate_singly(group, error)
        if self.method is None:
            self.method = method_of(out)
        rows = enumerate(zip(group, captions, strict=True))
        return [image_record(position, example, caption, out, row) for row, ((position, example), caption) in rows]

    def _condition(self, caption: Caption) -> str | int:
        """Returns the condition for a caption.

        An image without a caption in a batch with captions has the empty prompt. A number as the prompt of a pipeline
        without texts is a class label.
        """
        if isinstance(caption, str) and not self.backbone.takes_text and caption.isdecimal():
            return int(caption)
        return "" if caption is None else caption

    def _evaluate_singly(self, group: Sequence[tuple[int, Example]], error: Exception) -> list[dict[str, Any]]:
        """Evaluates each image of a group by itself, because the group failed; returns the records.

        The record of a group of one image is the error.
        """
        if len(group) > 1:
            return [record for entry in group for record in self._evaluate_group([entry])]
        ((position, example),) = group
        text = f"Image '{example.name}': {error}"
        # The message of `torch.OutOfMemoryError` says more itself.
        if is_out_of_memory(error) and not isinstance(error, torch.OutOfMemoryError):
            size = "x".join(map(str, example.pixels.shape[:0:-1]))
            text = f"Image '{example.name}' of {size} pixels: there is not enough memory for it. Set `resolution`."
        if self.method is None and not isinstance(error, NumericalError):
            self.early_errors.append(text)
            if len(self.early_errors) == ATTEMPTS and not self.records.done():  # the settings are the likely cause
                raise InputError(f"Not one of {ATTEMPTS} images could be evaluated. The last: {text}") from error
        return [{"position": position, "name": example.name, "error": text}]

    def _write(self, failed_only: bool = False) -> None:
        """Writes the records since the last file.

        Errors are written after the first likelihood only, so that a folder without a likelihood takes other settings.
        With `failed_only` they are written without a likelihood too.
        """
        end = time.perf_counter()
        if self.pending and (self.method is not None or failed_only):
            rows = sorted(self.pending, key=lambda row: row["position"])
            content = {"method": self.method, "seconds": end - self.last, "records": rows}
            attempt = f"{RETRY}{self.attempt:06d}-" if self.attempt else ""
            self.records.write(f"{attempt}{rows[0]['position']:09d}", content)
            self.pending = []
        self.last = end


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether there was too little memory. The allocator of the CPU says so by a `RuntimeError`."""
    words = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)
