"""The table in docs/compatibility.md is that of this test run."""

import pytest

from pipelines import compatibility
from pipelines.backbones import BACKBONES


def test_table_in_the_documentation_is_that_of_this_run(request):
    """Runs last, see conftest.py: of a run with all the tests that decide cells it fails where one comes after it."""
    names = list(BACKBONES)
    if not compatibility.complete(names, {compatibility.cell(item) for item in request.session.items}):
        pytest.skip("this run does not decide every cell")
    advice = "run python tests/pipelines/compatibility.py"
    assert compatibility.table(names) == compatibility.current_table(), (
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
    assert not compatibility.complete(["A"], compatibility.outcomes)
    for column in compatibility.COLUMNS:
        compatibility.note("A", column, "passed")
    assert compatibility.complete(["A"], compatibility.outcomes)
    assert compatibility.table(["A"]).splitlines()[2].startswith("| `AFisherPipeline` | FAILS | yes |")
