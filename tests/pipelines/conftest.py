"""Notes the outcome of tests marked with `cell`, of which the table in docs/compatibility.md is made."""

import pytest

from pipelines import compatibility


def pytest_configure(config):
    config.addinivalue_line("markers", "cell(column): the test decides that column of its backbone in the table")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    marker = item.get_closest_marker("cell")
    if marker is not None and (report.when == "call" or not report.passed):
        parameters = item.callspec.params
        compatibility.note(parameters["backbone"], marker.args[0].format(**parameters), report.outcome)
    return report
