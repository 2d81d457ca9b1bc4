"""The table of pipelines without a backbone in docs/compatibility.md: `python tests/pipelines/outside_table.py`."""

import sys
import warnings
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).parents[2] / "docs" / "compatibility.md"
BEGIN, END = "<!-- table: of pipelines without a backbone -->\n", "<!-- end of that table -->\n"


def table() -> str:
    """Returns the table in Markdown, one line per set-up of `outside.py`."""
    from diffusers_fisher import FisherError, PipelineDenoiser
    from pipelines.outside import SET_UPS, forget_backbones
    from pipelines.test_outside_backbones import KNOWN_OUTPUTS, REFUSED, compare

    forget_backbones(pytest.MonkeyPatch())
    lines = [
        "| set-up | pipeline, scheduler | outputs | gradient | levels | evaluations without guidance |",
        "|---|---|---|---|---|---|",
    ]
    for name, make in SET_UPS.items():
        setup = make()
        classes = f"{type(setup.pipe).__name__}, {type(setup.pipe.scheduler).__name__.removesuffix('Scheduler')}"
        cells = ["refused", "refused", "refused", "refused"]
        if name not in REFUSED or name in KNOWN_OUTPUTS:
            row = compare(setup)
            figures = (row.outputs, row.gradient, row.levels, row.unguided_evaluations)
            cells = [f"{figure:.1g}" for figure in figures]
        if name in REFUSED:
            try:
                PipelineDenoiser(setup.pipe, **setup.conditions, **setup.guidance).state(setup.noise(), 500.0)
            except FisherError:
                cells[2] = "refused"
        lines.append(f"| `{name}` | {classes} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    warnings.simplefilter("ignore")
    before, after = DOCUMENT.read_text(encoding="utf-8").split(BEGIN)
    DOCUMENT.write_text(before + BEGIN + table() + END + after.split(END)[1], encoding="utf-8")
