"""The documents' Python blocks run, in order, in one namespace; their figures are those of the benchmarks' JSON."""

import re
from pathlib import Path

import document_figures
import pytest

README = Path(__file__).parent.parent / "README.md"


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 5
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["out"].bits_per_dim.shape == (4,)
    assert namespace["same"].bits_per_dim.equal(namespace["out"].bits_per_dim)
    assert float(namespace["best"].best_rewards[0]) > float(namespace["best"].rewards[0, 0])
    assert namespace["gradient"].shape == namespace["noise"].shape


@pytest.mark.parametrize("path", document_figures.DOCUMENTS, ids=lambda path: path.name)
def test_figures_come_from_the_benchmarks(path):
    text, makers = path.read_text(encoding="utf-8"), document_figures.DOCUMENTS[path]
    assert document_figures.fill(text, makers) == text
    other_text = re.sub(r"\| (\d)", "| 7", text)
    assert other_text != text
    assert document_figures.fill(other_text, makers) != other_text


@pytest.mark.parametrize("path", sorted((README.parent / "docs").glob("*.md")), ids=lambda path: path.name)
def test_python_blocks_of_the_docs_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for block in re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, path.name, "exec"), namespace)


@pytest.mark.parametrize("command", ["make demo", "make test"])
def test_the_two_commands_stand_at_the_top(command):
    assert command in "\n".join(README.read_text(encoding="utf-8").splitlines()[:5])
