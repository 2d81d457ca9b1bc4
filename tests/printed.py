"""Runs the documents' Python blocks, and compares what they print with the text blocks behind them.

`python tests/printed.py docs/index.md` writes what the blocks print into a document. A text block (```text) directly
behind a Python block is what that block prints. Numbers may differ by two per cent, as processors round differently.
"""

import contextlib
import io
import math
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"```python\n(?P<code>.*?)```\n(?:\n```text\n(?P<printed>.*?)```\n)?", re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


def documents():
    """Returns README.md and all pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def run(path):
    """Runs the blocks of a document in order, in one namespace.

    Returns:
        The namespace, and pairs (text in the document or None, printed text), one per block.
    """
    namespace, pairs = {"__name__": path.stem}, []
    for block in BLOCK.finditer(path.read_text(encoding="utf-8")):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(block["code"], path.name, "exec"), namespace)
        pairs.append((block["printed"], printed.getvalue()))
    return namespace, pairs


def agree(expected, got):
    """Returns whether two texts have the same words, and numbers that differ by at most two per cent or 0.02."""
    if NUMBER.sub("#", expected).split() != NUMBER.sub("#", got).split():
        return False
    pairs = zip(NUMBER.findall(expected), NUMBER.findall(got), strict=True)
    return all(math.isclose(float(a), float(b), rel_tol=0.02, abs_tol=0.02) for a, b in pairs)


def write(path):
    """Writes what the blocks of a document print into its text blocks."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        _, pairs = run(path)
    texts = iter(pairs)

    def filled(block):
        old, new = next(texts)
        return block[0] if old is None else f"```python\n{block['code']}```\n\n```text\n{new}```\n"

    path.write_text(BLOCK.sub(filled, path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        write(Path(name).resolve())
