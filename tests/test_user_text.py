"""Words of users in pictures, reports, records and on consoles: none is a formula, a line end or an error."""

import codecs
import io
import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image

from diffusers_fisher import InputError, NoiseLevel, figures, trace_plot
from diffusers_fisher.console import say, tolerant_console
from diffusers_fisher.evaluation import guidance_gallery_report
from diffusers_fisher.evaluation.guidance_gallery import read_prompts
from diffusers_fisher.figures import write_plain
from diffusers_fisher.files import json_line, write_text
from diffusers_fisher.fisher.estimate import Estimate
from diffusers_fisher.jobs.pages import Page, save_picture

TEXTS = {
    "dollars": "$$ luxury coat $$",
    "one formula": "a $x^2$ b",
    "half a formula": r"\frac{ $ _ ^",
    "braces": "{} {0} {{x}} %s %",
    "underscore": "_hidden",
    "markup": "<b>bold</b> [red]x[/red] &amp;",
    "right to left": "\u05e9\u05dc\u05d5\u05dd a \u0645\u0631\u062d\u0628\u0627",
    "emoji": "a coat \U0001f9e5\u200d\u2764\ufe0f",
    "Japanese": "\u65e5\u672c\u8a9e\u306e\u8a00\u8449" * 20,
    "controls": "a\x00b\x07c\ufeffd",
    "line ends": "a\nb\u2028c\x85d\x0ce",
    "no Unicode": "file\udcff.png",
}


@pytest.fixture(params=TEXTS)
def text(request):
    return TEXTS[request.param]


def draw(figure):
    """Draws a figure; warnings, such as that of a glyph that no font has, are errors."""
    with warnings.catch_warnings(action="error"):
        figure.savefig(io.BytesIO(), format="png")


def test_a_figure_shows_the_words_and_no_formula():
    figure = Figure(figsize=(12, 12), layout="constrained")
    for axes, text in zip(figure.subplots(3, 4).flat, TEXTS.values(), strict=True):
        for place in (axes.set_title(""), axes.set_ylabel("")):
            write_plain(place, text[:30])
            assert not place.get_parse_math()
    draw(figure)


def test_letters_that_a_font_has_stay_as_they_are():
    place = Figure().text(0, 0, "")
    write_plain(place, "$a$ _b\n\u00e9 \u03c3")
    assert place.get_text() == "$a$ _b \u00e9 \u03c3"


def test_letters_that_no_font_has_become_escapes_or_other_words(monkeypatch):
    monkeypatch.setattr(figures, "_system_fonts", dict)
    place = Figure().text(0, 0, "")
    write_plain(place, "a \u65e5\u672c \U0010fffd\ufeff")
    assert place.get_text() == r"a \u65e5\u672c \U0010fffd\ufeff"
    write_plain(place, "a \u65e5", otherwise="prompt 00003")
    assert place.get_text() == "prompt 00003"


def test_a_font_of_the_system_draws_letters_that_the_figures_font_lacks(monkeypatch):
    """A font of symbols is the figure's here, and the font of all other figures stands for the system's."""
    monkeypatch.setattr(figures, "_system_fonts", lambda: {"DejaVu Sans": font_manager.findfont("DejaVu Sans")})
    place = Figure().text(0, 0, "", fontfamily=["STIXSizeFiveSym"])
    write_plain(place, "\u042f \u65e5")
    assert place.get_text() == "\u042f \\u65e5" and place.get_fontfamily() == ["STIXSizeFiveSym", "DejaVu Sans"]
    draw(place.figure)


def test_names_of_estimators_are_legends_as_they_are():
    levels = [NoiseLevel(torch.tensor([1.0]), torch.tensor([s])) for s in (0.1, 1.0)]
    estimate = Estimate(torch.ones(2), torch.zeros(2), torch.ones(4, 2), 4, 4)
    names = ["_hidden", "$$", "a $x$", "{b}"]
    figure = trace_plot(levels, {name: [estimate] * 2 for name in names})
    assert [each.get_text() for each in figure.axes[0].get_legend().get_texts()] == names
    draw(figure)


def test_the_gallery_shows_any_prompt(tmp_path):
    """The page has the whole prompts, the picture what can be drawn of them."""
    (tmp_path / "pictures").mkdir()
    records = []
    for index, text in enumerate(TEXTS.values()):
        record = {"prompt": text, "rewards": [0.0, 1.0], "best_run": 1, "held_out": [], "seconds": [1.0, 1.0]}
        record |= {"shell_distances": [0.0, 0.0], "whiteness": [0.5, 0.5], "flagged": [], "status": "completed"}
        for name in ("before", "after"):
            record[name] = f"pictures/{index:05d}_{name}.png"
            save_picture(torch.zeros(3, 8, 8), tmp_path / record[name])
        records.append(record)
    settings = {"checkpoint": "$$", "reward": "python:_a:$b$", "estimator": "one-step"}
    settings |= {"num_guidance_steps": 1, "step_size": 0.2, "optimizer": None}
    with warnings.catch_warnings(action="error"):
        guidance_gallery_report.write_gallery(tmp_path, records, settings)
    page = (tmp_path / "index.html").read_bytes().decode()
    for text in TEXTS.values():
        page_text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        assert f"<p>{page_text}</p>".encode("utf-8", "backslashreplace").decode() in page
    with Image.open(tmp_path / "gallery.png") as picture:
        assert picture.height > 1000


def test_a_prompt_that_can_not_be_drawn_is_named_by_its_number(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "_system_fonts", dict)
    for name in ("00007_before.png", "00007_after.png"):
        save_picture(torch.zeros(3, 8, 8), tmp_path / name)
    names = {"before": "00007_before.png", "after": "00007_after.png"}
    for prompt, label in ((TEXTS["Japanese"], "prompt 00007"), ("$a$ " + "x" * 40, "$a$ " + "x" * 24)):
        figure = guidance_gallery_report.gallery(tmp_path, [{"prompt": prompt, "rewards": [0.0], **names}])
        assert figure.axes[0].get_ylabel() == label


def test_a_page_has_every_text_as_it_is(tmp_path, text):
    page = Page(text)
    page.paragraph(text)
    page.table([text], [[text]])
    page.pictures([(torch.zeros(3, 2, 2), text)])
    page.write(tmp_path / "index.html")
    content = (tmp_path / "index.html").read_bytes().decode()
    assert "<b>" not in content
    if "&" not in text:
        assert text.encode("utf-8", "backslashreplace").decode() in content


def test_a_line_of_json_is_one_line_for_every_reader(tmp_path, text):
    line = json_line({"caption": text})
    assert len(line.splitlines()) == 1 and json.loads(line) == {"caption": text}
    write_text(tmp_path / "lines.jsonl", line)
    assert json.loads((tmp_path / "lines.jsonl").read_bytes()) == {"caption": text}


TWO = ["a photo of a coat", "\u65e5\u672c"]
FILES = {
    "Unix": "\n".join(TWO).encode(),
    "Windows": "\r\n".join([*TWO, "", ""]).encode(),
    "old Mac": "\r".join(TWO).encode(),
    "Notepad": codecs.BOM_UTF8 + "\r\n".join(TWO).encode(),
    "PowerShell": codecs.BOM_UTF16_LE + "\r\n".join(TWO).encode("utf-16-le"),
    "big endian": codecs.BOM_UTF16_BE + "\n".join(TWO).encode("utf-16-be"),
    "empty lines": "\n \n\t\n".join(TWO).encode() + b"\n\n",
}


@pytest.mark.parametrize("name", FILES)
def test_prompts_are_read_as_editors_write_them(tmp_path, name):
    (tmp_path / "prompts.txt").write_bytes(FILES[name])
    assert read_prompts(tmp_path / "prompts.txt") == TWO


@pytest.mark.parametrize("letter", "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029")
def test_prompts_end_at_line_ends_alone(tmp_path, letter):
    (tmp_path / "prompts.txt").write_bytes(f"a{letter}b\nc".encode())
    assert read_prompts(tmp_path / "prompts.txt") == [f"a{letter}b", "c"]


@pytest.mark.parametrize("content", [b"caf\xe9", codecs.BOM_UTF16_LE + b"a"], ids=["cp1252", "half of UTF-16"])
def test_prompts_in_other_encodings_are_refused(tmp_path, content):
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(InputError, match=r"prompts.txt' can't be read: .*Give a text file in UTF-8, one prompt per"):
        read_prompts(tmp_path / "prompts.txt")


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_any_console_shows_any_text(encoding, text, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict", newline="")
    monkeypatch.setattr(sys, "stdout", stream)
    say(text)
    with tolerant_console():
        print(text)
    assert stream.errors == "strict"
    stream.flush()
    expected = f"{text}\n{text}\n".encode(encoding, "backslashreplace")
    assert stream.buffer.getvalue() == expected


def test_a_program_without_a_console_says_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    say("a")
    with tolerant_console():
        pass


@pytest.mark.slow
def test_a_command_ends_well_on_a_console_of_windows(tmp_path):
    """The error names a file that cp1252 can't spell."""
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252:strict", "PYTHONUTF8": "0"}
    arguments = ["guide", "--prompts", "\u65e5\u672c.txt"]
    run = subprocess.run(
        [sys.executable, "-m", "diffusers_fisher.cli", *arguments], capture_output=True, env=environment, cwd=tmp_path
    )
    message = run.stderr.decode("cp1252")
    assert run.returncode == 1 and r"Error: The prompts '\u65e5\u672c.txt' can't be read" in message
    assert "Traceback" not in message
