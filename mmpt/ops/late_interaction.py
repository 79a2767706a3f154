"""Token-wise late interaction of every image with every text, both directions from one product per tile.

    s_i2t[a, b] = 1/P_a  sum_p  max_r  <v_ap, t_br>          s_t2i[a, b] = 1/L_b  sum_r  max_p  <v_ap, t_br>

FILIP (Yao et al. 2022), eq. 3 and 4. The [B_i, B_t, P, L] tensor of all products is never stored: a tile of at most
TILE_BYTES is made, reduced both ways and dropped; only the winners' indices are kept, a byte each, and the backward
turns them into one-hot matrices and multiplies. Texts are taken in order of length, so that a tile of texts is padded
little; pads repeat a text's last token, which cannot change a maximum.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmpt.batch import Tokens

TILE_BYTES = 2 << 20  # of fp32 products: fits the second-level cache of a core with its operands


def late_interaction(image: Tokens, text: Tokens) -> tuple[Tensor, Tensor]:
    """(s_i2t, s_t2i), [B_i, B_t] each, in fp32 (fp64 for fp64 inputs).

    image: [T_i, D], text: [T_t, D], packed, each sequence of any length from 1. A tie goes to the token that comes
    first, and that one alone has the gradient. Differentiable in both; deterministic.
    """
    return _LateInteraction.apply(image.x, text.x, image.offsets, text.offsets, image.longest)


class _TextTile(NamedTuple):
    """c texts of similar length: rows[c * L] index the packed tokens, real[c, L] tells tokens from repeats."""

    texts: Tensor  # [c] int64
    rows: Tensor  # [c * L] int64
    real: Tensor  # [c, L] bool
    lengths: Tensor  # [c]


class _ImageTile(NamedTuple):
    """g consecutive images of the same number of patches P: the packed rows start to start + g * P."""

    first: int
    images: int
    start: int
    patches: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.images * self.patches)


def _text_tiles(offsets: Tensor, largest_image: int) -> Iterator[_TextTile]:
    lengths = offsets[1:] - offsets[:-1]
    order = torch.argsort(lengths, stable=True)
    ordered = lengths[order].tolist()
    most = max(1, TILE_BYTES // 4 // max(1, largest_image))  # tokens of a tile, repeats included
    begin = 0
    while begin < len(ordered):
        end = begin + 1
        while end < len(ordered) and (end + 1 - begin) * ordered[end] <= most:
            end += 1
        texts = order[begin:end]
        places = torch.arange(ordered[end - 1], device=offsets.device)
        sizes = lengths[texts]
        rows = offsets[texts].long()[:, None] + torch.minimum(places, sizes[:, None].long() - 1)
        yield _TextTile(texts, rows.flatten(), places < sizes[:, None], sizes)
        begin = end


def _image_tiles(offsets: Tensor, longest: int, total: int, text_tokens: int) -> list[_ImageTile]:
    """Images in tiles; those of one tile have equally many patches."""
    count = len(offsets) - 1
    if count * longest == total:
        most = max(1, TILE_BYTES // 4 // max(1, longest * text_tokens))
        return [_ImageTile(i, min(most, count - i), i * longest, longest) for i in range(0, count, most)]
    ends = offsets.tolist()
    return [_ImageTile(i, 1, ends[i], ends[i + 1] - ends[i]) for i in range(count)]


def _products(v: Tensor, t: Tensor, tile: _ImageTile, texts: int) -> Tensor:
    """<v, t> of a tile in the accumulation type: [g, P, c, L]."""
    if v.is_cuda and v.dtype in (torch.bfloat16, torch.float16):
        flat = torch.mm(v, t.T, out_dtype=torch.float32)
    else:
        exact = torch.promote_types(v.dtype, torch.float32)
        flat = v.to(exact) @ t.to(exact).T
    return flat.view(tile.images, tile.patches, texts, -1)


def _index_type(count: int) -> torch.dtype:
    return torch.uint8 if count <= 256 else torch.int32


class _LateInteraction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, v: Tensor, t: Tensor, image_offsets: Tensor, text_offsets: Tensor, longest: int
    ) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(v.dtype, torch.float32)
        shape = (len(image_offsets) - 1, len(text_offsets) - 1)
        s_i2t, s_t2i = v.new_zeros(shape, dtype=exact), v.new_zeros(shape, dtype=exact)
        winners, keep = [], any(ctx.needs_input_grad)
        for text in _text_tiles(text_offsets, longest):
            rows = t[text.rows]  # [c * L, D]
            for image in _image_tiles(image_offsets, longest, len(v), len(rows)):
                products = _products(v[image.rows], rows, image, len(text.texts))  # [g, P, c, L]
                best_word, word = products.max(dim=3)  # [g, P, c]
                best_patch, patch = products.max(dim=1)  # [g, c, L]
                block = slice(image.first, image.first + image.images)
                s_i2t[block, text.texts] = best_word.mean(dim=1)
                s_t2i[block, text.texts] = (best_patch * text.real).sum(dim=2) / text.lengths
                if keep:
                    words = word.to(_index_type(text.real.shape[1]))
                    winners.append((text, image, words, patch.to(_index_type(image.patches))))
        ctx.save_for_backward(v, t)
        ctx.winners = winners
        return s_i2t, s_t2i

    @staticmethod
    def backward(ctx: Any, grad_i2t: Tensor, grad_t2i: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        v, t = ctx.saved_tensors
        exact = grad_i2t.dtype
        grad_v, grad_t = v.new_zeros(v.shape, dtype=exact), t.new_zeros(t.shape, dtype=exact)
        for text, image, word, patch in ctx.winners:
            block = slice(image.first, image.first + image.images)
            to_words = (grad_i2t[block, text.texts] / image.patches)[:, None, :, None]  # [g, 1, c, 1]
            to_patches = (grad_t2i[block, text.texts] / text.lengths)[:, :, None] * text.real  # [g, c, L]
            weights = v.new_zeros((*word.shape, text.real.shape[1]), dtype=exact)  # [g, P, c, L], mostly zero
            weights.scatter_(3, word.long()[..., None], to_words.expand(*word.shape, 1))
            weights.scatter_add_(1, patch.long()[:, None], to_patches[:, None])
            flat = weights.view(image.images * image.patches, -1)  # [g * P, c * L]
            grad_v[image.rows] += flat @ t[text.rows].to(exact)
            real = text.real.flatten()
            grad_t[text.rows[real]] += (flat.T @ v[image.rows].to(exact))[real]
        return grad_v.to(v.dtype), grad_t.to(t.dtype), None, None, None


def word_patch_match(patches: Tensor, words: Tensor) -> Tensor:
    """[P, D], [L, D] -> [P, L] products of one image and one text: what a heat map shows."""
    return patches.float() @ words.float().T
