"""events.jsonl: what happened to a run over all its attempts, one object per line. Rank 0 writes, the launcher reads.

    {"time": 1767225600.0, "event": "save", "step": 200, "attempt": 1, ...}

event: preflight (the first of every attempt), start (a new run), resume, save, save_failed, signal, stop (left, to be
continued), hang, crash, rollback, finish. docs/checkpoints.md has the fields of each.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE_NAME = "events.jsonl"


class Events:
    """The events of one attempt. on: whether this process is the one that writes."""

    def __init__(self, run_dir: Path, on: bool):
        self._path, self._on = run_dir / FILE_NAME, on
        past = list(read(run_dir)) if on else []
        self.attempt = 1 + max((event.get("attempt", 0) for event in past), default=0)
        """Counts the starts of this run, from 1. Right on the rank that writes."""
        saves = [event["seconds"] for event in past if event.get("event") == "save"]
        self.slowest_recent_save_seconds = max(saves[-5:], default=0.0)
        self.last_save_time = max((event["time"] for event in past if event.get("event") == "save"), default=None)
        """When a checkpoint was last published, unix time; None before the first."""
        self.last_end = _end_of(past)
        """How the attempt before this one ended, in words; empty for the first."""

    def add(self, event: str, step: int, facts: dict[str, Any]) -> None:
        """One line. It must never be what ends a run: where it cannot be written, that is said and life goes on."""
        if not self._on:
            return
        line = {"time": round(time.time(), 3), "event": event, "step": step, "attempt": self.attempt, **facts}
        if event == "save":
            self.last_save_time = line["time"]
        try:
            whole = not self._path.exists() or self._path.read_bytes()[-1:] in (b"", b"\n")
            with open(self._path, "ab") as file:  # one write to a file opened for appending
                file.write(b"\n" * (not whole) + json.dumps(line).encode() + b"\n")
        except OSError as error:
            print(f"{self._path}: {os.strerror(error.errno or 0)}; lost: {line}", file=sys.stderr, flush=True)


def _end_of(past: list[dict[str, Any]]) -> str:
    if not past:
        return ""
    last = past[-1]
    end = next((event for event in reversed(past) if event.get("event") not in ("save", "save_failed", "stop")), last)
    name, step = end.get("event"), last.get("step")
    if name == "signal" and end.get("attempt") == last.get("attempt"):
        return f"told to stop at step {step}: {'; '.join(end['reasons'])}"
    if name in ("crash", "hang", "rollback"):
        return f"{name} at step {step}: {end.get('error') or end.get('reason') or 'see events.jsonl'}"
    if last.get("event") in ("stop", "finish"):
        return f"ended as asked at step {step}"
    return f"ended without a word; the last it wrote was {last.get('event')!r} at step {step}"


def read(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Every event of a run, oldest first; what a killed process left half-written is passed over."""
    path = run_dir / FILE_NAME
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue
