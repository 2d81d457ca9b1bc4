"""Computes log-likelihoods of a dataset's images over many processes, for `diffusers-fisher likelihood`."""

import time
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..data import Images, ImageStream, open_images
from ..errors import InputError
from ..files import read_table
from ..jobs.identity import images_digest, pipeline_digests, row_digest
from ..jobs.pipelines import check_offload, load_pipeline, named_device, place_pipeline
from ..jobs.processes import process_state
from ..jobs.records import SETTINGS, Records
from ..jobs.run_folder import RunFolder, run_folder
from ..jobs.shards import Shard, shard_note
from .dataset_likelihood_report import FILE, ImageGroup, ImageRecords, write_results
from .dataset_settings import DatasetSettings, settings_note
from .execution import BatchSize, BatchSizeTrial, Execution
from .image_evaluator import ImageEvaluator
from .image_share import RETRY, ImageShare, share_positions
from .likelihood_shards import refuse_output_in_data, write_shard
from .ray_engine import RayRows, import_ray
from .row_evaluator import RowEngine, RowEvaluator


def evaluate_dataset(
    output: Path | str,
    settings: DatasetSettings,
    batch_size: BatchSize = 16,
    retry_failed: bool = False,
    shard: Shard | None = None,
    execution: Execution | None = None,
    parquet: bool = False,
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
            processes must see it. It may be a URL.
        batch_size: number of images that are evaluated at once; "auto": found by trial.
        retry_failed: evaluate the images whose record is an error again, because their files have been repaired.
            All other images must be unchanged. For a stream, only the number of images is compared.
        shard: the part of the images that this launch evaluates, into a folder of its own. The folder gets
            `shard.json` at the end instead of a report, which `merge_likelihoods` makes of the folders of all shards.
            No number depends on the shard. None means all images.
        execution: devices and workers; None means `Execution()`.
        parquet: also write `likelihoods.parquet`, with the columns of the lines.

    Returns:
        The content of `summary.json` (of a shard, of `shard.json`) on the main process, None on the others.

    Cost: `num_inference_steps` + 1 evaluations of the denoiser per image, each with one backward pass per probe, or
    with one evaluation of the trace model.

    Raises:
        InputError: the data or the pipeline can't be opened, there are no images, the output lies in the folder of the
            data, `output` belongs to another run that has not ended or has records of other settings, or no image
            could be evaluated (a run stops after 64 refused images).
        UnsupportedError: the pipeline has no likelihood.
        CheckpointError: a checkpoint or record is damaged.
    """
    BatchSizeTrial(batch_size)
    execution = execution or Execution()
    refuse_output_in_data(output, settings.data.path)
    state = process_state()
    if execution.engine == "ray":
        import_ray()
        if state.num_processes > 1:
            raise InputError(f"The engine is 'ray' in {state.num_processes} processes; allowed: one, with its actors.")
    with run_folder(output, state) as folder:
        return _evaluate(folder, settings, batch_size, retry_failed, shard, execution, parquet, state)


def _evaluate(
    output: RunFolder,
    settings: DatasetSettings,
    batch_size: BatchSize,
    retry_failed: bool,
    shard: Shard | None,
    execution: Execution,
    parquet: bool,
    state: PartialState,
) -> dict[str, Any] | None:
    """Evaluates the images of a dataset in a folder that belongs to this launch."""
    device = state.device
    if execution.engine != "ray":  # the actors have devices of their own
        device = device if execution.device is None else named_device(execution.device)
        check_offload(execution.offload, device)
    pipe = load_pipeline(settings.denoiser)
    evaluator = ImageEvaluator(pipe, settings)
    backbone, name = evaluator.backbone, evaluator.settings.estimator
    with state.main_process_first():  # the other processes use the files that the main process has downloaded
        images = open_images(settings.data, backbone.image_channels, backbone.takes_text)
        note = {**settings_note(settings), **shard_note(shard), "estimator": name, "images": images_digest(images)}
        if images.num_files > 1:  # the positions of its images depend on it
            note["stream_files"] = images.num_files
        records = _open_records(output, {**note, **pipeline_digests(pipe)}, images, retry_failed)
        before = ImageRecords(records)
    begin = time.perf_counter()
    engine: RowEngine
    if execution.engine == "ray":
        engine = RayRows(evaluator.settings, images, batch_size, execution)
    else:
        place_pipeline(pipe, device, execution.offload)
        engine = RowEvaluator(evaluator, images, batch_size, execution.decoding_threads)
        evaluator.method = before.method
    share = ImageShare(engine, images, records, state, shard)
    positions = before.positions
    if retry_failed and before.failed_positions:
        positions -= before.failed_positions
        share.attempt = 1 + sum(key.startswith(RETRY) for key in records.done())
    share.run(before, positions)
    if not state.is_main_process:
        return None
    seconds = time.perf_counter() - begin
    results = ImageRecords(records)
    lengths = results.lengths if isinstance(images, ImageStream) else {0: len(images)}
    own = share_positions(lengths, images.num_files, shard or Shard())
    count = len(own - positions)
    run = {"processes": state.num_processes, "batch_size": batch_size, "seconds": seconds, "images": count}
    last_run = {"last_run": {**run, "images_per_second": count / max(seconds, 1e-9)}}
    results.check(own)
    if shard is None:
        return write_results(results, images, last_run, parquet)
    return write_shard(results, images, sum(lengths.values()), last_run)


def _open_records(output: RunFolder, note: dict[str, Any], images: Images, retry_failed: bool) -> Records:
    """Opens the records of a run. With `retry_failed`, files of the images may have changed, but not their number."""
    file = output.path / SETTINGS
    before = read_table(file).get("images") if file.is_file() else None
    same_number = before is not None and before.split(",")[0] == note["images"].split(",")[0]
    if retry_failed and same_number:
        records = Records(output.path, {**note, "images": before}, ImageGroup, output.remote)
        _refuse_changed_images(records, images)
        records.write_settings(note)
        return records
    try:
        return Records(output.path, note, ImageGroup, output.remote)
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
