"""Best effort, for sources without counts: pipes, endless generators, anything that the webdataset library opens.

Nothing is known of such a source, so nothing is promised: its shards are drawn with replacement for ever, a sample may
come twice or never, and a run that stopped goes on with fresh draws. What cannot be read or used is still noted.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import count
from random import Random
from typing import Any

import numpy as np
from braceexpand import braceexpand
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.filters import _shuffle
from webdataset.gopen import gopen
from webdataset.shardlists import ResampledShards
from webdataset.tariterators import group_by_keys, tar_file_expander

from mmpt.batch import Batch
from mmpt.data.manifest import IMAGE_EXTENSIONS
from mmpt.data.permutation import hash_key
from mmpt.data.pipeline import Pair, Pipeline, assemble, make_pair
from mmpt.data.quarantine import BadSample
from mmpt.data.reader import RawSample
from mmpt.data.tar import BLOCK
from mmpt.data.tasks import task_of
from mmpt.data.workers import portable

SHUFFLED = 1000  # samples held per worker, from which the next is drawn
STREAM = 5  # what the key of a seed is for; sources.py has 4
MOST_FAILURES = 100  # in a row


def stream_urls(text: str, allow_shell: bool) -> list[str]:
    """`a/{00..03}.tar::pipe:cat b.tar` -> five URLs. ValueError for a shell form that is not allowed."""
    urls = []
    for part in text.split("::"):
        if not allow_shell and (part.startswith("pipe:") or "://" in part):
            raise ValueError(
                f"data.stream {part!r} would be opened by a shell command; set data.allow_shell to allow it"
            )
        urls += [part] if part.startswith("pipe:") else list(braceexpand(part))
    return urls


class StreamMaker(IterableDataset):
    """Endless (batch, bad samples) of one rank. An error is a value here."""

    def __init__(self, pipeline: Pipeline, urls: list[str], global_batch: int, rank: int, world_size: int, start: int):
        self.pipeline, self.urls, self.start = pipeline, urls, start
        self.global_batch, self.rank, self.batch = global_batch, rank, global_batch // world_size

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        bad: list[BadSample] = []
        samples = self._samples(int(hash_key(self.pipeline.seed, STREAM, self.start, self.rank, worker)[0] >> 33), bad)
        for step in count(worker, workers):  # the steps whose batches this worker makes
            first = self.start + step * self.global_batch
            task = task_of(self.pipeline.inputs.tasks, self.pipeline.seed, first, self.global_batch)
            positions = np.arange(first, first + self.batch, dtype=np.int64) + self.rank * self.batch
            try:
                yield self._batch(self.pipeline.for_task(task), samples, positions, bad, task), bad.copy()
            except ValueError as error:
                yield portable(error)
            bad.clear()

    def _batch(
        self, pipeline: Pipeline, samples: Iterator[RawSample], positions: np.ndarray, bad: list[BadSample], task: str
    ) -> Batch:
        pairs: list[Pair] = []
        (fields,) = pipeline.sources.captions
        for raw in samples:
            position = int(positions[len(pairs)])
            try:
                pairs.append(make_pair(pipeline, raw, fields, 0, position))
            except ValueError as error:
                bad.append(BadSample(raw.shard, raw.key, 0, " ".join(str(error).split()), position, ""))
            if len(pairs) == len(positions):
                break
            if len(bad) > MOST_FAILURES + len(pairs):
                raise ValueError(f"data.stream yields no usable samples; the last: {bad[-1].shard}: {bad[-1].reason}")
        return replace(assemble(pipeline, pairs, np.zeros_like(positions), positions), task=task)

    def _samples(self, seed: int, bad: list[BadSample]) -> Iterator[RawSample]:
        """Samples for ever, shuffled a little. What cannot be read is noted in `bad`, and the next shard opened."""
        current = ""

        def note(error: Exception) -> bool:
            reason = str(error.args[0]) if error.args else type(error).__name__  # webdataset adds more arguments
            bad.append(BadSample(current, "", 0, " ".join(reason.split()), -1, ""))
            if len(bad) > MOST_FAILURES:
                raise ValueError(f"data.stream cannot be read; the last: {current}: {bad[-1].reason}") from error
            return True

        def opened() -> Iterator[dict[str, Any]]:
            nonlocal current
            for shard in ResampledShards(self.urls, seed=seed, worker_seed=lambda: 0, deterministic=True):
                current = shard["url"]
                try:
                    stream = gopen(current)
                except OSError as error:
                    note(error)
                    continue
                try:
                    watched = _Watched(stream)
                    yield {"url": current, "stream": watched}
                    if reason := watched.what_was_lost():
                        note(ValueError(reason))
                except GeneratorExit:
                    with suppress(OSError):  # a pipe that nobody reads any more ends in its own way
                        stream.close()
                    raise
                try:
                    stream.close()  # which webdataset's own opener leaves to the garbage collector
                except OSError as error:
                    note(error)

        files = tar_file_expander(opened(), handler=note)
        for sample in _shuffle(group_by_keys(files, handler=note), SHUFFLED, rng=Random(seed)):
            data = {name: value for name, value in sample.items() if isinstance(value, bytes)}
            if any(name in IMAGE_EXTENSIONS for name in data):
                yield RawSample(sample["__url__"], sample["__key__"], 0, data)
            else:
                bad.append(BadSample(str(sample["__url__"]), str(sample["__key__"]), 0, "it has no image", -1, ""))


class _Watched:
    """A stream that tells, when tarfile has done with it, whether tarfile stopped where the archive ends: it takes a
    bad header or a missing end mark for the end and says nothing."""

    def __init__(self, stream: Any):
        self._stream, self._tail = stream, b""

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._tail = (self._tail + data)[-2 * BLOCK :]
        return data

    def what_was_lost(self) -> str:
        """Nothing, for an archive that was read to its end."""
        while data := self.read(1 << 16):
            if data.count(0) != len(data):
                return "it was not read to its end: a header is damaged, or another archive follows"
        return "the end-of-archive mark is missing: it is cut short" if self._tail != bytes(2 * BLOCK) else ""
