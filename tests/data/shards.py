"""Small data sets for the tests of the data layer."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image
from webdataset.writer import TarWriter

COLOURS = ("red", "green", "blue", "yellow", "black", "white", "orange", "violet")
ANIMALS = ("cat", "dog", "heron", "killer whale", "ant", "bee", "elephant")


def picture(number: int, extension: str = "jpg", size: tuple[int, int] | None = None) -> bytes:
    """An image file whose pixels depend on the number; sizes vary so that crops do."""
    random = np.random.default_rng(number)
    width, height = size or (24 + number % 17, 24 + number % 11)
    coarse = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[extension])
    return file.getvalue()


def caption(number: int) -> str:
    animal = ANIMALS[number % len(ANIMALS)]
    return f"a {COLOURS[number % len(COLOURS)]} {animal}" + " beside another animal" * (number % 3)


def write_shard(path: Path, numbers: range, captions_per_image: int = 1) -> None:
    """Samples with these numbers, JPEG, PNG and WebP by turns; caption(number), then caption(number + 1), ..."""
    with TarWriter(str(path), encoder=False, mtime=0) as tar:
        for number in numbers:
            extension = ("jpg", "png", "webp")[number % 3]
            captions = [caption(number + i) for i in range(captions_per_image)]
            known = json.dumps({"number": number, "captions": captions})
            tar.write({
                "__key__": f"{number:06d}", extension: picture(number, extension),
                "txt": "\n".join(captions).encode(), "json": known.encode(),
            })  # fmt: skip


def write_shards(folder: Path, counts: list[int], captions_per_image: int = 1) -> None:
    """One shard for each count, numbered on."""
    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    for i, count in enumerate(counts):
        write_shard(folder / f"{i:05d}.tar", range(first, first + count), captions_per_image)
        first += count
