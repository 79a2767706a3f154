"""Global batches from the loaders of all ranks, and what it means that two of them are the same."""

from dataclasses import replace
from itertools import repeat

import torch
from torch import Tensor

from mmpt.batch import Batch, MaskedRegions, MaskedWords, Partners, Pictures, Regions, Tokens, concatenate
from mmpt.data.image import ImageConfig
from mmpt.data.loader import DataConfig, Loader, build_loader
from mmpt.inputs import InputSpec

GLOBAL_BATCH = 24
SEED = 5
VARIED = ImageConfig(crop_scale=(0.3, 1.0), flip_probability=0.5, colour_jitter=0.3)


def take(loader: Loader, steps: int) -> list[Batch]:
    try:
        return [next(loader) for _ in range(steps)]
    finally:
        loader.close()


def global_batches(
    config: DataConfig, inputs: InputSpec, steps: int, world_size: int = 1, start: int = 0
) -> list[Batch]:
    ranks = [
        take(build_loader(config, inputs, SEED, GLOBAL_BATCH, rank, world_size, start), steps)
        for rank in range(world_size)
    ]
    return [joined(list(parts)) for parts in zip(*ranks, strict=True)]


def joined(parts: list[Batch]) -> Batch:
    """The batches of all ranks as the global batch."""
    words, regions, partners = (present([getattr(p, n) for p in parts]) for n in
                                ("masked_words", "masked_regions", "partners"))  # fmt: skip
    (task,) = {part.task for part in parts}
    return replace(
        parts[0],
        pictures=joined_pictures([part.pictures for part in parts]),
        text=concatenate([part.text for part in parts]),
        positions=torch.cat([part.positions for part in parts]),
        keys=tuple(key for part in parts for key in part.keys),
        views=rows([part.views for part in parts]),
        view_parameters=rows([part.view_parameters for part in parts]),
        draws=rows([part.draws for part in parts]),
        masked_words=words
        and MaskedWords(
            torch.cat([w.ids for w in words]), torch.cat([w.chosen for w in words]), sum(w.count for w in words)
        ),
        masked_regions=regions and MaskedRegions(torch.cat([r.chosen for r in regions]), sum(r.count for r in regions)),
        partners=partners
        and Partners(joined_pictures([p.pictures for p in partners]), torch.cat([p.matches for p in partners])),
        task=task,
    )


def joined_pictures(parts: list[Pictures]) -> Pictures:
    patches, regions = (present([getattr(part, name) for part in parts]) for name in ("patches", "regions"))
    return Pictures(
        pixels=rows([part.pixels for part in parts]),
        kept_patches=rows([part.kept_patches for part in parts]),
        patches=patches and concatenate(patches),
        places=rows([part.places for part in parts]),
        grids=rows([part.grids for part in parts]),
        regions=regions
        and Regions(
            concatenate([r.features for r in regions]),
            torch.cat([r.boxes for r in regions]),
            torch.cat([r.classes for r in regions]),
        ),
    )


def present(values: list) -> list | None:
    """All of them, or None for none of them."""
    assert len({value is None for value in values}) == 1
    return None if values[0] is None else values


def rows(values: list[Tensor | None]) -> Tensor | None:
    found = present(values)
    return None if found is None else torch.cat(found)


def assert_same(a: Batch, b: Batch) -> None:
    """Bit for bit, in everything that a batch may hold."""
    assert a.keys == b.keys and a.task == b.task
    for x, y in zip(facts(a), facts(b), strict=True):
        assert type(x) is type(y)
        if isinstance(x, Tensor):
            assert x.dtype == y.dtype and x.equal(y)
        elif not isinstance(x, tuple):
            assert x == y


def facts(noun: object) -> list:
    """Every leaf of a noun and of the nouns within, in order; None for what is not there."""
    if isinstance(noun, Tokens | Regions | MaskedWords | MaskedRegions | Partners):
        return [leaf for value in noun for leaf in facts(value)]
    if isinstance(noun, Batch | Pictures):
        return [leaf for value in vars(noun).values() for leaf in facts(value)]
    return [noun]


def resumed(config: DataConfig, inputs: InputSpec, steps: list[int], world_sizes: tuple[int, ...]) -> list[Batch]:
    """Global batches of a run that stops after each of these steps and goes on with another world size."""
    pieces, state = [], 0
    for first, last, world_size in zip([0, *steps], steps, world_sizes, strict=False):
        loaders = [
            build_loader(config, inputs, SEED, GLOBAL_BATCH, rank, world_size, state) for rank in range(world_size)
        ]
        for _ in repeat(None, last - first):
            pieces.append(joined([next(loader) for loader in loaders]))
        (state,) = {loader.state for loader in loaders}
        assert state == last * GLOBAL_BATCH
        for loader in loaders:
            loader.close()
    return pieces
