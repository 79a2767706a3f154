"""The nouns that flow through a run, and the legend of every shape in the project.

    B  pairs per rank and step          W  ranks               N  = B * W, pairs in the global batch
    P  patches per image                T  packed tokens       L  tokens of one sequence
    D  width of a token                 V  vocabulary          K  patches kept per image

Sequences are packed, never padded: the tokens of all sequences lie one after another in one [T, D] tensor and
`offsets` says where each begins. Sequence i is x[offsets[i]:offsets[i + 1]].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """B packed sequences: what every tower takes and returns.

    x:       [T, D] token vectors, or [T] token ids.
    offsets: [B + 1] int32, on x's device; offsets[0] = 0, offsets[B] = T.
    longest: the largest length, known on the host so that no kernel launch waits for the device.
    """

    x: Tensor
    offsets: Tensor
    longest: int

    def lengths(self) -> Tensor:
        """[B] int32, the number of tokens in each sequence."""
        return self.offsets[1:] - self.offsets[:-1]

    def with_x(self, x: Tensor) -> "Tokens":
        """The same sequences with other vectors, x [T, ...]."""
        return Tokens(x, self.offsets, self.longest)

    def sequence_index(self) -> Tensor:
        """[T] int64, the index of the sequence that each token belongs to."""
        index = torch.arange(len(self.offsets) - 1, device=self.x.device)
        return torch.repeat_interleave(index, self.lengths().long(), output_size=len(self.x))

    def position(self) -> Tensor:
        """[T] int64, each token's place in its own sequence, from 0."""
        return torch.arange(len(self.x), device=self.x.device) - self.offsets[self.sequence_index()].long()

    def to(self, device: torch.device | str) -> "Tokens":
        return Tokens(self.x.to(device, non_blocking=True), self.offsets.to(device, non_blocking=True), self.longest)


def pack(sequences: Sequence[Tensor]) -> Tokens:
    """Lay sequences ([L_i, D] or [L_i]) one after another. Raises ValueError for an empty list."""
    if not sequences:
        raise ValueError("cannot pack an empty list of sequences")
    lengths = [len(sequence) for sequence in sequences]
    offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=sequences[0].device)
    return Tokens(torch.cat(list(sequences)), offsets, max(lengths))


def pack_equal(x: Tensor) -> Tokens:
    """[B, L, D] -> Tokens of B sequences of the same length L. A view: nothing is copied."""
    batch, length = x.shape[:2]
    offsets = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=x.device)
    return Tokens(x.reshape(batch * length, *x.shape[2:]), offsets, length)


def unpack(tokens: Tokens) -> list[Tensor]:
    """The sequences, one tensor each. Waits for the device: for tests, reports and host-side code."""
    return list(torch.split(tokens.x, tokens.lengths().tolist()))


def concatenate(parts: Sequence[Tokens]) -> Tokens:
    """The sequences of all parts, in order, as one Tokens."""
    shift, offsets = 0, [parts[0].offsets[:1]]
    for part in parts:
        offsets.append(part.offsets[1:] + shift)
        shift += len(part.x)
    return Tokens(torch.cat([part.x for part in parts]), torch.cat(offsets), max(part.longest for part in parts))


class Regions(NamedTuple):
    """What a detector found in B images, R regions in all.

    features: Tokens of B sequences, x [R, F] fp16, a vector per region.
    boxes:    [R, 7] fp32: x1, y1, x2, y2, width, height, area, as shares of the image's sides and area.
    classes:  [R, C] fp16, the detector's distribution over its classes; C is 0 where nobody wants it.
    """

    features: Tokens
    boxes: Tensor
    classes: Tensor


@dataclass(frozen=True)
class Pictures:
    """B images in the form that the image tower takes: one of pixels, patches and regions is there.

    pixels:       [B, 3, H, W] uint8 RGB; the tower normalises, on its own device.
    kept_patches: [B, K] int64, ascending, patches of `pixels` that are kept; None where all are.
    patches:      whole images of any shape, Tokens with x [T, 3 * S * S] uint8 for patches of S x S pixels in the
                  order (channel, row, column).
    places:       [T] int64, each patch's place in the grid of its own image, row by row.
    grids:        [B, 2] int64, rows and columns of patches of each image, on the host.
    regions:      what a detector found.
    """

    pixels: Tensor | None = None
    kept_patches: Tensor | None = None
    patches: Tokens | None = None
    places: Tensor | None = None
    grids: Tensor | None = None
    regions: Regions | None = None

    def __len__(self) -> int:
        if self.pixels is not None:
            return len(self.pixels)
        tokens = self.patches if self.regions is None else self.regions.features
        assert tokens is not None, "a Pictures without pixels, patches and regions"
        return len(tokens.offsets) - 1


class MaskedWords(NamedTuple):
    """Words to be guessed. They share the packing of the batch's text.

    ids:    [T] int64, the text's ids, some of them replaced.
    chosen: [T] bool, where the original id is to be guessed.
    count:  how many are, known on the host.
    """

    ids: Tensor
    chosen: Tensor
    count: int


class MaskedRegions(NamedTuple):
    """Regions to be guessed. They share the packing of the batch's regions.

    chosen: [R] bool.
    count:  how many are, known on the host.
    """

    chosen: Tensor
    count: int


class Partners(NamedTuple):
    """For image-text matching: B pictures of which some belong to other samples.

    pictures: of each text its own, or another sample's.
    matches:  [B] bool, whether it is its own.
    """

    pictures: Pictures
    matches: Tensor


@dataclass(frozen=True)
class Batch:
    """B pairs on one rank.

    pictures:     the images.
    text:         token ids, Tokens with x [T] int64.
    positions:    [B] int64, each sample's place in the endless global order: with the seed it keys every random choice.
    keys:         the samples' keys in their shards.
    views:        [B, V, 3, H, W] uint8, V further crops of each image, or None where there are none.
    view_parameters: [B, V, 8] fp32, what `ops/augment.py` does to each view; stays on the host, which plans by it.
    masked_words, masked_regions, partners: what the method's task wants, or None.
    draws:        [B, n] fp64, uniform in [0, 1), for what the method draws per sample; None where it draws nothing.
    task:         which of the method's tasks this batch is for, the same on all ranks; empty where there is but one.
    """

    pictures: Pictures
    text: Tokens
    positions: Tensor
    keys: tuple[str, ...]
    views: Tensor | None = None
    view_parameters: Tensor | None = None
    masked_words: MaskedWords | None = None
    masked_regions: MaskedRegions | None = None
    partners: Partners | None = None
    draws: Tensor | None = None
    task: str = ""

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> "Batch":
        """On a device, all but positions, view_parameters and grids, which the host reads; copies overlap if pinned."""
        return _moved(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """In page-locked memory, all that `to` moves. The name is the one that torch's DataLoader looks for."""
        return _moved(self, Tensor.pin_memory)

    def moving(self) -> list[Tensor]:
        """The tensors that `to` moves."""
        tensors: list[Tensor] = []
        _moved(self, lambda tensor: tensors.append(tensor) or tensor)
        return tensors

    def split(self, parts: int) -> list["Batch"]:
        """Cut into micro-batches of equal size, in order. Call on the host: it reads offsets.

        Raises ValueError when the batch cannot be divided evenly.
        """
        if parts < 1 or len(self) % parts:
            raise ValueError(f"cannot cut a batch of {len(self)} pairs into {parts} equal micro-batches")
        size = len(self) // parts
        return [self] if parts == 1 else [self.part(i, i + size) for i in range(0, len(self), size)]

    def part(self, first: int, last: int) -> "Batch":
        """Pairs first to last. Call on the host: it reads offsets."""
        words = span(self.text, first, last)
        regions = slice(0, 0) if self.pictures.regions is None else span(self.pictures.regions.features, first, last)
        masked, guessed = self.masked_words, self.masked_regions
        return replace(
            self,
            pictures=part_of_pictures(self.pictures, first, last),
            text=part_of_tokens(self.text, first, last),
            positions=self.positions[first:last],
            keys=self.keys[first:last],
            views=_rows(self.views, first, last),
            view_parameters=_rows(self.view_parameters, first, last),
            masked_words=masked
            and MaskedWords(masked.ids[words], masked.chosen[words], int(masked.chosen[words].sum())),
            masked_regions=guessed and MaskedRegions(guessed.chosen[regions], int(guessed.chosen[regions].sum())),
            partners=self.partners
            and Partners(part_of_pictures(self.partners.pictures, first, last), self.partners.matches[first:last]),
            draws=_rows(self.draws, first, last),
        )


ON_THE_HOST = ("positions", "view_parameters", "grids")
T = TypeVar("T")


def _moved(noun: T, move: Callable[[Tensor], Tensor]) -> T:
    """The noun with each tensor in it, those of nouns within too, moved; but for those that the host reads."""

    def moved(name: str, value: Any) -> Any:
        if name in ON_THE_HOST:
            return value
        if isinstance(value, Tensor):
            return move(value)
        return _moved(value, move) if isinstance(value, NOUNS) else value

    if isinstance(noun, tuple):
        return type(noun)(*(moved(name, value) for name, value in zip(noun._fields, noun)))  # type: ignore[attr-defined]
    changed = {field.name: moved(field.name, getattr(noun, field.name)) for field in fields(noun)}  # type: ignore[arg-type]
    return replace(noun, **changed)  # type: ignore[type-var]


NOUNS = (Tokens, Regions, Pictures, MaskedWords, MaskedRegions, Partners)


def to_device(pictures: Pictures, device: torch.device | str) -> Pictures:
    """All of it but the grids."""
    return _moved(pictures, lambda tensor: tensor.to(device, non_blocking=True))


def span(tokens: Tokens, first: int, last: int) -> slice:
    """The rows of x that belong to sequences first to last. Waits for the device."""
    return slice(int(tokens.offsets[first]), int(tokens.offsets[last]))


def part_of_tokens(tokens: Tokens, first: int, last: int) -> Tokens:
    """Sequences first to last. Waits for the device."""
    offsets = tokens.offsets[first : last + 1] - tokens.offsets[first]
    longest = int((offsets[1:] - offsets[:-1]).max()) if last > first else 0
    return Tokens(tokens.x[span(tokens, first, last)], offsets, longest)


def part_of_pictures(pictures: Pictures, first: int, last: int) -> Pictures:
    """Images first to last. Waits for the device where they are not pixels."""
    patches, regions = pictures.patches, pictures.regions
    rows = slice(0, 0) if regions is None else span(regions.features, first, last)
    return Pictures(
        pixels=_rows(pictures.pixels, first, last),
        kept_patches=_rows(pictures.kept_patches, first, last),
        patches=patches and part_of_tokens(patches, first, last),
        places=None if patches is None or pictures.places is None else pictures.places[span(patches, first, last)],
        grids=_rows(pictures.grids, first, last),
        regions=regions
        and Regions(part_of_tokens(regions.features, first, last), regions.boxes[rows], regions.classes[rows]),
    )


def _rows(tensor: Tensor | None, first: int, last: int) -> Tensor | None:
    return None if tensor is None else tensor[first:last]
