"""Shards written by img2dataset are read as they are: an imitation of its layout always, and the program itself when
MMPT_IMG2DATASET_PYTHON names an interpreter that has it (`python -m venv V; V/bin/pip install img2dataset`)."""

import contextlib
import http.server
import io
import json
import os
import subprocess
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from data_tools.__main__ import main
from mmpt.data.manifest import FILE_NAME, load_manifest
from mmpt.inputs import InputSpec
from tests.data.shards import caption, picture
from tests.data_tools.delivery import index_and_load
from tests.data_tools.readback import read_back, samples
from tests.shared_data import FOLDER

PYTHON = "MMPT_IMG2DATASET_PYTHON"
NOT_FOUND = "HTTP Error 404: Not Found"
DOWNLOAD = "import json, sys, img2dataset\nif __name__ == '__main__': img2dataset.download(**json.loads(sys.argv[1]))"


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    """As webdataset 0.2, on which img2dataset builds: pax headers for fractions of seconds, read-only members."""
    with tarfile.open(path, "w") as tar:
        for i, (name, data) in enumerate(members):
            member = tarfile.TarInfo(name)
            member.size, member.mode, member.mtime = len(data), 0o444, 1795456787.4365807 + i
            member.uname = member.gname = "bigdata"
            tar.addfile(member, io.BytesIO(data))


def write_shard(folder: Path, shard: int, statuses: list[str]) -> list[str]:
    """00001.tar, .parquet and _stats.json with a row for each status; samples in the order in which downloads end."""
    rows, members = [], []
    for i, status in enumerate(statuses):
        key = f"{shard:05d}{i:04d}"
        good = status == "success"
        row = {
            "caption": caption(i), "url": f"http://example.org/{key}", "key": key, "status": status,
            "error_message": None if good else NOT_FOUND, "width": 24 if good else None,
            "height": 24 if good else None, "original_width": 24 if good else None,
            "original_height": 24 if good else None, "exif": "{}" if good else None, "sha256": "0" * 64,
        }  # fmt: skip
        rows.append(row)
        if good:
            files = [("jpg", picture(i)), ("json", json.dumps(row, indent=4).encode()), ("txt", caption(i).encode())]
            members.append([(f"{key}.{extension}", data) for extension, data in files])
    members = members[1::2] + members[::2]
    write_tar(folder / f"{shard:05d}.tar", [member for sample in members for member in sample])
    parquet.write_table(pa.Table.from_pylist(rows), folder / f"{shard:05d}.parquet")
    counts = Counter(NOT_FOUND if status == "failed_to_download" else status for status in statuses)
    stats = {
        "count": len(rows), "successes": statuses.count("success"),
        "failed_to_download": statuses.count("failed_to_download"),
        "failed_to_resize": statuses.count("failed_to_resize"), "duration": 0.5385208129882812,
        "start_time": 1795456787.222378, "end_time": 1795456787.7608988, "status_dict": dict(counts),
    }  # fmt: skip
    (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats, indent=4))
    return [row["key"] for row in rows if row["status"] == "success"]


GOOD, GONE, BROKEN = "success", "failed_to_download", "failed_to_resize"


def test_its_layout_is_read_as_it_is(tmp_path: Path, tokenizer: str, inputs: InputSpec):
    keys = write_shard(tmp_path, 0, [GOOD, GONE, GOOD, BROKEN, GOOD, GOOD])
    keys += write_shard(tmp_path, 1, [GONE, GONE])  # a shard without a sample
    keys += write_shard(tmp_path, 2, [GOOD] * 5 + [GONE])
    delivered = index_and_load(tmp_path, tokenizer, inputs)
    assert len(keys) == 9 and sorted(delivered) == sorted(keys)
    assert [sample["__key__"] for sample in samples(tmp_path)][:4] == [
        "000000002", "000000005", "000000000", "000000004",
    ]  # fmt: skip
    found = read_back(tmp_path)
    assert [sample["json"]["caption"] for sample in found] == [sample["txt"].decode() for sample in found]
    assert load_manifest(str(tmp_path)).shard_samples.tolist() == [4, 0, 5]


def test_its_counts_and_columns_are_used(tmp_path: Path):
    write_shard(tmp_path, 0, [GOOD, GONE, GOOD])
    write_shard(tmp_path, 1, [BROKEN])
    main(["index", str(tmp_path), "--from", "counts"])
    assert load_manifest(str(tmp_path)).shard_samples.tolist() == [2, 0]
    main(["index", str(tmp_path), "--where", "url != http://example.org/000000002"])
    assert load_manifest(str(tmp_path)).samples == 1
    main(["index", str(tmp_path), "--where", "width >= 24"])
    assert load_manifest(str(tmp_path)).samples == 2


def test_a_shard_whose_download_was_killed_is_refused(tmp_path: Path):
    write_shard(tmp_path, 0, [GOOD] * 4)
    write_shard(tmp_path, 1, [GOOD] * 4)
    shard = tmp_path / "00001.tar"
    shard.write_bytes(shard.read_bytes()[: 3 * 4096])
    (tmp_path / "00001_stats.json").unlink()
    with pytest.raises(SystemExit) as caught:
        main(["index", str(tmp_path)])
    assert "00001.tar at byte" in str(caught.value.code)


@contextlib.contextmanager
def image_server(files: dict[str, bytes]) -> Iterator[str]:
    """The address of a server on loopback; what is not among the files is 404."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = files.get(self.path)
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, format: str, *args: object):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def real_images(archive: Path, count: int) -> dict[str, bytes]:
    """The first images of one of the real inputs; nothing where it is not there."""
    if not archive.exists():
        return {}
    with tarfile.open(archive) as tar:
        members = [member for member in tar if member.isfile()][:count]
        return {
            f"/{archive.stem}/{i}.{member.name.rpartition('.')[2]}": tar.extractfile(member).read()  # type: ignore[union-attr]
            for i, member in enumerate(members)
        }


OPTIONS = {
    "as downloaded": {"resize_mode": "no", "skip_reencode": True},
    "kept ratio": {"resize_mode": "keep_ratio", "resize_only_if_bigger": True, "image_size": 256},
    "webp squares": {"resize_mode": "border", "image_size": 64, "encode_format": "webp", "encode_quality": 80},
}


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_program_itself(tmp_path: Path, tokenizer: str, inputs: InputSpec, options: dict):
    if not os.environ.get(PYTHON):
        pytest.skip(f"needs {PYTHON}: an interpreter with img2dataset")
    files = {f"/made/{i}.{kind}": picture(i, kind) for i in range(12) for kind in ("jpg", "png", "webp")}
    files |= real_images(FOLDER / "photos/imagenet-samples-400.tar", 30)
    files |= real_images(FOLDER / "emoji/noto-emoji-128px.tar", 30)
    with image_server(files | {"/broken/0": b"<html>", "/broken/1": files["/made/0.jpg"][:200]}) as address:
        paths = list(files)
        paths[3:3] = ["/gone/0", "/broken/0", "/gone/1"]
        paths += ["/broken/1", "/gone/2"]
        wanted = {f"{address}{path}": f"a caption of {path}, with a comma" for path in paths}
        (tmp_path / "list.tsv").write_text("url\tcaption\n" + "".join(f"{u}\t{c}\n" for u, c in wanted.items()))
        arguments = {
            "url_list": str(tmp_path / "list.tsv"), "input_format": "tsv", "url_col": "url", "caption_col": "caption",
            "output_format": "webdataset", "output_folder": str(tmp_path / "out"), "processes_count": 1,
            "thread_count": 4, "number_sample_per_shard": 20, "enable_wandb": False, "timeout": 20, **options,
        }  # fmt: skip
        done = subprocess.run(
            [os.environ[PYTHON], "-c", DOWNLOAD, json.dumps(arguments)],
            env=os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1"},  # or it would ask the package index for its version
            capture_output=True, text=True, check=False, cwd=tmp_path,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr

    out = tmp_path / "out"
    shards = sorted(out.glob("*.tar"))
    assert [path.name for path in shards] == [f"{i:05d}.tar" for i in range(-(-len(paths) // 20))]
    rows = [row for shard in shards for row in parquet.read_table(shard.with_suffix(".parquet")).to_pylist()]
    assert {row["url"]: row["caption"] for row in rows} == wanted  # the failed ones too
    good = {row["key"]: row for row in rows if row["status"] == "success"}
    assert {row["url"].removeprefix(address) for row in good.values()} == set(files)
    stats = [json.loads((out / f"{shard.stem}_stats.json").read_text()) for shard in shards]
    assert [sum(s[name] for s in stats) for name in ("count", "successes")] == [len(paths), len(files)]

    delivered = index_and_load(out, tokenizer, inputs)
    assert len(delivered) == len(files) and set(delivered) == good.keys()
    manifest = load_manifest(str(out))
    assert manifest.shard_samples.tolist() == [s["successes"] for s in stats]
    main(["index", str(out), "--from", "counts", "--out", str(tmp_path / "counted")])
    counted = load_manifest(str(tmp_path / "counted" / FILE_NAME), check_shards=False)
    assert counted.shard_samples.tolist() == manifest.shard_samples.tolist()
    for sample in read_back(out):
        row = good[sample["json"]["key"]]
        assert sample["txt"].decode() == row["caption"] == wanted[sample["json"]["url"]]
        (image,) = sample.keys() - {"txt", "json"}
        served = files[row["url"].removeprefix(address)]
        if options.get("skip_reencode") and served.startswith(b"\xff\xd8"):  # other formats it encodes all the same
            assert sample[image] == served
        assert image == options.get("encode_format", "jpg")
