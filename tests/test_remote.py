"""URLs: what can't be read is named with what is missing, and a URL never becomes a folder of this machine."""

import importlib.util
from pathlib import Path

import fsspec
import pytest
from fsspec import AbstractFileSystem
from typer.testing import CliRunner

from diffusers_fisher import InputError
from diffusers_fisher.cli import app
from diffusers_fisher.files import check_writable
from diffusers_fisher.remote import is_url, list_url, open_filesystem, open_url


class LockedStorage(AbstractFileSystem):
    """A storage that asks for credentials at the first access."""

    protocol = "locked"

    def ls(self, path, detail=True, **kwargs):
        raise PermissionError("Access Denied.")

    info = ls


@pytest.fixture
def locked():
    fsspec.register_implementation("locked", LockedStorage, clobber=True)


def test_what_is_a_url():
    assert all(map(is_url, ("s3://bucket/folder", "memory://images", "hf://datasets/a/b")))
    assert not any(map(is_url, ("/data/s3", "C:/data", "C:\\data", "user/name", Path("s3://a"), None)))


@pytest.mark.skipif(importlib.util.find_spec("s3fs") is not None, reason="s3fs is installed")
def test_a_missing_library_is_named_with_its_install_line():
    with pytest.raises(InputError, match=r"'s3://bucket/images' needs the library `s3fs`: pip install s3fs\."):
        open_filesystem("s3://bucket/images")


def test_unknown_protocols_and_missing_files_are_refused():
    with pytest.raises(
        InputError, match=r"'abc://images' begins with 'abc://', which no library reads; allowed: s3://"
    ):
        open_filesystem("abc://images")
    words = r"'memory://absent/a\.png' does not exist .*Check the URL; if it is not public, give its library"
    with pytest.raises(InputError, match=words), open_url("memory://absent/a.png"):
        pass
    assert list_url("memory://absent") == []


def test_missing_credentials_are_said(locked):
    words = r"'locked://images' can't be used: PermissionError: Access Denied\. If it needs credentials, give its lib"
    with pytest.raises(InputError, match=words):
        list_url("locked://images")


@pytest.mark.parametrize("folder", ["s3://bucket/run", Path("s3://bucket/run"), Path("memory://run")])
def test_folders_of_this_machine_are_no_urls(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"is a URL; allowed here: folders of this machine\. `diffusers-fisher likel"):
        check_writable(folder)
    assert not list(tmp_path.iterdir())


def test_commands_that_write_to_this_machine_alone_refuse_urls(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a photo of a bag\n")
    for arguments in (["demo"], ["transport"], ["guide", "--prompts", "prompts.txt"]):
        result = CliRunner().invoke(app, [*arguments, "--output", "s3://bucket/run"])
        assert result.exit_code == 1 and "is a URL; allowed here" in result.stderr, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]
