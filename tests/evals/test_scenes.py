"""Word-patch alignment, colour swaps and twins, on features made so that the right answer is known."""

import json

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from data_tools.scenes import make_sample
from mmpt.batch import Tokens, pack, unpack
from mmpt.evals.alignment import (
    Span,
    area_shares,
    kept_spans,
    object_at,
    patch_grid,
    tokens_of,
    word_maps,
    word_spans,
)
from mmpt.evals.scenes import KINDS, scenes
from tests.ranks import run

GRID, SIZE = 16, 64
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
NOTHING, BACKGROUND = 8, 9


def held_out(count: int) -> list[dict]:
    return [json.loads(make_sample(0, "held_out", SIZE, i)["json"]) for i in range(count)]


def spans(text: str) -> list[Span]:
    """One token per word, and a special one at each end."""
    return [(0, 0), *word_spans(text), (0, 0)]


def image_of(scene: dict) -> Tensor:
    """[256, 10]: each patch says the colour of the object whose box holds its centre."""
    colours = []
    for patch in range(GRID * GRID):
        on = object_at(patch, GRID, SIZE, [thing["box"] for thing in scene["objects"]])
        colours.append(BACKGROUND if on is None else COLOURS.index(scene["objects"][on]["colour"]))
    return one_hot(torch.tensor(colours), 10).float()


def text_of(text: str) -> Tensor:
    """[L, 10]: a word of a noun phrase says the phrase's colour; other words and special tokens say nothing.

    Special tokens resemble the background most, so that taking them for words shows.
    """
    words = [text[start:end] for start, end in word_spans(text)]
    meanings, colour = [], NOTHING
    for word in reversed(words):
        following = words[: len(words) - len(meanings)]
        if word in COLOURS:
            colour = COLOURS.index(word)
        elif word not in ("large", "big", "small", "tiny"):
            colour = next((COLOURS.index(w) for w in reversed(following) if w in COLOURS), NOTHING)
        meanings.append(colour)
    return one_hot(torch.tensor([BACKGROUND, *reversed(meanings), BACKGROUND]), 10).float()


class Knowing:
    """Scores by how well the colours agree: blind to what has which colour."""

    def score(self, image: Tokens, text: Tokens) -> tuple[Tensor, Tensor]:
        pairs = [[a @ b.T for b in unpack(text)] for a in unpack(image)]
        s = torch.stack([torch.stack([p.amax(1).mean() for p in row]) for row in pairs])
        return s, s


def encode(texts: list[str]) -> Tokens:
    return pack([text_of(text) for text in texts])


def test_a_model_that_matches_colours_is_right_where_colours_tell():
    known = [
        scene for scene in held_out(60) if len({thing["colour"] for thing in scene["objects"]}) == len(scene["objects"])
    ]
    image = pack([image_of(scene) for scene in known])
    found = dict(scenes(Knowing(), image, known, encode, spans))
    colour_words = [shares(scene)[w["object"]] for scene in known for w in scene["words"] if w["kind"] == "colour"]
    assert found["word_patch_ratio_colour"] == pytest.approx(len(colour_words) / sum(colour_words))
    assert found["colour_swap_moved"] == found["colour_swap_on_other"] == 1.0
    assert found["colour_swap_anchored"] == 1.0
    assert found["twin_i2t"] == found["twin_t2i"] == 0.5  # the same colours: all ties


def shares(scene: dict) -> list[float]:
    return area_shares([thing["box"] for thing in scene["objects"]])


def test_random_matches_have_ratio_one():
    known, generator = held_out(300), torch.Generator().manual_seed(0)
    image = pack([torch.randn(GRID * GRID, 12, generator=generator) for _ in known])

    def noise(texts: list[str]) -> Tokens:
        return pack([torch.randn(len(spans(text)), 12, generator=generator) for text in texts])

    found = dict(scenes(Knowing(), image, known, noise, spans))
    assert found["word_patch_ratio"] == pytest.approx(1.0, abs=0.1)
    assert 0.05 < found["word_patch_landed"] < 0.4
    assert found["twin_i2t"] == pytest.approx(0.5, abs=0.1)
    assert found["colour_swap_moved"] < 0.4


class Binding(Knowing):
    """Knows the right caption from the false ones by its first feature, which `mark` sets."""

    def score(self, image: Tokens, text: Tokens) -> tuple[Tensor, Tensor]:
        marks = torch.stack([rows[0, 0] for rows in unpack(text)])
        return marks.expand(len(image.offsets) - 1, -1), -marks.expand(len(image.offsets) - 1, -1)


def test_the_twin_test_uses_each_direction_s_own_score():
    known = held_out(40)
    image, true = pack([image_of(scene) for scene in known]), {scene["caption"] for scene in known}

    def mark(texts: list[str]) -> Tokens:
        return pack([torch.full((len(spans(text)), 10), float(text in true)) for text in texts])

    found = dict(scenes(Binding(), image, known, mark, spans))
    assert (found["twin_i2t"], found["twin_t2i"]) == (1.0, 0.0)


def test_one_vector_per_text_has_the_twin_test_only():
    known = held_out(5)

    class Vectors:
        def score(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
            return image @ text.T, image @ text.T

    found = dict(scenes(Vectors(), torch.ones(5, 3), known, lambda texts: torch.ones(len(texts), 3), spans))
    assert found == {"twin_i2t": 0.5, "twin_t2i": 0.5}


def test_scenes_without_twins_are_refused():
    scene = json.loads(make_sample(0, "train", SIZE, 0)["json"])
    with pytest.raises(ValueError, match="no twin"):
        list(scenes(Knowing(), pack([image_of(scene)]), [scene], encode, spans))


def on_ranks(rank: int, world_size: int) -> dict[str, float]:
    known = held_out(11)[rank::world_size]
    return dict(scenes(Knowing(), pack([image_of(scene) for scene in known]), known, encode, spans))


@pytest.mark.slow
def test_two_ranks_give_what_one_process_gives():
    alone = on_ranks(0, 1)
    for found in run(on_ranks, 2):
        assert found == pytest.approx(alone)


def test_words_tokens_and_maps():
    text = "a red circle, and a star"
    assert [text[s:e] for s, e in word_spans(text)] == ["a", "red", "circle", "and", "a", "star"]
    pieces = [(0, 0), (0, 1), (2, 5), (6, 9), (9, 12), (12, 13), (14, 17), (18, 19), (20, 24), (0, 0)]
    assert tokens_of((6, 12), pieces) == [3, 4] and tokens_of((30, 33), pieces) == []
    assert kept_spans(pieces, 10) == pieces and kept_spans(pieces, 8) == pieces[1:-1]
    with pytest.raises(ValueError, match="has 1 features"):
        kept_spans(pieces, 1)
    image, tokens = torch.eye(4), torch.zeros(10, 4)
    tokens[3, 0], tokens[4, 1] = 5.0, 0.1  # cosines, whatever the lengths
    assert word_maps(image, tokens, pieces, [(6, 12)]).tolist() == [[0.5, 0.5, 0.0, 0.0]]


def test_patches_and_boxes():
    assert patch_grid(64) == 8
    with pytest.raises(ValueError, match="not a square"):
        patch_grid(65)
    boxes = [[0, 0, 12, 12], [32, 16, 48, 32]]
    # Patches of 8 pixels: the centre of patch 1 is (12, 4), just outside a box that ends at 12.
    assert [object_at(p, 8, 64, boxes) for p in (0, 1, 8, 20, 29, 63)] == [0, None, None, 1, 1, None]
    assert area_shares(boxes) == pytest.approx([144 / 400, 256 / 400])
    assert set(KINDS) == {"colour", "shape", "size"}
