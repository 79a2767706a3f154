import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest

from data_tools.index import index
from mmpt.data.manifest import FILE_NAME, build_manifest, load_manifest, save_manifest
from mmpt.data.reader import Reader
from mmpt.data.tar import ShardError
from tests.data.shards import caption, picture, write_shard, write_shards


@pytest.fixture
def folder(shards: str, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(shards, tmp_path / "copy"))


def test_facts_of_the_shards(shards: str):
    manifest = load_manifest(shards)
    assert manifest.shards == ("00000.tar", "00001.tar", "00002.tar", "00003.tar")
    assert manifest.shard_samples.tolist() == [40, 0, 17, 40] and manifest.samples == 97
    assert manifest.shard_bytes.tolist() == [(Path(shards) / name).stat().st_size for name in manifest.shards]
    assert manifest.chunk_lengths.tolist() == [5] * 8 + [5, 5, 5, 2] + [5] * 8
    assert manifest.chunk_shards.tolist() == [0] * 8 + [2] * 4 + [3] * 8


def test_comes_back_from_its_file_whole_and_the_file_is_reproducible(shards: str, tmp_path: Path):
    manifest = load_manifest(shards)
    save_manifest(manifest, tmp_path / "a.npz")
    assert (tmp_path / "a.npz").read_bytes() == (Path(shards) / FILE_NAME).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    by_file = load_manifest(str(Path(shards) / FILE_NAME))
    assert by_file.content_hash == manifest.content_hash and len(manifest.content_hash) == 64


def test_the_folder_may_move(folder: Path, shards: str):
    assert load_manifest(str(folder)).content_hash == load_manifest(shards).content_hash


def test_the_hash_covers_names_keys_and_chunks(tmp_path: Path):
    hashes = set()
    for i, (name, numbers, chunk) in enumerate(
        [("a.tar", range(9), 2), ("b.tar", range(9), 2), ("a.tar", range(100, 109), 2), ("a.tar", range(9), 3)]
    ):
        (tmp_path / str(i)).mkdir()
        write_shard(tmp_path / str(i) / name, numbers)
        hashes.add(build_manifest(str(tmp_path / str(i)), [name], chunk).content_hash)
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


def test_a_missing_shard_is_named(folder: Path):
    (folder / "00002.tar").unlink()
    with pytest.raises(ShardError, match=r"00002.tar at byte 0: the shard is missing.*mmpt-data index"):
        load_manifest(str(folder))


def test_a_shard_of_another_size_is_named(folder: Path):
    with (folder / "00003.tar").open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(ShardError, match=r"00003.tar at byte \d+: \d+ bytes where the index has \d+"):
        load_manifest(str(folder))


@pytest.mark.parametrize("damage", ["cut", "flip", "text", "empty"])
def test_a_damaged_manifest_is_one_line(folder: Path, damage: str):
    path = folder / FILE_NAME
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 3] ^= 255
    path.write_bytes({"cut": data[: len(data) // 2], "flip": data, "text": b"not a manifest", "empty": b""}[damage])
    with pytest.raises(ValueError, match=r"manifest.npz is damaged .*mmpt-data index") as caught:
        load_manifest(str(folder))
    assert "\n" not in str(caught.value)


def test_a_manifest_with_pickles_is_refused(folder: Path):
    np.savez(folder / FILE_NAME, version=np.array([{"a": 1}], dtype=object))
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
            build_manifest(str(tmp_path), ["0.tar"])


def test_an_empty_data_set_is_refused(tmp_path: Path):
    write_shard(tmp_path / "0.tar", range(0))
    with pytest.raises(ValueError, match="has no samples in 1 shards"):
        build_manifest(str(tmp_path), ["0.tar"])
