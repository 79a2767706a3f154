"""The first losses of every method at its test size, as they were: a change that moves one shows in a review.

`python -m tests.methods.test_golden` writes them anew.
"""

import json
from pathlib import Path

import pytest
import torch

from mmpt.methods.method import loss_of
from tests.methods.tiny import CONFIGS, batch, build

GOLDEN = Path(__file__).with_name("golden.json")
PAIRS, STEPS = 6, 4


def curve(name: str) -> list[float]:
    method = build(name)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.01)
    losses = []
    for step in range(STEPS):
        data = batch(name, PAIRS, 0, PAIRS, seed=step)
        loss = loss_of(method("terms", data), method.counts(data), 1)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step()
    return losses


@pytest.mark.parametrize("name", CONFIGS)
def test_the_curve_is_as_it_was(name: str) -> None:
    assert curve(name) == pytest.approx(json.loads(GOLDEN.read_text())[name], rel=1e-4)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({name: curve(name) for name in CONFIGS}, indent=1) + "\n")
