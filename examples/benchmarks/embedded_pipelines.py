"""Loads the embedded checkpoints for benchmarks."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusers_fisher import StableDiffusion3FisherPipeline, StableDiffusionFisherPipeline, embedded_checkpoint

sys.path.insert(0, str(Path(__file__).parent.parent))
from empty_tokens import short_context

NAMES = ("sd", "sd3")


@contextlib.contextmanager
def embedded_pipeline(name: str, folder: str | None = None) -> Iterator[Any]:
    """Yields an embedded checkpoint's pipeline, the flow-matching one with a single empty token (`short_context`).

    Args:
        name: "sd" or "sd3".
        folder: another folder of that kind.
    """
    cls: Any = StableDiffusion3FisherPipeline if name == "sd3" else StableDiffusionFisherPipeline
    pipe = cls.from_pretrained(folder or embedded_checkpoint(name))
    pipe.set_progress_bar_config(disable=True)
    with short_context(pipe.transformer) if name == "sd3" else contextlib.nullcontext():
        yield pipe
