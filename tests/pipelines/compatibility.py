"""The table in docs/compatibility.md, from a test run: `python tests/pipelines/compatibility.py` writes it.

With pytest's options, such as `-k Chroma`, it writes the rows of which the run decides every cell.
"""

import sys
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

COLUMNS = (
    "likelihood", "trace model", "guidance: one step", "guidance: direct", "guidance: finite difference",
    "guidance: autodiff", "guidance: Gaussian", "guidance: endpoint", "guidance: centred endpoint", "model offload",
    "bfloat16", "float16", "save and load",
)  # fmt: skip
FILES = ("test_backbones.py", "test_trace_models.py")
SIGNS = {"passed": "yes", "failed": "FAILS", "skipped": "no"}
DOCUMENT = Path(__file__).parents[2] / "docs" / "compatibility.md"
BEGIN, END = "<!-- table: from the test run -->\n", "<!-- end of table -->\n"

outcomes: dict[tuple[str, str], str] = {}
"""Outcomes by backbone and column; where several tests decide a cell, the worst one."""


def cell(item: Any) -> tuple[str, str] | None:
    """Returns the backbone and the column that a test decides."""
    marker = item.get_closest_marker("cell")
    if marker is None:
        return None
    parameters = item.callspec.params
    return parameters["backbone"], marker.args[0].format(**parameters)


def note(backbone: str, column: str, outcome: str) -> None:
    """Records one test's outcome."""
    order = ("passed", "skipped", "failed")
    outcomes[backbone, column] = max(outcome, outcomes.get((backbone, column), "passed"), key=order.index)


def decided(backbones: Iterable[str], results: Container) -> list[str]:
    """Returns the backbones all of whose cells are among the `results`."""
    return [backbone for backbone in backbones if all((backbone, column) in results for column in COLUMNS)]


def row(backbone: str) -> str:
    """Returns the line of a backbone, in Markdown."""
    cells = [SIGNS[outcomes[backbone, column]] for column in COLUMNS]
    return f"| `{backbone}FisherPipeline` | " + " | ".join(cells) + " |"


def table(backbones: Iterable[str]) -> str:
    """Returns the table in Markdown, one line per backbone; lines of backbones that were not run stay as they are."""
    old = {line.split("`")[1]: line for line in current_table().splitlines()[2:]}
    lines = ["| pipeline | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    new = {f"{backbone}FisherPipeline": row(backbone) for backbone in decided(backbones, outcomes)}
    names = [f"{backbone}FisherPipeline" for backbone in backbones]
    lines += [(old | new)[name] for name in names if name in old | new]
    return "\n".join(lines) + "\n"


def current_table() -> str:
    """Returns the table that the document holds."""
    return DOCUMENT.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]


def write(text: str) -> None:
    """Puts the table `text` into the document."""
    before, after = DOCUMENT.read_text(encoding="utf-8").split(BEGIN)
    DOCUMENT.write_text(before + BEGIN + text + END + after.split(END)[1], encoding="utf-8")


class _Writer:
    def pytest_sessionfinish(self) -> None:
        from pipelines import backbones, compatibility  # the module of the tests, which is not this `__main__`

        names = [*backbones.BACKBONES, *backbones.FAMILIES]
        if not compatibility.decided(names, compatibility.outcomes):
            sys.exit("The run decided every cell of no row; the table was not written.")
        compatibility.write(compatibility.table(names))


if __name__ == "__main__":
    import pytest

    files = [str(Path(__file__).with_name(name)) for name in FILES]
    options = ["-q", "-m", "not gpu and not hub", *sys.argv[1:]]
    sys.exit(pytest.main([*options, *files], plugins=[_Writer()]))
