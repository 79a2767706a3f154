"""A sample's picture in the form that the method takes, and B of them as a batch has them."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from mmpt.batch import Pictures
from mmpt.data.image import ImageConfig, evaluation_image, training_images, whole_evaluation_image
from mmpt.data.patches import pack_patches, whole_size
from mmpt.data.randomness import Random
from mmpt.data.reader import RawSample
from mmpt.data.regions import EXTENSION, FoundRegions, pack_regions, read_regions
from mmpt.inputs import InputSpec


class Picture(NamedTuple):
    """Its pixels, or its regions.

    pixels: [3, H, W] uint8. kept: [K] int64, ascending, the patches that are kept, or None for all of them.
    """

    pixels: np.ndarray | None = None
    kept: np.ndarray | None = None
    regions: FoundRegions | None = None


def training_picture(
    raw: RawSample, inputs: InputSpec, config: ImageConfig, random: Random
) -> tuple[Picture, np.ndarray]:
    """The picture with all that varies in training, and its extra views, [V, 3, S, S] uint8.

    Raises ValueError for an image that cannot be used. Where regions are wanted, no image is decoded.
    """
    if inputs.regions is not None:
        return Picture(regions=read_regions(raw.files.get(EXTENSION), inputs.regions)), np.empty(0, np.uint8)
    shape = inputs.image_size if inputs.image_resize == "square" else partial(whole_size, inputs=inputs)
    image, views = training_images(raw.image(), shape, config, random, inputs.extra_views, inputs.image_size)
    total, kept = inputs.patches, inputs.kept_patches
    if inputs.image_resize != "square":
        total = kept = image.shape[1] * image.shape[2] // inputs.patch_size**2
        kept = min(total, inputs.most_patches or total)
    return Picture(image, kept_patches(total, kept, random)), views


def evaluation_picture(raw: RawSample, inputs: InputSpec, config: ImageConfig) -> Picture:
    """The picture as it is, centre-cropped where the method takes squares, every patch kept.

    Raises ValueError for an image that cannot be used.
    """
    if inputs.regions is not None:
        return Picture(regions=read_regions(raw.files.get(EXTENSION), inputs.regions))
    if inputs.image_resize == "square":
        return Picture(evaluation_image(raw.image(), inputs.image_size, config))
    return Picture(whole_evaluation_image(raw.image(), partial(whole_size, inputs=inputs), config))


def kept_patches(total: int, kept: int, random: Random) -> np.ndarray | None:
    """[K] int64, ascending: a uniformly random K of P patches; None for all. (Of squares, FLIP, Li et al. 2023, section
    3; of whole images 200 at most, ViLT, Kim et al. 2021, section 4.)"""
    if kept == total:
        return None
    return np.sort(np.argsort(random("patches").random(total), kind="stable")[:kept])


def stacked(pictures: Sequence[Picture], inputs: InputSpec) -> Pictures:
    """B pictures as a batch has them."""
    if inputs.regions is not None:
        return Pictures(regions=pack_regions([picture.regions for picture in pictures if picture.regions is not None]))
    images = [picture.pixels for picture in pictures if picture.pixels is not None]
    assert len(images) == len(pictures)
    if inputs.image_resize == "square":
        pixels = torch.from_numpy(np.stack(images))  # [B, 3, H, W]
        kept = [picture.kept for picture in pictures if picture.kept is not None]
        return Pictures(pixels=pixels, kept_patches=torch.from_numpy(np.stack(kept)) if kept else None)  # [B, K]
    patches, places, grids = pack_patches(images, inputs.patch_size, [picture.kept for picture in pictures])
    return Pictures(patches=patches, places=places, grids=grids)
