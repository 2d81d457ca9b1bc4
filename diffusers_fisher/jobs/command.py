"""Shares between commands what all of them do: errors in words, and the reading of configuration files."""

import argparse
import contextlib
import sys
from collections.abc import Iterator

from ..errors import FisherError


@contextlib.contextmanager
def errors_in_words() -> Iterator[None]:
    """Ends the process with status 1 and a message on an error of the package; other errors keep their traceback."""
    try:
        yield
    except FisherError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(1) from error


def config_parser(description: str | None) -> argparse.ArgumentParser:
    """Returns the parser of a module that `accelerate launch -m` runs, with the options `--config` and `--set`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file; see configs/")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings that replace the file's")
    return parser
