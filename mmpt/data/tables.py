"""A file of named arrays that is mapped into memory: all processes of a node share one copy of it.

The format is that of safetensors: the length of a JSON header (8 bytes, little-endian), the header, then the arrays.
"""

import json
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from mmpt.data import storage

DTYPES = {"U8": np.uint8, "U32": np.uint32, "I32": np.int32, "I64": np.int64}
LARGEST_HEADER_BYTES = 1 << 20
FACTS = "facts"  # one entry, because those of safetensors come in a random order


def write_tables(path: str | os.PathLike, tables: dict[str, np.ndarray], facts: dict[str, str]) -> None:
    """Write to a local file at once or not at all."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(
                save({name: np.ascontiguousarray(table) for name, table in tables.items()}, {FACTS: json.dumps(facts)})
            )
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_tables(place: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(the arrays, read-only; the facts). A local file is mapped, any other is read whole.

    Raises ValueError when it is not such a file or is cut short.
    """
    data = _bytes_of(place)
    header_bytes = int.from_bytes(data[:8], "little")
    if len(data) < 8 or header_bytes > min(LARGEST_HEADER_BYTES, len(data) - 8):
        raise ValueError("it does not begin with a header")
    header: dict[str, Any] = json.loads(bytes(data[8 : 8 + header_bytes]))
    facts = json.loads(header.pop("__metadata__")[FACTS])
    tables = {}
    for name, entry in header.items():
        dtype, (first, last) = np.dtype(DTYPES[entry["dtype"]]), entry["data_offsets"]
        if not 0 <= first <= last <= len(data) - 8 - header_bytes:
            raise ValueError(f"it is cut short inside {name!r}")
        flat = np.frombuffer(data, dtype, (last - first) // dtype.itemsize, 8 + header_bytes + first)
        tables[name] = flat.reshape(entry["shape"])
    return tables, facts


def _bytes_of(place: str) -> "bytes | mmap.mmap":
    if storage.is_local(place):
        with open(place, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with storage.open_bytes(place) as file:
        return file.read(-1)


@dataclass(frozen=True, eq=False)
class Texts:
    """Many short texts as two arrays: text i is data[ends[i - 1]:ends[i]], in UTF-8."""

    data: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, i: int) -> str:
        return self.data[int(self.ends[i - 1]) if i else 0 : int(self.ends[i])].tobytes().decode("utf-8")


def pack_texts(values: Sequence[str]) -> Texts:
    """Pack texts."""
    encoded = [value.encode("utf-8") for value in values]
    ends = np.cumsum([len(value) for value in encoded], dtype=np.int64)
    return Texts(np.frombuffer(b"".join(encoded), np.uint8), ends)
