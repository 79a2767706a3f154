"""The verbs that look at all runs: `status`, again and again on a terminal, and `list`, once, for scripts."""

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from launcher import queue_client
from launcher.arguments import Parser
from launcher.queue_client import QueueError
from launcher.status import LINE_HEADER, Row, find_runs, launch_of, line, rows, table

REFRESH_SECONDS = 5.0
QUEUE_SECONDS = 5.0
"""A controller that is away must not keep the rest of the table from us."""


def status(words: Sequence[str]) -> int:
    parser = Parser("mmpt-launch status", description="A live table of all runs under a folder.")
    parser.add_argument("folder", nargs="?", default="runs", type=Path, help="[runs]")
    parser.add_argument("--once", action="store_true", help="print it once, as where there is no terminal")
    parser.add_argument(
        "--every", type=float, default=REFRESH_SECONDS, metavar="SECONDS", help=f"[{REFRESH_SECONDS:g}]"
    )
    parsed = parser.parse_args(list(words))
    _check(parsed.folder)
    console = Console()
    if parsed.once or not console.is_terminal:
        console.print(picture(parsed.folder))
        return 0
    try:
        with Live(picture(parsed.folder), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(parsed.every)
                live.update(picture(parsed.folder), refresh=True)
    except KeyboardInterrupt:
        return 0


def list_runs(words: Sequence[str]) -> int:
    parser = Parser("mmpt-launch list", description="One run per line, tab-separated, with a header.")
    parser.add_argument("folder", nargs="?", default="runs", type=Path, help="[runs]")
    parsed = parser.parse_args(list(words))
    _check(parsed.folder)
    found, problem = look(parsed.folder)
    print("\n".join([LINE_HEADER, *map(line, found)]))
    if problem:
        raise QueueError(problem)
    return 0


def picture(folder: Path) -> Group:
    found, problem = look(folder)
    moment = time.strftime("%H:%M:%S")
    below = [Text(f"the queue could not be asked: {problem}", style="magenta")] if problem else []
    if not found:
        return Group(Text(f"{folder}: no runs yet ({moment})"), *below)
    return Group(table(found, f"{folder}, {moment}"), *below)


def look(folder: Path) -> tuple[list[Row], str]:
    """The rows, and why the queue is unknown if it is."""
    launches = [launch_of(path)[0] for path in find_runs(folder)]
    jobs = [launch.job for launch in launches if launch and launch.executor == "slurm" and launch.job]
    queue, problem = {}, ""
    if jobs:
        try:
            queue = queue_client.states(jobs, QUEUE_SECONDS)
        except QueueError as error:
            queue, problem = None, str(error)
    return rows(folder, queue, time.time()), problem


def _check(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; name the one that holds your runs")
