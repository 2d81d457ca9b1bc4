"""The commands of docs/million_images.md run as they stand."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from diffusers_fisher.cli import app

from .test_dataset_likelihood import lines

PAGE = (Path(__file__).parents[2] / "docs" / "million_images.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_commands_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0], {})
    commands = [line for line in re.findall(r"^    diffusers-fisher (.*)$", PAGE, re.MULTILINE) if "$" not in line]
    commands = [line for line in commands if not line.endswith("\\")]
    assert len(commands) == 4
    for line in commands:
        result = CliRunner().invoke(app, shlex.split(line))
        assert result.exit_code == 0, result.output
    assert len(lines(tmp_path / "outputs" / "likelihood")) == 16
