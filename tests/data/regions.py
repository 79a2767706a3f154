"""Region files in the layout that UNITER published, written by numpy alone, and shards that hold them."""

import io
from pathlib import Path

import numpy as np
from webdataset.writer import TarWriter

from tests.data.shards import caption, picture

WIDTH, CLASSES = 12, 5


def arrays(number: int, count: int | None = None) -> dict[str, np.ndarray]:
    """The regions of one picture: between 3 and 9, unless a count is given."""
    random = np.random.default_rng(number)
    count = count or 3 + number % 7
    corners = np.sort(random.random((2, count, 2)).astype(np.float16), axis=0)  # [2, R, 2]
    boxes = np.concatenate([corners[0], corners[1], corners[1] - corners[0]], axis=1)  # [R, 6]
    classes = random.random((count, CLASSES))
    return {
        "features": random.standard_normal((count, WIDTH)).astype(np.float16),
        "norm_bb": boxes,
        "conf": random.permutation(np.linspace(0.1, 0.9, count)).astype(np.float16),
        "soft_labels": (classes / classes.sum(1, keepdims=True)).astype(np.float16),
    }


def packed(values: dict[str, np.ndarray], compressed: bool = False) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **values)
    return file.getvalue()


def write_region_shards(folder: Path, counts: list[int], without: tuple[int, ...] = ()) -> None:
    """Pictures with regions, `without` some; the images of odd numbers cannot be decoded."""
    folder.mkdir(parents=True)
    first = 0
    for shard, count in enumerate(counts):
        with TarWriter(str(folder / f"{shard:05d}.tar"), encoder=False, mtime=0) as tar:
            for number in range(first, first + count):
                image = b"no image" if number % 2 else picture(number)
                regions = {} if number in without else {"regions.npz": packed(arrays(number), number % 3 == 0)}
                tar.write({"__key__": f"{number:06d}", "jpg": image, "txt": caption(number).encode(), **regions})
        first += count
