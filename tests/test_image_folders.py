"""The names of files decide which images a folder has: no name is a pattern, and splits share no image."""

import os
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from diffusers_fisher import InputError
from diffusers_fisher.cli import app
from diffusers_fisher.data import ImageData, open_images

BYTE_NAMES = pytest.mark.skipif(sys.platform != "linux", reason="only Linux takes every byte in a name")


def make_folder(root, tree):
    """Writes files: None is an image, a text is the content, a path is what a link leads to."""
    for name, content in tree.items():
        path = Path(root, os.fsdecode(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            with open(path, "wb") as file:
                Image.new("RGB", (8, 8), "red").save(file, "PNG")
        elif isinstance(content, Path):
            path.symlink_to(Path(root, content).resolve())
        else:
            path.write_text(content, encoding="utf-8", newline="")
    return str(root)


def read_images(folder, text_captions=True, **options):
    """Returns names and captions of all images, which can be decoded, and the names of the other files."""
    images = open_images(ImageData(folder, **options), text_captions=text_captions)
    rows = list(enumerate(images.undecoded()))
    assert all(images.example(row, position).pixels.shape == (3, 8, 8) for position, row in rows)
    return {images.row_name(row, position): images.row_caption(row) for position, row in rows}, images.files_left_out


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["run[1]", "a*b", "what?", "{a,b}", "x::y", "zip:", "two words", "é 日本 🧥", "**"])
def test_no_folder_is_a_pattern(tmp_path, name, streaming):
    for other in ("run1", "aXb", "whatX", "a", "**x"):
        make_folder(tmp_path / other, {"other.png": None})
    folder = make_folder(tmp_path / name, {"mine.png": None, "sub[2]/mine*.png": None})
    assert list(read_images(folder, streaming=streaming)[0]) == ["mine.png", "sub[2]/mine*.png"]


@pytest.mark.parametrize("name", ["dat*", "dat[a]", "????"])
def test_a_pattern_names_nothing(tmp_path, monkeypatch, name):
    make_folder(tmp_path / "data", {"a.png": None})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"can't be opened: .* reads the characters \* \? \[ \] as a pattern; rename"):
        open_images(ImageData(name))


@BYTE_NAMES
@pytest.mark.parametrize("streaming", [False, True])
def test_names_that_are_not_utf_8(tmp_path, streaming):
    tree = {b"a\xff.png": None, b"b\xe9/c.png": None, b"no\xfe.txt": "x", "d.png": None, "back\\slash\n.png": None}
    names, left_out = read_images(make_folder(tmp_path, tree), streaming=streaming)
    assert list(names) == ["a\\xff.png", "back\\slash\n.png", "b\\xe9/c.png", "d.png"]
    assert left_out == ["no\\xfe.txt"]


@BYTE_NAMES
def test_a_run_over_names_that_are_not_utf_8_writes_its_report(tmp_path):
    folder = make_folder(tmp_path / os.fsdecode(b"d\xff"), {b"a\xff.png": None, b"no\xfe.txt": "x"})
    arguments = ["--data", folder, "--output", str(tmp_path / "out"), "--num-inference-steps", "2"]
    result = CliRunner().invoke(app, ["likelihood", *arguments, "--resolution", "32"])
    assert result.exit_code == 0, result.output
    assert "a\\xff.png" in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("place", ["link", "link/../link", "other/../real"])
def test_links_and_relative_paths_to_the_folder(tmp_path, monkeypatch, place):
    make_folder(tmp_path / "real", {"a.png": None, "sub/b.png": None, "README.txt": "x"})
    (tmp_path / "link").symlink_to(tmp_path / "real")
    make_folder(tmp_path / "other", {"x.png": None})
    monkeypatch.chdir(tmp_path / "other")
    assert read_images(f"../{place}") == ({"a.png": None, "sub/b.png": None}, ["README.txt"])


def test_linked_subfolders_are_followed_and_each_file_is_read_once(tmp_path):
    make_folder(tmp_path / "pool", {"p.png": None, "up.txt": Path("..")})
    tree = {
        "a/1.png": None, "b": Path("a"), "c/loop": Path("."), "c/pool": Path("../pool"), "dead.png": Path("nothing"),
        "one.png": Path("a/1.png"), ".hidden": Path("../pool"),
    }  # fmt: skip
    names, left_out = read_images(make_folder(tmp_path / "data", tree))
    assert list(names) == ["a/1.png", "c/pool/p.png", "one.png"]
    assert {"b", "c/loop", "dead.png"} <= set(left_out)


def test_a_pipe_is_left_out(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert read_images(make_folder(tmp_path, {"a.png": None})) == ({"a.png": None}, ["pipe.png"])


SPLITS = {"train/a.png": None, "test/b.png": None, "cover.png": None, "notes/c.png": None}


@pytest.mark.parametrize(
    ("tree", "split", "names", "left_out"),
    [
        (SPLITS, "test", ["test/b.png"], ["cover.png", "notes/c.png"]),
        (SPLITS, "train", ["train/a.png"], ["cover.png", "notes/c.png"]),
        ({"test/b.png": None, "a.png": None}, "train", ["a.png"], []),
        ({"test/b.png": None, "a.png": None}, "test", ["test/b.png"], []),
        ({"x/train2017/a.png": None, "x/val-2017/b.png": None}, "validation", ["x/val-2017/b.png"], []),
        ({"val/a.png": None, "train/b.png": None}, "val", ["val/a.png"], []),
        ({"mine/a.png": None, "train/b.png": None}, "mine", ["mine/a.png"], []),
        ({"bus/a.png": None, "train/b.png": None, "c.png": None}, "train", ["bus/a.png", "c.png", "train/b.png"], []),
        ({"test-a.png": None, "train-b.png": None}, "train", ["test-a.png", "train-b.png"], []),
        ({"test/train/a.png": None, "train/test/b.png": None}, "test", ["test/train/a.png"], []),
    ],
)
def test_a_split_has_its_own_images(tmp_path, tree, split, names, left_out):
    result = read_images(make_folder(tmp_path, tree), split=split)
    assert (list(result[0]), result[1]) == (names, left_out)


def test_metadata_above_the_splits_are_divided(tmp_path):
    lines = '{"file_name": "train/a.png", "text": "x"}\n{"file_name": "test/b.png", "text": "y"}\n'
    folder = make_folder(tmp_path, {"train/a.png": None, "test/b.png": None, "metadata.jsonl": lines})
    assert read_images(folder, split="test", caption_column="text") == ({"test/b.png": "y"}, [])


@pytest.mark.parametrize("tree", [{"a.png": None}, {"train-a.png": None, "test-b.png": None}, {"train/a.png": None}])
def test_a_split_that_is_not_there_is_refused(tmp_path, tree):
    folder = make_folder(tmp_path, tree)
    with pytest.raises(InputError, match=r"The split is 'test', but '.*' has only: train\. A folder whose subfolders"):
        open_images(ImageData(folder, split="test"))


def test_tables_with_a_cover_picture_are_tables(tmp_path):
    import datasets

    folder = make_folder(tmp_path, {"cover.png": None})
    rows = datasets.Dataset.from_dict({"image": [folder + "/cover.png"] * 3}).cast_column("image", datasets.Image())
    rows.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    assert len(open_images(ImageData(folder))) == 3


CSV = "metadata.csv"
JSONL = "metadata.jsonl"


@pytest.mark.parametrize(
    ("file", "text", "captions", "labels"),
    [
        (CSV, "file_name,text\na.png,007\nb.png,1.50\n", ["007", "1.50"], [7, "1.50"]),
        (CSV, "\ufefffile_name,text\r\na.png,NA\r\nb.png,\r\n", ["NA", None], ["NA", None]),
        (CSV, 'file_name,text\na.png,"one, ""two""\nthree"\nb.png,2\n', ['one, "two"\nthree', "2"], None),
        (JSONL, '\ufeff{"file_name": "a.png", "text": "2020-01-01"}\r\n{"file_name": "b.png", "text": 7}\r\n',
         ["2020-01-01", "7"], ["2020-01-01", 7]),
        (JSONL, '{"file_name": "a.png", "text": 1.50}\n\n{"file_name": "b.png"}\n', ["1.50", None], None),
        (JSONL, '{"file_name": "a.png", "text": 3}\n{"file_name": "b.png", "text": 4}\n', [3, 4], [3, 4]),
        (JSONL, '{"file_name": "a.png", "text": "x\u2028y\u0085z"}\n{"file_name": "b.png", "text": "$\\\\_{"}\n',
         ["x\u2028y\u0085z", "$\\_{"], None),
    ],
)  # fmt: skip
def test_captions_stay_as_they_were_written(tmp_path, file, text, captions, labels):
    folder = make_folder(tmp_path, {"a.png": None, "b.png": None, file: text})
    for streaming in (False, True):
        result, _ = read_images(folder, caption_column="text", streaming=streaming)
        assert result == dict(zip(["a.png", "b.png"], captions, strict=True))
    if labels is not None:
        assert list(read_images(folder, text_captions=False, caption_column="text")[0].values()) == labels


@pytest.mark.parametrize(("text_captions", "captions"), [(True, ["10", "9"]), (False, [0, 1])])
def test_subfolders_are_labels(tmp_path, text_captions, captions):
    folder = make_folder(tmp_path, {"10/a.png": None, "9/b.png": None})
    labels, _ = read_images(folder, text_captions, caption_column="label")
    assert labels == dict(zip(["10/a.png", "9/b.png"], captions, strict=True))


def test_names_in_the_metadata(tmp_path):
    lines = '{"file_name": "s\\\\a.png", "map_file_name": "s/../b.png"}\n'
    folder = make_folder(tmp_path, {"d/s/a.png": None, "d/b.png": None, "d/metadata.jsonl": lines})
    assert read_images(folder) == ({"d/s/a.png": None}, ["d/b.png"])
    assert read_images(folder, image_column="map") == ({"d/b.png": None}, ["d/s/a.png"])


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        (JSONL, '{"file_name": "../a.png"}', r"row 1 names '\.\./a\.png', which is outside of its folder"),
        (JSONL, '{"file_name": "s/../../a.png"}', "which is outside of its folder"),
        (JSONL, '{"file_name": "..\\\\a.png"}', "which is outside of its folder"),
        (CSV, "file_name\n/etc/passwd\n", "row 1 names '/etc/passwd', which is outside"),
        (JSONL, '{"file_name": "a.png"}\n{"file_name": null}', "row 2 has no `file_name`"),
        (JSONL, '{"file_name": "a.png", ', r"metadata\.jsonl' can't be read: .* Allowed: CSV, JSON lines or Parquet"),
        (JSONL, '["a.png"]', r"metadata\.jsonl' can't be read"),
        ("metadata.parquet", "no parquet", r"metadata\.parquet' can't be read"),
        (CSV, "name,text\na.png,x\n", "Column 'image' of .* holds no images; its columns: name, text"),
        (JSONL, '{"file_name": "a.png", "text": ["x"]}', r"The caption of 'a\.png' in .* is \['x'\]; allowed: a text"),
        (JSONL, '{"file_name": "a.png", "text": true}', "is True; allowed: a text, a whole number or nothing"),
        (JSONL, '{"file_name": "a.png", "text": "\\ud800"}', "can't be kept: .* Write them in UTF-8"),
    ],
)
def test_metadata_that_can_not_be_used_are_refused(tmp_path, file, text, words):
    folder = make_folder(tmp_path, {"a.png": None, file: text})
    with pytest.raises(InputError, match=words):
        open_images(ImageData(folder, caption_column="text"))
