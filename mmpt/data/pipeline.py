"""The visible chain from places in shards to a batch: read, choose, decode, crop, tokenise, pack.

Everything here runs in a worker process, and everything random is keyed by the sample's position, so a batch is a pure
function of (pipeline, work): no matter which worker makes it, on which rank, or after how many restarts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from mmpt.batch import Batch, InputSpec, Sample
from mmpt.data.image import ImageConfig, ImageError, decode, evaluation_image, training_image
from mmpt.data.manifest import IMAGE_EXTENSIONS, Manifest
from mmpt.data.randomness import generator
from mmpt.data.reader import RawSample, Reader
from mmpt.data.text import captions_of, metadata_of, tokenise

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Pipeline:
    """What a worker needs to know once; travels to it by pickling."""

    manifest: Manifest
    tokenizer: "PreTrainedTokenizerBase"
    inputs: InputSpec
    image: ImageConfig
    caption_field: str
    seed: int


class Work(NamedTuple):
    """The samples of one batch, [B] int64 each: their positions and epochs, and where they lie."""

    positions: np.ndarray
    epochs: np.ndarray
    chunks: np.ndarray
    indices: np.ndarray


def training_batch(pipeline: Pipeline, reader: Reader, work: Work) -> Batch:
    """Samples with random captions, crops and kept patches. Raises ValueError that names the shard and key at fault."""
    raw = reader.read(work.chunks, work.indices)
    keyed = list(zip(work.epochs.tolist(), work.positions.tolist(), strict=True))
    samples = [choose_caption(sample, pipeline, *key) for sample, key in zip(raw, keyed, strict=True)]
    images = []
    for sample, source, (epoch, position) in zip(samples, raw, keyed, strict=True):
        random = partial(generator, pipeline.seed, epoch=epoch, position=position)
        image = _decode(sample.image, source, pipeline.image)
        images.append(training_image(image, pipeline.inputs.image_size, pipeline.image, random))
    return Batch(
        images=torch.from_numpy(np.stack(images)),  # [B, 3, H, W]
        text=tokenise(pipeline.tokenizer, [sample.caption for sample in samples], pipeline.inputs),
        positions=torch.from_numpy(work.positions.copy()),
        kept_patches=kept_patches(pipeline, keyed),
        keys=tuple(sample.key for sample in samples),
    )


def evaluation_batch(pipeline: Pipeline, reader: Reader, work: Work) -> tuple[Batch, list[dict]]:
    """Samples as they are, centre-cropped, every patch kept, with their first caption; and what else is known of each.

    The dictionary of a sample holds the fields of its .json file, and: `key`; `captions`, the list of all of them
    (empty when it has a label instead); `label`, an integer, when it has a .cls file.
    """
    raw = reader.read(work.chunks, work.indices)
    metadata = [describe(sample, pipeline.caption_field) for sample in raw]
    images = [
        evaluation_image(_decode(image_bytes(sample), sample, pipeline.image), pipeline.inputs.image_size)
        for sample in raw
    ]
    captions = [(known["captions"] or [""])[0] for known in metadata]
    batch = Batch(
        images=torch.from_numpy(np.stack(images)),  # [B, 3, H, W]
        text=tokenise(pipeline.tokenizer, captions, pipeline.inputs),
        positions=torch.from_numpy(work.positions.copy()),
        kept_patches=None,
        keys=tuple(sample.key for sample in raw),
    )
    return batch, metadata


def choose_caption(raw: RawSample, pipeline: Pipeline, epoch: int, position: int) -> Sample:
    """One of the sample's captions, uniformly. Raises ValueError that names the shard and the key."""
    try:
        captions = captions_of(raw.files, pipeline.caption_field)
    except ValueError as error:
        raise _about(raw, error) from error
    choice = 0
    if len(captions) > 1:
        choice = int(generator(pipeline.seed, "caption", epoch, position).random() * len(captions))
    return Sample(raw.key, image_bytes(raw), captions[choice], {})


def describe(raw: RawSample, caption_field: str) -> dict:
    """What evaluation wants to know of a sample; see evaluation_batch."""
    try:
        known = metadata_of(raw.files) | {"key": raw.key, "captions": []}
        if "cls" in raw.files:
            known["label"] = int(raw.files["cls"])
        else:
            known["captions"] = captions_of(raw.files, caption_field)
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


def image_bytes(raw: RawSample) -> bytes:
    """The file of the one image of a sample: the index has made sure that there is one."""
    return next(data for extension, data in raw.files.items() if extension in IMAGE_EXTENSIONS)


def _decode(data: bytes, raw: RawSample, config: ImageConfig) -> "Image.Image":
    try:
        return decode(data, config.background, config.max_pixels)
    except ImageError as error:
        raise _about(raw, error) from error


def _about(raw: RawSample, error: ValueError) -> ValueError:
    return ValueError(f"{raw.shard}: sample {raw.key!r}: {error}")
