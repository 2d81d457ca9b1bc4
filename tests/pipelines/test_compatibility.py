"""The table in docs/compatibility.md is that of this test run."""

import pytest

from pipelines import compatibility
from pipelines.backbones import BACKBONES, FAMILIES

DDPM_ROW = f"| `DDPMFisherPipeline` | {' | '.join(['yes'] * len(compatibility.COLUMNS))} |"


def test_table_in_the_documentation_is_that_of_this_run(request):
    """Runs last, see conftest.py: of a run with all the tests that decide cells it fails where one comes after it."""
    rows = compatibility.current_table().splitlines()[2:]
    assert [line.split("`")[1] for line in rows] == [f"{name}FisherPipeline" for name in [*BACKBONES, *FAMILIES]]
    results = {compatibility.cell(item) for item in request.session.items}
    names = compatibility.decided([*BACKBONES, *FAMILIES], results)
    if not names:
        pytest.skip("this run decides every cell of no row")
    advice = "run python tests/pipelines/compatibility.py"
    assert {compatibility.row(name) for name in names} <= set(rows), (
        f"The table in docs/compatibility.md is old; {advice}."
    )


def test_worst_outcome_decides_a_cell(monkeypatch):
    monkeypatch.setattr(compatibility, "outcomes", {})
    for outcome, expected in (
        ("passed", "passed"),
        ("skipped", "skipped"),
        ("failed", "failed"),
        ("passed", "failed"),
    ):
        compatibility.note("A", "likelihood", outcome)
        assert compatibility.outcomes["A", "likelihood"] == expected
    assert not compatibility.decided(["A"], compatibility.outcomes)
    for column in compatibility.COLUMNS:
        compatibility.note("A", column, "passed")
    assert compatibility.decided(["A"], compatibility.outcomes) == ["A"]
    assert compatibility.row("A").startswith("| `AFisherPipeline` | FAILS | yes |")
    assert compatibility.table(["DDPM", "A"]).splitlines()[2:] == [DDPM_ROW, compatibility.row("A")]
