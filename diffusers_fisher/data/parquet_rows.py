"""Names the rows of Parquet files by file, row group and row."""

import bisect
import itertools
import os
from collections.abc import Sequence

from ..remote import is_url, open_url, remote_access


class ParquetRows:
    """The rows of Parquet files one after the other. The ends of files, which say how long they are, are read lazily.

    Args:
        files: paths or URLs, in the order of the data.
    """

    def __init__(self, files: Sequence[str]):
        self.files = files
        self._ends: list[list[int]] = []  # by file, the numbers of rows up to the end of each row group

    def key(self, file: int, row: int) -> str:
        """Returns the name "FILE/ROW_GROUP/ROW" of a row.

        Args:
            file: number of the file; 0 may stand for all files, whose rows are counted on.
            row: number of the row.

        Raises:
            InputError: a file at a URL can't be read.
        """
        while row >= self._file_ends(file)[-1] and file + 1 < len(self.files):
            row, file = row - self._file_ends(file)[-1], file + 1
        ends = self._file_ends(file)
        group = bisect.bisect_right(ends, row) - 1
        return f"{os.path.basename(self.files[file])}/{group}/{row - ends[group]}"

    def _file_ends(self, file: int) -> list[int]:
        from pyarrow import parquet

        while len(self._ends) <= file:
            path = self.files[len(self._ends)]
            if is_url(path):
                with open_url(path) as content, remote_access(path):
                    metadata = parquet.read_metadata(content)
            else:
                metadata = parquet.read_metadata(path)
            counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            self._ends.append([*itertools.accumulate(counts, initial=0)])
        return self._ends[file]
