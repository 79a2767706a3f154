"""Cases for the Triton kernels in Triton's interpreter, on a CPU. Collected by test_gpu_backends.py alone, in a process
where TRITON_INTERPRET=1 was set before triton was imported. fp32 and fp16 only: the interpreter's bf16 products are
wrong.
"""

import pytest
import torch

from mmpt.batch import Tokens, pack
from mmpt.ops.late_interaction import torch_tiles, triton_backend
from tests.ops.late_interaction.brute_force import check, tokens


@pytest.mark.parametrize("seed", range(6))
def test_random_lengths_and_widths(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(1, 78, (1 + seed % 3,), generator=generator).tolist()
    texts = torch.randint(1, 78, (1 + seed,), generator=generator).tolist()
    width = int(torch.randint(1, 80, (), generator=generator))
    image, text = (tokens(n, width, torch.float32, seed + s) for s, n in enumerate((images, texts)))
    check(triton_backend, image, text)


def test_every_bucket_and_texts_that_do_not_fill_a_tile() -> None:
    image = tokens([49, 49], 32, torch.float32, 0)
    check(triton_backend, image, tokens([8] * 9 + [1, 9, 16, 17, 32, 33, 64, 65, 100, 128], 32, torch.float32, 1))


def test_fp16() -> None:
    image, text = tokens([40, 16], 64, torch.float16, 0), tokens([3, 20, 7], 64, torch.float16, 1)
    found = triton_backend.forward(image, text, True)
    exact = torch_tiles.forward(image, text, True)
    for a, b in zip(found[:2], exact[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    grads = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0)) * 1e-6  # far below fp16's least
    own = triton_backend.backward(image, text, *found[2:], *grads)
    wanted = torch_tiles.backward(image, text, *found[2:], *grads)
    for a, b in zip(own, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3 * float(b.abs().max()))


@pytest.mark.parametrize("patches", [[300], [577, 5], [257, 256]])
def test_more_patches_than_a_tile_and_than_a_byte_counts(patches: list[int]) -> None:
    check(triton_backend, tokens(patches, 16, torch.float32, 0), tokens([3, 11], 16, torch.float32, 1))


@pytest.mark.parametrize("patches", [20, 300])
def test_a_tie_goes_to_the_first(patches: int) -> None:
    """Three vectors of whole numbers make all the tokens."""
    kinds = torch.randint(-3, 4, (3, 16), generator=torch.Generator().manual_seed(0)).float()
    image, text = pack([kinds[torch.arange(patches) % 3]]), pack([kinds[torch.arange(n) % 3] for n in (1, 5, 30)])
    found, exact = triton_backend.forward(image, text, True), torch_tiles.forward(image, text, True)
    assert all(torch.equal(a, b) for a, b in zip(found[2:], exact[2:], strict=True))


def test_what_is_not_a_number_spoils_its_pairs_only() -> None:
    image, text = tokens([20, 30], 16, torch.float32, 0), tokens([9, 4], 16, torch.float32, 1)
    image.x[3, 5] = float("nan")
    i2t, t2i, word, patch = triton_backend.forward(image, text, True)
    assert i2t[0].isnan().all() and t2i[0].isnan().all() and i2t[1].isfinite().all() and t2i[1].isfinite().all()
    assert int(word[0].max()) < 9 and int(word[1].max()) < 4 and int(patch[0].max()) < 20


def test_none() -> None:
    nothing = Tokens(torch.zeros(0, 16), torch.zeros(1, dtype=torch.int32), 0)
    some = tokens([2, 3], 16, torch.float32, 0)
    assert triton_backend.forward(nothing, some, True)[0].shape == (0, 2)
    i2t, _, word, patch = triton_backend.forward(some, nothing, True)
    grad_v, grad_t = triton_backend.backward(some, nothing, word, patch, i2t, i2t)
    assert grad_v.shape == (5, 16) and not grad_v.any() and grad_t.shape == (0, 16)


def test_pairs_without_gradient() -> None:
    """All but two of 60, as a filter of pairs leaves them: most tiles are skipped, the others are not."""
    image, text = tokens([20, 30, 7], 16, torch.float32, 0), tokens([9, 4, 17, 8] * 5, 16, torch.float32, 1)
    i2t, t2i, word, patch = triton_backend.forward(image, text, True)
    some = torch.zeros_like(i2t)
    some[0, 3] = some[2, 18] = 1
    own = triton_backend.backward(image, text, word, patch, i2t * some, t2i * some)
    wanted = torch_tiles.backward(image, text, word, patch, i2t * some, t2i * some)
    for a, b in zip(own, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert own[0][:20].any() and not own[0][20:50].any() and own[0][50:].any()


def test_runs_are_equal_to_the_bit() -> None:
    image, text = tokens([20, 30], 16, torch.float32, 0), tokens([9, 4, 17], 16, torch.float32, 1)
    i2t, t2i, word, patch = triton_backend.forward(image, text, True)
    one, other = (triton_backend.backward(image, text, word, patch, i2t, t2i) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
