"""Two towers into one space: the architecture of CLIP (Radford et al. 2021) and of all that followed."""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import normalize

from mmpt.batch import InputSpec, Tokens
from mmpt.models.image import ViT, ViTConfig
from mmpt.models.text import TextTransformer, TextTransformerConfig


@dataclass(frozen=True)
class DualTowerConfig:
    image: ViTConfig
    text: TextTransformerConfig
    embed_dim: int
    """Width of the shared space."""

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
        return normalize(self.image_projection(x), dim=-1)

    def project_text(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., embed_dim], each row of length 1."""
        return normalize(self.text_projection(x), dim=-1)


def first_token(tokens: Tokens) -> Tensor:
    """[B, D], each sequence's first token: [CLS]."""
    return tokens.x[tokens.offsets[:-1].long()]


def last_token(tokens: Tokens) -> Tensor:
    """[B, D], each sequence's last token: [EOT], which truncation keeps."""
    return tokens.x[tokens.offsets[1:].long() - 1]
