"""The visible chain from places in shards to a batch: read, choose, decode, crop, tokenise, pack.

Everything here runs in a worker process, and everything random is keyed by the sample's position, so a batch is a pure
function of (pipeline, work): no matter which worker makes it, on which rank, or after how many restarts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from mmpt.batch import Batch, MaskedWords, Pictures, Tokens
from mmpt.data.decode import ImageError
from mmpt.data.image import ImageConfig, evaluation_image, training_images, whole_evaluation_image
from mmpt.data.masking import mask_words, words_of
from mmpt.data.patches import pack_patches, whole_size
from mmpt.data.quarantine import BadSample, stand_ins
from mmpt.data.randomness import generator
from mmpt.data.reader import RawSample
from mmpt.data.remote.cache import CacheConfig
from mmpt.data.remote.ranges import RemoteConfig
from mmpt.data.sources import SourceReader, Sources
from mmpt.data.text import CaptionFields, captions_of, draw_caption, encode, ids_of, metadata_of, tokenise
from mmpt.data.views import draw_views
from mmpt.inputs import InputSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Random = Callable[[str], np.random.Generator]
"""A sample's stream of random numbers for each purpose."""


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


class Work(NamedTuple):
    """The samples of one batch, [B] int64 each: their positions and epochs, and where they lie."""

    positions: np.ndarray
    epochs: np.ndarray
    chunks: np.ndarray
    indices: np.ndarray


class Pair(NamedTuple):
    """One image and one caption, ready to be stacked and tokenised."""

    key: str
    image: np.ndarray
    caption: str
    views: np.ndarray
    view_parameters: np.ndarray


def training_batch(pipeline: Pipeline, reader: SourceReader, work: Work) -> tuple[Batch, list[BadSample]]:
    """Samples with random captions, crops and kept patches, and those that could not be used.

    Raises ShardError for a shard that cannot be trusted, ValueError for a chunk without one usable sample.
    """
    bad: list[BadSample] = []
    raw = reader.read(work.chunks, work.indices)
    pairs = [_pair_or_stand_in(pipeline, reader, work, i, sample, bad) for i, sample in enumerate(raw)]
    return assemble(pipeline, pairs, work.epochs, work.positions), bad


def assemble(pipeline: Pipeline, pairs: Sequence[Pair], epochs: np.ndarray, positions: np.ndarray) -> Batch:
    """Stack, tokenise, mask and pack B pairs. epochs, positions: [B] int64, what keys their random choices."""
    keyed, count = list(zip(epochs.tolist(), positions.tolist(), strict=True)), pipeline.inputs.draws
    randoms = [partial(generator, pipeline.seed, epoch=epoch, position=position) for epoch, position in keyed]
    text, masked_words = texts_of(pipeline, [pair.caption for pair in pairs], randoms)
    return Batch(
        pictures=pictures_of([pair.image for pair in pairs], pipeline.inputs, kept_patches(pipeline, keyed)),
        text=text,
        positions=torch.from_numpy(positions.copy()),
        keys=tuple(pair.key for pair in pairs),
        views=_stacked([pair.views for pair in pairs]),  # [B, V, 3, H, W]
        view_parameters=_stacked([pair.view_parameters for pair in pairs]),  # [B, V, 8]
        masked_words=masked_words,
        draws=_stacked([random("draws").random(count) for random in randoms]) if count else None,  # [B, n]
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


def pictures_of(images: Sequence[np.ndarray], inputs: InputSpec, kept: torch.Tensor | None) -> Pictures:
    """Images [3, H, W] uint8 in the form that the method takes. kept: [B, K], the patches of each that stay."""
    if inputs.image_resize == "square":
        return Pictures(pixels=torch.from_numpy(np.stack(images)), kept_patches=kept)  # [B, 3, H, W]
    patches, places, grids = pack_patches(images, inputs.patch_size)
    return Pictures(patches=patches, places=places, grids=grids)


def _stacked(arrays: Sequence[np.ndarray]) -> torch.Tensor | None:
    return torch.from_numpy(np.stack(arrays)) if arrays[0].size else None


def _pair_or_stand_in(
    pipeline: Pipeline, reader: SourceReader, work: Work, i: int, sample: RawSample, bad: list[BadSample]
) -> Pair:
    """The pair for slot i of the batch; where its sample is bad, a note of it and the first usable stand-in."""
    chunk, epoch, position = int(work.chunks[i]), int(work.epochs[i]), int(work.positions[i])
    fields = pipeline.sources.caption_fields_of(chunk)
    try:
        return make_pair(pipeline, sample, fields, epoch, position)
    except ValueError as error:
        reason = " ".join(str(error).split())
    for index in stand_ins(reader.chunk_length(chunk), int(work.indices[i]), pipeline.seed, epoch, position):
        (other,) = reader.read(np.array([chunk]), np.array([index]))
        try:
            pair = make_pair(pipeline, other, fields, epoch, position)
        except ValueError:
            continue  # it has, or gets, its own note when its own turn comes
        bad.append(BadSample(sample.shard, sample.key, sample.offset, reason, position, other.key))
        return pair
    raise ValueError(f"{sample.shard}: sample {sample.key!r}: {reason}; nor is any other of its chunk usable")


def make_pair(pipeline: Pipeline, raw: RawSample, fields: CaptionFields, epoch: int, position: int) -> Pair:
    """Raises ValueError for an image or a caption that cannot be used."""
    random = partial(generator, pipeline.seed, epoch=epoch, position=position)
    draws = random("caption_field").random() if len(fields.names) > 1 else 0.0, random("caption").random()
    caption = draw_caption(raw.files, fields, *draws)
    inputs, config = pipeline.inputs, pipeline.image
    shape = inputs.image_size if inputs.image_resize == "square" else partial(whole_size, inputs=inputs)
    image, views = training_images(raw.image(), shape, config, random, inputs.extra_views, inputs.image_size)
    return Pair(raw.key, image, caption, views, draw_views(config.views, random, inputs.extra_views))


def evaluation_batch(pipeline: Pipeline, reader: SourceReader, work: Work) -> tuple[Batch, list[dict]]:
    """Samples as they are, centre-cropped, every patch kept, with their first caption; and what else is known of each.

    The dictionary of a sample holds the fields of its .json file, and: `key`; `captions`, the list of all of them
    (empty when it has a label instead); `label`, an integer, when it has a .cls file.
    """
    raw = reader.read(work.chunks, work.indices)
    metadata = [describe(sample, pipeline.sources.captions[0]) for sample in raw]
    images = [_evaluation_image(sample, pipeline) for sample in raw]
    captions = [(known["captions"] or [""])[0] for known in metadata]
    batch = Batch(
        pictures=pictures_of(images, pipeline.inputs, kept=None),
        text=tokenise(pipeline.tokenizer, captions, pipeline.inputs),
        positions=torch.from_numpy(work.positions.copy()),
        keys=tuple(sample.key for sample in raw),
    )
    return batch, metadata


def describe(raw: RawSample, fields: CaptionFields) -> dict:
    """What evaluation wants to know of a sample; see evaluation_batch. Captions are those of the first field."""
    try:
        known = metadata_of(raw.files) | {"key": raw.key, "captions": []}
        if "cls" in raw.files:
            known["label"] = int(raw.files["cls"])
        else:
            known["captions"] = captions_of(raw.files, fields.names[0])
    except ValueError as error:
        raise _about(raw, error) from error
    return known


def kept_patches(pipeline: Pipeline, keyed: Sequence[tuple[int, int]]) -> torch.Tensor | None:
    """[B, K] int64, ascending: a uniformly random K of the P patches of each image (FLIP, Li et al. 2023, section 3).

    None where every patch is kept.
    """
    total, kept = pipeline.inputs.patches, pipeline.inputs.kept_patches
    if kept == total:
        return None
    draws = np.stack([generator(pipeline.seed, "patches", *key).random(total) for key in keyed])  # [B, P]
    return torch.from_numpy(np.sort(np.argsort(draws, axis=1, kind="stable")[:, :kept], axis=1))


def _evaluation_image(raw: RawSample, pipeline: Pipeline) -> np.ndarray:
    inputs = pipeline.inputs
    try:
        if inputs.image_resize == "square":
            return evaluation_image(raw.image(), inputs.image_size, pipeline.image)
        return whole_evaluation_image(raw.image(), partial(whole_size, inputs=inputs), pipeline.image)
    except ImageError as error:
        raise _about(raw, error) from error


def _about(raw: RawSample, error: ValueError) -> ValueError:
    return ValueError(f"{raw.shard}: sample {raw.key!r}: {error}")
