"""Vision transformer: uint8 images to tokens.

Dosovitskiy et al. 2021, with CLIP's extra layer norm before the blocks (Radford et al. 2021) and patch dropout as in
FLIP (Li et al. 2023): in training only the kept patches are ever embedded.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mmpt.batch import Tokens, pack_equal
from mmpt.models.transformer import Transformer, TransformerConfig

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SIZES = {"Ti": (192, 12, 3), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "H": (1280, 32, 16)}
"""(width, depth, heads) of the published sizes."""


@dataclass(frozen=True)
class ViTConfig:
    trunk: TransformerConfig
    image_size: int = 224
    """Height and width of the input, in pixels."""
    patch_size: int = 16
    """Height and width of a patch, in pixels."""
    class_token: bool = True
    """Put a learned [CLS] token first (CLIP: yes; SigLIP: no)."""
    patch_bias: bool = False
    """Whether the patch projection has a bias (SigLIP: yes; CLIP: no)."""
    norm_before: bool = True
    """CLIP's layer norm between embedding and blocks."""
    patch_keep: float = 1.0
    """Share of patches kept in training (FLIP); all are kept in evaluation."""
    mean: tuple[float, float, float] = CLIP_MEAN
    """Mean of each channel, in units of 255."""
    std: tuple[float, float, float] = CLIP_STD
    """Standard deviation of each channel, in units of 255."""

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(f"patches of {self.patch_size} pixels do not tile an image of {self.image_size}")
        if not 0 < self.patch_keep <= 1:
            raise ValueError(f"patch_keep is a share in (0, 1], got {self.patch_keep}")

    @property
    def patches(self) -> int:
        """P, patches per image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def kept_patches(self) -> int:
        """K, patches per image in training."""
        return max(1, round(self.patches * self.patch_keep))


def vit(
    size: Literal["Ti", "S", "B", "L", "H"], patch_size: int, activation: Literal["gelu", "quick_gelu"]
) -> ViTConfig:
    """A published size at 224 pixels, as CLIP builds it."""
    width, depth, heads = SIZES[size]
    return ViTConfig(TransformerConfig(width, depth, heads, activation=activation), patch_size=patch_size)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(x / 255 - mean) / std for each channel: [B, 3, H, W] uint8 -> the same in fp32.

    The constants are numbers and not buffers, which an engine would round to its own precision.
    """
    channels = [(images[:, c].float() - 255 * mean[c]) / (255 * std[c]) for c in range(3)]
    return torch.stack(channels, dim=1)


class PatchEmbedding(nn.Module):
    """[B, 3, H, W] uint8 -> [B, (1 +) P, D]: normalise, cut into patches, project, add positions."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        width, first = config.trunk.width, int(config.class_token)
        self.patch = nn.Linear(3 * config.patch_size**2, width, bias=config.patch_bias)
        self.class_embedding = nn.Parameter(torch.empty(width)) if config.class_token else None
        self.position_embedding = nn.Parameter(torch.empty(first + config.patches, width))
        self.init_weights()

    def init_weights(self) -> None:
        """CLIP's: every embedding with standard deviation D^-1/2."""
        nn.init.normal_(self.patch.weight, std=0.02)
        if self.patch.bias is not None:
            nn.init.zeros_(self.patch.bias)
        for parameter in (self.class_embedding, self.position_embedding):
            if parameter is not None:
                nn.init.normal_(parameter, std=self.config.trunk.width**-0.5)

    def forward(self, images: Tensor, kept_patches: Tensor | None) -> Tensor:
        patches = self._cut(images)  # [B, P, 3 * S * S]
        positions = self.position_embedding[int(self.config.class_token) :].expand(len(patches), -1, -1)
        if kept_patches is not None:
            patches = patches.gather(1, kept_patches[..., None].expand(-1, -1, patches.shape[-1]))  # [B, K, ...]
            positions = positions.gather(1, kept_patches[..., None].expand(-1, -1, positions.shape[-1]))
        x = self.patch(patches) + positions
        if self.class_embedding is None:
            return x
        first = (self.class_embedding + self.position_embedding[0]).expand(len(x), 1, -1)
        return torch.cat([first.to(x.dtype), x], dim=1)

    def _cut(self, images: Tensor) -> Tensor:
        """Normalised pixels of each patch in the order (channel, row, column), as a convolution's weights have them."""
        size, grid = self.config.patch_size, self.config.image_size // self.config.patch_size
        if images.shape[2:] != (self.config.image_size, self.config.image_size):
            raise ValueError(f"the model wants {self.config.image_size}-pixel images, got {tuple(images.shape[2:])}")
        pixels = normalise(images, self.config.mean, self.config.std).to(self.position_embedding.dtype)
        cut = pixels.view(-1, 3, grid, size, grid, size).permute(0, 2, 4, 1, 3, 5)  # [B, gy, gx, 3, S, S]
        return cut.reshape(len(images), grid * grid, -1)


class ViT(nn.Module):
    """images [B, 3, H, W] uint8, kept_patches [B, K] or None -> Tokens [B * ((1 +) P), D], [CLS] first if there is one.

    Every token has passed the final layer norm.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        self.embedding = PatchEmbedding(config)
        width, eps = config.trunk.width, config.trunk.norm_eps
        self.ln_pre = nn.LayerNorm(width, eps) if config.norm_before else nn.Identity()
        self.trunk = Transformer(config.trunk)
        self.ln_post = nn.LayerNorm(width, eps)

    def forward(self, images: Tensor, kept_patches: Tensor | None = None) -> Tokens:
        tokens = pack_equal(self.ln_pre(self.embedding(images, kept_patches)))
        tokens = self.trunk(tokens)
        return tokens.with_x(self.ln_post(tokens.x))
