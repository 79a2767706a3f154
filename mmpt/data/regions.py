"""Regions of a picture from its .regions.npz file, as a detector has found them and `mmpt-data` has packed them.

Of R regions the file holds, in the layout that UNITER published (Chen et al. 2020):

    features     [R, F]  a vector per region, fp16
    norm_bb      [R, 6]  x1, y1, x2, y2, width, height as shares of the picture's sides; [R, 7] with the area too
    conf         [R]     how sure the detector is of each
    soft_labels  [R, C]  its distribution over classes, background first; not needed by every method
"""

import io
import zipfile
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from mmpt.batch import MaskedRegions, Regions, pack
from mmpt.data.randomness import Random
from mmpt.inputs import InputSpec, RegionSpec

EXTENSION = "regions.npz"
FEATURES, BOXES, CONFIDENCE, CLASSES = "features", "norm_bb", "conf", "soft_labels"
MOST_REGIONS, MOST_COLUMNS = 1024, 8192  # of a file that is read at all
LARGEST_NUMBER_BYTES = 8
ROUNDING = 0.01  # by which boxes in half precision may disagree with themselves


class RegionError(ValueError):
    """Bytes that are not regions we can use."""


class FoundRegions(NamedTuple):
    """The R regions of one picture: features [R, F] fp16, boxes [R, 7] fp32, classes [R, C] fp16."""

    features: np.ndarray
    boxes: np.ndarray
    classes: np.ndarray


def check_regions(inputs: InputSpec) -> None:
    """Raises ValueError for wishes that contradict one another."""
    if not 0 <= inputs.masked_regions < 1:
        raise ValueError(f"masked_regions wants a probability of 0 or more and below 1, got {inputs.masked_regions}")
    if inputs.masked_regions and inputs.regions is None:
        raise ValueError("the method masks regions and takes none")
    if inputs.extra_views and inputs.regions is not None:
        raise ValueError("the method takes regions, and extra views are crops of pixels")


def read_regions(data: bytes | None, spec: RegionSpec) -> FoundRegions:
    """The regions of one picture: at most spec.most, those that the detector is surest of, in stored order.

    data: the .regions.npz file. Raises RegionError where there is none, and for all that is not as it should be.
    """
    if data is None:
        raise RegionError(f"it has no .{EXTENSION} file (`mmpt-data regions` writes them)")
    wanted = [FEATURES, BOXES, CONFIDENCE] + [CLASSES] * (spec.classes > 0)
    arrays = read_arrays(data, wanted)
    widths = {FEATURES: spec.width, CLASSES: spec.classes}
    for name in (FEATURES, CLASSES):
        if name in wanted and arrays[name].shape[1] != widths[name]:
            raise RegionError(f"its {name} are {arrays[name].shape[1]} wide and the method takes {widths[name]}")
    rows = surest(arrays[CONFIDENCE], spec.most)
    return found({name: array[rows] for name, array in arrays.items()})


def surest(confidence: np.ndarray, most: int) -> np.ndarray:
    """The regions that the detector is surest of, at most so many, ascending. confidence: [R]."""
    return np.sort(np.argsort(-confidence, kind="stable")[:most])


def found(arrays: dict[str, np.ndarray]) -> FoundRegions:
    """The arrays of a file as training takes them. Raises RegionError for values that make no sense."""
    features = _half(arrays[FEATURES], FEATURES)
    classes = arrays[CLASSES] if CLASSES in arrays else np.empty((len(features), 0))
    return FoundRegions(features, _boxes(arrays[BOXES]), _half(classes, CLASSES))


def read_arrays(data: bytes, wanted: Sequence[str], welcome: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """These arrays of the file, all of them floating-point numbers, finite, and of the same R regions, R above 0.

    welcome: those that may be missing. Sizes are checked before anything is unpacked, and no object is ever made from
    the file. Raises RegionError.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            known = {info.filename: info for info in archive.infolist()}
            wanted = [*wanted, *(name for name in welcome if f"{name}.npy" in known)]
            for name in wanted:
                if f"{name}.npy" not in known:
                    raise RegionError(f"its .{EXTENSION} file has no {name}")
                _check_size(archive, known[f"{name}.npy"], name)
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in wanted}
    except RegionError:
        raise
    except Exception as error:  # on hostile bytes zipfile and numpy raise nearly every type there is
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RegionError(f"its .{EXTENSION} file cannot be read: {reason}") from error
    check_arrays(arrays)
    return arrays


def check_arrays(arrays: dict[str, np.ndarray]) -> None:
    """Raises RegionError unless these are floating-point numbers, finite, of the same R regions, R above 0."""
    first = next(iter(arrays))
    for name, array in arrays.items():
        _check_kind(array.dtype, array.shape, name)
        if not len(array) == len(arrays[first]) > 0:
            raise RegionError(f"its {name} are of {len(array)} regions, its {first} of {len(arrays[first])}")
        if not np.isfinite(array).all():
            raise RegionError(f"not all of its {name} are finite numbers")


def _check_size(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> None:
    """What the headers say of one array: its type, and a size that the directory of the archive bears out."""
    with archive.open(info) as file:
        read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
        shape, _, dtype = read[np.lib.format.read_magic(file)[0]](file)
        stored = info.file_size - file.tell()
    _check_kind(dtype, shape, name)
    if shape[0] > MOST_REGIONS or max(shape[1:], default=0) > MOST_COLUMNS:
        raise RegionError(f"its {name} of shape {shape} are more than {MOST_REGIONS} x {MOST_COLUMNS}")
    if stored != np.prod(shape, dtype=np.int64) * dtype.itemsize:
        raise RegionError(f"its {name} of shape {shape} do not fill {stored} bytes")


def _check_kind(dtype: np.dtype, shape: tuple[int, ...], name: str) -> None:
    odd = dtype.kind != "f" or dtype.itemsize > LARGEST_NUMBER_BYTES or min(shape, default=0) < 0
    if odd or len(shape) != (1 if name == CONFIDENCE else 2):
        raise RegionError(f"its {name} are {dtype} of shape {shape}")


def _half(array: np.ndarray, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if not np.isfinite(half).all():
        raise RegionError(f"its {name} reach {np.abs(array).max():g}, beyond half precision")
    return half


def _boxes(boxes: np.ndarray) -> np.ndarray:
    """[R, 6] or [R, 7] -> [R, 7] fp32. Raises RegionError for boxes that are not what the first lines here say."""
    if boxes.shape[1] not in (6, 7):
        raise RegionError(f"its {BOXES} are {boxes.shape[1]} wide and not 6 or 7")
    boxes = boxes.astype(np.float32)
    sides = boxes[:, 2:4] - boxes[:, :2]
    if boxes.min() < -ROUNDING or boxes.max() > 1 + ROUNDING or sides.min() < 0:
        raise RegionError(f"a box of its {BOXES} is not normalised: its numbers are not within 0 and 1")
    if np.abs(sides - boxes[:, 4:6]).max() > ROUNDING:
        raise RegionError(f"a box of its {BOXES} is not x1, y1, x2, y2, width, height")
    boxes = boxes.clip(0, 1)
    return boxes if boxes.shape[1] == 7 else np.concatenate([boxes, boxes[:, 4:5] * boxes[:, 5:6]], axis=1)


def pack_regions(pictures: Sequence[FoundRegions]) -> Regions:
    """The regions of B pictures."""
    features = pack([torch.from_numpy(one.features) for one in pictures])
    boxes, classes = (torch.from_numpy(np.concatenate(p)) for p in zip(*((o.boxes, o.classes) for o in pictures)))
    return Regions(features, boxes, classes)


def mask_regions(counts: Sequence[int], share: float, randoms: Sequence[Random]) -> MaskedRegions:
    """Regions to be guessed: each with probability `share`, and one drawn evenly of a picture that would have none.

    counts: regions of each of the B pictures. randoms: of the B samples.
    """
    chosen = []
    for count, random in zip(counts, randoms, strict=True):
        draws = random("masked regions").random(count + 1)
        hit = draws[:count] < share
        if not hit.any():
            hit[int(draws[count] * count)] = True
        chosen.append(hit)
    flat = np.concatenate(chosen)
    return MaskedRegions(torch.from_numpy(flat), int(flat.sum()))
