"""How a dataset is evaluated: devices, workers, images at once. No number depends on it."""

from typing import Literal

from ..errors import InputError
from ..settings import Engine, Positive, settings_class

BatchSize = int | Literal["auto"]
"""Number of images that are evaluated at once; "auto": found by trial."""

GAIN = 1.05  # a larger batch must be this much faster
TRIALS = 2  # batches per size: the first one warms up
LARGEST = 1024


@settings_class
class Execution:
    """Settings on which no number depends. A run can be resumed with other values.

    Args:
        engine: "processes": the process that is called, and the others of its launch; or "ray": actors of Ray.
        num_actors: number of actors of Ray; None: one per GPU of the cluster, or one without GPUs.
        decoding_threads: number of threads per process that read and decode images while the device computes.
        device: device that computes, such as "cuda:1"; None: the accelerator of the process, or the CPU without one.
        offload: move every network to the device only while it works, by `enable_model_cpu_offload`.
    """

    engine: Engine = "processes"
    num_actors: Positive | None = None
    decoding_threads: Positive = 2
    device: str | None = None
    offload: bool = False

    def __post_init__(self) -> None:
        if self.engine != "ray" and self.num_actors is not None:
            raise InputError("`num_actors` has no use with engine 'processes'; launch processes by `torchrun`.")


def parse_batch_size(text: str) -> BatchSize:
    """Returns the batch size that an option of a command says: a whole number or "auto".

    Raises:
        InputError: the text is neither.
    """
    if text == "auto":
        return "auto"
    if not text.isdecimal():
        raise InputError(f"`batch_size` is {text!r}; allowed: a whole number of at least 1, or 'auto'.")
    return int(text)


class BatchSizeTrial:
    """The number of images that are evaluated at once: fixed, or found by trial on the images of the run themselves.

    A trial begins with one image and doubles the number as long as this is faster, so no evaluation is wasted.

    Args:
        batch_size: the number, or "auto".

    Attributes:
        size: number of images of the next batch.

    Raises:
        InputError: the number is below 1.
    """

    def __init__(self, batch_size: BatchSize):
        if isinstance(batch_size, int) and batch_size < 1:
            raise InputError(f"`batch_size` is {batch_size}; allowed: at least 1, or 'auto'.")
        self.is_auto = self._goes_on = batch_size == "auto"
        self.size = 1 if batch_size == "auto" else batch_size
        self._rates: list[float] = []  # images per second of the batches of this size
        self._best = (0.0, 1)  # the highest rate so far, and its size

    def note(self, count: int, seconds: float, out_of_memory: bool) -> None:
        """Takes note of a batch of `count` images; with "auto" the next batch may have another size.

        Args:
            out_of_memory: whether the batch had to be divided, because the memory was too small for it.
        """
        if self.is_auto and out_of_memory:
            self.size, self._goes_on = max(1, min(self.size, count) // 2), False
        if not self._goes_on or count < self.size:
            return
        self._rates.append(count / max(seconds, 1e-9))
        if len(self._rates) < TRIALS:
            return
        rate, (best, best_size) = max(self._rates), self._best
        self._rates = []
        if rate < GAIN * best:
            self.size, self._goes_on = best_size, False
            return
        self._best = (rate, self.size)
        self._goes_on = self.size < LARGEST
        self.size = min(2 * self.size, LARGEST)
