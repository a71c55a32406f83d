"""Read rows of parquet files as records, by row group, so that no whole file is in memory.

The columns are those of a JSONL record, in any format of `data/formats.py`; rows may differ in
format. Other columns are read only if a reward function is to see them. In Arrow, each struct of a
column has the fields of all structs of that column. Fields that are null are therefore dropped, at
any depth.

Reading a row decodes its whole row group, unless the previous row was in the same group. So files
of many GiB are best written with row groups of some thousand rows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

from gptoss_jax.data import formats
from gptoss_jax.errors import UserError

_AT_ONCE = 256  # rows turned into Python objects together


@dataclass(frozen=True)
class Layout:
    """What we keep of a file: its footer, the columns to read, and where its row groups end."""

    metadata: Any  # pyarrow.parquet.FileMetaData
    columns: tuple[str, ...]
    left_out: tuple[str, ...]  # columns that nothing reads
    ends: tuple[int, ...]  # the number of rows up to the end of each row group

    @property
    def num_bytes(self) -> int:
        """Bytes of the columns to read, after decompression."""
        total = 0
        for g in range(len(self.ends)):
            group = self.metadata.row_group(g)
            for c in range(group.num_columns):
                column = group.column(c)
                if column.path_in_schema.split(".")[0] in self.columns:
                    total += column.total_uncompressed_size
        return total

    def group(self, row: int) -> int:
        """Return the row group of a row of the file."""
        return bisect_right(self.ends, row)


def read_layout(file: BinaryIO, path: Path, reading: Any, *, whole: bool = False) -> Layout:
    """Read the footer of a file and choose its columns: all if `whole`, else those of a format.

    Raises `UserError` if it is not a parquet file, or if its columns do not make a record.
    """
    with _naming(path):
        from pyarrow.parquet import ParquetFile

        opened = ParquetFile(file)
        metadata, names = opened.metadata, list(map(str, opened.schema_arrow.names))
    readers = formats.PAIRS if reading.pairs else formats.READERS
    if not any(set(reader.needs) <= set(names) for reader in readers):
        what = "; or ".join(" and ".join(reader.needs) for reader in readers)
        raise UserError(
            f"{path}: its columns are {', '.join(names[:12]) or 'none'}; a record has {what}"
        )
    wanted = {*formats.COLUMNS, *([formats.DATE] if reading.dated else [])}
    columns = tuple(name for name in names if whole or name in wanted)
    left_out = [name for name in names if name not in columns and name not in reading.ignore]
    groups = (metadata.row_group(g).num_rows for g in range(metadata.num_row_groups))
    return Layout(metadata, columns, tuple(left_out), tuple(accumulate(groups)))


def read_rows(
    file: BinaryIO, layout: Layout, path: Path, *, groups: Sequence[int]
) -> Iterator[dict[str, Any] | ValueError]:
    """Yield the rows of some row groups; one whose text is not UTF-8 is yielded as `ValueError`."""
    with _naming(path):
        from pyarrow.parquet import ParquetFile

        opened = ParquetFile(file, metadata=layout.metadata)
        batches = opened.iter_batches(
            _AT_ONCE, row_groups=list(groups), columns=list(layout.columns)
        )
    while True:
        with _naming(path):
            batch = next(batches, None)
        if batch is None:
            return
        try:
            yield from map(drop_nulls, batch.to_pylist())
        except UnicodeDecodeError:
            for i in range(batch.num_rows):
                try:
                    row = read_row(batch, i)
                except ValueError as error:
                    row = error
                yield row


def read_group(file: BinaryIO, layout: Layout, path: Path, *, group: int) -> Any:
    """Return a row group as a `pyarrow.Table`. Raises `UserError` if it can't be decoded."""
    with _naming(path):
        from pyarrow.parquet import ParquetFile

        opened = ParquetFile(file, metadata=layout.metadata)
        return opened.read_row_group(group, columns=list(layout.columns))


def read_row(table: Any, i: int) -> dict[str, Any]:
    """Return row `i` of a table or a batch. Raises `ValueError` for text that is not UTF-8."""
    try:
        return drop_nulls(table.slice(i, 1).to_pylist()[0])
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None


def drop_nulls(value: Any) -> Any:
    """Drop the fields that are null, at any depth."""
    if isinstance(value, dict):
        return {name: drop_nulls(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [drop_nulls(item) for item in value]
    return value


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn Arrow's errors into a `UserError` that names the file."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: no parquet file that can be read ({why})") from None
