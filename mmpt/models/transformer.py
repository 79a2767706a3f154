"""One transformer for every tower: pre- or post-norm, causal or not, over packed tokens.

Vaswani et al. 2017; pre-norm as in Radford et al. 2019; QuickGELU as in CLIP (Radford et al. 2021); stochastic depth as
in Huang et al. 2016. Parameters are named `blocks.N.…`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from torch.utils.checkpoint import checkpoint

from mmpt.batch import Tokens
from mmpt.config import at_least
from mmpt.ops.attention import attention

BERT_DEVIATION = 0.02
"""Standard deviation of every initial matrix and table of BERT (Devlin et al. 2019, released code)."""


@dataclass(frozen=True)
class TransformerConfig:
    width: int
    """D, the width of a token."""
    depth: int
    """Number of blocks."""
    heads: int
    """Attention heads; they divide the width evenly."""
    mlp_ratio: float = 4.0
    """Width of the hidden layer of a block's MLP, as a multiple of the width."""
    norm: Literal["pre", "post"] = "pre"
    """Layer norm before each sub-layer (GPT-2, ViT, CLIP) or after each residual sum (BERT)."""
    activation: Literal["gelu", "gelu_tanh", "quick_gelu"] = "gelu"
    """quick_gelu is x * sigmoid(1.702 x), OpenAI's CLIP; gelu_tanh the tanh approximation, SigLIP."""
    norm_eps: float = 1e-5
    """Added to the variance in every layer norm."""
    dropout: float = 0.0
    """Dropout on what each sub-layer adds."""
    attention_dropout: float = 0.0
    """Dropout on attention weights."""
    drop_path: float = 0.0
    """Stochastic depth: how likely the last block's sub-layers are skipped; it grows linearly from 0 at the first."""
    init: Literal["clip", "xavier", "bert"] = "clip"
    """Initial weights: normal, residual projections shrinking with depth (CLIP), Xavier's uniform (SigLIP), or normal
    with a standard deviation of 0.02 (BERT)."""
    checkpoint_activations: bool = False
    """Keep only each block's input and compute the rest again in the backward."""

    def __post_init__(self) -> None:
        at_least(1, self, "width", "heads")
        if self.width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide the width {self.width} evenly")


class Block(nn.Module):
    """pre:  x + attention(norm(x)), then x + mlp(norm(x)).   post: norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, config: TransformerConfig, causal: bool, drop_path: float):
        super().__init__()
        self.config, self.causal, self.drop_path = config, causal, drop_path
        hidden = int(config.width * config.mlp_ratio)
        self.norm_1 = nn.LayerNorm(config.width, config.norm_eps)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.norm_2 = nn.LayerNorm(config.width, config.norm_eps)
        self.mlp_in = nn.Linear(config.width, hidden)
        self.mlp_out = nn.Linear(hidden, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, sequences: Tokens) -> Tensor:
        """x [T, D] -> [T, D]; `sequences` says where each sequence lies."""
        if self.config.norm == "pre":
            x = x + self._drop(self._attend(self.norm_1(x), sequences), sequences)
            return x + self._drop(self._mlp(self.norm_2(x)), sequences)
        x = self.norm_1(x + self._drop(self._attend(x, sequences), sequences))
        return self.norm_2(x + self._drop(self._mlp(x), sequences))

    def _attend(self, x: Tensor, sequences: Tokens) -> Tensor:
        query, key, value = self.qkv(x).unflatten(1, (3, self.config.heads, -1)).unbind(1)  # [T, H, Dh] each
        dropout = self.config.attention_dropout if self.training else 0.0
        return self.out(attention(query, key, value, sequences, self.causal, dropout).flatten(1))

    def _mlp(self, x: Tensor) -> Tensor:
        return self.mlp_out(activate(self.mlp_in(x), self.config.activation))

    def _drop(self, update: Tensor, sequences: Tokens) -> Tensor:
        """Dropout, then stochastic depth: a sequence's whole update is zeroed, the others scaled to keep the mean."""
        update = self.dropout(update)
        if not self.training or self.drop_path == 0.0:
            return update
        keep = 1.0 - self.drop_path
        kept = torch.rand(len(sequences.offsets) - 1, device=update.device) < keep  # [B]
        return update * (kept[sequences.sequence_index()] / keep).to(update.dtype)[:, None]


class Transformer(nn.Module):
    """Tokens [T, D] -> Tokens [T, D]. No embedding, no final norm."""

    def __init__(self, config: TransformerConfig, causal: bool = False):
        super().__init__()
        self.config = config
        rates = torch.linspace(0, config.drop_path, config.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(config, causal, rate) for rate in rates)
        self.init_weights()

    def init_weights(self) -> None:
        """CLIP's (Radford et al. 2021, released code), whose residual projections shrink with depth, or Xavier's, or
        BERT's (Devlin et al. 2019, released code)."""
        width, depth = self.config.width, self.config.depth
        residual = width**-0.5 * (2 * depth) ** -0.5
        for block in self.blocks:
            assert isinstance(block, Block)
            deviations = {"qkv": width**-0.5, "out": residual, "mlp_in": (2 * width) ** -0.5, "mlp_out": residual}
            for name, deviation in deviations.items():
                parts = 3 if name == "qkv" else 1
                chosen = {"clip": deviation, "xavier": None, "bert": BERT_DEVIATION}[self.config.init]
                initialise_linear(getattr(block, name), chosen, parts)

    def forward(self, tokens: Tokens) -> Tokens:
        x, saving = tokens.x, self.config.checkpoint_activations and torch.is_grad_enabled()
        for block in self.blocks:
            x = checkpoint(block, x, tokens, use_reentrant=False) if saving else block(x, tokens)
        return tokens.with_x(x)


def initialise_linear(linear: nn.Linear, deviation: float | None, parts: int = 1) -> None:
    """A normal with this standard deviation, or for None Xavier's uniform, for each of the matrices stacked in one; no
    bias."""
    for matrix in linear.weight.chunk(parts):
        if deviation is None:
            nn.init.xavier_uniform_(matrix)
        else:
            nn.init.normal_(matrix, std=deviation)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def activate(x: Tensor, name: str) -> Tensor:
    """The MLP's non-linearity by its name in TransformerConfig."""
    if name == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")
