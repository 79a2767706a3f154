"""What `mmpt-data pack` reads: images in a folder or a tar, and a table of captions."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as parquet

from mmpt.data.tar import ShardError, read_members

TABLE_SUFFIXES = (".tsv", ".csv", ".jsonl", ".parquet")


class ImageSource(Protocol):
    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        ...

    def read(self, name: str) -> bytes | None:
        """The bytes of the image of this name, or None when there is none."""
        ...


class FolderImages:
    """Images below a folder, named by their path relative to it."""

    def __init__(self, folder: Path):
        self._folder = folder.resolve()

    def has(self, name: str) -> bool:
        return self._path(name) is not None

    def read(self, name: str) -> bytes | None:
        path = self._path(name)
        return None if path is None else path.read_bytes()

    def _path(self, name: str) -> Path | None:
        path = (self._folder / name).resolve()
        return path if path.is_relative_to(self._folder) and path.is_file() else None


class TarImages:
    """Images in a tar archive, named by their path in it. Raises ShardError when the archive is damaged."""

    def __init__(self, path: Path):
        self._path = path
        self._places: dict[str, tuple[int, int]] = {}
        with path.open("rb") as file:
            for member in read_members(file, str(path), 0, path.stat().st_size, to_end=True):
                if member.is_file():
                    self._places[member.path.removeprefix("./")] = member.data_start, member.size
                elif member.kind != b"5":  # folders are harmless
                    reason = f"{member.path!r} is neither a file nor a folder (type {member.kind!r})"
                    raise ShardError(str(path), member.header_start, reason, "make the archive again with plain files")

    def has(self, name: str) -> bool:
        return name in self._places

    def read(self, name: str) -> bytes | None:
        if name not in self._places:
            return None
        start, size = self._places[name]
        with self._path.open("rb") as file:
            file.seek(start)
            return file.read(size)


def open_images(path: Path) -> ImageSource:
    """A folder or a .tar file. Raises ValueError for anything else."""
    if path.is_dir():
        return FolderImages(path)
    if path.is_file() and path.suffix == ".tar":
        return TarImages(path)
    raise ValueError(f"{path} is neither a folder of images nor a .tar file")


def find(images: ImageSource, *names: str) -> str:
    """The first of these names that is there; where none is, the first."""
    return next((name for name in names if images.has(name)), names[0])


@dataclass(frozen=True)
class Pair:
    """An image with all its captions, and what else is known of it.

    captions: None for a sample that has none by its nature, such as a question about an image.
    row: fields for its .json file; from a table, the first row that names the image.
    right: name of the second image of a pair of images.
    """

    image: str
    captions: tuple[str, ...] | None
    row: dict
    right: str = ""


def read_pairs(table: Path, image_column: str, caption_columns: list[str], separator: str | None) -> list[Pair]:
    """The rows of a table, in order, those of one image merged into one pair at the place of the first.

    separator: splits one cell into several captions. Each caption is stripped and its runs of white space become one
    space; empty ones are left out. Raises ValueError when a column is missing, a row malformed, or there is no row.
    """
    captions: dict[str, list[str]] = {}
    first_rows: dict[str, dict] = {}
    for number, row in enumerate(_rows(table), start=1):
        for column in (image_column, *caption_columns):
            if column not in row:
                raise ValueError(f"{table}: row {number} has no column {column!r}; it has {', '.join(map(repr, row))}")
        name = str(row[image_column])
        first_rows.setdefault(name, row)
        found = captions.setdefault(name, [])
        found += [text for column in caption_columns for text in texts(row[column], separator) if text not in found]
    if not captions:
        raise ValueError(f"{table} has no rows")
    return [Pair(name, tuple(captions[name]), row) for name, row in first_rows.items()]


def texts(cell: object, separator: str | None = None) -> list[str]:
    """The texts in a cell or list of cells, runs of white space made one space, empty ones left out."""
    cells = cell if isinstance(cell, list) else [] if cell is None else [cell]
    parts = [part for text in cells for part in (str(text).split(separator) if separator else [str(text)])]
    return [" ".join(part.split()) for part in parts if part.strip()]


def _rows(table: Path) -> Iterator[dict]:
    if table.suffix not in TABLE_SUFFIXES:
        raise ValueError(f"{table}: a table of captions ends in {', '.join(TABLE_SUFFIXES)}")
    if table.suffix == ".parquet":
        yield from _parquet_rows(table)
    elif table.suffix == ".jsonl":
        yield from _json_rows(table)
    else:
        yield from _delimited_rows(table)


def _parquet_rows(table: Path) -> Iterator[dict]:
    try:
        with parquet.ParquetFile(table) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise ValueError(f"{table}: {error}") from error


def _json_rows(table: Path) -> Iterator[dict]:
    with table.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{table}: line {number} is not JSON ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"{table}: line {number} is not an object")
            yield row


def _delimited_rows(table: Path) -> Iterator[dict]:
    tabs = table.suffix == ".tsv"  # where a quotation mark is a character like any other
    with table.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(
            file, delimiter="\t" if tabs else ",", quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL, strict=True
        )
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(f"{table}: line {reader.line_num} has not as many cells as the first line")
                yield row
        except csv.Error as error:
            raise ValueError(f"{table}: line {reader.line_num}: {error}") from error
