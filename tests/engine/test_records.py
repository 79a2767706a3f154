"""What operators read: reduced once, complete, and never twice through the same step."""

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from mmpt import dist
from mmpt.data.device import Delivery
from mmpt.data.quarantine import BadSample
from mmpt.engine.build import StepResult
from mmpt.engine.events import Events
from mmpt.engine.layout import PAGE
from mmpt.engine.metrics import Metrics, _percentile
from mmpt.engine.writers import TENSORBOARD_GROUPS, Writers, drop_records_after
from mmpt.methods.method import Term
from tests.engine.toy import batches
from tests.ranks import run

WANTED = {
    "loss", "contrastive", "logit_scale", "grad_norm", "samples_per_second", "samples_per_second_per_device",
    "data_wait_share", "step_seconds_p50", "step_seconds_p95", "step_seconds_max", "memory_gib", "skipped_steps",
    "straggler_factor", "straggler_rank", "communication_share/method", "communication_share/zero",
    "quarantine_rate", "mean_text_tokens",
}  # fmt: skip


BAD = BadSample("a.tar", "key", 0, "decode", 0, "")


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
            StepResult(step != 1, 2.0),
            terms(6.0 * (rank + 1), 2.0 * (rank + 1) ** 2),
            0.001,
            0.01 * (rank + 1),
            Delivery(batches(4, 1), 0, (0.0,), [BAD] * rank),
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
    assert record["quarantine_rate"] == pytest.approx(3 / 24), "one in each step of eight pairs"
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
        metrics.add(
            StepResult(True, 1.0),
            terms(1.0, 1.0),
            waited,
            time.perf_counter() - began,
            Delivery(batches(4, 1), 0, (0.0,), []),
        )
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


def third_attempt(run_dir: Path) -> Events:
    for _ in range(2):
        Events(run_dir, on=True).add("preflight", 0, {})
    return Events(run_dir, on=True)


def test_writers_fill_jsonl_and_tensorboard(tmp_path: Path, capsys) -> None:
    writers = Writers(tmp_path, 0, 10, third_attempt(tmp_path), 0)
    writers.text("recipe", "method: clip", 0)
    picture = np.zeros((4, 6, 3), np.uint8)
    for step in (1, 2):
        writers.record(step, {"loss": 1.0 / step, "logit_scale": 14.0}, ("loss",))
        writers.record(step, {"eval/x/R@1": 0.5}, ())
        writers.images({"eval/x/gallery": picture}, step)
    writers.close()
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][2]["loss"] == 0.5
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = {"train/loss", "terms/logit_scale", "eval/x/R@1", "system/restarts"}
    assert set(events.Tags()["scalars"]) == scalars and events.Tags()["images"] == ["eval/x/gallery"]
    assert [e.value for e in events.Scalars("train/loss")] == [1.0, 0.5]
    assert [e.value for e in events.Scalars("system/restarts")] == [2.0, 2.0]
    assert (events.Images("eval/x/gallery")[0].width, events.Images("eval/x/gallery")[0].height) == (6, 4)
    assert "step 2  loss 0.5" in capsys.readouterr().out and dist.rank() == 0


def page_read_back(folder: Path) -> dict[str, list[str]]:
    """Regular expressions by chart, as TensorBoard's own plugin finds them in the event file."""
    events = EventAccumulator(str(folder))
    events.Reload()
    tensor = events.Tensors("custom_scalars__config__")[-1].tensor_proto
    page = layout_pb2.Layout.FromString(tensor.string_val[0])  # pyright: ignore[reportAttributeAccessIssue]
    return {chart.title: list(chart.multiline.tag) for category in page.category for chart in category.chart}


def test_the_page_shows_every_record_where_it_belongs(tmp_path: Path) -> None:
    Writers(tmp_path, 0, 10, Events(tmp_path, on=True), 0).close()
    charts = page_read_back(tmp_path / "tensorboard")
    assert {title for charts in PAGE.values() for title in charts} == charts.keys()

    def shown(tag: str) -> list[str]:
        return [title for title, found in charts.items() if any(re.match(one, tag) for one in found)]

    for name, title in {
        "train/loss": "loss", "terms/contrastive": "terms of the loss", "terms/logit_scale": "logit scale",
        "terms/accuracy_i2t": "accuracy within the batch", "train/grad_norm": "gradient norm",
        "grad_norm/image": "gradient norm by part",
        "communication_share/zero": "share of time in collectives", "system/restarts": "restarts",
        "system/samples_per_second": "pairs per second",
        "system/samples_per_second_per_device": "pairs per second and device",
        "eval/coco/val/image_to_text_R@5": "image to text recall", "eval/coco/val/text_to_image_R@1":
        "text to image recall", "eval/a/b/top1": "zero-shot accuracy",
        "eval/a/b/twin_i2t": "everything else",
    }.items():  # fmt: skip
        assert shown(name) == [title], name
    for name, group in TENSORBOARD_GROUPS.items():
        if name not in ("samples", "checkpoint_bytes"):
            assert len(shown(f"{group}/{name}")) == 1, name


def test_a_restart_says_how_the_attempt_before_it_ended(tmp_path: Path) -> None:
    def next_attempt(*told: tuple[str, dict]) -> str:
        events = Events(tmp_path, on=True)
        end = events.last_end
        events.add("preflight", 0, {"ok": True})
        for event, facts in told:
            events.add(event, 7, facts)
        return end

    assert next_attempt(("start", {}), ("save", {"seconds": 1.0})) == ""
    assert next_attempt(("resume", {}), ("crash", {"error": "no memory"})).startswith("ended without a word; the last")
    assert next_attempt(("signal", {"reasons": ["rank 0 (n1): SIGTERM"]}), ("save", {"seconds": 1}), ("stop", {})) == (
        "crash at step 7: no memory"
    )
    assert next_attempt(("resume", {}), ("stop", {"saved": True})) == "told to stop at step 7: rank 0 (n1): SIGTERM"
    assert next_attempt() == "ended as asked at step 7"
