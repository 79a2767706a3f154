"""Which tokens take part in FILIP's late interaction."""

import math
from typing import Literal

import torch
from torch import Tensor

from mmpt import dist
from mmpt.batch import Tokens

TILE_BYTES = 16 << 20


def drop_ends(tokens: Tokens) -> Tokens:
    """Without the first and last token of each sequence, [SOT] and [EOT]; a sequence of just these keeps them."""
    place, lengths = tokens.position(), tokens.lengths()
    length = lengths[tokens.sequence_index()]
    inner = (place > 0) & (place < length - 1) | (length <= 2)
    kept = torch.where(lengths > 2, lengths - 2, lengths)
    return Tokens(tokens.x[inner], _offsets(kept), max(tokens.longest - 2, min(tokens.longest, 2)))


def with_zero_pads(tokens: Tokens, max_tokens: int) -> Tokens:
    """One zero vector more behind each sequence shorter than max_tokens, which none exceeds: what any number of pads
    with the value zero adds to a maximum over tokens. Waits for the device."""
    lengths = tokens.lengths()
    offsets = _offsets(lengths + (lengths < max_tokens).to(lengths.dtype))
    rows = offsets[tokens.sequence_index()].long() + tokens.position()
    x = tokens.x.new_zeros(int(offsets[-1]), tokens.x.shape[1]).index_copy(0, rows, tokens.x)
    return Tokens(x, offsets, min(tokens.longest + 1, max_tokens))


def without_zero_pads(tokens: Tokens) -> Tensor:
    """[B], what turns each sequence's mean over tokens into that over all but a zero vector at its end."""
    last = tokens.x[tokens.offsets[1:].long() - 1]
    lengths = tokens.lengths().to(torch.promote_types(tokens.x.dtype, torch.float32))
    return lengths / (lengths - (last == 0).all(1).to(lengths)).clamp(min=1)


@torch.no_grad()
def token_maxima(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's highest product with any token of the other side: [T_i, D], [T_t, D] -> [T_i], [T_t] in fp32."""
    exact = torch.promote_types(image.dtype, torch.float32)
    of_image, of_text = [], torch.full((len(text),), -math.inf, dtype=exact, device=text.device)
    with torch.autocast(image.device.type, enabled=False):
        words = text.to(exact).T
        for rows in image.split(max(1, TILE_BYTES // 4 // max(1, len(text)))):
            products = rows.to(exact) @ words
            of_image.append(products.amax(dim=1))
            of_text = torch.maximum(of_text, products.amax(dim=0))
    return torch.cat(of_image), of_text


def keep_top_tokens(
    image: Tokens, text: Tokens, ratio: float, scope: Literal["local", "global"]
) -> tuple[Tokens, Tokens]:
    """The ceil(ratio * length) tokens of each sequence with the highest product with any token of the other side.

    scope `local`: the other side is this rank's batch, as published (Yao et al. 2022, section 3.1: 25 %, chosen within
    the local worker, before tokens are exchanged); `global`: that of all ranks, so that the result does not depend on
    how many there are, for which every token travels once more. The choice has no gradient; the kept tokens do, and
    stay in order. Of equal tokens the first are kept.
    """
    if scope == "local":
        of_image, of_text = token_maxima(image.x, text.x)
    else:
        with torch.no_grad():
            everything = dist.gather_tokens(text)
        of_image, of_all = token_maxima(image.x, everything.x)
        first = everything.offsets[dist.rank() * (len(text.offsets) - 1)]
        of_text = dist.max_over_ranks(of_all)[first + torch.arange(len(text.x), device=text.x.device)]
    return _keep_highest(image, of_image, ratio), _keep_highest(text, of_text, ratio)


def _keep_highest(tokens: Tokens, value: Tensor, ratio: float) -> Tokens:
    index = tokens.sequence_index()
    by_value = torch.argsort(value, descending=True, stable=True)
    order = by_value[torch.argsort(index[by_value], stable=True)]  # sequence by sequence, highest first
    keep = (tokens.lengths().double() * ratio).ceil().int()  # [B]; double, to round as the host does below
    chosen = order[tokens.position() < keep[index]].sort().values
    return Tokens(tokens.x[chosen], _offsets(keep), math.ceil(tokens.longest * ratio))


def _offsets(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=lengths.dtype)])
