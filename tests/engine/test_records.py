"""What operators read: reduced once, complete, and never twice through the same step."""

import json
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmpt import dist
from mmpt.engine.build import StepResult
from mmpt.engine.metrics import Metrics, _percentile
from mmpt.engine.writers import Writers, drop_records_after
from mmpt.methods.method import Term
from tests.ranks import run

WANTED = {
    "loss", "contrastive", "logit_scale", "grad_norm", "samples_per_second", "samples_per_second_per_device",
    "data_wait_share", "step_seconds_p50", "step_seconds_p95", "step_seconds_max", "memory_gib", "skipped_steps",
    "straggler_factor", "straggler_rank",
}  # fmt: skip


def terms(total: float, count: float) -> dict[str, Term]:
    return {
        "contrastive": Term(torch.tensor(total), torch.tensor(count), 0.5),
        "logit_scale": Term(torch.tensor(14.0), torch.tensor(1.0), 0.0),
    }


def record_on(rank: int, world_size: int) -> dict[str, float]:
    metrics = Metrics(8, torch.device("cpu"))
    for step in range(3):
        time.sleep(0.01 * (rank + 1))
        metrics.add(
            StepResult(step != 1, 2.0), terms(6.0 * (rank + 1), 2.0 * (rank + 1) ** 2), 0.001, 0.01 * (rank + 1)
        )
    return metrics.record()


@pytest.mark.slow
def test_a_record_is_the_same_on_all_ranks_and_sums_before_it_divides() -> None:
    records = run(record_on, 2)
    assert records[0] == records[1] and records[0].keys() == WANTED
    record = records[0]
    assert record["contrastive"] == pytest.approx(3 * (6 + 12) / (3 * (2 + 8))), "sum over sum, not mean of means"
    assert record["loss"] == pytest.approx(0.5 * record["contrastive"]) and record["logit_scale"] == 14.0
    assert record["skipped_steps"] == 1 and record["step_seconds_p50"] == pytest.approx(0.02), "the slowest rank"
    assert record["samples_per_second_per_device"] == pytest.approx(record["samples_per_second"] / 2)


def slow_on_rank_1(rank: int, world_size: int, where: str) -> tuple[dict[str, float], str]:
    metrics = Metrics(8, torch.device("cpu"))
    for _ in range(3):
        began = time.perf_counter()
        if rank == 1 and where == "data":
            time.sleep(0.5)
        waited = time.perf_counter() - began
        time.sleep(0.55 if rank == 1 and where == "step" else 0.05)
        dist.gather(torch.ones(2, 2))
        metrics.add(StepResult(True, 1.0), terms(1.0, 1.0), waited, time.perf_counter() - began)
    time.sleep(0.1)
    dist.gather(torch.ones(2, 2))  # an evaluation, which is no part of any step
    return metrics.record(), metrics.straggler


def both_slow_ways(rank: int, world_size: int) -> list[tuple[dict[str, float], str]]:
    return [slow_on_rank_1(rank, world_size, where) for where in ("data", "step", "nowhere")]


@pytest.mark.slow
def test_the_rank_that_holds_the_others_up_is_named_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    results = run(both_slow_ways, 2)
    assert results[0] == results[1]
    (data, said_data), (step, said_step), (_, said_nothing) = results[0]
    for record in (data, step):
        assert record["straggler_rank"] == 1 and record["straggler_factor"] > 3
    assert said_data.startswith("slow: rank 1 on n7 took 1.") and "(1.5 s for data)" in said_data
    assert said_step.startswith("slow: rank 1 on n7 took 1.") and "(0.0 s for data)" in said_step
    assert said_nothing == ""


def test_percentiles() -> None:
    assert [_percentile([1, 2, 3, 4], q) for q in (0.25, 0.5, 0.95, 1.0)] == [1, 2, 4, 4]
    assert _percentile([5], 0.5) == 5


def test_records_after_the_checkpoint_are_dropped_with_a_half_written_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s, "loss": s}) + "\n" for s in (1, 2, 3, 4)) + '{"step": 5, "lo')
    drop_records_after(path, 3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    drop_records_after(tmp_path / "nothing", 3)
    assert not (tmp_path / "nothing").exists()


def test_writers_fill_jsonl_and_tensorboard(tmp_path: Path, capsys) -> None:
    writers = Writers(tmp_path, 0, 10)
    writers.text("recipe", "method: clip", 0)
    for step in (1, 2):
        writers.record(step, {"loss": 1.0 / step, "logit_scale": 14.0, "eval/x/R@1": 0.5}, ("loss",))
    writers.close()
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][1]["loss"] == 0.5
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "terms/logit_scale", "eval/x/R@1"}
    assert [e.value for e in events.Scalars("train/loss")] == [1.0, 0.5]
    assert "step 2  loss 0.5" in capsys.readouterr().out and dist.rank() == 0
