"""The visible chain from places in shards to a training batch: read, choose, decode, crop, tokenise, mask, pack.

Everything here runs in a worker process, and everything random is keyed by the sample's position, so a batch is a pure
function of (pipeline, work): no matter which worker makes it, on which rank, or after how many restarts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import torch

from mmpt.batch import Batch, MaskedRegions, MaskedWords, Partners, Pictures, Tokens
from mmpt.data.image import ImageConfig
from mmpt.data.masking import mask_words, words_of
from mmpt.data.partners import PartnerPlaces
from mmpt.data.pictures import Picture, stacked, training_picture
from mmpt.data.quarantine import BadSample, stand_ins
from mmpt.data.randomness import Random, streams
from mmpt.data.reader import RawSample
from mmpt.data.regions import mask_regions
from mmpt.data.remote.cache import CacheConfig
from mmpt.data.remote.ranges import RemoteConfig
from mmpt.data.sources import SourceReader, Sources
from mmpt.data.tasks import inputs_for
from mmpt.data.text import CaptionFields, Cleaning, clean_caption, draw_caption, encode, ids_of
from mmpt.data.views import draw_views
from mmpt.data.work import Work
from mmpt.inputs import InputSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Pipeline:
    """What a worker needs to know once; travels to it by pickling."""

    sources: Sources
    tokenizer: "PreTrainedTokenizerBase"
    inputs: InputSpec
    image: ImageConfig
    cache: CacheConfig
    remote: RemoteConfig
    seed: int
    cleaning: Cleaning = "none"

    def for_task(self, task: str) -> "Pipeline":
        """The same, with the inputs that a task needs."""
        return replace(self, inputs=inputs_for(self.inputs, task))


class Slot(NamedTuple):
    """One place of a batch: the sample that belongs there, and what keys its random choices."""

    chunk: int
    index: int
    epoch: int
    position: int


class Pair(NamedTuple):
    """One picture and one caption, ready to be stacked and tokenised. index: of their sample in its chunk."""

    key: str
    picture: Picture
    caption: str
    views: np.ndarray
    view_parameters: np.ndarray
    index: int = -1


def training_batch(pipeline: Pipeline, reader: SourceReader, work: Work) -> tuple[Batch, list[BadSample]]:
    """Samples with random captions, crops and kept patches, and those that could not be used.

    Raises ShardError for a shard that cannot be trusted, ValueError for a chunk without one usable sample.
    """
    bad: list[BadSample] = []
    pipeline = pipeline.for_task(work.task)
    columns = (work.chunks, work.indices, work.epochs, work.positions)
    slots = [Slot(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]
    raw = reader.read(work.chunks, work.indices)
    pairs = [usable_pair(pipeline, reader, slot, sample, bad) for slot, sample in zip(slots, raw, strict=True)]
    partners = work.partners and partners_of(pipeline, reader, slots, pairs, work.partners)
    batch = assemble(pipeline, pairs, work.epochs, work.positions)
    return replace(batch, partners=partners, task=work.task), bad


def usable_pair(pipeline: Pipeline, reader: SourceReader, slot: Slot, sample: RawSample, bad: list[BadSample]) -> Pair:
    """The pair for a slot; where its sample is bad, a note of it and the first usable stand-in."""
    fields = pipeline.sources.caption_fields_of(slot.chunk)

    def make(raw: RawSample, index: int) -> Pair:
        return make_pair(pipeline, raw, fields, slot.epoch, slot.position)._replace(index=index)

    pair, reason = first_usable(pipeline, reader, slot, sample, make)
    if reason:
        bad.append(BadSample(sample.shard, sample.key, sample.offset, reason, slot.position, pair.key))
    return pair


def partners_of(
    pipeline: Pipeline, reader: SourceReader, slots: Sequence[Slot], pairs: Sequence[Pair], places: PartnerPlaces
) -> Partners:
    """The pictures that B texts are shown; see `mmpt.data.partners`.

    A partner that cannot be used is replaced without a note: it has, or gets, its own when its own turn comes.
    """
    others = np.flatnonzero(~places.own)
    raw = reader.read(places.chunks[others], places.indices[others])
    pictures = [pair.picture for pair in pairs]
    for i, sample in zip(others.tolist(), raw, strict=True):
        place = int(places.chunks[i]), int(places.indices[i])
        pictures[i] = usable_partner(pipeline, reader, slots[i], pairs[i], place, sample)
    matches = [picture is pair.picture for picture, pair in zip(pictures, pairs, strict=True)]
    return Partners(stacked(pictures, pipeline.inputs), torch.tensor(matches))


def usable_partner(
    pipeline: Pipeline, reader: SourceReader, slot: Slot, pair: Pair, place: tuple[int, int], sample: RawSample
) -> Picture:
    """The picture of the sample at a place (chunk, index), or of its first usable stand-in: drawn for this slot, by
    streams of its own; or the slot's own picture, where that is the sample."""
    random = streams(pipeline.seed, slot.epoch, slot.position, "partner ")
    inputs = replace(pipeline.inputs, extra_views=0)
    partner = slot._replace(chunk=place[0], index=place[1])

    def make(raw: RawSample, index: int) -> Picture:
        if (partner.chunk, index) == (slot.chunk, pair.index):
            return pair.picture
        return training_picture(raw, inputs, pipeline.image, random)[0]

    return first_usable(pipeline, reader, partner, sample, make)[0]


def first_usable(
    pipeline: Pipeline, reader: SourceReader, slot: Slot, sample: RawSample, make: Callable[[RawSample, int], T]
) -> tuple[T, str]:
    """(what is made of the slot's sample, ""); or what is made of the first stand-in of its chunk that can be used, and
    why the sample cannot. make: of a sample and its index in the chunk; raises ValueError for a bad one."""
    try:
        return make(sample, slot.index), ""
    except ValueError as error:
        reason = " ".join(str(error).split()) or type(error).__name__
    for index in stand_ins(reader.chunk_length(slot.chunk), slot.index, pipeline.seed, slot.epoch, slot.position):
        (other,) = reader.read(np.array([slot.chunk]), np.array([index]))
        try:
            return make(other, index), reason
        except ValueError:
            continue  # it has, or gets, its own note when its own turn comes
    raise ValueError(f"{sample.shard}: sample {sample.key!r}: {reason}; nor is any other of its chunk usable")


def make_pair(pipeline: Pipeline, raw: RawSample, fields: CaptionFields, epoch: int, position: int) -> Pair:
    """Raises ValueError for an image or a caption that cannot be used."""
    random, inputs = streams(pipeline.seed, epoch, position), pipeline.inputs
    draws = random("caption_field").random() if len(fields.names) > 1 else 0.0, random("caption").random()
    caption = clean_caption(draw_caption(raw.files, fields, *draws), pipeline.cleaning)
    picture, views = training_picture(raw, inputs, pipeline.image, random)
    return Pair(raw.key, picture, caption, views, draw_views(pipeline.image.views, random, inputs.extra_views))


def assemble(pipeline: Pipeline, pairs: Sequence[Pair], epochs: np.ndarray, positions: np.ndarray) -> Batch:
    """Stack, tokenise, mask and pack B pairs. epochs, positions: [B] int64, what keys their random choices."""
    keyed, count = zip(epochs.tolist(), positions.tolist(), strict=True), pipeline.inputs.draws
    randoms = [streams(pipeline.seed, epoch, position) for epoch, position in keyed]
    text, masked_words = texts_of(pipeline, [pair.caption for pair in pairs], randoms)
    pictures = stacked([pair.picture for pair in pairs], pipeline.inputs)
    return Batch(
        pictures=pictures,
        text=text,
        positions=torch.from_numpy(positions.copy()),
        keys=tuple(pair.key for pair in pairs),
        views=_rows([pair.views for pair in pairs]),  # [B, V, 3, H, W]
        view_parameters=_rows([pair.view_parameters for pair in pairs]),  # [B, V, 8]
        masked_words=masked_words,
        masked_regions=masked_regions_of(pipeline, pictures, randoms),
        draws=_rows([random("draws").random(count) for random in randoms]),  # [B, n]
    )


def texts_of(
    pipeline: Pipeline, captions: Sequence[str], randoms: Sequence[Random]
) -> tuple[Tokens, MaskedWords | None]:
    """B captions packed, and some of their words masked where the method wants that."""
    masking = pipeline.inputs.masked_words
    encoded = encode(pipeline.tokenizer, captions, pipeline.inputs, masks=masking is not None)
    text = ids_of(encoded)
    if masking is None:
        return text, None
    return text, mask_words(pipeline.tokenizer, text, words_of(encoded, masking), masking, randoms)


def masked_regions_of(pipeline: Pipeline, pictures: Pictures, randoms: Sequence[Random]) -> MaskedRegions | None:
    """Which regions are to be guessed, where the method wants that."""
    share = pipeline.inputs.masked_regions
    if not share:
        return None
    assert pictures.regions is not None
    return mask_regions(pictures.regions.features.lengths().tolist(), share, randoms)


def _rows(arrays: Sequence[np.ndarray]) -> torch.Tensor | None:
    return torch.from_numpy(np.stack(arrays)) if arrays[0].size else None
