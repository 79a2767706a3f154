"""How far a run has come, read from the files that train.py leaves in its directory; whatever is missing is unknown."""

import json
import os
import re
from pathlib import Path
from typing import Any

import yaml

from launcher.record import read_json, read_lines

TAIL_BYTES = 1 << 16
WORDS = 300
"""Characters of an error that are passed on."""


def reached_step(run_dir: Path) -> int:
    """The highest step that left any trace: a heartbeat, a record, a checkpoint. 0 before the first."""
    steps = [heartbeat(run_dir).get("step"), last_record(run_dir).get("step"), newest_checkpoint(run_dir)[0]]
    return max((int(step) for step in steps if isinstance(step, int | float)), default=0)


def heartbeat(run_dir: Path) -> dict[str, Any]:
    """Rank 0's: {"time", "step", "phase"}."""
    return read_json(run_dir / "heartbeat" / "rank-0.json")


def last_record(run_dir: Path) -> dict[str, Any]:
    """The last whole line of metrics.jsonl that has a loss."""
    return next((line for line in last_lines(run_dir / "metrics.jsonl") if "loss" in line), {})


def last_event(run_dir: Path) -> dict[str, Any]:
    return next((line for line in last_lines(run_dir / "events.jsonl") if "event" in line), {})


def last_words(run_dir: Path, since: float) -> tuple[str, dict[str, str]]:
    """What train.py said last of how an attempt ended, in one line, and {node: reason} of nodes that it found unfit.

    since: Unix seconds; what is older belongs to an attempt before.
    """
    event = last_event(run_dir)
    if float(event.get("time", 0.0)) < since:
        return "", {}
    unfit = event.get("unfit", {})
    words = {
        "crash": event.get("error", ""),
        "hang": f"in {event.get('phase', 'an unknown phase')}",
        "preflight": "; ".join(f"{node}: {reason}" for node, reason in unfit.items()),
    }.get(str(event.get("event")), "")
    return " ".join(str(words).split())[:WORDS], unfit


def last_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in the last 64 KiB of a file of JSON lines, newest first; the file may be gigabytes long."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    found = []
    for line in reversed(text.splitlines()):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def newest_checkpoint(run_dir: Path) -> tuple[int | None, float | None]:
    """(step, Unix seconds at which it was published) of the newest checkpoint."""
    newest: tuple[int | None, float | None] = None, None
    try:
        for entry in os.scandir(run_dir / "checkpoints"):
            match = re.fullmatch(r"step-(\d+)", entry.name)
            if match and int(match[1]) >= (newest[0] or 0):
                newest = int(match[1]), entry.stat().st_mtime
    except OSError:
        pass
    return newest


def recipe_numbers(run_dir: Path) -> tuple[int | None, int | None]:
    """(total steps, pairs per step) of recipe.yaml."""
    try:
        run = yaml.load((run_dir / "recipe.yaml").read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))[
            "run"
        ]
        batch, samples = int(run["global_batch"]), int(run["samples"])
        return -(-samples // batch), batch
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, ZeroDivisionError):
        return None, None


def restarts(run_dir: Path) -> int:
    """How often the run has begun again."""
    begun = sum(line.get("event") in ("start", "resume") for line in read_lines(run_dir / "events.jsonl"))
    return max(0, begun - 1)
