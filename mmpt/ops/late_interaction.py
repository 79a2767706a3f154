"""Token-wise late interaction of every image with every text, both directions from one product per tile.

    s_i2t[a, b] = 1/P_a  sum_p  max_r  <v_ap, t_br>          s_t2i[a, b] = 1/L_b  sum_r  max_p  <v_ap, t_br>

FILIP (Yao et al. 2022), eq. 3 and 4. The [B_i, B_t, P, L] tensor of all products is never stored: a tile of it is made,
reduced both ways and dropped; only the winners' indices are kept, a byte each, and the backward turns them into one-hot
matrices and multiplies. Texts are taken in order of length, so that a tile of texts is padded little; pads repeat a
text's last token, which cannot change a maximum.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmpt.batch import Tokens

CPU_TILE_BYTES, DEVICE_TILE_BYTES = 4 << 20, 256 << 20
"""fp32 products of one tile: for each thread about what its caches hold; elsewhere enough to fill the device."""


def late_interaction(image: Tokens, text: Tokens) -> tuple[Tensor, Tensor]:
    """(s_i2t, s_t2i), [B_i, B_t] each, in fp32 (fp64 for fp64 inputs).

    image: [T_i, D], text: [T_t, D] of one type, packed, sequences of any length from 1. A tie goes to the token that
    comes first, and that one alone has the gradient. Differentiable in both; deterministic. Autocast changes nothing.
    Raises ValueError for a text without tokens, which has no mean.
    """
    with torch.autocast(image.x.device.type, enabled=False):
        return _LateInteraction.apply(image.x, text.x, image.offsets, text.offsets, image.longest)


class _TextTile(NamedTuple):
    """c texts of similar length, padded to the longest, L, with repeats of their last token."""

    texts: Tensor
    """[c] int64, which texts."""
    rows: Tensor
    """[c * L] int64, their tokens among the packed ones."""
    real: Tensor
    """[c, L] bool, tokens but not repeats."""
    lengths: Tensor
    """[c]."""


class _ImageTile(NamedTuple):
    """g consecutive images of P patches each."""

    images: slice
    rows: slice
    """Their packed patches."""
    patches: int


def _tile_products(device: torch.device) -> int:
    return (CPU_TILE_BYTES * torch.get_num_threads() if device.type == "cpu" else DEVICE_TILE_BYTES) // 4


def _text_tiles(offsets: Tensor, longest_image: int) -> Iterator[_TextTile]:
    lengths = offsets[1:] - offsets[:-1]
    order = torch.argsort(lengths, stable=True)
    ordered = lengths[order].tolist()
    if ordered and ordered[0] < 1:
        raise ValueError(f"text {int(order[0])} has no tokens; late interaction takes a mean over at least one")
    most = _tile_products(offsets.device) // max(1, longest_image)  # tokens of a tile, repeats included
    begin = 0
    while begin < len(ordered):
        end = begin + 1
        while end < len(ordered) and (end + 1 - begin) * ordered[end] <= most:
            end += 1
        texts = order[begin:end]
        places, sizes = torch.arange(ordered[end - 1], device=offsets.device), lengths[texts].long()
        rows = offsets[texts].long()[:, None] + torch.minimum(places, sizes[:, None] - 1)
        yield _TextTile(texts, rows.flatten(), places < sizes[:, None], sizes)
        begin = end


def _image_tiles(offsets: Tensor, longest: int, total: int, text_tokens: int) -> list[_ImageTile]:
    """Images in tiles; those of one tile have equally many patches, so ragged ones come one by one."""
    count = len(offsets) - 1
    if count * longest == total:
        most = max(1, _tile_products(offsets.device) // max(1, longest * text_tokens))
        blocks = [slice(i, min(i + most, count)) for i in range(0, count, most)]
        return [_ImageTile(b, slice(b.start * longest, b.stop * longest), longest) for b in blocks]
    ends = offsets.tolist()
    return [_ImageTile(slice(i, i + 1), slice(ends[i], ends[i + 1]), ends[i + 1] - ends[i]) for i in range(count)]


def _products(text: Tensor, image: Tensor) -> Tensor:
    """[c * L, D], [g * P, D] -> [c * L, g * P] in the accumulation type."""
    if text.is_cuda and text.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(text, image.T, out_dtype=torch.float32)
    exact = torch.promote_types(text.dtype, torch.float32)
    return text.to(exact) @ image.to(exact).T


def _index_type(count: int) -> torch.dtype:
    """The smallest type that counts to `count`."""
    return torch.uint8 if count <= 256 else torch.int16 if count <= 1 << 15 else torch.int32


def _best(products: Tensor, dim: int, index: bool) -> tuple[Tensor, Tensor]:
    """The maximum along a dimension and, if asked for, where it first occurs (in the smallest integer type)."""
    count, best = products.shape[dim], products.amax(dim)
    if not index:
        return best, best
    if products.is_cuda:
        return best, products.argmax(dim).to(_index_type(count))
    # torch's arg max is scalar code on a CPU, several times slower than these vectorised steps. At a maximum the
    # difference is 0 and `count - place` is left, largest for the first; elsewhere it ends far below 0.
    count_minus_place = torch.arange(count, 0, -1, dtype=products.dtype).view(-1, *[1] * (products.ndim - 1 - dim))
    highest = (products - best.unsqueeze(dim)).mul_(1e38).add_(count_minus_place).amax(dim)
    place = (count - highest).nan_to_num_(0.0, 0.0, 0.0)  # a NaN goes on as a value, not an index
    return best, place.to(_index_type(count))


class _LateInteraction(torch.autograd.Function):
    """Products are laid out [c, L, g, P]: patches last, where the longest runs of contiguous memory are."""

    @staticmethod
    def forward(
        ctx: Any, v: Tensor, t: Tensor, image_offsets: Tensor, text_offsets: Tensor, longest: int
    ) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(v.dtype, torch.float32)
        shape = (len(text_offsets) - 1, len(image_offsets) - 1)
        s_i2t, s_t2i = v.new_zeros(shape, dtype=exact), v.new_zeros(shape, dtype=exact)  # transposed until the end
        ctx.save_for_backward(v, t)
        ctx.winners, keep = [], any(ctx.needs_input_grad)
        for text in _text_tiles(text_offsets, longest):
            words, winners = t[text.rows], []
            for image in _image_tiles(image_offsets, longest, len(v), len(words)):
                products = _products(words, v[image.rows]).view(*text.real.shape, -1, image.patches)
                best_word, word = _best(products, 1, keep)  # [c, g, P]
                best_patch, patch = _best(products, 3, keep)  # [c, L, g]
                s_i2t[text.texts, image.images] = best_word.mean(dim=2)
                s_t2i[text.texts, image.images] = (best_patch * text.real[..., None]).sum(1) / text.lengths[:, None]
                if keep:  # a repeat is its text's last token, and rounding may let it win over that
                    last = (text.lengths - 1).to(word.dtype)[:, None, None]
                    winners.append((image, torch.minimum(word, last), patch))
            ctx.winners.append((text, winners))
        return s_i2t.T, s_t2i.T

    @staticmethod
    def backward(ctx: Any, grad_i2t: Tensor, grad_t2i: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        v, t = ctx.saved_tensors
        exact = grad_i2t.dtype
        grad_v, grad_t = v.new_zeros(v.shape, dtype=exact), t.new_zeros(t.shape, dtype=exact)
        with torch.autocast(v.device.type, enabled=False):
            for text, winners in ctx.winners:
                words = t[text.rows].to(exact)
                grad_words = torch.zeros_like(words)
                for image, word, patch in winners:
                    block = (text.texts, image.images)
                    weights = _one_hot(text, image, word, patch, grad_i2t.T[block], grad_t2i.T[block])
                    grad_words.addmm_(weights, v[image.rows].to(exact))
                    grad_v[image.rows].addmm_(weights.T, words)
                grad_t.index_add_(0, text.rows, grad_words)  # repeats add zeros to their token, in whatever order
        return grad_v.to(v.dtype), grad_t.to(t.dtype), None, None, None


def _one_hot(
    text: _TextTile, image: _ImageTile, word: Tensor, patch: Tensor, grad_i2t: Tensor, grad_t2i: Tensor
) -> Tensor:
    """[c * L, g * P], the gradient of each product of a tile: 1/P of grad_i2t where a patch found its best word and
    1/L of grad_t2i ([c, g] both) where a word found its best patch, zero elsewhere."""
    to_words = (grad_i2t / image.patches)[:, None, :, None].expand(-1, 1, -1, image.patches)  # [c, 1, g, P]
    to_patches = (grad_t2i / text.lengths[:, None])[:, None] * text.real[..., None]  # [c, L, g]
    weights = grad_i2t.new_zeros(*text.real.shape, grad_i2t.shape[1], image.patches)  # [c, L, g, P]
    weights.scatter_(1, word.long()[:, None], to_words)
    weights.scatter_add_(3, patch.long()[..., None], to_patches[..., None])
    return weights.flatten(2).flatten(0, 1)
