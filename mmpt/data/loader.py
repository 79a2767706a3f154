"""Batches in order, made by worker processes; the state is one integer."""

import hashlib
import math
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mmpt.batch import Batch, InputSpec
from mmpt.data.benchmark import load_benchmark
from mmpt.data.image import ImageConfig
from mmpt.data.manifest import Manifest, load_manifest
from mmpt.data.order import Order, batch_positions, default_lanes, locate
from mmpt.data.pipeline import Pipeline, Work, evaluation_batch, training_batch
from mmpt.data.reader import Reader
from mmpt.data.tar import ShardError
from mmpt.data.text import TEXT_LINES, check_vocabulary, load_tokenizer

BATCHES_AHEAD_PER_WORKER = 2


@dataclass(frozen=True)
class DataConfig:
    """Where pairs come from and how they become batches."""

    shards: str = ""
    """Folder (or URL) of tar shards with a manifest, which `mmpt-data index` builds; or the manifest file itself."""
    tokenizer: str = "openai/clip-vit-base-patch32"
    """Tokenizer: a name on the Hugging Face hub, or a folder such as `mmpt-data tokenizer` writes."""
    caption_field: str = "txt"
    """Where captions are: `txt` for the lines of the .txt file, one drawn each time; `txt_whole` for that file as one
    caption; any other name is a field of the .json file that holds a text or a list of texts."""
    workers: int = 1
    """Processes per rank that read and decode; 0 does it in the training process. Never changes what is delivered."""
    lanes: int = 0
    """Parallel read positions, a divisor of the global batch and at least the world size for long reads; fixed for the
    whole run. 0 takes the largest divisor of the global batch that is at most 64."""
    window_chunks: int = 4
    """Samples are shuffled within windows of this many chunks of a lane, on top of the shuffling of chunks."""
    image: ImageConfig = field(default_factory=ImageConfig)

    def __post_init__(self):
        if self.workers < 0 or self.lanes < 0 or self.window_chunks < 1:
            raise ValueError(
                f"workers ({self.workers}) and lanes ({self.lanes}) must be 0 or more, "
                f"window_chunks ({self.window_chunks}) 1 or more"
            )


class Loader:
    """An endless iterator over this rank's part of each global batch; see `build_loader`."""

    def __init__(
        self, pipeline: Pipeline, order: Order, global_batch: int, rank: int, world_size: int, workers: int, start: int
    ):
        self.state = start
        """Samples delivered so far, all ranks together, since the beginning of the run."""
        self.samples_per_epoch = order.samples
        self.fingerprint = _fingerprint(pipeline, order)
        """Changes when anything does that gives the state another meaning: data, seed, lanes, window."""
        self._global_batch = global_batch
        batch_positions(start, global_batch, order.lanes, rank, world_size)  # the checks, before any process starts
        work = _training_work(order, start, global_batch, rank, world_size)
        self._batches = _start(pipeline, work, workers, evaluation=False)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        batch = _next(self._batches)
        self.state += self._global_batch
        return batch

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.state / self.samples_per_epoch

    def worker_pids(self) -> list[int]:
        """The processes that make the batches; none when that is this process."""
        return [worker.pid for worker in getattr(self._batches, "_workers", [])]

    def close(self) -> None:
        """End the workers. Safe to call twice."""
        _stop(self._batches)


def build_loader(
    config: DataConfig, inputs: InputSpec, seed: int, global_batch: int, rank: int, world_size: int, start: int = 0
) -> Loader:
    """The training batches of one rank: B = global_batch // world_size pairs each, without end.

    start: the `state` of an earlier loader with the same shards, seed and lanes, of any world size and worker count:
    delivery goes on at the next sample. The batches of all ranks, one after another, do not depend on the world size.
    Raises ValueError for anything amiss in the configuration, the manifest, the shards or the tokenizer.
    """
    if not config.shards:
        raise ValueError("data.shards is not set: give the folder of the shards")
    manifest = load_manifest(config.shards)
    lanes = config.lanes or default_lanes(global_batch)
    order = Order(manifest.chunk_lengths, seed, lanes, config.window_chunks * manifest.chunk_samples)
    pipeline = _pipeline(config, manifest, inputs, seed)
    return Loader(pipeline, order, global_batch, rank, world_size, config.workers, start)


def _pipeline(config: DataConfig, manifest: Manifest, inputs: InputSpec, seed: int) -> Pipeline:
    tokenizer = load_tokenizer(config.tokenizer)
    check_vocabulary(tokenizer, inputs)
    return Pipeline(manifest, tokenizer, inputs, config.image, config.caption_field, seed)


def _fingerprint(pipeline: Pipeline, order: Order) -> str:
    facts = f"{pipeline.manifest.content_hash} {order.seed} {order.lanes} {order.window_samples}"
    return hashlib.sha256(facts.encode()).hexdigest()


def _training_work(order: Order, start: int, global_batch: int, rank: int, world_size: int) -> Iterator[Work]:
    while True:
        positions = batch_positions(start, global_batch, order.lanes, rank, world_size)
        yield Work(positions, *locate(order, positions))
        start += global_batch


class _Maker(Dataset):
    """Makes the batch for a piece of work, in whichever process it is called. An error is a value here."""

    def __init__(self, pipeline: Pipeline, evaluation: bool):
        self.pipeline, self.evaluation = pipeline, evaluation
        self.reader = Reader(pipeline.manifest)

    def __getitem__(self, work: Work) -> Any:
        make = evaluation_batch if self.evaluation else training_batch
        try:
            return make(self.pipeline, self.reader, work)
        except ShardError as error:
            return error
        except ValueError as error:
            return ValueError(str(error))  # some kinds of ValueError would not survive the journey


def _start(pipeline: Pipeline, work: Iterable[Work], workers: int, evaluation: bool) -> Iterator[Any]:
    """An iterator over what the maker makes of each piece of work, in order; its workers begin at once."""
    context = None
    if workers:
        # A fork of a process that has threads or a CUDA context may deadlock; the fork server has neither.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", "mmpt.data.pipeline", "transformers"])
    loader = DataLoader(
        _Maker(pipeline, evaluation),
        sampler=work,  # type: ignore[arg-type]  # any iterable of indices will do, and an index may be anything
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=context,
        prefetch_factor=BATCHES_AHEAD_PER_WORKER if workers else None,
        worker_init_fn=_begin_worker,
        generator=torch.Generator(),  # or it would draw its own seed from the global generator
    )
    return iter(loader)


def _begin_worker(worker: int) -> None:
    """Keep to one thread, as torch does by itself, and die with the training process.

    torch watches a worker's parent, which here is the fork server; and that lives as long as any worker. So when the
    training process is killed, both would live for ever and hold its pipes open.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    training = multiprocessing.parent_process()
    assert training is not None

    def follow() -> None:
        multiprocessing.connection.wait([training.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _next(batches: Iterator[Any]) -> Any:
    """The next thing made. Raises the error that it met, and RuntimeError when its worker is gone."""
    try:
        made = next(batches)
    except (RuntimeError, OSError, EOFError) as error:  # the latter two when it dies while handing over a batch
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise RuntimeError(f"a data worker died ({reason[0]}): out of memory?") from error
    if isinstance(made, Exception):
        raise made
    return made


def _stop(batches: Iterator[Any]) -> None:
    if shutdown := getattr(batches, "_shutdown_workers", None):  # absent where there are no workers
        shutdown()


def eval_batches(
    shards: str, config: DataConfig, inputs: InputSpec, rank: int, world_size: int, batch: int
) -> Iterator[tuple[Batch, list[dict]]]:
    """Each sample once, in stored order, split over the ranks in contiguous parts; at most `batch` samples at a time.

    shards: a folder with a manifest, or a data set as CLIP_benchmark lays it out (see `mmpt.data.benchmark`).
    All ranks get the same number of batches, for forward passes that all ranks must join; sizes differ by one at most.
    Yields (Batch, [dictionary of each sample]); see `evaluation_batch`. Batch.positions is the sample's stored index.
    Raises ValueError for more ranks than samples and for all that `build_loader` refuses.
    """
    manifest, caption_field = load_benchmark(shards), TEXT_LINES
    if manifest is None:
        manifest, caption_field = load_manifest(shards), config.caption_field
    pipeline = replace(_pipeline(config, manifest, inputs, seed=0), caption_field=caption_field)
    work = _evaluation_work(manifest, rank, world_size, batch)
    batches = _start(pipeline, work, config.workers, evaluation=True)
    try:
        for _ in work:
            yield _next(batches)
    finally:
        _stop(batches)


def _evaluation_work(manifest: Manifest, rank: int, world_size: int, batch: int) -> list[Work]:
    if world_size > manifest.samples or batch < 1:
        raise ValueError(f"cannot split {manifest.samples} samples over {world_size} ranks in batches of {batch}")
    first, last = (r * manifest.samples // world_size for r in (rank, rank + 1))
    steps = math.ceil(math.ceil(manifest.samples / world_size) / batch)
    ends = np.cumsum(manifest.chunk_lengths)
    work = []
    for positions in np.array_split(np.arange(first, last, dtype=np.int64), steps):
        chunks = np.searchsorted(ends, positions, side="right")
        indices = positions - (ends[chunks] - manifest.chunk_lengths[chunks])
        work.append(Work(positions, np.zeros_like(positions), chunks, indices))
    return work
