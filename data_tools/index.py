"""`mmpt-data index SHARDS`: scan shards and write their manifest."""

import argparse
import os
import time
from collections.abc import Iterable
from pathlib import Path

from rich.progress import track

from data_tools.filters import key_filter
from mmpt.data import storage
from mmpt.data.manifest import FILE_NAME, Manifest, save_manifest
from mmpt.data.scan import KeyFilter, Scan, Source, build_manifest
from mmpt.data.storage import ListedFile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "shards",
        help="folder or URL (http, s3, gs, ...) of .tar shards, or their places with {00000..00099} and :: between",
    )
    parser.add_argument(
        "--out", type=Path, help=f"file to write, or folder to write {FILE_NAME} to [beside the shards, where local]"
    )
    parser.add_argument(
        "--chunk-samples", type=int, default=0, metavar="N",
        help="neighbours that stay together in the shuffled order; 0: from 1 to 256, by the number of samples",
    )  # fmt: skip
    parser.add_argument(
        "--from", dest="source", choices=("headers", "offsets", "counts"), default="headers",
        help="read every header; or believe the .tar.idx beside each shard; or believe the counts of _stats.json or "
        "sizes.json, which makes each shard one chunk [headers]",
    )  # fmt: skip
    parser.add_argument(
        "--where", action="append", default=[], metavar="CONDITION",
        help="keep samples whose row of the parquet file beside the shard fulfils it, such as 'similarity > 0.3'; "
        "may be given again, all must hold",
    )  # fmt: skip
    parser.add_argument(
        "--exclude", action="append", default=[], type=Path, metavar="FILE",
        help="leave out the keys in this list (one per line) or parquet file (column key); may be given again",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes that scan")


def run(args: argparse.Namespace) -> None:
    begin = time.perf_counter()
    if args.chunk_samples < 0 or args.workers < 0:
        raise ValueError(f"--chunk-samples {args.chunk_samples} and --workers {args.workers} must be 0 or more")
    keep = key_filter(args.where, args.exclude)
    manifest = index(args.shards, args.chunk_samples, args.source, keep, args.workers, args.out, show_progress=True)
    stored = int(manifest.shard_samples.sum())
    left_out = f" ({stored - manifest.samples:,} of {stored:,} left out)" if stored > manifest.samples else ""
    path = manifest_path(manifest.folder, args.out)
    print(
        f"{path}: {manifest.samples:,} samples{left_out} in {len(manifest.names):,} shards, "
        f"{manifest.shard_bytes.sum():,} bytes, {time.perf_counter() - begin:.1f} s, "
        f"content {manifest.content_hash[:16]}"
    )


def index(
    shards: str, chunk_samples: int = 0, source: Source = "headers", keep: KeyFilter | None = None, workers: int = 0,
    out: Path | None = None, show_progress: bool = False,
) -> Manifest:  # fmt: skip
    """Build and save the manifest of these shards; see `build_manifest`.

    Raises ValueError for no shards or no samples, ShardError for a damaged shard.
    """
    folder, files = find_shards(shards)
    path = manifest_path(folder, out)
    show = _progress if show_progress and len(files) > 1 else None
    manifest = build_manifest(folder, files, chunk_samples, source, keep, workers, show)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_manifest(manifest, path)
    return manifest


def find_shards(shards: str) -> tuple[str, list[ListedFile]]:
    """(the folder that all shards are in, the shards): a folder is listed, a pattern is written out.

    Raises ValueError when there are none, or when they have no folder in common.
    """
    if storage.is_pattern(shards):
        places = storage.expand(shards)
        folder = common_folder(places)
        names = [place[len(folder) :].lstrip("/") for place in places]
        return folder, [ListedFile(name, *facts) for name, facts in zip(names, storage.stat_all(places), strict=True)]
    if not storage.is_folder(shards):
        raise ValueError(f"{shards} is not a folder")
    files = storage.list_files(shards, ".tar")
    if not files:
        raise ValueError(f"{shards} has no .tar shards")
    return shards.rstrip("/") or "/", files


def common_folder(places: list[str]) -> str:
    """The longest folder that all places are in."""
    parents = {storage.parent(place) for place in places}
    folder = min(parents, key=len)
    while any(parent != folder and not parent.startswith(f"{folder}/") for parent in parents):
        folder = folder.rpartition("/")[0]
    if not folder.rpartition("://")[2].strip("/") and "://" in places[0]:
        raise ValueError(f"{places[0]} and the others are not in one folder: index them apart and train on A::B")
    return folder


def manifest_path(folder: str, out: Path | None) -> Path:
    if out is None:
        if not storage.is_local(folder):
            raise ValueError(f"{folder} is remote: say where to write the manifest with --out")
        return Path(folder) / FILE_NAME
    return out if out.suffix == Path(FILE_NAME).suffix else out / FILE_NAME


def _progress(scans: Iterable[Scan], total: int) -> Iterable[Scan]:
    return track(scans, "reading headers", total=total, transient=True)
