"""Runs diffusers' tests twice, with diffusers' classes and with ours in their place: `make peer-suites TESTS=PATH`.

PATH is a file or a folder of tests in a checkout of diffusers of the installed version, such as `tests/schedulers`.
The command reports every test that passes with diffusers' classes and does not pass with ours. `EXPECTED` lists the
differences that are on purpose. The exit code is 1 for any other difference. Options for pytest stand in the
environment variable PYTEST_ADDOPTS.

pytest loads this file as a plugin in both runs. In the second one the names of schedulers and pipelines in `diffusers`
are those of our classes while pytest imports the tests.
"""

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

RESULTS, OURS = (
    "PEER_SUITES_RESULTS",
    "PEER_SUITES_OURS",
)  # environment variables: the plugin's file, and whose classes


@dataclasses.dataclass(frozen=True)
class Difference:
    """A test that passes with diffusers' classes alone.

    Args:
        test: pytest's name of the test.
        message: what pytest reports of it, with our classes.
    """

    test: str
    message: str


@dataclasses.dataclass(frozen=True)
class Expected:
    """A kind of difference that is on purpose: a pattern of names of tests, one of messages, and the reason."""

    test: str
    message: str
    reason: str


EXPECTED = (
    Expected(
        "", r"Save to a folder, in safetensors", "our pipelines refuse to save pickles (safe_serialization=False)"
    ),
    Expected(
        "",
        r"(AttributeError|ImportError|KeyError|ModuleNotFoundError|ValueError)\b[^\n]*Fisher\w*(Pipeline|Scheduler)",
        "a parser looks the class up by name inside diffusers, where ours is not",
    ),
    Expected(
        r"layerwise_casting",
        "",
        "our schedulers keep the samples of a run in float32, which layerwise casting does not",
    ),
)


# The plugin


_results: dict[str, str] = {}  # name of each test: "" if it passed, else what pytest reports


def our_classes() -> dict[str, type]:
    """Returns our classes by the names of diffusers' classes whose places they take."""
    import diffusers
    from diffusers import SchedulerMixin

    from diffusers_fisher import fisher_scheduler
    from diffusers_fisher.pipelines import PIPELINES

    classes: dict[str, type] = {name.replace("Fisher", ""): cls for name, cls in PIPELINES.items()}
    for name in dir(diffusers):
        cls = getattr(diffusers, name) if name.endswith("Scheduler") else None
        if isinstance(cls, type) and issubclass(cls, SchedulerMixin) and hasattr(cls, "step"):
            classes[name] = fisher_scheduler(cls)
    return classes


@contextlib.contextmanager
def classes_in_place() -> Iterator[None]:
    """Puts our classes into the namespace `diffusers`, from which the tests import, within the block."""
    import diffusers

    ours = our_classes()
    stock = {name: getattr(diffusers, name) for name in ours}
    vars(diffusers).update(ours)
    try:
        yield
    finally:
        vars(diffusers).update(stock)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    with classes_in_place() if os.environ.get(OURS) else contextlib.nullcontext():
        return (yield)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _results[report.nodeid] = report.longreprtext


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = report.nodeid.replace("Fisher", "")  # names of parametrised tests may have the class in them
    if report.outcome != "passed":
        _results[name] = report.longreprtext
    elif report.when == "call":
        _results.setdefault(name, "")


def pytest_sessionfinish() -> None:
    if RESULTS in os.environ:
        Path(os.environ[RESULTS]).write_text(json.dumps(_results), encoding="utf-8")


# The command


def run_suite(tests: list[Path], ours: bool) -> dict[str, str]:
    """Runs the tests in a process of their own, and returns what the plugin recorded."""
    root = tests[0] if tests[0].is_dir() else tests[0].parent
    while (root / "__init__.py").is_file():
        root = root.parent  # the checkout, from which its tests are run
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        environment = {**os.environ, "PYTHONPATH": paths, RESULTS: str(file), OURS: "1" if ours else ""}
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--continue-on-collection-errors"]
        command += ["-p", "peer_suites", "-p", "no:cacheprovider", *map(str, tests)]
        subprocess.run(command, env=environment, cwd=root, check=False, stdout=subprocess.DEVNULL)
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def differences(stock: dict[str, str], ours: dict[str, str]) -> list[Difference]:
    """Returns the tests that pass in the first run and do not pass, or are not there, in the second one."""
    missing = "\n".join(text for name, text in ours.items() if name not in stock) or "The test was not found."
    return [
        Difference(name, ours.get(name, missing))
        for name, message in stock.items()
        if not message and ours.get(name, missing)
    ]


def reason(difference: Difference) -> str | None:
    """Returns why a difference is expected; None if it is not."""
    matches = (
        kind.reason
        for kind in EXPECTED
        if re.search(kind.test, difference.test) and re.search(kind.message, difference.message)
    )
    return next(matches, None)


def main(arguments: list[str]) -> int:
    tests = [Path(argument).resolve() for argument in arguments]
    missing_paths = [str(path) for path in tests if not path.exists()]
    if missing_paths or not tests:
        print(f"There is nothing at {missing_paths}; " if missing_paths else "", end="")
        print("pass files or folders of a checkout's tests: make peer-suites TESTS=../diffusers/tests/schedulers")
        return 2
    stock, ours = (run_suite(tests, ours) for ours in (False, True))
    num_passed = sum(not message for message in stock.values())
    result = differences(stock, ours)
    unexpected = [difference for difference in result if reason(difference) is None]
    for difference in result:
        lines = [line for line in difference.message.splitlines() if line.startswith("E ")] or [difference.message]
        print(f"{difference.test}\n    {lines[0].removeprefix('E').strip()}")
        print(f"    {'expected: ' + str(reason(difference)) if difference not in unexpected else 'NOT EXPECTED'}")
    print(
        f"{num_passed} of {len(stock)} tests pass with diffusers' classes; {len(result)} of them do not pass "
        f"with ours, {len(result) - len(unexpected)} as expected"
    )
    return int(bool(unexpected) or num_passed == 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
