"""Chunks on their way before a batch needs them: threads that warm the cache of this node."""

import queue
import threading
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress

from mmpt.data.remote.cache import ChunkCache, Range

REMEMBERED = 1 << 14


class FetchAhead:
    """Downloads chunks into the cache in the order given. Errors are left for the reader to meet.

    The threads end with the process that started them, whatever they are waiting for; what they leave half written is
    cleaned up by the next that uses the cache.
    """

    def __init__(self, cache: ChunkCache, threads: int, most_waiting: int):
        self._cache = cache
        self._waiting = queue.Queue[Range | None](most_waiting)
        self._asked: OrderedDict[Range, None] = OrderedDict()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def warm(self, wanted: Iterable[Range]) -> int:
        """Have these fetched, unless they were asked for of late; how many were put in line before it was full."""
        count = 0
        for chunk in wanted:
            if chunk in self._asked:
                self._asked.move_to_end(chunk)
                continue
            try:
                self._waiting.put_nowait(chunk)
            except queue.Full:
                break
            count += 1
            self._asked[chunk] = None
            if len(self._asked) > REMEMBERED:
                self._asked.popitem(last=False)
        return count

    def close(self) -> None:
        """Forget what waits and let the threads end after what they are at. Safe to call twice."""
        threads, self._threads = self._threads, []
        with suppress(queue.Empty):
            while threads:
                self._waiting.get_nowait()
        for _ in threads:
            self._waiting.put(None)

    def _work(self) -> None:
        while (chunk := self._waiting.get()) is not None:
            try:
                self._cache.fetch(chunk).close()
            except OSError:
                continue  # the reader will meet it, and says which sample it was after
