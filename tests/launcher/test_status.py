"""The table of runs, from directories in every state they can be in; and the picture of it in the docs."""

import json
import os
import tempfile
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from launcher.record import Attempt, Launch, append_attempt, write_json, write_launch
from launcher.status import LINE_HEADER, Row, duration, find_runs, line, row_of, rows, table

NOW = 1_800_000_000.0


def make_run(
    folder: Path, name: str, step: int = 500, beat_ago: float | None = 3.0, job: str = "7",
    events: tuple[str, ...] = (), attempt: tuple[str, int, str] | None = None, phase: str = "step",
    since_ago: float = 3.0, total: int = 1000, loss: float = 2.34567, speed: float = 3200.0,
) -> Path:  # fmt: skip
    """A run of 1000 steps of 64 pairs; `attempt`: (action, seconds ago, reason) of the last one that ended."""
    run_dir = folder / name
    (run_dir / "heartbeat").mkdir(parents=True)
    (run_dir / "recipe.yaml").write_text(f"run: {{global_batch: 64, samples: {64 * total}}}\n")
    write_launch(
        Launch(str(run_dir), "slurm-a100", "slurm", (), {}, "", "", "", "", job, "", NOW - 9000, 100, 3, 1, "bad.json")
    )
    if beat_ago is not None:
        beat = {"time": NOW - beat_ago, "step": step, "phase": phase, "since": NOW - since_ago}
        (run_dir / "heartbeat/rank-0.json").write_text(json.dumps(beat))
        record = {"step": step - 3, "loss": loss, "samples_per_second": speed}
        (run_dir / "metrics.jsonl").write_text(json.dumps(record) + '\n{"step": 500, "eval/x": 1}\n{"cut sho')
        saved = run_dir / f"checkpoints/step-{step - step % 100:08d}"
        saved.mkdir(parents=True)
        os.utime(saved, (NOW - 400, NOW - 400))
    for event in events:
        with open(run_dir / "events.jsonl", "a") as file:
            file.write(json.dumps({"time": NOW - 100, "event": event, "step": step, "attempt": 1}) + "\n")
    if attempt is not None:
        action, ago, reason = attempt
        append_attempt(run_dir, Attempt(NOW - ago, job, 0, 1, "3", "gpu017", step, action, reason))
    return run_dir


@pytest.mark.parametrize(
    ("facts", "queued", "state", "note"),
    [
        ({}, ("RUNNING", "None"), "running", ""),
        ({"phase": "evaluate"}, ("RUNNING", "None"), "running", "evaluate"),
        ({"phase": "data", "since_ago": 95.0}, ("RUNNING", "None"), "running", "data for 1m 35s"),
        ({}, None, "running", ""),
        ({"beat_ago": None}, ("PENDING", "Priority"), "queued", "Priority"),
        ({"beat_ago": None}, ("RUNNING", "None"), "starting", ""),
        ({"beat_ago": None}, None, "unknown", "no heartbeat yet"),
        ({"beat_ago": None, "job": ""}, None, "failed", "it was not submitted"),
        ({"beat_ago": 50.0, "attempt": ("restart", 40, "rank 3 was killed")}, ("PENDING", "BeginTime"), "restarting",
         "rank 3 was killed; BeginTime"),
        ({"beat_ago": 5.0, "attempt": ("restart", 40, "rank 3 was killed")}, ("RUNNING", "None"), "running", ""),
        ({"beat_ago": 300.0}, ("RUNNING", "None"), "stale", "last heartbeat 5m 0s ago, in step"),
        ({"beat_ago": 7300.0, "events": ("start", "hang")}, None, "dead",
         "last heartbeat 2h 1m ago, in step; last event: hang"),
        ({"beat_ago": 20.0, "attempt": ("failed", 10, "it loops")}, None, "failed", "it loops"),
        ({"beat_ago": 20.0, "attempt": ("stopped", 10, "as asked")}, None, "stopped", "as asked"),
        ({"beat_ago": 20.0, "step": 1000, "attempt": ("finished", 10, "")}, None, "finished", ""),
        ({"beat_ago": 20.0, "attempt": ("finished", 10, "")}, None, "stopped", "where run.stop_at_step said"),
        ({"beat_ago": 900.0, "step": 1000, "events": ("finish",)}, None, "finished", ""),
    ],
)  # fmt: skip
def test_states(tmp_path: Path, facts: dict, queued: tuple[str, str] | None, state: str, note: str) -> None:
    run_dir = make_run(tmp_path, "a", **facts)
    row = row_of(run_dir, tmp_path, {"7": queued} if queued else {}, NOW)
    assert (row.state, row.note) == (state, note)


def test_where_the_queue_is_unknown_nothing_is_called_dead(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, "a", beat_ago=300.0)
    assert row_of(run_dir, tmp_path, {}, NOW).state == "dead"
    assert row_of(run_dir, tmp_path, None, NOW).state == "stale"


def test_numbers(tmp_path: Path) -> None:
    row = row_of(make_run(tmp_path, "a", events=("start", "save", "resume", "resume")), tmp_path, {}, NOW)
    assert (row.step, row.total_steps, row.loss, row.samples_per_second) == (500, 1000, 2.34567, 3200.0)
    assert row.seconds_left == 500 * 64 / 3200 and row.restarts == 2
    assert row.checkpoint_age_seconds == 400


def test_a_long_file_is_read_from_its_end(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, "a")
    with open(run_dir / "metrics.jsonl", "w") as file:
        file.write("x" * 3_000_000 + "\n" + json.dumps({"step": 9999, "loss": 1.0}) + "\n")
    assert row_of(run_dir, tmp_path, {}, NOW).step == 9999


def test_runs_of_other_origins_and_damaged_ones_do_not_spoil_the_table(tmp_path: Path) -> None:
    """`deepspeed mmpt/train.py` writes no launch.json; a half-written file is no reason to see nothing."""
    by_hand, stopped = make_run(tmp_path, "by-hand"), make_run(tmp_path, "stopped", beat_ago=900.0, events=("stop",))
    (by_hand / "launch.json").unlink()
    (stopped / "launch.json").unlink()
    damaged = make_run(tmp_path, "damaged")
    for name in ("recipe.yaml", "metrics.jsonl", "heartbeat/rank-0.json", "attempts.jsonl", "events.jsonl"):
        (damaged / name).write_text('{"a": [')
    (damaged / "launch.json").write_text("{")
    make_run(tmp_path / "sweep", "lr=1")
    (tmp_path / "empty").mkdir()
    found = {row.name: row.state for row in rows(tmp_path, {}, NOW)}
    assert found == {"by-hand": "running", "damaged": "unknown", "stopped": "stopped", "sweep/lr=1": "running"}


def many(folder: Path) -> list[Row]:
    """As an operator might see them; `python -m tests.launcher.test_status` draws docs/status.svg from it."""
    big, small = {"total": 332_032}, {"total": 20_000}
    make_run(folder, "filip.vit_l14", 141_512, events=("start", "resume"), loss=1.8734, speed=38_410.0, **big)
    make_run(folder, "clip.vit_b16", 20_000, 900.0, attempt=("finished", 890, ""), loss=2.0411, **small)
    make_run(folder, "rates/lr=1e-3", 12_030, 4.0, phase="evaluate", since_ago=95.0, loss=2.2964, **small)
    why = "rank 3 on gpu017 failed: the gradient was not finite in 20 steps in a row, up to step 2412; 4 attempts"
    make_run(
        folder, "rates/lr=3e-3", 2_412, 700.0, events=("start", "resume", "resume", "resume"), loss=9.7021, **small,
        attempt=("failed", 600, f"{why} in a row have not got past step 2412"),
    )  # fmt: skip
    make_run(folder, "siglip.vit_b16", 7_701, 340.0, job="8", phase="data", loss=2.6120, **small)
    make_run(folder, "slip.vit_b16", 3_050, 100.0, job="9", events=("start",), loss=3.1182, **small,
             attempt=("restart", 95, "node gpu031 was lost"))  # fmt: skip
    make_run(folder, "albef.base", beat_ago=None, job="10", **big)
    queue = {"8": ("RUNNING", "None"), "9": ("PENDING", "BeginTime"), "10": ("PENDING", "Priority")}
    return rows(folder, queue, NOW)


def picture(found: list[Row], width: int) -> Console:
    console = Console(width=width, record=True, file=StringIO(), force_terminal=True, color_system="truecolor")
    console.print(table(found, "runs, 14:05:12"))
    return console


def test_the_table_fits_a_narrow_terminal(tmp_path: Path) -> None:
    text = picture(many(tmp_path), 80).export_text()
    assert all(word in text for word in ("141,512/332,032", "1.8734", "6m 40s", "starts")) and "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert "rates/lr=3e-3: rank 3 on gpu017 failed: the gradient was not finite" in text


def test_lines_for_scripts(tmp_path: Path) -> None:
    found = many(tmp_path)
    table_of = [dict(zip(LINE_HEADER.split("\t"), line(row).split("\t"), strict=True)) for row in found]
    assert len(table_of) == 7 and table_of[0]["run"] == str(tmp_path / "albef.base")
    assert table_of[0]["state"] == "queued" and table_of[0]["loss"] == "" and table_of[2]["step"] == "141512"


def test_durations_and_discovery(tmp_path: Path) -> None:
    assert [duration(s) for s in (0, 59, 60, 3599, 3600, 90000)] == ["0s", "59s", "1m 0s", "59m 59s", "1h 0m", "1d 1h"]
    assert find_runs(tmp_path) == []
    run_dir = make_run(tmp_path, "a")
    assert find_runs(run_dir) == [run_dir]
    write_json(tmp_path / "x/y/launch.json", {})
    assert find_runs(tmp_path) == [run_dir, tmp_path / "x/y"]


if __name__ == "__main__":  # draws the picture in the docs
    with tempfile.TemporaryDirectory() as drawn:
        screen = picture(many(Path(drawn)), 92)
        screen.print()  # rich cuts the lower edge of the last line off
        screen.save_svg("docs/status.svg", title="mmpt-launch status", unique_id="status")
