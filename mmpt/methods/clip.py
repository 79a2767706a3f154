"""Learning Transferable Visual Models From Natural Language Supervision.
Radford, Kim, Hallacy, Ramesh, Goh, Agarwal, Sastry, Askell, Mishkin, Clark, Krueger, Sutskever.
ICML 2021, arXiv 2103.00020.

New: an image and its caption are told from all others in a large batch by the cosine of one vector each.
"""

from dataclasses import dataclass, field

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
from mmpt.ops.similarity import similarity


@dataclass(frozen=True)
class CLIPConfig:
    towers: DualTowerConfig
    initial_temperature: float = 0.07
    """Logits start divided by this."""
    max_logit_scale: float = 100.0
    """Logits are never multiplied by more."""
    contrast: ContrastConfig = field(default_factory=ContrastConfig)

    def inputs(self) -> InputSpec:
        return self.towers.inputs()

    def build(self) -> "CLIP":
        return CLIP(self)


class CLIP(Method):
    couples_pairs = True

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.contrast = config.contrast
        self.towers = DualTower(config.towers, of="summary")
        self.logit_scale = LogitScale(config.initial_temperature, config.max_logit_scale, capped_exp)
        use_batch_norm(self, batch_norm)

    def encode_image(self, pictures: Pictures) -> Tensor:
        """[B, embed_dim] from [CLS]."""
        return self.towers.image_vector(pictures)

    def encode_text(self, ids: Tokens) -> Tensor:
        """[B, embed_dim] from [EOT]."""
        return self.towers.text_vector(ids)

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.encode_image(batch.pictures), self.encode_text(batch.text)

    def objective(self, image: Tensor, text: Tensor) -> dict[str, Term]:
        scale = self.logit_scale()
        return contrastive_terms(contrast(self.score, image, text, scale, self.contrast), len(image), scale)

    def counts(self, batch: Batch) -> dict[str, float]:
        return {"contrastive": len(batch)}

    def score(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines of every image with every text, [A, C], the same in both directions."""
        cosines = similarity(image, text)
        return cosines, cosines
