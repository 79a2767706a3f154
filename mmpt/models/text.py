"""Packed token ids to tokens: CLIP's text transformer (Radford et al. 2021, section 2.4), causal, and SigLIP's, not."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmpt.batch import Tokens
from mmpt.inputs import TextSpec
from mmpt.models.pooling import last_token
from mmpt.models.tower import TextTower
from mmpt.models.transformer import Transformer, TransformerConfig


@dataclass(frozen=True)
class TextTransformerConfig:
    trunk: TransformerConfig
    vocab_size: int = 49408
    """V, rows of the token embedding."""
    max_tokens: int = 77
    """Longest caption, special tokens included: rows of the position embedding."""
    causal: bool = True
    """Whether a token sees only what comes before it."""

    @property
    def width(self) -> int:
        return self.trunk.width

    @property
    def summary_width(self) -> int:
        return self.trunk.width

    def inputs(self) -> TextSpec:
        return TextSpec(max_text_tokens=self.max_tokens, vocab_size=self.vocab_size)

    def build(self) -> "TextTransformer":
        return TextTransformer(self)


class TextEmbedding(nn.Module):
    """ids [T] -> [T, D]: token plus position within its own caption."""

    def __init__(self, config: TextTransformerConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Parameter(torch.empty(config.vocab_size, config.trunk.width))
        self.position_embedding = nn.Parameter(torch.empty(config.max_tokens, config.trunk.width))
        nn.init.normal_(self.token_embedding, std=0.02)  # CLIP's released code
        nn.init.normal_(self.position_embedding, std=0.01)

    def forward(self, ids: Tokens) -> Tensor:
        if ids.longest > self.config.max_tokens:
            raise ValueError(f"a caption has {ids.longest} tokens, the model takes {self.config.max_tokens}")
        return nn.functional.embedding(ids.x, self.token_embedding) + self.position_embedding[ids.position()]


class TextTransformer(TextTower):
    """ids: Tokens with x [T] int64 -> Tokens [T, D], after the final layer norm. The summary is the last token."""

    def __init__(self, config: TextTransformerConfig):
        super().__init__()
        self.embedding = TextEmbedding(config)
        self.trunk = Transformer(config.trunk, causal=config.causal)
        self.ln_final = nn.LayerNorm(config.trunk.width, config.trunk.norm_eps)

    def forward(self, ids: Tokens) -> Tokens:
        tokens = self.trunk(ids.with_x(self.embedding(ids)))
        return tokens.with_x(self.ln_final(tokens.x))

    def summary(self, tokens: Tokens) -> Tensor:
        return last_token(tokens)
