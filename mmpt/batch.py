"""The nouns that flow through a run, and the legend of every shape in the project.

    B  pairs per rank and step          W  ranks               N  = B * W, pairs in the global batch
    P  patches per image                T  packed tokens       L  tokens of one sequence
    D  width of a token                 V  vocabulary          K  patches kept per image

Sequences are packed, never padded: the tokens of all sequences lie one after another in one [T, D] tensor and
`offsets` says where each begins. Sequence i is x[offsets[i]:offsets[i + 1]].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal, NamedTuple

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


@dataclass(frozen=True)
class InputSpec:
    """What a method wants from the loader: derived from the model's configuration, so that each fact has one knob."""

    image_size: int
    """Height and width of the crop, in pixels; of extra views too. The shorter side where image_resize says so."""
    max_text_tokens: int
    """Captions are cut to this many tokens, special tokens included."""
    vocab_size: int
    """Rows of the token embedding; the tokenizer may not produce an id beyond it."""
    text_padding: Literal["none", "max"] = "none"
    """`max`: pads are tokens like any other and fill each caption to max_text_tokens (SigLIP as published)."""
    patches: int = 0
    """Patches per image before any is dropped; 0 where the image tower has no patches."""
    kept_patches: int = 0
    """Patches kept per image in training (FLIP's patch dropout); equal to `patches` where all are kept."""
    extra_views: int = 0
    """Further crops of each image, for losses between views (SLIP wants 2)."""
    image_resize: Literal["square", "shorter_side", "native"] = "square"
    """`square` crops; or whole images of any shape as packed patches: resized so that the shorter side is image_size,
    or as large as they are. Both within longest_side, their sides cut down to multiples of patch_size."""
    longest_side: int = 0
    """Most pixels of a side of a whole image, where those are wanted."""
    patch_size: int = 0
    """Side of a patch in pixels, where whole images are wanted."""

    def __post_init__(self):
        if self.image_resize == "square":
            return
        if self.patch_size < 1 or self.longest_side < self.patch_size:
            raise ValueError(
                f"images resized to {self.image_resize!r} want a patch_size ({self.patch_size}) of 1 or more "
                f"and a longest_side ({self.longest_side}) of at least a patch"
            )
        if self.kept_patches != self.patches:
            raise ValueError(f"patches cannot be dropped from images resized to {self.image_resize!r}")


@dataclass(frozen=True)
class Sample:
    """One pair as it lies in a shard, undecoded."""

    key: str
    image: bytes
    caption: str
    metadata: dict


@dataclass(frozen=True)
class Batch:
    """B pairs on one rank.

    images:       [B, 3, H, W] uint8 RGB; the image tower normalises, on its own device.
    text:         token ids, Tokens with x [T] int64.
    positions:    [B] int64, each sample's place in the endless global order: with the seed it keys every random choice.
    kept_patches: [B, K] int64, ascending, or None where every patch is kept.
    keys:         the samples' keys in their shards.
    views:        [B, V, 3, H, W] uint8, V further crops of each image, or None where there are none.
    view_parameters: [B, V, 8] fp32, what `ops/augment.py` does to each view; stays on the host, which plans by it.
    patches:      whole images of any shape as packed patches, Tokens with x [T, 3 * S * S] uint8 for patches of S x S
                  pixels in the order (channel, row, column), row by row; `images` is then [B, 3, 0, 0]. Or None.
    grids:        [B, 2] int64, rows and columns of patches of each image, on the host; None where patches is.
    """

    images: Tensor
    text: Tokens
    positions: Tensor
    kept_patches: Tensor | None
    keys: tuple[str, ...]
    views: Tensor | None = None
    view_parameters: Tensor | None = None
    patches: Tokens | None = None
    grids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> "Batch":
        """On a device, all but positions, view_parameters and grids, which the host reads; copies overlap if pinned."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """In page-locked memory, all that `to` moves. The name is the one that torch's DataLoader looks for."""
        return self._moved(Tensor.pin_memory)

    def moving(self) -> list[Tensor]:
        """The tensors that `to` moves."""
        tensors: list[Tensor] = []
        self._moved(lambda tensor: tensors.append(tensor) or tensor)
        return tensors

    def _moved(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(
            self,
            images=move(self.images),
            text=_moved_tokens(self.text, move),
            kept_patches=None if self.kept_patches is None else move(self.kept_patches),
            views=None if self.views is None else move(self.views),
            patches=None if self.patches is None else _moved_tokens(self.patches, move),
        )

    def split(self, parts: int) -> list["Batch"]:
        """Cut into micro-batches of equal size, in order. Call on the host: it reads offsets.

        Raises ValueError when the batch cannot be divided evenly.
        """
        if parts < 1 or len(self) % parts:
            raise ValueError(f"cannot cut a batch of {len(self)} pairs into {parts} equal micro-batches")
        if parts == 1:
            return [self]
        size, texts = len(self) // parts, unpack(self.text)
        patches = None if self.patches is None else unpack(self.patches)
        return [
            Batch(
                self.images[i : i + size],
                pack(texts[i : i + size]),
                self.positions[i : i + size],
                _rows(self.kept_patches, i, i + size),
                self.keys[i : i + size],
                _rows(self.views, i, i + size),
                _rows(self.view_parameters, i, i + size),
                None if patches is None else pack(patches[i : i + size]),
                _rows(self.grids, i, i + size),
            )
            for i in range(0, len(self), size)
        ]


def _moved_tokens(tokens: Tokens, move: Callable[[Tensor], Tensor]) -> Tokens:
    return Tokens(move(tokens.x), move(tokens.offsets), tokens.longest)


def _rows(tensor: Tensor | None, start: int, stop: int) -> Tensor | None:
    return None if tensor is None else tensor[start:stop]
