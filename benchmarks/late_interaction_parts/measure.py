"""Interleaved timing, and peaks of memory in processes of their own."""

import ctypes
import multiprocessing
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch


def now(device: str) -> float:
    """Seconds, after all that was asked of the device is done."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(steps: dict[str, Callable[[], tuple[float, ...]]], rounds: int) -> dict[str, list[tuple[float, ...]]]:
    """The times that each step returned, round by round, after two rounds to warm up. Other work on the machine then
    slows all alike."""
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, step in steps.items():
            found = step()
            if turn >= 2:
                times[name].append(found)
    return times


def quartiles(values: Sequence[float], digits: int = 0) -> str:
    """Median and, in brackets, the first and third quartile."""
    low, middle, high = quantiles(values, n=4)
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _status(field: str) -> int:
    """Bytes, of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def _answer(function: Callable[..., Any], args: tuple, pipe: Connection) -> None:
    pipe.send(function(*args))


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """What a top-level function returns in a new process, or None where that died (of too little memory, say)."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(function, args, sender))
    process.start()
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:
        answer = None
    process.join()
    return answer


def peak_bytes(step: Callable[[], object]) -> int:
    """What a step adds to this process's resident memory at its highest (Linux). Run the step small before: what
    libraries allocate once is not meant."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before
