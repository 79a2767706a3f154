"""Two towers into one space: the architecture of CLIP (Radford et al. 2021) and of all that followed."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from mmpt.batch import Pictures, Tokens
from mmpt.inputs import InputSpec, combined
from mmpt.models.tower import ImageTowerConfig, TextTowerConfig
from mmpt.models.transformer import initialise_linear


@dataclass(frozen=True)
class DualTowerConfig:
    image: ImageTowerConfig
    text: TextTowerConfig
    embed_dim: int
    """Width of the shared space: of CLIP's one vector, of each of FILIP's token vectors."""
    project_image: bool = True
    """Whether image features are projected; where not (ALIGN, CLIP's ResNets) they must be embed_dim wide."""
    image_projection_bias: bool = False
    """Whether the image projection has a bias (DeCLIP's FILIP)."""
    text_projection_bias: bool = False
    """Whether the text projection has a bias (ALIGN, as transformers has it: yes; CLIP: no)."""

    def inputs(self) -> InputSpec:
        return combined(self.image.inputs(), self.text.inputs())


class DualTower(nn.Module):
    """`image` and `text` towers, each with a projection. Projected features have length 1.

    of: what is projected, the towers' summaries or their tokens. ValueError where a tower does not have it, or has it
    in another width than embed_dim and no projection.
    """

    def __init__(self, config: DualTowerConfig, of: Literal["summary", "tokens"]):
        super().__init__()
        image_width, text_width = (
            tower.summary_width if of == "summary" else tower.width for tower in (config.image, config.text)
        )
        if min(image_width, text_width) < 1:
            raise ValueError("the method reads one vector per image and text; a tower is configured to have no summary")
        if not config.project_image and image_width != config.embed_dim:
            raise ValueError(
                f"embed_dim is {config.embed_dim}, the image tower's width {image_width}, and nothing projects"
            )
        self.image, self.text = config.image.build(), config.text.build()
        self.image_projection: nn.Module = nn.Identity()
        if config.project_image:
            self.image_projection = _projection(image_width, config.embed_dim, config.image_projection_bias)
        self.text_projection = _projection(text_width, config.embed_dim, config.text_projection_bias)

    def image_vector(self, pictures: Pictures) -> Tensor:
        """[B, embed_dim], each row of length 1."""
        return unit(self.image_projection(self.image.summary(self.image(pictures))))

    def text_vector(self, ids: Tokens) -> Tensor:
        """[B, embed_dim], each row of length 1."""
        return unit(self.text_projection(self.text.summary(self.text(ids))))

    def image_tokens(self, pictures: Pictures) -> Tokens:
        """[T, embed_dim], each row of length 1: a vector per place of the image."""
        places = self.image.local(self.image(pictures))
        return places.with_x(unit(self.image_projection(places.x)))

    def text_tokens(self, ids: Tokens) -> Tokens:
        """[T, embed_dim], each row of length 1: a vector per token of the text."""
        tokens = self.text(ids)
        return tokens.with_x(unit(self.text_projection(tokens.x)))


def _projection(width: int, embed_dim: int, bias: bool = False) -> nn.Linear:
    linear = nn.Linear(width, embed_dim, bias=bias)
    initialise_linear(linear, width**-0.5)
    return linear


def unit(x: Tensor) -> Tensor:
    """Each row scaled to length 1: the length is taken in at least fp32, the type stays."""
    return normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1).to(x.dtype)
