"""What 64 nodes would be given, compared with committed text, character by character.

`python -m tests.launcher.test_golden` writes the files anew; look at the difference before you commit it.
"""

import os
import sys
from pathlib import Path

import pytest

from launcher import dry_run
from launcher.arguments import parse_launch
from launcher.launch import plan

ROOT, GOLDEN = Path(__file__).parents[2], Path(__file__).parent / "golden"
LAUNCHES = {
    "slurm-h100-64-nodes": ["slurm-h100", "--nodes", "64", "--time", "2-00:00:00", "--account", "vision"],
    "slurm-a100-60-to-64-nodes": ["slurm-a100", "--nodes", "60-64", "--exclude", "gpu017,gpu018", "--qos", "long"],
    "slurm-a100-sweep": ["slurm-a100", "--nodes", "2", "--name", "rates", "--sweep", "optim.lr=1e-3,3e-4"],
    "local": ["local", "--runs", "/scratch/mmpt-runs"],
}
SHELL = {"SBATCH_ACCOUNT": "other", "SLURM_JOB_ID": "5", "RANK": "0", "HOME": "/home/user"}


def printed(words: list[str]) -> str:
    """With this machine's interpreter and folder replaced."""
    request = parse_launch([*words, "--", "--recipe", "filip.vit_l14", "--data.shards", "/data/with space"]).request
    text = dry_run.shown(plan(request), SHELL)
    return text.replace(sys.executable, "/venv/bin/python").replace(str(ROOT), "/home/user/mmpt")


@pytest.mark.parametrize("name", LAUNCHES)
def test_what_would_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.chdir(ROOT)
    assert printed(LAUNCHES[name]) == (GOLDEN / f"{name}.txt").read_text()


if __name__ == "__main__":
    os.environ["SCRATCH"] = "/scratch"
    for name, words in LAUNCHES.items():
        (GOLDEN / f"{name}.txt").write_text(printed(words))
