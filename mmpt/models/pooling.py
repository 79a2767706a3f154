"""One vector per sequence: a chosen token, or attention by a learned query."""

import torch
from torch import Tensor, nn

from mmpt.batch import Tokens, pack_equal
from mmpt.models.transformer import TransformerConfig, activate, initialise_linear
from mmpt.ops.attention import attention


def first_token(tokens: Tokens) -> Tensor:
    """[B, D], each sequence's first token: [CLS]."""
    return tokens.x[tokens.offsets[:-1].long()]


def last_token(tokens: Tokens) -> Tensor:
    """[B, D], each sequence's last token: [EOT], which truncation keeps; the last pad where pads are tokens."""
    return tokens.x[tokens.offsets[1:].long() - 1]


def mean_token(tokens: Tokens) -> Tensor:
    """[B, D], the mean of each sequence's tokens, summed in at least fp32."""
    count, exact = len(tokens.offsets) - 1, torch.promote_types(tokens.x.dtype, torch.float32)
    if count * tokens.longest == len(tokens.x):
        return tokens.x.unflatten(0, (count, tokens.longest)).mean(1, dtype=exact).to(tokens.x.dtype)
    sums = torch.zeros(count, tokens.x.shape[1], dtype=exact, device=tokens.x.device)
    sums = sums.index_add(0, tokens.sequence_index(), tokens.x.to(exact))
    return (sums / tokens.lengths()[:, None]).to(tokens.x.dtype)


def max_token(tokens: Tokens) -> Tensor:
    """[B, D], the maximum over each sequence's tokens, number by number."""
    lowest = tokens.x.new_full((len(tokens.offsets) - 1, tokens.x.shape[1]), -torch.inf)
    index = tokens.sequence_index()[:, None].expand_as(tokens.x)
    return lowest.scatter_reduce(0, index, tokens.x, "amax")


def without_first_token(tokens: Tokens) -> Tokens:
    """Every sequence without its first token, [CLS]."""
    count = len(tokens.offsets) - 1
    if count * tokens.longest == len(tokens.x):
        return pack_equal(tokens.x.unflatten(0, (count, tokens.longest))[:, 1:])
    # The number of tokens that stay is known on the host: no mask, whose result's size would wait for the device.
    rows = torch.arange(len(tokens.x) - count, device=tokens.x.device)
    offsets = tokens.offsets - torch.arange(count + 1, dtype=tokens.offsets.dtype, device=tokens.offsets.device)
    index = torch.searchsorted(offsets, rows.to(offsets.dtype), right=True)  # 1 + the sequence of each that stays
    return Tokens(tokens.x[rows + index], offsets, tokens.longest - 1)


class AttentionPooling(nn.Module):
    """Tokens [T, D] -> [B, D]: y = attention(query, tokens), then y + mlp(norm(y)); the query is learned.

    Lee et al. 2019 (PMA), with one query, as in Zhai et al. 2022 and SigLIP (Zhai et al. 2023), there "MAP head".
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.query = nn.Parameter(torch.empty(1, width))
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, config.norm_eps)
        self.mlp_in, self.mlp_out = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.init_weights()

    def init_weights(self) -> None:
        """Xavier's uniform for every matrix, the query included, as in SigLIP's released code."""
        nn.init.xavier_uniform_(self.query)
        for linear, parts in ((self.q, 1), (self.kv, 2), (self.out, 1), (self.mlp_in, 1), (self.mlp_out, 1)):
            initialise_linear(linear, None, parts)

    def forward(self, tokens: Tokens) -> Tensor:
        batch, heads = len(tokens.offsets) - 1, self.config.heads
        query = self.q(self.query).view(1, heads, -1).expand(batch, -1, -1)  # [B, H, Dh]
        key, value = self.kv(tokens.x).unflatten(1, (2, heads, -1)).unbind(1)  # [T, H, Dh] each
        one_each = pack_equal(query[:, None])
        dropout = self.config.attention_dropout if self.training else 0.0
        found = attention(query, key, value, one_each, dropout=dropout, key_sequences=tokens)
        y = self.out(found.flatten(1))
        return y + self.mlp_out(activate(self.mlp_in(self.norm(y)), self.config.activation))
