"""Where the time of a step goes when one rank is slow in the backward: the others wait in ZeRO's collectives."""

import time
from typing import Literal

import pytest
import torch

from mmpt import waits
from mmpt.data.device import Delivery
from mmpt.engine.build import EngineConfig, build
from mmpt.engine.metrics import Metrics
from mmpt.engine.optim import OptimConfig
from mmpt.engine.step import train_step
from tests.engine.toy import batches, toy
from tests.ranks import run

SLOW_SECONDS, STEPS = 0.3, 2
STAGES: tuple[Literal[0, 2, 3], ...] = (0, 2, 3)


def slow_in_the_backward_on_rank_1(rank: int, world_size: int) -> list[tuple[dict[str, float], float, int]]:
    """For each stage: the record, the seconds of this rank in ZeRO's collectives, and how many of them there were."""
    found = []
    for stage in STAGES:
        method, device = toy(), torch.device("cpu")
        if rank == 1:
            method.image[0].register_full_backward_hook(lambda *_: time.sleep(SLOW_SECONDS))
        optim = OptimConfig(lr=0.02)
        engine = build(
            method, EngineConfig(zero_stage=stage, precision="fp32", keep_whole_elements=40), optim, 8, device
        )
        metrics = Metrics(16, device)
        zero = list[waits.Wait]()
        for batch in batches(16, STEPS, rank, world_size):
            began = time.perf_counter()
            result, terms = train_step(engine, [batch], optim.lr)
            zero += [wait for wait in waits._passed if wait.zero and wait.began >= began]
            metrics.add(result, terms, 0.0, time.perf_counter() - began, Delivery([batch], 0, (0.0,), []))
        found.append((metrics.record(), sum(wait.seconds() for wait in zero), len(zero)))
    return found


@pytest.mark.slow
def test_waits_in_zeros_collectives_are_told_from_work_at_every_stage() -> None:
    waiting_rank, slow_rank = run(slow_in_the_backward_on_rank_1, 2)
    for stage, (record, waited, count), (_, slow_waited, _) in zip(STAGES, waiting_rank, slow_rank, strict=True):
        slept = SLOW_SECONDS * STEPS
        assert waited > 0.7 * slept and slow_waited < waited - 0.7 * slept and count >= STEPS, (stage, waited)
        assert record["straggler_rank"] == 1 and record["straggler_factor"] > 2, stage
        assert 0.2 < record["communication_share/zero"] < 0.6, "about one of two ranks"
        assert 0 < record["communication_share/method"] < record["communication_share/zero"]
