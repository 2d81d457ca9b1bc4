"""Shows errors as messages and parses the options of configuration files, for all commands."""

import argparse
import contextlib
import errno
import sys
from collections.abc import Iterator

from ..console import tolerant_console
from ..errors import FisherError

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""The disk or the quota is full, the file is too large, or the file system can only be read."""


@contextlib.contextmanager
def errors_in_words() -> Iterator[None]:
    """Ends the process with status 1 and a message on an error of the package or a full disk. Other errors keep their
    traceback."""
    with tolerant_console():
        try:
            yield
        except FisherError as error:
            print(f"Error: {error}", file=sys.stderr)
            raise SystemExit(1) from error
        except OSError as error:  # of other libraries, which write caches and temporary files
            if error.errno not in DISK_ERRORS:
                raise
            print(
                f"Error: {error}. Make room there and run the same command again; what was written is kept.",
                file=sys.stderr,
            )
            raise SystemExit(1) from error


def config_parser(description: str | None) -> argparse.ArgumentParser:
    """Returns the parser of a module that `accelerate launch -m` runs, with the options `--config` and `--set`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file; see configs/")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings that replace the file's")
    return parser
