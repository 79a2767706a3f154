"""The three kinds of shards that the loader benchmark reads, made from a folder or a tar of photographs."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

SHARDS, SAMPLES, SHORTER_SIDE, LARGE_SIZE, LARGE_COUNT = 4, 1024, 256, (1824, 1368), 64
SUFFIXES = (".jpg", ".jpeg")
LARGE = "2.5 megapixels"


def read_photographs(place: Path) -> list[tuple[str, bytes]]:
    """(name, JPEG file) of every photograph in a folder or a tar, by name. Raises FileNotFoundError."""
    if place.is_dir():
        return sorted((path.stem, path.read_bytes()) for path in place.rglob("*") if path.suffix.lower() in SUFFIXES)
    with tarfile.open(place) as tar:
        members = [member for member in tar if Path(member.name).suffix.lower() in SUFFIXES]
        return sorted((Path(member.name).stem, tar.extractfile(member).read()) for member in members)


def write_all(photographs: list[tuple[str, bytes]], folder: Path) -> dict[str, Path]:
    """Shards of each kind, by the name of the kind."""
    kinds = {"original size": photographs, "256 pixels": shrunk(photographs), LARGE: large(photographs)}
    places = {}
    for kind, pairs in kinds.items():
        places[kind] = folder / kind.replace(" ", "_")
        write_shards(list(pairs), places[kind])
    return places


def shrunk(photographs: list[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
    """Shorter side 256 where it was longer, as img2dataset's `keep_ratio` stores them, quality 95."""
    for name, data in photographs:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        scale = SHORTER_SIDE / min(image.size)
        if scale < 1:
            size = (round(image.width * scale), round(image.height * scale))
            image = image.resize(size, Image.Resampling.BICUBIC)
        yield name, _jpeg(image, 95)


def large(photographs: list[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
    """Mosaics of four photographs, each enlarged to a quarter of 1824 x 1368, quality 90.

    One photograph enlarged alone would be too smooth and so too quick to decode; four make about 0.6 MB, which is what
    a camera of 2.5 megapixels writes.
    """
    width, height = LARGE_SIZE[0] // 2, LARGE_SIZE[1] // 2
    for i in range(min(LARGE_COUNT, len(photographs) // 4)):
        mosaic = Image.new("RGB", LARGE_SIZE)
        for j, (_, data) in enumerate(photographs[4 * i : 4 * i + 4]):
            tile = Image.open(io.BytesIO(data)).convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
            mosaic.paste(tile, (j % 2 * width, j // 2 * height))
        yield photographs[4 * i][0], _jpeg(mosaic, 90)


def caption_of(name: str) -> str:
    subject = " ".join(name.split("_")[1:]) or name
    return f"a photograph of a {subject}, taken outdoors on a clear day with other things in the background"


def write_shards(pairs: list[tuple[str, bytes]], folder: Path) -> None:
    """SAMPLES pairs, again and again the same: webdataset throws away the samples that do not fill a last batch."""
    folder.mkdir(parents=True)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(shard, SAMPLES, SHARDS):
                name, data = pairs[i % len(pairs)]
                for extension, content in (("jpg", data), ("txt", caption_of(name).encode())):
                    member = tarfile.TarInfo(f"{i:06d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def _jpeg(image: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()
