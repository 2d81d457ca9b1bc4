"""Parts of the work over many items, which launches that know nothing of each other do: the tasks of a job array."""

import os
from typing import Any

from ..errors import InputError
from ..settings import NotNegative, Positive, settings_class

ARRAY = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN")
LAST_TASK = "SLURM_ARRAY_TASK_MAX"


@settings_class
class Shard:
    """The items at the positions `shard_index`, `shard_index + num_shards`, `shard_index + 2 num_shards`, ...

    Args:
        shard_index: 0 to `num_shards` - 1.
        num_shards: number of shards, which together hold every item once.

    Raises:
        InputError: there is no such shard.
    """

    shard_index: NotNegative = 0
    num_shards: Positive = 1

    def __post_init__(self) -> None:
        if self.shard_index >= self.num_shards:
            raise InputError(
                f"`shard_index` is {self.shard_index} with `num_shards` {self.num_shards}; allowed: 0 to "
                f"{self.num_shards - 1}."
            )

    def __contains__(self, position: int) -> bool:
        return position % self.num_shards == self.shard_index

    def positions(self, total: int) -> range:
        """Returns the positions of the shard's items among `total` items."""
        return range(self.shard_index, total, self.num_shards)

    def part(self, index: int, count: int) -> "Shard":
        """Returns the shard that holds every `count`-th item of this one, from its item number `index` on."""
        return Shard(self.shard_index + self.num_shards * index, self.num_shards * count)


def share_of_files(num_files: int, *shards: Shard) -> tuple[range, Shard]:
    """Returns which files a worker reads, and which rows of each of them.

    Every one of `shards` divides what the ones before it have left: whole files if there are enough of them, so that
    no file is read twice, and otherwise the rows of each file.
    """
    files, rows = range(num_files), Shard()
    for shard in shards:
        if len(files) >= shard.num_shards:
            files = files[shard.shard_index :: shard.num_shards]
        else:
            rows = rows.part(shard.shard_index, shard.num_shards)
    return files, rows


def shard_note(shard: Shard | None) -> dict[str, Any]:
    """Returns what the settings of a run keep of its shard; nothing for a run over all items."""
    return {} if shard is None else {"shard_index": shard.shard_index, "num_shards": shard.num_shards}


def chosen_shard(shard_index: int | None, num_shards: int | None, from_environment: bool) -> Shard | None:
    """Returns the shard that the options of a command name; None where they name none.

    Raises:
        InputError: one of `shard_index` and `num_shards` is missing, the environment names a shard too, or it names
            none.
    """
    if shard_index is None and num_shards is None:
        return _shard_of_the_environment() if from_environment else None
    if from_environment:
        raise InputError(
            "`shards_from_environment` is set together with `shard_index` or `num_shards`; allowed: one of the two "
            "ways. Leave the other out."
        )
    if shard_index is None or num_shards is None:
        raise InputError(
            f"`shard_index` is {shard_index} and `num_shards` is {num_shards}; allowed: both or none. Set both."
        )
    return Shard(shard_index, num_shards)


def _shard_of_the_environment() -> Shard:
    """Returns the shard of this task of a SLURM job array, whose tasks have consecutive numbers."""
    missing = [name for name in ARRAY if not os.environ.get(name)]
    if missing:
        raise InputError(
            f"The environment has no {', '.join(missing)}, which SLURM sets for the tasks of a job array. Submit the "
            "job by `sbatch --array=0-3`, for example, or pass `shard_index` and `num_shards`."
        )
    texts = {name: os.environ[name] for name in (*ARRAY, LAST_TASK) if name in os.environ}
    words = ", ".join(f"{name} {text!r}" for name, text in texts.items())
    if not all(text.isdecimal() for text in texts.values()):
        raise InputError(f"The environment has {words}; allowed: whole numbers. Pass `shard_index` and `num_shards`.")
    task, count, first, *last = map(int, texts.values())
    if count == 1:  # a failed task that is submitted again by itself is no shard of all items
        raise InputError(
            f"The environment has {words}: an array of one task, which would take all items. To run one shard again, "
            "pass its `shard_index` and `num_shards`."
        )
    if not first <= task < first + count or last not in ([], [first + count - 1]):
        raise InputError(
            f"The environment has {words}; allowed: tasks with consecutive numbers, such as `sbatch --array=0-3`. "
            "Submit such an array, or pass `shard_index` and `num_shards`."
        )
    return Shard(task - first, count)
