import contextlib
import io
import math
import tarfile
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from PIL import Image, ImageOps

from mmpt.data.crop import random_crop_box
from mmpt.data.decode import ImageError
from mmpt.data.image import ImageConfig, decode, evaluation_image, jitter, training_image
from mmpt.data.randomness import generator
from tests.data.shards import picture
from tests.shared_data import shared_data

PHOTOS = "photos/imagenet-samples-400.tar"
WHITE, MANY = (255, 255, 255), 10**9


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def photo_like(width: int, height: int) -> Image.Image:
    random = np.random.default_rng(3)
    coarse = random.integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def randomness(position: int) -> Callable[[str], np.random.Generator]:
    return partial(generator, 0, epoch=0, position=position)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_of_every_format(kind: str, orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(photo_like(37, 23), kind, exif=exif, **options)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    decoded = decode(data, WHITE, MANY)
    assert decoded.size == upright.size == ((37, 23) if orientation < 5 else (23, 37))
    assert np.abs(array(decoded) - array(upright)).max() <= 1  # two versions of libjpeg


def test_orientation_is_found_behind_other_segments_and_in_xmp():
    image, profile = photo_like(37, 23), bytes(200_000)
    exif = Image.Exif()
    exif[0x0112] = 6
    xmp = b'<x:xmpmeta xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"></x:xmpmeta>'
    late = encode(image, "JPEG", comment=b"\xff\xda" * 9, icc_profile=profile, exif=exif)
    start = late.index(b"\xff\xe1")
    segment = late[start : start + 2 + int.from_bytes(late[start + 2 : start + 4], "big")]
    late = late.replace(segment, b"").replace(b"\xff\xdb", b"\xff" * 3 + segment + b"\xff\xdb", 1)  # after the others
    for data in (late, encode(image, "JPEG", xmp=xmp, icc_profile=profile)):
        assert Image.open(io.BytesIO(data)).getexif()[0x0112] == 6
        assert decode(data, WHITE, MANY).size == (23, 37)
    assert decode(encode(image, "JPEG", icc_profile=profile), WHITE, MANY).size == (37, 23)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_of_every_colour_space_as_pillow_decodes_it(mode: str):
    data = encode(photo_like(40, 30).convert(mode), "JPEG", quality=90)
    assert np.abs(array(decode(data, WHITE, MANY)) - array(Image.open(io.BytesIO(data)).convert("RGB"))).max() <= 2


def test_transparency_is_composed_on_the_background():
    background = (10, 200, 30)
    rgba = photo_like(20, 10).convert("RGBA")
    alpha = np.tile(np.linspace(0, 255, 20).astype(np.uint8), (10, 1))
    rgba.putalpha(Image.fromarray(alpha))
    share = alpha[..., None] / 255
    expected = array(rgba)[..., :3] * share + np.array(background) * (1 - share)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        decoded = array(decode(encode(rgba, kind, **options), background, MANY))
        assert np.abs(decoded - expected).max() <= 1


def test_transparency_in_palettes_grey_and_plain_colours():
    background = (9, 8, 7)
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    grey = Image.fromarray(np.array([[[50, 0], [60, 255]]], dtype=np.uint8), "LA")
    key = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8))
    assert array(decode(encode(palette, "PNG", transparency=0), background, MANY)).tolist() == [
        [[9, 8, 7], [0, 255, 0]]
    ]
    assert array(decode(encode(grey, "PNG"), background, MANY)).tolist() == [[[9, 8, 7], [60] * 3]]
    assert array(decode(encode(key, "PNG", transparency=(1, 2, 3)), background, MANY)).tolist() == [
        [[9, 8, 7], [4, 5, 6]]
    ]


def test_sixteen_bit_grey_is_scaled_not_clipped():
    values = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    decoded = array(decode(encode(Image.fromarray(values), "PNG"), WHITE, MANY))
    assert decoded[0, :, 0].tolist() == [0, 1, 128, 255]


def test_a_bomb_is_refused_by_its_header():
    bomb = encode(Image.new("1", (20_000, 20_000)), "PNG")  # 400 million pixels in a few kilobytes
    assert len(bomb) < 100_000
    with pytest.raises(ImageError, match=r"pixels"):
        decode(bomb, WHITE, 10**8)
    with pytest.raises(ImageError, match=r"30 x 20 pixels are more than max_pixels \(599\)"):
        decode(encode(photo_like(30, 20), "JPEG"), WHITE, 599)
    assert decode(encode(photo_like(30, 20), "JPEG"), WHITE, 600).size == (30, 20)


@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_cut_image_is_an_error(extension: str, share: float):
    data = picture(5, extension, (64, 64))
    with pytest.raises(ImageError) as caught:
        decode(data[: int(len(data) * share)], WHITE, MANY)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"<html>", b"\xff\xd8\xff", b"GIF89a" + bytes(100), bytes(1000)])
def test_what_is_no_image_is_an_error(data: bytes):
    with pytest.raises(ImageError, match="cannot be decoded"):
        decode(data, WHITE, MANY)


def test_damaged_bytes_give_an_image_or_an_image_error():
    random = np.random.default_rng(0)
    for number in range(60):
        data = bytearray(picture(number, ("jpg", "png", "webp")[number % 3]))
        for at in random.integers(0, len(data), 4):
            data[at] = random.integers(256)
        with contextlib.suppress(ImageError):
            assert decode(bytes(data), WHITE, 10**6).mode == "RGB"


def test_crops_have_the_areas_and_ratios_asked_for():
    width, height, scale, ratio = 400, 300, (0.2, 0.6), (0.75, 4 / 3)
    boxes = np.array([random_crop_box(width, height, scale, ratio, generator(0, "crop", 0, i)) for i in range(4000)])
    crop_width, crop_height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    shares, ratios = crop_width * crop_height / (width * height), np.log(crop_width / crop_height)
    assert boxes[:, :2].min() >= 0 and boxes[:, 2].max() <= width and boxes[:, 3].max() <= height
    assert shares.min() >= 0.2 and shares.max() <= 0.6 and shares.mean() == pytest.approx(0.4, abs=0.01)
    assert abs(ratios).max() <= math.log(4 / 3) + 1e-9 and ratios.mean() == pytest.approx(0, abs=0.01)
    slack = boxes[:, 0] / (width - crop_width)
    assert slack.mean() == pytest.approx(0.5, abs=0.02)  # the place is uniform


@pytest.mark.parametrize(("width", "height"), [(1000, 10), (10, 1000), (1, 1), (33, 32)])
def test_crops_of_odd_shapes_stay_inside(width: int, height: int):
    for i in range(50):
        left, top, right, bottom = random_crop_box(width, height, (0.9, 1), (0.75, 4 / 3), generator(1, "crop", 0, i))
        assert 0 <= left < right <= width and 0 <= top < bottom <= height


def test_a_training_image_is_pillows_resize_of_the_crop():
    image, config = photo_like(123, 77), ImageConfig(crop_scale=(0.3, 1.0))
    box = random_crop_box(123, 77, config.crop_scale, config.crop_ratio, randomness(4)("crop"))
    width, height = round(box[2] - box[0]), round(box[3] - box[1])
    crop = image.crop((round(box[0]), round(box[1]), round(box[0]) + width, round(box[1]) + height))
    expected = array(crop.resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    made = training_image(encode(image, "PNG"), 32, config, randomness(4))
    assert made.dtype == np.uint8 and made.shape == (3, 32, 32) and made.flags.c_contiguous
    assert np.abs(made - expected).max() <= 1


def test_flips_come_as_often_as_asked_and_leave_the_crop_alone():
    image = encode(photo_like(50, 40), "JPEG")
    plain = [training_image(image, 8, ImageConfig(), randomness(i)) for i in range(400)]
    mixed = [training_image(image, 8, ImageConfig(flip_probability=0.3), randomness(i)) for i in range(400)]
    flipped = [np.array_equal(a[..., ::-1], b) and not np.array_equal(a, b) for a, b in zip(plain, mixed, strict=True)]
    assert all(f or np.array_equal(a, b) for f, a, b in zip(flipped, plain, mixed, strict=True))
    assert sum(flipped) / 400 == pytest.approx(0.3, abs=0.08)


def test_jitter_varies_within_its_strength():
    grey = Image.new("RGB", (4, 4), (100, 100, 100))  # contrast and saturation leave a plain grey alone
    values = [array(jitter(grey, 0.4, generator(0, "jitter", 0, i)))[0, 0, 0] for i in range(500)]
    assert 59 <= min(values) < 65 and 135 < max(values) <= 141
    assert np.array_equal(array(jitter(photo_like(9, 9), 0.0, generator(0, "jitter", 0, 0))), array(photo_like(9, 9)))


def test_evaluation_takes_the_middle_square():
    image = photo_like(60, 40)
    cropped = np.asarray(image.crop((10, 0, 50, 40)).resize((20, 20), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    made = evaluation_image(encode(image, "PNG"), 20, ImageConfig())
    assert np.array_equal(
        made[..., 3:-3], cropped[..., 3:-3]
    )  # the filter reaches over the edge of a box, not of a crop
    assert np.abs(made.astype(int) - cropped).max() <= 4
    two_steps = ImageOps.fit(image.resize((30, 20), Image.Resampling.BICUBIC), (20, 20))
    assert np.abs(made.astype(int) - array(two_steps).transpose(2, 0, 1)).mean() < 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"crop_scale": (0.0, 1.0)}, {"crop_scale": (0.9, 0.5)}, {"crop_scale": (0.5, 1.5)}, {"crop_ratio": (2.0, 1.0)},
        {"flip_probability": 1.5}, {"colour_jitter": 1.0}, {"background": (0, 0, 256)},
        {"decode_gap": 0.5}, {"max_pixels": 0}, {"max_bytes": 0},
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(wrong: dict):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ImageConfig(**wrong)


def test_real_photographs_decode_as_pillow_decodes_them():
    worst = 0.0
    with tarfile.open(shared_data(PHOTOS)) as tar:
        for member in [entry for entry in tar if entry.isfile()][:60]:
            data = tar.extractfile(member).read()  # type: ignore[union-attr]
            upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
            decoded = decode(data, WHITE, MANY)
            assert decoded.size == upright.size
            worst = max(worst, float(np.abs(array(decoded) - array(upright)).mean()))
    assert worst < 0.5
