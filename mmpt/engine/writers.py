"""Where records go: the console, metrics.jsonl, TensorBoard and Prometheus. Rank 0 only; elsewhere a writer is off.

On resume, records of steps after the checkpoint are dropped from metrics.jsonl and hidden on TensorBoard, so that a
curve never runs twice through the same step.
"""

import json
import os
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from mmpt import dist
from mmpt.engine.events import Events
from mmpt.engine.layout import layout
from mmpt.engine.prometheus import Prometheus

TENSORBOARD_GROUPS = {
    "loss": "train",
    "learning_rate": "train",
    "grad_norm": "train",
    "skipped_steps": "train",
    "epoch": "train",
    "samples": "train",
    "memory_gib": "system",
    "data_wait_share": "system",
    "checkpoint_stall_seconds": "system",
    "checkpoint_save_seconds": "system",
    "checkpoint_bytes": "system",
    "straggler_factor": "system",
    "straggler_rank": "system",
    "loss_deviation": "train",
    "samples_per_second": "system",
    "samples_per_second_per_device": "system",
    "step_seconds_p50": "system",
    "step_seconds_p95": "system",
    "step_seconds_max": "system",
    "quarantine_rate": "system",
    "mean_text_tokens": "system",
    "model_tflops_per_second_per_device": "system",
    "mfu": "system",
    "restarts": "system",
}
"""Everything else is a term of the loss ("terms/") or has its group in its own name ("eval/...")."""


class Writers:
    """Open with the step that training continues from (0 for a new run). prometheus_port: see engine/prometheus.py."""

    def __init__(self, run_dir: Path, start_step: int, total_steps: int, events: Events, prometheus_port: int):
        self.on, self._restarts = dist.rank() == 0, events.attempt - 1
        if not self.on:
            return
        self._jsonl = run_dir / "metrics.jsonl"
        drop_records_after(self._jsonl, start_step)
        self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1, max_queue=100)
        self._tensorboard.add_custom_scalars(layout())
        self._console = Console(soft_wrap=True)
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"), BarColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), console=self._console, disable=not self._console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task("train", total=total_steps, completed=start_step)
        self._progress.start()
        self._prometheus = self._open_prometheus(run_dir, prometheus_port, events)

    def _open_prometheus(self, run_dir: Path, port: int, events: Events) -> Prometheus:
        """Without HTTP where the port is taken: being watched is not what a run is for."""
        try:
            return Prometheus(run_dir, port, events)
        except OSError as error:
            self.say(f"run.prometheus_port={port}: {error.strerror}; nothing is served, metrics.prom is written")
            return Prometheus(run_dir, 0, events)

    def say(self, text: str) -> None:
        """One line on the console."""
        if self.on:
            self._console.print(text, markup=False, highlight=False)

    def advance(self, step: int) -> None:
        if self.on:
            self._progress.update(self._task, completed=step)

    def record(self, step: int, values: dict[str, float], shown: tuple[str, ...], remark: str = "") -> None:
        """One record at this step: all of it to the files, the `shown` ones and the remark to the console."""
        if not self.on:
            return
        with open(self._jsonl, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        plotted = values
        if "loss" in values:  # how a run was cut is no part of its record
            plotted = values | {"restarts": self._restarts}
            self._prometheus.write(step, values)
        for name, value in plotted.items():
            tag = name if "/" in name else f"{TENSORBOARD_GROUPS.get(name, 'terms')}/{name}"
            self._tensorboard.add_scalar(tag, value, step)
        numbers = "  ".join(f"{name} {values[name]:.4g}" for name in shown if name in values)
        self.say(f"step {step}  {numbers}")
        if remark:
            self.say(remark)

    def text(self, name: str, text: str, step: int) -> None:
        """A text on TensorBoard, such as the recipe."""
        if self.on:
            self._tensorboard.add_text(name, f"<pre>{text}</pre>", step)

    def images(self, pictures: dict[str, np.ndarray], step: int) -> None:
        """Pictures on TensorBoard by name, each [H, W, 3] uint8."""
        if self.on:
            for name, picture in pictures.items():
                self._tensorboard.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        if self.on:
            self._prometheus.close()
            self._progress.stop()
            self._tensorboard.close()


def drop_records_after(path: Path, step: int) -> None:
    """Keep the records up to this step; a half-written last line is dropped too. The file is replaced at once."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            break
    replacement = path.with_suffix(".tmp")
    replacement.write_text("".join(kept))
    os.replace(replacement, path)
