"""Likelihoods of data at URLs, into URLs: images, Parquet files and webdatasets, whose keys the records keep."""

import io
import json
import tarfile
import time

import datasets
import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from image_folders import CAPTIONS, image_folder, saved_pipeline
from typer.testing import CliRunner

from diffusers_fisher import InputError
from diffusers_fisher.cli import app
from diffusers_fisher.data import FILE_ROWS, ImageData, ImageStream, open_images
from diffusers_fisher.evaluation.dataset_likelihood import evaluate_dataset
from diffusers_fisher.evaluation.likelihood_shards import merge_likelihoods
from diffusers_fisher.jobs.folder_lock import LOCK, lock_owner
from diffusers_fisher.jobs.shards import Shard, share_of_files

from .test_dataset_likelihood import command, lines, settings_of

COUNT = 6
CORRUPT = (1,)
FILES = (1, 3, 2)  # rows of the Parquet files and of the webdatasets


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny pipeline, 6 images, one of them truncated, in a folder and at three URLs; a run over the folder."""
    folder, memory = tmp_path_factory.mktemp("remote"), fsspec.filesystem("memory")
    saved_pipeline(folder / "pipeline")
    image_folder(folder / "images", COUNT, corrupt=CORRUPT)
    contents = [(folder / "images" / f"train-{number}.png").read_bytes() for number in range(COUNT)]
    memory.put(f"{folder / 'images'}/", "/images/", recursive=True)
    numbers = iter(range(COUNT))
    for file, rows in enumerate([next(numbers) for _ in range(rows)] for rows in FILES):
        table = {"image": [contents[number] for number in rows], "id": [f"id-{number}" for number in rows]}
        table["text"] = [CAPTIONS[number % len(CAPTIONS)] for number in rows]
        with memory.open(f"/parquet/part-{file}.parquet", "wb") as target:
            pyarrow.parquet.write_table(pyarrow.table(table), target, row_group_size=2)
        with memory.open(f"/tars/train/{file}.tar", "wb") as target, tarfile.open(fileobj=target, mode="w") as tar:
            for number in rows:
                for ending, content in (("png", contents[number]), ("txt", table["text"][number - rows[0]].encode())):
                    entry = tarfile.TarInfo(f"sample-{number}.{ending}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    evaluate_dataset(folder / "whole", settings_of(folder), batch_size=1)
    yield folder
    memory.store.clear()


def remote_lines(url):
    return [json.loads(line) for line in fsspec.filesystem("memory").cat_file(f"{url}/likelihoods.jsonl").splitlines()]


def numbers_of(rows):
    """Returns what the lines of the same images have in common, whatever their data are."""
    return [(row["position"], row.get("caption"), row.get("bits_per_dim"), "error" in row) for row in rows]


def test_images_at_a_url_are_evaluated_into_a_url(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = command(place, "memory://runs/one", "--batch-size", "1", "--records", "parquet")[2:]
    arguments[arguments.index("--data") + 1] = "memory://images"
    for number in (COUNT, 0):  # the second run finds the records of the first one
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        summary = json.loads(fsspec.filesystem("memory").cat_file("/runs/one/summary.json"))
        assert summary["last_run"]["images"] == number
    assert numbers_of(remote_lines("/runs/one")) == numbers_of(lines(place / "whole"))
    assert [row["name"] for row in remote_lines("/runs/one")] == [row["name"] for row in lines(place / "whole")]
    error = remote_lines("/runs/one")[1]["error"]
    assert "Image 'train-1.png' of 'memory://images' can't be read" in error
    assert not list(tmp_path.iterdir()) and not fsspec.filesystem("memory").exists(f"/runs/one/{LOCK}")
    with fsspec.open("memory://runs/one/likelihoods.parquet") as file:
        table = pyarrow.parquet.read_table(file).to_pylist()
    for row, line in zip(table, remote_lines("/runs/one"), strict=True):
        assert {name: row[name] for name in line if name != "transparent"} == line
        assert row["transparent"] is False


def test_a_folder_at_a_url_belongs_to_one_run(place):
    memory, settings = fsspec.filesystem("memory"), settings_of(place)
    for owner in (lock_owner(), {**lock_owner(), "machine": "another", "alive": time.time()}):
        memory.pipe_file(f"/runs/two/{LOCK}", json.dumps(owner).encode())
        with pytest.raises(InputError, match=r"'memory://runs/two' belongs to a run that has not ended: process "):
            evaluate_dataset("memory://runs/two", settings)
    memory.pipe_file(f"/runs/two/{LOCK}", json.dumps({**owner, "alive": time.time() - 10_000}).encode())
    memory.pipe_file("/runs/two/records/000000000.json", b"{}")
    memory.pipe_file("/runs/two/settings.json", b'{"seed": 1}')
    with pytest.raises(InputError, match=r"'memory://runs/two' holds records of other settings: "):
        evaluate_dataset("memory://runs/two", settings)
    with pytest.raises(InputError, match="The output 'memory://images/run' lies in the folder of the data"):
        evaluate_dataset("memory://images/run", settings_of(place, data={"path": "memory://images"}))


STREAMS = {
    "parquet": {"path": "memory://parquet"},
    "webdataset": {"path": "memory://tars", "image_column": "png", "caption_column": "txt"},
}
KEYS = {
    "parquet": [f"part-{place}" for place in ("0.parquet/0/0", "1.parquet/0/0", "1.parquet/0/1", "1.parquet/1/0")]
    + ["part-2.parquet/0/0", "part-2.parquet/0/1"],
    "webdataset": [f"sample-{number}" for number in range(COUNT)],
}


@pytest.mark.parametrize("kind", STREAMS)
def test_shards_of_a_stream_read_their_own_files_once(place, tmp_path, monkeypatch, kind):
    opened = []
    rows_of = ImageStream.file_rows

    def note(images, file, start=0):
        opened.append((file, start))
        return rows_of(images, file, start)

    monkeypatch.setattr(ImageStream, "file_rows", note)
    settings = settings_of(place, data={**STREAMS[kind], "streaming": True})
    folders = [f"memory://runs/{kind}-{index}" for index in range(2)]
    for index, folder in enumerate(folders):
        evaluate_dataset(folder, settings, 1, shard=Shard(index, 2))
    assert opened == [(0, 0), (2, 0), (1, 0)]
    opened.clear()
    evaluate_dataset(folders[0], settings, 1, shard=Shard(0, 2))
    assert opened == []  # the files have been read to their ends
    merge_likelihoods(tmp_path / "merged", folders, parquet=True)
    assert numbers_of(lines(tmp_path / "merged")) == numbers_of(lines(place / "whole"))
    assert [row["key"] for row in lines(tmp_path / "merged")] == KEYS[kind]
    with pytest.raises(InputError, match=r"No folder has shard 1 of 2\. Name the folders of all shards"):
        merge_likelihoods(tmp_path / "other", folders[:1])
    assert evaluate_dataset(tmp_path / "merged", settings)["last_run"]["images"] == 0


def test_a_stream_goes_on_after_the_last_record_of_a_file(place, tmp_path, monkeypatch):
    settings = settings_of(place, data={**STREAMS["parquet"], "streaming": True, "key_column": "id"})
    evaluate_dataset(tmp_path / "run", settings, 1)
    assert [row["key"] for row in lines(tmp_path / "run")] == [f"id-{number}" for number in range(COUNT)]
    before = (tmp_path / "run" / "likelihoods.jsonl").read_bytes()
    files = sorted((tmp_path / "run" / "records").iterdir())
    lost = {"records": 0}
    for file in files:
        content = json.loads(file.read_text())
        kept = [row for row in content["records"] if row["position"] not in (FILE_ROWS + 1, FILE_ROWS + 2)]
        lost["records"] += len(content["records"]) - len(kept)
        file.write_text(json.dumps({**content, "records": kept}))
    assert lost["records"] == 2
    opened = []
    rows_of = ImageStream.file_rows
    monkeypatch.setattr(
        ImageStream, "file_rows", lambda images, *place: opened.append(place) or rows_of(images, *place)
    )
    monkeypatch.setattr("diffusers_fisher.evaluation.dataset_likelihood.images_digest", lambda images: digest)
    digest = json.loads((tmp_path / "run" / "settings.json").read_text())["images"]
    assert evaluate_dataset(tmp_path / "run", settings, 1)["last_run"]["images"] == 2
    assert opened[0] == (1, 1)
    after = [json.loads(line) for line in before.splitlines()]
    assert numbers_of(lines(tmp_path / "run")) == numbers_of(after)


def test_files_of_a_local_folder_have_keys_too(place, tmp_path):
    fsspec.filesystem("memory").get("/parquet/", f"{tmp_path / 'parquet'}/", recursive=True)
    for streaming in (False, True):
        images = open_images(ImageData(str(tmp_path / "parquet"), streaming=streaming))
        keys = [images.row_key(row, position) for position, row in enumerate(images.undecoded())]
        assert keys == KEYS["parquet"]
    datasets.Dataset.from_dict({"image": [b"a"], "id": [7]}).save_to_disk(tmp_path / "saved")
    images = open_images(ImageData(str(tmp_path / "saved")))
    assert images.row_key(images.rows[0], 0) is None
    assert open_images(ImageData(str(tmp_path / "saved"), key_column="id")).row_key(images.rows[0], 0) == 7


def test_keys_of_an_image_folder_are_in_its_metadata(place):
    images = open_images(ImageData("memory://images", caption_column="text", key_column="label"))
    assert [images.row_key(images.rows[position], position) for position in range(3)] == [0, 1, 2]
    with pytest.raises(InputError, match=r"has no columns \{'key_column': 'id'\}; it has: image, text, label"):
        open_images(ImageData("memory://images", key_column="id"))


def test_data_at_a_url_that_can_not_be_opened_are_refused(place):
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/mixed/a.tar", b"")
    memory.pipe_file("/mixed/b.parquet", b"")
    memory.pipe_file("/damaged/train/b.parquet", b"no parquet")
    for path, words in {
        "memory://absent": "The data 'memory://absent' can't be opened: it has none of them, or does not exist",
        "memory://mixed": r"can't be opened: it has \.parquet and \.tar\. Allowed at a URL: a folder of images",
        "memory://damaged": "The data 'memory://damaged' .* can't be opened",
    }.items():
        with pytest.raises(InputError, match=words):
            open_images(ImageData(path))
    with pytest.raises(InputError, match="The split is 'test', but 'memory://damaged' has only: train"):
        open_images(ImageData("memory://damaged", split="test"))


def test_workers_share_files_or_else_rows():
    everything = Shard(0, 1)
    assert share_of_files(1, Shard(1, 3), Shard(1, 2)) == (range(1), Shard(4, 6))
    assert share_of_files(6, everything, Shard(1, 2)) == (range(1, 6, 2), everything)
    assert share_of_files(6, Shard(1, 2), Shard(1, 2)) == (range(3, 6, 4), everything)
    assert share_of_files(3, Shard(1, 2), Shard(1, 2)) == (range(1, 3, 2), Shard(1, 2))
    for num_files, shards, processes in ((1, 2, 3), (5, 2, 2), (4, 3, 2), (7, 7, 1), (2, 3, 2)):
        seen = [
            (file, row)
            for shard in range(shards)
            for process in range(processes)
            for files, rows in [share_of_files(num_files, Shard(shard, shards), Shard(process, processes))]
            for file in files
            for row in rows.positions(13)
        ]
        assert sorted(seen) == [(file, row) for file in range(num_files) for row in range(13)]
