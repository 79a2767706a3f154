"""ViLT: Vision-and-Language Transformer Without Convolution or Region Supervision.
Kim, Son, Kim. ICML 2021, arXiv 2102.03334.

New: patches go through one linear layer straight into one transformer with the words; nothing sees an image or a text
alone. Trained by masked words (on true pairs), and by image-text matching with word-patch alignment (on pairs of which
half have another image of the data set): two passes per step (section 3.2 and 4.2).

Images keep their shape; positions are stretched to it, image by image. The image's [CLS] is a token like the patches,
as in the released code. Order and number of patches are the same at every evaluation, which the released code's are
not.
"""

from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from mmpt.batch import Batch, Pictures, Tokens
from mmpt.inputs import InputSpec, TextSpec, WordMasking, combined
from mmpt.methods.method import Method, Term
from mmpt.methods.tasks import alignment_term, chosen_rows, guessing_terms, matching_terms, pair_distance
from mmpt.models.bert import BertEmbedding, BertEmbeddingConfig
from mmpt.models.heads import MaskedWordHead, Pooler
from mmpt.models.image import PatchEmbedding, ViTConfig
from mmpt.models.modality import ModalityEmbedding
from mmpt.models.pooling import first_token
from mmpt.models.transformer import BERT_DEVIATION, Transformer, initialise_linear
from mmpt.objectives.matching import matching_score
from mmpt.ops.packing import Joined, join


@dataclass(frozen=True)
class ViLTConfig:
    image: ViTConfig
    """Patches, positions and the blocks, which are those of a vision transformer."""
    text: BertEmbeddingConfig
    max_tokens: int = 40
    """Captions are cut to this many tokens, special tokens included."""
    masking: WordMasking = field(default_factory=lambda: WordMasking(whole_words=True))
    alignment_weight: float = 0.1
    """Of the word-patch alignment, beside 1 for masked words and 1 for matching."""

    def __post_init__(self) -> None:
        if self.image.width != self.text.width:
            raise ValueError(f"patches are {self.image.width} wide, words {self.text.width}; one transformer has both")

    def inputs(self) -> InputSpec:
        text = TextSpec(max_text_tokens=self.max_tokens, vocab_size=self.text.vocab_size)
        return replace(combined(self.image.inputs(), text), masked_words=self.masking, partners=True)

    def build(self) -> "ViLT":
        return ViLT(self)


class ViLT(Method):
    couples_pairs = False
    fuses = True

    def __init__(self, config: ViLTConfig):
        super().__init__()
        self.config = config
        width, eps = config.image.width, config.image.trunk.norm_eps
        self.text, self.image = BertEmbedding(config.text), PatchEmbedding(config.image)
        self.dropout = nn.Dropout(config.image.trunk.dropout)
        self.modality = ModalityEmbedding(2, width)
        self.trunk = Transformer(config.image.trunk)
        self.norm = nn.LayerNorm(width, eps)
        self.pooler, self.match_head = Pooler(width), nn.Linear(width, 2)
        self.word_head = MaskedWordHead(width, config.text.vocab_size)
        initialise_linear(self.match_head, BERT_DEVIATION)

    def encode_image(self, pictures: Pictures) -> Tokens:
        """[CLS] and patches [T, D], as they enter the transformer."""
        tokens = self.image(pictures)
        return tokens.with_x(self.modality(self.dropout(tokens.x), 1))

    def encode_text(self, ids: Tokens) -> Tokens:
        """Words [T, D], as they enter the transformer."""
        tokens = self.text(ids)
        return tokens.with_x(self.modality(tokens.x, 0))

    def fuse(self, text: Tokens, image: Tokens) -> Joined:
        """All tokens of each pair in one sequence, words first, [T, D] after the last norm."""
        joined = join(text, image)
        tokens = self.trunk(joined.tokens)
        return joined._replace(tokens=tokens.with_x(self.norm(tokens.x)))

    def encode(self, batch: Batch) -> tuple[Tensor, ...]:
        """Of the masked words states and true ids; of the pairs [CLS], whether they match, and their distance."""
        assert batch.masked_words is not None and batch.partners is not None
        ids, chosen = batch.text, chosen_rows(batch.masked_words)
        masked = self.encode_text(ids.with_x(batch.masked_words.ids))
        words = self.fuse(masked, self.encode_image(batch.pictures))
        text, image = self.encode_text(ids), self.encode_image(batch.partners.pictures)
        pairs = self.fuse(text, image)
        distance = pair_distance(pairs, text, image, text_ends=False, image_first=not self.config.image.class_token)
        states = words.tokens.x[words.first_rows[chosen]]
        return states, ids.x[chosen], first_token(pairs.tokens), batch.partners.matches, distance

    def objective(
        self, states: Tensor, words: Tensor, first: Tensor, matches: Tensor, distance: Tensor
    ) -> dict[str, Term]:
        return {
            **guessing_terms("words", self.word_head(states), words),
            **matching_terms(self.match_head(self.pooler(first)), matches),
            "alignment": alignment_term(distance, matches, self.config.alignment_weight),
        }

    def counts(self, batch: Batch) -> dict[str, float]:
        assert batch.masked_words is not None
        return {"words": batch.masked_words.count, "matching": len(batch), "alignment": len(batch)}

    def score_pairs(self, image: Tokens, text: Tokens) -> Tensor:
        """[B], the log odds that each image and its text belong together."""
        return matching_score(self.match_head(self.pooler(first_token(self.fuse(text, image).tokens))))
