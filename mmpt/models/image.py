"""Vision transformer: uint8 images to tokens.

Dosovitskiy et al. 2021, with CLIP's extra layer norm before the blocks (Radford et al. 2021) and patch dropout as in
FLIP (Li et al. 2023): in training only the kept patches are ever embedded.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mmpt.batch import Pictures, Tokens, pack_equal
from mmpt.config import at_least
from mmpt.inputs import PictureSpec
from mmpt.models.pooling import first_token, mean_token, without_first_token
from mmpt.models.positions import positions_of_whole_images
from mmpt.models.tower import ImageTower
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
    """Put a learned [CLS] token first (CLIP: yes; SigLIP: no). Without it the summary is the mean over patches."""
    patch_bias: bool = False
    """Whether the patch projection has a bias (SigLIP: yes; CLIP: no)."""
    norm_before: bool = True
    """CLIP's layer norm between embedding and blocks."""
    norm_after: bool = True
    """Layer norm of what leaves the blocks (without it, the patches of DeCLIP's FILIP)."""
    patch_keep: float = 1.0
    """Share of patches kept in training (FLIP); all are kept in evaluation."""
    mean: tuple[float, float, float] = CLIP_MEAN
    """Mean of each channel, in units of 255."""
    std: tuple[float, float, float] = CLIP_STD
    """Standard deviation of each channel, in units of 255."""
    image_resize: Literal["square", "shorter_side", "native"] = "square"
    """Square crops, or whole images of any shape (ViLT): the shorter side image_size pixels long, or as they are."""
    longest_side: int = 0
    """Most pixels of a side of a whole image."""
    most_patches: int = 0
    """Patches of a whole image that are kept in training, drawn at random (ViLT: 200); 0 keeps all."""

    def __post_init__(self) -> None:
        at_least(1, self, "image_size", "patch_size")
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

    @property
    def width(self) -> int:
        return self.trunk.width

    @property
    def summary_width(self) -> int:
        return self.trunk.width

    def inputs(self) -> PictureSpec:
        whole = self.image_resize != "square"
        return PictureSpec(
            image_size=self.image_size,
            patches=0 if whole else self.patches,
            kept_patches=0 if whole else self.kept_patches,
            image_resize=self.image_resize,
            longest_side=self.longest_side,
            patch_size=self.patch_size if whole else 0,
            most_patches=self.most_patches,
        )

    def build(self) -> "ViT":
        return ViT(self)


def vit(
    size: Literal["Ti", "S", "B", "L", "H"], patch_size: int, activation: Literal["gelu", "quick_gelu"]
) -> ViTConfig:
    """A published size at 224 pixels, as CLIP builds it."""
    width, depth, heads = SIZES[size]
    return ViTConfig(TransformerConfig(width, depth, heads, activation=activation), patch_size=patch_size)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(x / 255 - mean) / std for each channel: [B, 3, ...] uint8 -> the same in fp32.

    The constants are numbers and not buffers, which an engine would round to its own precision.
    """
    channels = [(images[:, c].float() - 255 * mean[c]) / (255 * std[c]) for c in range(3)]
    return torch.stack(channels, dim=1)


class PatchEmbedding(nn.Module):
    """Pictures -> Tokens [T, D], [CLS] first if there is one: normalise, cut into patches, project, add positions."""

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

    def forward(self, pictures: Pictures) -> Tokens:
        if pictures.patches is not None:
            return self._whole_images(pictures, pictures.patches)
        if pictures.pixels is None:
            raise ValueError("a vision transformer takes pixels or patches, not regions")
        patches, kept_patches = self._cut(pictures.pixels), pictures.kept_patches  # [B, P, 3 * S * S]
        positions = self._positions().expand(len(patches), -1, -1)
        if kept_patches is not None:
            patches = patches.gather(1, kept_patches[..., None].expand(-1, -1, patches.shape[-1]))  # [B, K, ...]
            positions = positions.gather(1, kept_patches[..., None].expand(-1, -1, positions.shape[-1]))
        x = self.patch(patches) + positions
        if self.class_embedding is None:
            return pack_equal(x)
        first = (self.class_embedding + self.position_embedding[0]).expand(len(x), 1, -1)
        return pack_equal(torch.cat([first.to(x.dtype), x], dim=1))

    def _positions(self) -> Tensor:
        return self.position_embedding[int(self.config.class_token) :]

    def _cut(self, images: Tensor) -> Tensor:
        """Normalised pixels of each patch in the order (channel, row, column), as a convolution's weights have them."""
        size, grid = self.config.patch_size, self.config.image_size // self.config.patch_size
        if images.shape[2:] != (self.config.image_size, self.config.image_size):
            raise ValueError(f"the model wants {self.config.image_size}-pixel images, got {tuple(images.shape[2:])}")
        pixels = normalise(images, self.config.mean, self.config.std).to(self.position_embedding.dtype)
        cut = pixels.view(-1, 3, grid, size, grid, size).permute(0, 2, 4, 1, 3, 5)  # [B, gy, gx, 3, S, S]
        return cut.reshape(len(images), grid * grid, -1)

    def _whole_images(self, pictures: Pictures, patches: Tokens) -> Tokens:
        """Each image's positions are the learned grid, stretched to the image's own (ViLT, section 3.1)."""
        assert pictures.grids is not None and pictures.places is not None
        colours = patches.x.unflatten(1, (3, -1))  # [T, 3, S * S]
        pixels = normalise(colours, self.config.mean, self.config.std).flatten(1).to(self.position_embedding.dtype)
        x = self.patch(pixels) + positions_of_whole_images(
            self._positions(), pictures.grids, pictures.places, patches.sequence_index()
        )  # [T, D]
        if self.class_embedding is None:
            return patches.with_x(x)
        return with_first_token(patches.with_x(x), self.class_embedding + self.position_embedding[0])


def with_first_token(tokens: Tokens, first: Tensor) -> Tokens:
    """Every sequence with one token more, `first` [D], at its beginning."""
    count = len(tokens.offsets) - 1
    offsets = tokens.offsets + torch.arange(count + 1, dtype=tokens.offsets.dtype, device=tokens.offsets.device)
    x = tokens.x.new_empty(len(tokens.x) + count, tokens.x.shape[1])
    x = x.index_copy(0, torch.arange(len(tokens.x), device=x.device) + tokens.sequence_index() + 1, tokens.x)
    x = x.index_copy(0, offsets[:-1].long(), first.to(x.dtype).expand(count, -1))
    return Tokens(x, offsets, tokens.longest + 1)


class ViT(ImageTower):
    """Pictures -> Tokens [B * ((1 +) P), D], [CLS] first if there is one. Every token has passed the final layer norm.

    The summary is [CLS], or the mean over patches where there is none.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        self.embedding = PatchEmbedding(config)
        width, eps = config.trunk.width, config.trunk.norm_eps
        self.ln_pre = nn.LayerNorm(width, eps) if config.norm_before else nn.Identity()
        self.trunk = Transformer(config.trunk)
        self.ln_post = nn.LayerNorm(width, eps) if config.norm_after else nn.Identity()

    def forward(self, pictures: Pictures) -> Tokens:
        tokens = self.embedding(pictures)
        tokens = self.trunk(tokens.with_x(self.ln_pre(tokens.x)))
        return tokens.with_x(self.ln_post(tokens.x))

    def summary(self, tokens: Tokens) -> Tensor:
        return first_token(tokens) if self.config.class_token else mean_token(tokens)

    def local(self, tokens: Tokens) -> Tokens:
        return without_first_token(tokens) if self.config.class_token else tokens
