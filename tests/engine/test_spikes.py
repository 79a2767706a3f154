"""What is a spike, against scipy; and which losses count."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import median_abs_deviation

from mmpt.engine.spikes import FEWEST_LOSSES, SpikeConfig, Spikes, deviation

LOSSES = st.lists(st.floats(0.1, 10), min_size=FEWEST_LOSSES, max_size=50)


@given(LOSSES, st.floats(0, 1000))
def test_deviations_are_those_of_scipy(recent: list[float], loss: float) -> None:
    median = (
        sorted(recent)[len(recent) // 2] if len(recent) % 2 else sum(sorted(recent)[len(recent) // 2 - 1 :][:2]) / 2
    )
    scale = max(float(median_abs_deviation(recent, scale="normal")), 0.01 * median)
    assert deviation(loss, recent) == pytest.approx((loss - median) / scale, rel=1e-3, abs=1e-6)


def test_few_losses_and_losses_that_are_not_finite_are_no_spikes() -> None:
    assert deviation(1e9, [1.0] * (FEWEST_LOSSES - 1)) == 0
    assert deviation(math.nan, [1.0] * 50) == deviation(math.inf, [1.0] * 50) == 0
    assert deviation(1.05, [1.0] * 50) == pytest.approx(5), (
        "where nothing varied, a hundredth of the median counts as 1"
    )


def test_each_policy_judges_where_it_should_and_a_spike_does_not_hide_the_next() -> None:
    for policy in ("none", "skip", "rollback"):
        recent = [1.0, 1.1] * 10
        spikes = Spikes(SpikeConfig(policy, deviations=5, window=20), recent)
        if policy == "skip":
            assert spikes.veto is not None
            assert [spikes.veto(loss) for loss in (1.1, 9.0, math.nan, 9.0, 1.0)] == [False, True, False, True, False]
            spikes.at_record(9.0)
            assert not spikes.spike and recent[-4:] == [1.1, 9.0, 9.0, 1.0] and len(recent) == 20
            continue
        assert spikes.veto is None
        assert spikes.at_record(9.0)["loss_deviation"] > 50
        assert bool(spikes.spike) == (policy == "rollback") and recent[-1] == 9.0


@pytest.mark.parametrize("wrong", [{"deviations": 0}, {"window": 3}, {"max_rollbacks": -1}, {"left_out_steps": -2}])
def test_settings_that_make_no_sense_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        SpikeConfig("skip", **wrong)
