"""Bits flipped in the headers of shards: what is read is identical, or an error; nothing is ever lost in silence.

What a pax or GNU long-name record says lies outside of any checksum of the tar format. A name that is damaged there may
pass as another name when the shard is indexed, every file being there all the same; against an intact manifest, which
keeps a digest of the layout of every chunk, it is an error too.
"""

import io
import json
import random
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from data_tools.index import index
from mmpt.data.manifest import Manifest
from mmpt.data.reader import Reader
from mmpt.data.tar import BLOCK, ShardError
from tests.data.shards import write_shard

CASES = 800  # for each kind of shard
SAMPLES = 11
CHUNK = 3


class Sample(NamedTuple):
    key: str
    offset: int
    files: dict[str, bytes]


def write_ustar(path: Path) -> None:
    write_shard(path, range(SAMPLES))


def write_with(tar_format: int, path: Path) -> None:
    """Names that need extended headers, and in pax a record for each member that carries no name (a time)."""
    with tarfile.open(path, "w", format=tar_format) as tar:
        for i in range(SAMPLES):
            folder = "f" * (150 if i % 2 else 10)
            for extension in ("jpg", "txt", "json"):
                data = json.dumps([i, extension]).encode() * (1 + 40 * (extension == "jpg"))
                member = tarfile.TarInfo(f"{folder}/größe{i:04d}.{extension}")
                member.size, member.mtime = len(data), i + 0.5 if tar_format == tarfile.PAX_FORMAT else i
                tar.addfile(member, io.BytesIO(data))


KINDS = {
    "ustar": write_ustar,
    "pax": lambda path: write_with(tarfile.PAX_FORMAT, path),
    "gnu": lambda path: write_with(tarfile.GNU_FORMAT, path),
}


def targets(data: bytes) -> dict[str, list[tuple[int, int]]]:
    """Byte ranges [first, last) by kind: headers of members, extended headers, their records, the end."""
    out: dict[str, list[tuple[int, int]]] = {"header": [], "extended header": [], "records": [], "end": []}
    at = 0
    while data[at : at + BLOCK].count(0) != BLOCK:
        size, kind = int(data[at + 124 : at + 135], 8), data[at + 156 : at + 157]
        out["header" if kind == b"0" else "extended header"].append((at, at + BLOCK))
        if kind in (b"x", b"L"):
            out["records"].append((at + BLOCK, at + BLOCK + size))
        at += BLOCK + -(-size // BLOCK) * BLOCK
    out["end"].append((at, at + 2 * BLOCK))
    return {name: ranges for name, ranges in out.items() if ranges}


def read(manifest: Manifest) -> list[Sample]:
    lengths = manifest.chunk_lengths
    chunks = np.repeat(np.arange(len(lengths)), lengths)
    indices = np.concatenate([np.arange(length) for length in lengths])
    return [Sample(raw.key, raw.offset, raw.files) for raw in Reader(manifest).read(chunks, indices)]


def changed(data: bytes, draw: random.Random, at: int) -> bytes:
    """One bit or one byte is another."""
    damaged = bytearray(data)
    damaged[at] ^= 1 << draw.randrange(8) if draw.random() < 0.7 else draw.randrange(1, 256)
    return bytes(damaged)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_lost_in_silence(kind: str, tmp_path: Path):
    folder = tmp_path / "shards"
    folder.mkdir()
    path = folder / "00000.tar"
    KINDS[kind](path)
    intact = path.read_bytes()
    manifest = index(str(folder), chunk_samples=CHUNK)
    expected = read(manifest)
    assert len(expected) == SAMPLES
    found = Counter()
    draw = random.Random(f"{kind} of 2026")
    for name, ranges in targets(intact).items():
        for _ in range(CASES // len(targets(intact))):
            first, last = draw.choice(ranges)
            at = draw.randrange(first, last)
            path.write_bytes(changed(intact, draw, at))
            found[name, "training", outcome(lambda: read(manifest), expected, False, f"{kind} {at}")] += 1
            may_rename = name == "records"
            again = outcome(lambda: read(index(str(folder), CHUNK, out=tmp_path)), expected, may_rename, f"{kind} {at}")
            found[name, "index", again] += 1
    assert sum(found.values()) >= 2 * (CASES - 4)
    for (name, when, result), count in found.items():
        if result == "identical" and name != "records":  # the filling around a checksum's digits says nothing
            assert count < 0.05 * CASES, (name, when)


def outcome(attempt: Callable[[], list[Sample]], expected: list[Sample], may_rename: bool, case: str) -> str:
    """`error` or `identical`; `renamed` where names lie outside of what the format can protect."""
    try:
        samples = attempt()
    except ShardError as error:
        assert "00000.tar at byte" in str(error) and "\n" not in str(error)
        return "error"
    if samples == expected:
        return "identical"
    assert may_rename, f"{case}: a flip changed what is read"
    assert [list(s.files.values()) for s in samples] == [list(s.files.values()) for s in expected], case
    assert all(not s.files.keys().isdisjoint(("jpg", "png", "webp")) for s in samples), case
    return "renamed"
