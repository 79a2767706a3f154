"""METER: An Empirical Study of Training End-to-End Vision-and-Language Transformers.
Dou, Xu, Gan, Wang, Wang, Wang, Zhu, Zhang, Yuan, Peng, Liu, Zeng. CVPR 2022, arXiv 2111.02387.

New: which parts matter, tried one by one. What won: whole towers for both sides, then two streams that look at each
other in every block (co-attention, section 2.2), trained by masked words and image-text matching alone; the towers with
a lower learning rate than what joins them.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from mmpt.batch import Batch, Pictures, Tokens
from mmpt.inputs import InputSpec, WordMasking, combined
from mmpt.methods.method import Method, Term
from mmpt.methods.tasks import chosen_rows, guessing_terms, matching_terms
from mmpt.models.batch_norm import use_batch_norm
from mmpt.models.fusion import CoAttention
from mmpt.models.heads import MaskedWordHead, Pooler
from mmpt.models.modality import ModalityEmbedding
from mmpt.models.pooling import first_token
from mmpt.models.tower import ImageTowerConfig, TextTowerConfig
from mmpt.models.transformer import BERT_DEVIATION, TransformerConfig, initialise_linear
from mmpt.objectives.matching import matching_score
from mmpt.ops.batch_norm import batch_norm


@dataclass(frozen=True)
class METERConfig:
    image: ImageTowerConfig
    text: TextTowerConfig
    fusion: TransformerConfig
    """Blocks of each of the two streams."""
    masking: WordMasking = field(default_factory=WordMasking)

    def inputs(self) -> InputSpec:
        return replace(combined(self.image.inputs(), self.text.inputs()), masked_words=self.masking, partners=True)

    def build(self) -> "METER":
        return METER(self)


class METER(Method):
    couples_pairs = False
    fuses = True

    def __init__(self, config: METERConfig):
        super().__init__()
        width = config.fusion.width
        self.image, self.text = config.image.build(), config.text.build()
        self.image_transform = nn.Linear(config.image.width, width)
        self.text_transform = nn.Linear(config.text.width, width)
        self.modality = ModalityEmbedding(2, width)
        self.fusion = CoAttention(config.fusion)
        self.image_pooler, self.text_pooler = Pooler(width), Pooler(width)
        self.match_head = nn.Linear(2 * width, 2)
        self.word_head = MaskedWordHead(width, config.text.inputs().vocab_size)
        for linear in (self.image_transform, self.text_transform, self.match_head):
            initialise_linear(linear, BERT_DEVIATION)
        use_batch_norm(self, batch_norm)

    def encode_image(self, pictures: Pictures) -> Tokens:
        """[T, D], as they enter the co-attention."""
        tokens = self.image(pictures)
        return tokens.with_x(self.modality(self.image_transform(tokens.x), 1))

    def encode_text(self, ids: Tokens) -> Tokens:
        """[T, D], as they enter the co-attention."""
        tokens = self.text(ids)
        return tokens.with_x(self.modality(self.text_transform(tokens.x), 0))

    def pooled(self, text: Tokens, image: Tokens) -> Tensor:
        """[B, 2 D] of pairs that have seen each other, from the first token of each side."""
        words, places = self.fusion(text, image)
        return torch.cat([self.text_pooler(first_token(words)), self.image_pooler(first_token(places))], 1)

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """States and true ids of the masked words; of the pairs what both sides say, and whether they match."""
        assert batch.masked_words is not None and batch.partners is not None
        chosen = chosen_rows(batch.masked_words)
        masked = self.encode_text(batch.text.with_x(batch.masked_words.ids))
        words, _ = self.fusion(masked, self.encode_image(batch.pictures))
        pairs = self.pooled(self.encode_text(batch.text), self.encode_image(batch.partners.pictures))
        return words.x[chosen], batch.text.x[chosen], pairs, batch.partners.matches

    def objective(self, states: Tensor, words: Tensor, pairs: Tensor, matches: Tensor) -> dict[str, Term]:
        return {
            **guessing_terms("words", self.word_head(states), words),
            **matching_terms(self.match_head(pairs), matches),
        }

    def counts(self, batch: Batch) -> dict[str, float]:
        assert batch.masked_words is not None
        return {"words": batch.masked_words.count, "matching": len(batch)}

    def score_pairs(self, image: Tokens, text: Tokens) -> Tensor:
        """[B], the log odds that each image and its text belong together."""
        return matching_score(self.match_head(self.pooled(text, image)))
