"""`mmpt-launch status`: what every run under a folder is doing, read from the files in its directory."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from launcher.living import LIVE_STATES, STALE_SECONDS, supervisor
from launcher.progress import (
    heartbeat,
    last_event,
    last_record,
    newest_checkpoint,
    reached_step,
    recipe_numbers,
    restarts,
)
from launcher.record import LAUNCH, Attempt, Launch, read_attempts, read_launch

Queue = Mapping[str, tuple[str, str]]
"""{job: (state, reason)}"""
Facts = Mapping[str, Any]
LONG_SECONDS = 60.0
COLOURS = {
    "running": "green", "finished": "blue", "queued": "cyan", "starting": "cyan", "restarting": "cyan",
    "stopped": "yellow", "stale": "bold red", "failed": "bold red", "dead": "bold red", "unknown": "magenta",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One run. None: unknown."""

    name: str
    dir: Path
    job: str
    state: str
    """running; queued, starting, restarting; finished, stopped, failed; stale: it should run but its heartbeat is old;
    dead: nobody runs it and nobody said why."""
    step: int
    total_steps: int | None
    samples_per_second: float | None
    loss: float | None
    seconds_left: float | None
    checkpoint_age_seconds: float | None
    restarts: int
    note: str
    """Why it is in this state."""


def find_runs(folder: Path) -> list[Path]:
    """Directories with launch.json or recipe.yaml, the folder itself, its children or theirs (a sweep's)."""
    places = [folder, *folder.glob("*/"), *folder.glob("*/*/")]
    return sorted({p for p in places if (p / LAUNCH).is_file() or (p / "recipe.yaml").is_file()})


def rows(folder: Path, queue: Queue | None, now: float) -> list[Row]:
    """One row for each run, in the order of their names. `queue`: squeue's answer for their jobs; none: unknown."""
    return [row_of(path, folder, queue, now) for path in find_runs(folder)]


def row_of(path: Path, folder: Path, queue: Queue | None, now: float) -> Row:
    launch, damage = launch_of(path)
    total, batch = recipe_numbers(path)
    record, step = last_record(path), reached_step(path)
    speed = _number(record.get("samples_per_second"))
    _, saved = newest_checkpoint(path)
    state, note = state_of(path, launch, queue, now)
    note = damage or note
    if state == "finished" and total is not None and step < total:
        state, note = "stopped", note or "where run.stop_at_step said"
    left = None
    if state == "running" and speed and total is not None and batch is not None:
        left = max(0, total - step) * batch / speed
    return Row(
        str(path.relative_to(folder)) if path != folder else path.name, path, launch.job if launch else "", state, step,
        total, speed if state == "running" else None, _number(record.get("loss")), left,
        None if saved is None else max(0.0, now - saved), restarts(path), note,
    )  # fmt: skip


def launch_of(path: Path) -> tuple[Launch | None, str]:
    """The launch, or none and what is wrong with its file."""
    try:
        return (read_launch(path) if (path / LAUNCH).is_file() else None), ""
    except ValueError as error:
        return None, str(error)


def state_of(path: Path, launch: Launch | None, queue: Queue | None, now: float) -> tuple[str, str]:
    """(state, note), from whichever of heartbeat, events, attempts and queue spoke last."""
    beat, event = heartbeat(path), last_event(path)
    queued = queue.get(launch.job) if queue and launch else None
    beaten, since = float(beat.get("time", 0.0)), launch.submitted if launch else 0.0
    attempts = [attempt for attempt in read_attempts(path) if attempt.time >= since] if launch else []
    ended = attempts[-1] if attempts and attempts[-1].time >= beaten else None
    if ended and ended.action in ("finished", "stopped", "failed"):
        return ended.action, ended.reason
    if event.get("event") == "finish":
        return "finished", ""
    if queued and queued[0] in LIVE_STATES and queued[0] != "RUNNING":
        why = queued[1] if queued[1] not in ("", "None") else queued[0].lower()
        return ("restarting", _after(why, ended)) if attempts else ("queued", why)
    if now - beaten < STALE_SECONDS and not ended:
        return "running", _place(beat, now)
    unknown = queue is None and launch is not None and launch.executor == "slurm"
    if not (queued or unknown or (launch and launch.executor == "local" and supervisor(launch))):
        return _abandoned(launch, beat, event, now)
    if ended:
        return "restarting", _after("", ended)
    return ("starting", "") if beaten < since else ("stale", _last_heard(beat, now))


def _abandoned(launch: Launch | None, beat: Facts, event: Facts, now: float) -> tuple[str, str]:
    """Of a run that nobody runs any more."""
    if event.get("event") == "stop" and not launch:
        return "stopped", ""
    if beat:
        return "dead", _last_heard(beat, now) + (f"; last event: {event['event']}" if event else "")
    if launch and launch.executor == "slurm" and not launch.job:
        return "failed", "it was not submitted"
    return "unknown", "no heartbeat yet" if launch else "not started by the launcher"


def _place(beat: Facts, now: float) -> str:
    """The phase of a run that is alive, where it is another than training or lasts long."""
    phase, stood = str(beat.get("phase", "")), now - float(beat.get("since", now))
    if stood > LONG_SECONDS:
        return f"{phase} for {duration(stood)}"
    return "" if phase in ("", "step", "data") else phase


def _last_heard(beat: Facts, now: float) -> str:
    ago = duration(now - float(beat.get("time", 0.0)))
    return f"last heartbeat {ago} ago, in {beat.get('phase', 'an unknown phase')}"


def _after(why: str, ended: Attempt | None) -> str:
    return "; ".join(part for part in (ended.reason if ended else "", why) if part)


def table(found: Iterable[Row], title: str) -> Group:
    """The numbers of every run, and below them why some are where they are."""
    made = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    made.add_column("run", overflow="fold", min_width=8)
    made.add_column("state", no_wrap=True)
    for name in ("step", "samples\n/s", "loss", "left", "saved", "re-\nstarts"):
        made.add_column(name, justify="right", no_wrap=True)
    notes = []
    for row in found:
        step = f"{row.step:,}/{row.total_steps:,}" if row.total_steps else f"{row.step:,}"
        made.add_row(
            row.name, Text(row.state, COLOURS[row.state]), step, _shown(row.samples_per_second, ",.0f"),
            _shown(row.loss, ".4f"), _age(row.seconds_left), _saved(row), str(row.restarts),
        )  # fmt: skip
        if row.note:
            notes.append(Text.assemble((f"  {row.name}", COLOURS[row.state]), f": {row.note}"))
    return Group(made, *notes)


def line(row: Row) -> str:
    """For scripts: tab-separated, units of the dataclass, empty for unknown."""
    values = (
        row.dir, row.state, row.job, row.step, row.total_steps, row.samples_per_second, row.loss, row.seconds_left,
        row.checkpoint_age_seconds, row.restarts, row.note,
    )  # fmt: skip
    return "\t".join("" if value is None else str(value) for value in values)


LINE_HEADER = (
    "run\tstate\tjob\tstep\ttotal_steps\tsamples_per_second\tloss\tseconds_left\tcheckpoint_age_seconds\trestarts\twhy"
)


def duration(seconds: float) -> str:
    """In the two largest units."""
    whole = int(seconds)
    for size, unit, smaller, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit} {whole % size // smaller}{small}"
    return f"{whole}s"


def _age(seconds: float | None) -> str:
    return "-" if seconds is None else duration(seconds)


def _saved(row: Row) -> str:
    """The age of the newest checkpoint while that says how much a crash would cost."""
    ago = row.state in ("running", "stale", "restarting", "dead")
    return duration(row.checkpoint_age_seconds) if ago and row.checkpoint_age_seconds is not None else "-"


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
