"""From a pair to what goes into a shard: read, decode, check, shrink."""

import hashlib
import io
from dataclasses import dataclass

from PIL import Image

from data_tools.pack_shards import MISSING, NO_CAPTION, NO_REGIONS, SUCCESS, UNDECODABLE, Packed
from data_tools.pack_sources import ImageSource, Pair
from data_tools.region_files import RegionFolder
from mmpt.data.decode import ImageError
from mmpt.data.image import ImageConfig, decode
from mmpt.data.regions import EXTENSION, RegionError

JPEG_QUALITY = 95
EXTENSION_OF_MAGIC = ((b"\xff\xd8", "jpg"), (b"\x89PNG", "png"), (b"RIFF", "webp"))
RIGHT = "right."
"""Before the extension of the second image of a sample: KEY.right.png. A sample has one image as far as the index and
the training pipeline are concerned, and that is the first; what reads pairs of images asks for this file too."""


@dataclass(frozen=True)
class _Prepared:
    data: bytes
    extension: str
    size: tuple[int, int]
    original_size: tuple[int, int]
    sha256: str  # of the original, so that it can be found again


class _LeftOut(Exception):
    """(status, reason)"""


@dataclass(frozen=True)
class PairPacker:
    """Makes pairs ready, in whichever process it is called.

    resize: shorter side in pixels to which larger images are shrunk. regions: where each picture's regions are, for
    pairs that have some.
    """

    images: ImageSource
    resize: int | None
    regions: RegionFolder | None = None

    def __call__(self, pair: Pair) -> Packed:
        return pack_pair(pair, self.images, self.resize, self.regions)


def pack_pair(pair: Pair, images: ImageSource, resize: int | None, regions: RegionFolder | None = None) -> Packed:
    """Read and decode the images, so that no pair that training would stumble over gets into a shard."""
    facts = {
        "error_message": "", "width": 0, "height": 0, "original_width": 0, "original_height": 0, "sha256": "",
        "source": pair.image,
    }  # fmt: skip
    if pair.captions is not None:
        facts["captions"] = list(pair.captions)
    reserved = {*facts, "key", "caption", "captions", "status"}
    facts |= {(f"source_{name}" if name in reserved else name): value for name, value in pair.row.items()}
    try:
        if pair.captions == ():
            raise _LeftOut(NO_CAPTION, "it has no caption")
        image = _prepare(pair.image, images, resize)
        files = {image.extension: image.data}
        facts |= _described(image, "")
        if pair.right:
            image = _prepare(pair.right, images, resize)
            files[RIGHT + image.extension] = image.data
            facts |= _described(image, "right_") | {"right_source": pair.right}
        if regions is not None:
            files[EXTENSION] = regions.of(pair.image, pair.row)
            if pair.right:
                files[RIGHT + EXTENSION] = regions.of(pair.right)
    except _LeftOut as left_out:
        status, reason = left_out.args
        return Packed(status, {}, pair.captions, facts | {"error_message": reason})
    except RegionError as error:
        return Packed(NO_REGIONS, {}, pair.captions, facts | {"error_message": str(error)})
    return Packed(SUCCESS, files, pair.captions, facts)


def _described(image: _Prepared, prefix: str) -> dict[str, int | str]:
    names = ("width", "height", "original_width", "original_height", "sha256")
    values = (*image.size, *image.original_size, image.sha256)
    return {prefix + name: value for name, value in zip(names, values, strict=True)}


def _prepare(name: str, images: ImageSource, resize: int | None) -> _Prepared:
    data = images.read(name)
    if data is None:
        raise _LeftOut(MISSING, f"there is no image {name}")
    try:
        decoded = decode(data, ImageConfig.background, ImageConfig.max_pixels)
    except ImageError as error:
        raise _LeftOut(UNDECODABLE, str(error)) from error
    extension = next(extension for magic, extension in EXTENSION_OF_MAGIC if data.startswith(magic))
    original_size, digest = decoded.size, hashlib.sha256(data).hexdigest()
    if resize and min(decoded.size) > resize:
        decoded, data, extension = _shrink(decoded, resize, extension)
    return _Prepared(data, extension, decoded.size, original_size, digest)


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
