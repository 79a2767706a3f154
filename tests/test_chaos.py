"""Whatever strikes a run, it ends as the run that nothing struck, and has trained on every sample once per epoch."""

from collections import Counter
from pathlib import Path

import pytest

from mmpt import exit_codes
from tests import chaos
from tests.forks import Forks
from tests.test_train import arguments, losses, weights

BATCH, EPOCH = 16, 96


@pytest.mark.slow
def test_a_run_endures_one_fault_of_each_kind(forks: Forks, scenes: Path, tmp_path: Path) -> None:
    """benchmarks/chaos.py is the same with fifty and more."""
    steps = 60
    flags = arguments(scenes, tmp_path / "alone", run__samples=BATCH * steps, run__checkpoint_every_steps=3)
    run = forks.start(flags, chaos.RANKS)
    assert run.wait() == [exit_codes.FINISHED] * 2, run.output()
    outcome = chaos.endure(forks, flags, tmp_path, faults=len(chaos.FAULTS), seed=7)
    assert sum(outcome.faults.values()) == len(chaos.FAULTS), outcome
    assert weights(tmp_path / "struck") == weights(tmp_path / "alone"), outcome
    assert losses(tmp_path / "struck") == losses(tmp_path / "alone"), outcome
    delivered = chaos.delivered(tmp_path)
    assert sorted(delivered) == list(range(BATCH * steps))
    for epoch in range(BATCH * steps // EPOCH):
        keys = Counter(delivered[position] for position in range(epoch * EPOCH, (epoch + 1) * EPOCH))
        assert len(keys) == EPOCH and set(keys.values()) == {1}
