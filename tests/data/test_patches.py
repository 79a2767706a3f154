"""Whole images as packed patches: sizes against transformers' ViLT, patches against torch's unfold."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from transformers.models.vilt.image_processing_pil_vilt import ViltImageProcessorPil

from mmpt.batch import concatenate, unpack
from mmpt.data.image import ImageConfig, training_images, whole_evaluation_image
from mmpt.data.loader import DataConfig, build_loader, eval_batches
from mmpt.data.patches import pack_patches, whole_size
from mmpt.data.randomness import generator
from mmpt.inputs import InputSpec
from tests.data.batches import assert_same, global_batches, resumed

VILT = InputSpec(
    image_size=384, max_text_tokens=40, vocab_size=30522, image_resize="shorter_side", longest_side=639, patch_size=32
)
SMALL = {"image_size": 32, "image_resize": "shorter_side", "longest_side": 56, "patch_size": 8}
GLOBAL_BATCH = 24


def test_sizes_are_those_of_vilt():
    random = np.random.default_rng(0)
    processor = ViltImageProcessorPil()
    sizes = [(1000, 384), (384, 1000), (384, 384), (640, 480), (333, 500), (1333, 800), (96, 80)]
    sizes += [tuple(int(side) for side in random.integers(90, 800, 2)) for _ in range(60)]
    for width, height in sizes:
        if max(width, height) / min(width, height) > 6:
            continue  # less than one patch of 32, for which ViLT has no answer
        made = processor(Image.new("RGB", (width, height)), return_tensors="np")["pixel_values"]
        assert whole_size(width, height, VILT) == made.shape[2:], (width, height)
    assert whole_size(1000, 384, VILT) == (224, 608)


def test_an_image_is_never_less_than_a_patch():
    assert whole_size(4000, 10, VILT) == (32, 608) and whole_size(10, 4000, VILT) == (608, 32)
    assert whole_size(1, 1, replace(VILT, image_resize="native")) == (32, 32)


def test_native_images_stay_as_large_as_they_are_up_to_the_cap():
    native = replace(VILT, image_resize="native", longest_side=640, patch_size=16)
    assert whole_size(200, 100, native) == (96, 192)  # whole patches, not enlarged
    assert whole_size(640, 320, native) == (320, 640)
    assert whole_size(1280, 640, native) == (320, 640)
    assert whole_size(3000, 1000, native) == (208, 640)


def test_patches_are_those_of_unfold():
    random = np.random.default_rng(1)
    images = [random.integers(0, 256, (3, 8 * h, 8 * w), dtype=np.uint8) for h, w in ((1, 1), (2, 5), (4, 3))]
    tokens, places, grids = pack_patches(images, 8, [None] * 3)
    assert grids.tolist() == [[1, 1], [2, 5], [4, 3]] and tokens.longest == 12 and tokens.x.dtype == torch.uint8
    assert places.equal(tokens.position())
    assert tokens.offsets.tolist() == [0, 1, 11, 23]
    for image, patches in zip(images, unpack(tokens), strict=True):
        unfolded = torch.nn.functional.unfold(torch.from_numpy(image)[None].float(), 8, stride=8)  # [1, 3 * 64, P]
        assert patches.equal(unfolded[0].T.to(torch.uint8))


def scene(width: int, height: int) -> Image.Image:
    coarse = np.random.default_rng(width).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("size", [(150, 100), (1000, 300), (640, 640), (37, 90)])
def test_whole_images_are_pillows_resize(orientation: int, size: tuple[int, int]):
    inputs = replace(VILT, **SMALL)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    scene(*size).save(file, "JPEG", quality=95, exif=exif)
    stored = Image.open(io.BytesIO(file.getvalue())).convert("RGB")
    upright = stored.rotate({1: 0, 3: 180, 6: 270, 8: 90}[orientation], expand=True)
    height, width = whole_size(*upright.size, inputs)
    assert height % 8 == width % 8 == 0 and max(height, width) <= 56
    expected = np.asarray(upright.resize((width, height), Image.Resampling.BICUBIC)).transpose(2, 0, 1).astype(int)

    def shape(width: int, height: int) -> tuple[int, int]:
        return whole_size(width, height, inputs)

    trained, _ = training_images(file.getvalue(), shape, ImageConfig(), lambda _: np.random.default_rng(0))
    for made in (trained, whole_evaluation_image(file.getvalue(), shape, ImageConfig())):
        assert made.shape == expected.shape and np.abs(made - expected).mean() < 1.5


def test_whole_images_are_mirrored_as_crops_are():
    data = io.BytesIO()
    scene(60, 40).save(data, "PNG")
    made = []
    for probability in (0.0, 1.0):
        config = ImageConfig(flip_probability=probability)
        random = {"flip": generator(0, "flip", 0, 0)}
        made.append(training_images(data.getvalue(), lambda *_: (32, 48), config, random.__getitem__)[0])
    assert np.array_equal(made[0][..., ::-1], made[1])


def test_the_loader_delivers_them_for_every_world_size(shards: str, tokenizer: str, inputs: InputSpec):
    config, wanting = (
        DataConfig(shards=shards, tokenizer=tokenizer, workers=0),
        replace(inputs, patches=0, kept_patches=0),
    )
    wanting = replace(wanting, extra_views=1, **SMALL)

    def first(world_size: int) -> list:
        loaders = [build_loader(config, wanting, 5, GLOBAL_BATCH, rank, world_size) for rank in range(world_size)]
        return [next(loader) for loader in loaders]

    (alone,), parts = first(1), first(4)
    assert len(alone) == GLOBAL_BATCH and alone.pictures.pixels is None
    assert alone.views.shape == (GLOBAL_BATCH, 1, 3, 32, 32)
    assert alone.pictures.patches.x.shape[1] == 3 * 8 * 8 and alone.pictures.patches.x.dtype == torch.uint8
    assert alone.pictures.grids.prod(1).tolist() == alone.pictures.patches.lengths().tolist()
    assert len({tuple(grid) for grid in alone.pictures.grids.tolist()}) > 2
    for others in (parts, alone.to("cpu").split(3)):
        joined = concatenate([part.pictures.patches for part in others])
        assert joined.x.equal(alone.pictures.patches.x) and joined.offsets.equal(alone.pictures.patches.offsets)
        assert torch.cat([part.pictures.grids for part in others]).equal(alone.pictures.grids)
        assert sum(len(part) for part in others) == GLOBAL_BATCH
    ((evaluated, _), *_) = eval_batches(shards, config, wanting, 0, 1, 10)
    assert len(evaluated) == 10 and evaluated.pictures.grids.prod(1).sum() == len(evaluated.pictures.patches.x)


def test_some_of_the_patches_of_large_images_in_training_all_in_evaluation(
    shards: str, tokenizer: str, inputs: InputSpec
):
    """ViLT keeps 200 of up to 228; here 18 of up to 28. Without replacement, in the order of places, evenly; with
    partners."""
    config = DataConfig(shards=shards, tokenizer=tokenizer, workers=0, lanes=6)
    everything = replace(inputs, patches=0, kept_patches=0, partners=True, **SMALL)
    wanting = replace(everything, most_patches=18)
    whole, complete = (global_batches(config, asked, 12) for asked in (wanting, everything))
    for others in (global_batches(config, wanting, 3, 4), resumed(config, wanting, [1, 3], (2, 1))):
        for a, b in zip(whole[:3], others, strict=True):
            assert_same(a, b)
    counts, shown = torch.zeros(6, 6), 0
    for a, b in zip(whole, complete, strict=True):
        for some, every in ((a.pictures, b.pictures), (a.partners.pictures, b.partners.pictures)):  # type: ignore[union-attr]
            lengths = every.patches.lengths()  # type: ignore[union-attr]
            assert some.patches.lengths().equal(lengths.clamp(max=18)) and some.grids.equal(every.grids)  # type: ignore[union-attr]
            own = zip(*(unpack(some.patches.with_x(x)) for x in (some.patches.x, some.places)), strict=True)  # type: ignore[union-attr]
            for (patches, places), all_patches, grid in zip(own, unpack(every.patches), every.grids.tolist()):  # type: ignore[union-attr, arg-type]
                assert bool((places.diff() > 0).all()) and patches.equal(all_patches[places])
                if grid == [4, 5]:
                    counts[places // 5, places % 5] += 1
                    shown += 1
    assert shown > 50 and counts[:4, :5].sum() == 18 * shown
    assert stats.chisquare(counts[:4, :5].flatten().numpy()).pvalue > 1e-3
    ((evaluated, _), *_) = eval_batches(shards, config, wanting, 0, 1, 10)
    assert evaluated.pictures.grids.prod(1).tolist() == evaluated.pictures.patches.lengths().tolist()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"patch_size": 0}, "patch_size"),
        ({"longest_side": 31}, "longest_side"),
        ({"patches": 9, "kept_patches": 4}, "cannot be dropped"),
    ],
)
def test_what_cannot_be_is_refused(wrong: dict, message: str):
    with pytest.raises(ValueError, match=message):
        replace(VILT, **wrong)
