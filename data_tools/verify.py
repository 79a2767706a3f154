"""`mmpt-data verify SHARDS REPORT`: read every byte of every shard, decode every image, and report what is bad.

Regions are read where there are some. The report has one JSON line per shard, written as each is done: a verification
that was stopped goes on where it was.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from data_tools.region_files import read_file
from mmpt.data import storage
from mmpt.data.image import ImageConfig, evaluation_image
from mmpt.data.manifest import Manifest, load_manifest
from mmpt.data.reader import RawSample, Reader
from mmpt.data.regions import EXTENSION
from mmpt.data.scan import read_headers
from mmpt.data.tar import REINDEX, ShardError
from mmpt.data.text import captions_of

SHOWN = 10
THUMBNAIL_PIXELS = 32  # decoded images are shrunk to this: the pixels do not matter, that they can be had does


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", help="folder of shards with a manifest, or the manifest")
    parser.add_argument(
        "report", type=Path, help="file for the report, one JSON line per shard; continued if it exists"
    )
    parser.add_argument(
        "--caption-field", default="txt", help="as in training: txt, txt_whole, or a field of the .json"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes")
    parser.add_argument("--bad-keys", type=Path, metavar="FILE", help="also list the keys of bad samples, one per line")


def run(args: argparse.Namespace) -> None:
    """ValueError, after everything was read and written, when anything is bad."""
    manifest = load_manifest(args.shards)
    done = {line["shard"]: line for line in read_report(args.report)}
    left = [shard for shard, name in enumerate(manifest.names) if not _still_true(manifest, shard, done.get(name))]
    print(f"{len(manifest.names) - len(left)} of {len(manifest.names)} shards were verified before")
    with args.report.open("a") as file:
        if args.report.stat().st_size and not args.report.read_bytes().endswith(b"\n"):
            file.write("\n")  # a kill has left the last line unfinished
        for line in _verify(manifest, left, args.caption_field, args.workers):
            done[line["shard"]] = line
            file.write(json.dumps(line) + "\n")
            file.flush()
    _conclude(manifest, [done[name] for name in manifest.names], args)


def _verify(manifest: Manifest, shards: Sequence[int], caption_field: str, workers: int) -> Iterator[dict[str, Any]]:
    verify = partial(verify_shard, manifest, caption_field)
    if workers < 2 or len(shards) < 2:
        yield from map(verify, shards)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("forkserver")) as pool:
        yield from track(pool.map(verify, shards), "verifying", total=len(shards), transient=True)


def verify_shard(manifest: Manifest, caption_field: str, shard: int) -> dict[str, Any]:
    """Everything that can be known of one shard: its facts, what damage it has (or None), its bad samples."""
    place = manifest.place(shard)
    line: dict[str, Any] = {
        "shard": manifest.names[shard], "bytes": int(manifest.shard_bytes[shard]),
        "layout": manifest.shard_digests[shard].tobytes().hex(), "blake2b": "", "damage": None, "bad_samples": [],
    }  # fmt: skip
    try:
        line["blake2b"] = _digest_of_bytes(place, manifest.version(shard), line["bytes"])
        scan = read_headers(storage.ListedFile(manifest.names[shard], line["bytes"], manifest.version(shard)), place)
        if manifest.shard_digests[shard].any() and scan.digest.tobytes().hex() != line["layout"]:
            raise ShardError(place, 0, "its files are not those that were indexed", REINDEX)
        line["bad_samples"] = [bad for raw in _samples(manifest, shard) if (bad := _bad(raw, caption_field))]
    except (ShardError, OSError) as error:
        line["damage"] = str(error)
    return line


def _digest_of_bytes(place: str, version: str, size: int) -> str:
    digest, left = hashlib.blake2b(digest_size=32), size
    with storage.open_bytes(place, version) as file:
        while left:
            data = file.read(min(left, 1 << 22))
            if not data:
                raise ShardError(place, size - left, f"it ends here, and the index has {size} bytes", REINDEX)
            digest.update(data)
            left -= len(data)
    return digest.hexdigest()


def _samples(manifest: Manifest, shard: int) -> Iterator[RawSample]:
    reader = Reader(manifest)
    for chunk in range(int(manifest.first_chunks[shard]), int(manifest.first_chunks[shard + 1])):
        length = int(manifest.chunk_lengths[chunk])
        yield from reader.read(np.full(length, chunk), np.arange(length))


def _bad(raw: RawSample, caption_field: str) -> dict[str, Any] | None:
    """Why a sample cannot be used in training, if so."""
    try:
        if "cls" not in raw.files:
            captions_of(raw.files, caption_field)
        evaluation_image(raw.image(), THUMBNAIL_PIXELS, ImageConfig())
        if EXTENSION in raw.files:
            read_file(raw.files[EXTENSION])
    except ValueError as error:
        return {"key": raw.key, "offset": raw.offset, "reason": " ".join(str(error).split())}
    return None


def read_report(path: Path) -> list[dict[str, Any]]:
    """The lines of an earlier report; one that a kill cut short is left out, and with it whatever it was about."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def _still_true(manifest: Manifest, shard: int, line: dict[str, Any] | None) -> bool:
    return line is not None and (line["bytes"], line["layout"]) == (
        int(manifest.shard_bytes[shard]), manifest.shard_digests[shard].tobytes().hex(),
    )  # fmt: skip


def _conclude(manifest: Manifest, lines: list[dict[str, Any]], args: argparse.Namespace) -> None:
    damaged = [line for line in lines if line["damage"]]
    bad = [(line["shard"], sample) for line in lines for sample in line["bad_samples"]]
    for line in damaged[:SHOWN]:
        print(line["damage"])
    for shard, sample in bad[:SHOWN]:
        print(f"{shard} at byte {sample['offset']}: sample {sample['key']!r}: {sample['reason']}")
    if args.bad_keys is not None:
        args.bad_keys.write_text("".join(f"{sample['key']}\n" for _, sample in bad))
    size = sum(line["bytes"] for line in lines)
    print(f"{len(lines):,} shards, {manifest.samples:,} samples, {size:,} bytes: {args.report}")
    if damaged or bad:
        raise ValueError(f"{len(damaged)} damaged shards and {len(bad)} bad samples of {manifest.samples}")
