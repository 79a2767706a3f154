"""Packing pairs in several processes, in order: decoding is what takes the time, and the shards are written by one."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context

from data_tools.pack_shards import Packed
from data_tools.pack_sources import Pair

WORTH_PROCESSES = 512
CHUNK = 32
CHUNKS_AHEAD_PER_WORKER = 2


def pack_pairs(pairs: Iterable[Pair], pack: Callable[[Pair], Packed], workers: int) -> Iterator[tuple[Pair, Packed]]:
    """Each pair with what is made of it, in order; what comes does not depend on the number of workers.

    Holds a few chunks of images at a time. Raises ValueError when a worker dies.
    """
    rest = iter(pairs)
    first = list(islice(rest, WORTH_PROCESSES))
    if workers < 2 or len(first) < WORTH_PROCESSES:
        for pair in first:
            yield pair, pack(pair)
        for pair in rest:
            yield pair, pack(pair)
        return
    chunks = [first[i : i + CHUNK] for i in range(0, len(first), CHUNK)]
    with ProcessPoolExecutor(workers, mp_context=get_context("forkserver")) as pool:
        waiting = deque()
        try:
            while chunk := chunks.pop(0) if chunks else list(islice(rest, CHUNK)):
                waiting.append((chunk, pool.submit(_pack_chunk, chunk, pack)))
                if len(waiting) > CHUNKS_AHEAD_PER_WORKER * workers:
                    done, packed = waiting.popleft()
                    yield from zip(done, packed.result(), strict=True)
            for done, packed in waiting:
                yield from zip(done, packed.result(), strict=True)
        except BrokenProcessPool as error:
            raise ValueError("a packing process died (out of memory?): try fewer --workers") from error


def _pack_chunk(pairs: list[Pair], pack: Callable[[Pair], Packed]) -> list[Packed]:
    return [pack(pair) for pair in pairs]
