"""Late interaction against loops over images, texts and tokens; winners, ties, tiles, precision, memory."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from mmpt.batch import Tokens, pack, pack_equal, unpack
from mmpt.ops.late_interaction import op
from mmpt.ops.late_interaction import torch_tiles as under_test
from mmpt.ops.late_interaction.op import late_interaction
from mmpt.ops.late_interaction.winners import winner_bytes
from tests.ops.late_interaction.brute_force import check as check_backend
from tests.ops.late_interaction.brute_force import tokens as random_tokens

WIDTH = 5
LENGTHS = st.lists(st.integers(1, 7), min_size=1, max_size=5)


def tokens(lengths: list[int], seed: int, dtype: torch.dtype = torch.float64, width: int = WIDTH) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    rows = [normalize(torch.randn(n, width, generator=generator, dtype=torch.float64), dim=-1) for n in lengths]
    return pack([row.to(dtype) for row in rows])


def loop(image: Tokens, text: Tokens) -> tuple[Tensor, Tensor]:
    """Yao et al. 2022, eq. 3 and 4, token by token; the first of equal winners, by Python's own max."""
    i2t, t2i = [], []
    for patches in unpack(image):
        for words in unpack(text):
            by_patch = [[p @ w for w in words] for p in patches]
            by_word = [[p @ w for p in patches] for w in words]
            i2t.append(sum(max(row) for row in by_patch) / len(patches))
            t2i.append(sum(max(row) for row in by_word) / len(words))
    shape = (len(image.offsets) - 1, len(text.offsets) - 1)
    return torch.stack(i2t).view(shape), torch.stack(t2i).view(shape)  # type: ignore[arg-type]


def gradients(function, image: Tokens, text: Tokens) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both scores, and the gradients of a weighting of them that no two pairs share."""
    v, t = image.x.clone().requires_grad_(), text.x.clone().requires_grad_()
    i2t, t2i = function(image.with_x(v), text.with_x(t))
    ramp = torch.linspace(-1, 2, i2t.numel(), dtype=i2t.dtype).view_as(i2t)
    grads = torch.autograd.grad((i2t * ramp + t2i * ramp.flip(0, 1).square()).sum(), (v, t))
    return i2t.detach(), t2i.detach(), *grads


def check(image: Tokens, text: Tokens, tolerance: float = 1e-12) -> None:
    for found, expected in zip(gradients(late_interaction, image, text), gradients(loop, image, text), strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, LENGTHS, st.integers(0, 99), st.sampled_from([32, 200, 1000, 1 << 20]))
def test_ragged_on_both_sides_at_any_tile_size(images: list[int], texts: list[int], seed: int, tile: int) -> None:
    before, under_test.CPU_TILE_BYTES = under_test.CPU_TILE_BYTES, tile
    try:
        check(tokens(images, seed), tokens(texts, seed + 100))
    finally:
        under_test.CPU_TILE_BYTES = before


LONGER = st.lists(st.integers(1, 77), min_size=1, max_size=4)


@settings(max_examples=12, deadline=None)
@given(
    LONGER, LONGER, st.integers(1, 300), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_any_lengths_widths_and_types(
    images: list[int], texts: list[int], width: int, dtype: torch.dtype, strided: bool, seed: int
) -> None:
    """Against fp64, pair by pair; of strided rows as of contiguous ones."""
    image, text = (random_tokens(n, width, dtype, seed + i) for i, n in enumerate((images, texts)))
    if strided:
        image, text = (side.with_x(side.x.repeat_interleave(2, dim=1)[:, ::2]) for side in (image, text))
    check_backend(under_test, image, text)


def test_images_of_equal_length() -> None:
    check(tokens([6] * 4, 0), tokens([3, 1, 7, 7, 2], 1))


@pytest.mark.parametrize(("patches", "words"), [(300, 3), (3, 300), (257, 256)])
def test_more_tokens_than_a_byte_counts(patches: int, words: int) -> None:
    image, text = tokens([patches, patches], 0, width=3), tokens([words, 2], 1, width=3)
    v, t = image.x.requires_grad_(), text.x.requires_grad_()
    exact = v.unflatten(0, (2, -1))[:, None, :, None] * t[None, None, None, :]  # [2, 1, P, T, D]
    products = exact.sum(-1)[:, 0]  # [2, P, T]
    parts = products.split([words, 2], dim=2)
    i2t = torch.stack([part.max(2).values.mean(1) for part in parts], 1)
    t2i = torch.stack([part.max(1).values.mean(1) for part in parts], 1)
    found = late_interaction(image, text)
    torch.testing.assert_close(found, (i2t, t2i))
    for a, b in zip(torch.autograd.grad(sum(s.square().sum() for s in found), (v, t)),
                    torch.autograd.grad(i2t.square().sum() + t2i.square().sum(), (v, t)), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b)


def test_gradcheck() -> None:
    image, text = tokens([4, 4], 3), tokens([2, 5, 1], 4)
    v, t = image.x.requires_grad_(), text.x.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: late_interaction(image.with_x(a), text.with_x(b)), (v, t))
    assert torch.autograd.gradcheck(lambda a: late_interaction(image.with_x(a), text.with_x(t.detach())), (v,))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=3), st.integers(0, 9))
def test_a_tie_goes_to_the_first_token(texts: list[list[int]], seed: int) -> None:
    """Tokens drawn from three vectors tie all the time; only the first of each kind may have a gradient.

    Whole numbers, because a matrix product may round equal rows differently.
    """
    kinds = torch.randint(-3, 4, (3, WIDTH), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    image = pack([kinds[torch.tensor(choice)] for choice in ([0, 1, 1, 0], [2, 2])])
    check(image, pack([kinds[torch.tensor(choice)] for choice in texts]))


def test_directions_differ_and_swap_with_their_arguments() -> None:
    image, text = tokens([4, 6], 0), tokens([2, 3, 5], 1)
    i2t, t2i = late_interaction(image, text)
    assert (i2t - t2i).abs().max() > 0.01
    back_i2t, back_t2i = late_interaction(text, image)
    torch.testing.assert_close((back_i2t.T, back_t2i.T), (t2i, i2t))


def test_runs_are_equal_to_the_bit() -> None:
    image, text = pack_equal(torch.randn(9, 16, 32)), tokens([3, 9, 4, 17] * 5, 1, torch.float32, 32)
    for a, b in zip(gradients(late_interaction, image, text), gradients(late_interaction, image, text), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_sums_in_fp32(dtype: torch.dtype) -> None:
    """Exact but for fp32 rounding, given the rounded inputs, though their dot product would not be."""
    image, text = tokens([16] * 3, 0, dtype, 256), tokens([5, 9], 1, dtype, 256)
    found = gradients(late_interaction, image, text)
    exact = gradients(late_interaction, image.with_x(image.x.double()), text.with_x(text.x.double()))
    assert found[0].dtype == found[1].dtype == torch.float32 and found[2].dtype == found[3].dtype == dtype
    for a, b in zip(found[:2], exact[:2], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-7)
    rounding = torch.finfo(dtype).eps
    for a, b in zip(found[2:], exact[2:], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=rounding, atol=1e-6)


@pytest.mark.parametrize("lengths", [[6] * 7, [3, 1, 9, 4, 4, 2, 5]], ids=["equal", "ragged"])
def test_winners_stored_or_found_again_change_nothing(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    image, text = tokens(lengths, 0, torch.float32), tokens([3, 1, 7, 2], 1, torch.float32)
    kept = gradients(partial(late_interaction, winners="store"), image, text)
    monkeypatch.setattr(op, "FOUND_AGAIN_BYTES", winner_bytes(image, text) // 3)
    assert op.images_at_a_time(image, text) < 3
    monkeypatch.setattr(op, "STORED_BYTES", winner_bytes(image, text) - 1)
    for winners in ("recompute", "auto"):
        found = gradients(partial(late_interaction, winners=winners), image, text)
        for a, b in zip(found, kept, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_winners_are_kept_only_for_a_backward() -> None:
    image, text = tokens([6] * 2, 0, torch.float32), tokens([3, 1], 1, torch.float32)
    x = image.with_x(image.x.requires_grad_())

    def saved(winners: str) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            late_interaction(x, text, winners)  # type: ignore[arg-type]
        return sum(sizes)

    assert saved("store") - saved("recompute") == winner_bytes(image, text) == 2 * 12 + 2 * 4
    with torch.no_grad():
        assert saved("store") == 0


def test_torch_knows_the_operator() -> None:
    """Schema, fake tensors, autograd registration, tracing: PyTorch's own check of an operator."""
    image, text = tokens([4, 2], 0, torch.float32), tokens([3, 1, 2], 1, torch.float32)
    v, t = image.x.requires_grad_(), text.x.requires_grad_()
    for keep in (True, False):
        torch.library.opcheck(
            op._forward, (v, t, image.offsets, text.offsets, 4, 3, keep),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static"),
        )  # fmt: skip
    *_, word, patch = op._forward(v.detach(), t.detach(), image.offsets, text.offsets, 4, 3, True)
    weights = torch.ones(2, 3), torch.ones(2, 3)
    for kept in (True, False):
        torch.library.opcheck(
            op._backward, (*weights, v.detach(), t.detach(), image.offsets, text.offsets, 4, 3, word, patch, kept),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


def test_compiles_as_one_graph() -> None:
    image, text = tokens([4, 2], 0, torch.float32), tokens([3, 1, 2], 1, torch.float32)
    compiled = torch.compile(late_interaction, backend="aot_eager", fullgraph=True)
    for a, b in zip(gradients(compiled, image, text), gradients(late_interaction, image, text), strict=True):
        assert torch.equal(a, b)


def test_what_cannot_be_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    image, text = tokens([4, 2], 0, torch.float32), tokens([3, 1, 2], 1, torch.float32)
    with pytest.raises(ValueError, match=r"one type and width, got torch.float32 \[6, 5\] .* torch.float64 \[6, 5\]"):
        late_interaction(image, text.with_x(text.x.double()))
    with pytest.raises(ValueError, match="up to 65,536 tokens per text, got 65537"):
        late_interaction(image, text._replace(longest=65537))
    monkeypatch.setenv("MMPT_LATE_INTERACTION", "abacus")
    with pytest.raises(ValueError, match="MMPT_LATE_INTERACTION=abacus: there are auto, "):
        late_interaction(image, text)


def test_autocast_rounds_the_inputs_and_nothing_else() -> None:
    image, text = tokens([16] * 3, 0, torch.float32, 64), tokens([5, 9], 1, torch.float32, 64)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = gradients(late_interaction, image, text)
    rounded = gradients(late_interaction, image.with_x(image.x.bfloat16()), text.with_x(text.x.bfloat16()))
    for a, b in zip(mixed, rounded, strict=True):
        assert torch.equal(a, b.float())


def test_nan_comes_out_as_nan() -> None:
    image, text = tokens([3, 3], 0), tokens([2, 4], 1)
    image.x[1] = float("nan")
    v = image.x.requires_grad_()
    i2t, t2i = late_interaction(image.with_x(v), text)
    assert i2t[0].isnan().all() and t2i[0].isnan().all() and i2t[1].isfinite().all()
    (i2t.sum() + t2i.sum()).backward()


def test_no_images_and_no_texts() -> None:
    none = Tokens(torch.zeros(0, WIDTH), torch.zeros(1, dtype=torch.int32), 0)
    some = tokens([2, 3], 0, torch.float32)
    assert late_interaction(none, some)[0].shape == (0, 2) and late_interaction(some, none)[1].shape == (2, 0)


def test_a_text_without_tokens_is_named() -> None:
    empty = Tokens(torch.ones(3, WIDTH), torch.tensor([0, 2, 2, 3], dtype=torch.int32), 2)
    with pytest.raises(ValueError, match="text 1 has no tokens"):
        late_interaction(tokens([2], 0, torch.float32), empty)


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.nbytes)
        return out


def test_memory_is_a_tile_and_not_all_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMPT_LATE_INTERACTION", "torch")
    monkeypatch.setattr(under_test, "CPU_TILE_BYTES", (1 << 20) // torch.get_num_threads())
    image, text = pack_equal(torch.randn(64, 49, 16)), tokens(list(range(4, 24)) * 5, 1, torch.float32, 16)
    with _Largest() as largest:
        gradients(late_interaction, image, text)
    assert 4 * len(image.x) * len(text.x) > 8 * (1 << 20)
    assert largest.bytes <= 1 << 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cuda_equals_cpu(dtype: torch.dtype) -> None:
    image, text = tokens([49] * 8, 0, dtype, 256), tokens([5, 9, 20, 1] * 4, 1, dtype, 256)
    on_cpu = gradients(late_interaction, image, text)
    on_cuda = late_interaction(image.to("cuda"), text.to("cuda"))
    for a, b in zip(on_cuda, on_cpu[:2], strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=1e-5)
