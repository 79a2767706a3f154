"""Run a function on W gloo ranks, in two lines:

    def check(rank, world_size): ...          # a top-level function; assert freely
    run(check, world_size=2)

Each rank is a fresh process with its own process group on a free loopback port. A rank that raises fails the test with
its traceback and the others are ended; a rank that hangs is ended after `timeout_seconds`, with the stacks of all.
"""

import faulthandler
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

from mmpt import dist


def _enter(function: Callable, rank: int, world_size: int, port: int, folder: str, timeout_seconds: float, args: tuple):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    faulthandler.dump_traceback_later(timeout_seconds * 0.9, exit=True)
    torch.set_num_threads(1)
    try:
        dist.init(timeout_seconds)
        result = function(rank, world_size, *args)
        torch.save(result, Path(folder) / f"result-{rank}.pt")
        dist.shutdown()
    except BaseException:
        (Path(folder) / f"error-{rank}.txt").write_text(traceback.format_exc())
        sys.stdout.flush()
        os._exit(1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # library threads still running at interpreter exit abort a rank now and then


def run(function: Callable, world_size: int, *args: Any, timeout_seconds: float = 180.0) -> list[Any]:
    """Call function(rank, world_size, *args) on W ranks and return their results in rank order."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        port = dist.free_port()
        processes = [
            context.Process(target=_enter, args=(function, rank, world_size, port, folder, timeout_seconds, args))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout_seconds
        try:
            while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
                if any(process.exitcode for process in processes):
                    time.sleep(1.0)  # the others may be about to report the same error
                    break
                time.sleep(0.02)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
        errors = sorted(Path(folder).glob("error-*.txt"))
        if errors:
            raise AssertionError("\n".join(f"--- {error.stem}\n{error.read_text()}" for error in errors))
        codes = [process.exitcode for process in processes]
        assert codes == [0] * world_size, f"ranks ended with {codes}; a negative code or 1 without a report is a hang"
        return [torch.load(Path(folder) / f"result-{r}.pt", weights_only=False) for r in range(world_size)]
