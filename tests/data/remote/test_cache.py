"""The chunk cache of a node: one download for all processes, bounded bytes, nothing believed, nothing left behind."""

import errno
import multiprocessing
import os
import random
import signal
import tempfile
import threading
import time
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpt.data.remote.ahead import FetchAhead
from mmpt.data.remote.cache import BLOCK_BYTES, CacheConfig, ChunkCache, Range
from mmpt.data.remote.ranges import MissingError, RemoteConfig
from mmpt.data.remote.space import SpaceError
from tests.data.remote.fault_server import Plan, folder_answers, serving

CHUNK = 100_000
CHUNKS = 12
SIZE = CHUNK * CHUNKS
REMOTE = RemoteConfig(deadline_seconds=20, timeout_seconds=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("web")
    (path / "a.tar").write_bytes(random.Random(0).randbytes(SIZE))
    return path


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def chunk(place: str, i: int) -> Range:
    return Range(place, "", i * CHUNK, (i + 1) * CHUNK, SIZE)


def bytes_on_disk(cache: Path) -> int:
    total = 0
    for part in ("partial", "files"):
        for root, _, names in os.walk(cache / part):
            for name in names:
                try:
                    total += os.stat(os.path.join(root, name)).st_size
                except FileNotFoundError:
                    continue  # renamed or evicted meanwhile
    return total


def ledger(cache: Path) -> int:
    return int((cache / "ledger").read_text())


def read_all(cache: ChunkCache, place: str, data: bytes, order: list[int]) -> None:
    for i in order:
        with cache.open(chunk(place, i)) as file:
            at = i * CHUNK + (i * 7919) % (CHUNK - 300)
            file.seek(at)
            assert file.read(300) == data[at : at + 300]
            file.seek(i * CHUNK)
            assert file.read(-1) == data[i * CHUNK : (i + 1) * CHUNK]
            assert file.read(1) == b""


def _reader(cache: Path, limit: int, place: str, source: Path, seed: int, rounds: int) -> None:
    opened = ChunkCache(CacheConfig(str(cache), limit), REMOTE)
    data, draw = source.read_bytes(), random.Random(seed)
    while not (source.parent / "go").exists():
        time.sleep(0.002)
    for _ in range(rounds):
        read_all(opened, place, data, draw.sample(range(CHUNKS), CHUNKS))


def processes(count: int, *args) -> list:
    """Readers of one cache, which begin together."""
    context = multiprocessing.get_context("spawn")
    signal_file = args[3].parent / "go"
    signal_file.unlink(missing_ok=True)
    started = [context.Process(target=_reader, args=(*args[:4], seed, args[4])) for seed in range(count)]
    for process in started:
        process.start()
    signal_file.touch()
    return started


def test_a_chunk_is_downloaded_once_per_node(folder: Path, tmp_path: Path):
    with serving(folder_answers(folder), Plan(("503", "cut"), 0.05)) as server:
        started = processes(4, tmp_path, 1 << 30, f"{server.url}/a.tar", folder / "a.tar", 3)
        for process in started:
            process.join(60)
        assert [process.exitcode for process in started] == [0] * 4
        sound = [seen.headers["Range"] for seen in server.plan.seen if not seen.fault]
        assert len(sound) == CHUNKS  # and the others were faults
    assert bytes_on_disk(tmp_path) == ledger(tmp_path) and not list((tmp_path / "partial").iterdir())


def test_bytes_stay_bounded_while_many_read_write_and_evict(folder: Path, tmp_path: Path):
    limit, most = 6 * CHUNK, 0
    with serving(folder_answers(folder)) as server:
        started = processes(4, tmp_path, limit, f"{server.url}/a.tar", folder / "a.tar", 6)
        while any(process.is_alive() for process in started):
            most = max(most, bytes_on_disk(tmp_path) if (tmp_path / "files").exists() else 0)
            time.sleep(0.002)
        assert [process.exitcode for process in started] == [0] * 4
        assert len(server.plan.seen) > CHUNKS  # some were evicted and fetched again
    # A file that moves from partial/ to files/ between the two looks counts twice, at most one for each process.
    assert CHUNK < most <= limit + 4 * (CHUNK + 16) and bytes_on_disk(tmp_path) == ledger(tmp_path) <= limit


def _download(cache: Path, place: str) -> None:
    ChunkCache(CacheConfig(str(cache), 4 * CHUNK), RemoteConfig(60, 30)).fetch(chunk(place, 3))


def test_killed_in_the_middle_of_a_download(folder: Path, tmp_path: Path):
    with serving(folder_answers(folder), Plan(("stall",), 1.0, seed=5, most=1)) as server:
        place = f"{server.url}/a.tar"
        process = multiprocessing.get_context("spawn").Process(target=_download, args=(tmp_path, place))
        process.start()
        while not server.plan.seen or not bytes_on_disk(tmp_path):
            time.sleep(0.01)
        time.sleep(0.1)
        assert process.pid is not None
        assert "/dev/shm" not in Path(f"/proc/{process.pid}/maps").read_text()  # nothing to stay behind there
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert len(list((tmp_path / "partial").iterdir())) == 1
        cache = ChunkCache(CacheConfig(str(tmp_path), 4 * CHUNK), REMOTE)
        assert bytes_on_disk(tmp_path) == ledger(tmp_path) == 0
        read_all(cache, place, (folder / "a.tar").read_bytes(), [3, 4, 3])
        assert bytes_on_disk(tmp_path) == ledger(tmp_path) > 2 * CHUNK


@pytest.mark.parametrize("at", [0, BLOCK_BYTES - 1, BLOCK_BYTES, CHUNK - 1, CHUNK, CHUNK + 11, "cut", "empty"])
def test_a_damaged_file_is_fetched_again(folder: Path, tmp_path: Path, at: int | str):
    with serving(folder_answers(folder)) as server:
        place = f"{server.url}/a.tar"
        cache = ChunkCache(CacheConfig(str(tmp_path), 1 << 30), REMOTE)
        data = (folder / "a.tar").read_bytes()
        read_all(cache, place, data, [1])
        (stored,) = (tmp_path / "files").glob("*/*")
        content = bytearray(stored.read_bytes())
        if isinstance(at, int):
            content[at] ^= 1
        stored.write_bytes({"cut": content[: CHUNK // 2], "empty": b""}.get(str(at), content))
        read_all(cache, place, data, [1])
        assert len(server.plan.seen) == 2
        read_all(cache, place, data, [1])
        assert len(server.plan.seen) == 2


def test_damaged_while_it_is_open(folder: Path, tmp_path: Path):
    with serving(folder_answers(folder)) as server:
        cache = ChunkCache(CacheConfig(str(tmp_path), 1 << 30), REMOTE)
        data = (folder / "a.tar").read_bytes()
        with cache.open(chunk(f"{server.url}/a.tar", 0)) as file:
            assert file.read(10) == data[:10]
            (stored,) = (tmp_path / "files").glob("*/*")
            with stored.open("r+b") as damaged:
                damaged.seek(BLOCK_BYTES + 3)
                damaged.write(b"damage")
            file.seek(BLOCK_BYTES)
            assert file.read(100) == data[BLOCK_BYTES : BLOCK_BYTES + 100]


def test_an_open_file_survives_its_eviction(folder: Path, tmp_path: Path):
    with serving(folder_answers(folder)) as server:
        place, data = f"{server.url}/a.tar", (folder / "a.tar").read_bytes()
        cache = ChunkCache(CacheConfig(str(tmp_path), 2 * CHUNK), REMOTE)
        with cache.open(chunk(place, 0)) as file:
            read_all(cache, place, data, [1, 2, 3])
            assert bytes_on_disk(tmp_path) < 2 * CHUNK
            assert file.read(-1) == data[:CHUNK]


def test_a_failed_download_leaves_nothing(folder: Path, tmp_path: Path):
    with serving(folder_answers(folder)) as server:
        cache = ChunkCache(CacheConfig(str(tmp_path), 1 << 20), REMOTE)
        with pytest.raises(MissingError):
            cache.open(chunk(f"{server.url}/b.tar", 0))
    assert bytes_on_disk(tmp_path) == ledger(tmp_path) == 0


def test_too_small_for_a_chunk(folder: Path, tmp_path: Path):
    with serving(folder_answers(folder)) as server:
        cache = ChunkCache(CacheConfig(str(tmp_path), CHUNK), REMOTE)
        with pytest.raises(SpaceError, match=rf"may hold {CHUNK} bytes and one chunk has \d+ \(data\.cache; for http"):
            cache.open(chunk(f"{server.url}/a.tar", 0))
        assert not server.plan.seen
    with pytest.raises(ValueError, match="limit_bytes must be above 0"):
        CacheConfig("x", 0)


def test_a_folder_of_ones_own_without_being_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ChunkCache(CacheConfig(), REMOTE)
    own = tmp_path / f"mmpt-cache-{os.getuid()}"
    assert own.stat().st_mode & 0o077 == 0 and (own / "ledger").exists()
    other = os.getuid() + 1
    (tmp_path / f"mmpt-cache-{other}").mkdir()  # by us, whoever that is
    monkeypatch.setattr(os, "getuid", lambda: other)
    with pytest.raises(PermissionError, match=rf"mmpt-cache-{other} belongs to another user: name a folder"):
        ChunkCache(CacheConfig(), REMOTE)


def test_a_full_disk(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Others fill the disk: the cache first makes do with less, then stops in one line."""
    room = 3 * CHUNK
    allocate = os.posix_fallocate

    def limited(descriptor: int, offset: int, size: int) -> None:
        if bytes_on_disk(tmp_path) + size > room:
            raise OSError(errno.ENOSPC, "No space left on device")
        allocate(descriptor, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", limited)
    with serving(folder_answers(folder)) as server:
        place, data = f"{server.url}/a.tar", (folder / "a.tar").read_bytes()
        cache = ChunkCache(CacheConfig(str(tmp_path), 1 << 30), REMOTE)
        read_all(cache, place, data, [0, 1, 2, 3, 4, 0])
        assert bytes_on_disk(tmp_path) == ledger(tmp_path) <= room
        room = CHUNK // 2
        with pytest.raises(SpaceError, match=r"the disk of .* is full") as caught:
            read_all(cache, place, data, [7])
        assert "\n" not in str(caught.value)
    assert bytes_on_disk(tmp_path) == ledger(tmp_path)


@given(
    opened=st.lists(st.integers(0, 7), max_size=30), limit=st.integers(40_000, 200_000),
    sizes=st.lists(st.integers(0, 30_000), min_size=8, max_size=8),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_any_order_of_any_chunks(opened: list[int], limit: int, sizes: list[int]):
    data = random.Random(1).randbytes(sum(sizes))
    starts = [sum(sizes[:i]) for i in range(9)]
    fsspec.filesystem("memory").pipe_file("/cache-test.tar", data)
    with tempfile.TemporaryDirectory() as folder:
        cache = ChunkCache(CacheConfig(folder, limit), REMOTE)
        for i in opened:
            wanted = Range("memory://cache-test.tar", "", starts[i], starts[i + 1], len(data))
            with cache.open(wanted) as file:
                assert file.read(-1) == data[starts[i] : starts[i + 1]]
            assert bytes_on_disk(Path(folder)) == ledger(Path(folder)) <= limit
            assert len(list(Path(folder).glob(f"files/*/{wanted.name()}"))) == 1  # the last one used stays


def test_the_least_recently_used_goes_first(folder: Path, tmp_path: Path):
    with serving(folder_answers(folder)) as server:
        place, data = f"{server.url}/a.tar", (folder / "a.tar").read_bytes()
        cache = ChunkCache(CacheConfig(str(tmp_path), int(4.6 * CHUNK)), REMOTE)
        for i in (0, 1, 2, 3, 0, 4):  # 4 needs the room of 1, which was not used since
            read_all(cache, place, data, [i])
            time.sleep(0.02)  # times of use are as fine as the clock of the file system
        read_all(cache, place, data, [0])
        assert len(server.plan.seen) == 5
        read_all(cache, place, data, [1])
        assert len(server.plan.seen) == 6


def test_a_ledger_that_was_lost_is_counted_anew(folder: Path, tmp_path: Path):
    with serving(folder_answers(folder)) as server:
        place, data = f"{server.url}/a.tar", (folder / "a.tar").read_bytes()
        cache = ChunkCache(CacheConfig(str(tmp_path), 3 * CHUNK), REMOTE)
        read_all(cache, place, data, [0, 1])
        (tmp_path / "ledger").write_bytes(b"")
        read_all(cache, place, data, [2, 3])
    assert bytes_on_disk(tmp_path) == ledger(tmp_path) <= 3 * CHUNK


def test_fetched_ahead(folder: Path, tmp_path: Path):
    with serving(folder_answers(folder)) as server:
        place, data = f"{server.url}/a.tar", (folder / "a.tar").read_bytes()
        cache = ChunkCache(CacheConfig(str(tmp_path), 1 << 30), REMOTE)
        ahead = FetchAhead(cache, threads=3, most_waiting=100)
        wanted = [chunk(place, i) for i in range(CHUNKS)]
        assert ahead.warm([chunk(f"{server.url}/none", 0), *wanted]) == CHUNKS + 1
        assert ahead.warm(wanted) == 0
        read_all(cache, place, data, list(range(CHUNKS)))
        assert sum(seen.path == "/a.tar" for seen in server.plan.seen) == CHUNKS
        before = threading.active_count()
        ahead.close()
        ahead.close()
        while threading.active_count() > before - 3:
            time.sleep(0.01)
        with pytest.raises(MissingError):  # left for the reader to meet
            cache.open(chunk(f"{server.url}/none", 0))


def test_what_waits_to_be_fetched_is_bounded(folder: Path, tmp_path: Path):
    with serving(folder_answers(folder), Plan(("stall before",), 1.0)) as server:
        cache = ChunkCache(CacheConfig(str(tmp_path), 1 << 30), RemoteConfig(1, 0.5))
        ahead = FetchAhead(cache, threads=1, most_waiting=3)
        assert 3 <= ahead.warm(chunk(f"{server.url}/a.tar", i) for i in range(CHUNKS)) <= 4
        ahead.close()
