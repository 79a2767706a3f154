"""W ranks give the loss and gradients of one process holding the global batch; that one is checked against plain loops.

The loops score every pair with Python loops over single images and texts, in fp64, and take torch's cross entropy.
"""

import math
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from mmpt import dist
from mmpt.batch import Tokens, unpack
from mmpt.methods.clip import CLIP
from mmpt.methods.filip import FILIP
from mmpt.methods.method import Method, loss_of
from mmpt.methods.siglip import SigLIP
from tests.methods.tiny import CONFIGS, FUSION, MAX_TOKENS, batch, build
from tests.ranks import run

PAIRS = 8
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-6}
BATCH_NORM = ("align", "slip")  # which divides by small deviations: fp32 rounds more, fp64 shows that it is no mistake
Result = tuple[float, dict[str, Tensor], dict[str, float]]


def scale_of(method: Method) -> Tensor:
    """exp of the parameter, clamped at the cap as after the last step."""
    log_scale = method.logit_scale.log_scale  # type: ignore[union-attr]
    assert isinstance(log_scale, Tensor)
    with torch.no_grad():
        log_scale.clamp_(max=math.log(100.0))
    return log_scale.exp()[0]


def best(rows: Tensor, others: Tensor) -> Tensor:
    """Mean over rows of the highest product with any of the others."""
    return torch.stack([torch.stack([row @ other for other in others]).max() for row in rows]).mean()


def kept(sequences: list[Tensor], others: list[Tensor], ratio: float) -> list[Tensor]:
    """The ceil(ratio * L) tokens of each sequence with the highest product with any token of the others."""
    out, other = [], torch.cat(others).detach()
    for rows in sequences:
        value = (rows.detach() @ other.T).amax(1)
        out.append(rows[value.argsort(descending=True, stable=True)[: math.ceil(ratio * len(rows))].sort().values])
    return out


def filip_logits(method: FILIP, image: Tokens, text: Tokens, workers: int) -> tuple[Tensor, Tensor]:
    patches, words = unpack(image), unpack(text)
    ratio, share = method.config.token_keep_ratio, PAIRS // workers
    if ratio < 1:
        groups = [slice(0, PAIRS)] if method.config.scope == "global" else [
            slice(i, i + share) for i in range(0, PAIRS, share)
        ]  # fmt: skip
        chosen = [(kept(patches[g], words[g], ratio), kept(words[g], patches[g], ratio)) for g in groups]
        patches, words = ([rows for part in parts for rows in part] for parts in zip(*chosen, strict=True))
    seen = words
    if method.config.zero_pads:  # patches may choose any of the pads, all zero, which are no words of their text
        words = [w[: len(w) - int((w[-1] == 0).all())] for w in words]
        seen = [torch.cat([w, w.new_zeros(MAX_TOKENS - len(w), w.shape[1])]) for w in words]
    i2t = torch.stack([torch.stack([best(p, w) for w in seen]) for p in patches])
    t2i = torch.stack([torch.stack([best(w, p) for w in words]) for p in patches])
    return i2t, t2i


def by_hand(name: str, workers: int) -> Result:
    """Loss, gradients and reported terms of one process with the global batch, in fp64, by plain loops."""
    method = build(name, torch.float64)
    image, text = method.encode(batch(name, PAIRS, 0, PAIRS))
    scale, own = scale_of(method), torch.arange(PAIRS)
    if isinstance(method, FILIP):
        i2t, t2i = (scale * s for s in filip_logits(method, image, text, workers))
    else:
        i2t = t2i = scale * torch.stack([torch.stack([v @ t for t in text]) for v in image])
    if isinstance(method, SigLIP):
        i2t = t2i = i2t + method.logit_bias.bias
        loss = -sum(logsigmoid(i2t[i, j] * (1 if i == j else -1)) for i in range(PAIRS) for j in range(PAIRS)) / PAIRS
    else:
        loss = (cross_entropy(i2t, own) + cross_entropy(t2i.T, own)) / 2
    assert isinstance(loss, Tensor)
    loss.backward()
    gradients = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    if isinstance(method, CLIP | FILIP) and scale >= 100 * (1 - 1e-12) and gradients["logit_scale.log_scale"] < 0:
        gradients["logit_scale.log_scale"].zero_()
    reported = {
        "accuracy_i2t": float((i2t.argmax(1) == own).float().mean()),
        "accuracy_t2i": float((t2i.argmax(0) == own).float().mean()),
        "logit_scale": scale.item(),
    }
    return loss.item(), gradients, reported


def ours(rank: int, world_size: int, name: str, dtype: torch.dtype) -> Result:
    """What `world_size` ranks compute, with gradients averaged over ranks as the engine does."""
    method, share = build(name, dtype), PAIRS // world_size
    own = batch(name, PAIRS, rank * share, share)
    terms = method("terms", own)
    totals = in_one({key: torch.tensor(float(n)) for key, n in method.counts(own).items()})
    loss_of(terms, totals, world_size).backward()
    assert all(abs(float(terms[key].count) - n) < 1e-6 for key, n in method.counts(own).items())
    assert all(terms[key].weight for key in totals) and all(key in totals for key in terms if terms[key].weight)
    sums = {key: torch.stack([t.sum.detach().double(), t.count.double()]) for key, t in terms.items()}
    means = {key: float(total / count) for key, (total, count) in in_one(sums).items()}
    summed = in_one({key: p.grad for key, p in method.named_parameters() if p.grad is not None})
    gradients = {key: gradient / world_size for key, gradient in summed.items()}
    loss = sum(terms[key].weight * means.pop(key) for key in totals)
    return loss, gradients, means


def in_one(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """All of them summed over ranks, in one message: each costs milliseconds where ranks share a core."""
    flat = dist.sum_over_ranks(torch.cat([value.flatten() for value in values.values()]))
    parts = flat.split([value.numel() for value in values.values()])
    return {key: part.view(value.shape) for (key, value), part in zip(values.items(), parts, strict=True)}


def everything(rank: int, world_size: int) -> dict[tuple[str, torch.dtype], Result]:
    return {(name, dtype): ours(rank, world_size, name, dtype) for name in CONFIGS for dtype in TOLERANCE}


def check(found: Result, expected: Result, dtype: torch.dtype, where: str) -> None:
    """Loss and gradients agree, relative to the loss and to the largest gradient of each parameter.

    In fp32 relative to the largest of all parameters, whose rounding passes through every one of them.
    """
    tolerance = TOLERANCE[dtype] * (3 if dtype == torch.float32 and where.startswith(BATCH_NORM) else 1)
    assert found[0] == pytest.approx(expected[0], rel=tolerance, abs=tolerance), where
    assert found[1].keys() == expected[1].keys(), where
    largest = max(float(g.abs().max()) for g in expected[1].values())
    for key, gradient in found[1].items():
        own = float(expected[1][key].abs().max())
        scale = largest if dtype == torch.float32 else max(own, 1e-3 * largest)
        error = float((gradient - expected[1][key]).abs().max())
        assert error <= tolerance * scale, f"{where}, {key}: {error / scale:.1e}"
    assert found[2] == pytest.approx(expected[2], rel=1e-5), where


def by_groups(name: str, workers: int, dtype: torch.dtype) -> Result:
    """One process that goes through the workers' shares one after the other: what `scope` local means."""
    method, share = build(name, dtype), PAIRS // workers
    groups = [batch(name, PAIRS, first, share) for first in range(0, PAIRS, share)]
    totals = {key: sum(method.counts(own)[key] for own in groups) for key in method.counts(groups[0])}
    found = [method("terms", own) for own in groups]
    sum(loss_of(terms, totals, 1) for terms in found).backward()  # type: ignore[union-attr]
    means = {
        key: float(sum(terms[key].sum.detach().double() for terms in found))
        / float(sum(terms[key].count for terms in found))
        for key in found[0]
    }
    gradients = {key: p.grad for key, p in method.named_parameters() if p.grad is not None}
    return sum(found[0][key].weight * means.pop(key) for key in totals), gradients, means


@cache
def expected_of(name: str, workers: int, dtype: torch.dtype) -> Result | None:
    """What `workers` ranks should give, by whatever is least like them; None where fp64 says it all.

    Only where the scope is local does their number matter; elsewhere it is 1.
    """
    if name.split()[0] in (*FUSION, *BATCH_NORM):
        return by_groups(name, workers, dtype)
    if dtype == torch.float64:
        return by_hand(name, workers)
    return None if name == "filip local" else ours(0, 1, name, dtype)  # one worker selects otherwise


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.split()[0] not in (*FUSION, *BATCH_NORM)])
def test_one_process_equals_plain_loops(name: str) -> None:
    expected = expected_of(name, 1, torch.float64)
    assert expected
    check(ours(0, 1, name, torch.float64), expected, torch.float64, name)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_equal_one_process_and_plain_loops(world_size: int) -> None:
    results = run(everything, world_size)
    for name in CONFIGS:
        workers = world_size if name.endswith("local") else 1
        for dtype in TOLERANCE:
            if (wanted := expected_of(name, workers, dtype)) is None:
                continue
            for rank, result in enumerate(results):
                check(result[name, dtype], wanted, dtype, f"{name}, {dtype}, rank {rank} of {world_size}")


def test_local_selection_depends_on_the_workers_and_global_does_not() -> None:
    """Otherwise the two scopes could be mixed up without notice."""

    def losses(name: str) -> list[float]:
        found = [expected_of(name, workers, torch.float64) for workers in (1, 2, 4)]
        return [result[0] for result in found if result]

    assert len(set(losses("albef local"))) == 3
    assert len(set(losses("filip local"))) == 3 and len(set(losses("filip global"))) == 1
    assert losses("filip local")[0] == losses("filip global")[0]


def test_zero_pads_are_chosen() -> None:
    """Otherwise they could be forgotten without notice."""
    assert by_hand("filip zero pads", 1)[0] != pytest.approx(by_hand("filip", 1)[0], rel=1e-3)


@pytest.mark.parametrize("name", ["clip at the cap", "filip at the cap"])
def test_the_cap_is_really_met(name: str) -> None:
    assert by_hand(name, 1)[2]["logit_scale"] == pytest.approx(100.0)
