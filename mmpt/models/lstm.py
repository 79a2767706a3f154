"""Packed token ids to tokens that have read their text from both ends: a bidirectional LSTM.

Hochreiter and Schmidhuber 1997; both directions as in Schuster and Paliwal 1997. The text encoder of image-text models
before BERT.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmpt.batch import Tokens
from mmpt.inputs import TextSpec
from mmpt.models.pooling import first_token, last_token, max_token, mean_token
from mmpt.models.tower import TextTower


@dataclass(frozen=True)
class LSTMConfig:
    hidden_width: int = 512
    """Width of each direction's state; tokens are twice as wide."""
    depth: int = 2
    """Number of layers."""
    embedding_width: int = 300
    """Width of the token embedding."""
    vocab_size: int = 30522
    """V, rows of the token embedding."""
    max_tokens: int = 64
    """Captions are cut to this many tokens, special tokens included."""
    dropout: float = 0.0
    """Dropout on what enters each layer."""
    pool: Literal["final", "max", "mean"] = "final"
    """The summary: the state after the last token, read forwards, and after the first, read backwards; or the maximum
    (Conneau et al. 2017, InferSent) or mean over tokens."""

    def __post_init__(self) -> None:
        if min(self.hidden_width, self.depth, self.embedding_width) < 1:
            raise ValueError(
                f"an LSTM has widths and a depth of 1 or more, got hidden_width {self.hidden_width}, "
                f"embedding_width {self.embedding_width}, depth {self.depth}"
            )

    @property
    def width(self) -> int:
        return 2 * self.hidden_width

    @property
    def summary_width(self) -> int:
        return 2 * self.hidden_width

    def inputs(self) -> TextSpec:
        return TextSpec(max_text_tokens=self.max_tokens, vocab_size=self.vocab_size)

    def build(self) -> "LSTM":
        return LSTM(self)


class LSTMEmbedding(nn.Module):
    """ids [T] -> [T, E]."""

    def __init__(self, config: LSTMConfig):
        super().__init__()
        self.token_embedding = nn.Parameter(torch.empty(config.vocab_size, config.embedding_width))
        nn.init.uniform_(self.token_embedding, -0.1, 0.1)  # VSE++ (Faghri et al. 2018), released code

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, self.token_embedding)


class _Together(torch.autograd.Function):
    """The tensors as they are, whose gradients leave in one moment and in this order."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads


class BidirectionalLSTM(nn.LSTM):
    """One layer, whose forward takes tokens in torch's packed order.

    ZeRO 2 adds up gradients over ranks by the order in which they arrive, and on a CPU torch's LSTM finishes its
    weights in an order that depends on the lengths of the sequences, which differ between ranks: hence `_Together`.
    """

    def __init__(self, width: int, hidden_width: int):
        super().__init__(width, hidden_width, bidirectional=True)

    def forward(self, x: Tensor, sequences_at: Tensor) -> Tensor:  # type: ignore[override]
        """x [T, D] and how many sequences there are at each place, on the host -> [T, 2 H]."""
        state = x.new_zeros(2, int(sequences_at[0]), self.hidden_size)
        weights = list(_Together.apply(*self.parameters()))
        # The same call as in torch's own forward: bias, one layer, no dropout, both directions.
        return torch.lstm(x, sequences_at, (state, state), weights, True, 1, 0.0, self.training, True)[0]


class LSTM(TextTower):
    """ids: Tokens with x [T] int64 -> Tokens [T, 2 H]: the state after each token, read forwards and backwards."""

    def __init__(self, config: LSTMConfig):
        super().__init__()
        self.config = config
        self.embedding = LSTMEmbedding(config)
        self.dropout = nn.Dropout(config.dropout)
        widths = [config.embedding_width, *[config.width] * (config.depth - 1)]
        self.blocks = nn.ModuleList(BidirectionalLSTM(width, config.hidden_width) for width in widths)

    def forward(self, ids: Tokens) -> Tokens:
        x = self.embedding(ids.x)
        order, sequences_at = _time_major(ids)
        x = x[order]
        for block in self.blocks:
            x = block(self.dropout(x), sequences_at)  # [T, 2 H]
        return ids.with_x(torch.empty_like(x).index_copy(0, order, x))

    def summary(self, tokens: Tokens) -> Tensor:
        if self.config.pool == "max":
            return max_token(tokens)
        if self.config.pool == "mean":
            return mean_token(tokens)
        forwards, backwards = last_token(tokens), first_token(tokens)
        return torch.cat([forwards[:, : self.config.hidden_width], backwards[:, self.config.hidden_width :]], dim=1)


def _time_major(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """[T] int64, the tokens in the order that torch's LSTM takes: the first of every sequence, the second of every
    sequence that has one, and so on, longest sequences first; and on the host how many there are of each.

    Waits for the device: cuDNN wants the lengths on the host.
    """
    lengths = tokens.lengths().cpu()  # [B]
    longest_first = lengths.argsort(descending=True, stable=True).to(tokens.x.device)
    rank = torch.empty_like(longest_first).index_copy(
        0, longest_first, torch.arange(len(longest_first), device=tokens.x.device)
    )
    order = (tokens.position() * len(lengths) + rank[tokens.sequence_index()]).argsort()
    sequences_at = (lengths[:, None] > torch.arange(tokens.longest)).sum(0)  # [longest]
    return order, sequences_at
