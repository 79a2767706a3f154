"""`mmpt-data pack IMAGES CAPTIONS OUT`: images and a table of captions as tar shards with a manifest.

With --validation-fraction, OUT/train and OUT/validation are disjoint by group: --split-group is a regular expression
whose first group, found in the image's name, says what the image is a variant of, and a hash of that decides the side.
"""

import argparse
import hashlib
import io
import re
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from data_tools.index import index
from data_tools.pack_shards import MISSING, NO_CAPTION, SUCCESS, UNDECODABLE, Packed, ShardWriter
from data_tools.pack_sources import ImageSource, Pair, open_images, read_pairs
from mmpt.data.image import ImageConfig, ImageError, decode

JPEG_QUALITY = 95
EXTENSION_OF_MAGIC = ((b"\xff\xd8", "jpg"), (b"\x89PNG", "png"), (b"RIFF", "webp"))
SHOWN_FAILURES = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("images", type=Path, help="folder or .tar of JPEG, PNG and WebP images")
    add("captions", type=Path, help="table of captions: .tsv, .csv, .jsonl or .parquet")
    add("out", type=Path, help="folder to write; must not hold shards yet")
    add("--image-column", default="image", metavar="NAME", help="column with the image's path in IMAGES [image]")
    add("--caption-column", action="append", metavar="NAME", help="column with captions; may be repeated [caption]")
    add("--caption-separator", metavar="TEXT", help="splits a cell into several captions")
    add("--samples-per-shard", type=int, default=10_000, metavar="N", help="rows per shard [10000]")
    add("--resize", type=int, metavar="PIXELS", help="shrink images whose shorter side is longer than this")
    add("--validation-fraction", type=float, default=0.0, metavar="F", help="share of groups put in OUT/validation [0]")
    add("--split-group", metavar="REGEX", help="first group: what an image is a variant of [the whole name]")


def run(args: argparse.Namespace) -> None:
    if args.samples_per_shard < 1 or not 0 <= args.validation_fraction < 1 or (args.resize or 1) < 1:
        raise ValueError("--samples-per-shard and --resize must be at least 1, --validation-fraction in [0, 1)")
    if args.out.exists() and any(args.out.rglob("*.tar")):
        raise ValueError(f"{args.out} already holds shards: remove it or name another folder")
    images = open_images(args.images)
    pairs = read_pairs(args.captions, args.image_column, args.caption_column or ["caption"], args.caption_separator)
    side_of = _splitter(args.validation_fraction, args.split_group)
    sides = {
        side: ShardWriter(args.out / side, args.samples_per_shard) for side in sorted({side_of(p.image) for p in pairs})
    }
    failures = []
    for pair in pairs:
        packed = pack_pair(pair, images, args.resize)
        sides[side_of(pair.image)].add(packed)
        if packed.status != SUCCESS:
            failures.append(f"{pair.image}: {packed.facts['error_message']}")
    for writer in sides.values():
        writer.close()
    print(f"{len(pairs) - len(failures):,} pairs packed, {len(failures):,} left out")
    print("".join(f"  {line}\n" for line in failures[:SHOWN_FAILURES]), end="")
    for side in sides:
        manifest = index(str(args.out / side))
        print(f"{args.out / side}: {manifest.samples:,} samples in {len(manifest.shards):,} shards")


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


def pack_pair(pair: Pair, images: ImageSource, resize: int | None) -> Packed:
    """Read and decode the image, so that no pair that training would stumble over gets into a shard."""
    facts = {
        "error_message": "", "width": 0, "height": 0, "original_width": 0, "original_height": 0, "sha256": "",
        "source": pair.image, "captions": list(pair.captions),
    }  # fmt: skip
    reserved = {*facts, "key", "caption", "status"}
    facts |= {(f"source_{name}" if name in reserved else name): value for name, value in pair.row.items()}

    def failed(status: str, reason: str) -> Packed:
        return Packed(status, b"", "", pair.captions, facts | {"error_message": reason})

    if not pair.captions:
        return failed(NO_CAPTION, "it has no caption")
    data = images.read(pair.image)
    if data is None:
        return failed(MISSING, "there is no such image")
    try:
        decoded = decode(data, ImageConfig.background, ImageConfig.max_pixels)
    except ImageError as error:
        return failed(UNDECODABLE, str(error))
    extension = next(extension for magic, extension in EXTENSION_OF_MAGIC if data.startswith(magic))
    facts |= {"original_width": decoded.width, "original_height": decoded.height}
    facts |= {"sha256": hashlib.sha256(data).hexdigest()}  # of the original, so that it can be found again
    if resize and min(decoded.size) > resize:
        decoded, data, extension = _shrink(decoded, resize, extension)
    facts |= {"width": decoded.width, "height": decoded.height}
    return Packed(SUCCESS, data, extension, pair.captions, facts)


def _shrink(image: Image.Image, shorter_side: int, extension: str) -> tuple[Image.Image, bytes, str]:
    """The upright, opaque image with this shorter side; JPEG stays JPEG, the lossless formats become PNG."""
    scale = shorter_side / min(image.size)
    width, height = (max(shorter_side, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    if extension == "jpg":
        image.save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    else:
        image.save(file, "PNG")
    return image, file.getvalue(), "jpg" if extension == "jpg" else "png"
