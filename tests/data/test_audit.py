"""What the audit computes from an integer is what a loader that wrote everything down has delivered."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

from data_tools.index import index
from mmpt.data import quarantine
from mmpt.data.audit import exposures, seen, stand_ins_of
from mmpt.data.image import ImageConfig
from mmpt.data.loader import DataConfig, build_loader, open_sources, plan_of
from mmpt.inputs import InputSpec, WordMasking
from tests.data.batches import GLOBAL_BATCH, SEED, global_batches
from tests.data.shards import write_shards
from tests.data.test_loader_sources import damaged_copy

STEPS = 12  # 288 positions


@pytest.fixture(params=["one source", "weighted sources"])
def config(request: pytest.FixtureRequest, shards: str, tokenizer: str, tmp_path: Path) -> DataConfig:
    damaged = damaged_copy(shards, tmp_path / "damaged")
    config = DataConfig(damaged, tokenizer, workers=0, lanes=6, window_chunks=2, max_quarantined_share=0.2)
    if request.param == "one source":
        return config
    write_shards(tmp_path / "other", [6])
    index(str(tmp_path / "other"))
    return replace(config, shards=f"{damaged}::{tmp_path / 'other'}", weights=(3, 1))


@pytest.fixture
def delivered(config: DataConfig, inputs: InputSpec, tmp_path: Path) -> dict[int, str]:
    """The key at each position, written down as two ranks delivered them, with the ledgers of their bad samples."""
    out = {}
    for rank in range(2):
        loader = build_loader(config, inputs, 5, GLOBAL_BATCH, rank, 2)
        for _ in range(STEPS):
            batch = next(loader)
            out |= dict(zip(batch.positions.tolist(), batch.keys, strict=True))
        quarantine.append(tmp_path, rank, loader.take_quarantined())
        loader.close()
    return out


def test_the_keys_of_any_range_of_positions(config: DataConfig, delivered: dict[int, str], tmp_path: Path):
    sources, mixture = open_sources(config, 5, check_shards=True)
    stood_in = stand_ins_of(tmp_path)
    assert stood_in, "the damaged image came up"
    everything = list(seen(sources, mixture, 0, STEPS * GLOBAL_BATCH, stood_in))
    assert {sample.position: sample.key for sample in everything} == delivered
    part = list(seen(sources, mixture, 50, 53, stood_in))
    assert part == everything[50:53] and all(Path(sample.shard).exists() for sample in part)


def test_when_given_keys_were_seen(config: DataConfig, inputs: InputSpec, delivered: dict[int, str], tmp_path: Path):
    """Inverting the order finds the same positions; the damaged sample was never seen; stand-ins count as seen."""
    sources, mixture = open_sources(config, 5, check_shards=True)
    wanted = defaultdict(list)
    for position, key in sorted(delivered.items()):
        wanted[key].append(position)
    stood_in = stand_ins_of(tmp_path)
    asked = frozenset([*wanted, "000048", "no such key"])
    found: dict[str, list[int]] = defaultdict(list)
    plan = plan_of(config, inputs, sources, mixture, 5)
    for exposure in exposures(sources, plan, asked, STEPS * GLOBAL_BATCH, GLOBAL_BATCH, stood_in):
        found[exposure.key] += exposure.positions
        assert exposure.as_partner == []
    assert found.pop("000048") == [] and "no such key" not in found
    assert {key: sorted(positions) for key, positions in found.items() if positions} == wanted


def test_with_whose_texts_a_picture_was_shown(shards: str, tokenizer: str, inputs: InputSpec):
    """Without random crops a picture is told by its pixels, whoever's text it comes with."""
    config = DataConfig(shards, tokenizer, workers=0, lanes=6, image=ImageConfig(crop_scale=(1, 1)))
    wanting = replace(inputs, partners=True, tasks=(("itm", 2), ("mlm", 1)), masked_words=WordMasking())
    batches = global_batches(config, wanting, STEPS)
    names = {
        pixels.numpy().tobytes(): key for batch in batches for key, pixels in zip(batch.keys, batch.pictures.pixels)
    }
    assert len(names) == 97
    shown: dict[str, list[int]] = defaultdict(list)
    for batch in batches:
        if batch.partners is not None:
            rows = zip(batch.partners.pictures.pixels, batch.partners.matches.tolist(), batch.positions.tolist())
            for pixels, match, position in rows:
                if not match:
                    shown[names[pixels.numpy().tobytes()]].append(position)
    sources, mixture = open_sources(config, SEED, check_shards=True)
    plan = plan_of(config, wanting, sources, mixture, SEED)
    own: dict[int, str] = {p: key for batch in batches for key, p in zip(batch.keys, batch.positions.tolist())}
    found = 0
    for exposure in exposures(sources, plan, frozenset(names.values()), STEPS * GLOBAL_BATCH, GLOBAL_BATCH):
        others = [position for position in exposure.as_partner if own[position] != exposure.key]  # not its own partner
        assert others == sorted(shown[exposure.key])
        found += len(others)
    assert found == sum(map(len, shown.values())) > 70
