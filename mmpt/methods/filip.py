"""FILIP: Fine-grained Interactive Language-Image Pre-Training.
Yao, Huang, Hou, Lu, Niu, Xu, Liang, Li, Jiang, Xu. ICLR 2022, arXiv 2111.07783.

New: CLIP's product of two vectors becomes a late interaction of tokens: each patch finds its best word, each word its
best patch, and the means of these maxima are the two scores of a pair (section 3.1, eq. 3 to 5).

Image tokens are the patches, without [CLS]; text tokens include [SOT] and [EOT], as in the authors' later Noah-Wukong.
"""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from mmpt.batch import Batch, Pictures, Tokens
from mmpt.inputs import InputSpec
from mmpt.methods.method import Method, Term, contrastive_terms
from mmpt.models.batch_norm import use_batch_norm
from mmpt.models.dual_tower import DualTower, DualTowerConfig
from mmpt.models.logit_scale import LogitScale
from mmpt.ops.batch_norm import batch_norm
from mmpt.ops.bounded import capped_exp
from mmpt.ops.contrast.loss import ContrastConfig, contrast
from mmpt.ops.late_interaction.op import WinnersPolicy, late_interaction
from mmpt.ops.token_selection import drop_ends, keep_top_tokens, with_zero_pads, without_zero_pads


@dataclass(frozen=True)
class FILIPConfig:
    towers: DualTowerConfig
    initial_temperature: float = 0.07
    """Logits start divided by this."""
    max_logit_scale: float = 100.0
    """Logits are never multiplied by more."""
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    winners: WinnersPolicy = "auto"
    """Where each maximum was found: stored for the backward, found again there, or stored if that takes up to 4 GiB."""
    text_special_tokens: bool = True
    """Whether [SOT] and [EOT] take part in the late interaction."""
    token_keep_ratio: float = 1.0
    """Share of each sample's tokens that train: those with the highest similarity to any token of the other side."""
    scope: Literal["local", "global"] = "local"
    """Where a token's highest similarity is looked for: in this worker's batch, as published, or in all workers'."""
    zero_pads: bool = False
    """Patches may choose a pad of a text that is shorter than the longest allowed; its vector is zero, as in
    Noah-Wukong's released models."""

    def __post_init__(self) -> None:
        if not 0 < self.token_keep_ratio <= 1:
            raise ValueError(f"token_keep_ratio is a share in (0, 1], got {self.token_keep_ratio}")
        if self.zero_pads and (self.token_keep_ratio < 1 or not self.text_special_tokens):
            raise ValueError("zero_pads is a released model's way: it goes with all tokens, special ones included")

    def inputs(self) -> InputSpec:
        return self.towers.inputs()

    def build(self) -> "FILIP":
        return FILIP(self)


class FILIP(Method):
    couples_pairs = True
    ensemble = "similarities"

    def __init__(self, config: FILIPConfig):
        super().__init__()
        self.config = config
        self.towers = DualTower(config.towers, of="tokens")
        self.logit_scale = LogitScale(config.initial_temperature, config.max_logit_scale, capped_exp)
        use_batch_norm(self, batch_norm)

    def encode_image(self, pictures: Pictures) -> Tokens:
        """A vector of length 1 per patch."""
        return self.towers.image_tokens(pictures)

    def encode_text(self, ids: Tokens) -> Tokens:
        """A vector of length 1 per text token."""
        tokens = self.towers.text_tokens(ids)
        if self.config.zero_pads:
            return with_zero_pads(tokens, self.config.inputs().max_text_tokens)
        return tokens if self.config.text_special_tokens else drop_ends(tokens)

    def encode(self, batch: Batch) -> tuple[Tokens, Tokens]:
        return self.encode_image(batch.pictures), self.encode_text(batch.text)

    def objective(self, image: Tokens, text: Tokens) -> dict[str, Term]:
        if self.config.token_keep_ratio < 1.0:
            image, text = keep_top_tokens(image, text, self.config.token_keep_ratio, self.config.scope)
        scale = self.logit_scale()
        found = contrast(self.score, image, text, scale, self.config.contrast)
        return contrastive_terms(found, len(image.offsets) - 1, scale)

    def counts(self, batch: Batch) -> dict[str, float]:
        return {"contrastive": len(batch)}

    def score(self, image: Tokens, text: Tokens) -> tuple[Tensor, Tensor]:
        """(s_i2t, s_t2i), [A, C] each, of every image with every text."""
        i2t, t2i = late_interaction(image, text, self.config.winners)
        return i2t, t2i * without_zero_pads(text) if self.config.zero_pads else t2i
