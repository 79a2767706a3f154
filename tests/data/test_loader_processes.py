"""The processes behind a loader: what happens when one is killed, what they leave behind, what they hold."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from mmpt.batch import Batch
from mmpt.data import workers
from mmpt.data.loader import DataConfig, build_loader
from mmpt.inputs import InputSpec
from tests.data.batches import GLOBAL_BATCH, VARIED


@pytest.fixture(scope="session")
def config(shards: str, tokenizer: str) -> DataConfig:
    return DataConfig(shards, tokenizer, workers=0, lanes=6, window_chunks=2, image=VARIED)


@pytest.mark.slow
def test_a_killed_worker_is_an_error_not_a_hang(config: DataConfig, inputs: InputSpec):
    loader = build_loader(replace(config, workers=2), inputs, 5, GLOBAL_BATCH, 0, 1)
    next(loader)
    for pid in loader.worker_pids():
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"data worker died") as caught:
        for _ in range(20):
            next(loader)
    assert "\n" not in str(caught.value)
    loader.close()


PROGRAM = """
import os, signal, sys
from mmpt.inputs import InputSpec
from mmpt.data.loader import DataConfig, build_loader
if __name__ == "__main__":
    config = DataConfig(sys.argv[1], sys.argv[2], workers=2)
    inputs = InputSpec(image_size=16, max_text_tokens=12, vocab_size=300)
    loader = build_loader(config, inputs, seed=0, global_batch=8, rank=0, world_size=1)
    next(loader)
    print(*loader.worker_pids(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def alive(pid: int) -> bool:
    """Running, not merely waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_workers_die_with_a_killed_training_process(config: DataConfig, tmp_path: Path):
    """Or they would hold the launcher's pipes open for ever. No shared memory is left either."""
    before = set(os.listdir("/dev/shm"))
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), config.shards, config.tokenizer]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        output, _ = process.communicate(timeout=60)  # returns when nobody holds the other end any more
    assert process.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in output.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a worker outlived its training process"
        time.sleep(0.05)
    while left := set(os.listdir("/dev/shm")) - before:
        assert time.monotonic() < deadline + 10, f"{left} is left in shared memory"
        time.sleep(0.05)


@pytest.mark.slow
def test_memory_is_flat_over_three_epochs(config: DataConfig, inputs: InputSpec):
    """After what grows once (caches, allocator), a pass over the data leaves no trace."""
    loader = build_loader(config, inputs, 5, 97, 0, 1)
    held = []
    for _ in range(4):
        for _ in range(30):  # thirty epochs at a time, for leaks to add up
            next(loader)
        held.append(psutil.Process().memory_info().rss)
    loader.close()
    assert max(held[1:]) - held[0] < 3 << 20, [f"{n / 1e6:.1f} MB" for n in held]


@pytest.mark.parametrize(
    "error", [ConnectionResetError("reset"), EOFError(), RuntimeError("DataLoader worker (pid 1) exited")]
)
def test_a_worker_that_dies_while_handing_over_is_the_same_error(error: Exception):
    def batches() -> Iterator[Batch]:
        raise error
        yield

    with pytest.raises(RuntimeError, match="a data worker died"):
        workers.take(batches())
