"""Sigmoid Loss for Language Image Pre-Training.
Zhai, Mustafa, Kolesnikov, Beyer. ICCV 2023, arXiv 2303.15343.

New: instead of one softmax over the batch, every image-text pair is classified on its own as match or not, so that no
rank needs a normaliser from the others.

As published, an image is read by attention with a learned query, and a text, filled up with pads that are attended to
like any token, from its last token. (A tower without pads would be another model.)
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor, nn

from mmpt.batch import Batch, Pictures, Tokens
from mmpt.inputs import InputSpec, combined
from mmpt.methods.method import Method, Term, contrastive_terms
from mmpt.models.dual_tower import unit
from mmpt.models.image import SIZES, ViT, ViTConfig
from mmpt.models.logit_scale import LogitBias, LogitScale
from mmpt.models.pooling import AttentionPooling, last_token
from mmpt.models.text import TextTransformer, TextTransformerConfig
from mmpt.models.transformer import TransformerConfig, initialise_linear
from mmpt.ops.bounded import capped_exp
from mmpt.ops.contrast.loss import ContrastConfig
from mmpt.ops.contrast.sigmoid import sigmoid_contrast
from mmpt.ops.similarity import similarity


@dataclass(frozen=True)
class SigLIPConfig:
    image: ViTConfig
    text: TextTransformerConfig
    initial_temperature: float = 0.1
    """Logits start divided by this."""
    initial_bias: float = -10.0
    """Added to the logits at the start, when almost no pair is a match."""
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    """How images meet the texts of all ranks; smoothing and filtering belong to a softmax."""

    def __post_init__(self) -> None:
        if self.contrast.label_smoothing or self.contrast.filter_below:
            raise ValueError(
                f"contrast.label_smoothing ({self.contrast.label_smoothing}) and contrast.filter_below "
                f"({self.contrast.filter_below}) are 0 here: a sigmoid loss has no softmax"
            )

    def inputs(self) -> InputSpec:
        return replace(combined(self.image.inputs(), self.text.inputs()), text_padding="max")

    def build(self) -> "SigLIP":
        return SigLIP(self)


def published(size: Literal["B", "L"], patch_size: int, image_size: int = 224) -> SigLIPConfig:
    """A released model: both towers of one size, 64 text tokens, a SentencePiece vocabulary of 32,000."""
    width, depth, heads = SIZES[size]
    trunk = TransformerConfig(width, depth, heads, activation="gelu_tanh", norm_eps=1e-6, init="xavier")
    half = (0.5, 0.5, 0.5)
    image = ViTConfig(
        trunk, image_size, patch_size, class_token=False, patch_bias=True, norm_before=False, mean=half, std=half
    )
    return SigLIPConfig(image, TextTransformerConfig(trunk, vocab_size=32_000, max_tokens=64, causal=False))


class SigLIP(Method):
    couples_pairs = True

    def __init__(self, config: SigLIPConfig):
        super().__init__()
        self.contrast = config.contrast
        self.image, self.text = ViT(config.image), TextTransformer(config.text)
        self.image_pooling = AttentionPooling(config.image.trunk)
        self.text_projection = nn.Linear(config.text.trunk.width, config.image.trunk.width)
        initialise_linear(self.text_projection, None)
        self.logit_scale = LogitScale(config.initial_temperature, float("inf"), capped_exp)
        self.logit_bias = LogitBias(config.initial_bias)

    def encode_image(self, pictures: Pictures) -> Tensor:
        """[B, D] from attention over the patches, each row of length 1."""
        return unit(self.image_pooling(self.image(pictures)))

    def encode_text(self, ids: Tokens) -> Tensor:
        """[B, D] from the last token, each row of length 1. Texts come filled up to max_tokens."""
        return unit(self.text_projection(last_token(self.text(ids))))

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.encode_image(batch.pictures), self.encode_text(batch.text)

    def objective(self, image: Tensor, text: Tensor) -> dict[str, Term]:
        scale = self.logit_scale()
        found = sigmoid_contrast(image, text, scale, self.logit_bias(), self.contrast)
        terms = contrastive_terms(found, len(image), scale)
        return {"sigmoid": terms.pop("contrastive"), **terms}

    def counts(self, batch: Batch) -> dict[str, float]:
        return {"sigmoid": len(batch)}

    def score(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines of every image with every text, [A, C], the same in both directions."""
        cosines = similarity(image, text)
        return cosines, cosines
