"""Softmax attention within packed sequences: the only place that knows where one sequence ends and the next begins.

Three ways to the same result, chosen from facts that the host knows, so that no launch waits for the device:

    equal      all lengths equal: the packed tensors are a view of [B, L, H, Dh], any device, any dropout
    varlen     CUDA in bf16 or fp16 without dropout: flash attention over the packed tensors as they are
    padded     everything else (CPU; fp32 or dropout on CUDA): rows padded inside this function and nowhere outside
"""

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from mmpt.batch import Tokens


def attention(
    query: Tensor, key: Tensor, value: Tensor, sequences: Tokens, causal: bool = False, dropout: float = 0.0
) -> Tensor:
    """softmax(q k^T / sqrt(Dh)) v within each sequence; causal: token i sees tokens 0..i of its own sequence.

    query, key, value: [T, H, Dh], packed like `sequences` (whose own vectors are not read). Returns [T, H, Dh].
    dropout: probability of dropping an attention weight; 0 outside training.
    Source: Vaswani et al. 2017, eq. 1.
    """
    batch = len(sequences.offsets) - 1
    if batch * sequences.longest == len(query):
        return _equal(query, key, value, batch, causal, dropout)
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and dropout == 0.0:
        return _varlen(query, key, value, sequences, causal)
    return _padded(query, key, value, sequences, causal, dropout)


def _equal(query: Tensor, key: Tensor, value: Tensor, batch: int, causal: bool, dropout: float) -> Tensor:
    q, k, v = (x.view(batch, -1, *x.shape[1:]).transpose(1, 2) for x in (query, key, value))  # [B, H, L, Dh]
    out = scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal)
    return out.transpose(1, 2).reshape(query.shape)


def _varlen(query: Tensor, key: Tensor, value: Tensor, sequences: Tokens, causal: bool) -> Tensor:
    offsets, longest = sequences.offsets, sequences.longest
    window = (-1, 0) if causal else (-1, -1)
    return varlen_attn(query, key, value, offsets, offsets, longest, longest, window_size=window)


def _padded(query: Tensor, key: Tensor, value: Tensor, sequences: Tokens, causal: bool, dropout: float) -> Tensor:
    batch, longest = len(sequences.offsets) - 1, sequences.longest
    row = sequences.sequence_index() * longest + sequences.position()  # [T] where each token lies among the padded rows
    q, k, v = (
        x.new_zeros(batch * longest, *x.shape[1:]).index_copy(0, row, x).view(batch, longest, *x.shape[1:]).transpose(1, 2)
        for x in (query, key, value)
    )  # [B, H, L, Dh]
    places = torch.arange(longest, device=query.device)
    real = places < sequences.lengths()[:, None]  # [B, L]
    # A padded query would see nothing and become NaN; it sees its sequence instead, and its row is never read.
    mask = real[:, None, None, :]
    if causal:
        mask = mask & (places[None, :] <= places[:, None])
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return out.transpose(1, 2).reshape(batch * longest, *query.shape[1:])[row]
