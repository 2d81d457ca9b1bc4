"""The structure of the package: what may import what, and how large its parts may be."""

from pathlib import Path

import house
import pytest

TREES = house.parse()
FILES = house.imports(TREES)

ROOMS = (
    "console", "errors", "examples", "arguments", "features", "figures", "remote", "files", "image_folders", "images",
    "outputs", "seeds", "settings", "noise", "denoiser", "distributions", "fisher", "models", "schedulers",
    "checkpoints", "data", "backbones", "likelihood", "curvature", "guidance", "pictures", "testing", "pipelines",
    "demo", "jobs", "studies", "training", "evaluation", "checks", "cli",
)  # fmt: skip
"""From the lowest to the highest: each imports those before it alone."""

SIBLINGS = {"training", "evaluation"}  # neither imports the other

MANY_PARAMETERS = {
    "diffusers_fisher.likelihood.pipeline:log_likelihood": "the public function",
    "diffusers_fisher.curvature.pipeline:likelihood_bound": "the public function",
    "diffusers_fisher.curvature.memorisation_pipeline:memorisation": "the public function",
    "diffusers_fisher.guidance.pipeline:guide": "the public function",
    "diffusers_fisher.cli:likelihood": "one parameter per option of the command line",
    "diffusers_fisher.cli:guide": "one parameter per option of the command line",
    "diffusers_fisher.models.trace_model:FisherTraceModel.__init__": "its parameters are the saved configuration",
}


def test_rooms_import_lower_rooms_alone():
    rooms = house.room_imports(FILES)
    assert set(rooms) == set(ROOMS) - {"__init__"}
    wrong_imports = {
        (room, other) for room, others in rooms.items() for other in others if ROOMS.index(other) > ROOMS.index(room)
    }
    assert not wrong_imports
    assert not any(rooms[room] & SIBLINGS for room in SIBLINGS)


def test_files_have_no_circle_of_imports():
    """Imports inside functions and for type checkers count too."""
    assert house.circles(FILES) == []


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": {"e"}}
    assert house.circles(graph) == [["a", "b", "c"], ["e"]]


def test_upward_imports_are_found(tmp_path):
    """Imports in functions and under TYPE_CHECKING, relative and absolute ones."""
    root = tmp_path / "diffusers_fisher"
    sources = {
        "low/one.py": "def function():\n    from ..high import two\n",
        "high/__init__.py": "",
        "high/two.py": "if TYPE_CHECKING:\n    from ..low.one import function\n",
        "three.py": "import diffusers_fisher.high.two\n",
        "low/__init__.py": "",
    }
    for name, source in sources.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source, encoding="utf-8")
    files = house.imports(house.parse(root), root)
    assert files["diffusers_fisher.low.one"] == {"diffusers_fisher.high.two"}
    assert house.room_imports(files) == {"low": {"high"}, "high": {"low"}, "three": {"high"}}
    assert house.circles(files) == [["diffusers_fisher.high.two", "diffusers_fisher.low.one"]]


@pytest.mark.parametrize("file", TREES, ids=lambda file: str(file.relative_to(house.ROOT)))
def test_files_and_functions_are_short(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 450
    lengths = {name: house.body_length(function) for name, function in house.functions(TREES[file])}
    assert not {name: length for name, length in lengths.items() if length >= 60}


def test_functions_take_at_most_ten_parameters():
    counts = {
        f"{house.module_name(file)}:{name}": house.parameter_count(function)
        for file, tree in TREES.items()
        for name, function in house.functions(tree)
    }
    assert {name for name, count in counts.items() if count > 10} == set(MANY_PARAMETERS)


def test_annotations_are_types():
    annotations = [annotation for tree in TREES.values() for annotation in house.annotations(tree)]
    assert sum(map(house.has_any, annotations)) < 0.02 * len(annotations)


def test_only_the_catalogue_of_estimators_asks_what_an_estimator_is():
    """What estimators differ in is in the attributes of their base class."""
    probes = ("isinstance(estimator,", "hasattr(estimator,", "getattr(estimator,")
    asking = {
        str(Path(file).relative_to(house.ROOT))
        for file in TREES
        if any(probe in file.read_text(encoding="utf-8") for probe in probes)
    }
    assert asking == {"fisher/estimator.py"}
