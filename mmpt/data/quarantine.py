"""Samples that could not be used: what stood in for them, and the ledger that names them.

An undecodable image or an empty caption must not stop a run of weeks, nor change how many samples a rank gets. Its
place is taken by another sample of the same chunk, drawn by a permutation keyed by (seed, epoch, position), so that
whoever makes the batch picks the same; and a row says which sample it was and why.
"""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
from pyarrow import parquet

from mmpt.data.permutation import hash_key, permute

STAND_IN = 3  # what the key of the permutation is for; order.py has 1 and 2
FOLDER, FILE_NAME = "quarantine", "quarantine.parquet"
ALWAYS_ALLOWED = 10


class BadSample(NamedTuple):
    """A sample that could not be used: where it lies (shard, key, first byte), why, at which position it came, and the
    key of the sample of the same shard that stood in for it there."""

    shard: str
    key: str
    offset: int
    reason: str
    position: int
    stand_in: str


def stand_ins(count: int, index: int, seed: int, epoch: int, position: int) -> list[int]:
    """The other samples of a chunk of `count` in the order in which they stand in for sample `index`."""
    key = hash_key(seed, STAND_IN, epoch, position)
    return [i for i in permute(np.arange(count), count, key).tolist() if i != index]


def check_rate(bad: int, delivered: int, largest_share: float, last: BadSample) -> None:
    """ValueError when more than the given share of the delivered samples, and more than a handful, were bad."""
    if bad > ALWAYS_ALLOWED and bad > largest_share * delivered:
        raise ValueError(
            f"{bad} of {delivered} samples could not be used, more than data.max_quarantined_share ({largest_share}); "
            f"the last was {last.shard}: sample {last.key!r}: {last.reason}"
        )


def append(run_dir: Path, rank: int, rows: Sequence[BadSample]) -> None:
    """Add rows to this rank's ledger, quarantine/rank-R.jsonl, so that they survive a kill."""
    if not rows:
        return
    (run_dir / FOLDER).mkdir(exist_ok=True)
    with (run_dir / FOLDER / f"rank-{rank:05d}.jsonl").open("a") as file:
        file.write("\n")  # ends the line that a killed run may have left unfinished
        file.writelines(json.dumps(row._asdict()) + "\n" for row in rows)


def merge(run_dir: Path) -> int:
    """Write quarantine.parquet from the ledgers of all ranks: one row per sample, with its first position and how many
    times it came. Returns the number of samples. Written at once or not at all; nothing is written for none."""
    first: dict[tuple[str, str], dict] = {}
    positions: dict[tuple[str, str], set[int]] = {}
    for row in rows_of(run_dir):
        sample = (row["shard"], row["key"])
        positions.setdefault(sample, set()).add(row["position"])  # a resumed run may meet a position again
        if sample not in first or row["position"] < first[sample]["position"]:
            first[sample] = row
    if first:
        rows = [{**first[sample], "times": len(positions[sample])} for sample in sorted(first)]
        temporary = run_dir / f"{FILE_NAME}.{os.getpid()}.tmp"
        parquet.write_table(pyarrow.Table.from_pylist(rows), temporary)
        temporary.replace(run_dir / FILE_NAME)
    return len(first)


def rows_of(run_dir: Path) -> Iterable[dict]:
    """All rows of the ledgers of all ranks, a dictionary with the fields of BadSample each."""
    for path in sorted((run_dir / FOLDER).glob("rank-*.jsonl")):
        for line in filter(None, path.read_text().splitlines()):
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue  # the line that was being written when the run was killed; the sample comes again
