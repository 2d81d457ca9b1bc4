"""Files are whole or absent, and files that can't be read raise an error."""

import json
import os
import stat

import pytest
import torch
from safetensors import safe_open

from diffusers_fisher import CheckpointError, InputError
from diffusers_fisher.files import (
    atomic_path,
    check_safetensors,
    check_writable,
    load_tensors,
    read_json,
    save_tensors,
    write_json,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_atomic_path_replaces_the_file_when_the_block_succeeds(tmp_path):
    target = tmp_path / "result.json"
    target.write_text("old")
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"  # until the block ends
        assert (temporary.parent, temporary.suffix) == (tmp_path, ".json")
    assert target.read_text() == "new"
    assert names(tmp_path) == ["result.json"]


@pytest.mark.parametrize("with_old_file", [True, False], ids=["existed", "new"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_path_leaves_nothing_half_written_when_the_block_raises(tmp_path, with_old_file, error):
    target = tmp_path / "result.json"
    if with_old_file:
        target.write_text("old")
    with pytest.raises(error), atomic_path(str(target)) as temporary:
        temporary.write_text("half")
        raise error
    assert names(tmp_path) == (["result.json"] if with_old_file else [])
    assert not with_old_file or target.read_text() == "old"


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX's")
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_written_files_have_the_modes_of_ordinary_ones(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_json(tmp_path / "report.json", {})
        (tmp_path / "ordinary").write_text("")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("report.json", "ordinary")}
    assert modes == {0o666 & ~umask}


def test_json_keeps_its_content(tmp_path):
    content = {"loss": [0.5, 1e-9], "name": "é", "none": None}
    write_json(tmp_path / "report.json", content)
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    assert json.loads(text) == content
    assert text.endswith("}\n")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_json_raises_an_error_and_the_old_file_stays(tmp_path, value):
    write_json(tmp_path / "report.json", {"loss": 1.0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "report.json", {"loss": [value]})
    assert json.loads((tmp_path / "report.json").read_text()) == {"loss": 1.0}
    assert names(tmp_path) == ["report.json"]


TENSORS = {
    "float": torch.arange(6.0).view(2, 3),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "steps": torch.tensor(7),
    "transposed": torch.arange(6.0).view(2, 3).mT,
    "channels last": torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last),
    "with a graph": torch.ones(2, requires_grad=True) * 2,
    "empty": torch.empty(0, 3),
}


def test_tensors_and_metadata_keep_their_content(tmp_path):
    path = tmp_path / "state.safetensors"
    save_tensors(path, TENSORS, {"step": "3"})
    tensors, metadata = load_tensors(path)
    check_safetensors(path)
    assert metadata == {"step": "3"}
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype is TENSORS[name].dtype
        assert torch.equal(tensor, TENSORS[name].detach())
    with safe_open(path, framework="pt") as file:  # the reader of safetensors itself
        assert set(file.keys()) == TENSORS.keys()


def test_tensors_that_can_not_be_written_leave_the_old_file(tmp_path):
    path = tmp_path / "state.safetensors"
    save_tensors(path, {"a": torch.ones(2)}, {})
    with pytest.raises(TypeError):
        save_tensors(path, {"a": torch.zeros(2)}, {"step": 3})  # metadata are strings
    assert torch.equal(load_tensors(path)[0]["a"], torch.ones(2))
    assert names(tmp_path) == ["state.safetensors"]


DAMAGES = {
    "truncated": lambda content: content[:-5],
    "header only": lambda content: content[:40],
    "empty": lambda content: b"",
    "text": lambda content: b"version https://git-lfs.github.com/spec/v1\n",
}


@pytest.mark.parametrize("load", [load_tensors, check_safetensors], ids=["load_tensors", "check_safetensors"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_a_checkpoint_error_with_its_name_and_size(tmp_path, load, damage):
    path = tmp_path / "state.safetensors"
    save_tensors(path, TENSORS, {})
    content = DAMAGES[damage](path.read_bytes())
    path.write_bytes(content)
    message = rf"'.*state.safetensors' \({len(content)} bytes\) can't be read as safetensors: .* It may be truncated"
    with pytest.raises(CheckpointError, match=message):
        load(path)


def test_missing_file_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"'.*nothing.safetensors' does not exist"):
        load_tensors(tmp_path / "nothing.safetensors")
    with pytest.raises(CheckpointError, match=r"'.*nothing.safetensors' \(missing\) can't be read"):
        check_safetensors(tmp_path / "nothing.safetensors")


def test_folder_in_place_of_a_file_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_tensors(tmp_path)


def test_json_that_cannot_be_read_is_a_checkpoint_error(tmp_path):
    path = tmp_path / "config.json"
    write_json(path, {"steps": [1, 2]})
    assert read_json(path) == {"steps": [1, 2]}
    for content in (path.read_bytes()[:-3], b"", b"\xff\xfe{}"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"'.*config.json' is not valid JSON: .* It may be truncated"):
            read_json(path)
    with pytest.raises(CheckpointError, match=r"nothing.json' is not valid JSON: .*No such file"):
        read_json(tmp_path / "nothing.json")


def test_a_writable_folder_is_made_and_stays_empty(tmp_path):
    folder = tmp_path / "some" / "where"
    check_writable(folder)
    assert list(folder.iterdir()) == []
    (folder / "file").write_text("")
    check_writable(folder)
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_an_unwritable_folder_raises_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=rf"The folder '{folder}' can't be written: .* Name another folder"):
            check_writable(folder)
