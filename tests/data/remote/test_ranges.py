"""Ranges over HTTP from a server that misbehaves: transient faults change nothing, permanent ones are one line."""

import os
import pickle
import random
import threading
import time
from email.utils import formatdate
from pathlib import Path

import pytest

from mmpt.data import storage
from mmpt.data.remote.ranges import (
    ChangedError,
    FileFacts,
    ForbiddenError,
    GaveUpError,
    MissingError,
    NoRangeError,
    RemoteConfig,
    RemoteError,
    read_range,
)
from mmpt.data.remote.web import WebFile
from tests.data.remote.fault_server import PERMANENT, TRANSIENT, Answer, Plan, folder_answers, serving

SIZE = 200_000
QUICK = RemoteConfig(deadline_seconds=30, timeout_seconds=0.3, slowest_bytes_per_second=4096)
SHORT = RemoteConfig(deadline_seconds=1.5, timeout_seconds=0.3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("web")
    (path / "a.tar").write_bytes(random.Random(0).randbytes(SIZE))
    (path / "empty.tar").write_bytes(b"")
    return path


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def fetch(
    place: str, start: int, stop: int, version: str = "", config: RemoteConfig = QUICK, size: int = SIZE
) -> bytes:
    return b"".join(read_range(WebFile(place, config), start, stop, FileFacts(size, version), config))


@pytest.mark.parametrize("fault", TRANSIENT)
def test_each_transient_fault_leaves_the_bytes_as_they_are(folder: Path, fault: str):
    data = (folder / "a.tar").read_bytes()
    draw = random.Random(fault)
    with serving(folder_answers(folder), Plan((fault,), 0.5, seed=1, most=4)) as server:
        version = storage.stat(f"{server.url}/a.tar", QUICK).version
        for _ in range(8):
            start, stop = sorted(draw.sample(range(SIZE + 1), 2))
            assert fetch(f"{server.url}/a.tar", start, stop, version) == data[start:stop]
        assert server.plan.given >= 2


@pytest.mark.parametrize("seed", range(4))
def test_any_mixture_of_transient_faults_leaves_the_bytes_as_they_are(folder: Path, seed: int):
    data = (folder / "a.tar").read_bytes()
    quick = tuple(fault for fault in TRANSIENT if "drip" not in fault)
    with serving(folder_answers(folder), Plan(quick, 0.3, seed=seed)) as server:
        place = f"{server.url}/a.tar"
        with storage.open_bytes(place, storage.stat(place, QUICK).version, QUICK) as file:
            assert file.read(-1) == data
            draw = random.Random(seed)
            for _ in range(20):
                at = draw.randrange(SIZE)
                file.seek(at)
                assert file.read(700) == data[at : at + 700]
        for _ in range(20):
            start, stop = sorted(draw.sample(range(SIZE + 1), 2))
            assert fetch(place, start, stop) == data[start:stop]
        assert server.plan.given >= 3


def test_after_a_short_body_it_goes_on_where_it_stopped(folder: Path):
    with serving(folder_answers(folder), Plan(("cut at a block",), 1.0, seed=3, most=5)) as server:
        assert fetch(f"{server.url}/a.tar", 0, SIZE) == (folder / "a.tar").read_bytes()
        starts = [int(seen.headers["Range"].removeprefix("bytes=").split("-")[0]) for seen in server.plan.seen]
    assert len(starts) == 6 and starts == sorted(starts) and starts[-1] > starts[0] == 0
    assert all(start % 512 == 0 for start in starts)


EXPECTED = {
    "whole": (NoRangeError, "whole file"), "other etag": (ChangedError, "was changed"),
    "other size": (ChangedError, f"{SIZE}7 bytes where the index has {SIZE}"), "other range": (NoRangeError, "1-2"),
    "compressed": (NoRangeError, "compresses"), "404": (MissingError, "404"), "403": (ForbiddenError, "403"),
}  # fmt: skip


@pytest.mark.parametrize("fault", PERMANENT)
def test_a_permanent_fault_is_one_typed_line_and_not_tried_again(folder: Path, fault: str):
    kind, message = EXPECTED[fault]
    with serving(folder_answers(folder), Plan((fault,), 1.0)) as server:
        place = f"{server.url}/a.tar"
        good = folder_answers(folder)("GET", "/a.tar", {}, b"").headers["ETag"]
        with pytest.raises(kind, match=message) as caught:
            fetch(place, 1000, 2000, good)
        assert len(server.plan.seen) == 1
        error = caught.value
        assert error.place == place and error.offset == 1000 and "\n" not in str(error)
        copy = pickle.loads(pickle.dumps(error))  # noqa: S301  our own bytes
        assert type(copy) is kind and str(copy) == str(error)


def test_errors_belong_to_the_families_that_callers_know():
    assert issubclass(MissingError, FileNotFoundError) and issubclass(ForbiddenError, PermissionError)
    assert issubclass(GaveUpError, TimeoutError) and issubclass(RemoteError, OSError)


def test_if_range_carries_what_may_stand_there(folder: Path):
    for versions, sent in (("etag", True), ("date", True), ("weak", False), ("none", False)):
        with serving(folder_answers(folder, versions)) as server:
            place = f"{server.url}/a.tar"
            version = storage.stat(place).version
            assert fetch(place, 5, 50, version) == (folder / "a.tar").read_bytes()[5:50]
            assert server.plan.seen[-1].headers.get("If-Range", "") == (version if sent else "")
            if versions != "none":
                other = formatdate(1, usegmt=True) if versions == "date" else version.replace('"', '"0', 1)
                with pytest.raises(ChangedError, match="was changed"):
                    fetch(place, 5, 50, other)


def test_a_file_that_became_shorter(folder: Path):
    with serving(folder_answers(folder)) as server:
        for start in (SIZE - 10, SIZE, SIZE + 512):
            with pytest.raises(ChangedError, match=f"{SIZE} bytes where the index has {SIZE + 1024}"):
                fetch(f"{server.url}/a.tar", start, SIZE + 1024, size=SIZE + 1024)


@pytest.mark.parametrize("fault", ["503", "refuse", "stall", "stall before", "cut", "drip", "drip before"])
def test_a_fault_that_does_not_end_stops_at_the_deadline(folder: Path, fault: str):
    with serving(folder_answers(folder), Plan((fault,), 1.0)) as server:
        begin = time.monotonic()
        with pytest.raises(GaveUpError, match=r"gave up after \d+ tr(y|ies) in \d+\.\d s: ") as caught:
            config = RemoteConfig(1.5, 0.3, slowest_bytes_per_second=10**6)
            while True:  # cut bodies do advance
                fetch(f"{server.url}/a.tar", 0, SIZE, config=config)
        assert "\n" not in str(caught.value)
        assert time.monotonic() - begin < 60  # not a hang; the deadline itself is 1.5 s a range


def test_nobody_listens():
    with serving(folder_answers(Path("."))) as server:
        place = f"{server.url}/a.tar"
    with pytest.raises(GaveUpError, match="the connection failed"):
        fetch(place, 0, 10, config=SHORT)


def test_retry_after_is_honoured(folder: Path):
    for as_date in (False, True):
        header = formatdate(time.time() + 3, usegmt=True) if as_date else "1"
        with serving(folder_answers(folder), Plan(("429",), 1.0, most=1, retry_after=header)) as server:
            fetch(f"{server.url}/a.tar", 0, 10)
            first, second = (seen.time for seen in server.plan.seen)
            assert second - first >= 0.9
    with serving(folder_answers(folder), Plan(("503",), 1.0, most=1, retry_after="3600")) as server:
        begin = time.monotonic()
        with pytest.raises(GaveUpError, match="answers 503"):
            fetch(f"{server.url}/a.tar", 0, 10)
        assert time.monotonic() - begin < QUICK.deadline_seconds  # waiting would have been in vain


def test_connections_are_kept_and_redirects_followed(folder: Path):
    inner = folder_answers(folder)
    ports = set()

    def answers(method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        if path.startswith("/old/"):
            return Answer(302, {"Location": path.removeprefix("/old")}, b"")
        return inner(method, path, headers, body)

    with serving(answers) as server:
        accept = server.get_request

        def counted():
            connection, address = accept()
            ports.add(address)
            return connection, address

        server.get_request = counted  # type: ignore[method-assign]
        for _ in range(20):
            assert fetch(f"{server.url}/old/a.tar", 0, 3000) == (folder / "a.tar").read_bytes()[:3000]
        assert len(ports) == 1


def test_places_of_every_kind(folder: Path, tmp_path: Path):
    with serving(folder_answers(folder)) as server:
        assert storage.exists(f"{server.url}/a.tar") and not storage.exists(f"{server.url}/b.tar")
        assert storage.stat(f"{server.url}/empty.tar").size == 0
        with storage.open_bytes(f"{server.url}/empty.tar") as file:
            assert file.read(-1) == b""
        facts = storage.stat_all([f"{server.url}/a.tar", f"{server.url}/empty.tar"] * 20)
        assert [fact.size for fact in facts] == [SIZE, 0] * 20
        with pytest.raises(ValueError, match=r"cannot be listed over HTTP.*00000\.\.00099"):
            storage.list_files(server.url, ".tar")
        with pytest.raises(ChangedError, match="was changed"), storage.open_bytes(f"{server.url}/a.tar", '"x"') as file:
            file.read(10)
    assert storage.stat(str(folder / "a.tar")) == (SIZE, "")
    assert storage.list_files(str(folder), ".tar") == [("a.tar", SIZE, ""), ("empty.tar", 0, "")]
    assert storage.is_folder("http://host/shards") and not storage.is_folder("http://host/shards/manifest.safetensors")


def test_patterns():
    assert storage.expand("http://h/{00..02}.tar::b{1,2}/{x,y{3..4}}") == [
        "http://h/00.tar", "http://h/01.tar", "http://h/02.tar",
        "b1/x", "b1/y3", "b1/y4", "b2/x", "b2/y3", "b2/y4",
    ]  # fmt: skip
    for wrong, message in (("a{1..2", "do not match"), ("a::", "nothing on one side")):
        with pytest.raises(ValueError, match=message):
            storage.expand(wrong)


@pytest.mark.parametrize("place", ["pipe:cat /etc/passwd", " pipe:true", "| true", "true |", "pipe:a::b"])
def test_no_shell_is_started(place: str, tmp_path: Path):
    for use in (storage.open_bytes, storage.exists, storage.is_folder, storage.stat, storage.expand):
        with pytest.raises(ValueError, match="a command for a shell"):
            use(place)


def test_an_unknown_scheme_is_one_line():
    with pytest.raises(ValueError, match="nonsense://a cannot be read"):
        storage.open_bytes("nonsense://a")


def test_a_configuration_that_cannot_be():
    with pytest.raises(ValueError, match="timeout_seconds"):
        RemoteConfig(deadline_seconds=1, timeout_seconds=2)
    with pytest.raises(ValueError, match="connections"):
        RemoteConfig(connections=0)


def test_nothing_is_left_running(folder: Path):
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with serving(folder_answers(folder), Plan(("stall", "drip", "reset"), 0.5, seed=2, most=3)) as server:
        fetch(f"{server.url}/a.tar", 0, SIZE)
    assert threading.active_count() <= before[0] + 1  # a timer that was cancelled may still be on its way out
