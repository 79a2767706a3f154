"""Every path of attention against a loop over sequences, values and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import grad

from mmpt.batch import Tokens, pack
from mmpt.ops import attention as under_test
from mmpt.ops.attention import attention

HEADS, HEAD_WIDTH = 2, 8


def packed(lengths: list[int], seed: int, device: str = "cpu", dtype: torch.dtype = torch.float64) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(n, HEADS, HEAD_WIDTH, generator=generator, dtype=torch.float64) for n in lengths]
    return pack([row.to(device, dtype) for row in rows])


def loop(query: Tensor, key: Tensor, value: Tensor, sequences: Tokens, keys: Tokens, causal: bool) -> Tensor:
    """One sequence, head and query at a time."""
    out = torch.zeros_like(query)
    ends, key_ends = sequences.offsets.tolist(), keys.offsets.tolist()
    for i in range(len(ends) - 1):
        for t in range(ends[i], ends[i + 1]):
            last = key_ends[i] + t - ends[i] + 1 if causal else key_ends[i + 1]
            seen = slice(key_ends[i], last)
            for h in range(query.shape[1]):
                weights = ((key[seen, h] @ query[t, h]) / HEAD_WIDTH**0.5).softmax(0)
                out[t, h] = weights @ value[seen, h]
    return out


def check(lengths: list[int], key_lengths: list[int] | None, causal: bool, path=attention) -> None:
    sequences = packed(lengths, 0)
    keys = sequences if key_lengths is None else packed(key_lengths, 1)
    query = packed(lengths, 2).x.requires_grad_()
    key, value = (packed(key_lengths or lengths, seed).x.requires_grad_() for seed in (3, 4))
    out = path(query, key, value, sequences, causal, 0.0, None if key_lengths is None else keys)
    expected = loop(query, key, value, sequences, keys, causal)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    inputs = (query, key, value)
    for found, wanted in zip(
        grad((out * weights).sum(), inputs), grad((expected * weights).sum(), inputs), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.booleans())
def test_within_sequences(lengths: list[int], causal: bool) -> None:
    check(lengths, None, causal)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=4))
def test_to_other_sequences(lengths: list[tuple[int, int]]) -> None:
    check([q for q, _ in lengths], [k for _, k in lengths], False)


@pytest.mark.parametrize("causal", [False, True])
def test_padded_path_agrees_where_lengths_are_equal(causal: bool) -> None:
    def padded(query, key, value, sequences, causal, dropout, keys):
        return under_test._padded(query, key, value, sequences, keys or sequences, causal, dropout)

    check([4, 4, 4], None, causal, padded)


@pytest.mark.parametrize(
    ("lengths", "path"), [([3, 3], "_equal"), ([3, 2], "_padded"), ([5], "_equal")], ids=["equal", "ragged", "single"]
)
def test_the_path_depends_on_lengths(lengths: list[int], path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for name in ("_equal", "_padded", "_varlen"):
        original = getattr(under_test, name)
        monkeypatch.setattr(
            under_test, name, lambda *a, name=name, original=original: taken.append(name) or original(*a)
        )
    sequences = packed(lengths, 0)
    attention(sequences.x, sequences.x, sequences.x, sequences)
    assert taken == [path]


def test_equal_lengths_copy_nothing_on_the_way_in() -> None:
    """The fused projection's slices go to the kernel as views."""
    fused = torch.randn(12, 3, HEADS, HEAD_WIDTH)
    seen = []

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        seen.extend(x.untyped_storage().data_ptr() for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    original, under_test.scaled_dot_product_attention = under_test.scaled_dot_product_attention, spy
    try:
        attention(*fused.unbind(1), pack([torch.zeros(4)] * 3))
    finally:
        under_test.scaled_dot_product_attention = original
    assert seen == [fused.untyped_storage().data_ptr()] * 3


def test_nothing_crosses_a_boundary() -> None:
    sequences = packed([3, 1, 5], 0)
    before = attention(sequences.x, sequences.x, sequences.x, sequences)
    changed = sequences.x.clone()
    changed[3] = float("nan")  # the whole second sequence
    after = attention(changed, changed, changed, sequences)
    assert after[3].isnan().all()
    torch.testing.assert_close(after[[0, 1, 2, 4, 5, 6, 7, 8]], before[[0, 1, 2, 4, 5, 6, 7, 8]])


@pytest.mark.parametrize("lengths", [[3, 5], [4, 4]])
def test_dropout_drops_weights_and_keeps_their_mean(lengths: list[int]) -> None:
    torch.manual_seed(0)
    sequences = packed(lengths * 3000, 0)
    q, k = sequences.x, packed(lengths * 3000, 1).x
    value = torch.ones_like(q)  # so that an output is the sum of the weights that were kept
    outs = attention(q, k, value, sequences, dropout=0.25).unflatten(0, (3000, -1))
    assert outs.std() > 0.1
    torch.testing.assert_close(outs.mean(0), torch.ones_like(outs[0]), rtol=0, atol=0.06)


def test_causal_attention_to_other_sequences_is_refused() -> None:
    tokens = packed([2], 0)
    with pytest.raises(ValueError, match="causal"):
        attention(tokens.x, tokens.x, tokens.x, tokens, causal=True, key_sequences=tokens)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: flash attention over packed sequences")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [[1, 7, 33, 5], [16, 16]])
def test_cuda_paths_agree(causal: bool, dtype: torch.dtype, lengths: list[int]) -> None:
    sequences = packed(lengths, 0, "cuda", dtype)
    inputs = [packed(lengths, seed, "cuda", dtype).x.requires_grad_() for seed in (1, 2, 3)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    wanted = loop(*exact, sequences, sequences, causal)
    wanted_gradients = grad(wanted.square().sum(), exact)
    paths = [
        under_test._varlen(*inputs, sequences, sequences, causal),
        under_test._padded(*inputs, sequences, sequences, causal, 0.0),
    ]
    if len(set(lengths)) == 1:
        paths.append(under_test._equal(*inputs, sequences, causal, 0.0))
    for out in paths:
        torch.testing.assert_close(out.double(), wanted, rtol=2e-2, atol=2e-2)
        for found, expected in zip(grad(out.double().square().sum(), inputs), wanted_gradients, strict=True):
            torch.testing.assert_close(found.double(), expected, rtol=5e-2, atol=5e-2)
