"""The README's Python blocks run, in order, in one namespace; its figures are those of the benchmarks' JSON."""

import re
from pathlib import Path

import pytest
import readme_figures

README = Path(__file__).parent.parent / "README.md"


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 5
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["out"].bits_per_dim.shape == (4,)
    assert float(namespace["best"].best_rewards[0]) > float(namespace["best"].rewards[0, 0])
    assert namespace["gradient"].shape == namespace["noise"].shape


def test_figures_come_from_the_benchmarks():
    text = README.read_text(encoding="utf-8")
    assert readme_figures.filled(text) == text
    doctored = re.sub(r"takes \d", "takes 9", text)
    assert readme_figures.filled(doctored) == text


@pytest.mark.parametrize("command", ["make demo", "make test"])
def test_the_two_commands_stand_at_the_top(command):
    assert command in "\n".join(README.read_text(encoding="utf-8").splitlines()[:5])
