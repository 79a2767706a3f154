"""Samples that cannot be used, and several sources: stand-ins, notes, proportions."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_tools.index import index
from mmpt.data.loader import DataConfig, build_loader
from mmpt.inputs import InputSpec
from tests.data.batches import GLOBAL_BATCH, VARIED, assert_same, global_batches, take
from tests.data.shards import picture, write_shards


@pytest.fixture(scope="session")
def config(shards: str, tokenizer: str) -> DataConfig:
    return DataConfig(shards, tokenizer, workers=0, lanes=6, window_chunks=2, image=VARIED)


def damaged_copy(shards: str, folder: Path) -> str:
    """A data set in which one image cannot be decoded, though the tar is intact."""
    folder.mkdir()
    for path in Path(shards).iterdir():
        data = path.read_bytes()
        if path.name == "00002.tar":
            jpeg = picture(48)
            data = data.replace(jpeg, jpeg[:40] + bytes(len(jpeg) - 40))
        (folder / path.name).write_bytes(data)
    return str(folder)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_an_undecodable_image_is_replaced_and_noted(
    config: DataConfig, inputs: InputSpec, tmp_path: Path, workers: int
):
    """The same stand-in for any world size; every other sample as before; counts unchanged."""
    broken = replace(config, shards=damaged_copy(config.shards, tmp_path / "broken"), max_quarantined_share=0.05)
    intact, alone = global_batches(config, inputs, 9), global_batches(replace(broken, workers=workers), inputs, 9)
    for a, b in zip(alone, global_batches(broken, inputs, 9, world_size=4), strict=True):
        assert_same(a, b)
    replaced, stood_in = 0, []
    for a, b in zip(intact, alone, strict=True):
        for i, key in enumerate(a.keys):
            if key == "000048":
                replaced += 1
                stood_in.append(b.keys[i])
                assert b.keys[i] in {"000045", "000046", "000047", "000049"}, "of the same chunk"
            else:
                assert b.keys[i] == key and torch.equal(a.pictures.pixels[i], b.pictures.pixels[i])
    assert replaced >= 2

    loader = build_loader(replace(broken, workers=workers), inputs, 5, GLOBAL_BATCH, 0, 1)
    for _ in range(9):
        next(loader)
    noted = loader.take_quarantined()
    loader.close()
    assert [row.stand_in for row in noted] == stood_in
    assert len(noted) == replaced and loader.take_quarantined() == []
    assert {(Path(row.shard).name, row.key) for row in noted} == {("00002.tar", "000048")}
    assert all("cannot be decoded" in row.reason and row.offset % 512 == 0 and row.offset > 0 for row in noted)


def test_too_many_bad_samples_stop_the_run(config: DataConfig, inputs: InputSpec, tmp_path: Path):
    broken = replace(config, shards=damaged_copy(config.shards, tmp_path / "broken"), max_quarantined_share=0.001)
    with pytest.raises(ValueError, match=r"11 of \d+ samples could not be used.*data.max_quarantined_share") as caught:
        take(build_loader(broken, inputs, 5, GLOBAL_BATCH, 0, 1), 60)
    assert "\n" not in str(caught.value) and "00002.tar: sample '000048': cannot be decoded" in str(caught.value)


def test_sources_with_weights_and_captions_of_their_own(config: DataConfig, inputs: InputSpec, tmp_path: Path):
    write_shards(tmp_path / "other", [6])
    index(str(tmp_path / "other"))
    both = f"{config.shards}::{tmp_path / 'other'}"
    mixed = replace(config, shards=both, weights=(3, 1), caption_field="txt::captions")
    own = global_batches(mixed, inputs, 8)
    for a, b in zip(own, global_batches(mixed, inputs, 8, world_size=4), strict=True):
        assert_same(a, b)
    loader = build_loader(mixed, inputs, 5, GLOBAL_BATCH, 0, 1, start=192)
    assert loader.epochs == (144 / 97, 48 / 6)
    loader.close()
    counts = Counter(key for batch in own for key in batch.keys)
    assert sum(counts.values()) == 192 and all(counts[f"{n:06d}"] >= 8 for n in range(6)), "eight epochs of the six"
    union = global_batches(replace(config, shards=both), inputs, 5)
    seen = Counter(key for batch in union for key, at in zip(batch.keys, batch.positions.tolist()) if at < 103)
    assert sum(seen.values()) == 103 and seen["000000"] == 2 and seen["000050"] == 1
