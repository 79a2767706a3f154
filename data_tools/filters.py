"""Which samples a manifest keeps: conditions on the columns of the parquet files beside shards, and lists of keys."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pyarrow.parquet as parquet

from mmpt.data import storage
from mmpt.data.scan import KeyFilter

CONDITION = re.compile(r"\s*(\w+)\s*(<=|>=|==|!=|<|>)\s*(.+?)\s*")
Condition = tuple[str, str, float | str]


def parse_condition(text: str) -> Condition:
    """`similarity > 0.3` -> ("similarity", ">", 0.3); a value that is no number is a text. ValueError for any other."""
    match = CONDITION.fullmatch(text)
    if not match:
        raise ValueError(f"--where wants COLUMN < VALUE (or <=, >, >=, ==, !=), got {text!r}")
    column, comparison, value = match.groups()
    try:
        return column, comparison, float(value)
    except ValueError:
        return column, comparison, value.strip("'\"")


def key_filter(where: Sequence[str], exclude: Sequence[Path]) -> KeyFilter | None:
    """The samples that fulfil every condition and whose keys are in none of the lists; None when all are kept.

    exclude: text files with a key per line, or parquet files with a column `key`, such as quarantine.parquet.
    """
    if not where and not exclude:
        return None
    conditions = [parse_condition(text) for text in where]
    without = frozenset(key for path in exclude for key in read_keys(path))
    return KeyFilter(partial(keys_where, conditions), without)


def read_keys(path: Path) -> list[str]:
    """Raises ValueError when the file holds no keys."""
    if path.suffix == ".parquet":
        if "key" not in parquet.read_schema(path).names:
            raise ValueError(f"{path} has no column 'key'")
        keys = parquet.read_table(path, columns=["key"])["key"].to_pylist()
    else:
        keys = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not keys:
        raise ValueError(f"{path} lists no key")
    return keys


def keys_where(conditions: Sequence[Condition], folder: str, name: str) -> frozenset[str] | None:
    """Keys of the rows that fulfil every condition in the parquet file of a shard (00000.tar: 00000.parquet).

    None = all, when there is no condition. A value that is missing fulfils none. ValueError without the file or column.
    """
    if not conditions:
        return None
    place = storage.join(folder, f"{name.removesuffix('.tar')}.parquet")
    if not storage.exists(place):
        raise ValueError(f"{place} does not exist, and --where needs its columns")
    with storage.open_bytes(place) as file:
        table = parquet.ParquetFile(file)  # type: ignore[arg-type]
        columns = table.schema_arrow.names
        for column in ("key", *(condition[0] for condition in conditions)):
            if column not in columns:
                raise ValueError(f"{place} has no column {column!r}; it has {', '.join(columns)}")
    with storage.open_bytes(place) as file:
        try:
            rows = parquet.read_table(file, columns=["key"], filters=list(conditions))  # type: ignore[arg-type]
        except (TypeError, NotImplementedError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{place}: the conditions {list(conditions)} do not fit its columns ({reason})") from error
    return frozenset(map(str, rows["key"].to_pylist()))
