"""The documentation's site: every public name is in its reference, and every page in its navigation."""

import re
from collections import Counter
from pathlib import Path

import printed
import pytest
import yaml

import diffusers_fisher

DOCS = Path(__file__).parents[1] / "docs"
REFERENCE = {path.name: path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.md")}
DIRECTIVES = [re.findall(r"^::: diffusers_fisher\.(\w+)$", text, re.MULTILINE) for text in REFERENCE.values()]


def test_every_public_name_is_in_the_reference_once():
    counts = Counter(name for names in DIRECTIVES for name in names)
    assert {name for name, count in counts.items() if count > 1} == set()
    assert set(counts) == set(diffusers_fisher.__all__)


@pytest.mark.parametrize("page", REFERENCE)
def test_every_name_of_a_reference_page_is_in_an_example_of_it(page):
    text = REFERENCE[page]
    examples = "\n".join(re.findall(r"```py(?:thon)?\n(.*?)```", text, re.DOTALL))
    for name in re.findall(r"^::: diffusers_fisher\.(\w+)$", text, re.MULTILINE):
        assert re.search(rf"\b{name}\b", examples), name


def pages_of(entries):
    """Returns the pages of a part of the navigation."""
    for entry in entries:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            yield from pages_of(value) if isinstance(value, list) else [value]


def test_every_page_is_in_the_navigation():
    text = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    pages = set(pages_of(yaml.safe_load(text)["nav"]))
    root_pages = {"contributing.md", "changelog.md", "security.md"}  # made by docs/build_hooks.py
    assert pages - root_pages == {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}


@pytest.mark.parametrize("path", printed.documents(), ids=lambda path: path.name)
def test_figures_lie_under_docs(path):
    for target in re.findall(r"!\[[^]]*\]\((?!http)([^)]+)\)", path.read_text(encoding="utf-8")):
        file = (path.parent / target).resolve()
        assert file.is_file() and file.is_relative_to(DOCS), target
