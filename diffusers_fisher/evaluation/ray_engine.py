"""Evaluates rows of a dataset by actors of Ray, which may die and are started again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..data import Images
from ..errors import FisherError, InputError
from ..jobs.pipelines import check_offload, load_pipeline, place_pipeline
from .columns import worker_device
from .dataset_settings import DatasetSettings
from .execution import BatchSize, Execution
from .image_evaluator import ImageEvaluator
from .row_evaluator import Evaluated, Row, RowEvaluator

if TYPE_CHECKING:
    from types import ModuleType

RESTARTS = 3  # an image that ends every worker must not do so for ever
AUTO_ROWS = 64  # rows that an actor gets at once if it chooses its batches itself
QUEUED = 2  # batches per actor that are on their way, so that no actor waits for the next one


class RayRows:
    """Evaluates rows by actors of Ray. Each of them loads the model once.

    Args:
        settings: settings of the likelihoods, with the estimator that "auto" stands for.
        images: the dataset, whose rows the actors get from this process.

    Raises:
        InputError: Ray is not installed.
    """

    def __init__(self, settings: DatasetSettings, images: Images, batch_size: BatchSize, execution: Execution):
        self._ray = import_ray()
        self.batch_size, self.execution = batch_size, execution
        self._arguments = (settings, images.without_rows(), batch_size, execution)

    def run(self, rows: Iterator[Row]) -> Iterator[Evaluated]:
        """Yields the records of rows. A batch whose actor has died is evaluated again by another one.

        Raises:
            InputError: an actor has died too often, or could not be started.
        """
        ray, owns_ray = self._ray, not self._ray.is_initialized()
        if owns_ray:
            ray.init(log_to_driver=False)
        try:
            yield from self._run(ray, rows)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, FisherError):
                raise error.cause from error
            raise
        except ray.exceptions.RayActorError as error:
            raise InputError(
                f"A worker of Ray has died {RESTARTS + 1} times, or could not be started: {error}. Its memory may be "
                "too small: take a smaller batch size or fewer actors, and run the same command again."
            ) from error
        finally:
            if owns_ray:
                ray.shutdown()

    def _run(self, ray: ModuleType, rows: Iterator[Row]) -> Iterator[Evaluated]:
        from ray.util import ActorPool

        gpus = int(ray.cluster_resources().get("GPU", 0))
        resources = {"num_gpus": 1} if gpus and self.execution.device != "cpu" else {"num_cpus": 1}
        number = self.execution.num_actors or gpus or 1
        kind = ray.remote(**resources, max_restarts=RESTARTS, max_task_retries=RESTARTS)(RayRowEvaluator)
        pool = ActorPool([kind.remote(*self._arguments) for _ in range(number)])
        size = AUTO_ROWS if self.batch_size == "auto" else self.batch_size
        num_pending = 0
        batch: list[Row] = []
        for row in rows:
            batch.append(row)
            if len(batch) == size:
                if num_pending == QUEUED * number:
                    yield pool.get_next_unordered()
                    num_pending -= 1
                pool.submit(_evaluate, batch)
                num_pending, batch = num_pending + 1, []
        if batch:
            pool.submit(_evaluate, batch)
        while pool.has_next():
            yield pool.get_next_unordered()


class RayRowEvaluator:
    """The actor: evaluates the rows that it gets, on the accelerator that Ray gives it."""

    def __init__(self, settings: DatasetSettings, images: Images, batch_size: BatchSize, execution: Execution):
        device = worker_device(execution.device)
        check_offload(execution.offload, device)
        pipe = place_pipeline(load_pipeline(settings.denoiser), device, execution.offload)
        self._rows = RowEvaluator(ImageEvaluator(pipe, settings), images, batch_size, execution.decoding_threads)

    def evaluate(self, rows: Sequence[Row]) -> Evaluated:
        parts = [*self._rows.run(iter(rows))]
        refusals = [text for part in parts for text in part.refusals]
        return Evaluated([record for part in parts for record in part.records], parts[-1].method, refusals)


def _evaluate(actor: Any, rows: Sequence[Row]) -> Any:  # Any: handles of Ray
    return actor.evaluate.remote(rows)


def import_ray() -> ModuleType:
    """Returns the module `ray`. Raises `InputError` without it."""
    try:
        import ray
        import ray.util
    except ImportError as error:
        raise InputError("The engine 'ray' needs the library `ray`: pip install 'diffusers_fisher[ray]'.") from error
    return ray
