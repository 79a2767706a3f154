"""The world of the built-in scene data set: what objects exist, where they stand, and what is true of them.

A scene holds one to three objects, each a shape of a colour and a size, none overlapping another. Some pairs of colour
and shape (`NEVER_TRAINED`) occur in no training scene; every held-out scene has at least one of them, so a model that
finds its caption has put together a colour and a shape that it has never seen together.
"""

from dataclasses import dataclass, replace
from itertools import permutations
from typing import Literal

import numpy as np

COLOURS = {
    "red": (214, 40, 40),
    "orange": (244, 130, 24),
    "yellow": (248, 216, 40),
    "green": (44, 160, 60),
    "cyan": (56, 208, 216),
    "blue": (36, 80, 210),
    "purple": (128, 44, 168),
    "pink": (246, 140, 190),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": (0.20, 0.25), "large": (0.36, 0.44)}  # side of the object's square, as a share of the image's side
GAP = 0.03  # least free space between two objects and to the edge, as a share of the image's side

# Two shapes for each colour, two or three colours for each shape.
NEVER_TRAINED = frozenset(
    {
        ("red", "circle"), ("red", "triangle"), ("orange", "square"), ("orange", "star"),
        ("yellow", "triangle"), ("yellow", "cross"), ("green", "star"), ("green", "ring"),
        ("cyan", "cross"), ("cyan", "circle"), ("blue", "ring"), ("blue", "square"),
        ("purple", "circle"), ("purple", "triangle"), ("pink", "square"), ("pink", "star"),
    }
)  # fmt: skip

Split = Literal["train", "held_out"]
Relation = Literal["left of", "right of", "above", "below"]
OPPOSITE: dict[Relation, Relation] = {
    "left of": "right of", "right of": "left of", "above": "below", "below": "above",
}  # fmt: skip


@dataclass(frozen=True)
class SceneObject:
    """One object; `x`, `y` and `side` place the square that it fills, as shares of the image's side."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    side: float
    turn_degrees: float

    def centre(self) -> tuple[float, float]:
        return self.x + self.side / 2, self.y + self.side / 2

    def never_trained(self) -> bool:
        return (self.colour, self.shape) in NEVER_TRAINED


@dataclass(frozen=True)
class Mention:
    """What a caption says of one object: a colour, a shape and, where it says one, a size."""

    size: str | None
    colour: str
    shape: str

    def fits(self, thing: SceneObject) -> bool:
        return (self.colour, self.shape) == (thing.colour, thing.shape) and self.size in (None, thing.size)

    def __str__(self) -> str:
        return " ".join(filter(None, (self.size, self.colour, self.shape)))


@dataclass(frozen=True)
class Statement:
    """The content of a caption apart from its wording; `relation` is between the mentions 0 and 1."""

    mentions: tuple[Mention, ...]
    relation: Relation | None

    def canonical(self) -> str:
        """A text equal for two statements exactly when they say the same of the same mentions."""
        said = "; ".join(sorted(map(str, self.mentions)))
        if self.relation is None:
            return said
        first, second = map(str, self.mentions[:2])
        relation = self.relation
        if relation in ("right of", "below"):
            first, second, relation = second, first, OPPOSITE[relation]
        return f"{said} | {first} {relation} {second}"


def holds(relation: Relation, first: SceneObject, second: SceneObject) -> bool:
    """Whether the first object's centre lies at all to that side of the second's."""
    (x1, y1), (x2, y2) = first.centre(), second.centre()
    return {"left of": x1 < x2, "right of": x1 > x2, "above": y1 < y2, "below": y1 > y2}[relation]


def relation_between(first: SceneObject, second: SceneObject) -> Relation:
    """The relation along the axis on which the two centres lie further apart."""
    (x1, y1), (x2, y2) = first.centre(), second.centre()
    if abs(x1 - x2) >= abs(y1 - y2):
        return "left of" if x1 < x2 else "right of"
    return "above" if y1 < y2 else "below"


def is_true(statement: Statement, things: tuple[SceneObject, ...]) -> bool:
    """Whether some choice of distinct objects fits every mention and the relation."""
    return any(
        all(mention.fits(thing) for mention, thing in zip(statement.mentions, chosen))
        and (statement.relation is None or holds(statement.relation, chosen[0], chosen[1]))
        for chosen in permutations(things, len(statement.mentions))
    )


def swap_colours(things: tuple[SceneObject, ...], first: int, second: int) -> tuple[SceneObject, ...]:
    """The same objects with the colours of two of them exchanged."""
    swapped = list(things)
    swapped[first] = replace(things[first], colour=things[second].colour)
    swapped[second] = replace(things[second], colour=things[first].colour)
    return tuple(swapped)


def sample_things(rng: np.random.Generator, split: Split) -> tuple[SceneObject, ...]:
    """Draw the objects of a scene.

    Training scenes have 1, 2 or 3 objects (10, 60, 30 %), none in NEVER_TRAINED. Held-out scenes have 2 or 3 (65,
    35 %), at least one of the first two in NEVER_TRAINED, and those two differ in colour and have as many in
    NEVER_TRAINED after their colours are exchanged as before: the statistics of words cannot tell a held-out caption
    from its twin.
    """
    shares = (0.10, 0.60, 0.30) if split == "train" else (0.0, 0.65, 0.35)
    count = int(rng.choice(3, p=shares)) + 1
    while True:
        kinds = tuple(_sample_kind(rng) for _ in range(count))
        if (_fits_training if split == "train" else _fits_held_out)(kinds) and (placed := _place(rng, kinds)):
            return placed


def _sample_kind(rng: np.random.Generator) -> SceneObject:
    colour, shape, size = rng.choice(list(COLOURS)), rng.choice(SHAPES), rng.choice(list(SIZES))
    side, turn = rng.uniform(*SIZES[str(size)]), rng.uniform(-12.0, 12.0)
    return SceneObject(str(shape), str(colour), str(size), 0.0, 0.0, float(side), float(turn))


def _fits_training(kinds: tuple[SceneObject, ...]) -> bool:
    return not any(kind.never_trained() for kind in kinds)


def _fits_held_out(kinds: tuple[SceneObject, ...]) -> bool:
    unseen = sum(kind.never_trained() for kind in kinds[:2])
    unseen_swapped = sum(kind.never_trained() for kind in swap_colours(kinds, 0, 1)[:2])
    alike = (kinds[0].shape, kinds[0].size) == (kinds[1].shape, kinds[1].size)
    return kinds[0].colour != kinds[1].colour and not alike and 0 < unseen == unseen_swapped


def _place(rng: np.random.Generator, kinds: tuple[SceneObject, ...], tries: int = 50) -> tuple[SceneObject, ...]:
    """Put the objects where none comes within GAP of another or of the edge; () when no place was found."""
    placed: list[SceneObject] = []
    for kind in kinds:
        for _ in range(tries):
            x, y = rng.uniform(GAP, 1 - GAP - kind.side, 2)
            thing = replace(kind, x=float(x), y=float(y))
            if not any(_too_close(thing, other) for other in placed):
                placed.append(thing)
                break
        else:
            return ()
    return tuple(placed)


def _too_close(a: SceneObject, b: SceneObject) -> bool:
    return (
        a.x < b.x + b.side + GAP and b.x < a.x + a.side + GAP and a.y < b.y + b.side + GAP and b.y < a.y + a.side + GAP
    )
