"""Regions that a detector found, as tokens (Chen et al. 2020, UNITER, section 3.1)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmpt.batch import Pictures, Tokens
from mmpt.inputs import PictureSpec, RegionSpec
from mmpt.models.heads import tie
from mmpt.models.transformer import BERT_DEVIATION, initialise_linear

LOCATION = 7
"""x1, y1, x2, y2, width, height, area."""


@dataclass(frozen=True)
class RegionEmbeddingConfig:
    width: int
    """D, the width of a token."""
    features: int = 2048
    """F, numbers in a region's feature vector."""
    classes: int = 1601
    """C, classes of the detector, background included."""
    most: int = 100
    """The most regions of an image that are used."""
    norm_eps: float = 1e-12
    """Added to the variance in the layer norms."""
    dropout: float = 0.1
    """Dropout on the sum."""

    def inputs(self) -> PictureSpec:
        return PictureSpec(image_size=0, regions=RegionSpec(width=self.features, classes=self.classes, most=self.most))


class RegionEmbedding(nn.Module):
    """norm(norm(linear(feature)) + norm(linear(location)) + type 1), then dropout: Pictures -> Tokens [R, D].

    The feature of a region to be guessed is replaced by a learned vector. types: BERT's token type embedding, of which
    texts have the first row and regions the second.
    """

    def __init__(self, config: RegionEmbeddingConfig, types: nn.Parameter):
        super().__init__()
        self.feature, self.location = nn.Linear(config.features, config.width), nn.Linear(LOCATION, config.width)
        self.feature_norm = nn.LayerNorm(config.width, config.norm_eps)
        self.location_norm = nn.LayerNorm(config.width, config.norm_eps)
        self.norm, self.dropout = nn.LayerNorm(config.width, config.norm_eps), nn.Dropout(config.dropout)
        self.mask = nn.Parameter(torch.empty(config.features))
        tie(self, "types", types)
        for linear in (self.feature, self.location):
            initialise_linear(linear, BERT_DEVIATION)
        nn.init.normal_(self.mask, std=BERT_DEVIATION)

    def forward(self, pictures: Pictures, masked: Tensor | None = None) -> Tokens:
        """masked: [R] bool, regions to be guessed. ValueError for pictures without regions."""
        if pictures.regions is None:
            raise ValueError("a region embedding takes regions, not pixels or patches")
        regions = pictures.regions
        features = regions.features.x.to(self.mask.dtype)
        if masked is not None:
            features = torch.where(masked[:, None], self.mask, features)
        x = self.feature_norm(self.feature(features)) + self.location_norm(self.location(regions.boxes.to(features)))
        return regions.features.with_x(self.dropout(self.norm(x + self.types[1])))  # type: ignore[index]
