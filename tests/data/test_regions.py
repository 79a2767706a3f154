"""Regions from their files: which, in what form, what is refused; masks; batches for any world size."""

import io
import tracemalloc
import zipfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from data_tools.index import index
from mmpt.batch import Regions, unpack
from mmpt.data.loader import DataConfig, build_loader, eval_batches
from mmpt.data.manifest import load_manifest
from mmpt.data.randomness import streams
from mmpt.data.reader import Reader
from mmpt.data.regions import RegionError, mask_regions, read_arrays, read_regions
from mmpt.inputs import InputSpec, RegionSpec, WordMasking
from tests.data.batches import GLOBAL_BATCH, SEED, assert_same, global_batches, resumed
from tests.data.regions import CLASSES, WIDTH, arrays, packed, write_region_shards

SPEC = RegionSpec(width=WIDTH, classes=CLASSES, most=6)
NAMES = ("features", "norm_bb", "conf", "soft_labels")


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("count", [1, 5, 6, 40])
def test_the_surest_in_stored_order(count: int, compressed: bool):
    values = arrays(3, count)
    found = read_regions(packed(values, compressed), SPEC)
    ranked = sorted(range(count), key=lambda i: (-float(values["conf"][i]), i))
    kept = sorted(ranked[:6])
    assert np.array_equal(found.features, values["features"][kept]) and found.features.dtype == np.float16
    assert np.array_equal(found.classes, values["soft_labels"][kept]) and found.classes.dtype == np.float16
    boxes = values["norm_bb"][kept].astype(np.float32)
    assert found.boxes.dtype == np.float32 and np.array_equal(found.boxes[:, :6], boxes)
    assert np.array_equal(found.boxes[:, 6], boxes[:, 4] * boxes[:, 5])


def test_seven_numbers_stay_and_classes_stay_in_the_file_where_nobody_wants_them():
    values = arrays(4, 5)
    six = values["norm_bb"].astype(np.float32)
    values["norm_bb"] = np.concatenate([six, np.full((5, 1), 0.25, np.float32)], axis=1)
    del values["soft_labels"]
    found = read_regions(packed(values), replace(SPEC, classes=0))
    assert np.array_equal(found.boxes, values["norm_bb"]) and found.classes.shape == (5, 0)


def changed(**changes: object) -> bytes:
    values = arrays(5, 5) | changes
    return packed({name: value for name, value in values.items() if value is not None})  # type: ignore[misc]


def moved(rows: int, columns: slice, by: float) -> np.ndarray:
    boxes = arrays(5, 5)["norm_bb"].astype(np.float32)
    boxes[rows, columns] += by
    return boxes


GOOD = arrays(5, 5)
REFUSED = {
    "no file": (None, r"it has no \.regions\.npz file"),
    "not a zip": (b"features", r"cannot be read: .*"),
    "empty": (b"", "cannot be read"),
    "no features": (changed(features=None), "has no features"),
    "no confidence": (changed(conf=None), "has no conf"),
    "no classes": (changed(soft_labels=None), "has no soft_labels"),
    "narrow": (changed(features=np.ones((5, 7), np.float16)), f"features are 7 wide and the method takes {WIDTH}"),
    "other classes": (changed(soft_labels=np.ones((5, 9), np.float16)), "soft_labels are 9 wide and the method takes"),
    "integers": (changed(features=np.ones((5, WIDTH), np.int64)), r"features are int64 of shape \(5, 12\)"),
    "objects": (changed(features=np.full((5, WIDTH), None)), r"features are object of shape"),
    "flat": (changed(features=np.ones(60, np.float16)), r"features are float16 of shape \(60,\)"),
    "uneven": (changed(conf=np.ones(4, np.float16)), "conf are of 4 regions, its features of 5"),
    "none at all": (
        changed(**{name: value[:0] for name, value in GOOD.items()}), "features are of 0 regions",
    ),
    "not finite": (changed(conf=np.full(5, np.nan, np.float16)), "not all of its conf are finite"),
    "too large": (changed(features=np.full((5, WIDTH), 1e6, np.float32)), "features reach 1e.06, beyond half"),
    "five numbers": (changed(norm_bb=np.ones((5, 5), np.float16)), "norm_bb are 5 wide and not 6 or 7"),
    "in pixels": (changed(norm_bb=GOOD["norm_bb"] * np.float16(640)), "not normalised"),
    "to the left": (changed(norm_bb=moved(0, slice(0, 4), -2)), "not normalised"),
    "turned inside out": (changed(norm_bb=GOOD["norm_bb"][:, [2, 3, 0, 1, 4, 5]]), "not normalised"),
    "sides where corners should be": (changed(norm_bb=moved(0, slice(4, 5), 0.05)), "not x1, y1, x2, y2, width"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_as_it_should_be_is_refused_with_its_reason(name: str):
    data, message = REFUSED[name]
    with pytest.raises(RegionError, match=message) as caught:
        read_regions(data, SPEC)
    assert "\n" not in str(caught.value)


def test_boxes_may_be_rounded_to_just_beyond_the_edge():
    boxes = moved(0, slice(0, 6), 0.0)
    boxes[0] = [-0.001, 0, 1.002, 1, 1.003, 1]
    found = read_regions(changed(norm_bb=boxes), SPEC)
    assert found.boxes[0].tolist() == [0, 0, 1, 1, 1, 1, 1]


def header(shape: tuple, descr: str = "<f2") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue()


def with_member(name: str, data: bytes) -> bytes:
    """A file of which one array is these bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for other, value in GOOD.items():
            part = io.BytesIO()
            np.save(part, value)
            archive.writestr(f"{other}.npy", data if other == name else part.getvalue())
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (header((1 << 30, WIDTH)) + bytes(100), "are more than"),
        (header((4, 1 << 40)) + bytes(100), "are more than"),
        (header((1000, 2048)) + bytes(100), "do not fill 100 bytes"),
        (header((5, WIDTH)) + bytes(1 << 25), "do not fill 33554432 bytes"),
        (header((1 << 16, 256)) + bytes(1 << 25), "are more than"),
        (header((5, WIDTH), "<f16") + bytes(16 * 60), "float128"),
        (header((-5, -WIDTH)) + bytes(120), r"of shape \(-5, -12\)"),
        (b"\x93NUMPY\x01\x00\xff\xff" + bytes(100), "cannot be read"),
        (b"\x93NUMPY\x03\x00\x05\x00\x00\x00abcde", "cannot be read"),
    ],
)
def test_sizes_are_checked_before_anything_is_unpacked(data: bytes, message: str):
    file = with_member("features", data)
    tracemalloc.start()
    with pytest.raises(RegionError, match=message):
        read_regions(file, SPEC)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_bytes_are_refused_or_still_regions(data: st.DataObject):
    file = bytearray(packed(arrays(5, 5), data.draw(st.booleans())))
    for _ in range(data.draw(st.integers(1, 4))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(file)))
    for damaged in (bytes(file), bytes(file[:cut])):
        try:
            found = read_regions(damaged, SPEC)
        except RegionError as error:
            assert "\n" not in str(error)
        else:
            assert found.features.shape == (5, WIDTH) and np.isfinite(found.features).all()


def test_masks_are_as_many_as_asked_and_never_none():
    counts = [1 + i % 5 for i in range(5000)]
    masked = mask_regions(counts, 0.15, [streams(0, 0, i) for i in range(len(counts))])
    parts = torch.split(masked.chosen, counts)
    assert masked.count == masked.chosen.sum() and masked.chosen.dtype == torch.bool
    assert all(bool(part.any()) for part in parts)
    fives = torch.stack([part for part in parts if len(part) == 5])
    assert stats.chisquare(fives.sum(0).numpy()).pvalue > 1e-3
    assert stats.binomtest(int((fives.sum(1) == 1).sum()), len(fives), 0.85**5 + 5 * 0.15 * 0.85**4).pvalue > 1e-3


@pytest.fixture(scope="session")
def config(tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("regions") / "shards"
    write_region_shards(folder, [20, 17], without=(11,))
    index(str(folder), chunk_samples=5)
    return DataConfig(str(folder), tokenizer, workers=0, lanes=6, window_chunks=2, max_quarantined_share=0.1)


@pytest.fixture
def wanting(inputs: InputSpec) -> InputSpec:
    return replace(inputs, patches=0, kept_patches=0, regions=SPEC, masked_regions=0.15, partners=True)


@cache
def expected(number: int) -> Regions:
    found = read_regions(packed(arrays(number)), SPEC)
    return tuple(map(torch.from_numpy, found))  # type: ignore[return-value]


def assert_regions_of(regions: Regions | None, numbers: list[int]) -> None:
    assert regions is not None
    features, boxes, classes = zip(*map(expected, numbers), strict=True)
    assert all(a.equal(b) for a, b in zip(unpack(regions.features), features, strict=True))
    assert regions.boxes.equal(torch.cat(boxes)) and regions.classes.equal(torch.cat(classes))


def test_batches_of_regions(config: DataConfig, wanting: InputSpec):
    """No image is decoded, for half of them cannot be; a sample without regions has a stand-in and a note."""
    whole = global_batches(config, wanting, 4)
    for others in (global_batches(config, wanting, 4, 4), resumed(config, wanting, [1, 4], (2, 3))):
        for a, b in zip(whole, others, strict=True):
            assert_same(a, b)
    for batch in whole:
        assert batch.pictures.pixels is None and len(batch.pictures) == GLOBAL_BATCH and "000011" not in batch.keys
        assert_regions_of(batch.pictures.regions, [int(key) for key in batch.keys])
        masked, partners = batch.masked_regions, batch.partners
        assert masked is not None and partners is not None and partners.pictures.regions is not None
        lengths = batch.pictures.regions.features.lengths().tolist()  # type: ignore[union-attr]
        assert all(bool(part.any()) for part in torch.split(masked.chosen, lengths))
        own, shown = (unpack(p.regions.features) for p in (batch.pictures, partners.pictures))  # type: ignore[union-attr]
        assert [a.equal(b) for a, b in zip(own, shown, strict=True)] == partners.matches.tolist()
        assert 11 < partners.matches.sum() < 16
    loader = build_loader(config, wanting, SEED, GLOBAL_BATCH, 0, 1)
    for _ in range(4):
        next(loader)
    notes = loader.take_quarantined()
    loader.close()
    assert {(note.key, note.reason) for note in notes} == {
        ("000011", "it has no .regions.npz file (`mmpt-data regions` writes them)")
    }


def test_each_task_has_its_masks(config: DataConfig, wanting: InputSpec):
    tasks = replace(wanting, masked_words=WordMasking(), tasks=(("itm", 1), ("mlm", 1), ("mrfr", 1), ("mrckl", 1)))
    found = {batch.task: batch for batch in global_batches(config, tasks, 9)}
    assert len(found) == 4
    for task, batch in found.items():
        made = batch.partners, batch.masked_words, batch.masked_regions
        assert [part is not None for part in made] == [task == "itm", task == "mlm", task.startswith("mr")]
        assert batch.pictures.regions is not None


def test_evaluation_has_regions_and_stops_where_there_are_none(config: DataConfig, wanting: InputSpec, tmp_path: Path):
    with pytest.raises(ValueError, match=r"00000\.tar: sample '000011': it has no \.regions\.npz"):
        list(eval_batches(config.shards, config, wanting, 0, 1, 10))
    write_region_shards(tmp_path / "whole", [9])
    index(str(tmp_path / "whole"))
    ((batch, known),) = eval_batches(str(tmp_path / "whole"), config, wanting, 0, 1, 10)
    assert_regions_of(batch.pictures.regions, list(range(9)))
    assert batch.masked_regions is None and batch.partners is None and len(known) == 9


def test_streams_have_regions_too(config: DataConfig, wanting: InputSpec):
    stream = replace(config, shards="", stream=f"{config.shards}/00001.tar", max_quarantined_share=1.0)
    loader = build_loader(stream, replace(wanting, partners=False), SEED, 8, 0, 1)
    batch = next(loader)
    loader.close()
    assert_regions_of(batch.pictures.regions, [int(key) for key in batch.keys])
    assert batch.masked_regions is not None


def test_files_that_nobody_wants_are_left_unread(config: DataConfig):
    manifest = load_manifest(config.shards)
    place = np.array([0]), np.array([3])
    for unread, left in ((frozenset(), {"jpg", "txt", "regions.npz"}), (frozenset({"regions.npz"}), {"jpg", "txt"})):
        (sample,) = Reader(manifest, unread=unread).read(*place)
        assert set(sample.files) == left
    pixels = InputSpec(image_size=16, max_text_tokens=12, vocab_size=300)
    loader = build_loader(config, pixels, SEED, 8, 0, 1)
    assert loader._batches._dataset_fetcher.dataset.reader._readers[0]._unread == {"regions.npz"}  # type: ignore[attr-defined]
    loader.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masked_regions": 1.0}, "masked_regions wants a probability"),
        ({"regions": None}, "masks regions and takes none"),
        ({"extra_views": 2}, "extra views are crops of pixels"),
    ],
)
def test_wishes_that_contradict_one_another_are_refused(
    config: DataConfig, wanting: InputSpec, change: dict, message: str
):
    with pytest.raises(ValueError, match=message):
        build_loader(config, replace(wanting, **change), SEED, GLOBAL_BATCH, 0, 1)


def test_reading_for_any_purpose():
    assert set(read_arrays(packed(arrays(1)), NAMES)) == set(NAMES)
