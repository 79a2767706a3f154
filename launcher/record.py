"""launch.json and attempts.jsonl in a run directory: what was started where, and how each attempt ended."""

import json
import os
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

LAUNCH, ATTEMPTS, STOP = "launch.json", "attempts.jsonl", "stop"


@dataclass(frozen=True)
class Launch:
    """The newest launch of a run."""

    run_dir: str
    cluster: str
    executor: str
    arguments: tuple[str, ...]
    """Of train.py."""
    changes: dict[str, str]
    """Flags that changed the cluster file's values."""
    directory: str
    """Where relative paths of the arguments begin."""
    code: str
    git_sha: str
    logs: str
    """Folder of JOB_RANK_log.out."""
    job: str
    """SLURM's job id, array form included; the process id on this machine; "" while it is being submitted."""
    host: str
    submitted: float
    """Unix seconds."""
    max_restarts: int
    max_fruitless_restarts: int
    max_excluded_nodes: int
    bad_nodes: str
    """The file of bad nodes."""
    exclude: tuple[str, ...] = ()
    """Nodes that the user excluded."""
    earlier_jobs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Attempt:
    """How one attempt to run ended, and what was decided."""

    time: float
    job: str
    restart: int
    """How many times the job had been restarted before this attempt."""
    status: int
    """Exit status of the rank that ended it."""
    rank: str
    host: str
    step: int
    """The highest step that the run had ever reached."""
    action: str
    """As in restart.Decision: finished, stopped, failed, restart or leave."""
    reason: str
    """One line for people."""


def write_launch(launch: Launch) -> None:
    """Replace launch.json at once."""
    write_json(Path(launch.run_dir) / LAUNCH, asdict(launch))


def read_launch(run_dir: Path) -> Launch:
    """ValueError if the directory holds no launch or one that cannot be read."""
    path = run_dir / LAUNCH
    if not path.is_file():
        raise ValueError(f"{run_dir} was not started by the launcher: it has no {LAUNCH}")
    try:
        data = json.loads(path.read_text())
        known = {f.name for f in fields(Launch)}
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k in known}
        return Launch(**values)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def append_attempt(run_dir: Path, attempt: Attempt) -> None:
    with open(run_dir / ATTEMPTS, "a") as file:
        file.write(json.dumps(asdict(attempt)) + "\n")


def read_attempts(run_dir: Path) -> list[Attempt]:
    """Oldest first; a line that was cut short by a crash is left out."""
    known = {f.name for f in fields(Attempt)}
    return [
        Attempt(**{k: v for k, v in line.items() if k in known})
        for line in read_lines(run_dir / ATTEMPTS)
        if known <= line.keys()
    ]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; none where there is no file. Lines that are cut short are left out."""
    try:
        text = path.read_text()
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def read_json(path: Path) -> dict[str, Any]:
    """An object; empty where there is none or it cannot be read."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: Any) -> None:
    """Written aside and moved into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    with os.fdopen(handle, "w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
    os.chmod(name, 0o644)
    os.replace(name, path)
