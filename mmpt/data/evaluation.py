"""Samples as they are, for evaluation: nothing drawn, nothing replaced, and what is known of each beside its batch."""

import numpy as np
import torch

from mmpt.batch import Batch
from mmpt.data.pictures import Picture, evaluation_picture, stacked
from mmpt.data.pipeline import Pipeline
from mmpt.data.reader import RawSample
from mmpt.data.sources import SourceReader
from mmpt.data.text import CaptionFields, Cleaning, captions_of, clean_caption, metadata_of, tokenise
from mmpt.data.work import Work


def evaluation_batch(pipeline: Pipeline, reader: SourceReader, work: Work) -> tuple[Batch, list[dict]]:
    """Samples as they are, centre-cropped, every patch kept, with their first caption; and what else is known of each.

    The dictionary of a sample holds the fields of its .json file, and: `key`; `captions`, the list of all of them
    (empty when it has a label instead); `label`, an integer, when it has a .cls file.
    Raises ValueError naming the first sample that cannot be used.
    """
    raw = reader.read(work.chunks, work.indices)
    metadata = [describe(sample, pipeline.sources.captions[0], pipeline.cleaning) for sample in raw]
    pictures = [_picture(sample, pipeline) for sample in raw]
    captions = [(known["captions"] or [""])[0] for known in metadata]
    batch = Batch(
        pictures=stacked(pictures, pipeline.inputs),
        text=tokenise(pipeline.tokenizer, captions, pipeline.inputs),
        positions=torch.from_numpy(np.array(work.positions)),
        keys=tuple(sample.key for sample in raw),
    )
    return batch, metadata


def describe(raw: RawSample, fields: CaptionFields, cleaning: Cleaning) -> dict:
    """What evaluation wants to know of a sample; see evaluation_batch. Captions are those of the first field."""
    try:
        known = metadata_of(raw.files) | {"key": raw.key, "captions": []}
        if "cls" in raw.files:
            known["label"] = int(raw.files["cls"])
        else:
            found = captions_of(raw.files, fields.names[0])
            known["captions"] = [clean_caption(caption, cleaning) for caption in found]
    except ValueError as error:
        raise _about(raw, error) from error
    return known


def _picture(raw: RawSample, pipeline: Pipeline) -> Picture:
    try:
        return evaluation_picture(raw, pipeline.inputs, pipeline.image)
    except ValueError as error:
        raise _about(raw, error) from error


def _about(raw: RawSample, error: ValueError) -> ValueError:
    return ValueError(f"{raw.shard}: sample {raw.key!r}: {error}")
