"""Writes a repository's address into README.md and pyproject.toml, for a release: links must work on PyPI, too.

python .ci/absolute_links.py https://github.com/OWNER/NAME
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(!?)\[([^]]*)\]\((?!\w+:|#)([^)\s]+)\)")


def absolute(text: str, address: str) -> str:
    """Returns Markdown whose relative links and pictures lead to the repository at `address`."""
    return LINK.sub(lambda match: f"{match[1]}[{match[2]}]({address}/{_kind(match)}/main/{match[3]})", text)


def _kind(match: re.Match) -> str:
    return "raw" if match[1] else "blob"


def with_addresses(text: str, address: str) -> str:
    """Returns pyproject.toml's text with the repository's addresses among the project's."""
    lines = f'Repository = "{address}"\nIssues = "{address}/issues"\nChangelog = "{address}/blob/main/CHANGELOG.md"\n'
    before, heading, after = text.partition("[project.urls]\n")
    if not heading:
        raise SystemExit("pyproject.toml has no table [project.urls]")
    return before + heading + lines + after


def main() -> None:
    address = sys.argv[1].rstrip("/")
    for name, change in (("README.md", absolute), ("pyproject.toml", with_addresses)):
        path = ROOT / name
        path.write_text(change(path.read_text(encoding="utf-8"), address), encoding="utf-8")


if __name__ == "__main__":
    main()
