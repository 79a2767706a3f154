"""Late interaction in plain torch: what runs everywhere, and what the other backends are held against.

A tile of products is made, reduced both ways and dropped; the backward turns winners into one-hot matrices and
multiplies. Texts are taken in order of length, so that a tile of texts is padded little; pads repeat a text's last
token, which cannot change a maximum. Products are laid out [c, L, g, P]: patches last, where the longest runs of
contiguous memory are.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mmpt.batch import Tokens
from mmpt.ops.late_interaction.winners import as_places, index_type, indexable, to_indices

CPU_TILE_BYTES, DEVICE_TILE_BYTES = 4 << 20, 256 << 20
"""fp32 products of one tile: for each thread about what its caches hold; elsewhere enough to fill the device."""


def refusal(image: Tokens, text: Tokens) -> str:
    return ""


def forward(image: Tokens, text: Tokens, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See backends.py."""
    v, t = image.x, text.x
    exact = torch.promote_types(v.dtype, torch.float32)
    images, texts = len(image.offsets) - 1, len(text.offsets) - 1
    s_i2t, s_t2i = v.new_zeros(images, texts, dtype=exact), v.new_zeros(images, texts, dtype=exact)
    word = v.new_empty((texts, len(v)) if keep else (0, 0), dtype=index_type(text.longest))
    patch = v.new_empty((images, len(t)) if keep else (0, 0), dtype=index_type(image.longest))
    for c in _text_tiles(text, image.longest):
        words, real_rows = t[c.rows], c.rows[c.real.flatten()]
        for g in _image_tiles(image, len(words)):
            products = _products(words, v[g.rows]).view(*c.real.shape, -1, g.patches)
            best_word, word_place = _best(products, 1, keep)  # [c, g, P]
            best_patch, patch_place = _best(products, 3, keep)  # [c, L, g]
            s_i2t[g.images, c.texts] = best_word.mean(dim=2).T
            s_t2i[g.images, c.texts] = ((best_patch * c.real[..., None]).sum(1) / c.lengths[:, None]).T
            if keep:  # a repeat is its text's last token, and rounding may let it win over that
                own_word = torch.minimum(word_place, c.lengths[:, None, None] - 1)
                indexable(word)[c.texts, g.rows] = to_indices(own_word.flatten(1), word.dtype)
                indexable(patch)[g.images, real_rows] = to_indices(patch_place[c.real].T, patch.dtype)
    return s_i2t, s_t2i, word, patch


def backward(
    image: Tokens, text: Tokens, word: Tensor, patch: Tensor, grad_i2t: Tensor, grad_t2i: Tensor
) -> tuple[Tensor, Tensor]:
    """See backends.py."""
    v, t, exact = image.x, text.x, grad_i2t.dtype
    grad_v, grad_t = v.new_zeros(v.shape, dtype=exact), t.new_zeros(t.shape, dtype=exact)
    for c in _text_tiles(text, image.longest):
        words = t[c.rows].to(exact)
        grad_words = torch.zeros_like(words)
        for g in _image_tiles(image, len(words)):
            own_word = as_places(indexable(word)[c.texts, g.rows]).unflatten(1, (-1, g.patches))  # [c, g, P]
            own_patch = as_places(indexable(patch)[g.images, c.rows]).T.unflatten(0, c.real.shape)  # [c, L, g]
            block = (g.images, c.texts)
            weights = _one_hot(c, g, own_word, own_patch, grad_i2t[block].T, grad_t2i[block].T)
            grad_words.addmm_(weights, v[g.rows].to(exact))
            grad_v[g.rows].addmm_(weights.T, words)
        grad_t.index_add_(0, c.rows, grad_words)  # repeats add zeros to their token, in whatever order
    return grad_v, grad_t


class _TextTile(NamedTuple):
    """c texts of similar length, padded to the longest, L, with repeats of their last token."""

    texts: Tensor
    """[c] int64, which texts."""
    rows: Tensor
    """[c * L] int64, their tokens among the packed ones."""
    real: Tensor
    """[c, L] bool, tokens but not repeats."""
    lengths: Tensor
    """[c] int64."""


class _ImageTile(NamedTuple):
    """g consecutive images of P patches each."""

    images: slice
    rows: slice
    """Their packed patches."""
    patches: int


def _tile_products(device: torch.device) -> int:
    return (CPU_TILE_BYTES * torch.get_num_threads() if device.type == "cpu" else DEVICE_TILE_BYTES) // 4


def _text_tiles(text: Tokens, longest_image: int) -> Iterator[_TextTile]:
    lengths = text.lengths().long()
    order = torch.argsort(lengths, stable=True)
    ordered, device = lengths[order].tolist(), text.x.device
    most = _tile_products(device) // max(1, longest_image)  # tokens of a tile, repeats included
    begin = 0
    while begin < len(ordered):
        end = begin + 1
        while end < len(ordered) and (end + 1 - begin) * ordered[end] <= most:
            end += 1
        texts = order[begin:end]
        place, sizes = torch.arange(ordered[end - 1], device=device), lengths[texts]
        rows = text.offsets[texts].long()[:, None] + torch.minimum(place, sizes[:, None] - 1)
        yield _TextTile(texts, rows.flatten(), place < sizes[:, None], sizes)
        begin = end


def _image_tiles(image: Tokens, text_tokens: int) -> list[_ImageTile]:
    """Images in tiles; those of one tile have equally many patches, so ragged ones come one by one."""
    count, longest = len(image.offsets) - 1, image.longest
    if count * longest == len(image.x):
        most = max(1, _tile_products(image.x.device) // max(1, longest * text_tokens))
        blocks = [slice(i, min(i + most, count)) for i in range(0, count, most)]
        return [_ImageTile(b, slice(b.start * longest, b.stop * longest), longest) for b in blocks]
    ends = image.offsets.tolist()
    return [_ImageTile(slice(i, i + 1), slice(ends[i], ends[i + 1]), ends[i + 1] - ends[i]) for i in range(count)]


def _products(text: Tensor, image: Tensor) -> Tensor:
    """[c * L, D], [g * P, D] -> [c * L, g * P] in the accumulation type."""
    if text.is_cuda and text.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(text, image.T, out_dtype=torch.float32)
    exact = torch.promote_types(text.dtype, torch.float32)
    return text.to(exact) @ image.to(exact).T


def _best(products: Tensor, dim: int, index: bool) -> tuple[Tensor, Tensor]:
    """The maximum along a dimension and, if asked for, where it first occurs."""
    count, best = products.shape[dim], products.amax(dim)
    if not index:
        return best, best
    if products.is_cuda:
        return best, products.argmax(dim)
    # torch's arg max is scalar code on a CPU, several times slower than these vectorised steps. At a maximum the
    # difference is 0 and `count - place` is left, largest for the first; elsewhere it ends far below 0.
    count_minus_place = torch.arange(count, 0, -1, dtype=products.dtype).view(-1, *[1] * (products.ndim - 1 - dim))
    highest = (products - best.unsqueeze(dim)).mul_(1e38).add_(count_minus_place).amax(dim)
    place = (count - highest).nan_to_num_(0.0, 0.0, 0.0)  # a NaN goes on as a value, not an index
    return best, place.int()


def _one_hot(c: _TextTile, g: _ImageTile, word: Tensor, patch: Tensor, grad_i2t: Tensor, grad_t2i: Tensor) -> Tensor:
    """[c * L, g * P], the gradient of each product of a tile: 1/P of grad_i2t where a patch found its best word and
    1/L of grad_t2i ([c, g] both) where a word found its best patch, zero elsewhere."""
    to_words = (grad_i2t / g.patches)[:, None, :, None].expand(-1, 1, -1, g.patches)  # [c, 1, g, P]
    to_patches = (grad_t2i / c.lengths[:, None])[:, None] * c.real[..., None]  # [c, L, g]
    weights = grad_i2t.new_zeros(*c.real.shape, grad_i2t.shape[1], g.patches)  # [c, L, g, P]
    weights.scatter_(1, word[:, None], to_words)
    weights.scatter_add_(3, patch[..., None], to_patches[..., None])
    return weights.flatten(2).flatten(0, 1)
