"""ALIGN: Scaling Up Visual and Vision-Language Representation Learning With Noisy Text Supervision.
Jia, Yang, Xia, Chen, Parekh, Pham, Le, Sung, Li, Duerig. ICML 2021, arXiv 2102.05918.

New: a billion pairs with hardly a filter are enough for two towers and a contrastive loss. The image tower is an
EfficientNet, whose pooled features are not projected; the text tower is BERT, read from [CLS]. Label smoothing in both
softmaxes, and a learned temperature that starts at 1 and divides (section 4.1 and 4.2).
"""

from dataclasses import dataclass, field

from torch import Tensor

from mmpt.batch import Batch, Pictures, Tokens
from mmpt.inputs import InputSpec
from mmpt.methods.method import Method, Term, contrastive_terms
from mmpt.models.batch_norm import use_batch_norm
from mmpt.models.dual_tower import DualTower, DualTowerConfig
from mmpt.models.logit_scale import Temperature
from mmpt.ops.batch_norm import batch_norm
from mmpt.ops.bounded import bounded
from mmpt.ops.contrast.loss import ContrastConfig, contrast
from mmpt.ops.similarity import similarity

LOWEST_TEMPERATURE = 0.001
"""The paper has no bound; below this the softmax of cosines is an argmax and the loss of a wrong pair overflows."""


@dataclass(frozen=True)
class ALIGNConfig:
    towers: DualTowerConfig
    initial_temperature: float = 1.0
    """Logits start divided by this; it is learned."""
    contrast: ContrastConfig = field(default_factory=lambda: ContrastConfig(label_smoothing=0.1))

    def inputs(self) -> InputSpec:
        return self.towers.inputs()

    def build(self) -> "ALIGN":
        return ALIGN(self)


class ALIGN(Method):
    couples_pairs = True

    def __init__(self, config: ALIGNConfig):
        super().__init__()
        self.contrast = config.contrast
        self.towers = DualTower(config.towers, of="summary")
        self.temperature = Temperature(config.initial_temperature, LOWEST_TEMPERATURE, float("inf"), bounded)
        use_batch_norm(self, batch_norm)

    def encode_image(self, pictures: Pictures) -> Tensor:
        """[B, embed_dim], the pooled features."""
        return self.towers.image_vector(pictures)

    def encode_text(self, ids: Tokens) -> Tensor:
        """[B, embed_dim] from [CLS]."""
        return self.towers.text_vector(ids)

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.encode_image(batch.pictures), self.encode_text(batch.text)

    def objective(self, image: Tensor, text: Tensor) -> dict[str, Term]:
        scale = self.temperature()
        return contrastive_terms(contrast(self.score, image, text, scale, self.contrast), len(image), scale)

    def counts(self, batch: Batch) -> dict[str, float]:
        return {"contrastive": len(batch)}

    def score(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines of every image with every text, [A, C], the same in both directions."""
        cosines = similarity(image, text)
        return cosines, cosines
