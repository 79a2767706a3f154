"""Late interaction in fp64, pair by pair, and what any backend's scores, winners and gradients must be beside it."""

import torch
from torch import Tensor

from mmpt.batch import Tokens, pack, unpack
from mmpt.ops.late_interaction.backends import Backend
from mmpt.ops.late_interaction.winners import index_type


def tokens(lengths: list[int], width: int, dtype: torch.dtype, seed: int) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    return pack([torch.randn(n, width, generator=generator).to(dtype) for n in lengths])


def pairs(image: Tokens, text: Tokens) -> list[list[Tensor]]:
    """The products [P, L] of every image with every text."""
    return [[patches.double() @ words.double().T for words in unpack(text)] for patches in unpack(image)]


def scores(image: Tokens, text: Tokens) -> tuple[Tensor, Tensor]:
    products = pairs(image, text)
    i2t = torch.stack([torch.stack([s.amax(1).mean() for s in row]) for row in products])
    return i2t, torch.stack([torch.stack([s.amax(0).mean() for s in row]) for row in products])


def best_products(image: Tokens, text: Tokens, word: Tensor, patch: Tensor) -> tuple[Tensor, Tensor]:
    """The products at the winners, [B_t, T_i] and [B_i, T_t], for autograd; asserts that winners are places."""
    ends_v, ends_t = image.offsets.tolist(), text.offsets.tolist()
    v, t = image.x.double(), text.x.double()
    by_patch = [[None] * (len(ends_v) - 1) for _ in ends_t[1:]]
    by_word = [[None] * (len(ends_t) - 1) for _ in ends_v[1:]]
    for i, own_v in enumerate(map(slice, ends_v[:-1], ends_v[1:])):
        for j, own_t in enumerate(map(slice, ends_t[:-1], ends_t[1:])):
            w, p = word[j, own_v].long(), patch[i, own_t].long()
            assert int(w.max()) < own_t.stop - own_t.start and int(p.max()) < own_v.stop - own_v.start
            by_patch[j][i] = (v[own_v] * t[own_t][w]).sum(1)  # type: ignore[call-overload]
            by_word[i][j] = (v[own_v][p] * t[own_t]).sum(1)  # type: ignore[call-overload]
    return (
        torch.stack([torch.cat(row) for row in by_patch]),  # type: ignore[arg-type]
        torch.stack([torch.cat(row) for row in by_word]),  # type: ignore[arg-type]
    )


def check(
    backend: Backend, image: Tokens, text: Tokens, tolerance: float = 2e-6, gradient_tolerance: float = 1e-5
) -> None:
    """Scores; winners as good as any; gradients given the winners.

    tolerance: relative to |v| |t|; gradient_tolerance: to the largest gradient.
    """
    largest = float(image.x.double().norm(dim=1).max() * text.x.double().norm(dim=1).max())
    atol = tolerance * max(largest, 1e-30)
    i2t, t2i, word, patch = backend.forward(image, text, True)
    without = backend.forward(image, text, False)
    for found, again, exact in zip((i2t, t2i), without[:2], scores(image, text), strict=True):
        assert found.dtype == torch.float32 and torch.equal(found, again)
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=atol)
    assert word.dtype == index_type(text.longest) and patch.dtype == index_type(image.longest)

    v, t = (side.with_x(side.x.double().requires_grad_()) for side in (image, text))
    of_patches, of_words = best_products(v, t, word.int(), patch.int())
    products = pairs(image, text)
    best_of_patches = torch.stack([torch.cat([row[j].amax(1) for row in products]) for j in range(len(word))])
    best_of_words = torch.stack([torch.cat([s.amax(0) for s in row]) for row in products])
    assert (best_of_patches - of_patches).max() <= 2 * atol and (best_of_words - of_words).max() <= 2 * atol

    generator = torch.Generator().manual_seed(1)
    grad_i2t, grad_t2i = torch.randn(2, *i2t.shape, generator=generator)
    grad_i2t[0, 0] = grad_t2i[0, 0] = 0  # a pair without gradient
    grad_v, grad_t = backend.backward(image, text, word, patch, grad_i2t, grad_t2i)
    image_of, text_of = image.sequence_index(), text.sequence_index()
    by_patch = (grad_i2t.double() / image.lengths()[:, None]).T[:, image_of]  # [B_t, T_i]
    by_word = (grad_t2i.double() / text.lengths())[:, text_of]  # [B_i, T_t]
    exact = torch.autograd.grad((of_patches * by_patch).sum() + (of_words * by_word).sum(), (v.x, t.x))
    for found, wanted in zip((grad_v, grad_t), exact, strict=True):
        rounding = 0.0 if found.dtype == torch.float32 else torch.finfo(found.dtype).eps  # of the result alone
        atol = gradient_tolerance * float(wanted.abs().max() + 1e-30)
        torch.testing.assert_close(found.double(), wanted, rtol=gradient_tolerance + rounding, atol=atol)
