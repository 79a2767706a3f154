"""Batches in order, made by worker processes; the state is one integer."""

import hashlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Self

from mmpt.batch import Batch
from mmpt.data import storage, workers
from mmpt.data.benchmark import load_benchmark
from mmpt.data.image import ImageConfig
from mmpt.data.left_out import Stretches, go_on
from mmpt.data.manifest import load_manifest
from mmpt.data.masking import check_masking
from mmpt.data.mixture import Mixture, batch_positions
from mmpt.data.partners import partner_seed
from mmpt.data.pipeline import Pipeline
from mmpt.data.quarantine import BadSample, check_rate
from mmpt.data.regions import check_regions
from mmpt.data.remote.ahead import FetchAhead
from mmpt.data.remote.cache import CacheConfig, ChunkCache
from mmpt.data.remote.ranges import RemoteConfig
from mmpt.data.sources import SEPARATOR, Sources, captions_per_source, split_sources
from mmpt.data.stream import StreamMaker, stream_urls
from mmpt.data.tasks import check_tasks, inputs_for_evaluation
from mmpt.data.text import TEXT_LINES, Cleaning, check_vocabulary, load_tokenizer
from mmpt.data.work import Plan, Work, evaluation_work, training_work
from mmpt.data.workers import BatchMaker
from mmpt.inputs import InputSpec

MOST_CHUNKS_WAITING = 4096


@dataclass(frozen=True)
class DataConfig:
    """Where pairs come from and how they become batches."""

    shards: str = ""
    """Folder (or URL) of tar shards with a manifest, which `mmpt-data index` builds; or the manifest file itself.
    Several sources are separated by `::`; without `weights` they are one data set."""
    tokenizer: str = "openai/clip-vit-base-patch32"
    """Tokenizer: a name on the Hugging Face hub, or a folder such as `mmpt-data tokenizer` writes."""
    caption_field: str = "txt"
    """Where captions are: `txt` for the lines of the .txt file, one drawn each time; `txt_whole` for that file as one
    caption; any other name is a field of the .json file that holds a text or a list of texts. `txt=0.7,synthetic=0.3`
    draws the field too; a field without text cedes its share. Sources that differ are separated by `::`."""
    caption_cleaning: Cleaning = "none"
    """`albef`: captions in lower case, without punctuation, of 30 words at most; in training and in evaluation."""
    weights: tuple[int, ...] = ()
    """Integer proportions of the sources, one for each, which then run through epochs of their own: `3,1` draws three
    samples of the first to one of the second, exact to one sample at any time."""
    stream: str = ""
    """In place of `shards`, sources without counts, read best-effort by the webdataset library: its URLs, with {0..9}
    and `::`. Exactly-once and resuming at a sample are then off: shards are drawn with replacement for ever."""
    allow_shell: bool = False
    """Let `stream` name what webdataset opens with a shell command: `pipe:`, and every URL with a scheme."""
    workers: int = 1
    """Processes per rank that read and decode; 0 does it in the training process. Never changes what is delivered."""
    lanes: int = 64
    """Parallel read positions; at least the world size, for long reads. Fixed for the whole run."""
    window_chunks: int = 4
    """Samples are shuffled within windows of this many chunks of a lane, on top of the shuffling of chunks."""
    max_quarantined_share: float = 0.01
    """The run stops when more than this share of the samples cannot be used. Each such sample is replaced by another of
    its chunk and listed in quarantine.parquet in the run directory."""
    fetch_ahead_batches: int = 8
    """Batches whose chunks of remote shards are on their way before a worker needs them."""
    image: ImageConfig = field(default_factory=ImageConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    remote: RemoteConfig = field(default_factory=RemoteConfig)

    def __post_init__(self):
        if min(self.workers, self.fetch_ahead_batches) < 0 or min(self.lanes, self.window_chunks) < 1:
            raise ValueError(
                f"workers ({self.workers}) and fetch_ahead_batches ({self.fetch_ahead_batches}) must be 0 or more, "
                f"lanes ({self.lanes}) and window_chunks ({self.window_chunks}) 1 or more"
            )
        if not 0 <= self.max_quarantined_share <= 1:
            raise ValueError(f"max_quarantined_share wants a share from 0 to 1, got {self.max_quarantined_share}")


class Loader:
    """An endless iterator over this rank's part of each global batch; see `build_loader`.

    batches: (batch, its bad samples), one after another. mixture: the order they follow; None where there is none.
    left_out: see `build_loader`. ahead: what fetches for the batches, to be ended with them.
    """

    def __init__(
        self, batches: Iterator[Any], mixture: Mixture | None, fingerprint: str, global_batch: int, start: int,
        max_quarantined_share: float, left_out: Stretches = (), ahead: FetchAhead | None = None,
    ):  # fmt: skip
        self.state = go_on(start, left_out)
        """The position of the next sample: samples delivered or left out so far, all ranks together, since the
        beginning of the run."""
        self.fingerprint = fingerprint
        """Changes when anything does that gives the state another meaning: data, weights, seed, lanes, window."""
        self.exactly_once = mixture is not None
        """Whether each epoch holds each sample once, and a run that stopped goes on with the next sample."""
        self._batches, self._mixture, self._global_batch, self._ahead = batches, mixture, global_batch, ahead
        self._max_quarantined_share, self._left_out = max_quarantined_share, left_out
        self._delivered, self._bad, self._quarantined = 0, 0, list[BadSample]()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """Raises ValueError when too many samples could not be used, ShardError for a shard that cannot be trusted."""
        batch, bad = workers.take(self._batches)
        self.state = go_on(self.state + self._global_batch, self._left_out)
        self._delivered += len(batch)
        if bad:
            self._bad += len(bad)
            self._quarantined += bad
            check_rate(self._bad, self._delivered, self._max_quarantined_share, bad[-1])
        return batch

    @property
    def epochs(self) -> tuple[float, ...]:
        """Passes so far over the data, or over each source where they are weighted; none over a stream."""
        return self._mixture.epochs(self.state) if self._mixture else ()

    def take_quarantined(self) -> list[BadSample]:
        """Samples that could not be used in this rank's batches since the last call."""
        taken, self._quarantined = self._quarantined, []
        return taken

    def worker_pids(self) -> list[int]:
        """The processes that make the batches; none when that is this process."""
        return [worker.pid for worker in getattr(self._batches, "_workers", [])]

    def close(self) -> None:
        """End the workers. Safe to call twice."""
        if self._ahead:
            self._ahead.close()
        workers.stop(self._batches)


def build_loader(
    config: DataConfig, inputs: InputSpec, seed: int, global_batch: int, rank: int, world_size: int, start: int = 0,
    left_out: Stretches = (),
) -> Loader:  # fmt: skip
    """The training batches of one rank: B = global_batch // world_size pairs each, without end.

    start: the `state` of an earlier loader with the same shards, seed and lanes, of any world size, worker count and
    global batch: delivery goes on at the next sample. The batches of all ranks, one after another, do not depend on the
    world size. left_out: stretches of whole batches that are not delivered (see left_out.py); a stream goes on behind
    the last. Rank 0 checks that the shards are those of the manifest.
    Raises ValueError for anything amiss in the configuration, the manifest, the shards or the tokenizer.
    """
    if config.stream:
        start = max([start, *(last for _, last in left_out)])
        return _stream_loader(config, inputs, seed, global_batch, rank, world_size, start)
    sources, mixture = open_sources(config, seed, check_shards=rank == 0)
    batch_positions(mixture, start, global_batch, rank, world_size)  # the checks, before any process starts
    pipeline = _pipeline(config, sources, inputs, seed)
    plan, ahead = plan_of(config, inputs, sources, mixture, seed, left_out), None
    work = training_work(plan, start, global_batch, rank, world_size)
    if not all(storage.is_local(manifest.folder) for manifest in sources.manifests):
        cache = ChunkCache(config.cache, config.remote)
        ahead = FetchAhead(cache, config.remote.connections, most_waiting=MOST_CHUNKS_WAITING)
        work = _announced(work, config.fetch_ahead_batches, sources, ahead)
    batches = workers.start(BatchMaker(pipeline, evaluation=False), work, config.workers)
    fingerprint = _fingerprint(sources, mixture)
    return Loader(batches, mixture, fingerprint, global_batch, start, config.max_quarantined_share, left_out, ahead)


def _stream_loader(
    config: DataConfig, inputs: InputSpec, seed: int, global_batch: int, rank: int, world_size: int, start: int
) -> Loader:
    if config.shards or config.weights:
        raise ValueError("data.stream takes the place of data.shards and data.weights: give the one or the others")
    if inputs.partners:
        raise ValueError(
            "the method matches texts with pictures of other samples, and data.stream has no second order to draw them "
            "from: give indexed shards in data.shards"
        )
    if global_batch % world_size:
        raise ValueError(f"the world size ({world_size}) must divide the global batch ({global_batch})")
    urls = stream_urls(config.stream, config.allow_shell)
    pipeline = _pipeline(config, Sources((), captions_per_source(config.caption_field, 1)), inputs, seed)
    maker = StreamMaker(pipeline, urls, global_batch, rank, world_size, start)
    fingerprint = hashlib.sha256(f"stream {config.stream}".encode()).hexdigest()
    batches = workers.start(maker, None, config.workers)
    return Loader(batches, None, fingerprint, global_batch, start, config.max_quarantined_share)


def open_sources(config: DataConfig, seed: int, check_shards: bool) -> tuple[Sources, Mixture]:
    """The data sets that a configuration names, and the order of their samples."""
    places = split_sources(config.shards)
    if not places:
        raise ValueError("data.shards is not set: give the folder of the shards")
    manifests = tuple(load_manifest(place, check_shards, config.remote) for place in places)
    sources = Sources(manifests, captions_per_source(config.caption_field, len(places)))
    return sources, sources.mixture(config.weights, seed, config.lanes, config.window_chunks)


def _pipeline(config: DataConfig, sources: Sources, inputs: InputSpec, seed: int) -> Pipeline:
    tokenizer = load_tokenizer(config.tokenizer)
    check_vocabulary(tokenizer, inputs)
    check_tasks(inputs.tasks)
    check_regions(inputs)
    if inputs.masked_words:
        check_masking(tokenizer, inputs.masked_words)
    return Pipeline(
        sources, tokenizer, inputs, config.image, config.cache, config.remote, seed, config.caption_cleaning
    )


def plan_of(
    config: DataConfig, inputs: InputSpec, sources: Sources, mixture: Mixture, seed: int, left_out: Stretches = ()
) -> Plan:
    """What the training batches follow from: the orders, what the method asks for, and what is left out."""
    second = None
    if inputs.partners:
        second = sources.mixture(config.weights, partner_seed(seed), config.lanes, config.window_chunks)
    return Plan(inputs, mixture, second, seed, left_out)


def _fingerprint(sources: Sources, mixture: Mixture) -> str:
    facts = [manifest.content_hash for manifest in sources.manifests]
    facts += [f"{weight} {order.seed} {order.lanes} {order.window_samples}"
              for weight, order in zip(mixture.weights, mixture.orders, strict=True)]  # fmt: skip
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def _announced(works: Iterator[Work], batches: int, sources: Sources, ahead: FetchAhead) -> Iterator[Work]:
    """The same works; the chunks of each are fetched from `batches` works before it is due."""
    waiting: deque[Work] = deque()
    for work in works:
        ahead.warm(sources.remote_ranges(work.all_chunks()))
        waiting.append(work)
        if len(waiting) > batches:
            yield waiting.popleft()


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
        manifest, caption_field = load_manifest(shards, rank == 0, config.remote), config.caption_field
    sources = Sources((manifest,), captions_per_source(caption_field.split(SEPARATOR)[0], 1))
    pipeline = _pipeline(config, sources, inputs_for_evaluation(inputs), seed=0)
    work = evaluation_work(manifest, rank, world_size, batch)
    made = workers.start(BatchMaker(pipeline, evaluation=True), work, config.workers)
    try:
        for _ in work:
            yield workers.take(made)
    finally:
        workers.stop(made)
