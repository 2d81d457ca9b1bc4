"""One function from columns of prompts to columns of guided images, for engines that run it over a dataset."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy
import pandas

from ..arguments import check_kinds
from ..jobs.pages import encode_png
from ..jobs.pipelines import check_offload
from .columns import FAILED, Column, check_columns, over_frames, settings_of, worker_device
from .image_evaluator import is_out_of_memory
from .prompt_guide import GallerySettings, Guided, Memory, PromptGuide, check_guidance

SETTINGS = {
    GallerySettings: (
        "reward", "held_out", "estimator", "num_guidance_steps", "step_size", "num_inference_steps",
        "guidance_scale", "dtype", "seed", "negative_prompt", "optimizer", "patience",
    ),
    Memory: ("batch_size", "checkpoint_decoder", "offload"),
}  # fmt: skip
"""The settings that a worker takes, by the class that checks them."""

NUMBERS = ("initial_reward", "reward", "held_out_reward")
RESULTS = ("image", *NUMBERS, "status", "error")
SEED = "seed"
BLACK = "black, because the safety checker flagged the image"


class GuidanceWorker:
    """Guides a batch of prompts by a reward: columns in, columns out.

    Like `LikelihoodScorer` it is the function of `datasets.Dataset.map(worker, batched=True)` and of Ray Data's
    `map_batches(worker)`, `score_frames` is that of Spark's `mapInPandas`, it can be pickled, and each process loads
    the model at its first call and keeps the model of one worker at a time.

    The image of a prompt is that of `diffusers-fisher guide` for the same seed. It does not depend on the batch but
    for rounding.

    Args:
        model: folder or Hub id of a pipeline, or "embedded". All workers must see it.
        device: device that computes, such as "cuda:1"; None: the accelerator, or the CPU without one.
        prompt_column: column of the prompts, or of class labels for pipelines that take labels.
        key_column: column that is returned as it is, if the batch has it.
        settings: `reward` and `held_out` (names of rewards, see `named_reward`), `estimator`, `num_guidance_steps`,
            `step_size`, `num_inference_steps`, `guidance_scale`, `dtype`, `seed`, `negative_prompt`, `optimizer`,
            `patience`, `batch_size` (1), `checkpoint_decoder` and `offload`, each as for `diffusers-fisher guide`.
            `seed` holds for every row of a batch without a column "seed".

    Raises:
        InputError: a setting is unknown or has a value that is not allowed.
    """

    @check_kinds
    def __init__(
        self,
        model: str,
        *,
        device: str | None = None,
        prompt_column: str = "prompt",
        key_column: str = "key",
        **settings: object,
    ):
        values = settings_of(SETTINGS, settings, "a worker")
        self.settings, self.memory = GallerySettings(model, **values[GallerySettings]), Memory(**values[Memory])
        check_guidance(self.settings, self.memory)
        self.device, self.prompt_column, self.key_column = device, prompt_column, key_column

    def __call__(self, batch: Mapping[str, Column]) -> dict[str, Column]:
        """Returns the guided images of a batch.

        Args:
            batch: columns of B rows each: the prompts, and if there are any, the keys and the seeds of the initial
                noise ("seed"). Other columns have no meaning.

        Returns:
            Columns (B,): the keys as they came, if there are any; `image`, the best image of each prompt as the bytes
            of a PNG file; float64 arrays `initial_reward` (of the first image), `reward` and `held_out_reward` (of
            the best image; NaN without a held-out reward); `status` ("completed", why the guidance stopped early,
            that a safety checker made the image black, or "failed"); and `error`, empty, or why this row has no image.
            The image of such a row is empty, its numbers are NaN.

        Raises:
            InputError: a column is missing or would be replaced, or the model or a reward does not exist. Nothing
                about a single prompt is raised.
            UnsupportedError: the pipeline can't be guided, or not be offloaded.
            CheckpointError: the model's files are damaged.
        """
        names = (SEED, self.key_column)
        check_columns(batch, [self.prompt_column], names, RESULTS, "Set `prompt_column`.")
        prompts = batch[self.prompt_column]
        seeds: Column = batch[SEED] if SEED in batch else [self.settings.seed] * len(prompts)
        results: dict[int, Guided | str] = {}
        good = []
        for place, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            mistake = _mistake(prompt, seed)
            if mistake:
                results[place] = f"Row {place}: {mistake}"
            else:
                good.append(place)
        size = self.memory.batch_size
        for places in (good[start : start + size] for start in range(0, len(good), size)):
            guide = _guide(self.settings, self.memory, self.device)
            rows = [(_condition(prompts[place]), int(seeds[place])) for place in places]
            results |= dict(zip(places, _results(guide, rows), strict=True))
        table = _table([results[place] for place in range(len(prompts))])
        return {self.key_column: batch[self.key_column], **table} if self.key_column in batch else table

    def score_frames(self, frames: Iterable[pandas.DataFrame]) -> Iterator[pandas.DataFrame]:
        """Yields the guided images of frames, one frame each, as `mapInPandas` of Spark asks for.

        Raises:
            InputError, UnsupportedError, CheckpointError: as a call does.
        """
        yield from over_frames(self, frames)


@functools.lru_cache(maxsize=1)
def _guide(settings: GallerySettings, memory: Memory, device: str | None) -> PromptGuide:
    """Returns the pipeline and rewards of this process. Engines unpickle a worker again and again."""
    place = worker_device(device)
    check_offload(memory.offload, place)
    return PromptGuide(settings, memory, place)


def _mistake(prompt: object, seed: object) -> str:
    """Says in words what is wrong with a row, nothing for a good one."""
    if not isinstance(prompt, (str, int, numpy.integer)) or isinstance(prompt, bool):
        return f"the prompt is {prompt!r:.60} ({type(prompt).__name__}); allowed: a text or a class label."
    if not isinstance(seed, (int, numpy.integer)) or isinstance(seed, bool) or seed < 0:
        return f"the seed is {seed!r:.60} ({type(seed).__name__}); allowed: a whole number that is not negative."
    return ""


def _condition(prompt: str | int) -> str | int:
    """Returns a prompt or class label as pipelines take them: columns of arrays have kinds of their own."""
    return str(prompt) if isinstance(prompt, str) else int(prompt)


def _results(guide: PromptGuide, rows: Sequence[tuple[str | int, int]]) -> list[Guided | str]:
    """Returns the results of prompts with their seeds. Prompts that fail together are guided one by one."""
    try:
        return guide.guide([prompt for prompt, _ in rows], [seed for _, seed in rows])
    # diffusers raises ValueError, of which InputError is a subclass.
    except (ValueError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        words = str(error) or type(error).__name__
    return [words] if len(rows) == 1 else [result for row in rows for result in _results(guide, [row])]


def _table(results: Sequence[Guided | str]) -> dict[str, Column]:
    """Returns the columns of the results. Their types are the same for every batch, as Arrow needs them."""
    rows = [_failure(result) if isinstance(result, str) else _row(result) for result in results]
    table: dict[str, Column] = {
        name: numpy.array([row[name] for row in rows], dtype=numpy.float64 if name in NUMBERS else object)
        for name in RESULTS
    }
    return table


def _failure(error: str) -> dict[str, object]:
    return {"image": b"", **dict.fromkeys(NUMBERS, math.nan), "status": FAILED, "error": error}


def _row(result: Guided) -> dict[str, object]:
    out, row, best = result.output, result.row, result.best_run
    held_out = math.nan
    if out.held_out_rewards is not None and len(out.held_out_rewards):
        held_out = float(out.held_out_rewards[best, row])
    status = BLACK if result.black_images({"after": out.images[row]}) else out.status
    return {
        "image": encode_png(out.images[row]), "initial_reward": float(out.rewards[0, row]),
        "reward": float(out.rewards[best, row]),
        "held_out_reward": held_out, "status": status, "error": "",
    }  # fmt: skip
