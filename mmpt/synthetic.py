"""Batches of nothing in particular, in the form that a method takes: for self-checks and measurements alone."""

from dataclasses import replace

import torch
from torch import Generator, Tensor

from mmpt.batch import Batch, MaskedRegions, MaskedWords, Partners, Pictures, Regions, pack
from mmpt.inputs import InputSpec
from mmpt.ops.augment import ORDER, PARAMETERS

SHORTEST_TEXT = 3


def synthetic_batch(inputs: InputSpec, pairs: int, seed: int, task: str = "") -> Batch:
    """B pairs on the host, the same for the same arguments; task: one of inputs.tasks, where there are any."""
    random = Generator().manual_seed(seed)
    longest = max(inputs.max_text_tokens, SHORTEST_TEXT)
    lengths = torch.randint(SHORTEST_TEXT, longest + 1, (pairs,), generator=random).tolist()
    if inputs.text_padding == "max":
        lengths = [longest] * pairs
    text = pack([torch.randint(0, inputs.vocab_size, (n,), generator=random) for n in lengths])
    batch = Batch(_pictures(inputs, pairs, random), text, torch.arange(pairs), tuple(map(str, range(pairs))), task=task)
    if inputs.draws:
        batch = replace(batch, draws=torch.rand(pairs, inputs.draws, dtype=torch.float64, generator=random))
    if inputs.extra_views:
        shape = (pairs, inputs.extra_views, 3, inputs.image_size, inputs.image_size)
        parameters = torch.zeros(pairs, inputs.extra_views, PARAMETERS)
        parameters[..., ORDER] = -1  # no colour is changed
        batch = replace(batch, views=_bytes(shape, random), view_parameters=parameters)
    if inputs.masked_words and task in ("", "mlm"):
        chosen = _chosen(len(text.x), inputs.masked_words.share, random)
        ids = torch.where(chosen, torch.randint(0, inputs.vocab_size, text.x.shape, generator=random), text.x)
        batch = replace(batch, masked_words=MaskedWords(ids, chosen, int(chosen.sum())))
    if inputs.partners and task in ("", "itm"):
        matches = torch.rand(pairs, generator=random) < 0.5
        batch = replace(batch, partners=Partners(_pictures(inputs, pairs, random), matches))
    if inputs.masked_regions and task.startswith("mr"):
        assert batch.pictures.regions is not None
        chosen = _chosen(len(batch.pictures.regions.boxes), inputs.masked_regions, random)
        batch = replace(batch, masked_regions=MaskedRegions(chosen, int(chosen.sum())))
    return batch


def _chosen(count: int, share: float, random: Generator) -> Tensor:
    """[count] bool, one true at least."""
    chosen = torch.rand(count, generator=random) < share
    chosen[0] = True
    return chosen


def _pictures(inputs: InputSpec, pairs: int, random: Generator) -> Pictures:
    if inputs.regions is not None:
        counts = torch.randint(1, inputs.regions.most + 1, (pairs,), generator=random).tolist()
        features = pack([torch.randn(n, inputs.regions.width, generator=random) for n in counts])
        classes = torch.rand(len(features.x), inputs.regions.classes, generator=random)
        boxes = torch.rand(len(features.x), 7, generator=random)
        return Pictures(regions=Regions(features, boxes, classes / classes.sum(1, keepdim=True)))
    if inputs.image_resize == "square":
        kept = None
        if inputs.kept_patches < inputs.patches:
            orders = torch.rand(pairs, inputs.patches, generator=random).argsort(1)
            kept = orders[:, : inputs.kept_patches].sort(1).values
        return Pictures(_bytes((pairs, 3, inputs.image_size, inputs.image_size), random), kept)
    across, along = inputs.image_size // inputs.patch_size, inputs.longest_side // inputs.patch_size
    sides = torch.randint(max(1, across), max(1, across, along) + 1, (pairs,), generator=random)
    grids = torch.stack([torch.full_like(sides, max(1, across)), sides], 1)
    counts = [min(n, inputs.most_patches or n) for n in grids.prod(1).tolist()]
    patches = pack([_bytes((n, 3 * inputs.patch_size**2), random) for n in counts])
    return Pictures(patches=patches, places=patches.position(), grids=grids)


def _bytes(shape: tuple[int, ...], random: Generator) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)
