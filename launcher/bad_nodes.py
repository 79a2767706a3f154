"""Nodes to keep away from, remembered in one file for all runs of a folder: bad_nodes.json."""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher.record import read_json, write_json

REMEMBERED_SECONDS = 7 * 86_400.0
BLAMES_TO_EXCLUDE = 2
"""A crash may be the program's fault; the second one on the same node within a week is the node's."""


@dataclass(frozen=True)
class BadNode:
    count: int
    reason: str
    """The last one."""
    expires: float
    """Unix seconds."""
    excluded: bool


def read(path: Path, now: float | None = None) -> dict[str, BadNode]:
    """{host: what is held against it}, expired entries left out."""
    moment, found = time.time() if now is None else now, {}
    for host, entry in read_json(path).items():
        try:
            node = BadNode(**entry)
        except TypeError:
            continue
        if node.expires > moment:
            found[host] = node
    return found


def blame(path: Path, host: str, reason: str, exclude: bool, now: float | None = None) -> None:
    """Hold one more failure against a node; `exclude`: at once, whatever the count."""
    moment = time.time() if now is None else now
    with _locked(path):
        nodes = read(path, moment)
        before = nodes.get(host)
        count = 1 + (before.count if before else 0)
        excluded = exclude or count >= BLAMES_TO_EXCLUDE or (before is not None and before.excluded)
        nodes[host] = BadNode(count, reason, moment + REMEMBERED_SECONDS, excluded)
        write_json(path, {name: asdict(node) for name, node in sorted(nodes.items())})


def to_exclude(path: Path, at_most: int, now: float | None = None) -> list[str]:
    """The worst nodes, those blamed most and last first, no more than `at_most`: an epidemic is no node's fault."""
    nodes = [(node.count, node.expires, host) for host, node in read(path, now).items() if node.excluded]
    return sorted(host for _, _, host in sorted(nodes, reverse=True)[:at_most])


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
