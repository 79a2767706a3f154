"""Features of a data set, spread over ranks: encoding in step, choosing, gathering.

Features are what a method's encoders return: [A, D] vectors, or `Tokens` with A sequences. Parameters are used only
through `call(name, *args)`, the engine or the plain method. With sharded parameters every call is a collective, so
every rank makes the same number of calls: a rank that has run out of data encodes a blank and keeps nothing of it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmpt import dist
from mmpt.batch import Pictures, Regions, Tokens, concatenate, pack, pack_equal, to_device, unpack
from mmpt.inputs import InputSpec
from mmpt.ops.features import Features, sequences

Call = Callable[..., Any]
T = TypeVar("T")


def in_step(items: Iterator[T], device: torch.device | str) -> Iterator[T | None]:
    """Our items, then None until every rank has run out of its own: all ranks get equally many. Collective."""
    item = next(items, None)
    while not dist.all_true(item is None, device):
        yield item
        item = None if item is None else next(items, None)


def encode_images(call: Call, pictures: Pictures | None, inputs: InputSpec, device: torch.device | str) -> Features:
    """Features of B images; for None, encode a blank to keep step and return features of no image."""
    if pictures is not None:
        return call("encode_image", to_device(pictures, device))
    return none_of(call("encode_image", to_device(blank(inputs), device)))


def blank(inputs: InputSpec) -> Pictures:
    """One image in the form that the method takes, with nothing on it."""
    if inputs.regions is not None:
        one = pack_equal(torch.zeros(1, 1, inputs.regions.width, dtype=torch.float16))
        return Pictures(regions=Regions(one, torch.zeros(1, 7), torch.zeros(1, inputs.regions.classes)))
    if inputs.image_resize == "square":
        return Pictures(pixels=torch.zeros(1, 3, inputs.image_size, inputs.image_size, dtype=torch.uint8))
    patch = pack_equal(torch.zeros(1, 1, 3 * inputs.patch_size**2, dtype=torch.uint8))
    return Pictures(patches=patch, places=torch.zeros(1, dtype=torch.int64), grids=torch.ones(1, 2, dtype=torch.int64))


def encode_texts(call: Call, ids: Tokens | None, inputs: InputSpec, device: torch.device | str) -> Features:
    """Features of packed token ids; for None, encode a blank to keep step and return features of no text."""
    if ids is not None:
        return call("encode_text", ids.to(device))
    blank = torch.zeros(1, inputs.max_text_tokens, dtype=torch.int64, device=device)
    return none_of(call("encode_text", pack_equal(blank)))


def encode_all_texts(call: Call, parts: Iterator[Tokens], inputs: InputSpec, device: torch.device | str) -> Features:
    """Features of all of this rank's texts, given as packed token ids part by part. Collective."""
    return join([encode_texts(call, ids, inputs, device) for ids in in_step(parts, device)])


def join(parts: Sequence[Features]) -> Features:
    """All parts, at least one and all of one kind, in order."""
    if isinstance(parts[0], Tokens):
        return concatenate([part for part in parts if isinstance(part, Tokens)])
    return torch.cat([part for part in parts if isinstance(part, Tensor)])


def select(features: Features, index: list[int]) -> Features:
    """The images or texts at these places, at least one, in this order."""
    if not isinstance(features, Tokens):
        return features[index]
    sequences = unpack(features)
    return pack([sequences[i] for i in index])


def none_of(features: Features) -> Features:
    """Features of no image or text, of the same kind and width."""
    return Tokens(features.x[:0], features.offsets[:1], 0) if isinstance(features, Tokens) else features[:0]


def gather_features(features: Features) -> Features:
    """Every rank's features in rank order, on every rank; ranks may hold different numbers, not all 0. Collective."""
    if dist.world_size() == 1:
        return features
    counts = dist.gather_objects(sequences(features))
    most = max(counts)
    padded = join([features, *[_blank(features)] * (most - sequences(features))])
    everything = dist.gather_tokens(padded) if isinstance(padded, Tokens) else dist.gather(padded)
    return select(everything, [r * most + i for r, held in enumerate(counts) for i in range(held)])


def _blank(features: Features) -> Features:
    """One image or text of zeros, to pad with."""
    if isinstance(features, Tokens):
        return pack_equal(features.x.new_zeros(1, 1, *features.x.shape[1:]))
    return features.new_zeros(1, *features.shape[1:])
