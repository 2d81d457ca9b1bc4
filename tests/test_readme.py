"""The documents' Python blocks run, in order, in one namespace; their figures are those of the benchmarks' JSON."""

import re
from pathlib import Path

import document_figures
import printed
import pytest

README = Path(__file__).parent.parent / "README.md"


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace, pairs = printed.run(README)
    assert len(pairs) >= 5
    check_printed(pairs)
    assert namespace["out"].bits_per_dim.shape == (4,)
    assert namespace["same"].bits_per_dim.equal(namespace["out"].bits_per_dim)
    assert float(namespace["best"].best_rewards[0]) > float(namespace["best"].rewards[0, 0])
    assert namespace["gradient"].shape == namespace["noise"].shape


def check_printed(pairs):
    """Compares the text blocks of a document with what its Python blocks printed."""
    for expected, got in pairs:
        assert expected is None or printed.agree(expected, got), f"the document has\n{expected}\nprinted is\n{got}"


@pytest.mark.parametrize("path", document_figures.DOCUMENTS, ids=lambda path: path.name)
def test_figures_come_from_the_benchmarks(path):
    text, makers = path.read_text(encoding="utf-8"), document_figures.DOCUMENTS[path]
    assert document_figures.fill(text, makers) == text
    other_text = re.sub(r"\| (\d)", "| 7", text)
    assert other_text != text
    assert document_figures.fill(other_text, makers) != other_text


@pytest.mark.parametrize("path", printed.documents()[1:], ids=lambda path: path.name)
def test_python_blocks_of_the_docs_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_printed(printed.run(path)[1])


@pytest.mark.parametrize(
    ("expected", "got", "do_agree"),
    [
        ("bits 0.42", "bits 0.4201", True),
        ("bits 0.42", "bits 0.52", False),
        ("bits 0.42 of 4", "nats 0.42 of 4", False),
        ("[1.0, 200]", "[1.001,  202]", True),
        ("-0.10", "0.10", False),
    ],
)
def test_printed_numbers_may_round_and_words_may_not(expected, got, do_agree):
    assert printed.agree(expected, got) is do_agree


@pytest.mark.parametrize("command", ["make demo", "make test"])
def test_the_two_commands_stand_at_the_top_behind_what_the_package_is(command):
    top = README.read_text(encoding="utf-8").partition("\n## ")[0]
    assert top.index("plugin for") < top.index(f"\n    {command} ")
    assert top.index("![") < top.index(command)
