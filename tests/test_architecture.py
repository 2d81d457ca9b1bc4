"""docs/architecture.md against the code: every path and function that it names exists, and rooms import as it says."""

import ast
import re
import sys
from pathlib import Path

import house
import pytest
import tiny
import torch

import diffusers_fisher

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
TREES = house.parse()
MEASURED = house.room_imports(house.imports(TREES))
ROOM = re.compile(r"^\| `(\w+)(?:/|\.py)` \| [^|]+ \| ([\w, ]+) \|$", re.MULTILINE)
STEP = re.compile(r"^\| `([\w/]+\.py)` \| `([\w.]+)` \|", re.MULTILINE)
PATH = re.compile(r"`([\w/]+(?:/|\.\w+))`")


def allowed_imports():
    """Rooms of the table in its order, each with what it may import."""
    return {room: set() if names == "nothing" else set(names.split(", ")) for room, names in ROOM.findall(TEXT)}


def functions_of(file):
    """Functions and methods (Class.method) of a file of the package."""
    return {name for name, _ in house.functions(TREES[house.ROOT / file])}


def test_every_room_of_the_package_is_in_the_table():
    assert sorted(allowed_imports()) == sorted(MEASURED)
    assert len(MEASURED) >= 20


@pytest.mark.parametrize("room", allowed_imports())
def test_rooms_import_only_what_the_table_allows(room):
    allowed = allowed_imports()
    earlier_rooms = list(allowed)[: list(allowed).index(room)]
    assert MEASURED[room] <= allowed[room] | {"errors", "arguments"}, (
        f"name the new imports of {room} in docs/architecture.md"
    )
    assert allowed[room] <= set(earlier_rooms)
    assert allowed[room] <= MEASURED[room], f"docs/architecture.md names rooms that {room} does not import"


def test_every_path_exists():
    paths = [path for path in PATH.findall(TEXT) if path.endswith(("/", ".py", ".pyi", ".md"))]
    assert len(paths) > 40
    for path in paths:
        assert (ROOT / path).exists() or (house.ROOT / path).exists(), path
    for link in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (ROOT / "docs" / link).exists(), link


def test_every_function_is_where_the_page_says():
    steps = STEP.findall(TEXT)
    assert len(steps) > 10
    for file, name in steps:
        assert name in functions_of(file), f"{file}: {name}"


def test_every_class_and_method_in_the_text_exists():
    """Names such as `Backbone.pack` or `PipelineDenoiser`, wherever they are written."""
    classes = {
        node.name: {entry.name for entry in node.body if isinstance(entry, ast.FunctionDef)}
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    names = set(re.findall(r"\b([A-Z][a-z]+[A-Z]\w+|Trajectory|Backbone|Denoiser)(?:\.(\w+))?\b", TEXT))
    assert len(names) > 15
    for name, method in names:
        assert name in classes, name
        assert not method or method in classes[name], f"{name}.{method}"


def test_a_likelihood_runs_through_the_five_files():
    (table,) = re.findall(r"## A likelihood in five files\n(.*?)\n## ", TEXT, re.DOTALL)
    files = re.findall(r"^\| `([\w/]+\.py)`", table, re.MULTILINE)
    called = set()

    def note(frame, event, argument):
        called.add(frame.f_code.co_filename)

    pipe, latents = tiny.one_channel(), torch.zeros(1, 1, 4, 4)
    sys.setprofile(note)
    try:
        diffusers_fisher.log_likelihood(pipe, latents=latents, num_inference_steps=20)
    finally:
        sys.setprofile(None)
    assert len(files) == 5
    assert {str(house.ROOT / file) for file in files} <= called
