"""UNITER: UNiversal Image-TExt Representation Learning.
Chen, Li, Yu, El Kholy, Ahmed, Gan, Cheng, Liu. ECCV 2020, arXiv 1909.11740.

New: one transformer over words and detected regions, trained on one task per step, each with conditional masking: where
words are masked all regions are seen, and the other way round. Image-text matching comes with the alignment of words
and regions by optimal transport (section 3.2).

The paper counts a batch in tokens; here it is counted in pairs, so that the order of samples stays exact, and
micro-batches are cut by tokens (engine.max_micro_batch_tokens).
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from mmpt.batch import Batch, Pictures, Tokens
from mmpt.inputs import InputSpec, TextSpec, WordMasking, combined
from mmpt.methods.method import Method, Term
from mmpt.methods.tasks import alignment_term, chosen_rows, guessing_terms, matching_terms, pair_distance
from mmpt.models.bert import BertEmbedding, BertEmbeddingConfig
from mmpt.models.heads import MaskedWordHead, Pooler, RegionClassHead, RegionFeatureHead
from mmpt.models.pooling import first_token
from mmpt.models.regions import RegionEmbedding, RegionEmbeddingConfig
from mmpt.models.transformer import BERT_DEVIATION, Transformer, TransformerConfig, initialise_linear
from mmpt.objectives.matching import matching_score
from mmpt.objectives.regions import class_divergence, class_regression, feature_regression
from mmpt.ops.packing import Joined, join

WORDS, MATCHING, FEATURES, CLASSES, CLASS_DISTRIBUTION = "mlm", "itm", "mrfr", "mrc", "mrckl"
"""Tasks, by the names of the paper."""
COUNTED = {
    WORDS: "words", MATCHING: "matching", FEATURES: "features", CLASSES: "classes", CLASS_DISTRIBUTION: "divergence",
}  # fmt: skip
"""The term of each."""


@dataclass(frozen=True)
class UNITERConfig:
    trunk: TransformerConfig
    text: BertEmbeddingConfig
    regions: RegionEmbeddingConfig
    max_tokens: int = 60
    """Captions are cut to this many tokens, special tokens included."""
    masking: WordMasking = field(default_factory=lambda: WordMasking(at_least_one=True))
    masked_regions: float = 0.15
    """Each region is to be guessed with this probability."""
    match_weight: int = 6
    """How often a step is image-text matching, against the other weights (COCO and SBU as published)."""
    word_weight: int = 8
    """How often a step is masked words."""
    feature_weight: int = 4
    """How often a step is masked regions by feature regression."""
    class_weight: int = 0
    """How often a step is masked regions by the likeliest class; the final model has none."""
    divergence_weight: int = 4
    """How often a step is masked regions by the distribution over classes."""
    alignment_weight: float = 0.1
    """Of the word-region alignment, beside 1 for matching."""

    def __post_init__(self) -> None:
        if not self.trunk.width == self.text.width == self.regions.width:
            widths = f"words ({self.text.width}), regions ({self.regions.width}) and blocks ({self.trunk.width})"
            raise ValueError(f"{widths} must be equally wide")
        if not self.regions.classes and self.class_weight + self.divergence_weight:
            raise ValueError(
                "class_weight and divergence_weight are 0 where regions.classes is: there is none to guess"
            )
        if not self.tasks():
            raise ValueError("every task has weight 0: there is nothing to train on")

    def tasks(self) -> tuple[tuple[str, int], ...]:
        weights = {MATCHING: self.match_weight, WORDS: self.word_weight, FEATURES: self.feature_weight,
                   CLASSES: self.class_weight, CLASS_DISTRIBUTION: self.divergence_weight}  # fmt: skip
        return tuple((task, weight) for task, weight in weights.items() if weight)

    def inputs(self) -> InputSpec:
        text = TextSpec(max_text_tokens=self.max_tokens, vocab_size=self.text.vocab_size)
        return replace(
            combined(self.regions.inputs(), text), masked_words=self.masking, masked_regions=self.masked_regions,
            partners=True, tasks=self.tasks(),
        )  # fmt: skip

    def build(self) -> "UNITER":
        return UNITER(self)


class UNITER(Method):
    couples_pairs = False
    fuses = True

    def __init__(self, config: UNITERConfig):
        super().__init__()
        self.config, width = config, config.trunk.width
        self.text = BertEmbedding(config.text)
        self.image = RegionEmbedding(config.regions, self.text.type_embedding)
        self.trunk = Transformer(config.trunk)
        self.pooler, self.match_head = Pooler(width), nn.Linear(width, 2)
        self.word_head = MaskedWordHead(width, config.text.vocab_size, self.text.token_embedding)
        self.feature_head = RegionFeatureHead(width, self.image.feature.weight)
        self.class_head = RegionClassHead(width, config.regions.classes) if config.regions.classes else None
        initialise_linear(self.match_head, BERT_DEVIATION)

    def encode_image(self, pictures: Pictures, masked: Tensor | None = None) -> Tokens:
        """Regions [R, D], as they enter the transformer; masked: [R] bool, those to be guessed."""
        return self.image(pictures, masked)

    def encode_text(self, ids: Tokens) -> Tokens:
        """Words [T, D], as they enter the transformer."""
        return self.text(ids)

    def fuse(self, text: Tokens, image: Tokens) -> Joined:
        """All tokens of each pair in one sequence, words first, [T, D]."""
        joined = join(text, image)
        return joined._replace(tokens=self.trunk(joined.tokens))

    def encode(self, batch: Batch) -> tuple[str, Tensor, Tensor, Tensor]:
        """(task, states that answer, true answers, distances). Distances are those of matching, else empty."""
        if batch.task == MATCHING:
            return self._encode_matching(batch)
        regions = batch.pictures.regions
        assert regions is not None
        none = regions.boxes.new_zeros(0)
        if batch.task == WORDS:
            assert batch.masked_words is not None
            pairs = self.fuse(
                self.encode_text(batch.text.with_x(batch.masked_words.ids)), self.encode_image(batch.pictures)
            )
            chosen = chosen_rows(batch.masked_words)
            return WORDS, pairs.tokens.x[pairs.first_rows[chosen]], batch.text.x[chosen], none
        masked = batch.masked_regions
        assert masked is not None and batch.task in (FEATURES, CLASSES, CLASS_DISTRIBUTION), batch.task
        pairs = self.fuse(self.encode_text(batch.text), self.encode_image(batch.pictures, masked.chosen))
        chosen = chosen_rows(masked)
        answers = regions.features.x if batch.task == FEATURES else regions.classes
        return batch.task, pairs.tokens.x[pairs.second_rows[chosen]], answers[chosen], none

    def _encode_matching(self, batch: Batch) -> tuple[str, Tensor, Tensor, Tensor]:
        assert batch.partners is not None
        text, image = self.encode_text(batch.text), self.encode_image(batch.partners.pictures)
        pairs = self.fuse(text, image)
        distance = pair_distance(pairs, text, image, text_ends=True, image_first=True)
        return MATCHING, first_token(pairs.tokens), batch.partners.matches, distance

    def objective(self, task: str, states: Tensor, answers: Tensor, distance: Tensor) -> dict[str, Term]:
        if task == WORDS:
            return guessing_terms("words", self.word_head(states), answers)
        if task == MATCHING:
            terms = matching_terms(self.match_head(self.pooler(states)), answers)
            return terms | {"alignment": alignment_term(distance, answers, self.config.alignment_weight)}
        count = torch.full((), float(len(states)), device=states.device)
        if task == FEATURES:
            return {"features": Term(feature_regression(self.feature_head(states), answers), count)}
        assert self.class_head is not None
        loss = class_regression if task == CLASSES else class_divergence
        return {COUNTED[task]: Term(loss(self.class_head(states), answers), count)}

    def counts(self, batch: Batch) -> dict[str, float]:
        if batch.task == MATCHING:
            return {"matching": len(batch), "alignment": len(batch)}
        masked = batch.masked_words if batch.task == WORDS else batch.masked_regions
        assert masked is not None
        return {COUNTED[batch.task]: masked.count}

    def score_pairs(self, image: Tokens, text: Tokens) -> Tensor:
        """[B], the log odds that each image and its text belong together."""
        return matching_score(self.match_head(self.pooler(first_token(self.fuse(text, image).tokens))))
