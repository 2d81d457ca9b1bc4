"""One function from columns of images to columns of likelihoods, for engines that run it over batches of a dataset."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy
import pandas

from ..arguments import check_kinds
from ..data import Caption, Example, ImageData, read_image, without_pillow_warnings
from ..errors import InputError
from ..jobs.pipelines import DenoiserSettings, load_pipeline, place_pipeline
from .columns import FAILED, Column, check_columns, over_frames, settings_of, text_column, worker_device
from .dataset_settings import DatasetSettings
from .image_evaluator import ImageEvaluator

SETTINGS = {
    DenoiserSettings: ("revision", "variant", "dtype"),
    ImageData: ("resolution", "max_pixels"),
    DatasetSettings: (
        "prompt", "num_inference_steps", "scheme", "tolerance", "estimator", "num_probes", "bins", "seed",
        "sample_latents",
    ),
}  # fmt: skip
"""The settings that a scorer takes, by the class that checks them."""

NUMBERS = ("bits_per_dim", "log_prob", "total_error", "standard_error", "discretisation_error")
RESULTS = (*NUMBERS, "dims", "denoiser_calls", "status", "error")
CAPTION = "caption"
ONE_GRID = "one grid"


class LikelihoodScorer:
    """Computes log-likelihoods of a batch of images: columns in, columns out.

    It is the function of `datasets.Dataset.map(scorer, batched=True)` and of Ray Data's `map_batches(scorer)`, and
    `score_frames` is that of Spark's `mapInPandas`. A scorer holds its settings alone, so it can be pickled. Each
    process loads the model at its first call, and keeps the model of one scorer at a time.

    The number of an image is that of `diffusers-fisher likelihood`: it depends on the settings and on the image alone,
    to 1e-5 bits/dim in float32 (with finite differences to 1e-3), not on the batch.

    Args:
        model: folder or Hub id of a pipeline, "embedded" or "embedded:sd3". All workers must see it.
        batch_size: number of images that are evaluated at once, however many a call gets.
        device: device that computes, such as "cuda:1"; None: the accelerator, or the CPU without one.
        image_column: column of the images: PIL, the bytes of a file, its path, {"bytes", "path"} as `datasets` has
            undecoded images, or uint8 arrays (H, W, 3) or (H, W).
        caption_column: column of prompts or class labels. None: "caption" if the batch has it and no `prompt` is set.
        key_column: column that is returned as it is, if the batch has it. Messages name images by their keys, or
            without keys by their places in the batch.
        settings: `revision`, `variant`, `dtype`, `resolution`, `max_pixels`, `prompt`, `num_inference_steps`,
            `scheme`, `tolerance`, `estimator`, `num_probes`, `bins`, `seed` and `sample_latents`, each as for
            `diffusers-fisher likelihood`.

    Raises:
        InputError: a setting is unknown or has a value that is not allowed.
    """

    @check_kinds
    def __init__(
        self,
        model: str,
        *,
        batch_size: int = 16,
        device: str | None = None,
        image_column: str = "image",
        caption_column: str | None = None,
        key_column: str = "key",
        **settings: object,
    ):
        values = settings_of(SETTINGS, settings, "a scorer")
        if batch_size < 1:
            raise InputError(f"`batch_size` is {batch_size}; allowed: at least 1.")
        # Messages name the place of an image by the path of its data.
        data = ImageData("the batch", image_column=image_column, caption_column=caption_column, **values[ImageData])
        denoiser = DenoiserSettings(model, **values[DenoiserSettings])
        self.settings = DatasetSettings(denoiser=denoiser, data=data, **values[DatasetSettings])
        self.batch_size, self.device, self.key_column = batch_size, device, key_column

    def __call__(self, batch: Mapping[str, Column]) -> dict[str, Column]:
        """Returns the likelihoods of a batch.

        Args:
            batch: columns of B rows each. Other columns than those of the images, captions and keys have no meaning.

        Returns:
            Columns (B,): the keys as they came, if there are any, and arrays. These are `bits_per_dim`; `log_prob` and
            its errors `total_error` (half-width of a 95% interval), `standard_error` (of the probes) and
            `discretisation_error`, nats, float64, infinite where an error is not known; `dims` and `denoiser_calls`
            (along the path), int64; `status` ("converged" or "not converged" to the tolerance, "one grid" without a
            tolerance, "failed"); and `error`, empty, or why this row has no likelihood. The numbers of such a row are
            NaN, its integers 0.

        Raises:
            InputError: a column is missing or would be replaced, or the model does not exist or does not take the
                settings. Nothing about a single image is raised.
            UnsupportedError: the pipeline has no likelihood.
            CheckpointError: the model's files are damaged.
        """
        captions_from = self._check_columns(batch)
        images = batch[self.settings.data.image_column]
        captions: Column = [None] * len(images) if captions_from is None else batch[captions_from]
        keys: Column = batch[self.key_column] if self.key_column in batch else range(len(images))
        records: dict[int, dict[str, Any]] = {}
        for start in range(0, len(images), self.batch_size):
            evaluator = _evaluator(self.settings, self.device)
            examples = []
            for place in range(start, min(start + self.batch_size, len(images))):
                try:
                    example = self._example(images[place], captions[place], str(keys[place]), evaluator)
                    examples.append((place, example))
                except InputError as error:
                    records[place] = {"error": str(error)}
            records |= {record["position"]: record for record in evaluator.evaluate(examples)}
        table = self._table([records[place] for place in range(len(images))])
        return {self.key_column: keys, **table} if self.key_column in batch else table

    def score_frames(self, frames: Iterable[pandas.DataFrame]) -> Iterator[pandas.DataFrame]:
        """Yields the likelihoods of frames, one frame each, as `mapInPandas` of Spark asks for.

        Args:
            frames: frames with the columns that a call takes.

        Raises:
            InputError, UnsupportedError, CheckpointError: as a call does.
        """
        yield from over_frames(self, frames)

    def _check_columns(self, batch: Mapping[str, Column]) -> str | None:
        """Checks the names and lengths of a batch's columns; returns the name of the captions, None without them."""
        data = self.settings.data
        captions = data.caption_column
        if captions is None and self.settings.prompt is None and isinstance(batch, Mapping) and CAPTION in batch:
            captions = CAPTION
        names = [data.image_column] if captions is None else [data.image_column, captions]
        check_columns(batch, names, [self.key_column], RESULTS, "Set `image_column` or `caption_column`.")
        return captions

    def _example(self, image: object, caption: object, name: str, evaluator: ImageEvaluator) -> Example:
        """Reads an image. Raises `InputError` if the image can't be read or the caption is of another kind."""
        with without_pillow_warnings():
            pixels, transparent = read_image(image, name, self.settings.data, evaluator.backbone.image_channels)
        return Example(name, pixels, _caption(caption, name), transparent)

    def _table(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Column]:
        """Returns the columns of the results. Their types are the same for every batch, as Arrow needs them."""
        failed = ["error" in record for record in records]
        levels = (self.settings.num_inference_steps or 0) + 1  # where no grid is refined
        table: dict[str, Column] = {
            name: numpy.array(
                [math.nan if "error" in record else _number(record[name]) for record in records], dtype=numpy.float64
            )
            for name in NUMBERS
        }
        table["dims"] = numpy.array([record.get("dims", 0) for record in records], dtype=numpy.int64)
        calls = [0 if fails else record.get("levels", levels) for record, fails in zip(records, failed, strict=True)]
        table["denoiser_calls"] = numpy.array(calls, dtype=numpy.int64)
        words = [
            FAILED if fails else record.get("status", ONE_GRID) for record, fails in zip(records, failed, strict=True)
        ]
        table["status"] = text_column(words)
        table["error"] = text_column(record.get("error", "") for record in records)
        return table


@functools.lru_cache(maxsize=1)
def _evaluator(settings: DatasetSettings, device: str | None) -> ImageEvaluator:
    """Returns the evaluator of this process. Engines unpickle a scorer again and again, and the model stays."""
    return ImageEvaluator(place_pipeline(load_pipeline(settings.denoiser), worker_device(device)), settings)


def _caption(caption: object, name: str) -> Caption:
    """Returns a caption as records have it: columns of frames and arrays have kinds of their own."""
    if caption is None or (isinstance(caption, float) and math.isnan(caption)):
        return None
    if isinstance(caption, str):
        return str(caption)
    if isinstance(caption, (int, numpy.integer)) and not isinstance(caption, bool):
        return int(caption)
    raise InputError(
        f"The caption of image '{name}' is {caption!r:.60} ({type(caption).__name__}); allowed: a text, a class label "
        "or None."
    )


def _number(value: float | None) -> float:
    """Returns a number of a record, in which None stands for an error that is not known."""
    return math.inf if value is None else value
