"""Rows of the parquet files in which the Hugging Face hub keeps data sets. Needs pyarrow (the ``data`` extra)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from sav_jax.errors import UserError
from sav_jax.eval.tasks.rows import Row
from sav_jax.examples import EncodedImage


def parquet_objects(pattern: Path) -> Iterator[Row]:
    """The rows of all files that match a pattern, in the order of their names; pictures are read when needed.

    Raises:
      UserError: if pyarrow is not installed or a file cannot be read.
    """
    number = 0
    for path in sorted(pattern.parent.glob(pattern.name)):
        content = _opened(path)
        schema = content.schema_arrow
        pictures = [name for name in schema.names if _holds_pictures(schema.field(name).type)]
        others = [name for name in schema.names if name not in pictures]
        here = 0
        for group in range(content.num_row_groups):
            table = content.read_row_group(group, columns=others)
            absent = {name: _absent(path, group, name) for name in pictures}
            for place, values in enumerate(table.to_pylist()):
                for name in pictures:
                    values[name] = None if absent[name][place] else _picture(path, group, name, place)
                yield Row(f"{path}: row {here}", number, values)
                number, here = number + 1, here + 1


def _holds_pictures(kind: Any) -> bool:
    """The hub stores a picture as a struct of its file's bytes and its name."""
    import pyarrow as pa

    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0


def _opened(path: Path) -> Any:
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f'{path}: reading parquet files needs pyarrow: pip install "sav-jax[data]"') from None
    try:
        return pq.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is no parquet file that can be read: {' '.join(str(error).split())}") from None


@lru_cache(maxsize=4)
def _column(path: Path, group: int, name: str) -> Any:
    """A column of a row group: a hundred rows or so, of which neighbours are asked for soon after each other."""
    return _opened(path).read_row_group(group, columns=[name]).column(name)


def _absent(path: Path, group: int, name: str) -> list[bool]:
    column = _column(path, group, name)
    return column.is_null().to_pylist()


def _picture(path: Path, group: int, name: str, place: int) -> EncodedImage:
    return EncodedImage(lambda: _column(path, group, name)[place].as_py()["bytes"])
