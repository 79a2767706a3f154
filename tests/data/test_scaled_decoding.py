"""Training and evaluation images against full decoding and Pillow's antialiased bicubic resize of the same box."""

import io
import math
import tarfile
from functools import partial

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from mmpt.data.crop import dct_factor, random_crop_box, snapped
from mmpt.data.decode import DCT_FACTORS, ImageError, decode_pixels, read_header
from mmpt.data.image import ImageConfig, decode, evaluation_image, training_image
from mmpt.data.randomness import generator
from tests.shared_data import shared_data

PHOTOS = "photos/imagenet-samples-400.tar"
MANY = 10**9


def scene(width: int, height: int, seed: int, fall: float = 1.2) -> Image.Image:
    """Detail at every scale, about as photographs have it: amplitude falls as 1 / frequency ** fall."""
    random = np.random.default_rng(seed)
    planes = []
    for _ in range(3):
        frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width)[None] * width)
        spectrum = np.exp(2j * np.pi * random.random(frequency.shape)) / np.maximum(frequency, 1) ** fall
        plane = np.fft.irfft2(spectrum, (height, width))
        planes.append(128 + 45 * plane / plane.std())
    return Image.fromarray(np.stack(planes, axis=2).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, orientation: int = 1, **options: object) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90, exif=exif, **options)
    return file.getvalue()


def decibels(a: np.ndarray, b: np.ndarray) -> float:
    error = float(((a.astype(float) - b.astype(float)) ** 2).mean())
    return 99.0 if error == 0 else 10 * math.log10(255**2 / error)


def training_decibels(data: bytes, size: int, config: ImageConfig, position: int) -> tuple[float, int]:
    """PSNR of a training image against full decoding, and the factor it was decoded at."""
    random = partial(generator, 0, epoch=0, position=position)
    header = read_header(data, MANY, MANY)
    box = random_crop_box(*header.upright_size, config.crop_scale, config.crop_ratio, random("crop"))
    factor = dct_factor(header, box, (size, size), config.decode_gap)
    stored = [float(edge * factor) for edge in snapped(header, box, factor)]
    full = Image.fromarray(simplejpeg.decode_jpeg(data, "RGB"))
    expected = header.upright(np.asarray(full.resize((size, size), Image.Resampling.BICUBIC, box=tuple(stored))))
    made = training_image(data, size, config, random).transpose(1, 2, 0)
    return decibels(made, expected), factor


def evaluation_decibels(data: bytes, size: int) -> float:
    full = ImageOps.exif_transpose(Image.open(io.BytesIO(data)).convert("RGB"))
    side = min(full.size)
    left, top = (full.width - side) / 2, (full.height - side) / 2
    expected = np.asarray(full.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)))
    return decibels(evaluation_image(data, size, ImageConfig()).transpose(1, 2, 0), expected)


@pytest.mark.parametrize("crop_scale", [(0.9, 1.0), (0.08, 1.0)])
def test_as_good_as_full_decoding(crop_scale: tuple[float, float]):
    data = [jpeg(scene(540 + 67 * i, 420 + 53 * i, i), orientation=1 + i) for i in range(8)]
    config = ImageConfig(crop_scale=crop_scale)
    found = [training_decibels(item, 56, config, i) for i, item in enumerate(data * 4)]
    quality = [decibel for decibel, _ in found]
    assert max(factor for _, factor in found) >= 4  # or it would show nothing
    assert np.mean(quality) >= 40 and min(quality) >= 35
    assert min(evaluation_decibels(item, 56) for item in data) >= 35


@pytest.mark.parametrize("size", [224, 112])
@pytest.mark.parametrize("crop_scale", [(0.9, 1.0), (0.08, 1.0)])
def test_photographs_as_good_as_full_decoding(crop_scale: tuple[float, float], size: int):
    config = ImageConfig(crop_scale=crop_scale)
    with tarfile.open(shared_data(PHOTOS)) as tar:
        photos = [tar.extractfile(member).read() for member in tar if member.isfile()]  # type: ignore[union-attr]
    quality = [training_decibels(data, size, config, i)[0] for i, data in enumerate(photos)]
    assert len(photos) == 400 and np.mean(quality) >= 40 and min(quality) >= 30
    quality = [evaluation_decibels(data, size) for data in photos]
    assert np.mean(quality) >= 40 and min(quality) >= 30


@pytest.mark.parametrize("factor", DCT_FACTORS)
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
@pytest.mark.parametrize("size", [(64, 48), (61, 43)])
def test_scaled_pixels_are_averages_of_the_full_ones(factor: int, options: dict, size: tuple[int, int]):
    data = jpeg(scene(*size, seed=1).resize(size, Image.Resampling.BOX), **options)
    header = read_header(data, MANY, MANY)
    full = decode_pixels(data, header, 1, (0, 0, 0)).astype(float)
    small = decode_pixels(data, header, factor, (0, 0, 0)).astype(float)
    assert small.shape == (-(-size[1] // factor), -(-size[0] // factor), 3)
    height, width = size[1] // factor, size[0] // factor  # those that are all image
    whole = full[: height * factor, : width * factor]
    means = whole.reshape(height, factor, width, factor, 3).mean((1, 3))
    assert (
        np.abs(small[:height, :width] - means).mean() < 6
    )  # low frequencies are near averages, and nothing is shifted
    shifted = np.abs(small[1:height, :width] - means[:-1]).mean()
    assert np.abs(small[:height, :width] - means).mean() < shifted / 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_crops_are_chosen_upright_whatever_the_orientation(orientation: int, mode: str):
    """The same crop of the same upright picture, however it is stored."""
    upright = scene(640, 480, seed=2, fall=2.0).convert(mode)  # smooth: boxes snap to other pixels
    undo = {5: 5, 6: 8, 8: 6, 7: 7}.get(orientation, orientation)
    exif = Image.Exif()
    exif[0x0112] = undo
    tagged = io.BytesIO()
    upright.save(tagged, "PNG", exif=exif)
    stored = ImageOps.exif_transpose(Image.open(tagged))  # what `orientation` sets upright again
    config = ImageConfig(crop_scale=(0.3, 0.8), flip_probability=0.5)
    for position in range(6):
        random = partial(generator, 0, epoch=0, position=position)
        made = training_image(jpeg(stored, orientation, subsampling=0), 48, config, random)
        expected = training_image(jpeg(upright, subsampling=0), 48, config, random)
        assert decibels(made, expected) > 30
        assert max(decibels(made[..., ::-1], expected), decibels(made[:, ::-1], expected)) < 22
    made, expected = (
        evaluation_image(data, 48, ImageConfig())
        for data in (jpeg(stored, orientation, subsampling=0), jpeg(upright, subsampling=0))
    )
    assert decibels(made, expected) > 36


def test_the_factor_leaves_the_gap_in_both_directions():
    header = read_header(jpeg(scene(800, 600, 0)), MANY, MANY)
    for width, height in ((800, 600), (800, 448), (800, 447), (300, 300), (112, 600)):
        for gap in (1.0, 1.5, 2.0):
            factor = dct_factor(header, (0, 0, width, height), (56, 56), gap)
            assert factor == max([1, *(f for f in DCT_FACTORS if min(width, height) / f >= gap * 56)])
    file = io.BytesIO()
    scene(800, 600, 0).save(file, "PNG")
    assert dct_factor(read_header(file.getvalue(), MANY, MANY), (0, 0, 800, 600), (56, 56), 1.0) == 1


def test_boxes_snap_inside_the_image():
    random = np.random.default_rng(0)
    for _ in range(2000):
        width, height = (int(side) for side in random.integers(1, 70, 2))
        header = read_header(jpeg(Image.new("L", (width, height)), int(random.integers(1, 9))), MANY, MANY)
        upright = header.upright_size
        left, right = sorted(random.random(2) * upright[0])
        top, bottom = sorted(random.random(2) * upright[1])
        for factor in (1, 2, 4, 8):
            box = snapped(header, (left, top, right, bottom), factor)
            stored = [edge / factor for edge in header.as_stored((left, top, right, bottom))]
            for axis, side in enumerate((width, height)):
                first, last, wanted = box[axis], box[axis + 2], stored[axis + 2] - stored[axis]
                assert first == int(first) >= 0 and last <= side / factor + 1e-9
                assert abs(first - stored[axis]) <= 1.5
                assert last - first == (max(1, round(wanted)) if factor == 1 else pytest.approx(wanted))


def test_a_scaled_decode_of_a_cut_or_foreign_file_is_an_error():
    data = jpeg(scene(640, 480, 3))
    random = partial(generator, 0, epoch=0, position=0)
    for made in (partial(training_image, random=random), evaluation_image):
        for cut in (0, 3, 200, len(data) // 2, len(data) - 200):
            with pytest.raises(ImageError, match="cannot be decoded"):
                made(data[:cut], size=56, config=ImageConfig())
        with pytest.raises(ImageError, match=rf"{len(data)} bytes are more than max_bytes \(999\)"):
            made(data, size=56, config=ImageConfig(max_bytes=999))
        with pytest.raises(ImageError, match=r"640 x 480 pixels are more than max_pixels \(5000\)"):
            made(data, size=56, config=ImageConfig(max_pixels=5000))


def test_cmyk_and_grey_photographs_scale_or_not_but_always_decode():
    for mode, dct in (("CMYK", False), ("L", True)):
        data = jpeg(scene(640, 480, 4).convert(mode))
        assert read_header(data, MANY, MANY).dct == dct
        small = evaluation_image(data, 56, ImageConfig()).transpose(1, 2, 0)
        middle = decode(data, (0, 0, 0), MANY).crop((80, 0, 560, 480)).resize((56, 56), Image.Resampling.BICUBIC)
        assert decibels(small, np.asarray(middle)) > 38
