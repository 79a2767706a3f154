"""How an attempt ended, and whether the run starts again: tables, from what srun really prints."""

import itertools
from collections.abc import Sequence

import pytest

from launcher import ending
from launcher.ending import Ending, ending_of, first_ending
from launcher.record import Attempt
from launcher.restart import Situation, decide
from mmpt import exit_codes

KILLED = """srun: error: n1: task 1: Killed
srun: launch/slurm: _step_signal: Terminating StepId=3.0
srun: error: n0: task 0: Terminated
srun: Force Terminated StepId=3.0
"""
SAVED = """srun: error: n1: tasks 2-3: Exited with exit code 75
srun: launch/slurm: _step_signal: Terminating StepId=5.0
srun: error: n0: task 1: Exited with exit code 75
slurmstepd-n0: error: *** STEP 5.0 ON n0 CANCELLED AT 2026-11-25T17:37:33 ***
srun: error: n0: task 0: Exited with exit code 75
"""
UNFIT = "srun: error: gpu017: task 130: Exited with exit code 77\nsrun: error: gpu[001-016]: tasks 0-127: Killed\n"
LOST = """srun: error: n0: task 0: Exited with exit code 1
srun: launch/slurm: _step_signal: Terminating StepId=5.0
srun: error: Node failure on n1
"""


@pytest.mark.parametrize(
    ("messages", "status", "expected"),
    [
        ("", 0, Ending(0)),
        (KILLED, 137, Ending(137, "1", "n1")),
        (SAVED, 75, Ending(75, "2-3", "n1")),
        (UNFIT, 137, Ending(77, "130", "gpu017")),
        (LOST, 1, Ending(1, host="n1", node_failed=True)),
        ("srun: error: n0: task 0: Segmentation fault (core dumped)\n", 139, Ending(139, "0", "n0")),
        ("srun: error: n0: task 3: Out Of Memory\n", 137, Ending(137, "3", "n0")),
        ("srun: error: n0: task 3: User defined signal 2\n", 140, Ending(140, "3", "n0")),
        ("srun: error: Unable to create step for job 7: Invalid generic resource (gres) specification\n", 1, Ending(1)),
        ("slurmstepd: error: execve(): python: No such file or directory\n", 2, Ending(2)),
    ],
)
def test_the_first_rank_to_end_is_the_cause(messages: str, status: int, expected: Ending) -> None:
    """srun's own status is the largest of all tasks', often that of those it killed itself."""
    assert ending_of(messages, status) == expected


def test_local_ranks_in_the_order_in_which_they_ended() -> None:
    assert first_ending([(1, -9), (0, 1)], "here") == Ending(137, "1", "here")
    assert first_ending([(0, 0), (1, 75)], "here") == Ending(75, "1", "here")
    assert first_ending([(0, 0), (1, 0)], "here") == Ending(0)


def test_the_statuses_are_those_of_train_py() -> None:
    assert ending.SAVED == exit_codes.REQUEUE and ending.HUNG == exit_codes.HUNG
    assert ending.BAD_NODE == exit_codes.UNFIT_NODE and ending.NOT_FINITE == exit_codes.NOT_FINITE
    assert ending.WRONG_COMMAND == exit_codes.WRONG_USE


def test_endings_in_words() -> None:
    assert Ending(137, "3", "n1").told() == "rank 3 on n1 was killed by signal 9 (Killed)"
    assert Ending(75, "2-3", "n1").told() == "ranks 2-3 on n1 saved and made way"
    assert Ending(1, host="n1", node_failed=True).told() == "node n1 was lost"
    assert Ending(1).told() == "a rank failed" and Ending(9).told() == "a rank ended with status 9"


def attempts(*facts: tuple[int, int], action: str = "restart") -> list[Attempt]:
    """(status, highest step) of each."""
    return [Attempt(0.0, "7", i, status, "", "", step, action, "") for i, (status, step) in enumerate(facts)]


def situation(how: Ending, step: int = 10, earlier: Sequence[Attempt] = (), **changes) -> Situation:
    facts = {"stop_asked": False, "outside": "", "restarts": len(earlier)} | changes
    return Situation(ending=how, step=step, earlier=earlier, max_restarts=9, max_fruitless_restarts=2, **facts)


@pytest.mark.parametrize(
    ("now", "action", "said"),
    [
        (situation(Ending(0)), "finished", ""),
        (situation(Ending(75, "0")), "restart", "made way"),
        (situation(Ending(140, "0")), "restart", "signal 12"),
        (situation(Ending(76, "0")), "restart", "stacks"),
        (situation(Ending(137, "1", "n1")), "restart", "rank 1 on n1 was killed"),
        (situation(Ending(1, "1", "n1")), "restart", "failed"),
        (situation(Ending(1, "1", "n1"), step=0), "failed", "before the run's first step"),
        (situation(Ending(77, "1", "n1"), step=0), "restart", "unfit"),
        (situation(Ending(2)), "failed", "command line"),
        (situation(Ending(78)), "failed", "not finite"),
        (situation(Ending(75), stop_asked=True), "stopped", "as asked"),
        (situation(Ending(137), stop_asked=True), "stopped", "as asked"),
        (situation(Ending(75), outside="cancelled"), "stopped", "scancel"),
        (situation(Ending(75), outside="requeued"), "leave", "by itself"),
        (situation(Ending(143), outside="time limit"), "restart", "time limit came before"),
        (situation(Ending(75), restarts=9), "failed", "max_restarts"),
    ],
)
def test_what_follows(now: Situation, action: str, said: str) -> None:
    decision = decide(now)
    assert decision.action == action and said in decision.reason, decision


def test_blame_falls_on_the_node_only_where_it_may_be_the_nodes_fault() -> None:
    blamed = {status: decide(situation(Ending(status, "1", "n1"))).blame for status in (1, 75, 76, 77, 137, 139, 143)}
    assert blamed == {1: "", 75: "", 76: "", 77: "n1", 137: "n1", 139: "n1", 143: ""}
    assert decide(situation(Ending(77, "1", "n1"))).exclude and not decide(situation(Ending(137, "1", "n1"))).exclude
    assert decide(situation(Ending(1, host="n1", node_failed=True))).exclude


def test_crash_loop_breaker() -> None:
    """Crashes go on as long as they reach new steps; three in a row that do not are enough."""
    history: list[Attempt] = []
    for step in (5, 9, 12, 30):
        assert decide(situation(Ending(1), step, history)).action == "restart"
        history += attempts((1, step))
    for expected in ("restart", "restart", "failed"):
        decision = decide(situation(Ending(1), 30, history))
        assert decision.action == expected, history
        history += attempts((1, 30))
    assert "3 attempts in a row have not got past step 30" in decision.reason

    started_again = attempts((1, 30), (1, 30)) + attempts((1, 30), action="failed")
    assert decide(situation(Ending(1), 30, started_again, restarts=0)).action == "restart", "somebody looked into it"


def test_preemption_does_not_count_against_a_run() -> None:
    """Ten times taken off its nodes before a step: the job goes on; but it does not launder a crash loop."""
    assert decide(situation(Ending(75), 30, attempts(*[(75, 30)] * 10), restarts=5)).action == "restart"
    mixed = attempts((1, 30), *itertools.chain.from_iterable([[(75, 30), (1, 30)]] * 2))
    assert decide(situation(Ending(1), 30, mixed, restarts=5)).action == "failed"
