"""The core numbers for Prometheus: RUN_DIR/metrics.prom, for node-exporter's textfile collector, and on request HTTP.

The file is in Prometheus's text format and is replaced at once, whenever a record is written; a run that hangs or died
shows by the age of `mmpt_heartbeat_timestamp_seconds`. HTTP listens on the loopback interface alone and serves the same
text at any path. Rank 0 only.
"""

import os
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import NamedTuple

from mmpt.engine.events import Events

FILE_NAME = "metrics.prom"


class Metric(NamedTuple):
    name: str
    kind: str
    help: str
    keys: tuple[tuple[str, str], ...]
    """Where its values are in a record, and the label that each has beside `run`."""


METRICS = (
    Metric("mmpt_step_total", "counter", "Steps taken.", (("step", ""),)),
    Metric("mmpt_samples_total", "counter", "Pairs seen, repeats counted.", (("samples", ""),)),
    Metric("mmpt_skipped_steps_total", "counter", "Steps without an update here.", (("skipped_steps", ""),)),
    Metric("mmpt_restarts_total", "counter", "Starts of this run after the first.", (("restarts", ""),)),
    Metric("mmpt_loss", "gauge", "Mean loss since the last record.", (("loss", ""),)),
    Metric("mmpt_grad_norm", "gauge", "Global gradient norm before clipping.", (("grad_norm", ""),)),
    Metric("mmpt_learning_rate", "gauge", "Peak over groups.", (("learning_rate", ""),)),
    Metric("mmpt_samples_per_second", "gauge", "Pairs over all devices.", (("samples_per_second", ""),)),
    Metric("mmpt_mfu", "gauge", "Model FLOP utilisation; absent where the peak is unknown.", (("mfu", ""),)),
    Metric(
        "mmpt_step_seconds", "gauge", "Of the steps since the last record, on the slowest rank.",
        (("step_seconds_p50", 'quantile="0.5"'), ("step_seconds_p95", 'quantile="0.95"'),
         ("step_seconds_max", 'quantile="1"')),
    ),
    Metric("mmpt_data_wait_share", "gauge", "Share of time waiting for data.", (("data_wait_share", ""),)),
    Metric(
        "mmpt_communication_share", "gauge", "Share of time in collectives, waits for slower ranks included.",
        (("communication_share/method", 'of="method"'), ("communication_share/zero", 'of="zero"')),
    ),
    Metric("mmpt_memory_gib", "gauge", "Peak memory of the largest rank.", (("memory_gib", ""),)),
    Metric("mmpt_quarantine_rate", "gauge", "Share of samples that could not be used.", (("quarantine_rate", ""),)),
    Metric("mmpt_heartbeat_timestamp_seconds", "gauge", "When this was written.", (("now", ""),)),
    Metric(
        "mmpt_checkpoint_last_success_timestamp_seconds", "gauge", "Absent before the first.", (("saved", ""),)
    ),
)  # fmt: skip


def exposition(run: str, values: dict[str, float]) -> str:
    """The text format, version 0.0.4; what has no value is left out."""
    label = run.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    lines = []
    for metric in METRICS:
        found = [(values[key], extra) for key, extra in metric.keys if key in values]
        if found:
            lines += [f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {metric.kind}"]
        for value, extra in found:
            labels = f'run="{label}"' + (f",{extra}" if extra else "")
            lines.append(f"{metric.name}{{{labels}}} {_number(value)}")
    return "".join(line + "\n" for line in lines)


def _number(value: float) -> str:
    return {"inf": "+Inf", "-inf": "-Inf", "nan": "NaN"}.get(text := repr(float(value)), text)


class Prometheus:
    """run_dir's name is the label `run`. port: 0 serves nothing over HTTP. OSError where it cannot listen there."""

    def __init__(self, run_dir: Path, port: int, events: Events):
        self._run, self._path, self._events = run_dir.resolve().name, run_dir / FILE_NAME, events
        self._text = ""
        self._text = exposition(self._run, self._facts())
        self._server = _serve(port, lambda: self._text) if port else None

    def write(self, step: int, record: dict[str, float]) -> None:
        """The state of the run at this record. OSError where it cannot be written."""
        self._text = exposition(self._run, {**record, **self._facts(), "step": step})
        temporary = self._path.with_suffix(".prom.tmp")
        temporary.write_text(self._text)
        os.replace(temporary, self._path)

    def _facts(self) -> dict[str, float]:
        saved = self._events.last_save_time
        facts = {"now": time.time(), "restarts": self._events.attempt - 1}
        return facts | ({} if saved is None else {"saved": saved})

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()


def _serve(port: int, text: Callable[[], str]) -> ThreadingHTTPServer:
    """OSError where the port is taken."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = text().encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Every scrape in the run's output would be noise."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    Thread(target=server.serve_forever, name="prometheus", daemon=True).start()
    return server
