"""What a model has understood of held-out scenes: word-patch alignment, colour swaps, twin captions.

The definitions, with the boxes that `mmpt-data scenes` keeps as ground truth:

    word-patch     Take every size, colour and shape word of every caption that speaks of an object o, and its match
                   (alignment.py). Of the matches that land on some object,
                     hit rate     how many land on o
                     area share   mean share of o's box in the area of all boxes of the scene
                     ratio        hit rate / area share; 1 for matches thrown at random onto the objects
    colour swap    In a caption, replace the colour word of object o alone by the colour of another object p. Of the
                   colour words that matched o before, how many match p afterwards.
    twin           Exchange the colours of two objects in a caption: the same words, and false of the scene. How often
                   the image scores higher with the caption than with its twin, by s_i2t (and by s_t2i); an equal score
                   counts one half. Chance is one half.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmpt import dist
from mmpt.batch import Tokens, unpack
from mmpt.evals.alignment import (
    Span,
    area_shares,
    grid_centres,
    kept_spans,
    object_around,
    object_at,
    patch_grid,
    tokens_of,
    word_maps,
)
from mmpt.evals.features import in_step, none_of
from mmpt.evals.fused import PairScorer, paired_scores
from mmpt.ops.features import Features, cut, sequences, values

KINDS = ("colour", "shape", "size")
PAIRS_AT_ONCE = 32


@dataclass(frozen=True)
class WordMatch:
    """Where the match of a word that speaks of object `of` landed, on object `on` or on none."""

    kind: str
    of: int
    on: int | None
    share: float


def scene_word_matches(image: Tensor, text: Tensor, spans: list[Span], scene: dict) -> Iterator[WordMatch]:
    """The matches of the words of one scene's caption. image [P, D], text [L, D]; scene: its metadata."""
    words = kept_words(scene, spans)
    if words:
        maps = word_maps(image, text, spans, [(word["start"], word["end"]) for word in words])
        grid = patch_grid(len(image))
        yield from matches_of(maps, words, grid_centres(grid, grid), scene)


def kept_words(scene: dict, spans: list[Span]) -> list[dict]:
    """The words of a scene's caption that speak of objects, without those that were cut off."""
    return [word for word in scene["words"] if tokens_of((word["start"], word["end"]), spans)]


def matches_of(maps: Tensor, words: list[dict], centres: Tensor, scene: dict) -> Iterator[WordMatch]:
    """Where the maximum of each word's map lies; a map that is the same everywhere matches nothing.

    maps [words, P]; centres [P, 2] of the places, x and y as shares of the image's sides.
    """
    boxes, shares = boxes_of(scene), area_shares(boxes_of(scene))
    for word, heat in zip(words, maps.cpu(), strict=True):
        x, y = (centres[int(heat.argmax())] * scene["width"]).tolist()
        on = object_around(x, y, boxes) if heat.max() > heat.min() else None
        yield WordMatch(word["kind"], word["object"], on, shares[word["object"]])


def boxes_of(scene: dict) -> list[list[float]]:
    """Boxes in pixels of the stored image, which is square. ValueError when it is not: its crop would move them."""
    if scene["width"] != scene["height"]:
        raise ValueError(f"scene {scene['key']!r} is {scene['width']} x {scene['height']}, not square")
    return [thing["box"] for thing in scene["objects"]]


def word_patch(matches: Sequence[WordMatch]) -> dict[str, float]:
    """Sums from which `word_patch_scores` makes its ratios; they add up over samples and ranks."""
    sums: dict[str, float] = {}
    for kind in ("all", *KINDS):
        chosen = [match for match in matches if kind in ("all", match.kind)]
        landed = [match for match in chosen if match.on is not None]
        sums[f"{kind} words"] = len(chosen)
        sums[f"{kind} landed"] = len(landed)
        sums[f"{kind} hits"] = sum(match.on == match.of for match in landed)
        sums[f"{kind} share"] = sum(match.share for match in landed)
    return sums


def word_patch_scores(sums: dict[str, float]) -> Iterator[tuple[str, float]]:
    """Yield hit rate, area share and ratio over all words, the ratio for each kind of word, and how many land."""
    yield "word_patch_landed", sums["all landed"] / max(sums["all words"], 1)
    yield "word_patch_hit_rate", sums["all hits"] / max(sums["all landed"], 1)
    yield "word_patch_area_share", sums["all share"] / max(sums["all landed"], 1)
    for kind in ("all", *KINDS):
        name = "word_patch_ratio" if kind == "all" else f"word_patch_ratio_{kind}"
        yield name, sums[f"{kind} hits"] / sums[f"{kind} share"] if sums[f"{kind} share"] else 0.0


def colour_swaps(
    image: Tensor, changed: Sequence[tuple[Tensor, list[Span]]], text: Tensor, spans: list[Span], scene: dict
):
    """Sums for the colour swap of one scene: swaps whose word matched its own object before, and moved to the other.

    changed: features [L, D] and spans of each of the scene's recoloured captions.
    """
    grid, boxes = patch_grid(len(image)), boxes_of(scene)
    sums = {"swaps": 0.0, "swaps anchored": 0.0, "swaps moved": 0.0, "swaps on other": 0.0}
    for (new_text, new_spans), change in zip(changed, scene["recoloured"], strict=True):
        old = next(w for w in scene["words"] if w["kind"] == "colour" and w["object"] == change["object"])
        before = _match(image, text, spans, (old["start"], old["end"]), grid, scene["width"], boxes)
        after = _match(
            image, new_text, new_spans, (change["word"]["start"], change["word"]["end"]), grid, scene["width"], boxes
        )
        anchored = before == change["object"]
        sums["swaps"] += 1
        sums["swaps anchored"] += anchored
        sums["swaps moved"] += anchored and after == change["other"]
        sums["swaps on other"] += after == change["other"]
    return sums


def _match(
    image: Tensor,
    text: Tensor,
    spans: list[Span],
    word: Span,
    grid: int,
    image_size: float,
    boxes: Sequence[Sequence[float]],
) -> int | None:
    """The object on which a word's match lands; None for no object, or a word that was cut off."""
    if not tokens_of(word, spans):
        return None
    return object_at(int(word_maps(image, text, spans, [word])[0].argmax()), grid, image_size, boxes)


def twins(method: Any, image: Features, caption: Features, twin: Features) -> dict[str, float]:
    """Sums for the twin test: how often each image scores higher with its caption than with its twin."""
    sums = {"twins": float(sequences(image)), "twins i2t": 0.0, "twins t2i": 0.0}
    both = zip(*(cut(f, PAIRS_AT_ONCE) for f in (image, caption, twin)), strict=True)
    for item in in_step(both, values(image).device):
        parts = [none_of(f) for f in (image, caption, twin)] if item is None else [part for part, _, _ in item]
        right, wrong = (paired_scores(method, parts[0], texts) for texts in parts[1:])
        for name, s, t in zip(("twins i2t", "twins t2i"), right, wrong, strict=True):
            difference = (s - t).float()
            sums[name] += float(((difference > 0).float() + 0.5 * (difference == 0).float()).sum())
    return sums


@torch.no_grad()
def scenes(
    method: Any,
    image: Features,
    scene: Sequence[dict],
    encode: Callable[[list[str]], Features],
    spans: Callable[[str], list[Span]],
) -> Iterator[tuple[str, float]]:
    """Yield (name, value), the same on all ranks. Collective.

    image:  features of our share of the scenes; scene: their metadata, as `mmpt-data scenes` writes it.
    encode: features of our texts; a collective too. spans: the characters each token id of a text stands for.
    A method with one vector per image and text, or one that fuses, has the twin test only: its words are matched by
    maps.py. ValueError for scenes without twins.
    """
    for known in scene:
        if "twin" not in known:
            raise ValueError(f"sample {known.get('key')!r} has no twin caption; only held-out scenes have")
    changes = [change["caption"] for known in scene for change in known["recoloured"]]
    caption, twin = (encode([k["caption"] for k in scene]), encode([k["twin"]["caption"] for k in scene]))
    recoloured = encode(changes)
    sums = twins(method, image, caption, twin)
    late = not isinstance(method, PairScorer)  # whose tokens have not met their partners yet
    if late and isinstance(image, Tokens) and isinstance(caption, Tokens) and isinstance(recoloured, Tokens):
        for name, value in _token_sums(image, caption, recoloured, scene, spans):
            sums[name] = sums.get(name, 0.0) + value
    totals: dict[str, float] = {}
    for ours in dist.gather_objects(sums):
        for name, value in ours.items():
            totals[name] = totals.get(name, 0.0) + value
    yield "twin_i2t", totals["twins i2t"] / totals["twins"]
    yield "twin_t2i", totals["twins t2i"] / totals["twins"]
    if "all words" in totals:
        yield from word_patch_scores(totals)
        yield "colour_swap_moved", totals["swaps moved"] / max(totals["swaps anchored"], 1)
        yield "colour_swap_anchored", totals["swaps anchored"] / max(totals["swaps"], 1)
        yield "colour_swap_on_other", totals["swaps on other"] / max(totals["swaps"], 1)


def _token_sums(
    image: Tokens, caption: Tokens, recoloured: Tokens, scene: Sequence[dict], spans: Callable[[str], list[Span]]
) -> Iterator[tuple[str, float]]:
    """Named sums of word-patch alignment and colour swaps, scene by scene."""
    changed = iter(unpack(recoloured))
    for pixels, text, known in zip(unpack(image), unpack(caption), scene, strict=True):
        own = kept_spans(spans(known["caption"]), len(text))
        yield from word_patch(list(scene_word_matches(pixels, text, own, known))).items()
        texts = [next(changed) for _ in known["recoloured"]]
        spans_of = [
            kept_spans(spans(change["caption"]), len(new))
            for change, new in zip(known["recoloured"], texts, strict=True)
        ]
        yield from colour_swaps(pixels, list(zip(texts, spans_of, strict=True)), text, own, known).items()
