"""A run on two ranks that is struck by sixty random faults, beside the same run left alone.

    python benchmarks/chaos.py [--faults 60] [--seed 0]

Prints how often each fault struck and how attempts ended, and compares the final weights bit by bit, every record's
loss, and the key of the sample at every position. Status 1 where anything differs. See tests/chaos.py for the faults.
"""

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for tests/, which are no part of the installation

from data_tools.__main__ import main as mmpt_data
from tests import chaos
from tests.forks import Forks
from tests.test_train import arguments, losses, weights

SCENES, BATCH, STEPS_PER_FAULT = 96, 16, 10


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args()
    steps = parsed.faults * STEPS_PER_FAULT
    with tempfile.TemporaryDirectory() as name:
        forks, folder = Forks(), Path(name)
        mmpt_data(["scenes", str(folder / "data"), "--train", str(SCENES), "--held-out", "16", "--workers", "1"])
        mmpt_data(["tokenizer", str(folder / "data/train"), str(folder / "tokenizer"), "--kind", "wordpiece",
                   "--vocab-size", "256"])  # fmt: skip
        flags = arguments(folder, folder / "alone", run__samples=BATCH * steps, run__checkpoint_every_steps=3)
        assert forks.start(flags, chaos.RANKS).wait(600) == [0, 0]
        outcome = chaos.endure(forks, flags, folder, parsed.faults, parsed.seed)
        print(f"\n{sum(outcome.faults.values())} faults, {steps} steps, {outcome.attempts} attempts, "
              f"{outcome.seconds:.0f} s; damaged checkpoints passed over: {outcome.passed_over}")  # fmt: skip
        for name, count in outcome.faults.most_common():
            print(f"  {count:3} {name}")
        print("statuses of the two ranks at the end of an attempt:")
        for name, count in outcome.endings.most_common():
            print(f"  {count:3} {name}")
        keys = chaos.delivered(folder)
        epochs = [Counter(keys[p] for p in range(first, first + SCENES)) for first in range(0, BATCH * steps, SCENES)]
        checks = {
            "final weights, moments and random state are the same bytes": weights(folder / "struck")
            == weights(folder / "alone"),
            "every record's losses are the same numbers": losses(folder / "struck") == losses(folder / "alone"),
            f"all {BATCH * steps} positions were trained on": sorted(keys) == list(range(BATCH * steps)),
            f"each of {len(epochs)} epochs held each key once": all(
                len(epoch) == SCENES and set(epoch.values()) == {1} for epoch in epochs
            ),
        }
        for name, held in checks.items():
            print(f"{'yes' if held else 'NO '}  {name}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
