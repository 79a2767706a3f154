"""`mmpt-data pack IMAGES CAPTIONS OUT`: images and their captions as tar shards with a manifest.

CAPTIONS is a table or, with --layout, the annotation files of a published data set as they are distributed
(docs/datasets.md).

With --validation-fraction, OUT/train and OUT/validation are disjoint by group: --split-group is a regular expression
whose first group, found in the image's name, says what the image is a variant of, and a hash of that decides the side.
"""

import argparse
import hashlib
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from data_tools.index import index
from data_tools.layouts import LAYOUTS, read_layout
from data_tools.pack_pair import PairPacker
from data_tools.pack_shards import SUCCESS, ShardWriter
from data_tools.pack_sources import ImageSource, Pair, open_images, read_pairs
from data_tools.pack_workers import pack_pairs
from data_tools.region_files import Choice, RegionFolder, add_choice

SHOWN_FAILURES = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("images", type=Path, help="folder or .tar of JPEG, PNG and WebP images")
    add("captions", type=Path, nargs="+", help="table of captions (.tsv, .csv, .jsonl or .parquet); annotation files")
    add("out", type=Path, help="folder to write; must not hold shards yet")
    add("--layout", choices=LAYOUTS, metavar="NAME", help=f"annotations of a published set: {', '.join(LAYOUTS)}")
    add("--split", action="append", metavar="NAME", help="with --layout: keep this split; may be repeated [all]")
    add("--missing-at-most", type=float, metavar="SHARE",
        help="an error when more than this share of the samples is left out [0 with --layout, else 1]")  # fmt: skip
    add("--image-column", default="image", metavar="NAME", help="column with the image's path in IMAGES [image]")
    add("--caption-column", action="append", metavar="NAME", help="column with captions; may be repeated [caption]")
    add("--caption-separator", metavar="TEXT", help="splits a cell into several captions")
    add("--samples-per-shard", type=int, default=10_000, metavar="N", help="rows per shard [10000]")
    add("--resize", type=int, metavar="PIXELS", help="shrink images whose shorter side is longer than this")
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes that decode [all cores]")
    add("--regions", type=Path, metavar="FOLDER",
        help="add regions from .npz files named after the images (features, norm_bb, conf, soft_labels)")  # fmt: skip
    add("--regions-column", default="", metavar="NAME", help="column with the .npz file's path in FOLDER [the image's]")
    add_choice(parser, "--regions-")
    add("--validation-fraction", type=float, default=0.0, metavar="F", help="share of groups put in OUT/validation [0]")
    add("--split-group", metavar="REGEX", help="first group: what an image is a variant of [the whole name]")


def run(args: argparse.Namespace) -> None:
    if min(args.samples_per_shard, args.workers, 1 if args.resize is None else args.resize) < 1:
        raise ValueError("--samples-per-shard, --resize and --workers must be at least 1")
    if not 0 <= args.validation_fraction < 1:
        raise ValueError(f"--validation-fraction in [0, 1) is wanted, got {args.validation_fraction}")
    allowed = (0.0 if args.layout else 1.0) if args.missing_at_most is None else args.missing_at_most
    if not 0 <= allowed <= 1:
        raise ValueError(f"--missing-at-most must be in [0, 1], got {allowed}")
    if args.out.exists() and any(args.out.rglob("*.tar")):
        raise ValueError(f"{args.out} already holds shards: remove it or name another folder")
    images = open_images(args.images)
    if args.regions is not None and not args.regions.is_dir():
        raise ValueError(f"--regions {args.regions} is not a folder")
    sides = _write(_pairs(args, images), images, args, allowed)
    for side in sides:
        manifest = index(str(args.out / side))
        print(f"{args.out / side}: {manifest.samples:,} samples in {len(manifest.shard_bytes):,} shards")


def _pairs(args: argparse.Namespace, images: ImageSource) -> Iterable[Pair]:
    if args.layout:
        return read_layout(args.layout, images, args.captions, tuple(args.split or ()))
    if len(args.captions) > 1:
        raise ValueError(f"one table of captions is wanted, got {len(args.captions)}: {args.captions[1]}")
    if args.split:
        raise ValueError("--split goes with --layout: a table names no splits")
    return read_pairs(args.captions[0], args.image_column, args.caption_column or ["caption"], args.caption_separator)


def _write(pairs: Iterable[Pair], images: ImageSource, args: argparse.Namespace, allowed: float) -> list[str]:
    """Pack each pair into the shards of its side. Returns the sides, sorted.

    Raises ValueError when a larger share than `allowed` was left out; the parquet files then say which and why.
    """
    side_of = _splitter(args.validation_fraction, args.split_group)
    writers: dict[str, ShardWriter] = {}
    total, left_out, shown = 0, 0, []
    try:
        for pair, packed in pack_pairs(pairs, PairPacker(images, args.resize, _regions(args)), args.workers):
            side = side_of(pair.image)
            if side not in writers:
                writers[side] = ShardWriter(args.out / side, args.samples_per_shard)
            writers[side].add(packed)
            total += 1
            if packed.status != SUCCESS:
                left_out += 1
                if len(shown) < SHOWN_FAILURES:
                    shown.append(f"{pair.image}: {packed.facts['error_message']}")
        for writer in writers.values():
            writer.close()
    finally:
        for writer in writers.values():
            writer.abandon()
    print(f"{total - left_out:,} pairs packed, {left_out:,} left out")
    print("".join(f"  {line}\n" for line in shown), end="")
    if left_out > allowed * total:
        raise ValueError(
            f"{left_out:,} of {total:,} samples were left out and --missing-at-most is {allowed:g}: the first is "
            f"{shown[0]}; the .parquet files in {args.out} list them all"
        )
    return sorted(writers)


def _regions(args: argparse.Namespace) -> RegionFolder | None:
    choice = Choice(args.regions_confidence, args.regions_least, args.regions_most)
    return RegionFolder(args.regions, choice, args.regions_column) if args.regions is not None else None


def _splitter(fraction: float, group: str | None) -> Callable[[str], str]:
    """A function from an image's name to the folder it belongs in: train, validation, or the one and only ''."""
    try:
        pattern = re.compile(group or "(.*)", re.DOTALL)
    except re.error as error:
        raise ValueError(f"--split-group {group!r} is not a regular expression ({error})") from error
    if pattern.groups < 1:
        raise ValueError(f"--split-group {group!r} has no group in parentheses")

    def side(name: str) -> str:
        if not fraction:
            return ""
        match = pattern.search(name)
        if match is None or match[1] is None:
            raise ValueError(f"--split-group {group!r} is not found in image name {name!r}")
        digest = hashlib.sha256(match[1].encode()).digest()
        return "validation" if int.from_bytes(digest[:8], "big") < fraction * 2**64 else "train"

    return side
