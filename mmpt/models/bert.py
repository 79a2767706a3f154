"""BERT: packed token ids to tokens that see the whole text (Devlin et al. 2019, section 3).

The embedding works alone, before another model's encoder (ViLT, UNITER), and the depth is free (ALBEF's text encoder
has the first 6 of 12 blocks).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mmpt.batch import Tokens
from mmpt.inputs import TextSpec
from mmpt.models.pooling import first_token
from mmpt.models.tower import TextTower
from mmpt.models.transformer import BERT_DEVIATION, Transformer, TransformerConfig

SIZES = {
    "tiny": (128, 2), "mini": (256, 4), "small": (512, 4), "medium": (512, 8), "base": (768, 12), "large": (1024, 24),
}  # fmt: skip
"""(width, depth) of the published sizes, with a head per 64 numbers of the width (Devlin et al. 2019, section 3; those
below base from Turc et al. 2019, table 1)."""


@dataclass(frozen=True)
class BertEmbeddingConfig:
    width: int
    """D, the width of a token."""
    vocab_size: int = 30522
    """V, rows of the token embedding: 30522 uncased, 28996 cased."""
    positions: int = 512
    """Rows of the position embedding."""
    types: int = 2
    """Rows of the token type embedding: BERT's first and second sentence."""
    norm_eps: float = 1e-12
    """Added to the variance in the layer norm."""
    dropout: float = 0.1
    """Dropout on the sum."""


@dataclass(frozen=True)
class BertConfig:
    embedding: BertEmbeddingConfig
    trunk: TransformerConfig
    max_tokens: int = 64
    """Captions are cut to this many tokens, special tokens included."""

    def __post_init__(self) -> None:
        if self.embedding.width != self.trunk.width:
            raise ValueError(f"the embedding is {self.embedding.width} wide, the blocks are {self.trunk.width} wide")
        if self.max_tokens > self.embedding.positions:
            raise ValueError(f"captions of {self.max_tokens} tokens do not fit {self.embedding.positions} positions")
        if self.trunk.norm != "post":
            raise ValueError(f"BERT's blocks have their layer norms after the sums, not {self.trunk.norm!r}")

    @property
    def width(self) -> int:
        return self.trunk.width

    @property
    def summary_width(self) -> int:
        return self.trunk.width

    def inputs(self) -> TextSpec:
        return TextSpec(max_text_tokens=self.max_tokens, vocab_size=self.embedding.vocab_size)

    def build(self) -> "Bert":
        return Bert(self)


def bert(
    size: Literal["tiny", "mini", "small", "medium", "base", "large"], vocab_size: int = 30522, max_tokens: int = 64
) -> BertConfig:
    """A published size."""
    width, depth = SIZES[size]
    trunk = TransformerConfig(
        width, depth, width // 64, norm="post", norm_eps=1e-12, dropout=0.1, attention_dropout=0.1, init="bert"
    )
    return BertConfig(BertEmbeddingConfig(width, vocab_size), trunk, max_tokens)


class BertEmbedding(nn.Module):
    """norm(token + position within its own text + token type), then dropout."""

    def __init__(self, config: BertEmbeddingConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Parameter(torch.empty(config.vocab_size, config.width))
        self.position_embedding = nn.Parameter(torch.empty(config.positions, config.width))
        self.type_embedding = nn.Parameter(torch.empty(config.types, config.width))
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        for table in (self.token_embedding, self.position_embedding, self.type_embedding):
            nn.init.normal_(table, std=BERT_DEVIATION)

    def forward(self, ids: Tokens, types: Tensor | None = None) -> Tokens:
        """ids [T], types [T] int64 or None where all are of type 0 -> Tokens [T, D]. ValueError for too long a text."""
        if ids.longest > self.config.positions:
            raise ValueError(f"a text has {ids.longest} tokens, the model has {self.config.positions} positions")
        x = nn.functional.embedding(ids.x, self.token_embedding) + self.position_embedding[ids.position()]
        x = x + (self.type_embedding[0] if types is None else self.type_embedding[types])
        return ids.with_x(self.dropout(self.norm(x)))


class Bert(TextTower):
    """ids: Tokens with x [T] int64 -> Tokens [T, D]. The summary is the first token, [CLS]."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.embedding = BertEmbedding(config.embedding)
        self.trunk = Transformer(config.trunk)

    def forward(self, ids: Tokens) -> Tokens:
        return self.trunk(self.embedding(ids))

    def summary(self, tokens: Tokens) -> Tensor:
        return first_token(tokens)
