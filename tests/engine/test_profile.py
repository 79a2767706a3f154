"""The profile of a run: a trace that opens, and a page whose phases are those that ran."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmpt import dist
from mmpt.engine.build import EngineConfig, build
from mmpt.engine.optim import OptimConfig
from mmpt.engine.profile import Profile, check_steps, summary
from mmpt.engine.step import train_step
from tests.engine.toy import batches, toy
from tests.ranks import run

CONFIG, OPTIM = EngineConfig(zero_stage=1, precision="fp32"), OptimConfig(lr=0.01)


def profiled(rank: int, world_size: int, folder: Path) -> list[torch.Tensor]:
    """Steps 2 and 3 of five; the weights with and without."""
    out = []
    for steps in ((2, 3), ()):
        torch.manual_seed(0)
        engine = build(toy(), CONFIG, OPTIM, 8, torch.device("cpu"))
        profile = Profile(folder, steps, engine.method, engine.device)
        for step, batch in enumerate(batches(16, 5, rank, world_size), 1):
            profile.before(step)
            train_step(engine, batch.split(2), OPTIM.lr)
            assert bool(profile._hooks) == (rank == 0 and bool(steps) and 2 <= step <= 3), "hooks go when it is over"
        profile.close(6)
        out.append(torch.cat([p.detach().flatten() for p in engine.method.parameters()]))
    dist.barrier()
    return out


@pytest.mark.slow
def test_a_page_and_a_trace_of_the_steps_asked_for(tmp_path: Path) -> None:
    for with_profile, without in run(profiled, 2, tmp_path):
        assert with_profile.equal(without), "looking changes nothing"
    names = {event.get("name") for event in json.loads((tmp_path / "profile/trace.json").read_text())["traceEvents"]}
    assert {"mmpt: backward", "mmpt: image tower", "aten::mm"} <= names
    page = (tmp_path / "profile/profile.txt").read_text()
    assert page.startswith("steps 2 to 3 on rank 0, milliseconds per step")
    rows = {m[1].strip(): (float(m[2]), float(m[3])) for m in re.finditer(r"^(.+?) +([\d.]+) +([\d.]+)$", page, re.M)}
    calls = {name: count for name, (_, count) in rows.items()}
    assert calls["encode"] == 4 and calls["loss"] == 1, "two micro-batches, encoded twice, one loss for both"
    assert calls["backward"] == 3 and calls["optimizer"] == 1
    assert calls["of which image tower"] == calls["of which text tower"] == 4
    assert rows["encode"][0] >= rows["of which image tower"][0] > 0
    assert any("allreduce" in name or "all_reduce" in name for name in rows), "ranks talked"


def test_on_cuda_the_kernels_of_nccl_are_communication() -> None:
    """Rows as torch names them; times in microseconds, over two steps."""
    rows = [
        SimpleNamespace(key=key, count=4, cpu_time_total=host, self_cpu_time_total=host, self_device_time_total=device)
        for key, host, device in (
            ("mmpt: backward", 9000.0, 0.0), ("aten::mm", 500.0, 6000.0), ("c10d::allreduce_", 300.0, 0.0),
            ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 0.0, 2400.0),
        )
    ]  # fmt: skip
    communication = summary(rows, 1, 2, cuda=True).split("communication (device time)")[1].split("operators")[0]
    assert re.search(r"ncclDevKernel_AllReduce_Sum_bf16\S* +1\.20 +2\.0$", communication, re.M)
    assert "aten::mm" not in communication


def test_steps_that_cannot_be_are_refused() -> None:
    for steps in ((3,), (0, 2), (5, 4), (1, 2, 3)):
        with pytest.raises(ValueError, match=r"run\.profile_steps wants a first and a last step"):
            check_steps(steps)
    check_steps(())
    check_steps((4, 4))
