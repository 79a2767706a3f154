"""`mmpt-data regions-from-lmdb LMDB OUT`: the image features that UNITER published, as .npz files.

LMDB is a folder such as `coco_train2014/feat_th0.2_max100_min10`; a key is the name of a .npz file, a value is that
file or the same arrays in msgpack as the msgpack-numpy package writes them. `mmpt-data pack --regions OUT` puts the
files into shards, beside their pictures. Needs the lmdb package: pip install 'mmpt[lmdb]'.
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from data_tools.region_files import Choice, add_choice, read_file, region_file
from mmpt.data.regions import BOXES, CLASSES, CONFIDENCE, FEATURES, RegionError, check_arrays

KEYS = b"__keys__"
SHOWN = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("lmdb", type=Path, help="folder with data.mdb")
    parser.add_argument("out", type=Path, help="folder to write; files that are there are left alone")
    add_choice(parser)


def run(args: argparse.Namespace) -> None:
    choice = Choice(args.confidence, args.least, args.most)
    args.out.mkdir(parents=True, exist_ok=True)
    written, before, bad = 0, 0, []
    for name, value in entries(args.lmdb):
        path = args.out / name
        if path.exists():
            before += 1
            continue
        try:
            data = region_file(arrays_of(value), choice)
        except RegionError as error:
            bad.append(f"{name}: {error}")
            continue
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_bytes(data)
        temporary.replace(path)
        written += 1
    print("".join(f"  {line}\n" for line in bad[:SHOWN]), end="")
    print(f"{args.out}: {written:,} files written, {before:,} were there, {len(bad):,} could not be used")
    if not written + before:
        raise ValueError(f"{args.lmdb} holds no regions that can be used")


def entries(folder: Path) -> Iterator[tuple[str, bytes]]:
    """(name, value) of each picture. Raises ValueError for a folder without a database, or a name that is no file's."""
    try:
        import lmdb  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError as error:
        raise ValueError("reading LMDB needs the lmdb package: pip install 'mmpt[lmdb]'") from error
    if not (folder / "data.mdb").is_file():
        raise ValueError(f"{folder} is not an LMDB folder: it has no data.mdb")
    try:
        with lmdb.open(str(folder), readonly=True, create=False, lock=False) as database, database.begin() as reading:
            for key, value in reading.cursor():
                name = bytes(key).decode("utf-8", "replace")
                if key == KEYS:
                    continue
                if name != os.path.basename(name) or name.startswith(".") or "\0" in name:
                    raise ValueError(f"{folder}: key {name!r} is not the name of a file")
                yield name, bytes(value)
    except lmdb.Error as error:
        raise ValueError(f"{folder} cannot be read: {error}") from error


def arrays_of(value: bytes) -> dict[str, np.ndarray]:
    """The arrays of one picture. Raises RegionError for bytes that are neither .npz nor msgpack, or not regions."""
    if value.startswith(b"PK"):
        return read_file(value)
    try:
        found = msgpack.unpackb(value, raw=False, object_hook=_array)
    except Exception as error:  # on damaged bytes msgpack and numpy raise nearly every type there is
        raise RegionError(f"it is neither a .npz file nor msgpack ({' '.join(str(error).split())})") from error
    names = (FEATURES, BOXES, CONFIDENCE, CLASSES)
    arrays = {name: np.asarray(found[name]) for name in names if isinstance(found, dict) and name in found}
    for name in names[:3]:
        if name not in arrays:
            raise RegionError(f"it has no {name}")
    check_arrays(arrays)
    return arrays


def _array(entry: dict[Any, Any]) -> Any:
    """msgpack-numpy's form of an array: {b"nd": True, b"type": dtype, b"shape": sides, b"data": bytes}."""
    if entry.get(b"nd") is not True:
        return entry
    dtype = np.dtype(str(entry[b"type"]))
    if dtype.hasobject:
        raise ValueError("an array of objects")
    return np.frombuffer(entry[b"data"], dtype).reshape([int(side) for side in entry[b"shape"]])
