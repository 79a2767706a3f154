"""Stretches of the endless order that a run has left out, after its loss went wrong on them.

Positions are those of mmpt/data/order.py. A stretch [first, last) is made of whole global batches; stretches are in
order and do not touch. So batch after batch the run still follows from one integer: at `first` it goes on at `last`.
"""

from collections.abc import Sequence

Stretches = Sequence[Sequence[int]]
"""(first, last) each."""


def go_on(position: int, left_out: Stretches) -> int:
    """Where delivery goes on when all before this position was delivered or left out."""
    return next((last for first, last in left_out if first <= position < last), position)


def delivered_until(steps: int, global_batch: int, left_out: Stretches) -> int:
    """The position that follows the first `steps` batches that were delivered."""
    position = steps * global_batch
    for first, last in left_out:
        if first < position:
            position += last - first
    return position


def step_of(position: int, global_batch: int, left_out: Stretches) -> int:
    """The step, from 1, whose batch held the sample at a position that was not left out."""
    earlier = sum(last - first for first, last in left_out if first <= position)
    return (position - earlier) // global_batch + 1


def delivered(start: int, stop: int, left_out: Stretches) -> list[tuple[int, int]]:
    """[start, stop) without what was left out."""
    kept, reached = [], start
    for first, last in left_out:
        if reached < first and reached < stop:
            kept.append((reached, min(first, stop)))
        reached = max(reached, last)
    return [*kept, (reached, stop)] if reached < stop else kept


def is_left_out(position: int, left_out: Stretches) -> bool:
    return any(first <= position < last for first, last in left_out)


def join(left_out: Stretches, first: int, last: int) -> list[list[int]]:
    """The stretches and one more; those that touch become one."""
    joined: list[list[int]] = []
    for begin, end in sorted([*map(tuple, left_out), (first, last)]):
        if joined and begin <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], end)
        else:
            joined.append([begin, end])
    return joined
