"""What evaluations cost on this device, which settings to take, and how long many images take."""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .lines import CheckLine
from .subject import Subject

REPEATS = 3
MANY_IMAGES = (1_000, 1_000_000)


def check_cost(subject: Subject) -> CheckLine:
    """Times an evaluation of the denoiser with one sample and with a batch, and measures its peak memory."""
    rows = []
    for size in sorted({1, min(subject.batch_size, len(subject.samples))}):
        denoiser, clean = subject.denoiser(0, size), subject.backbone.pack(subject.samples[:size])
        timestep = subject.states[1][0].known_timestep
        noise = subject.noise(clean, "cost")

        evaluate = functools.partial(torch.no_grad()(denoiser.model_output), noise, timestep)
        seconds, memory = _seconds(evaluate, subject.backbone.device), _peak_memory(evaluate, subject.backbone.device)
        rows.append({"batch": size, "seconds": seconds, "seconds_per_image": seconds / size, "peak_bytes": memory})
    words = "; ".join(
        f"batch of {row['batch']}: {row['seconds']:.3g} s and {row['peak_bytes'] / 2**20:.3g} MiB per evaluation"
        for row in rows
    )
    return CheckLine("ok", words, figures={"device": str(subject.backbone.device), "evaluations": rows})


def _seconds(evaluate: Callable[[], object], device: torch.device) -> float:
    """Returns the shortest time of three evaluations, after one that is not timed."""
    evaluate()
    times = []
    for _ in range(REPEATS):
        _wait(device)
        begin = time.perf_counter()
        evaluate()
        _wait(device)
        times.append(time.perf_counter() - begin)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_memory(evaluate: Callable[[], object], device: torch.device) -> int:
    """Returns the largest memory that an evaluation takes beside the weights, in bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        evaluate()
        return torch.cuda.max_memory_allocated(device) - before
    with _MemoryOfTensors() as memory:
        evaluate()
    return memory.peak


class _MemoryOfTensors(TorchDispatchMode):
    """Adds up the memory of the tensors that operations return within its block, and keeps the largest sum.

    Attributes:
        peak: the largest sum, bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak, self._present, self._seen = 0, 0, weakref.WeakSet[torch.UntypedStorage]()

    def __torch_dispatch__(
        self, func: Callable[..., object], types: object, args: tuple = (), kwargs: dict[str, object] | None = None
    ) -> object:
        self._seen.update(_storages((args, kwargs)))  # weights, and what was there before; views of them take nothing
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage not in self._seen:
                self._seen.add(storage)
                self._present += storage.nbytes()
                weakref.finalize(storage, self._forget, storage.nbytes())
        self.peak = max(self.peak, self._present)
        return result

    def _forget(self, size: int) -> None:
        self._present -= size


def _storages(tree: object) -> list[torch.UntypedStorage]:
    """Returns the memory behind the tensors of nested containers."""
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def recommend_settings(subject: Subject) -> CheckLine:
    """Returns settings of `log_likelihood` and `guide` that follow from the lines before."""
    figures: dict[str, str | int] = {}
    step, trace = subject.found_line("step of differences"), subject.found_line("trace model").status
    estimator = ""
    if trace != "ok" and step.status == "warning":
        estimator = f", estimator=FiniteDifferenceFisher(relative_step={step.figures['best']:g})"
    elif trace == "failed":  # by default its likelihoods would be refused
        estimator = ", estimator=FiniteDifferenceFisher()"
    figures["likelihood"] = f"log_likelihood(pipe, images, prompts{estimator})"
    figures["guidance"] = "guide(pipe, prompts, reward)"
    evaluations = subject.found_line("cost").figures.get("evaluations", [])
    if evaluations:
        figures["batch_size"] = min(evaluations, key=lambda row: row["seconds_per_image"])["batch"]
    names = ("calibration", "pipeline's run", "no guidance")
    wrong = [name for name in names if subject.found_line(name).status == "failed"]
    words = "; ".join(f"{name}: {value}" for name, value in figures.items())
    if not wrong:
        return CheckLine("ok", words, figures=figures)
    return CheckLine(
        "warning", words, f"These lines failed: {', '.join(wrong)}.", "Mend them first, and check again.", figures
    )


def estimate_time(subject: Subject) -> CheckLine:
    """Computes how long the likelihoods of many images take, from the seconds of the line 'likelihood'."""
    per_image = subject.found_line("likelihood").figures.get("seconds_per_image")
    if per_image is None:
        return CheckLine("not run", "", "There is no measured likelihood.", "See the line 'likelihood'.")
    times = {str(count): count * per_image for count in MANY_IMAGES}
    words = ", ".join(f"{int(count):,} images {_in_words(seconds)}" for count, seconds in times.items())
    return CheckLine(
        "ok", f"{words}, by {per_image:.3g} s per image in batches of {subject.few}",
        figures={"seconds_per_image": per_image, "seconds": times},
    )  # fmt: skip


def _in_words(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} seconds"
