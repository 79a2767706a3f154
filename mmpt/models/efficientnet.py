"""EfficientNet (Tan and Le 2019), whose last grid is the tokens. The blocks are transformers'.

ALIGN's image tower (Jia et al. 2021, section 4.1): without the last 1 x 1 convolution, the mean is the embedding.

Three things differ from transformers' class, and follow the published code: batch norms are ours, with the published
momentum (0.99 of the old, which transformers hands to torch as 0.99 of the new); drop connect drops a sample's whole
update (transformers drops single numbers); initial weights are He's normal (transformers' are so small, gains of norms
included, that nothing passes through).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmpt.batch import Pictures, Tokens
from mmpt.inputs import PictureSpec
from mmpt.models.batch_norm import BatchNorm
from mmpt.models.grid import grid_tokens, square_pixels
from mmpt.models.pooling import mean_token
from mmpt.models.resnet import IMAGENET_MEAN, IMAGENET_STD
from mmpt.models.tower import ImageTower, no_summary

SIZES = {
    "B0": (1.0, 1.0, 224), "B1": (1.0, 1.1, 240), "B2": (1.1, 1.2, 260), "B3": (1.2, 1.4, 300), "B4": (1.4, 1.8, 380),
    "B5": (1.6, 2.2, 456), "B6": (1.8, 2.6, 528), "B7": (2.0, 3.1, 600), "L2": (4.3, 5.3, 800),
}  # fmt: skip
"""(width coefficient, depth coefficient, image size) of the published sizes (Tan and Le 2019; L2: Xie et al. 2020)."""
REPEATS, STRIDES = (1, 2, 2, 3, 3, 4, 1), (1, 2, 2, 2, 1, 2, 1)
"""Blocks of each stage of B0, and the stride of its first (Tan and Le 2019, table 1)."""
LAST_WIDTH, TOP_WIDTH, MOMENTUM, EPS = 320, 1280, 0.01, 1e-3


@dataclass(frozen=True)
class EfficientNetConfig:
    width_coefficient: float = 1.0
    """Channels as a multiple of B0's, rounded to 8."""
    depth_coefficient: float = 1.0
    """Blocks of each stage as a multiple of B0's, rounded up."""
    image_size: int = 224
    """Height and width of the input, in pixels."""
    drop_connect: float = 0.2
    """How likely the last block's update is dropped, for each sample; it grows linearly from 0 at the first."""
    padding: Literal["same", "even"] = "same"
    """TensorFlow's `same`, which knows whether a side is odd, as published; or as if every side were even
    (transformers' ALIGN at 289 pixels)."""
    top: bool = True
    """Whether the last 1 x 1 convolution, which makes the width 1280, is there (ALIGN: no)."""
    pool: Literal["mean", "none"] = "mean"
    """The summary: the mean over the grid, or none."""
    kept_places: int = 0
    """Places of the grid that are kept in training, drawn at random; 0 keeps all."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean of each channel, in units of 255."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Standard deviation of each channel, in units of 255."""
    checkpoint_activations: bool = False
    """Keep only each block's input and compute the rest again in the backward."""

    def __post_init__(self) -> None:
        if not 0 <= self.drop_connect < 1:
            raise ValueError(f"drop_connect is a probability below 1, got {self.drop_connect}")
        if not 0 <= self.kept_places <= self.places:
            raise ValueError(f"kept_places lies between 0 and the {self.places} places, got {self.kept_places}")

    @property
    def places(self) -> int:
        """P, places of the last grid."""
        *_, last = self.sides()
        return last[1] ** 2

    def sides(self) -> Iterator[tuple[int, int]]:
        """Each block's stride, and the side of the grid that it gives out."""
        side = (self.image_size + (self.padding == "same")) // 2
        for repeats, stride in zip(REPEATS, STRIDES, strict=True):
            for i in range(math.ceil(self.depth_coefficient * repeats)):
                side = -(-side // stride) if i == 0 else side
                yield stride if i == 0 else 1, side

    @property
    def width(self) -> int:
        return self._rounded(TOP_WIDTH if self.top else LAST_WIDTH)

    def _rounded(self, channels: int) -> int:
        """Those of B0 -> ours, rounded to 8 but never down by more than a tenth (released code)."""
        wanted = channels * self.width_coefficient
        rounded = max(8, int(wanted + 4) // 8 * 8)
        return rounded + 8 if rounded < 0.9 * wanted else rounded

    @property
    def summary_width(self) -> int:
        return self.width if self.pool == "mean" else 0

    def inputs(self) -> PictureSpec:
        return PictureSpec(
            image_size=self.image_size, patches=self.places, kept_patches=self.kept_places or self.places
        )

    def build(self) -> "EfficientNet":
        return EfficientNet(self)


def efficientnet(
    size: Literal["B0", "B1", "B2", "B3", "B4", "B5", "B6", "B7", "L2"], image_size: int = 0
) -> EfficientNetConfig:
    """A published size, at its published image size or another (ALIGN: L2 at 289)."""
    width, depth, published = SIZES[size]
    return EfficientNetConfig(width, depth, image_size or published)


class EfficientNet(ImageTower):
    """Pictures -> Tokens [B * P, D], the places of the last grid, row by row."""

    def __init__(self, config: EfficientNetConfig):
        super().__init__()
        self.config = config
        theirs: Any = transformers.EfficientNetModel(their_config(config))
        self.embedding, self.blocks = theirs.embeddings, theirs.encoder.blocks
        top = (theirs.encoder.top_conv, theirs.encoder.top_bn, theirs.encoder.top_activation) if config.top else ()
        self.top = nn.Sequential(*top)
        if config.padding == "same" and config.image_size % 2:
            self.embedding.padding = nn.ZeroPad2d(1)
        _replace(self)
        self.init_weights()

    def init_weights(self) -> None:
        """Normal with variance 2 / fan out, a depthwise convolution's fan being that of one channel; no biases."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, pictures: Pictures) -> Tokens:
        pixels = square_pixels(pictures, self.config.image_size, self.config.mean, self.config.std)
        x = self.embedding(pixels.to(self.embedding.convolution.weight.dtype))
        saving = self.config.checkpoint_activations and torch.is_grad_enabled()
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if saving else block(x)
        return grid_tokens(self.top(x), pictures.kept_patches)

    def summary(self, tokens: Tokens) -> Tensor:
        if self.config.pool == "none":
            raise no_summary(self)
        return mean_token(tokens)

    def local(self, tokens: Tokens) -> Tokens:
        return tokens


class DropConnect(nn.Module):
    """In training, a sample's whole update is zeroed with this probability, the others scaled to keep the mean."""

    def __init__(self, probability: float):
        super().__init__()
        self.probability = probability

    def forward(self, update: Tensor) -> Tensor:
        if not self.training or self.probability == 0.0:
            return update
        keep = 1.0 - self.probability
        kept = torch.rand(len(update), 1, 1, 1, device=update.device) < keep
        return update * (kept / keep).to(update.dtype)


def their_config(config: EfficientNetConfig) -> transformers.EfficientNetConfig:
    """The configuration of transformers' class with these blocks."""
    side, symmetric = (config.image_size + 1) // 2, []
    for number, (stride, after) in enumerate(config.sides()):
        if stride == 2 and side % 2 and config.padding == "same":
            symmetric.append(number)  # an odd side is padded alike on both
        side = after
    return transformers.EfficientNetConfig(
        image_size=config.image_size,
        width_coefficient=config.width_coefficient,
        depth_coefficient=config.depth_coefficient,
        hidden_dim=replace(config, top=True).width,
        depthwise_padding=symmetric,
        num_block_repeats=list(REPEATS),
        strides=list(STRIDES),
        drop_connect_rate=config.drop_connect,
    )


def _replace(module: nn.Module) -> None:
    """torch's batch norms by ours, and dropout of numbers by that of samples."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, BatchNorm(child.num_features, EPS, MOMENTUM))
        elif isinstance(child, nn.Dropout):
            setattr(module, name, DropConnect(child.p))
        else:
            _replace(child)
