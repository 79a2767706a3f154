"""`mmpt-data index FOLDER`: scan the shards of a folder and write its manifest."""

import argparse
import time
from pathlib import Path

from mmpt.data import storage
from mmpt.data.manifest import FILE_NAME, Manifest, build_manifest, save_manifest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="folder of .tar shards; the manifest is written beside them")
    parser.add_argument(
        "--chunk-samples", type=int, default=0, metavar="N",
        help="neighbours that stay together in the shuffled order; 0: from 1 to 256, by the number of samples",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    begin = time.perf_counter()
    manifest = index(args.folder, args.chunk_samples)
    print(
        f"{Path(args.folder) / FILE_NAME}: {manifest.samples:,} samples in {len(manifest.shards):,} shards, "
        f"{manifest.shard_bytes.sum():,} bytes, {time.perf_counter() - begin:.1f} s, "
        f"content {manifest.content_hash[:16]}"
    )


def index(folder: str, chunk_samples: int = 0) -> Manifest:
    """Build and save the manifest of all .tar files directly in a local folder.

    Raises ValueError for a folder without shards or samples and ShardError for a damaged shard.
    """
    if chunk_samples < 0:
        raise ValueError(f"--chunk-samples must be 0 or more, got {chunk_samples}")
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is not a folder")
    names = storage.list_names(folder, ".tar")
    if not names:
        raise ValueError(f"{folder} has no .tar shards")
    manifest = build_manifest(folder, names, chunk_samples)
    save_manifest(manifest, Path(folder) / FILE_NAME)
    return manifest
