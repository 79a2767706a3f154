"""`mmpt bench step`: a real step of any recipe, measured after a warm-up, and wrong numbers in one line."""

import re

import pytest
import torch

from mmpt import cli, cli_bench
from mmpt.cli_bench import lines, measure
from mmpt.recipe import load
from tests.ranks import run


def measured(rank: int, world_size: int) -> list[tuple[str, cli_bench.Measured, list[str]]]:
    out = []
    for name in ("filip.tiny", "uniter.tiny"):
        found = measure(load(name), steps=3, pairs=4)
        out.append((name, found, lines(load(name), found)))
    return out


@pytest.mark.slow
def test_a_step_is_measured_for_methods_planned_and_counted() -> None:
    for name, found, said in run(measured, 1)[0]:
        assert len(found.step_seconds) == 3 and min(found.step_seconds) > 0, name
        assert found.speed.keys() == {"model_tflops_per_second_per_device"}, "a CPU has no peak, hence no MFU"
        assert found.speed["model_tflops_per_second_per_device"] > 0 and found.memory_gib > 0
        rate = re.search(r"pairs per second +([\d.]+)", "\n".join(said))
        assert rate and float(rate[1]) == pytest.approx(4 / sorted(found.step_seconds)[1], abs=0.0501), "as printed"
        assert said[-1].split()[-2:] == ["peak", "unknown"] and found.pairs == 4


def test_wrong_numbers_are_one_line(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["bench", "step", "--recipe", "filip.tiny", "--steps", "0"]) == 1
    assert "--steps (0) and --micro-batch (None) are 1 or more" in capsys.readouterr().err
    assert cli.main(["bench", "step", "--recipe", "filip.tiny", "--engine.zero_stag", "0"]) == 1
    assert "did you mean 'engine.zero_stage'" in capsys.readouterr().err
    assert not torch.distributed.is_initialized()
