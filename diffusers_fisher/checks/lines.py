"""The lines of a check: what was measured, whether it is right, and where it is not, the cause and the cure."""

from __future__ import annotations

import dataclasses
import re
import textwrap
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args

import torch

from ..errors import FisherError, InputError

Status = Literal["ok", "warning", "failed", "not run"]
Subject = TypeVar("Subject")

WIDTH = 119  # characters of a line on the terminal


@dataclasses.dataclass(frozen=True)
class CheckLine:
    """Holds the answer to one question about a checkpoint.

    Args:
        status: "ok", "warning" (it works, but not as well as it could), "failed", or "not run" (`cause` says why).
        measured: what was measured, in words.
        cause: what makes the line anything but "ok".
        cure: what to do.
        figures: the numbers behind `measured`, as JSON.
        name: name of the line.
        seconds: how long the line took.
    """

    status: Status
    measured: str
    cause: str = ""
    cure: str = ""
    figures: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    name: str = ""
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class CheckReport:
    """Holds the lines of a check. `print` shows them as a table.

    Args:
        model: name of the checkpoint.
        device: the device and the dtype that it was checked on.
        lines: the lines, in the order of the table.
        images: pictures of the scored images (n, 3, H, W) float32 in [0, 1] on the CPU; None where there are none.
    """

    model: str
    device: str
    lines: Sequence[CheckLine]
    images: torch.Tensor | None = None

    def __getitem__(self, name: str) -> CheckLine:
        """Returns the line of this name. Raises `InputError` if there is none."""
        for line in self.lines:
            if line.name == name:
                return line
        raise InputError(f"There is no line {name!r}; allowed: {', '.join(line.name for line in self.lines)}.")

    @property
    def failed(self) -> list[str]:
        """The names of the lines that failed."""
        return [line.name for line in self.lines if line.status == "failed"]

    def as_json(self) -> dict[str, Any]:
        """Returns the report as JSON: the checkpoint, the device, and the lines with their figures by name."""
        lines = {
            line.name: {name: value for name, value in vars(line).items() if name != "name"} for line in self.lines
        }
        return {"model": self.model, "device": self.device, "failed": self.failed, "lines": lines}

    def __str__(self) -> str:
        counts = {status: sum(line.status == status for line in self.lines) for status in get_args(Status)}
        numbers = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        rows = [f"Check of {self.model} on {self.device}: {numbers}"]
        indent = max(len(line.name) for line in self.lines) + 11
        for line in self.lines:
            texts = [line.measured, *([f"Cause: {line.cause}"] * bool(line.cause)), *([line.cure] * bool(line.cure))]
            head = f"{line.name:<{indent - 10}}{line.status:<10}"
            rows += [
                textwrap.fill(
                    text, WIDTH, initial_indent=head if number == 0 else " " * indent, subsequent_indent=" " * indent
                )
                for number, text in enumerate(text for text in texts if text)
            ]
        return "\n".join(rows)


def run_line(name: str, measure: Callable[[Subject], CheckLine], subject: Subject) -> CheckLine:
    """Returns the line that `measure` makes of a subject. An error makes a line too, so that it ends no other line."""
    begin = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the lines say themselves what a warning would say
            line = measure(subject)
    except (MemoryError, torch.OutOfMemoryError) as error:
        line = CheckLine("not run", "", f"There is not enough memory: {_first_sentence(error)}", "Free memory.")
    except FisherError as error:
        # Messages say what was got and what is allowed, and in their last sentence what to do.
        *cause, cure = re.split(r"(?<=[.)]) (?=[A-Z])", str(error))
        line = CheckLine("failed", "", " ".join(cause) or cure, cure if cause else "")
    # Networks and libraries of all kinds raise errors of all kinds, and none of them may end the other lines.
    except Exception as error:
        line = CheckLine("failed", "", f"{type(error).__name__}: {_first_sentence(error)}")
    return dataclasses.replace(line, name=name, seconds=time.perf_counter() - begin)


def _first_sentence(error: BaseException) -> str:
    """Returns the first line of an error's message."""
    return (str(error).strip().splitlines() or ["no message"])[0]
