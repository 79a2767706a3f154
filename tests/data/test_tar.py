"""The strict tar reader: intact shards read as webdataset reads them, damaged ones are refused."""

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_expander

from mmpt.data.tar import BLOCK, Extent, ShardError, read_extents
from tests.data.shards import write_shard

SAMPLES = 12


def read(data: bytes) -> list[Extent]:
    return list(read_extents(io.BytesIO(data), "shard.tar", 0, len(data), to_end=True))


def archive(files: dict[str, bytes], tar_format: int = tarfile.USTAR_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tar_format) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("tar") / "00000.tar"
    write_shard(path, range(SAMPLES))
    return path.read_bytes()


def contents(data: bytes) -> list[dict]:
    return [
        {"__key__": extent.key} | {ext: data[start : start + size] for ext, start, size in extent.files}
        for extent in read(data)
    ]


def by_webdataset(data: bytes) -> list[dict]:
    stream = tar_file_expander([{"url": "shard.tar", "stream": io.BytesIO(data)}])
    samples = [sample for sample in group_by_keys(stream) if sample.get("__key__")]
    return [
        {name: value for name, value in sample.items() if name in ("__key__",) or name[0] != "_"} for sample in samples
    ]


def test_reads_what_webdataset_reads(intact: bytes):
    assert len(contents(intact)) == SAMPLES
    assert contents(intact) == by_webdataset(intact)


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_in_every_format(tar_format: int):
    names = ["a/b.jpg", "a/b.seg.txt", "./c.JPG", f"{'d' * 90}/{'e' * 60}.jpg", f"{'d' * 90}/{'e' * 60}.txt"]
    if tar_format != tarfile.USTAR_FORMAT:
        names += [f"{'f' * 300}/{'g' * 120}.jpg", "größe/写真.jpg", "größe/写真.txt"]
    data = archive({name: name.encode() for name in names}, tar_format)
    assert contents(data) == by_webdataset(data)


def test_each_sample_is_found_at_its_first_byte(intact: bytes):
    extents = read(intact)
    for first, extent in enumerate(extents):
        rest = read_extents(io.BytesIO(intact), "shard.tar", extent.start, len(intact), to_end=True)
        assert list(rest) == extents[first:]
        middle = read_extents(io.BytesIO(intact), "shard.tar", extents[0].start, extent.start, to_end=False)
        assert list(middle) == extents[:first]


def damages(data: bytes) -> dict[str, tuple[bytes, str]]:
    """Each way to damage a shard at its middle sample: (damaged bytes, part of the message)."""
    extent = read(data)[SAMPLES // 2]
    header, (_, payload, size) = extent.start, extent.files[0]
    flipped = bytearray(data)
    flipped[header + 3] ^= 4
    one_block = read(data)[-1].files[-1]
    end = one_block[1] + -(-one_block[2] // BLOCK) * BLOCK
    return {
        "cut at a sample": (data[:header], "end-of-archive mark is missing"),
        "cut between the files of a sample": (data[: extent.files[1][1] - BLOCK], "end-of-archive mark is missing"),
        "cut inside a header": (data[: header + 100], "inside a header"),
        "cut inside a payload": (data[: payload + size // 2], "is cut short"),
        "cut before the end mark": (data[:end], "end-of-archive mark is missing"),
        "cut inside the end mark": (data[: end + BLOCK], "one zero block"),
        "a byte of a header changed": (bytes(flipped), "checksum"),
        "zeros over two headers": (
            data[:header] + bytes(2 * BLOCK) + data[header + 2 * BLOCK :],
            "zeros in the middle",
        ),
        "zeros over one header": (data[:header] + bytes(BLOCK) + data[header + BLOCK :], "zeros in the middle"),
        "bytes lost": (data[:header] + data[header + 7 :], "checksum"),
        "two archives in one file": (data + data, "zeros in the middle"),
        "a web page": (b"<!DOCTYPE html><title>404</title>" + bytes(9000), "not a tar archive"),
        "gzip": (b"\x1f\x8b\x08" + bytes(9000), "gunzip"),
        "an empty file": (b"", "end-of-archive mark is missing"),
    }


DAMAGES = (
    "cut at a sample", "cut between the files of a sample", "cut inside a header", "cut inside a payload",
    "cut before the end mark", "cut inside the end mark", "a byte of a header changed", "zeros over two headers",
    "zeros over one header", "bytes lost", "two archives in one file", "a web page", "gzip", "an empty file",
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_an_error(intact: bytes, damage: str):
    data, message = damages(intact)[damage]
    with pytest.raises(ShardError, match=message) as caught:
        read(data)
    assert caught.value.shard == "shard.tar" and 0 <= caught.value.offset <= len(data)
    assert "mmpt-data" in str(caught.value) and "\n" not in str(caught.value)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_no_changed_header_byte_goes_unnoticed(intact: bytes, data: st.DataObject):
    headers = [start - BLOCK for extent in read(intact) for _, start, _ in extent.files]
    at = data.draw(st.sampled_from(headers)) + data.draw(st.integers(0, BLOCK - 1))
    changed = bytearray(intact)
    changed[at] ^= data.draw(st.integers(1, 255))
    try:
        after = read(bytes(changed))
    except ShardError:
        return
    assert after == read(intact)  # filling around the checksum's digits says nothing


@given(cut=st.integers(0, 10**9))
@settings(max_examples=300, deadline=None)
def test_no_cut_goes_unnoticed(intact: bytes, cut: int):
    last = read(intact)[-1].files[-1]
    end = last[1] + -(-last[2] // BLOCK) * BLOCK
    with pytest.raises(ShardError):
        read(intact[: cut % (end + 2 * BLOCK)])


def special(kind: bytes, name: str = "a.jpg") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    return out.getvalue()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE])
def test_only_regular_files(kind: bytes):
    with pytest.raises(ShardError, match="regular file"):
        read(special(kind))


@pytest.mark.parametrize(
    "name", ["/etc/a.jpg", "../a.jpg", "a/../../b.jpg", "a\\b.jpg", "README", ".hidden", "a/.b.jpg", "a."]
)
def test_names_that_are_not_a_key_and_extension_inside_the_shard(name: str):
    with pytest.raises(ShardError, match=r"not a path inside the shard|no key and extension"):
        read(archive({name: b"x"}))


def test_files_of_a_key_must_be_neighbours_and_unique():
    with pytest.raises(ShardError, match="'a' are not next to one another"):
        read(archive({"a.jpg": b"", "b.jpg": b"", "a.txt": b""}))
    with pytest.raises(ShardError, match=r"two \.jpg files"):
        read(archive({"a.jpg": b"", "a.JPG": b""}))


def test_an_intact_empty_shard_has_no_samples(tmp_path: Path):
    write_shard(tmp_path / "a.tar", range(0))
    assert read((tmp_path / "a.tar").read_bytes()) == []
