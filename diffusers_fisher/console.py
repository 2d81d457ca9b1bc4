"""Prints texts with users' words on any console: of Windows' code pages or of ASCII too."""

import contextlib
import io
import sys
from collections.abc import Iterator


def say(text: str) -> None:
    """Prints a text. Letters that the console's encoding lacks become escapes."""
    encoding = sys.stdout.encoding if sys.stdout is not None else None  # a program without a console has no output
    print(text.encode(encoding or "utf-8", "backslashreplace").decode(encoding or "utf-8"), flush=True)


@contextlib.contextmanager
def tolerant_console() -> Iterator[None]:
    """Within the block, whatever any library prints has escapes for letters that the console's encoding lacks."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            stream.reconfigure(errors=errors)
