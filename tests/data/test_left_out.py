"""Stretches that are left out, against a list of positions."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from mmpt.data.left_out import delivered, delivered_until, go_on, is_left_out, join, step_of

STEPS = 40


@given(st.integers(1, 4), st.lists(st.tuples(st.integers(0, 20), st.integers(1, 5)), max_size=5))
def test_delivery_jumps_over_them(batch: int, cuts: list[tuple[int, int]]) -> None:
    left_out: list[list[int]] = []
    for first, length in cuts:
        left_out = join(left_out, first * batch, (first + length) * batch)
    gone = {p for first, length in cuts for p in range(first * batch, (first + length) * batch)}
    assert all(a[1] < b[0] for a, b in itertools.pairwise(left_out)), "in order, and none touch"
    assert {p for first, last in left_out for p in range(first, last)} == gone

    position, batches = go_on(0, left_out), []
    for _ in range(STEPS):  # as a loader does
        batches.append(list(range(position, position + batch)))
        position = go_on(position + batch, left_out)
    wanted = [p for p in range((STEPS + 30) * batch) if p not in gone][: STEPS * batch]
    assert [p for own in batches for p in own] == wanted
    for step, own in enumerate(batches, 1):
        assert {step_of(p, batch, left_out) for p in own} == {step}
        assert not any(is_left_out(p, left_out) for p in own)
        assert delivered_until(step, batch, left_out) == own[-1] + 1
    start, stop = (delivered_until(n, batch, left_out) for n in (5, 17))
    assert [p for a, b in delivered(start, stop, left_out) for p in range(a, b)] == [
        p for b in batches[5:17] for p in b
    ]
