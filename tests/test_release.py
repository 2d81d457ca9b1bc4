"""What a release needs: workflows that call real targets, links that work on PyPI, a source distribution of
everything, and examples for users without a copy of the repository."""

import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from diffusers_fisher import InputError, examples
from diffusers_fisher.cli import app

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def load_links():
    spec = importlib.util.spec_from_file_location("absolute_links", ROOT / ".ci" / "absolute_links.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def steps(workflow):
    content = yaml.safe_load(workflow.read_text(encoding="utf-8"))
    return [step for job in content["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_call_targets_and_files_that_exist(workflow):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    commands = [step["run"] for step in steps(workflow) if "run" in step]
    assert commands
    for command in commands:
        if command.startswith("make "):
            assert {word for word in command.split()[1:] if "=" not in word} <= targets, command
        for path in re.findall(r"(?:tests|\.ci)/\w+\.py", command):
            assert (ROOT / path).is_file(), path


def test_the_versions_of_python_are_those_of_the_classifiers():
    content = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    tested = content["jobs"]["tests"]["strategy"]["matrix"]["python"]
    prefix = "Programming Language :: Python :: 3."
    assert tested == [entry.rpartition(" ")[2] for entry in PROJECT["classifiers"] if entry.startswith(prefix)]
    assert PROJECT["requires-python"] == f">={tested[0]}"


def test_authors_are_those_of_the_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert PROJECT["authors"] == citation["authors"]


def test_links_become_absolute_for_a_release():
    links, address = load_links(), "https://example.org/owner/name"
    text = "[a](docs/a.md#b) ![c](docs/c.png) [d](https://d.org) [e](#f)"
    assert links.absolute(text, address) == (
        f"[a]({address}/blob/main/docs/a.md#b) ![c]({address}/raw/main/docs/c.png) [d](https://d.org) [e](#f)"
    )
    project = links.with_addresses((ROOT / "pyproject.toml").read_text(encoding="utf-8"), address)
    assert tomllib.loads(project)["project"]["urls"]["Repository"] == address
    for target in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target


def test_examples_are_copied_once(tmp_path):
    result = CliRunner().invoke(app, ["examples", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    names = result.output.split()
    assert {"configs/trace_embedded.yaml", "examples/fashion_mnist.py"} <= set(names)
    for name in names:
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes()
    with pytest.raises(InputError, match=r"exists already. Give --output another folder"):
        examples.copy_examples(tmp_path)


def test_an_installation_without_examples_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(examples, "_installed_files", dict)
    monkeypatch.setattr(examples, "__file__", str(tmp_path / "diffusers_fisher" / "examples.py"))
    with pytest.raises(InputError, match=r"has no examples\. Install the package from its wheel"):
        examples.example_files()


@pytest.mark.slow
def test_the_source_distribution_has_all_that_builds_and_tests_it(tmp_path):
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns(
        ".git", ".venv*", "site", "outputs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache"
    )
    shutil.copytree(ROOT, source, ignore=ignore)
    code = "from setuptools import build_meta; print(build_meta.build_sdist('..'))"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True, timeout=300)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    files = {
        str(path.relative_to(source)) for folder in ("tests", "docs", "examples", "configs", "diffusers_fisher")
        for path in (source / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }  # fmt: skip
    files |= {"CHANGELOG.md", "CITATION.cff", "NOTICE", "LICENSE", "Makefile", "constraints.txt", "mkdocs.yml"}
    assert files - names == set()
