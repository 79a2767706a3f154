"""Annotation files, row by row: whatever is wrong with a row becomes one line that names the file, the row and why."""

import bz2
import csv
import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, cast


@contextmanager
def at_row(file: Path, number: int) -> Iterator[None]:
    """Turns what taking a row apart raises into ValueError: file, row (counted from 1), reason."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{file}: row {number}: there is no {error}") from error
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{file}: row {number}: {error}") from error


def read_json(file: Path) -> dict[str, Any]:
    """A file that is one JSON object. Raises ValueError for anything else."""
    try:
        with open_text(file) as stream:
            content = json.load(stream)
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__} where an object is wanted")
    return content


def rows_of(file: Path, content: dict[str, Any], name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row, object) of a list in a JSON file, rows counted from 1. Raises ValueError when there is no such list."""
    rows = content.get(name)
    if not isinstance(rows, list):
        raise ValueError(f"{file} has no list {name!r}; it has {', '.join(map(repr, content))}")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{file}: row {number}: {row!r} is not an object")
        yield number, row


def json_array(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row, object) of a file that is one JSON array, an object at a time, so that a large one fits into memory."""
    with open_text(file) as stream:
        text = stream.read()
    decoder, number, at = json.JSONDecoder(), 0, _skip(text, 0)
    if text[at : at + 1] != "[":
        raise ValueError(f"{file} is not a JSON array")
    at = _skip(text, at + 1)
    more = text[at : at + 1] != "]"
    while more:
        number += 1
        with at_row(file, number):
            row, at = decoder.raw_decode(text, at)
            if not isinstance(row, dict):
                raise ValueError(f"{row!r} is not an object")
            at = _skip(text, at)
            if text[at : at + 1] not in (",", "]") or at == len(text):
                raise ValueError("the file ends after it")
        yield number, row
        more = text[at] == ","
        at = _skip(text, at + 1)


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def json_lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row, object) of a file with a JSON object on each line."""
    for number, line in text_lines(file):
        with at_row(file, number):
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("it is not an object")
        yield number, row


def text_lines(file: Path) -> Iterator[tuple[int, str]]:
    """(row, line) of a text file; only a line feed ends a line. Raises ValueError where it is not UTF-8."""
    number = 0
    with open_text(file) as stream:
        try:
            for number, line in enumerate(stream, start=1):
                yield number, line.rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: after row {number}: {error}") from error


def tab_separated(file: Path, columns: int) -> Iterator[tuple[int, list[str]]]:
    """(row, cells) of a tab-separated file without a header or quotation. Raises ValueError for too few columns."""
    for number, line in text_lines(file):
        cells = line.split("\t")
        if len(cells) < columns:
            raise ValueError(f"{file}: row {number}: {len(cells)} columns where {columns} are wanted")
        yield number, cells


def comma_separated(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(row, cells by column) of a comma-separated file with a header; the header is not counted."""
    number = 0
    with open_text(file) as stream:
        try:
            for number, row in enumerate(csv.DictReader(stream, strict=True), start=1):
                if None in row or None in row.values():
                    raise ValueError(f"{file}: row {number}: it has not as many cells as the header")
                yield number, row
        except csv.Error as error:
            raise ValueError(f"{file}: row {number + 1}: {error}") from error


def open_text(file: Path) -> TextIO:
    """A text file in UTF-8, line feeds left as they are; .gz and .bz2 are decompressed on the way."""
    opener = {".gz": gzip.open, ".bz2": bz2.open}.get(file.suffix, open)
    return cast(TextIO, opener(file, "rt", encoding="utf-8-sig", newline="\n"))
