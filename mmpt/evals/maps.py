"""Which place of an image each word of its caption matches, for methods whose features do not say so by themselves.

    CLIP, SLIP, ALIGN, SigLIP   `projected` and `grad_cam` of the word alone as a text     (maps_dual.py)
    ViLT, UNITER                `transport`                                                (maps_fused.py)
    ALBEF, METER                `cross_attention`                                          (maps_fused.py)

All are maps [words, P] over places of which the centre is known, so that scenes.py scores them like those of a late
interaction (FILIP, which `evaluate` scores). The method must be whole, not sharded: this is for `mmpt eval` and
reports, not for evaluation during training. An image costs two forwards of its tower, and a forward and backward of the
last block for each word; or one forward and backward of the blocks where it meets its caption.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmpt import dist
from mmpt.batch import Pictures, Tokens, part_of_pictures, to_device
from mmpt.data.loader import DataConfig
from mmpt.data.text import load_tokenizer
from mmpt.evals.alignment import grid_centres, patch_grid, tokens_of
from mmpt.evals.features import join
from mmpt.evals.maps_dual import grad_cam_maps, projected_maps, seeing
from mmpt.evals.maps_fused import cross_attention_maps, transport_maps
from mmpt.evals.scenes import WordMatch, kept_words, matches_of, word_patch, word_patch_scores
from mmpt.evals.suite import EvalConfig, Rank, prefix
from mmpt.inputs import InputSpec
from mmpt.methods.albef import ALBEF
from mmpt.methods.align import ALIGN
from mmpt.methods.clip import CLIP
from mmpt.methods.meter import METER
from mmpt.methods.siglip import SigLIP
from mmpt.methods.uniter import UNITER
from mmpt.methods.vilt import ViLT
from mmpt.ops.features import Features, values

MAPPED_AT_ONCE = 16
"""Images; those of a fusion model are held with a gradient."""


@torch.no_grad()
def aligned(
    config: EvalConfig, data: DataConfig, inputs: InputSpec, method: Any, device: torch.device | str
) -> dict[str, float]:
    """Word-patch alignment of `config.scenes` as {"eval/SET/NAME": value}, the same on all ranks; collective.

    Where there are two ways of making maps, the values are those of the way with the higher ratio, and
    `word_patch_ratio_WAY` tells both. Nothing for a late interaction.
    """
    if not isinstance(method, (CLIP, ALIGN, SigLIP, ViLT, UNITER, ALBEF, METER)):
        return {}
    rank, scores = Rank(config, data, inputs, method, device, load_tokenizer(data.tokenizer)), dict[str, float]()
    for folder in config.scenes:
        found = {way: dict(word_patch_scores(sums)) for way, sums in alignment_sums(rank, method, folder).items()}
        ratios = {way: values["word_patch_ratio"] for way, values in found.items()}
        named = found[max(ratios, key=lambda way: ratios[way])]
        if len(found) > 1:
            named |= {f"word_patch_ratio_{way}": ratio for way, ratio in ratios.items()}
        scores |= {prefix(folder) + name: value for name, value in named.items()}
    return scores


def alignment_sums(rank: Rank, method: Any, folder: str) -> dict[str, dict[str, float]]:
    """Of each way, what `word_patch_scores` takes, summed over all scenes and ranks. Collective."""
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for batch, known in rank.batches(folder):
        for first in range(0, len(known), MAPPED_AT_ONCE):
            scenes = known[first : first + MAPPED_AT_ONCE]
            pictures = part_of_pictures(batch.pictures, first, first + len(scenes))
            for way, matches in matches_of_scenes(rank, method, pictures, scenes).items():
                for name, value in word_patch(matches).items():
                    sums[way][name] += value
    totals: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for ours in dist.gather_objects({way: dict(found) for way, found in sums.items()}):
        for way, found in ours.items():
            for name, value in found.items():
                totals[way][name] += value
    return {way: dict(found) for way, found in totals.items()}


def matches_of_scenes(
    rank: Rank, method: Any, pictures: Pictures, scenes: Sequence[dict]
) -> dict[str, list[WordMatch]]:
    """Of each way, where the words of all captions land. scenes: the metadata of each image."""
    words = [kept_words(scene, rank.spans(scene["caption"])) for scene in scenes]
    out = dict[str, list[WordMatch]]()
    for way, maps in maps_of_scenes(rank, method, pictures, scenes, words).items():
        matches = out[way] = []
        for i, (own, scene) in enumerate(zip(words, scenes, strict=True)):
            matches += matches_of(maps[i], own, centres(pictures, i, maps[i].shape[1]), scene)
    return out


def maps_of_scenes(
    rank: Rank, method: Any, pictures: Pictures, scenes: Sequence[dict], words: Sequence[Sequence[dict]]
) -> dict[str, list[Tensor]]:
    """By the name of each way: for each image its words' maps, [words, P].

    scenes: of each image {caption}; words: of each image some of its caption's, {text, start, end} with at least one
    token each.
    """
    pictures = to_device(pictures, rank.device)
    if isinstance(method, (CLIP, ALIGN, SigLIP)):
        sees, out = seeing(method), dict[str, list[Tensor]](projected=[], grad_cam=[])
        for i, own in enumerate(words):
            picture = part_of_pictures(pictures, i, i + 1)
            texts = values(_encoded(rank, method, [word["text"] for word in own])) if own else None
            for way, maps_of in (("projected", projected_maps), ("grad_cam", grad_cam_maps)):
                out[way].append(torch.zeros(0, 1) if texts is None else maps_of(sees, picture, texts))
        return out
    captions = [scene["caption"] for scene in scenes]
    image, text = method.encode_image(pictures), _encoded(rank, method, captions)
    assert isinstance(text, Tokens)
    rows = [
        [tokens_of((word["start"], word["end"]), rank.spans(caption)) for word in own]
        for caption, own in zip(captions, words, strict=True)
    ]
    if isinstance(method, (ViLT, UNITER)):
        return {"transport": transport_maps(method, image, text, rows)}
    return {"cross_attention": cross_attention_maps(method, image, text, rows)}


def _encoded(rank: Rank, method: Any, texts: list[str]) -> Features:
    """Features of at least one text. Not a collective: ranks have different numbers of images."""
    return join([method.encode_text(ids.to(rank.device)) for ids in rank.ids(texts)])


def centres(pictures: Pictures, image: int, places: int) -> Tensor:
    """[P, 2], x and y of each place of an image, as shares of its sides: a patch's, a grid's or a region's middle."""
    picture = part_of_pictures(pictures, image, image + 1)
    if picture.regions is not None:
        boxes = picture.regions.boxes.float().cpu()
        return (boxes[:, :2] + boxes[:, 2:4]) / 2
    if picture.places is not None:
        assert picture.grids is not None
        rows, columns = picture.grids[0].tolist()
        return grid_centres(rows, columns)[picture.places.cpu()]
    side = patch_grid(places)
    return grid_centres(side, side)
