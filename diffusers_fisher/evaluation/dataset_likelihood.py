"""Log-likelihoods of a dataset's images over many processes, resumable: what `diffusers-fisher likelihood` runs."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..backbones import backbone_of
from ..data import Example, ImageData, Images, ImageStream, UnreadableImageError, no_images, open_images
from ..errors import CoarseGridWarning, InputError, NumericalError
from ..files import read_json, write_json
from ..fisher import AutodiffFisher, FiniteDifferenceFisher, FisherEstimator
from ..jobs.config import flat_settings
from ..jobs.identity import images_digest, pipeline_digests, row_digest
from ..jobs.pipelines import DTYPES, DenoiserSettings, load_pipeline
from ..jobs.processes import process_state
from ..jobs.records import SETTINGS, Records, shard
from ..jobs.seeds import step_generator
from ..likelihood import DEFAULT_SCHEME, LikelihoodOutput
from ..likelihood.pipeline import log_likelihood
from ..likelihood.schemes import scheme_of
from .dataset_likelihood_report import FILE, Collected, write_results

ESTIMATORS = ("auto", "trace-model", "autodiff", "finite-difference")
ATTEMPTS = 64  # refused images after which settings are given up with which not one could be evaluated
WRITE_SECONDS = (1.0, 60.0)  # least and most between two files of records
WRITE_SHARE = 0.01  # of the time so far between two files: what a kill costs, with few files in the end
RETRY = "retry-"  # begins the names of records of later attempts, and sorts after those of the first


@dataclasses.dataclass(frozen=True)
class DatasetSettings:
    """What the numbers depend on; all of it must be the same when a run is taken up again.

    Args:
        denoiser: the pipeline.
        data: the images. Their captions are the prompts (class labels for pipelines that take those).
        prompt: one for all images; without it and captions: the empty prompt.
        num_inference_steps, scheme, bins: as `log_likelihood` takes them.
        estimator: of the trace: "trace-model", the pipeline's own; "autodiff" or "finite-difference", by probes;
            "auto": the trace model where there is one, else "autodiff".
        num_probes: Hutchinson probes of the latter two; 0: the exact trace.
        seed: of probes and dequantisation. Every image has draws of its own, by its position in the data.
    """

    denoiser: DenoiserSettings
    data: ImageData
    prompt: str | None = None
    num_inference_steps: int = 32
    scheme: str = DEFAULT_SCHEME
    estimator: str = "auto"
    num_probes: int = 2
    bins: int | None = None
    seed: int = 0

    def check(self) -> None:
        """Refuses what can't be run. Raises `InputError`."""
        names = (("estimator", self.estimator, ESTIMATORS), ("dtype", self.denoiser.dtype, DTYPES))
        for name, value, allowed in names:
            if value not in allowed:
                raise InputError(f"`{name}` is '{value}'; allowed: {', '.join(allowed)}.")
        scheme_of(self.scheme)
        if self.num_inference_steps < 2 or self.num_probes < 0:
            raise InputError(
                f"`num_inference_steps` is {self.num_inference_steps}, `num_probes` {self.num_probes}; allowed: from "
                "2 (sensibly 20), and from 0 (the exact trace)."
            )
        if self.prompt is not None and self.data.caption_column is not None:
            raise InputError("Give either `prompt`, one for all images, or `caption_column`: not both.")


def evaluate_dataset(
    output: Path, settings: DatasetSettings, batch_size: int = 16, retry_failed: bool = False
) -> dict[str, Any] | None:
    """Log-likelihoods of all images of a dataset, one record an image, with a summary and a report.

    Every process of `accelerate launch` takes every n-th image, all on the same grid. Records are written some at a
    time, so that a run which was killed goes on where it was: at most a hundredth of its time, a minute or one batch
    is lost. In float32 the number of an image is the same to 1e-5 bits/dim whatever the batch size and the number of
    processes. An image that can't be read, does not fit the pipeline or has no finite likelihood gets a record that
    says so.

    Args:
        output: folder, seen by all processes, of `likelihoods.jsonl` (a line an image, in the order of the data),
            `summary.json`, `histogram.png`, `index.html`, and of `records/` and `settings.json`, by which a run is
            taken up.
        batch_size: images evaluated at once.
        retry_failed: try those images again whose record is an error, because their files have been repaired. All
            others must be as they were (of a stream their number alone is known).

    Returns:
        The content of `summary.json` on the main process, None on the others.

    Cost: `num_inference_steps` + 1 evaluations of the denoiser an image, each with a backward pass a probe, or with
    one of the trace model.

    Raises:
        InputError: values out of range, data or a pipeline that can't be opened, no images, an output in the folder of
            the data, records of other settings in `output`, not one image that could be evaluated (which is said
            after 64 that were refused).
        UnsupportedError: a pipeline without likelihoods. CheckpointError: a damaged checkpoint or record.
    """
    settings.check()
    if batch_size < 1:
        raise InputError(f"`batch_size` is {batch_size}; allowed: at least 1.")
    _check_apart(output, settings.data)
    state = process_state()
    pipe = load_pipeline(settings.denoiser).to(state.device)
    _check_resolution(settings.data, pipe)
    backbone_of(pipe).check_bins(settings.bins)
    name = chosen_estimator(pipe, settings.estimator)
    with state.main_process_first():  # the others find what the first has downloaded
        images = open_images(settings.data, backbone_of(pipe).image_channels, text_captions=hasattr(pipe, "tokenizer"))
        told = {**flat_settings(dataclasses.asdict(settings)), "estimator": name, "images": images_digest(images)}
        records = _records(output, {**told, **pipeline_digests(pipe)}, images, retry_failed)
        before = Collected(records)
    begin = time.perf_counter()
    share = Share(pipe, images, dataclasses.replace(settings, estimator=name), records, batch_size, state)
    done = before.positions
    if retry_failed and before.failed:
        done -= before.failed
        share.attempt = 1 + sum(key.startswith(RETRY) for key in records.done())
    count = share.run(done, before.method)
    if not state.is_main_process:
        return None
    seconds = time.perf_counter() - begin
    run = {
        "processes": state.num_processes,
        "batch_size": batch_size,
        "seconds": seconds,
        "images": count - len(done),
    }
    return write_results(records, images, count, run)


def _check_apart(output: Path, data: ImageData) -> None:
    folder = Path(data.path)
    if folder.is_dir() and output.resolve().is_relative_to(folder.resolve()):
        raise InputError(
            f"The output '{output}' lies in the data's folder '{data.path}', whose images its pictures would become; "
            "name another folder."
        )


def _check_resolution(data: ImageData, pipe: Any) -> None:
    multiple = backbone_of(pipe).size_multiple
    if data.resolution is not None and data.resolution % multiple:
        raise InputError(f"`resolution` is {data.resolution}; allowed for this pipeline: multiples of {multiple}.")


def _records(output: Path, told: dict[str, Any], images: Images, retry_failed: bool) -> Records:
    """The records of a run; with `retry_failed` also where, of as many images, some files have changed."""
    file = output / SETTINGS
    before = read_json(file).get("images") if file.is_file() else None
    if before is None or before.split(",")[0] != told["images"].split(",")[0]:
        return Records(output, told)
    if not retry_failed:
        try:
            return Records(output, told)
        except InputError as error:
            if before == told["images"]:
                raise
            raise InputError(
                f"{error} Some files of the data have changed; if they have been repaired, --retry-failed takes them."
            ) from error
    records = Records(output, {**told, "images": before})
    _check_evaluated(records, images)
    write_json(file, told)
    return records


def _check_evaluated(records: Records, images: Images) -> None:
    """Refuses images that have changed since their likelihood was recorded; those that failed may."""
    if isinstance(images, ImageStream):
        return
    for record in Collected(records):
        position = record["position"]
        if "error" not in record and record[FILE] != row_digest(images, images.rows[position], position):
            raise InputError(
                f"Image '{record['name']}' has changed since its likelihood was recorded in '{records.folder}'; only "
                "images that failed are tried again. Name another folder."
            )


def chosen_estimator(pipe: Any, name: str) -> str:
    """The estimator that "auto" stands for. Raises `InputError` for a trace model where there is none."""
    if name == "auto":
        return "autodiff" if pipe.trace_model is None else "trace-model"
    if name == "trace-model" and pipe.trace_model is None:
        raise InputError(
            "The estimator is 'trace-model', but the pipeline has none; allowed: 'autodiff' or 'finite-difference'. "
            "Train one with diffusers_fisher.training.trace_matching and keep it in the pipeline's folder."
        )
    return name


class Share:
    """The images of one process.

    Args:
        settings: with an estimator that is chosen.
        batch_size: images evaluated at once.
        state: accelerate's.
    """

    def __init__(
        self, pipe: Any, images: Images, settings: DatasetSettings, records: Records, batch_size: int, state: Any
    ):
        self.pipe, self.images, self.settings, self.records = pipe, images, settings, records
        self.batch_size, self.state = batch_size, state
        self.attempt = 0  # at images that failed before
        self.multiple = backbone_of(pipe).size_multiple
        self.method: dict[str, Any] | None = None  # what the outputs say of themselves; None before there is one
        self.refused: list[str] = []  # what was said of images while there is none
        self.written: list[dict[str, Any]] = []  # records that are in no file yet
        self.total = 0 if isinstance(images, ImageStream) else len(images)
        if self.pipe.trace_model is not None:
            self.pipe.trace_model.to(state.device)

    def run(self, done: frozenset[int], method: dict[str, Any] | None) -> int:
        """Evaluates all but what is `done`; returns the number of images of all processes, when those are through.

        Args:
            done: positions that have a record.
            method: what those records say of themselves.

        Raises:
            InputError: no images, or not one of the whole data could be evaluated.
        """
        from tqdm.auto import tqdm

        self.method = method
        begin = self.last = time.perf_counter()
        index, number = self.state.process_index, self.state.num_processes
        rows = self._rows(done)
        expected = len(shard(range(self.total), index, number)) or None  # of a stream not known
        mine = sum(position % number == index for position in done)
        with tqdm(total=expected, initial=mine, desc="images", disable=not self.state.is_main_process) as progress:
            for batch in iter(lambda: list(itertools.islice(rows, self.batch_size)), []):
                self.written += self._evaluated(batch)
                progress.update(len(batch))
                since, low, high = time.perf_counter() - self.last, *WRITE_SECONDS
                if since >= min(high, max(low, WRITE_SHARE * (self.last - begin))):
                    self._write()
            self._write()
        self.state.wait_for_everyone()
        if not self.total:
            raise no_images(self.settings.data)
        if self.written:  # this process met no image that could be evaluated; others may have
            if not self.records.done():
                first = [*self.refused, self.written[0]["error"]][0]  # by the pipeline rather than unreadable
                raise InputError(f"Not one image could be evaluated. The first: {first}")
            self._write(failed_only=True)
        self.state.wait_for_everyone()
        return self.total

    def _rows(self, done: frozenset[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Positions and undecoded rows of this process that have no record."""
        index, number = self.state.process_index, self.state.num_processes
        if not isinstance(self.images, ImageStream):
            for position in shard(range(self.total), index, number):
                if position not in done:
                    yield position, self.images.rows[position]
            return
        for position, row in enumerate(self.images.undecoded()):
            self.total = position + 1
            if position % number == index and position not in done:
                yield position, row

    def _evaluated(self, batch: Sequence[tuple[int, dict[str, Any]]]) -> list[dict[str, Any]]:
        """Records of a batch, those of images that have one size evaluated together."""
        records = []
        sizes: dict[tuple[int, ...], list[tuple[int, Example]]] = {}
        for position, row in batch:
            name = self.images.row_name(row, position)
            try:
                example = self.images.example(row, position)
            except UnreadableImageError as error:
                records.append(_failure(position, name, error))
                continue
            if any(side % self.multiple for side in example.pixels.shape[-2:]):
                height, width = example.pixels.shape[-2:]
                text = f"Image '{name}' has {width}x{height} pixels; this pipeline takes multiples of {self.multiple}."
                records.append(_failure(position, name, f"{text} Set `resolution`."))
                continue
            sizes.setdefault(tuple(example.pixels.shape), []).append((position, example))
        for group in sizes.values():
            records += self._likelihoods(group)
        rows = dict(batch)
        return [
            {**record, FILE: row_digest(self.images, rows[record["position"]], record["position"])}
            for record in records
        ]

    def _likelihoods(self, group: Sequence[tuple[int, Example]]) -> list[dict[str, Any]]:
        settings = self.settings
        captions = [settings.prompt if settings.prompt is not None else example.caption for _, example in group]
        conditions = None if all(caption is None for caption in captions) else [self._said(text) for text in captions]
        generators = [step_generator(settings.seed, "likelihood", position) for position, _ in group]
        options: dict[str, Any] = {"scheme": settings.scheme, "bins": settings.bins, "generator": generators}
        if settings.estimator != "trace-model":
            estimator: FisherEstimator = AutodiffFisher()
            if settings.estimator == "finite-difference":
                estimator = FiniteDifferenceFisher()
            options |= {"estimator": estimator, "num_probes": settings.num_probes or None}
        failed: Exception | None = None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CoarseGridWarning)  # the summary says it once, for all
                out = log_likelihood(
                    self.pipe, torch.stack([example.pixels for _, example in group]), conditions,
                    num_inference_steps=settings.num_inference_steps, **options,
                )  # fmt: skip
        # What diffusers itself refuses is a ValueError, as our InputError.
        except (ValueError, NumericalError, torch.OutOfMemoryError) as error:
            failed = error.with_traceback(None)  # which would keep the tensors
        if failed is not None:
            return self._without(group, failed)
        if self.method is None:
            self.method = {name: getattr(out, name) for name in ("space", "density", "prior", "trace", "scheme")}
        return [
            _record(position, example.name, caption, out, index)
            for index, ((position, example), caption) in enumerate(zip(group, captions, strict=True))
        ]

    def _said(self, caption: Any) -> Any:
        """The condition: an image without a caption among others with theirs gets the empty prompt; a number that was
        given as the prompt of a pipeline without texts is a class label."""
        if isinstance(caption, str) and not hasattr(self.pipe, "tokenizer") and caption.isdecimal():
            return int(caption)
        return "" if caption is None else caption

    def _without(self, group: Sequence[tuple[int, Example]], error: Exception) -> list[dict[str, Any]]:
        """Records of images that could not be evaluated together: each by itself, or what was said of the one."""
        if len(group) > 1:
            return [record for entry in group for record in self._likelihoods([entry])]
        ((position, example),) = group
        text = f"Image '{example.name}': {error}"
        if self.method is None and not isinstance(error, NumericalError):
            self.refused.append(text)
            if len(self.refused) == ATTEMPTS and not self.records.done():  # of the settings, most likely
                raise InputError(f"Not one of {ATTEMPTS} images could be evaluated. The last: {text}") from error
        return [_failure(position, example.name, text)]

    def _write(self, failed_only: bool = False) -> None:
        """Writes the records since the last file. Failures alone wait: settings under which nothing can be evaluated
        should leave a folder that takes others."""
        now = time.perf_counter()
        if self.written and (self.method is not None or failed_only):
            rows = sorted(self.written, key=lambda row: row["position"])
            content = {"method": self.method, "seconds": now - self.last, "records": rows}
            attempt = f"{RETRY}{self.attempt:06d}-" if self.attempt else ""
            self.records.write(f"{attempt}{rows[0]['position']:09d}", content)
            self.written = []
        self.last = now


def _record(position: int, name: str, caption: Any, out: LikelihoodOutput, index: int) -> dict[str, Any]:
    """What is kept of one image."""
    nats = ("log_prob", "prior_log_prob", "trace_log_prob", "standard_error", "discretisation_error")
    values = {key: float(getattr(out, key)[index]) for key in nats}
    if not math.isfinite(values["standard_error"]):  # of one probe it is not known
        values["standard_error"] = None  # type: ignore[assignment]
    return {
        "position": position, "name": name, "caption": caption, "bits_per_dim": float(out.bits_per_dim[index]),
        **values, "dims": out.dims, "r": [round(value, 6) for value in out.r[:, index].tolist()],
    }  # fmt: skip


def _failure(position: int, name: str, error: object) -> dict[str, Any]:
    return {"position": position, "name": name, "error": str(error)}
