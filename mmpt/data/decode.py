"""From the bytes of an image file to pixels: what its header says, and decoding at a fraction of its size."""

import io
import re
import warnings
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import ExifTags, Image

DCT_FACTORS = (8, 4, 2)
"""A JPEG can be decoded this many times smaller. libjpeg has all eighths, but only the powers of two save time: the
others measured slower than decoding in full."""
APP1, START_OF_SCAN, FILL = 0xE1, 0xDA, 0xFF  # markers of a JPEG file (ITU-T T.81, B.1.1.3)
NO_TURN = (False, False, False)
TURN_OF_ORIENTATION = {
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}
ADDRESS = re.compile(r" <[^<>]* at 0x[0-9a-f]+>")  # of an object in memory: it would differ from run to run
Box = tuple[float, float, float, float]
"""left, top, right, bottom, in pixels from the upper left corner."""


class ImageError(ValueError):
    """Bytes that are not an image we can or want to decode."""


class Header(NamedTuple):
    """What is known of an image before any pixel is decoded.

    width, height: of the image as it is stored, in pixels.
    turn:          how it is set upright (EXIF, CIPA DC-008): (swap rows and columns, then mirror left to right, then
                   mirror top to bottom).
    dct:           whether it is a JPEG that can be decoded at a fraction of its size.
    """

    width: int
    height: int
    turn: tuple[bool, bool, bool]
    dct: bool

    @property
    def upright_size(self) -> tuple[int, int]:
        """(width, height) as a person sees it."""
        return (self.height, self.width) if self.turn[0] else (self.width, self.height)

    def as_stored(self, box: Box) -> Box:
        """Where a box of the upright image lies in the stored one."""
        left, top, right, bottom = box
        width, height = self.upright_size
        swap, across, down = self.turn
        if across:
            left, right = width - right, width - left
        if down:
            top, bottom = height - bottom, height - top
        return (top, left, bottom, right) if swap else (left, top, right, bottom)

    def upright(self, pixels: np.ndarray) -> np.ndarray:
        """Stored pixels [H, W, ...] set upright: a view."""
        swap, across, down = self.turn
        pixels = pixels.swapaxes(0, 1) if swap else pixels
        return pixels[:: -1 if down else 1, :: -1 if across else 1]


def read_header(data: bytes, max_pixels: int, max_bytes: int) -> Header:
    """Size and orientation of a JPEG, PNG or WebP file; reads no further than the header.

    Raises ImageError for anything else, and for more than max_bytes bytes or max_pixels pixels.
    """
    if len(data) > max_bytes:
        raise ImageError(f"{len(data)} bytes are more than max_bytes ({max_bytes})")
    try:
        header = _jpeg_header(data) or _any_header(data)
    except Exception as error:  # on hostile bytes the decoders raise nearly every type there is
        raise _undecodable(error) from error
    if header.width * header.height > max_pixels:
        raise ImageError(f"{header.width} x {header.height} pixels are more than max_pixels ({max_pixels})")
    return header


def decode_pixels(data: bytes, header: Header, factor: int, background: tuple[int, int, int]) -> np.ndarray:
    """The stored pixels: uint8 [H, W, 3], H = ceil(header.height / factor) and W alike.

    factor: 1, or one of DCT_FACTORS where header.dct: pixel (x, y) is then made of the low frequencies of the stored
    pixels from (factor * x, factor * y) to (factor * (x + 1), factor * (y + 1)).
    Transparency is composed on the background. Raises ImageError for damage, a cut file included.
    """
    try:
        if header.dct:
            height, width = -(-header.height // factor), -(-header.width // factor)
            pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width, min_factor=factor)
            assert pixels.shape == (height, width, 3)
            return pixels
        return np.array(_rgb(_open(data), background))  # a copy that may be written to, as torch wants it
    except Exception as error:  # see read_header
        raise _undecodable(error) from error


def _jpeg_header(data: bytes) -> Header | None:
    """The header of a JPEG in colour or grey; None where Pillow has to look (CMYK and Adobe's inversion of it)."""
    if data[:2] != b"\xff\xd8":
        return None
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    if colours not in ("YCbCr", "RGB", "Gray"):
        return None
    turn = _turn(_open(data)) if _may_be_turned(data) else NO_TURN
    return Header(int(width), int(height), turn, dct=True)


def _may_be_turned(data: bytes) -> bool:
    """Whether a JPEG has an APP1 segment, where EXIF and XMP are, or else segments that cannot be followed.

    Pillow's own look at the header takes as long as a tenth of the decoding of a small image.
    """
    at = 2
    while at + 4 <= len(data) and data[at] == FILL and data[at + 1] not in (APP1, START_OF_SCAN):
        at += 1 if data[at + 1] == FILL else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return data[at : at + 2] != bytes((FILL, START_OF_SCAN))


def _any_header(data: bytes) -> Header:
    image = _open(data)
    return Header(image.width, image.height, _turn(image), dct=False)


def _open(data: bytes) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is our own
        return Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))  # reads no further than the header


def _turn(image: Image.Image) -> tuple[bool, bool, bool]:
    return TURN_OF_ORIENTATION.get(image.getexif().get(ExifTags.Base.Orientation, 1), NO_TURN)


def _rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, (*background, 255))
        return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip instead of scale
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _undecodable(error: Exception) -> ImageError:
    reason = ADDRESS.sub("", str(error)) or type(error).__name__
    return ImageError(f"cannot be decoded: {reason}")
