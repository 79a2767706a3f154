"""Region files: which of a detector's findings are kept, and the bytes that training reads (`mmpt.data.regions`)."""

import argparse
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmpt.data.regions import BOXES, CLASSES, CONFIDENCE, FEATURES, RegionError, found, read_arrays, surest

NPZ = ".npz"


@dataclass(frozen=True)
class Choice:
    """Regions with more confidence than this, but so many at least and at most: those that the detector is surest of.
    The values are those of UNITER (Chen et al. 2020)."""

    confidence: float = 0.2
    least: int = 10
    most: int = 100

    def __post_init__(self):
        if not 1 <= self.least <= self.most or not 0 <= self.confidence <= 1:
            raise ValueError(
                f"--confidence {self.confidence} wants 0 to 1, --least {self.least} and --most {self.most} "
                "want 1 <= least <= most"
            )


def add_choice(parser: argparse.ArgumentParser, prefix: str = "--") -> None:
    parser.add_argument(
        f"{prefix}confidence", type=float, default=Choice.confidence, metavar="SHARE",
        help="keep regions that the detector is surer of than this [0.2]",
    )  # fmt: skip
    parser.add_argument(f"{prefix}least", type=int, default=Choice.least, metavar="N", help="but at least so many [10]")
    parser.add_argument(f"{prefix}most", type=int, default=Choice.most, metavar="N", help="and at most so many [100]")


def region_file(arrays: dict[str, np.ndarray], choice: Choice) -> bytes:
    """The .regions.npz of one picture, half-precision numbers in stored order.

    arrays: features, norm_bb, conf, and soft_labels where they are known; see `mmpt.data.regions`. Equal arrays give
    equal bytes. Raises RegionError for what training would refuse.
    """
    confidence = arrays[CONFIDENCE]
    count = min(choice.most, max(choice.least, int((confidence > choice.confidence).sum())))
    rows = surest(confidence, count)
    with np.errstate(over="ignore"):  # what is beyond half precision is refused below
        halves = {name: array[rows].astype(np.float16) for name, array in arrays.items()}
    found({name: array[rows] for name, array in arrays.items()})
    file = io.BytesIO()
    np.savez(file, **halves)  # type: ignore[arg-type]
    return file.getvalue()


def read_file(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of a .npz file in UNITER's layout. Raises RegionError when it is not one."""
    return read_arrays(data, (FEATURES, BOXES, CONFIDENCE), (CLASSES,))


@dataclass(frozen=True)
class RegionFolder:
    """A folder of .npz files in UNITER's layout. column: of a table of images, that holds their names in the folder."""

    folder: Path
    choice: Choice
    column: str = ""

    def of(self, image: str, row: dict | None = None) -> bytes:
        """The .regions.npz of a picture, by the picture's name unless its row has a column for it.

        Raises RegionError where there is no file for it, or a bad one.
        """
        names = [str(row.get(self.column))] if self.column and row is not None else names_for(image)
        for name in names:
            path = (self.folder / name).resolve()
            if path.is_relative_to(self.folder.resolve()) and path.is_file():
                return region_file(read_file(path.read_bytes()), self.choice)
        raise RegionError(f"there is no regions file {names[0]!r} in {self.folder}")


def names_for(image: str) -> list[str]:
    """`train2014/COCO_1.jpg` -> train2014/COCO_1.npz, train2014/COCO_1.jpg.npz, COCO_1.npz, coco_1.npz: below the same
    folder or in one, and in lower case, as UNITER's are."""
    path = Path(image)
    names = [str(path.with_suffix(NPZ)), f"{image}{NPZ}", path.stem + NPZ, path.stem.lower() + NPZ]
    return list(dict.fromkeys(names))
