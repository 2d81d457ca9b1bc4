"""Prints constraints with the lowest versions that pyproject.toml allows: `python tests/lowest.py`.

torch keeps the version of constraints.txt: its lower bound has no CPU build for every Python.
"""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def lowest_versions() -> dict[str, str]:
    """Returns the lower bound of every dependency that has one, by name; torch's is the constrained version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    versions = {}
    for requirement in map(Requirement, [*project["dependencies"], *extras]):
        bounds = [each.version for each in requirement.specifier if each.operator == ">="]
        if bounds:
            versions[requirement.name] = bounds[0]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return versions | {"torch": next(line.partition("==")[2] for line in lines if line.startswith("torch=="))}


if __name__ == "__main__":
    print("\n".join(f"{name}=={version}" for name, version in lowest_versions().items()))
