"""The processes that make batches, in order, ahead of time."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from multiprocessing import resource_tracker
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from mmpt.data.evaluation import evaluation_batch
from mmpt.data.manifest import IMAGE_EXTENSIONS
from mmpt.data.pipeline import Pipeline, training_batch
from mmpt.data.regions import EXTENSION as REGIONS
from mmpt.data.sources import SourceReader
from mmpt.data.tar import ShardError
from mmpt.data.work import Work

BATCHES_AHEAD_PER_WORKER = 2
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class BatchMaker(Dataset):
    """Makes the batch for a piece of work, in whichever process it is called. An error is a value here."""

    def __init__(self, pipeline: Pipeline, evaluation: bool):
        self.pipeline, self.evaluation = pipeline, evaluation
        unread = IMAGE_EXTENSIONS if pipeline.inputs.regions is not None else (REGIONS,)
        self.reader = SourceReader(pipeline.sources, pipeline.cache, pipeline.remote, frozenset(unread))

    def __getitem__(self, work: Work) -> Any:
        make = evaluation_batch if self.evaluation else training_batch
        try:
            return make(self.pipeline, self.reader, work)
        except ValueError as error:
            return portable(error)


def portable(error: ValueError) -> ValueError:
    """The error as one that survives the journey to another process; some kinds of ValueError would not."""
    return error if isinstance(error, ShardError) else ValueError(str(error))


def start(maker: Dataset, work: Iterable[Work] | None, workers: int) -> Iterator[Any]:
    """An iterator over what the maker makes of each piece of work, in order; its workers begin at once.

    work: None where the maker itself is an iterable.
    """
    context = None
    if workers:
        # A fork of a process that has threads or a CUDA context may deadlock; the fork server has neither.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", "mmpt.data.pipeline", "transformers"])
    # Whoever stops a job signals all of its processes. The training process decides what follows; the fork server and
    # its workers, which inherit this mask, must live until then.
    resource_tracker.ensure_running()  # it unblocks SIGTERM when it starts
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        return _iterator(maker, work, workers, context)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _iterator(maker: Dataset, work: Iterable[Work] | None, workers: int, context: Any) -> Iterator[Any]:
    loader = DataLoader(
        maker,
        sampler=work,  # type: ignore[arg-type]  # any iterable of indices will do, and an index may be anything
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=context,
        prefetch_factor=BATCHES_AHEAD_PER_WORKER if workers else None,
        worker_init_fn=_begin_worker,
        pin_memory=torch.cuda.is_available(),
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

    def obey() -> None:
        while signal.sigwaitinfo(STOP_SIGNALS).si_pid != training.pid:  # torch ends a stuck worker by a signal
            pass
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=obey, daemon=True).start()
    else:  # macOS: no way to tell who sent it
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def take(batches: Iterator[Any]) -> Any:
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


def stop(batches: Iterator[Any]) -> None:
    if shutdown := getattr(batches, "_shutdown_workers", None):  # absent where there are no workers
        shutdown()
