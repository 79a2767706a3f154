"""How the texts of all ranks meet the images of one: gathered, or passing by in a ring.

Gathered, all N texts lie on every rank. In the ring each rank's texts go from rank to rank; a rank holds its own and
those that pass, computes while the next are under way, and nothing grows with the number of ranks but an [N] vector or
two. On the way back, gradients travel with the texts and are at home after the last hop.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from mmpt import dist
from mmpt.batch import Tokens
from mmpt.ops.features import Features, gather, sequences, values, with_values

Visit = tuple[slice, Features]
"""The columns, of N, that a block of texts has, and the texts."""
GradientOf = Callable[[slice, Features], Tensor]


class Texts(Protocol):
    @property
    def count(self) -> int:
        """N, those of all ranks."""
        ...

    def visits(self, x: Tensor) -> Iterator[Visit]:
        """Every text once, given the values that this rank holds."""
        ...

    def collect(self, x: Tensor, gradient_of: GradientOf) -> Tensor:
        """The gradient of x: what gradient_of gives for each block, on all ranks that it visits, summed."""
        ...


def exchange(text: Features, form: Literal["gather", "ring"]) -> tuple[Tensor, Texts]:
    """The values that this rank holds, with gradient to `text`, and how all texts come by. Collective."""
    if form == "gather" or dist.world_size() == 1:
        everything = gather(text)
        return values(everything), Gathered(everything, sequences(everything))
    return values(text), ring_of(text)


@dataclass(frozen=True)
class Gathered:
    layout: Features
    """Of which the values are replaced."""
    count: int

    def visits(self, x: Tensor) -> Iterator[Visit]:
        yield slice(0, self.count), with_values(self.layout, x)

    def collect(self, x: Tensor, gradient_of: GradientOf) -> Tensor:
        return gradient_of(slice(0, self.count), with_values(self.layout, x))


class Layout(NamedTuple):
    """Where one rank's texts lie in its values."""

    offsets: Tensor
    total: int
    longest: int


@dataclass(frozen=True)
class Ring:
    count: int
    rows: int
    """Of the values of a rank when they travel: as many as the rank with the most has."""
    layouts: tuple[Layout, ...] | None
    """Of each rank's tokens; None where features are vectors."""

    def visits(self, x: Tensor) -> Iterator[Visit]:
        block = self._padded(x)
        for owner in self._owners():
            coming = dist.pass_on(block) if owner != self._last_owner() else None
            yield self._visit(owner, block)
            if coming is not None:
                block = coming.wait()

    def collect(self, x: Tensor, gradient_of: GradientOf) -> Tensor:
        block, gradients, exact = self._padded(x), None, torch.promote_types(x.dtype, torch.float32)
        for owner in self._owners():
            coming = dist.pass_on(block) if owner != self._last_owner() else None
            gradient = self._padded(gradient_of(*self._visit(owner, block)).to(exact))
            if gradients is not None:
                gradient += gradients.wait()
            gradients = dist.pass_on(gradient, tag=1)
            if coming is not None:
                block = coming.wait()
        assert gradients is not None
        return gradients.wait()[: len(x)]

    def _owners(self) -> list[int]:
        """Whose texts are here, hop by hop: ours, then those of the rank before us, ..."""
        return [(dist.rank() - hop) % dist.world_size() for hop in range(dist.world_size())]

    def _last_owner(self) -> int:
        return (dist.rank() + 1) % dist.world_size()

    def _padded(self, x: Tensor) -> Tensor:
        out = x.new_zeros((self.rows, *x.shape[1:]))
        out[: len(x)] = x
        return out

    def _visit(self, owner: int, block: Tensor) -> Visit:
        each = self.count // dist.world_size()
        columns = slice(owner * each, (owner + 1) * each)
        if self.layouts is None:
            return columns, block
        layout = self.layouts[owner]
        return columns, Tokens(block[: layout.total], layout.offsets, layout.longest)


def ring_of(text: Features) -> Ring:
    """What all ranks must know before the first hop: how long the others' texts are. Collective."""
    count = sequences(text) * dist.world_size()
    if not isinstance(text, Tokens):
        return Ring(count, len(text), None)
    lengths = dist.gather(text.lengths()).view(dist.world_size(), -1)  # [W, B]
    offsets = torch.nn.functional.pad(lengths.cumsum(1, dtype=torch.int32), (1, 0))  # [W, B + 1]
    facts = torch.stack([offsets[:, -1], lengths.amax(1).int()], dim=1).tolist()
    layouts = tuple(Layout(own, total, longest) for own, (total, longest) in zip(offsets, facts, strict=True))
    return Ring(count, max(layout.total for layout in layouts), layouts)
