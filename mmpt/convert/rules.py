"""The common language of all foreign checkpoints: a rule says which of their tensors is which of ours, and how.

A table of rules works in both directions, so that import and export cannot disagree. In a name, `{n}` is the number of
a block. A rule whose tensor our model does not have is idle: one table serves models with and without a part.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import isqrt
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn


class Via(NamedTuple):
    """How tensors change on the way; the two functions are each other's inverse."""

    to_ours: Callable[[Sequence[Tensor]], Tensor]
    """From one tensor per foreign name."""
    to_theirs: Callable[[Tensor, int], Sequence[Tensor]]
    """To as many tensors as there are foreign names."""


def _leading(ones: int) -> Via:
    """[1, ..., 1, *] there, [*] here."""

    def drop(theirs: Sequence[Tensor]) -> Tensor:
        shape = theirs[0].shape
        if any(size != 1 for size in shape[:ones]):
            raise ValueError(f"a tensor of shape {list(shape)} does not begin with {ones} dimensions of size 1")
        return theirs[0].reshape(shape[ones:])

    return Via(drop, lambda ours, _: [ours.reshape((1,) * ones + tuple(ours.shape))])


AS_IS = Via(lambda theirs: theirs[0], lambda ours, _: [ours])
TRANSPOSED = Via(lambda theirs: theirs[0].T, lambda ours, _: [ours.T])
STACKED = Via(lambda theirs: torch.cat(list(theirs)), lambda ours, parts: ours.chunk(parts))
"""Several tensors one under another: the weights of queries, keys and values."""
SCALAR = Via(lambda theirs: theirs[0].reshape(1), lambda ours, _: [ours.reshape(())])
"""A number without dimension there, [1] here; [1] there is read too."""
NUMBER = Via(lambda theirs: theirs[0].reshape(1), lambda ours, _: [ours])
"""A number of shape [1] on either side; one without dimension there is read too."""
FIRST_THIRD = Via(lambda theirs: theirs[0][: len(theirs[0]) // 3], lambda ours, _: [ours])
LAST_TWO_THIRDS = Via(lambda theirs: theirs[0][len(theirs[0]) // 3 :], lambda ours, _: [ours])
"""Queries there in one tensor with keys and values, here apart; the table has queries first."""
PATCHES = Via(
    lambda theirs: theirs[0].flatten(1),
    lambda ours, _: [ours.reshape(len(ours), 3, isqrt(ours.shape[1] // 3), isqrt(ours.shape[1] // 3))],
)
"""A convolution [D, 3, S, S] over patches there, a linear map [D, 3 * S * S] here."""
ONE_BEFORE, TWO_BEFORE = _leading(1), _leading(2)
SECOND_ROW = Via(
    lambda theirs: theirs[0][1], lambda ours, _: [torch.stack([torch.zeros_like(ours), ours])]
)  # fmt: skip
"""[2, D] with a first row of zeros there, [D] here."""


class Rule(NamedTuple):
    theirs: tuple[str, ...]
    """Names that together are our one tensor."""
    ours: str
    via: Via = AS_IS
    resize: Literal["", "grid", "rows"] = ""
    """What may differ in size: positions in an image are stretched, positions in a text are cut."""
    shift: int = 0
    """Their block n + shift is our block n."""


def rule(theirs: str, ours: str, via: Via = AS_IS, resize: Literal["", "grid", "rows"] = "") -> tuple[Rule]:
    return (Rule((theirs,), ours, via, resize),)


def pair(theirs: str | tuple[str, ...], ours: str) -> tuple[Rule, Rule]:
    """Weight and bias of a linear map or a norm; several of theirs are stacked."""
    names = (theirs,) if isinstance(theirs, str) else theirs
    via = STACKED if len(names) > 1 else AS_IS
    weight, bias = (tuple(f"{name}.{kind}" for name in names) for kind in ("weight", "bias"))
    return Rule(weight, f"{ours}.weight", via), Rule(bias, f"{ours}.bias", via)


def under(rules: Iterable[Rule], theirs: str, ours: str, shift: int = 0) -> tuple[Rule, ...]:
    """The rules with a prefix before the names of either side."""
    return tuple(
        r._replace(theirs=tuple(theirs + name for name in r.theirs), ours=ours + r.ours, shift=r.shift + shift)
        for r in rules
    )


def at(
    model: nn.Module, kind: type[nn.Module], rules: Iterable[Rule], theirs: str = "", shift: int = 0
) -> tuple[Rule, ...]:
    """The rules for each module of a kind, wherever it lies in our model."""
    rules = tuple(rules)
    found: list[Rule] = []
    for name, module in model.named_modules():
        if isinstance(module, kind):
            found += under(rules, theirs, f"{name}." if name else "", shift)
    return tuple(found)


class Match(NamedTuple):
    """A rule for one tensor of ours, every block number filled in."""

    ours: str
    theirs: tuple[str, ...]
    rule: Rule


def matches(rules: Iterable[Rule], our_names: Iterable[str]) -> Iterator[Match]:
    """What the rules say about each of our tensors. ValueError where two rules speak of one: the table is wrong."""
    names, seen = sorted(our_names), set[str]()
    for r in rules:
        pattern = re.compile(re.escape(r.ours).replace(r"\{n\}", r"(?P<n>\d+)", 1).replace(r"\{n\}", r"(?P=n)"))
        for name in names:
            found = pattern.fullmatch(name)
            if not found:
                continue
            if name in seen:
                raise ValueError(f"two rules speak of {name}")
            seen.add(name)
            number = str(int(found["n"]) + r.shift) if "n" in found.groupdict() else ""
            yield Match(name, tuple(theirs.replace("{n}", number) for theirs in r.theirs), r)


def exported(rules: Iterable[Rule], ours: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """(their tensors, names of ours that no rule speaks of). Where several rules say something about one of theirs, the
    pieces are put one under another in the order of the table."""
    theirs: dict[str, Tensor] = {}
    left = set(ours)
    for match in matches(rules, ours):
        values = match.rule.via.to_theirs(ours[match.ours], len(match.theirs))
        for name, value in zip(match.theirs, values, strict=True):
            theirs[name] = torch.cat([theirs[name], value]) if name in theirs else value.contiguous()
        left.remove(match.ours)
    return theirs, sorted(left)
