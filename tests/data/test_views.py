"""The extra views: what is drawn, that it does not depend on ranks, workers or the rest, and how it travels."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from mmpt.batch import Batch
from mmpt.data.crop import random_crop_box
from mmpt.data.image import ImageConfig, training_image, training_images
from mmpt.data.loader import DataConfig, build_loader
from mmpt.data.randomness import generator
from mmpt.data.views import ViewConfig, draw_views
from mmpt.inputs import InputSpec
from mmpt.ops.augment import BLUR_SIGMA, BRIGHTNESS, CONTRAST, FLIP, GRAYSCALE, HUE, ORDER, SATURATION, augment
from tests.data.shards import picture

GLOBAL_BATCH = 24


def randomness(position: int) -> partial:
    return partial(generator, 3, epoch=0, position=position)


def test_drawn_as_often_and_as_widely_as_published():
    rows = np.concatenate([draw_views(ViewConfig(), randomness(i), 2) for i in range(2000)])
    jittered = rows[:, ORDER] >= 0
    assert jittered.mean() == pytest.approx(0.8, abs=0.03)
    for column, spread, middle in ((BRIGHTNESS, 0.4, 1), (CONTRAST, 0.4, 1), (SATURATION, 0.4, 1), (HUE, 0.1, 0)):
        drawn = rows[jittered, column] - middle
        assert np.abs(drawn).max() <= spread + 1e-6 and drawn.mean() == pytest.approx(0, abs=spread / 20)
        assert drawn.std() == pytest.approx(spread / 3**0.5, rel=0.05)  # uniform
        assert (rows[~jittered, column] == middle).all()
    orders = np.bincount(rows[jittered, ORDER].astype(int), minlength=24)
    assert len(orders) == 24 and orders.min() > 80  # of 133 expected
    blurred = rows[:, BLUR_SIGMA] > 0
    sigmas = rows[blurred, BLUR_SIGMA]
    assert blurred.mean() == pytest.approx(0.5, abs=0.03)
    assert 0.1 <= sigmas.min() < 0.15 and 1.95 < sigmas.max() <= 2 and sigmas.mean() == pytest.approx(1.05, abs=0.04)
    assert rows[:, GRAYSCALE].mean() == pytest.approx(0.2, abs=0.03)
    assert rows[:, FLIP].mean() == pytest.approx(0.5, abs=0.03)
    coupled = np.corrcoef([jittered, blurred, rows[:, GRAYSCALE], rows[:, FLIP]])
    assert np.abs(coupled - np.eye(4)).max() < 0.06
    first, second = rows[::2], rows[1::2]
    assert abs(np.corrcoef(first[:, FLIP], second[:, FLIP])[0, 1]) < 0.06  # views differ


def test_views_leave_the_image_alone_and_have_crops_of_their_own():
    data, config = picture(8, "jpg", (120, 90)), ImageConfig(flip_probability=0.5, colour_jitter=0.2)
    for i in range(5):
        image, views = training_images(data, 32, config, randomness(i), extra_views=3, view_size=32)
        assert np.array_equal(image, training_image(data, 32, config, randomness(i)))
        assert views.shape == (3, 3, 32, 32) and views.dtype == np.uint8
        fewer = training_images(data, 32, config, randomness(i), extra_views=2, view_size=32)[1]
        assert np.array_equal(fewer, views[:2]) and not np.array_equal(views[0], views[1])
    assert draw_views(ViewConfig(), randomness(0), 0).shape == (0, 8)


def test_a_view_is_the_crop_that_was_drawn_for_it():
    data, config = picture(8, "png", (120, 90)), ImageConfig()
    views = training_images(data, 32, config, randomness(4), extra_views=2, view_size=32)[1]
    for number, view in enumerate(views):
        box = random_crop_box(120, 90, (0.08, 1.0), config.crop_ratio, randomness(4)(f"view {number} crop"))
        one = replace(config, crop_scale=(0.08, 1.0))

        def same_box(_: str, purpose: str = f"view {number} crop") -> np.random.Generator:
            return randomness(4)(purpose)

        assert box[2] > box[0] and np.array_equal(view, training_image(data, 32, one, same_box))


def global_batches(config: DataConfig, inputs: InputSpec, count: int, world_size: int) -> list[list[Batch]]:
    loaders = [build_loader(config, inputs, 5, GLOBAL_BATCH, rank, world_size) for rank in range(world_size)]
    try:
        return [[next(loader) for loader in loaders] for _ in range(count)]
    finally:
        for loader in loaders:
            loader.close()


@pytest.mark.parametrize(("world_size", "workers"), [(2, 0), (4, 0), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_the_same_for_every_world_size(shards: str, tokenizer: str, inputs: InputSpec, world_size: int, workers: int):
    config, wanting = DataConfig(shards=shards, tokenizer=tokenizer, workers=0), replace(inputs, extra_views=2)
    whole = global_batches(config, wanting, 3, 1)
    for (alone,), parts in zip(
        whole, global_batches(replace(config, workers=workers), wanting, 3, world_size), strict=True
    ):
        assert alone.views is not None and alone.view_parameters is not None
        assert alone.views.shape == (GLOBAL_BATCH, 2, 3, 16, 16) and alone.views.dtype == torch.uint8
        assert torch.cat([part.views for part in parts]).equal(alone.views)
        assert torch.cat([part.view_parameters for part in parts]).equal(alone.view_parameters)
        made = [augment(part.views.flatten(0, 1), part.view_parameters.flatten(0, 1)) for part in parts]
        difference = (
            augment(alone.views.flatten(0, 1), alone.view_parameters.flatten(0, 1)).int() - torch.cat(made).int()
        )
        assert difference.abs().max() <= 1 and (difference == 0).float().mean() > 0.999
    (plain,) = global_batches(config, inputs, 1, 1)[0]
    assert plain.views is None and plain.view_parameters is None
    assert plain.pictures.pixels.equal(whole[0][0].pictures.pixels)


def test_views_travel_with_their_batch(shards: str, tokenizer: str, inputs: InputSpec):
    config = DataConfig(shards=shards, tokenizer=tokenizer, workers=0)
    ((batch,),) = global_batches(config, replace(inputs, extra_views=2), 1, 1)
    parts = batch.to("cpu").split(3)
    assert torch.cat([part.views for part in parts]).equal(batch.views)
    assert torch.cat([part.view_parameters for part in parts]).equal(batch.view_parameters)
    there = batch.to("meta")
    assert there.views.device.type == "meta" and there.view_parameters.device.type == "cpu"


@pytest.mark.parametrize(
    "wrong",
    [
        {"crop_scale": (0.0, 1.0)}, {"blur_sigma": (0.1, 9.0)}, {"blur_sigma": (0.0, 2.0)}, {"hue": 0.6},
        {"brightness": 1.5}, {"flip_probability": -0.1}, {"jitter_probability": 2.0},
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(wrong: dict):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ViewConfig(**wrong)
