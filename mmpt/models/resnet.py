"""Residual networks whose last grid is the tokens: ResNet (He et al. 2016) and CLIP's modification of it.

plain:    a 7 x 7 stem, the stride in each stage's first 3 x 3 convolution ("v1.5", as torchvision and NVIDIA have it).
modified: a stem of three 3 x 3 convolutions, and every stride an average over 2 x 2 instead (Radford et al. 2021,
          section 2.4; the stem and the shortcut after He et al. 2019, ResNet-D; the averaging after Zhang 2019).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d, relu
from torch.utils.checkpoint import checkpoint

from mmpt.batch import Pictures, Tokens, pack_equal
from mmpt.inputs import PictureSpec
from mmpt.models.batch_norm import BatchNorm
from mmpt.models.grid import grid_tokens, square_pixels
from mmpt.models.image import CLIP_MEAN, CLIP_STD
from mmpt.models.pooling import mean_token
from mmpt.models.tower import ImageTower, no_summary
from mmpt.models.transformer import initialise_linear
from mmpt.ops.attention import attention

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
EXPANSION, STRIDE = 4, 32
"""Width of a block's output as a multiple of its bottleneck; pixels to a place of the last grid."""
DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
"""Blocks of each stage (He et al. 2016, table 1)."""
CLIP_SIZES = {
    "RN50": ((3, 4, 6, 3), 64, 224, 1024),
    "RN101": ((3, 4, 23, 3), 64, 224, 512),
    "RN50x4": ((4, 6, 10, 6), 80, 288, 640),
    "RN50x16": ((6, 8, 18, 8), 96, 384, 768),
    "RN50x64": ((3, 15, 36, 10), 128, 448, 1024),
}
"""(blocks of each stage, bottleneck of the first, image size, embed_dim) of CLIP's (Radford et al. 2021, table 19)."""


@dataclass(frozen=True)
class ResNetConfig:
    depths: tuple[int, int, int, int] = (3, 4, 6, 3)
    """Blocks of each stage."""
    bottleneck: int = 64
    """Width of the first stage's bottlenecks; it doubles with every stage, and blocks give out 4 times as much."""
    form: Literal["plain", "modified"] = "plain"
    """As published by He et al., or as CLIP modified it."""
    pool: Literal["mean", "attention", "none"] = "mean"
    """The summary: the mean over the grid, CLIP's attention by the mean, or none."""
    embed_dim: int = 0
    """Width of what attention gives out: the shared space itself (towers.project_image is then false)."""
    image_size: int = 224
    """Height and width of the input, in pixels: a multiple of 32."""
    kept_places: int = 0
    """Places of the grid that are kept in training, drawn at random (Pixel-BERT: 100); 0 keeps all."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean of each channel, in units of 255."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Standard deviation of each channel, in units of 255."""
    checkpoint_activations: bool = False
    """Keep only each block's input and compute the rest again in the backward."""

    def __post_init__(self) -> None:
        if self.image_size % STRIDE:
            raise ValueError(f"a ResNet wants images of a multiple of {STRIDE} pixels, got {self.image_size}")
        if not 0 <= self.kept_places <= self.places:
            raise ValueError(f"kept_places lies between 0 and the {self.places} places, got {self.kept_places}")
        if (self.pool == "attention") != (self.embed_dim > 0):
            raise ValueError(f"embed_dim is attention's alone: got {self.embed_dim} with pool {self.pool!r}")
        if self.pool == "attention" and self.kept_places:
            raise ValueError("attention pooling has a position for every place: kept_places must be 0")
        if self.pool == "attention" and self.width % 64:
            raise ValueError(f"attention pooling has heads of 64 numbers, which do not divide the width {self.width}")

    @property
    def places(self) -> int:
        """P, places of the last grid."""
        return (self.image_size // STRIDE) ** 2

    @property
    def width(self) -> int:
        return 8 * EXPANSION * self.bottleneck

    @property
    def summary_width(self) -> int:
        return {"mean": self.width, "attention": self.embed_dim, "none": 0}[self.pool]

    def inputs(self) -> PictureSpec:
        return PictureSpec(
            image_size=self.image_size, patches=self.places, kept_patches=self.kept_places or self.places
        )

    def build(self) -> "ResNet":
        return ResNet(self)


def resnet(layers: Literal[50, 101, 152], image_size: int = 224, kept_places: int = 0) -> ResNetConfig:
    """A published ResNet."""
    return ResNetConfig(DEPTHS[layers], image_size=image_size, kept_places=kept_places)


def clip_resnet(size: Literal["RN50", "RN101", "RN50x4", "RN50x16", "RN50x64"]) -> ResNetConfig:
    """A published ResNet of CLIP."""
    depths, bottleneck, image_size, embed_dim = CLIP_SIZES[size]
    return ResNetConfig(
        depths, bottleneck, "modified", "attention", embed_dim, image_size, mean=CLIP_MEAN, std=CLIP_STD
    )


class PlainStem(nn.Module):
    """[B, 3, S, S] -> [B, D, S / 4, S / 4]"""

    def __init__(self, width: int):
        super().__init__()
        self.conv_1, self.norm_1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False), BatchNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return max_pool2d(relu(self.norm_1(self.conv_1(x))), 3, stride=2, padding=1)


class ModifiedStem(nn.Module):
    """[B, 3, S, S] -> [B, D, S / 4, S / 4]"""

    def __init__(self, width: int):
        super().__init__()
        half = width // 2
        self.conv_1, self.norm_1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False), BatchNorm(half)
        self.conv_2, self.norm_2 = nn.Conv2d(half, half, 3, padding=1, bias=False), BatchNorm(half)
        self.conv_3, self.norm_3 = nn.Conv2d(half, width, 3, padding=1, bias=False), BatchNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.norm_1(self.conv_1(x)))
        x = relu(self.norm_2(self.conv_2(x)))
        return avg_pool2d(relu(self.norm_3(self.conv_3(x))), 2)


class Bottleneck(nn.Module):
    """relu(shortcut(x) + norm(1 x 1(relu(norm(3 x 3(relu(norm(1 x 1(x)))))))))"""

    def __init__(self, width_in: int, bottleneck: int, stride: int, form: Literal["plain", "modified"]):
        super().__init__()
        out = EXPANSION * bottleneck
        self.averaged = stride if form == "modified" else 1
        stride = 1 if form == "modified" else stride
        self.conv_1, self.norm_1 = nn.Conv2d(width_in, bottleneck, 1, bias=False), BatchNorm(bottleneck)
        self.conv_2 = nn.Conv2d(bottleneck, bottleneck, 3, stride=stride, padding=1, bias=False)
        self.norm_2 = BatchNorm(bottleneck)
        self.conv_3, self.norm_3 = nn.Conv2d(bottleneck, out, 1, bias=False), BatchNorm(out)
        self.changes = width_in != out or max(stride, self.averaged) > 1
        if self.changes:
            self.shortcut, self.norm_shortcut = nn.Conv2d(width_in, out, 1, stride=stride, bias=False), BatchNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        y = relu(self.norm_1(self.conv_1(x)))
        y = self._average(relu(self.norm_2(self.conv_2(y))))
        y = self.norm_3(self.conv_3(y))
        return relu(y + (self.norm_shortcut(self.shortcut(self._average(x))) if self.changes else x))

    def _average(self, x: Tensor) -> Tensor:
        return avg_pool2d(x, self.averaged) if self.averaged > 1 else x


class GridAttention(nn.Module):
    """Tokens of B equally long sequences [B * P, D] -> [B, E]: the mean, put before them, looks at all; heads of 64."""

    def __init__(self, places: int, width: int, embed_dim: int):
        super().__init__()
        self.heads = width // 64
        self.positions = nn.Parameter(torch.empty(1 + places, width))
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, embed_dim)
        nn.init.normal_(self.positions, std=width**-0.5)
        for linear in (self.q, self.kv, self.out):
            initialise_linear(linear, width**-0.5)

    def forward(self, tokens: Tokens) -> Tensor:
        x = tokens.x.unflatten(0, (-1, tokens.longest))  # [B, P, D]
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + self.positions
        everything = pack_equal(x)
        query = self.q(x[:, 0]).unflatten(1, (self.heads, -1))  # [B, H, Dh]
        key, value = self.kv(everything.x).unflatten(1, (2, self.heads, -1)).unbind(1)
        return self.out(attention(query, key, value, pack_equal(x[:, :1]), key_sequences=everything).flatten(1))


class ResNet(ImageTower):
    """Pictures -> Tokens [B * P, D], the places of the last grid, row by row."""

    def __init__(self, config: ResNetConfig):
        super().__init__()
        self.config = config
        stem = config.bottleneck
        self.embedding = ModifiedStem(stem) if config.form == "modified" else PlainStem(stem)
        blocks, width = [], stem
        for stage, depth in enumerate(config.depths):
            for i in range(depth):
                stride = 2 if stage and not i else 1
                blocks.append(Bottleneck(width, stem << stage, stride, config.form))
                width = EXPANSION * (stem << stage)
        self.blocks = nn.ModuleList(blocks)
        attends = config.pool == "attention"
        self.pooling = GridAttention(config.places, config.width, config.embed_dim) if attends else None
        self.init_weights()

    def init_weights(self) -> None:
        """He's normal for the plain form; the modified keeps torch's convolutions, as CLIP's released code does, and
        its blocks begin as identities."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and self.config.form == "plain":
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, Bottleneck) and self.config.form == "modified":
                nn.init.zeros_(module.norm_3.weight)

    def forward(self, pictures: Pictures) -> Tokens:
        pixels = square_pixels(pictures, self.config.image_size, self.config.mean, self.config.std)
        x = self.embedding(pixels.to(self.embedding.conv_1.weight.dtype))
        saving = self.config.checkpoint_activations and torch.is_grad_enabled()
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if saving else block(x)
        return grid_tokens(x, pictures.kept_patches)  # from [B, D, S / 32, S / 32]

    def summary(self, tokens: Tokens) -> Tensor:
        if self.pooling is not None:
            return self.pooling(tokens)
        if self.config.pool == "none":
            raise no_summary(self)
        return mean_token(tokens)

    def local(self, tokens: Tokens) -> Tokens:
        return tokens
