"""The promises of the loader: the same tensors whatever the ranks, workers and restarts, and errors that are errors."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy import stats

from data_tools.index import index
from mmpt.batch import unpack
from mmpt.data.image import ImageConfig, evaluation_image
from mmpt.data.loader import DataConfig, build_loader, eval_batches
from mmpt.data.manifest import FILE_NAME
from mmpt.data.tar import ShardError
from mmpt.data.text import load_tokenizer
from mmpt.inputs import InputSpec, WordMasking
from tests.data.batches import GLOBAL_BATCH, VARIED, assert_same, global_batches, resumed, take
from tests.data.shards import caption, picture, write_shards


@pytest.fixture(scope="session")
def config(shards: str, tokenizer: str) -> DataConfig:
    return DataConfig(shards, tokenizer, workers=0, lanes=6, window_chunks=2, image=VARIED)


def test_a_batch_is_what_it_says(config: DataConfig, inputs: InputSpec):
    (batch,) = take(build_loader(config, inputs, 5, GLOBAL_BATCH, rank=1, world_size=3), 1)
    assert (
        batch.pictures.pixels.shape == (8, 3, 16, 16)
        and batch.pictures.pixels.dtype == torch.uint8
        and len(set(batch.keys)) == 8
    )
    assert batch.positions.dtype == torch.int64
    assert batch.pictures.kept_patches is not None and batch.pictures.kept_patches.shape == (8, 8)
    assert batch.pictures.kept_patches.dtype == torch.int64 and bool(
        (batch.pictures.kept_patches.diff(dim=1) > 0).all()
    )
    assert int(batch.pictures.kept_patches.min()) >= 0 and int(batch.pictures.kept_patches.max()) < 16
    tokenizer = load_tokenizer(config.tokenizer)
    for key, ids in zip(batch.keys, unpack(batch.text), strict=True):
        full = [caption(int(key)), caption(int(key) + 1)]
        text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert any(choice.startswith(text) for choice in full) and text


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_world_size_changes_no_tensor(config: DataConfig, inputs: InputSpec, world_size: int):
    alone = global_batches(config, inputs, 6)
    for a, b in zip(alone, global_batches(config, inputs, 6, world_size), strict=True):
        assert_same(a, b)


def test_resuming_changes_no_tensor(config: DataConfig, inputs: InputSpec):
    steps = 10  # two and a half epochs
    whole = global_batches(config, inputs, steps)
    for a, b in zip(whole, resumed(config, inputs, [1, 4, 5, steps], (2, 1, 3, 4)), strict=True):
        assert_same(a, b)


def test_each_epoch_delivers_each_sample_once(config: DataConfig, inputs: InputSpec):
    batches = global_batches(config, inputs, 17)  # 408 samples: four epochs of 97 and some
    by_epoch = [Counter[str]() for _ in range(5)]
    for batch in batches:
        for key, position in zip(batch.keys, batch.positions.tolist(), strict=True):
            by_epoch[position // 97][key] += 1
    for counts in by_epoch[:4]:
        assert len(counts) == 97 and set(counts.values()) == {1}


def test_a_sample_varies_between_epochs(config: DataConfig, inputs: InputSpec):
    seen: dict[str, list[tuple]] = {}
    for batch in global_batches(config, inputs, 17):
        for i, (key, ids) in enumerate(zip(batch.keys, unpack(batch.text), strict=True)):
            kept = batch.pictures.kept_patches[i]  # type: ignore[index]
            seen.setdefault(key, []).append(
                (tuple(ids.tolist()), batch.pictures.pixels[i].numpy().tobytes(), tuple(kept.tolist()))
            )
    times = [len(views) for views in seen.values()]
    assert min(times) >= 4
    assert all(len({view[1] for view in views}) == len(views) for views in seen.values())
    assert all(len({view[2] for view in views}) == len(views) for views in seen.values())
    both = [key for key, views in seen.items() if len({view[0] for view in views}) == 2]
    assert len(both) > 0.6 * 97  # of four draws of two captions, 7 in 8 show both


def test_kept_patches_are_uniform_and_absent_where_all_are_kept(config: DataConfig, inputs: InputSpec):
    counts = torch.zeros(16)
    for batch in global_batches(config, inputs, 40):
        counts += torch.bincount(batch.pictures.kept_patches.flatten(), minlength=16)  # type: ignore[union-attr]
    assert counts.sum() == 40 * GLOBAL_BATCH * 8
    assert bool(((counts / (40 * GLOBAL_BATCH) - 0.5).abs() < 0.08).all())  # 5 sigma
    (batch,) = take(build_loader(config, replace(inputs, kept_patches=16), 5, GLOBAL_BATCH, 0, 1), 1)
    assert batch.pictures.kept_patches is None


def test_captions_are_cleaned_in_training_and_evaluation(config: DataConfig, inputs: InputSpec, tmp_path: Path):
    write_shards(tmp_path, [4])
    path = tmp_path / "00000.tar"
    path.write_bytes(path.read_bytes().replace(b"a red cat", b"a RED/cat").replace(b"a green dog", b"a,...,?!~;:"))
    index(str(tmp_path), chunk_samples=4)
    wanting, tokenizer = replace(inputs, max_text_tokens=40), load_tokenizer(config.tokenizer)
    raw = replace(config, shards=str(tmp_path), max_quarantined_share=0.5)
    cleaned = replace(raw, caption_cleaning="albef")
    texts: list[dict[str, str]] = []
    for one in (raw, cleaned):
        (batch,) = global_batches(one, wanting, 1)
        decoded = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in unpack(batch.text)]
        texts.append(dict(zip(batch.keys, decoded, strict=True)))
    assert texts[0]["000000"] == "a red/cat" and texts[1]["000000"] == "a red cat"
    known = next(facts for _, facts in eval_batches(str(tmp_path), cleaned, wanting, 0, 1, 8))
    assert known[0]["captions"] == ["a red cat"] and known[1]["captions"] == ["a beside another animal"]


def test_draws_are_uniform_keyed_by_the_sample_and_leave_all_else_alone(config: DataConfig, inputs: InputSpec):
    wanting = replace(inputs, draws=3)
    whole = global_batches(config, wanting, 5)
    for others in (global_batches(config, wanting, 5, 4), resumed(config, wanting, [2, 5], (2, 1))):
        for a, b in zip(whole, others, strict=True):
            assert_same(a, b)
    for a, b in zip(whole, global_batches(config, inputs, 5), strict=True):
        assert b.draws is None
        assert_same(replace(a, draws=None), b)
    drawn = torch.cat([batch.draws for batch in whole])  # type: ignore[misc]
    assert drawn.shape == (5 * GLOBAL_BATCH, 3) and drawn.dtype == torch.float64 and len(drawn.unique()) == 360
    assert stats.kstest(drawn.flatten().numpy(), "uniform").pvalue > 1e-3
    one = replace(wanting, draws=1)
    assert global_batches(config, one, 1)[0].draws.equal(whole[0].draws[:, :1])  # type: ignore[union-attr, index]


def test_the_global_random_state_is_left_alone(config: DataConfig, inputs: InputSpec):
    before = torch.get_rng_state()
    take(build_loader(config, inputs, 5, GLOBAL_BATCH, 0, 1), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_fingerprint_tells_when_a_state_means_something_else(config: DataConfig, inputs: InputSpec):
    def fingerprint(config: DataConfig, seed: int = 5, rank: int = 0, world_size: int = 1) -> str:
        return build_loader(config, inputs, seed, GLOBAL_BATCH, rank, world_size).fingerprint

    same = {
        fingerprint(config),
        fingerprint(config, rank=1, world_size=2),
        fingerprint(replace(config, image=ImageConfig())),
    }
    others = {
        fingerprint(config, seed=6),
        fingerprint(replace(config, lanes=12)),
        fingerprint(replace(config, window_chunks=3)),
    }
    assert len(same) == 1 and len(others) == 3 and not same & others


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_no_tensor(config: DataConfig, inputs: InputSpec, workers: int):
    """Of all that a method may ask for."""
    wanting = replace(
        inputs, partners=True, masked_words=WordMasking(whole_words=True), draws=2, extra_views=1,
        tasks=(("itm", 1), ("mlm", 1)),
    )  # fmt: skip
    alone = global_batches(config, wanting, 7)
    assert {batch.task for batch in alone} == {"itm", "mlm"}
    for a, b in zip(alone, global_batches(replace(config, workers=workers), wanting, 7), strict=True):
        assert_same(a, b)


@pytest.mark.slow
def test_the_state_counts_what_was_delivered_not_what_was_fetched_ahead(config: DataConfig, inputs: InputSpec):
    loader = build_loader(replace(config, workers=2), inputs, 5, GLOBAL_BATCH, 0, 1)
    assert loader.state == 0
    next(loader)
    assert loader.state == GLOBAL_BATCH and loader.epochs == (GLOBAL_BATCH / 97,)
    loader.close()
    loader.close()
    (second,) = take(build_loader(config, inputs, 5, GLOBAL_BATCH, 0, 1, start=loader.state), 1)
    assert_same(second, global_batches(config, inputs, 2)[1])


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_shard_damaged_after_indexing_stops_with_its_error(
    config: DataConfig, inputs: InputSpec, tmp_path: Path, workers: int
):
    for path in Path(config.shards).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    loader = build_loader(replace(config, shards=str(tmp_path), workers=0), inputs, 5, GLOBAL_BATCH, 0, 1)
    loader.close()
    shard = bytearray((tmp_path / "00000.tar").read_bytes())
    shard[:300] = b"x" * 300
    (tmp_path / "00000.tar").write_bytes(shard)
    with pytest.raises(ShardError, match=r"00000.tar at byte 0: not a tar archive") as caught:
        take(build_loader(replace(config, shards=str(tmp_path), workers=workers), inputs, 5, GLOBAL_BATCH, 0, 1), 5)
    assert caught.value.offset == 0 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shards": ""}, "data.shards is not set"),
        ({"shards": "shards/::"}, "'shards/::' has nothing on one side of '::'"),
        ({"shards": "/nowhere"}, "/nowhere does not exist; give a folder of indexed shards, or a manifest"),
        ({"tokenizer": "/nowhere"}, "no tokenizer at '/nowhere'"),
        ({"weights": (1, 2)}, "data.weights has 2 numbers for 1 sources"),
        ({"caption_field": "txt::txt"}, "data.caption_field names 2 sources and data.shards 1"),
        ({"caption_field": "captoin"}, "sample '.*': field 'captoin' of its .json file is None.* nor is any other"),
    ],
)
def test_what_is_amiss_is_one_line(config: DataConfig, inputs: InputSpec, change: dict, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        take(build_loader(replace(config, **change), inputs, 5, GLOBAL_BATCH, 0, 1), 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "arguments"),
    [
        (r"world size \(5\)", (24, 0, 5, 0)),
    ],
)
def test_what_cannot_be_divided_is_refused(config: DataConfig, inputs: InputSpec, wrong: str, arguments: tuple):
    with pytest.raises(ValueError, match=wrong):
        build_loader(config, inputs, 5, *arguments)


def test_vocabulary_is_checked_before_any_batch(config: DataConfig, inputs: InputSpec):
    with pytest.raises(ValueError, match="vocab_size is 100"):
        build_loader(config, replace(inputs, vocab_size=100), 5, GLOBAL_BATCH, 0, 1)


@pytest.mark.parametrize("world_size", [1, 2, 4, 97])
@pytest.mark.parametrize("size", [10, 1000])
def test_evaluation_sees_each_sample_once_in_stored_order(
    config: DataConfig, inputs: InputSpec, world_size: int, size: int
):
    if world_size == 97:
        ranks = [list(eval_batches(config.shards, config, inputs, rank, 97, size)) for rank in (0, 50, 96)]
        assert [batch.keys for batches in ranks for batch, _ in batches] == [("000000",), ("000050",), ("000096",)]
        return
    ranks = [list(eval_batches(config.shards, config, inputs, rank, world_size, size)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1  # every rank joins every forward pass
    keys = [key for batches in ranks for batch, _ in batches for key in batch.keys]
    assert keys == [f"{number:06d}" for number in range(97)]
    assert all(len(batch) <= size and batch.pictures.kept_patches is None for batches in ranks for batch, _ in batches)
    assert [p for batches in ranks for batch, _ in batches for p in batch.positions.tolist()] == list(range(97))
    for batch, metadata in (pair for batches in ranks for pair in batches):
        for i, known in enumerate(metadata):
            number = known["number"]
            assert known["key"] == batch.keys[i] and known["captions"] == [caption(number), caption(number + 1)]
            image = evaluation_image(picture(number, ("jpg", "png", "webp")[number % 3]), 16, config.image)
            assert torch.equal(batch.pictures.pixels[i], torch.from_numpy(image))


def test_more_ranks_than_samples_are_refused(config: DataConfig, inputs: InputSpec):
    with pytest.raises(ValueError, match="cannot split 97 samples over 98 ranks"):
        next(eval_batches(config.shards, config, inputs, 0, 98, 4))


@pytest.mark.slow
def test_evaluation_in_workers_is_the_same(config: DataConfig, inputs: InputSpec):
    alone = list(eval_batches(config.shards, config, inputs, 0, 1, 20))
    helped = list(eval_batches(config.shards, replace(config, workers=2), inputs, 0, 1, 20))
    assert [known for _, known in alone] == [known for _, known in helped]
    assert all(torch.equal(a.pictures.pixels, b.pictures.pixels) for (a, _), (b, _) in zip(alone, helped, strict=True))


def test_the_manifest_file_may_be_named_instead_of_its_folder(config: DataConfig, inputs: InputSpec):
    named = replace(config, shards=str(Path(config.shards) / FILE_NAME))
    assert_same(global_batches(config, inputs, 1)[0], global_batches(named, inputs, 1)[0])
