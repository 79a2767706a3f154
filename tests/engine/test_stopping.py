"""Signals and the clock, on one rank: what it votes for."""

import os
import signal
import time

import pytest

from mmpt.engine.stopping import SIGNALS, Stopping, job_end


def test_the_end_of_the_job_is_read_from_the_environment() -> None:
    assert job_end({}, 100.0) == float("inf")
    assert job_end({"SLURM_JOB_END_TIME": "300", "MMPT_DEADLINE": "200"}, 100.0) == 200
    assert job_end({"SLURM_JOB_END_TIME": "300", "MMPT_DEADLINE": ""}, 100.0) == 300
    with pytest.raises(ValueError, match="MMPT_DEADLINE should be a unix time in seconds, got 'soon'"):
        job_end({"MMPT_DEADLINE": "soon"}, 100.0)
    with pytest.raises(ValueError, match="300 lies 10 seconds in the past"):
        job_end({"SLURM_JOB_END_TIME": "300"}, 310.0)


def test_the_clock_stops_in_time_and_knows_when_it_is_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    end = time.time() + 1000
    monkeypatch.setenv("MMPT_DEADLINE", str(end))
    stopping = Stopping(grace_seconds=30, stop_before_seconds=60)
    try:
        assert stopping.vote(10, end - 71) == (False, False) and stopping.reason == ""
        assert stopping.vote(10, end - 69) == (True, False)
        assert stopping.vote(10, end - 9) == (True, True), "saving would not be over in time"
        monkeypatch.setattr(time, "time", lambda: end - 69)
        assert stopping.reason == "the end of the job is near"
    finally:
        stopping.close()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_remembered_and_the_grace_time_counts_from_the_first(number: int) -> None:
    before = signal.getsignal(number)
    stopping = Stopping(grace_seconds=30, stop_before_seconds=60)
    try:
        assert stopping.vote(10, time.time()) == (False, False)
        os.kill(os.getpid(), number)
        told = time.time()
        assert stopping.reason == signal.Signals(number).name
        assert stopping.vote(10, told + 19) == (True, False)
        os.kill(os.getpid(), number)
        assert stopping.vote(10, told + 21) == (True, True)
    finally:
        stopping.close()
    assert signal.getsignal(number) == before
