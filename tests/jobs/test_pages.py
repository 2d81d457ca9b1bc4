"""The page of a report is one file with all its text and pictures, and every text is escaped."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from diffusers_fisher.jobs.pages import Page, save_picture


class Reader(HTMLParser):
    """Collects texts by tag and sources of images, and checks that every open tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.sources, self.classes = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.sources.append(dict(attributes)["src"])
        elif tag != "meta":
            self.open.append(tag)
            self.classes.append((tag, dict(attributes).get("class")))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.open[-1], data))


def picture(source):
    return Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"))))


def test_page_holds_its_texts_tables_and_pictures(tmp_path):
    from matplotlib.figure import Figure

    image = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(0))
    save_picture(image.flip(0), tmp_path / "flipped.png")
    page = Page("Results <1> & more")
    page.heading("Part")
    page.paragraph("a < b & c")
    page.table(["name", "value"], [["x<y", 0.123456], ["none", None], ["count", 7], ["yes", True]])
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([0, 1], [0, 1])
    page.figure(figure, "a curve")
    page.pictures([(image, 'the "image"'), (tmp_path / "flipped.png", "flipped")])
    page.write(tmp_path / "report.html")
    reader = Reader((tmp_path / "report.html").read_text(encoding="utf-8"))
    expected_texts = [
        ("title", "Results <1> & more"), ("h1", "Results <1> & more"), ("h2", "Part"), ("p", "a < b & c"),
        ("td", "x<y"), ("td", "0.1235"), ("td", "-"), ("td", "7"), ("td", "True"), ("figcaption", "a curve"),
        ("figcaption", 'the "image"'), ("figcaption", "flipped"),
    ]  # fmt: skip
    assert [entry for entry in reader.texts if entry in expected_texts] == expected_texts
    assert reader.classes.count(("td", "number")) == 2
    assert picture(reader.sources[0]).size == (240, 120)
    bytes_of = (image * 255).round().byte()
    for source, expected in zip(reader.sources[1:], (bytes_of, bytes_of.flip(0)), strict=True):
        pixels = torch.frombuffer(bytearray(picture(source).tobytes()), dtype=torch.uint8).view(4, 6, 3)
        assert torch.equal(pixels.permute(2, 0, 1), expected)


def test_page_loads_no_other_file():
    page = Page("t")
    page.pictures([(torch.zeros(3, 2, 2), "c")])
    assert not re.search(r"https?:|<script|<link|src=\"(?!data:)", page.text())


@pytest.mark.parametrize("value", [2.0, -1.0])
def test_pictures_out_of_range_are_clamped(tmp_path, value):
    save_picture(torch.full((3, 2, 2), value), tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").getpixel((0, 0)) == ((255,) * 3 if value > 1 else (0,) * 3)
