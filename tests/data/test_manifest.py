import json
import pickle
import shutil
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from data_tools.index import index
from mmpt.data import storage
from mmpt.data.manifest import FILE_NAME, load_manifest, save_manifest
from mmpt.data.order import Order, locate
from mmpt.data.reader import Reader
from mmpt.data.scan import KeyFilter, Source, build_manifest
from mmpt.data.tar import ShardError
from tests.data.shards import caption, picture, write_shard, write_shards


@pytest.fixture
def folder(shards: str, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(shards, tmp_path / "copy"))


def listing(folder: Path) -> list[storage.ListedFile]:
    return storage.list_files(str(folder), ".tar")


def test_facts_of_the_shards(shards: str):
    manifest = load_manifest(shards)
    assert tuple(manifest.names) == ("00000.tar", "00001.tar", "00002.tar", "00003.tar")
    assert manifest.shard_samples.tolist() == [40, 0, 17, 40] and manifest.samples == 97
    assert manifest.shard_bytes.tolist() == [(Path(shards) / name).stat().st_size for name in manifest.names]
    assert manifest.chunk_lengths.tolist() == [5] * 8 + [5, 5, 5, 2] + [5] * 8
    assert manifest.shards_of(np.arange(20)).tolist() == [0] * 8 + [2] * 4 + [3] * 8
    assert manifest.chunk(11) == (
        2,
        int(manifest.chunk_starts[11]),
        int(manifest.shard_bytes[2]),
        True,
        2,
        int(manifest.chunk_digests[11]),
        None,
    )
    assert manifest.chunk(10).stop == manifest.chunk(11).start and not manifest.chunk(10).to_end


def test_comes_back_from_its_file_whole_and_the_file_is_reproducible(folder: Path, tmp_path: Path):
    manifest, written = load_manifest(str(folder)), (folder / FILE_NAME).read_bytes()
    save_manifest(manifest, folder / FILE_NAME)
    assert (folder / FILE_NAME).read_bytes() == written
    assert sorted(path.suffix for path in folder.iterdir()) == [".safetensors"] + [".tar"] * 4
    by_file = load_manifest(str(folder / FILE_NAME))
    assert by_file.content_hash == manifest.content_hash and len(manifest.content_hash) == 64
    save_manifest(manifest, tmp_path / "elsewhere.safetensors")
    elsewhere = load_manifest(str(tmp_path / "elsewhere.safetensors"))
    assert elsewhere.folder == str(folder) and elsewhere.content_hash == manifest.content_hash
    assert elsewhere.place(3) == str(folder / "00003.tar")


def test_the_folder_may_move(folder: Path, shards: str):
    assert load_manifest(str(folder)).content_hash == load_manifest(shards).content_hash


def test_the_hash_covers_names_keys_and_chunks(tmp_path: Path):
    hashes = set()
    for i, (name, numbers, chunk) in enumerate(
        [("a.tar", range(9), 2), ("b.tar", range(9), 2), ("a.tar", range(100, 109), 2), ("a.tar", range(9), 3)]
    ):
        (tmp_path / str(i)).mkdir()
        write_shard(tmp_path / str(i) / name, numbers)
        hashes.add(build_manifest(str(tmp_path / str(i)), listing(tmp_path / str(i)), chunk).content_hash)
    assert len(hashes) == 4


def test_every_sample_can_be_read_by_place(shards: str):
    manifest = load_manifest(shards)
    chunks = np.repeat(np.arange(len(manifest.chunk_lengths)), manifest.chunk_lengths)
    indices = np.concatenate([np.arange(length) for length in manifest.chunk_lengths])
    mixed = np.random.default_rng(0).permutation(97)
    samples = Reader(manifest, remembered_chunks=3).read(chunks[mixed], indices[mixed])
    for number, sample in zip(mixed.tolist(), samples, strict=True):
        extension = ("jpg", "png", "webp")[number % 3]
        assert sample.key == f"{number:06d}" and sample.files[extension] == picture(number, extension)
        assert sample.files["txt"].decode() == f"{caption(number)}\n{caption(number + 1)}"


def test_remote_places_work_through_the_same_functions(shards: str):
    """fsspec's memory file system stands for any other."""
    remote = fsspec.filesystem("memory")
    for path in Path(shards).iterdir():
        remote.pipe_file(f"/bucket/set/{path.name}", path.read_bytes())
    manifest = load_manifest("memory://bucket/set")
    assert manifest.content_hash == load_manifest(shards).content_hash
    (sample,) = Reader(manifest).read(np.array([9]), np.array([3]))
    assert sample.key == "000048" and sample.shard == "memory://bucket/set/00002.tar"


def test_small_sets_get_small_chunks(tmp_path: Path):
    write_shards(tmp_path, [50])
    assert index(str(tmp_path)).chunk_samples == 1
    assert index(str(tmp_path), chunk_samples=7).chunk_samples == 7


def test_no_manifest_names_the_cure(tmp_path: Path):
    with pytest.raises(ValueError, match=rf"does not exist; build it with `mmpt-data index {tmp_path}`"):
        load_manifest(str(tmp_path))
    with pytest.raises(ValueError, match="nothing does not exist; give a folder of indexed shards"):
        load_manifest(str(tmp_path / "nothing"))


def test_missing_changed_and_added_shards_are_named(folder: Path):
    (folder / "00002.tar").rename(folder / "00009.tar")
    with pytest.raises(
        ShardError, match=r"1 shard missing from the folder since it was indexed: 00002.tar; .*mmpt-data"
    ):
        load_manifest(str(folder))
    shutil.copy(folder / "00009.tar", folder / "00002.tar")
    with pytest.raises(ShardError, match=r"1 shard new in the folder since it was indexed: 00009.tar"):
        load_manifest(str(folder))
    (folder / "00009.tar").unlink()
    for name in ("00000.tar", "00003.tar"):
        with (folder / name).open("ab") as file:
            file.write(bytes(512))
    with pytest.raises(
        ShardError, match=r"2 shards changed in .*: 00000.tar \(\d+ bytes where the index has \d+\), 00003"
    ):
        load_manifest(str(folder))
    assert load_manifest(str(folder), check_shards=False).samples == 97


def test_another_process_maps_the_same_file(shards: str):
    manifest = load_manifest(shards)
    data = pickle.dumps(manifest)
    assert len(data) < 500, "the arrays do not travel"
    again = pickle.loads(data)  # noqa: S301
    assert again.content_hash == manifest.content_hash and again.folder == manifest.folder
    built = build_manifest(shards, listing(Path(shards)), 5)
    assert pickle.loads(pickle.dumps(built)).content_hash == manifest.content_hash  # noqa: S301
    with pytest.raises(ValueError, match="read-only"):
        manifest.chunk_starts[0] = 1


def test_a_filter_leaves_samples_out_for_good(shards: str):
    """Counts, order and reading all see only what is kept, though whole chunks and shards may be empty."""
    wanted = {f"{number:06d}" for number in (0, 3, 4, 17, 40, 41, 96)}
    keep = KeyFilter(partial(keep_these, frozenset(wanted | {"000050"})), frozenset({"000050"}))
    manifest = build_manifest(shards, listing(Path(shards)), 5, keep=keep)
    assert manifest.samples == 7 and int(manifest.shard_samples.sum()) == 97
    assert manifest.chunk_lengths.tolist() == [3, 0, 0, 1, 0, 0, 0, 0] + [2, 0, 0, 0] + [0] * 7 + [1]
    assert manifest.content_hash != load_manifest(shards).content_hash
    _, chunks, indices = locate(Order(manifest.chunk_lengths, 0, 3, 4), np.arange(7))
    samples = Reader(manifest).read(chunks, indices)
    assert {sample.key for sample in samples} == wanted
    with pytest.raises(ValueError, match="keeps none of the 97 samples"):
        build_manifest(shards, listing(Path(shards)), 5, keep=KeyFilter(partial(keep_these, frozenset()), frozenset()))


def keep_these(keys: frozenset[str], folder: str, name: str) -> frozenset[str]:
    return keys


@pytest.mark.slow
def test_processes_that_scan_change_nothing(shards: str):
    assert (
        build_manifest(shards, listing(Path(shards)), 5, workers=2).content_hash == load_manifest(shards).content_hash
    )


def test_offsets_and_counts_of_others_are_believed(folder: Path):
    """Energon's .tar.idx gives the same chunks; counts alone make whole shards of them, read as exactly."""
    whole = load_manifest(str(folder))
    fine = build_manifest(str(folder), listing(folder), 1)
    for shard, name in enumerate(fine.names):
        own = fine.shards_of(np.arange(fine.samples)) == shard
        starts = fine.chunk_starts[own]
        end = int(fine.shard_bytes[shard]) - 1024 if len(starts) else 0
        np.array([*starts, end], dtype="<u8").tofile(folder / f"{name}.idx")
        (folder / name.replace(".tar", "_stats.json")).write_text(
            json.dumps({"count": 50, "successes": int(own.sum())})
        )
    by_offsets = build_manifest(str(folder), listing(folder), 5, source="offsets")
    assert np.array_equal(by_offsets.chunk_starts, whole.chunk_starts)
    assert np.array_equal(by_offsets.chunk_lengths, whole.chunk_lengths)
    by_counts = build_manifest(str(folder), listing(folder), source="counts")
    assert by_counts.chunk_lengths.tolist() == [40, 17, 40] and by_counts.samples == 97
    for path in folder.glob("*_stats.json"):
        successes = json.loads(path.read_text())["successes"]
        status = ["success"] * successes + ["failed_to_download"] * 3
        parquet.write_table(pyarrow.table({"status": status}), folder / path.name.replace("_stats.json", ".parquet"))
        path.unlink()
    by_status = build_manifest(str(folder), listing(folder), source="counts")
    assert by_status.content_hash == by_counts.content_hash
    (sample,) = Reader(by_counts).read(np.array([1]), np.array([3]))
    assert sample.key == "000043"


@pytest.mark.parametrize(
    ("name", "content", "source", "message"),
    [
        ("00000.tar.idx", b"1234567", "offsets", "of 7 bytes is not a list of 8-byte offsets"),
        ("00000.tar.idx", np.array([0, 1024, 512], "<u8").tobytes(), "offsets", "does not list ascending offsets"),
        ("00000_stats.json", b'{"successes": "many"}', "counts", "'successes' is 'many' and not a count"),
        ("other", b"", "counts", "nothing beside .*00000.tar tells how many samples it has"),
    ],
)
def test_what_cannot_be_believed_is_one_line(folder: Path, name: str, content: bytes, source: Source, message: str):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        build_manifest(str(folder), listing(folder), source=source)


def test_a_wrong_count_is_met_when_the_shard_is_read(folder: Path):
    (folder / "sizes.json").write_text(json.dumps({"00000.tar": 41, "00001.tar": 0, "00002.tar": 17, "00003.tar": 40}))
    manifest = build_manifest(str(folder), listing(folder), source="counts")
    with pytest.raises(ShardError, match="40 samples where the index has 41"):
        Reader(manifest).read(np.array([0]), np.array([3]))


@pytest.mark.parametrize("damage", ["cut", "flip", "text", "empty"])
def test_a_damaged_manifest_is_one_line(folder: Path, damage: str):
    path = folder / FILE_NAME
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 3] ^= 255
    path.write_bytes({"cut": data[: len(data) // 2], "flip": data, "text": b"not a manifest", "empty": b""}[damage])
    with pytest.raises(ValueError, match=r"manifest.safetensors is damaged .*mmpt-data index") as caught:
        load_manifest(str(folder))
    assert "\n" not in str(caught.value)


def test_a_manifest_with_pickles_is_refused(folder: Path):
    (folder / FILE_NAME).write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="is damaged"):
        load_manifest(str(folder))


def test_a_shard_that_changed_under_an_unchanged_size_is_noticed_when_read(folder: Path):
    manifest = load_manifest(str(folder))
    data = bytearray((folder / "00000.tar").read_bytes())
    data[int(manifest.chunk_starts[3]) + 5] ^= 1
    (folder / "00000.tar").write_bytes(data)
    with pytest.raises(ShardError, match=r"00000.tar at byte \d+: the checksum"):
        Reader(load_manifest(str(folder))).read(np.array([3]), np.array([0]))


def test_a_sample_without_its_one_image_is_refused_at_once(tmp_path: Path):
    import tarfile

    for names in (["a.txt"], ["a.jpg", "a.png"]):
        with tarfile.open(tmp_path / "0.tar", "w") as tar:
            for name in names:
                tar.addfile(tarfile.TarInfo(name))
        with pytest.raises(ShardError, match="key 'a' should have one image and has"):
            build_manifest(str(tmp_path), listing(tmp_path))


def test_an_empty_data_set_is_refused(tmp_path: Path):
    write_shard(tmp_path / "0.tar", range(0))
    with pytest.raises(ValueError, match="has no samples in 1 shards"):
        build_manifest(str(tmp_path), listing(tmp_path))
