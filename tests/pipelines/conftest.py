"""Notes the outcome of tests marked with `cell`, of which the table in docs/compatibility.md is made."""

import pytest

from pipelines import compatibility


def pytest_configure(config):
    config.addinivalue_line("markers", "cell(column): the test decides that column of its backbone in the table")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """The test of the table runs after all that decide its cells."""
    items.sort(key=lambda item: item.name == "test_table_in_the_documentation_is_that_of_this_run")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    cell = compatibility.cell(item)
    if cell is not None and (report.when == "call" or not report.passed):
        compatibility.note(*cell, report.outcome)
    return report
