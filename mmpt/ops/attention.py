"""Softmax attention within packed sequences: the only place that knows where one sequence ends and the next begins.

Three ways to the same result, chosen from facts that the host knows, so that no launch waits for the device:

    equal      all lengths equal: the packed tensors are a view of [B, L, H, Dh]; any device, type and dropout
    varlen     CUDA in bf16 or fp16 without dropout: flash attention over the packed tensors as they are
    padded     everything else (CPU; fp32 or dropout on CUDA): rows are padded inside this file and nowhere outside
"""

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from mmpt.batch import Tokens


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Tokens,
    causal: bool = False,
    dropout: float = 0.0,
    key_sequences: Tokens | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(Dh)) v within each sequence; causal: token i sees tokens 0..i of its own sequence.

    query: [T, H, Dh], packed like `sequences`, whose own vectors are not read; returns the same shape.
    key, value: [T, H, Dh], or [T_k, H, Dh] packed like `key_sequences` where queries look at other sequences (as many).
    dropout: probability of dropping an attention weight; 0 outside training.
    Source: Vaswani et al. 2017, eq. 1. Raises ValueError for `causal` with other sequences, which has no meaning.
    """
    if causal and key_sequences is not None:
        raise ValueError("causal attention is within a sequence; it cannot look at other sequences")
    keys = sequences if key_sequences is None else key_sequences
    if _equal_lengths(query, sequences) and _equal_lengths(key, keys):
        return _equal(query, key, value, sequences, causal, dropout)
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and dropout == 0.0:
        return _varlen(query, key, value, sequences, keys, causal)
    return _padded(query, key, value, sequences, keys, causal, dropout)


def _equal_lengths(x: Tensor, sequences: Tokens) -> bool:
    return (len(sequences.offsets) - 1) * sequences.longest == len(x)


def _equal(query: Tensor, key: Tensor, value: Tensor, sequences: Tokens, causal: bool, dropout: float) -> Tensor:
    batch = len(sequences.offsets) - 1
    q, k, v = (x.unflatten(0, (batch, len(x) // max(batch, 1))).transpose(1, 2) for x in (query, key, value))
    out = scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal)  # [B, H, L, Dh]
    return out.transpose(1, 2).reshape(query.shape)


def _varlen(query: Tensor, key: Tensor, value: Tensor, sequences: Tokens, keys: Tokens, causal: bool) -> Tensor:
    window = (-1, 0) if causal else (-1, -1)
    return varlen_attn(
        query, key, value, sequences.offsets, keys.offsets, sequences.longest, keys.longest, window_size=window
    )  # type: ignore[return-value]


def _padded(
    query: Tensor, key: Tensor, value: Tensor, sequences: Tokens, keys: Tokens, causal: bool, dropout: float
) -> Tensor:
    rows, key_rows = _padded_rows(sequences), _padded_rows(keys)
    q = _pad(query, rows, sequences)  # [B, H, L, Dh]
    k, v = (_pad(x, key_rows, keys) for x in (key, value))
    places = torch.arange(keys.longest, device=key.device)
    # A padded query would see nothing and become NaN; it sees its sequence's keys instead, and its row is never read.
    mask = (places < keys.lengths()[:, None])[:, None, None, :]  # [B, 1, 1, L]
    if causal:
        mask = mask & (places[None, :] <= places[:, None])
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return out.transpose(1, 2).flatten(0, 1)[rows]


def _padded_rows(sequences: Tokens) -> Tensor:
    """[T] int64, where each token lies among B rows of `longest` tokens."""
    return sequences.sequence_index() * sequences.longest + sequences.position()


def _pad(x: Tensor, rows: Tensor, sequences: Tokens) -> Tensor:
    """[T, H, Dh] -> [B, H, L, Dh], zeros where a sequence is shorter than the longest."""
    batch = len(sequences.offsets) - 1
    padded = x.new_zeros(batch * sequences.longest, *x.shape[1:]).index_copy(0, rows, x)
    return padded.unflatten(0, (batch, sequences.longest)).transpose(1, 2)
