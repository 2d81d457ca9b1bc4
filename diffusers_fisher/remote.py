"""Files at URLs such as s3://bucket/folder, by fsspec. Errors name what is missing: a library or credentials."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

from .errors import FisherError, InputError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_CUT_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:[/\\]")
"""What a URL becomes as a path: one of the two slashes is lost. Drives of Windows have one letter."""

CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run `aws configure`",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or run `gcloud auth application-default login`",
    "hf": "set HF_TOKEN, or run `hf auth login`",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
"""What gives access to the storage of a protocol."""
CREDENTIALS |= {"s3a": CREDENTIALS["s3"], "gcs": CREDENTIALS["gs"], "abfs": CREDENTIALS["az"]}


def is_url(path: object) -> bool:
    """Returns whether a path is a URL such as s3://bucket/folder."""
    return isinstance(path, str) and _URL.match(path) is not None


def refuse_url(folder: object) -> None:
    """Raises `InputError` if a folder of this machine is a URL, which would become a folder such as 's3:'."""
    text = str(folder)
    if _URL.match(text) or _CUT_URL.match(text):
        raise InputError(
            f"The folder '{text}' is a URL; allowed here: folders of this machine. `diffusers-fisher likelihood` and "
            "`merge` write to URLs."
        )


def open_filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    """Returns the file system of a URL, and the URL's path in it.

    Raises:
        InputError: no installed library reads such URLs, or there are no credentials for it.
    """
    import fsspec
    from fsspec.registry import known_implementations

    protocol = url.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = known_implementations[protocol]["class"].partition(".")[0]
        raise InputError(f"'{url}' needs the library `{package}`: pip install {package}.") from error
    except ValueError as error:
        if protocol in known_implementations:
            raise _failure(url, error) from error
        raise InputError(
            f"'{url}' begins with '{protocol}://', which no library reads; allowed: "
            f"{', '.join(f'{name}://' for name in CREDENTIALS)} and the others of fsspec."
        ) from error
    except Exception as error:  # clients of storage look for credentials at once, and have errors of their own
        raise _failure(url, error) from error


@contextlib.contextmanager
def remote_access(url: str) -> Iterator[None]:
    """Encloses what reads or writes files at a URL. Every error of its library becomes an `InputError`."""
    try:
        yield
    except FisherError:
        raise
    except Exception as error:  # clients of storage have errors of their own, which inherit nothing in common
        raise _failure(url, error) from error


@contextlib.contextmanager
def open_url(url: str) -> Iterator[BinaryIO]:
    """Opens a file at a URL for reading bytes. Raises `InputError` if it can't be read."""
    filesystem, path = open_filesystem(url)
    with remote_access(url), filesystem.open(path, "rb") as file:
        yield file


def list_url(url: str) -> list[str]:
    """Returns the names of all files of a folder at a URL, relative to it and sorted; an empty list without a folder.

    Raises:
        InputError: the folder can't be listed.
    """
    filesystem, root = open_filesystem(url)
    with remote_access(url):
        filesystem.invalidate_cache()
        try:
            filesystem.ls(root, detail=False)  # `find` alone would hide that the access is denied
        except FileNotFoundError:
            return []
        paths = filesystem.find(root)
    return sorted(path[len(root) :].lstrip("/") for path in paths if path != root)


def _failure(url: str, error: Exception) -> InputError:
    """Returns the error for a URL that can't be used: it does not exist, or there are no credentials for it."""
    protocol = url.partition("://")[0]
    advice = CREDENTIALS.get(protocol, "give its library the credentials that it asks for")
    words = f"{type(error).__name__}: {error}".rstrip(". \n")
    if isinstance(error, FileNotFoundError):
        return InputError(f"'{url}' does not exist ({words}). Check the URL; if it is not public, {advice}.")
    return InputError(f"'{url}' can't be used: {words}. If it needs credentials, {advice}.")
