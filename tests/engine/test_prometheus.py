"""What Prometheus reads: valid to its own parser, whole at any moment, and never what ends a run."""

import json
import socket
import time
import urllib.request
from pathlib import Path

import pytest

from mmpt import dist
from mmpt.engine.events import Events
from mmpt.engine.prometheus import METRICS, Prometheus, exposition
from mmpt.engine.writers import Writers

RECORD = {
    "loss": 2.5, "grad_norm": float("inf"), "learning_rate": 1e-3, "samples_per_second": 4096.0, "mfu": 0.41,
    "step_seconds_p50": 0.2, "step_seconds_p95": 0.3, "step_seconds_max": 1.5, "data_wait_share": 0.01,
    "memory_gib": 61.5, "skipped_steps": 3.0, "quarantine_rate": 0.0, "samples": 8192, "contrastive": 2.5,
    "communication_share/method": 0.02, "communication_share/zero": 0.1,
}  # fmt: skip


def parsed(text: str) -> dict[str, list]:
    parser = pytest.importorskip("prometheus_client.parser", reason="pip install prometheus-client")
    return {family.name: family.samples for family in parser.text_string_to_metric_families(text)}


def test_its_own_parser_reads_back_every_number(tmp_path: Path) -> None:
    run_dir = tmp_path / 'a "quoted" \\ run'
    run_dir.mkdir()
    Events(run_dir, on=True).add("save", 20, {"seconds": 1.0})
    events = Events(run_dir, on=True)
    before = time.time()
    Prometheus(run_dir, 0, events).write(40, RECORD)
    assert [path.name for path in run_dir.glob("metrics*")] == ["metrics.prom"]
    found = parsed((run_dir / "metrics.prom").read_text())
    assert all(sample.labels["run"] == run_dir.name for samples in found.values() for sample in samples)
    assert found.keys() == {metric.name.removesuffix("_total") for metric in METRICS}
    values = {name: samples[0].value for name, samples in found.items() if len(samples) == 1}
    for name, wanted in {
        "mmpt_step": 40, "mmpt_samples": 8192, "mmpt_skipped_steps": 3, "mmpt_restarts": 1, "mmpt_loss": 2.5,
        "mmpt_grad_norm": float("inf"), "mmpt_samples_per_second": 4096, "mmpt_memory_gib": 61.5, "mmpt_mfu": 0.41,
        "mmpt_data_wait_share": 0.01, "mmpt_checkpoint_last_success_timestamp_seconds": events.last_save_time,
    }.items():  # fmt: skip
        assert values[name] == wanted, name
    assert before <= values["mmpt_heartbeat_timestamp_seconds"] <= time.time()
    quantiles = {sample.labels["quantile"]: sample.value for sample in found["mmpt_step_seconds"]}
    assert quantiles == {"0.5": 0.2, "0.95": 0.3, "1": 1.5}
    shares = {sample.labels["of"]: sample.value for sample in found["mmpt_communication_share"]}
    assert shares == {"method": 0.02, "zero": 0.1}


def test_what_is_unknown_is_absent_and_nan_is_said() -> None:
    text = exposition("r", {"loss": float("nan")})
    assert text == '# HELP mmpt_loss Mean loss since the last record.\n# TYPE mmpt_loss gauge\nmmpt_loss{run="r"} NaN\n'


def test_http_serves_the_file_on_the_loopback_interface_alone(tmp_path: Path) -> None:
    port = dist.free_port()
    serving = Prometheus(tmp_path, port, Events(tmp_path, on=True))
    try:
        serving.write(7, RECORD)
        assert serving._server is not None and serving._server.server_address[0] == "127.0.0.1"
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            assert answer.read().decode() == (tmp_path / "metrics.prom").read_text()
    finally:
        serving.close()
    with socket.socket() as again:
        assert again.connect_ex(("127.0.0.1", port)) != 0, "closed with the run"


def test_a_port_that_is_taken_is_said_and_the_run_goes_on(tmp_path: Path, capsys) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        writers = Writers(tmp_path, 0, 10, Events(tmp_path, on=True), port)
        writers.record(1, RECORD | {"grad_norm": 1.0}, ())
        writers.close()
    assert f"run.prometheus_port={port}: Address already in use" in capsys.readouterr().out
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 1
    assert 'mmpt_step_total{run="' in (tmp_path / "metrics.prom").read_text()
