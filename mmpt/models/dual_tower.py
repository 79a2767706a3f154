"""Two towers into one space: the architecture of CLIP (Radford et al. 2021) and of all that followed."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from mmpt.batch import InputSpec
from mmpt.models.image import ViT, ViTConfig
from mmpt.models.text import TextTransformer, TextTransformerConfig


@dataclass(frozen=True)
class DualTowerConfig:
    image: ViTConfig
    text: TextTransformerConfig
    embed_dim: int
    """Width of the shared space: of CLIP's one vector, of each of FILIP's token vectors."""

    def inputs(self) -> InputSpec:
        return InputSpec(
            image_size=self.image.image_size,
            max_text_tokens=self.text.max_tokens,
            vocab_size=self.text.vocab_size,
            patches=self.image.patches,
            kept_patches=self.image.kept_patches,
        )


class DualTower(nn.Module):
    """`image` and `text` towers, each with a projection without bias. Projected features have length 1."""

    def __init__(self, config: DualTowerConfig):
        super().__init__()
        self.image, self.text = ViT(config.image), TextTransformer(config.text)
        self.image_projection = nn.Linear(config.image.trunk.width, config.embed_dim, bias=False)
        self.text_projection = nn.Linear(config.text.trunk.width, config.embed_dim, bias=False)
        nn.init.normal_(self.image_projection.weight, std=config.image.trunk.width**-0.5)
        nn.init.normal_(self.text_projection.weight, std=config.text.trunk.width**-0.5)

    def project_image(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., embed_dim], each row of length 1."""
        return unit(self.image_projection(x))

    def project_text(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., embed_dim], each row of length 1."""
        return unit(self.text_projection(x))


def unit(x: Tensor) -> Tensor:
    """Each row scaled to length 1: the length is taken in at least fp32, the type stays."""
    return normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1).to(x.dtype)
