"""Killed with -9 twenty times at random moments and continued on 1, 2 and 4 ranks: every epoch exactly once."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.data.killed_run import GLOBAL_BATCH, KILLS, STEPS

SAMPLES = 97


def logged(out: Path) -> dict[int, dict[int, list[list[str]]]]:
    """For each attempt, for each step, the keys of each rank; a line that the kill cut short is left out."""
    attempts: dict[int, dict[int, list[list[str]]]] = {}
    for path in sorted(out.glob("attempt-*.jsonl")):
        steps = attempts.setdefault(int(path.name[8:10]), {})
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                record = json.loads(line)
                steps.setdefault(record["step"], []).append(record["keys"])
    return attempts


@pytest.mark.slow
def test_the_key_log_is_each_epoch_once(shards: str, tokenizer: str, tmp_path: Path):
    command = [sys.executable, "-m", "tests.data.killed_run", shards, tokenizer, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == str(KILLS), done.stdout + done.stderr
    attempts = logged(tmp_path)
    assert len(attempts) == KILLS + 1
    assert {len(ranks) for steps in attempts.values() for ranks in steps.values()} >= {1, 2, 4}
    batches: dict[int, list[str]] = {}
    repeated = 0
    for steps in attempts.values():
        for step, ranks in steps.items():
            keys = [key for rank in ranks for key in rank]
            if len(keys) == GLOBAL_BATCH:  # all ranks got as far
                repeated += step in batches
                assert batches.setdefault(step, keys) == keys, "the same batch on any world size, in every attempt"
    assert sorted(batches) == list(range(STEPS)) and repeated > 0
    log = [key for step in range(STEPS) for key in batches[step]]
    whole = STEPS * GLOBAL_BATCH // SAMPLES
    counts = Counter(log)
    assert len(counts) == SAMPLES and set(counts.values()) <= {whole, whole + 1}
    assert sum(count == whole + 1 for count in counts.values()) == STEPS * GLOBAL_BATCH - whole * SAMPLES
