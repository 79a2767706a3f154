"""Shards from a web server and from an S3 endpoint, over sockets: batches are those of the local files, or one line."""

import io
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from data_tools.index import index
from mmpt.data import storage
from mmpt.data.loader import DataConfig, build_loader
from mmpt.data.manifest import Manifest, load_manifest
from mmpt.data.reader import RawSample, Reader
from mmpt.data.remote.cache import CacheConfig
from mmpt.data.remote.ranges import ChangedError, GaveUpError, MissingError, NoRangeError, RemoteConfig
from mmpt.data.tar import BLOCK, ShardError, read_extents
from mmpt.inputs import InputSpec
from tests.data.remote.fault_server import PERMANENT, TRANSIENT, Plan, folder_answers, serving, upstream_answers
from tests.data.remote.s3_server import bucket_of, set_credentials
from tests.data.test_tar import damages

NAMES = "{00000..00003}.tar"
REMOTE = RemoteConfig(deadline_seconds=60, timeout_seconds=0.25, slowest_bytes_per_second=4096)
SHORT = RemoteConfig(deadline_seconds=1, timeout_seconds=0.3)
QUICK_TRANSIENT = tuple(fault for fault in TRANSIENT if "drip" not in fault)


@pytest.fixture(scope="module")
def s3_port(shards: str) -> Iterator[int]:
    with bucket_of(Path(shards)) as port:
        yield port


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    set_credentials(monkeypatch)


@contextmanager
def remote(kind: str, request: pytest.FixtureRequest, plan: Plan) -> Iterator[str]:
    """The folder's URL on a server that misbehaves to the plan: the web server itself, or a proxy before moto's, which
    speaks the dialect of S3 that Google Cloud Storage understands too."""
    if kind == "http":
        with serving(folder_answers(Path(request.getfixturevalue("shards"))), plan) as server:
            yield server.url
    else:
        with serving(upstream_answers(request.getfixturevalue("s3_port")), plan) as server:
            environment = request.getfixturevalue("monkeypatch")
            environment.setenv("AWS_ENDPOINT_URL" if kind == "s3" else "GOOGLE_BASE_URL", server.url)
            environment.setenv("GOOGLE_SKIP_SIGNATURE", "true")
            yield f"{kind}://bucket/train"


def indexed(folder: str, out: Path) -> Manifest:
    """The manifest of remote shards; a folder is listed where that can be."""
    return index(folder if storage.can_list(folder) else f"{folder}/{NAMES}", chunk_samples=5, out=out)


def all_samples(manifest: Manifest, cache: Path, config: RemoteConfig = REMOTE) -> list[RawSample]:
    lengths = manifest.chunk_lengths
    chunks = np.repeat(np.arange(len(lengths)), lengths)
    indices = np.concatenate([np.arange(length) for length in lengths])
    mixed = np.random.default_rng(0).permutation(len(chunks))
    read = Reader(manifest, CacheConfig(str(cache), 200_000), config).read(chunks[mixed], indices[mixed])
    return [read[i] for i in np.argsort(mixed)]


@pytest.mark.parametrize("kind", ["http", "s3", "gs"])
def test_the_manifest_is_that_of_the_local_shards(kind: str, request, shards: str, tmp_path: Path):
    plan = Plan(("reset", "cut", "503", "429"), 0.5, seed=1)
    with remote(kind, request, plan) as folder:
        manifest = indexed(folder, tmp_path)
        assert manifest.content_hash == load_manifest(shards).content_hash and plan.given > 1
        assert all(version.startswith('"') for version in manifest.versions)
        assert load_manifest(str(tmp_path)).folder == folder


@pytest.mark.parametrize(("kind", "seed"), [("http", 0), ("http", 1), ("s3", 0), ("s3", 1), ("gs", 2)])
def test_transient_faults_change_no_sample(kind: str, seed: int, request, shards: str, tmp_path: Path):
    expected = all_samples(load_manifest(shards), tmp_path)
    plan = Plan()
    with remote(kind, request, plan) as folder:
        manifest = indexed(folder, tmp_path)
        plan.faults, plan.share, plan.seed = QUICK_TRANSIENT, 0.4, seed
        samples = all_samples(manifest, tmp_path / "cache")
        assert plan.given >= 3
    assert [(s.key, s.offset, s.files) for s in samples] == [(s.key, s.offset, s.files) for s in expected]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["http", "s3"])
@pytest.mark.parametrize("fault", TRANSIENT)
def test_each_transient_fault_alone(kind: str, fault: str, request, shards: str, tmp_path: Path):
    expected = all_samples(load_manifest(shards), tmp_path)
    plan = Plan()
    with remote(kind, request, plan) as folder:
        manifest = indexed(folder, tmp_path)
        plan.faults, plan.share, plan.most = (fault,), 0.3, 3
        samples = all_samples(manifest, tmp_path / "cache")
        assert plan.given == 3
    assert [s.files for s in samples] == [s.files for s in expected]


def config(shards: str, tokenizer: str, cache: Path, workers: int = 0, remote: RemoteConfig = REMOTE) -> DataConfig:
    return DataConfig(
        shards=shards, tokenizer=tokenizer, workers=workers, lanes=4, remote=remote,
        cache=CacheConfig(str(cache), 200_000),
    )  # fmt: skip


def batches(config: DataConfig, inputs: InputSpec, count: int, rank: int = 0, world_size: int = 1) -> list:
    loader = build_loader(config, inputs, seed=3, global_batch=8, rank=rank, world_size=world_size)
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "workers"), [("http", 0), ("http", 2), ("s3", 0)])
def test_transient_faults_change_no_batch(
    kind: str, workers: int, request, shards: str, tokenizer: str, inputs: InputSpec, tmp_path: Path
):
    """Two epochs, of 97 samples each, on two ranks. Workers see the environment of when the first of them began, which
    is not that of the S3 endpoint here; tests/test_train_remote.py trains from S3 with workers."""
    plan = Plan()
    with remote(kind, request, plan) as folder:
        indexed(folder, tmp_path)
        plan.faults, plan.share, plan.only = QUICK_TRANSIENT, 0.05, ".tar"
        for rank in range(2):
            expected = batches(config(shards, tokenizer, tmp_path), inputs, 25, rank, 2)
            found = batches(config(str(tmp_path), tokenizer, tmp_path / "cache", workers), inputs, 25, rank, 2)
            for a, b in zip(expected, found, strict=True):
                assert a.keys == b.keys and torch.equal(a.positions, b.positions)
                assert torch.equal(a.pictures.pixels, b.pictures.pixels) and torch.equal(a.text.x, b.text.x)
        assert plan.given > 0


CAUSES = {
    "whole": (NoRangeError, "with the whole"), "other etag": (ChangedError, "changed"),
    "other size": (ChangedError, "bytes where the index has"), "other range": (NoRangeError, "sends"),
    "compressed": (NoRangeError, "compresses"), "404": (MissingError, "404|no such object"),
    "403": (PermissionError, "403|refuses"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "fault"),
    [(kind, fault) for kind in ("http", "s3") for fault in PERMANENT if (kind, fault) != ("s3", "compressed")],
)  # obstore does not tell of compression
def test_a_permanent_fault_stops_the_run_with_one_line(
    kind: str, fault: str, request, tokenizer: str, inputs: InputSpec, tmp_path: Path
):
    cause, message = CAUSES[fault]
    plan = Plan()
    with remote(kind, request, plan) as folder:
        indexed(folder, tmp_path)
        plan.seen.clear()
        plan.faults, plan.share, plan.only = (fault,), 1.0, ".tar"
        with pytest.raises(ShardError, match=message) as caught:
            batches(config(str(tmp_path), tokenizer, tmp_path / "cache", remote=SHORT), inputs, 25)
        assert isinstance(caught.value.__cause__, cause)
        assert caught.value.shard.startswith(folder) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["http", "s3"])
@pytest.mark.parametrize("fault", ["503", "stall", "cut"])
def test_faults_without_end_stop_the_run_at_the_deadline(
    kind: str, fault: str, request, tokenizer: str, inputs: InputSpec, tmp_path: Path
):
    plan = Plan()
    with remote(kind, request, plan) as folder:
        indexed(folder, tmp_path)
        plan.faults, plan.share, plan.only, plan.retry_after = (fault,), 1.0, ".tar", "0.2"
        with pytest.raises(ShardError, match=r"gave up after \d+ tr(y|ies) in") as caught:
            one = config(str(tmp_path), tokenizer, tmp_path / "cache", remote=RemoteConfig(0.5, 0.2))
            batches(one, inputs, 25)
        assert isinstance(caught.value.__cause__, GaveUpError) and "\n" not in str(caught.value)


def test_an_etag_that_changes_between_index_and_training(shards: str, tmp_path: Path):
    """Of the same size, and with headers that are all in order."""
    folder = tmp_path / "web"
    folder.mkdir()
    for path in Path(shards).glob("*.tar"):
        (folder / path.name).write_bytes(path.read_bytes())
    with serving(folder_answers(folder)) as server:
        manifest = indexed(server.url, tmp_path)
        data = bytearray((folder / "00002.tar").read_bytes())
        data[BLOCK + 7] ^= 1  # inside a picture
        (folder / "00002.tar").write_bytes(data)
        with pytest.raises(ShardError, match="was changed"):
            all_samples(manifest, tmp_path / "cache")


def boundaries(data: bytes) -> dict[str, int]:
    """Where to cut: one place of each class (data of one sample in the middle), and others at every block around it."""
    extents = list(read_extents(io.BytesIO(data), "a", 0, len(data), to_end=True))
    extent = extents[len(extents) // 2]
    (_, first, size), (_, second, _) = extent.files[:2]
    last = extents[-1].files[-1]
    end = last[1] + -(-last[2] // BLOCK) * BLOCK
    return {
        "nothing left": 0, "after the first header": BLOCK, "at a sample": extent.start,
        "after a header": first, "inside a payload": first + BLOCK, "after a payload": second - BLOCK,
        "after the header of a second file": second, "before the end mark": end, "inside the end mark": end + BLOCK,
        "inside a header, not at a block": extent.start + 100, "inside a payload, not at a block": first + size // 2,
        "after the end mark": end + 2 * BLOCK, "the last block": len(data) - BLOCK,
    }  # fmt: skip


@pytest.mark.parametrize("known", [True, False], ids=["etag", "no version"])
def test_a_shard_that_is_cut_at_any_block_is_never_a_shorter_epoch(known: bool, shards: str, tmp_path: Path):
    """Served as a shorter file: training meets another size or etag, and indexing a shard without its end."""
    folder = tmp_path / "web"
    folder.mkdir()
    path = folder / "00002.tar"
    data = (Path(shards) / path.name).read_bytes()
    path.write_bytes(data)
    with serving(folder_answers(folder, "etag" if known else "none")) as server:
        manifest = index(f"{server.url}/{{00002..00002}}.tar", chunk_samples=5, out=tmp_path)
        expected = all_samples(manifest, tmp_path / "cache")
        cuts = set(boundaries(data).values()) | set(range(0, len(data), 7 * BLOCK))
        for at in sorted(cuts):
            path.write_bytes(data[:at])
            with pytest.raises(ShardError, match=f"{at} bytes where the index has {len(data)}|was changed"):
                all_samples(manifest, tmp_path / f"cache-{at}")
            filling = len(data) - data.rstrip(b"\0").__len__()
            if at < len(data) - filling:
                with pytest.raises(ShardError):
                    index(f"{server.url}/{{00002..00002}}.tar", chunk_samples=5, out=tmp_path / "again")
        assert len(cuts) > 20 and len(expected) == 17


def test_every_kind_of_damage_is_refused_over_http(shards: str, tmp_path: Path):
    """That of test_tar.py, met when the shard is indexed and when it is read against the manifest of the intact one."""
    folder = tmp_path / "web"
    folder.mkdir()
    path = folder / "00000.tar"
    intact = (Path(shards) / "00000.tar").read_bytes()
    path.write_bytes(intact)
    with serving(folder_answers(folder, "none")) as server:
        manifest = index(f"{server.url}/{{00000..00000}}.tar", chunk_samples=5, out=tmp_path)
        for name, (damaged, _) in damages(intact).items():
            path.write_bytes(damaged)
            with pytest.raises(ShardError):
                index(f"{server.url}/{{00000..00000}}.tar", chunk_samples=5, out=tmp_path / "again")
            with pytest.raises(ShardError):
                all_samples(manifest, tmp_path / f"cache {name}")


def test_s3_places(request, shards: str):
    plan = Plan()
    with remote("s3", request, plan) as folder:
        listed = storage.list_files(folder, ".tar", REMOTE)
        local = storage.list_files(shards, ".tar")
        assert [(file.name, file.size) for file in listed] == [(file.name, file.size) for file in local]
        listings = [seen for seen in plan.seen if "list-type=2" in seen.path]
        assert len(listings) == len(plan.seen) == 1  # and no request for each file
        first = listed[0]
        assert storage.stat(f"{folder}/{first.name}") == (first.size, first.version)
        assert storage.is_folder(folder) and not storage.is_folder("s3://bucket/tra")
        assert storage.exists(f"{folder}/{first.name}") and not storage.exists(f"{folder}/none.tar")
        with storage.open_bytes(f"{folder}/{first.name}", first.version) as file:
            data = (Path(shards) / first.name).read_bytes()
            for _ in range(5):
                at = random.Random(0).randrange(len(data) - 100)
                file.seek(at)
                assert file.read(100) == data[at : at + 100]
        with pytest.raises(MissingError):
            storage.stat("s3://nowhere/none.tar")
