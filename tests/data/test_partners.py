"""Pictures for image-text matching: from the whole data set, half of them matches, whatever the ranks and restarts."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from data_tools.index import index
from mmpt.batch import Batch, Partners, unpack
from mmpt.data.image import training_image
from mmpt.data.loader import DataConfig, _announced, build_loader, eval_batches, open_sources
from mmpt.data.mixture import place_of
from mmpt.data.partners import keep_own, partner_places, partner_seed
from mmpt.data.randomness import streams
from mmpt.data.work import Work
from mmpt.inputs import InputSpec
from tests.data.batches import GLOBAL_BATCH, SEED, VARIED, assert_same, global_batches, resumed
from tests.data.shards import picture, write_shards
from tests.data.test_loader_sources import damaged_copy
from tests.data.test_mixture import mixture


@pytest.fixture(scope="session")
def config(shards: str, tokenizer: str) -> DataConfig:
    return DataConfig(shards, tokenizer, workers=0, lanes=6, window_chunks=2, image=VARIED)


@pytest.fixture
def wanting(inputs: InputSpec) -> InputSpec:
    return replace(inputs, partners=True)


def partners_of(batch: Batch) -> Partners:
    assert batch.partners is not None
    return batch.partners


@given(start=st.integers(0, 10**9), seed=st.integers(0, 99), count=st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_one_of_each_pair_of_positions_keeps_its_own(start: int, seed: int, count: int):
    positions = np.random.default_rng(seed).permutation(np.arange(start, start + count))
    own = keep_own(seed, positions)
    assert own.dtype == bool
    found: dict[int, list[bool]] = {}
    for position, keeps in zip(positions.tolist(), own.tolist(), strict=True):
        found.setdefault(position // 2, []).append(keeps)
        assert keep_own(seed, np.array([position]))[0] == keeps
    assert all(sorted(pair) == [False, True] for pair in found.values() if len(pair) == 2)


def test_the_coin_is_fair():
    first = keep_own(3, np.arange(0, 20000, 2))
    assert stats.binomtest(int(first.sum()), 10000, 0.5).pvalue > 1e-3
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.04


def test_each_sample_is_a_partner_once_per_epoch_and_of_anyone():
    """Of weighted sources, of a sample of its own source."""
    first, second = mixture([60, 20], (3, 1)), mixture([60, 20], (3, 1))
    second = replace(second, orders=tuple(replace(order, seed=order.seed + 100) for order in second.orders))
    positions = np.arange(80 * 50)
    places = partner_places(second, 0, positions)
    own = place_of(first, positions)
    source = np.searchsorted(first.first_chunks, own.chunks, side="right")
    assert np.array_equal(source, np.searchsorted(first.first_chunks, places.chunks, side="right"))
    flat = places.chunks * 100 + places.indices
    for epoch in range(50):
        counts = Counter(flat[80 * epoch : 80 * epoch + 80].tolist())
        assert len(counts) == 80, "each once"
    for name in np.unique(flat)[:5]:  # which samples one picture is shown with: any, evenly
        others = (own.chunks * 100 + own.indices)[flat == name]
        same_source = np.unique((own.chunks * 100 + own.indices)[source == source[flat == name][0]])
        assert len(np.unique(others)) > 12 and set(others) <= set(same_source.tolist())


def test_pictures_are_the_samples_own_or_the_partners_with_draws_of_its_own(config: DataConfig, wanting: InputSpec):
    sources, order = open_sources(config, SEED, check_shards=False)
    _, second = open_sources(config, partner_seed(SEED), check_shards=False)
    names = {(chunk, i): number for number, (chunk, i) in enumerate(
        (chunk, i) for chunk, length in enumerate(sources.manifests[0].chunk_lengths.tolist()) for i in range(length)
    )}  # fmt: skip
    shown = 0
    for batch in global_batches(config, wanting, 4):
        partners, positions = partners_of(batch), batch.positions.numpy()
        places, epochs = partner_places(second, SEED, positions), place_of(order, positions).epochs
        for i, position in enumerate(positions.tolist()):
            number = names[int(places.chunks[i]), int(places.indices[i])]
            match = bool(places.own[i]) or number == int(batch.keys[i])
            assert bool(partners.matches[i]) == match
            pixels = partners.pictures.pixels[i]  # type: ignore[index]
            if match:
                assert pixels.equal(batch.pictures.pixels[i])  # type: ignore[index]
                assert partners.pictures.kept_patches[i].equal(batch.pictures.kept_patches[i])  # type: ignore[index]
                continue
            data = picture(number, ("jpg", "png", "webp")[number % 3])
            random = streams(SEED, int(epochs[i]), position, "partner ")
            assert np.array_equal(pixels.numpy(), training_image(data, 16, config.image, random))
            shown += 1
    assert shown >= 4 * GLOBAL_BATCH / 2 - 4


def test_half_of_every_global_batch_matches_for_any_world_size_and_after_a_resume(
    config: DataConfig, inputs: InputSpec, wanting: InputSpec
):
    whole = global_batches(config, wanting, 6)
    for others in (*(global_batches(config, wanting, 6, w) for w in (2, 4)),
                   resumed(config, wanting, [1, 4, 6], (3, 1, 2))):  # fmt: skip
        for a, b in zip(whole, others, strict=True):
            assert_same(a, b)
    matches = [int(partners_of(batch).matches.sum()) for batch in whole]
    assert set(matches) <= {12, 13} and matches.count(12) >= 4, "13 where a sample is its own partner"
    for a, b in zip(whole, global_batches(config, inputs, 6), strict=True):
        assert b.partners is None
        assert_same(replace(a, partners=None), b)
    evaluated, _ = next(iter(eval_batches(config.shards, config, wanting, 0, 1, 8)))
    assert evaluated.partners is None


def test_a_sample_that_is_its_own_partner_matches(tokenizer: str, wanting: InputSpec, tmp_path: Path):
    write_shards(tmp_path, [3])
    index(str(tmp_path))
    few = DataConfig(str(tmp_path), tokenizer, workers=0, lanes=2, image=VARIED)
    own = 0
    for batch in global_batches(few, wanting, 3):
        partners = partners_of(batch)
        same = (partners.pictures.pixels == batch.pictures.pixels).flatten(1).all(1)  # type: ignore[union-attr, operator]
        assert partners.matches.equal(same)
        own += int(partners.matches.sum()) - 12
    assert own > 4, "a third of twelve in each batch"


def test_a_partner_that_cannot_be_used_is_replaced_without_a_second_note(
    config: DataConfig, inputs: InputSpec, wanting: InputSpec, tmp_path: Path
):
    broken = replace(config, shards=damaged_copy(config.shards, tmp_path / "broken"), max_quarantined_share=0.05)
    notes, start = [], 14 * GLOBAL_BATCH  # the bad sample is a partner in steps 15 and 17
    for asked in (inputs, wanting):
        loader = build_loader(broken, asked, SEED, GLOBAL_BATCH, 0, 1, start)
        for _ in range(9):
            next(loader)
        notes.append(loader.take_quarantined())
        loader.close()
    assert notes[0] == notes[1] and len(notes[0]) >= 2
    whole, intact = (global_batches(one, wanting, 3, start=start) for one in (broken, config))
    for a, b in zip(whole, global_batches(broken, wanting, 3, 4, start), strict=True):
        assert_same(a, b)
    _, second = open_sources(config, partner_seed(SEED), check_shards=False)
    replaced = 0
    for a, b in zip(whole, intact, strict=True):
        places = partner_places(second, SEED, a.positions.numpy())
        same = (partners_of(a).pictures.pixels == partners_of(b).pictures.pixels).flatten(1).all(1)  # type: ignore[union-attr, operator]
        for i in (~same).nonzero().flatten().tolist():
            own_is_bad = b.keys[i] == "000048"
            partner_is_bad = (int(places.chunks[i]), int(places.indices[i])) == (9, 3)
            assert own_is_bad if places.own[i] else partner_is_bad
            replaced += partner_is_bad
    assert replaced == 2


def test_a_partner_whose_stand_in_is_the_sample_itself_matches(tokenizer: str, wanting: InputSpec, tmp_path: Path):
    """Of the two samples of the only chunk one is bad, so that the other stands in for it wherever it comes."""
    write_shards(tmp_path / "few", [2])
    path = tmp_path / "few" / "00000.tar"
    path.write_bytes(path.read_bytes().replace(picture(0), bytes(len(picture(0)))))
    index(str(tmp_path / "few"), chunk_samples=2)
    few = DataConfig(str(tmp_path / "few"), tokenizer, workers=0, lanes=2, max_quarantined_share=1, image=VARIED)
    for batch in global_batches(few, wanting, 2):
        assert set(batch.keys) == {"000001"} and bool(partners_of(batch).matches.all())
        assert partners_of(batch).pictures.pixels.equal(batch.pictures.pixels)  # type: ignore[union-attr, arg-type]


def test_whole_images_have_partners_of_any_shape(config: DataConfig, wanting: InputSpec):
    whole = replace(
        wanting, patches=0, kept_patches=0, image_size=16, image_resize="shorter_side", longest_side=40, patch_size=4
    )
    (a,), (b,) = global_batches(config, whole, 1), global_batches(config, whole, 1, 3)
    assert_same(a, b)
    partners = partners_of(a)
    own, shown = unpack(a.pictures.patches), unpack(partners.pictures.patches)  # type: ignore[arg-type]
    same = [x.shape == y.shape and bool((x == y).all()) for x, y in zip(own, shown, strict=True)]
    assert same == partners.matches.tolist() and sum(len(x) != len(y) for x, y in zip(own, shown, strict=True)) > 2


def test_chunks_of_partners_are_fetched_ahead_too():
    asked: list[list[int]] = []

    class Everything:
        def remote_ranges(self, chunks: np.ndarray) -> list[int]:
            return sorted(set(chunks.tolist()))

    class Ahead:
        def warm(self, wanted: list[int]) -> None:
            asked.append(wanted)

    row = np.arange(2)
    places = partner_places(mixture([50], (1,)), 0, row)
    work = Work(row, row, row + 100, row, partners=places)
    (made,) = _announced(iter([work, work]), 1, Everything(), Ahead())  # type: ignore[arg-type]
    assert made is work
    assert asked[0] == [*places.chunks[~places.own].tolist(), 100, 101] and len(asked[0]) == 3


def test_streams_have_no_partners(tokenizer: str, shards: str, wanting: InputSpec):
    stream = DataConfig(tokenizer=tokenizer, workers=0, stream=f"{shards}/00000.tar")
    with pytest.raises(ValueError, match=r"data\.stream has no second order.*data\.shards") as caught:
        build_loader(stream, wanting, SEED, GLOBAL_BATCH, 0, 1)
    assert "\n" not in str(caught.value)
