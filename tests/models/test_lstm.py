"""The LSTM tower against torch's LSTM over one text at a time."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from mmpt.batch import pack, unpack
from mmpt.models.lstm import LSTM, LSTMConfig
from mmpt.models.pooling import max_token

CONFIG = LSTMConfig(hidden_width=6, depth=3, embedding_width=5, vocab_size=20, max_tokens=12)
LENGTHS = (3, 12, 1, 7, 7, 2)


def texts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 20, (n,), generator=generator) for n in LENGTHS]


def pair(pool: str = "final") -> tuple[LSTM, nn.LSTM]:
    """Ours, and torch's of all layers at once with the same weights."""
    torch.manual_seed(0)
    ours = replace(CONFIG, pool=pool).build().double()  # type: ignore[arg-type]
    theirs = nn.LSTM(5, 6, num_layers=3, bidirectional=True).double()
    state = {}
    for layer, block in enumerate(ours.blocks):
        state |= {name.replace("_l0", f"_l{layer}"): value for name, value in block.state_dict().items()}
    theirs.load_state_dict(state)
    return ours, theirs


@pytest.mark.parametrize("pool", ["final", "max", "mean"])
def test_same_as_torch_one_text_at_a_time(pool: str) -> None:
    """Tokens, summaries and gradients; a text does not depend on the longer ones beside it."""
    ours, theirs = pair(pool)
    tokens = ours(pack(texts()))
    expected, summaries = [], []
    for ids in texts():
        out, (state, _) = theirs(ours.embedding(ids)[:, None])
        expected.append(out[:, 0])
        final = state[-2:, 0].flatten()  # of the last layer: forwards, backwards
        summaries.append({"final": final, "max": out[:, 0].amax(0), "mean": out[:, 0].mean(0)}[pool])
    for mine, wanted in zip(unpack(tokens), expected, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.summary(tokens), torch.stack(summaries), rtol=1e-10, atol=1e-12)
    weights = torch.randn(len(LENGTHS), 12, dtype=torch.float64)
    found = torch.autograd.grad((ours.summary(tokens) * weights).sum(), [*ours.parameters()])
    wanted = torch.autograd.grad(
        (torch.stack(summaries) * weights).sum(), [ours.embedding.token_embedding, *theirs.parameters()]
    )
    for mine, theirs_grad in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs_grad, rtol=1e-9, atol=1e-12)


def test_texts_may_be_equally_long_or_one() -> None:
    ours, _ = pair()
    for rows in ([torch.arange(4)], [torch.arange(4), torch.arange(4) + 3]):
        together = unpack(ours(pack(rows)))
        for mine, row in zip(together, rows, strict=True):
            torch.testing.assert_close(mine, ours(pack([row])).x)


def test_half_precision() -> None:
    torch.manual_seed(0)
    model = CONFIG.build()
    exact = model(pack(texts())).x
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(pack(texts())).x.float(), exact, rtol=0, atol=0.02)
    half = model.bfloat16()(pack(texts())).x
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, rtol=0, atol=0.02)
    half.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_maximum_of_ragged_sequences() -> None:
    rows = [torch.randn(n, 3, requires_grad=True) for n in (4, 1, 2)]
    found = max_token(pack(rows))
    assert torch.equal(found, torch.stack([row.amax(0) for row in rows]))
    found.sum().backward()
    assert all(row.grad is not None and torch.equal(row.grad, (row == row.amax(0)).float()) for row in rows)


def test_dropout_in_training_only() -> None:
    torch.manual_seed(0)
    model, ids = replace(CONFIG, dropout=0.5).build(), pack(texts())
    assert not torch.equal(model(ids).x, model(ids).x)
    assert torch.equal(model.eval()(ids).x, model(ids).x)


def test_sizes() -> None:
    inputs = CONFIG.inputs()
    assert (CONFIG.width, CONFIG.summary_width, inputs.max_text_tokens, inputs.vocab_size) == (12, 12, 12, 20)
    with pytest.raises(ValueError, match="depth 0"):
        replace(CONFIG, depth=0)
