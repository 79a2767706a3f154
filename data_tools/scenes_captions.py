"""Captions for scenes: varied wording over exact content, with the words that speak of each object marked."""

from dataclasses import dataclass, replace

import numpy as np

from data_tools.scenes_world import OPPOSITE, Mention, Relation, SceneObject, Statement, relation_between

SHAPE_WORDS = {
    "circle": ("circle", "disc"), "square": ("square", "box"), "triangle": ("triangle",),
    "star": ("star",), "cross": ("cross", "plus"), "ring": ("ring", "hoop"),
}  # fmt: skip
SIZE_WORDS = {"small": ("small", "tiny"), "large": ("large", "big")}
RELATION_WORDS: dict[Relation, tuple[str, ...]] = {
    "left of": ("left of", "to the left of"), "right of": ("right of", "to the right of"),
    "above": ("above", "over"), "below": ("below", "under"),
}  # fmt: skip

# {0}, {1}, {2} stand for noun phrases; {rel} says where 0 is seen from 1, {inverse} where 1 is seen from 0.
ONE = ("{0}", "there is {0}", "a picture of {0}", "we see {0}")
TWO = ("{0} and {1}", "there is {0} and {1}", "a picture of {0} with {1}")
TWO_RELATED = (
    "{0} {rel} {1}", "{0} is {rel} {1}", "there is {0} {rel} {1}", "{0} with {1} {inverse} it", "we see {0} {rel} {1}",
)  # fmt: skip
THREE = ("{0} , {1} and {2}", "there is {0} , {1} and {2}", "a picture of {0} , {1} and {2}")
THREE_RELATED = ("{0} {rel} {1} , and {2}", "{2} , and {0} {rel} {1}", "{0} {rel} {1} with {2}")

RELATED_SHARE = 0.75  # of the captions with two or more objects, how many say a relation
SIZED_SHARE = 0.7  # of all captions, how many say the sizes


@dataclass(frozen=True)
class Word:
    """A word of a caption that speaks of object `thing`: text[start:end] is its colour, shape or size word."""

    text: str
    start: int
    end: int
    thing: int
    kind: str


@dataclass(frozen=True)
class Phrase:
    """The words chosen for one object: `mention` is what they say, `thing` the object's index in the scene."""

    thing: int
    mention: Mention
    size_word: str | None
    shape_word: str

    def words(self) -> list[tuple[str, str]]:
        """(word, kind) in order, after the article."""
        size = [] if self.size_word is None else [(self.size_word, "size")]
        return [*size, (self.mention.colour, "colour"), (self.shape_word, "shape")]


@dataclass(frozen=True)
class Caption:
    """A template, the phrases that fill it and the relation of phrase 0 to phrase 1, where it says one."""

    template: str
    phrases: tuple[Phrase, ...]
    relation: Relation | None
    relation_words: str
    inverse_words: str

    def statement(self) -> Statement:
        return Statement(tuple(phrase.mention for phrase in self.phrases), self.relation)

    def render(self) -> tuple[str, tuple[Word, ...]]:
        """The text, and the words in it that speak of an object, in order."""
        text, marked = "", []
        for slot in self.template.split():
            if slot in ("{rel}", "{inverse}"):
                text += " " + (self.relation_words if slot == "{rel}" else self.inverse_words)
            elif slot.startswith("{"):
                phrase = self.phrases[int(slot[1])]
                words = phrase.words()
                text += " an" if words[0][0][0] in "aeiou" else " a"
                for word, kind in words:
                    text += " " + word
                    # Offsets count from after the leading space that the return strips.
                    marked.append(Word(word, len(text) - 1 - len(word), len(text) - 1, phrase.thing, kind))
            else:
                text += slot if slot == "," else " " + slot
        return text[1:], tuple(marked)


def write_caption(rng: np.random.Generator, things: tuple[SceneObject, ...]) -> Caption:
    """A true caption of all objects, in random order and wording. The relation, if any, is between things 0 and 1."""
    related = len(things) > 1 and rng.random() < RELATED_SHARE
    sized = rng.random() < SIZED_SHARE
    order: list[int] = rng.permutation(len(things)).tolist()
    if related:  # the relation is said of objects 0 and 1, either one first; a third follows
        order = [*rng.permutation(2).tolist(), *range(2, len(things))]
    phrases = tuple(_phrase(rng, i, things[i], sized) for i in order)
    templates = {1: (ONE, ONE), 2: (TWO, TWO_RELATED), 3: (THREE, THREE_RELATED)}[len(things)][related]
    template = str(rng.choice(templates))
    if not related:
        return Caption(template, phrases, None, "", "")
    relation = relation_between(things[order[0]], things[order[1]])
    said, inverse = (str(rng.choice(RELATION_WORDS[r])) for r in (relation, OPPOSITE[relation]))
    return Caption(template, phrases, relation, said, inverse)


def _phrase(rng: np.random.Generator, index: int, thing: SceneObject, sized: bool) -> Phrase:
    size_word = str(rng.choice(SIZE_WORDS[thing.size])) if sized else None
    mention = Mention(thing.size if sized else None, thing.colour, thing.shape)
    return Phrase(index, mention, size_word, str(rng.choice(SHAPE_WORDS[thing.shape])))


def recolour(caption: Caption, colours: dict[int, str]) -> Caption:
    """The same wording with other colour words for the objects named in `colours` (object index -> colour)."""
    phrases = tuple(
        replace(phrase, mention=replace(phrase.mention, colour=colours.get(phrase.thing, phrase.mention.colour)))
        for phrase in caption.phrases
    )
    return replace(caption, phrases=phrases)
