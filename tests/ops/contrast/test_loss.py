"""The contrastive loss, its targets and its exchanges, against torch's cross entropy on the whole score matrices."""

import itertools
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from mmpt import dist
from mmpt.batch import Tokens, concatenate, pack, pack_equal
from mmpt.ops.contrast import loss as under_test
from mmpt.ops.contrast.loss import Contrast, ContrastConfig, Score, contrast
from mmpt.ops.contrast.softmax import Softmax
from mmpt.ops.features import Features, values, with_values
from mmpt.ops.late_interaction.op import late_interaction
from mmpt.ops.similarity import similarity
from tests.ranks import run

PAIRS, WIDTH, SCALE = 8, 6, 20.0
PLAIN = ContrastConfig()


def cosine(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    cosines = similarity(image, text)
    return cosines, cosines


class Found(NamedTuple):
    loss: Tensor
    image: Tensor
    text: Tensor
    scale: Tensor
    correct: tuple[float, float]


def features(kind: str, dtype: torch.dtype = torch.float64) -> tuple[list[Features], list[Features], Score]:
    """Of each of the global batch's pairs, and how they are scored."""
    g = torch.Generator().manual_seed(0)
    random = lambda n: normalize(torch.randn(n, WIDTH, generator=g, dtype=torch.float64), dim=-1).to(dtype)  # noqa: E731
    if kind == "vectors":
        return [random(1) for _ in range(PAIRS)], [random(1) for _ in range(PAIRS)], cosine
    lengths = torch.randint(1, 6, (PAIRS,), generator=g).tolist()
    images = [pack_equal(random(4)[None]) if kind == "tokens" else pack([random(n)]) for n in reversed(lengths)]
    return [*images], [pack([random(n)]) for n in lengths], late_interaction


def joined(parts: list[Features]) -> Features:
    if isinstance(parts[0], Tokens):
        return concatenate(parts)  # type: ignore[arg-type]
    return torch.cat(parts)  # type: ignore[arg-type]


def group_ids() -> Tensor:
    return torch.tensor([0, 1, 2, 0, 4, 2, 2, 7])


def soft_targets() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    y, z = torch.randn(2, PAIRS, PAIRS, generator=g, dtype=torch.float64)
    return y.softmax(1), z.softmax(0)


OPTIONS = {"own pair": "", "smoothed": "", "groups": "group", "groups smoothed": "group", "soft": "soft"}


def smoothing_of(option: str) -> float:
    return 0.1 if "smoothed" in option else 0.0


def whole(kind: str, option: str) -> Found:
    """One process, dense matrices, torch's cross entropy with probabilities for targets."""
    images, texts, score = features(kind)
    image, text = joined(images), joined(texts)
    v, t = values(image).clone().requires_grad_(), values(text).clone().requires_grad_()
    scale = torch.tensor([SCALE], dtype=torch.float64, requires_grad=True)
    i2t, t2i = (scale * s for s in score(with_values(image, v), with_values(text, t)))
    group = group_ids() if OPTIONS[option] == "group" else torch.arange(PAIRS)
    same = (group[:, None] == group).double()
    y, z = soft_targets() if OPTIONS[option] == "soft" else (same / same.sum(1, keepdim=True), same / same.sum(0))
    smooth = partial(cross_entropy, label_smoothing=smoothing_of(option), reduction="sum")
    loss = (smooth(i2t, y) + smooth(t2i.T, z.T)) / 2
    gradients = torch.autograd.grad(loss, (v, t, scale))
    right = [float((same.gather(1, m.argmax(1, keepdim=True))).sum()) for m in (i2t, t2i.T)]
    return Found(loss.detach(), *gradients, (right[0], right[1]))


def part(kind: str, option: str, config: ContrastConfig, rank: int, world_size: int) -> Found:
    """What one rank computes of it, with the loss and the scale's gradient summed over ranks."""
    images, texts, score = features(kind)
    own = slice(rank * PAIRS // world_size, (rank + 1) * PAIRS // world_size)
    image, text = joined(images[own]), joined(texts[own])
    v, t = values(image).clone().requires_grad_(), values(text).clone().requires_grad_()
    scale = torch.tensor([SCALE], dtype=torch.float64, requires_grad=True)
    group = group_ids()[own] if OPTIONS[option] == "group" else None
    y, z = soft_targets()
    soft = (y[own], z[own]) if OPTIONS[option] == "soft" else None
    config = replace(config, label_smoothing=smoothing_of(option))
    out = contrast(score, with_values(image, v), with_values(text, t), scale, config, group, soft)
    out.loss.backward()
    assert v.grad is not None and t.grad is not None and scale.grad is not None
    total, right_i2t, right_t2i, grad_scale = dist.sum_over_ranks(
        torch.stack([out.loss.detach(), out.correct_i2t, out.correct_t2i, scale.grad[0]])
    )
    return Found(total, v.grad, t.grad, grad_scale[None], (float(right_i2t), float(right_t2i)))


CONFIGS = {
    "gather": PLAIN, "gather, 2 images at a time": ContrastConfig(score_bytes=16 * PAIRS),
    "ring": ContrastConfig("ring"), "ring, 1 image at a time": ContrastConfig("ring", score_bytes=1),
}  # fmt: skip
KINDS = ("vectors", "tokens", "ragged tokens")
CASES = list(itertools.product(KINDS, OPTIONS, CONFIGS))


def check_close(parts: list[Found], expected: Found, where: tuple) -> None:
    for found in parts:
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=1e-12, msg=str(where))
        torch.testing.assert_close(found.scale, expected.scale, rtol=1e-10, atol=1e-12, msg=str(where))
        assert found.correct == pytest.approx(expected.correct), where
    torch.testing.assert_close(torch.cat([found.image for found in parts]), expected.image, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.cat([found.text for found in parts]), expected.text, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("kind", "option", "config"), CASES)
def test_one_process_equals_cross_entropy(kind: str, option: str, config: str) -> None:
    check_close([part(kind, option, CONFIGS[config], 0, 1)], whole(kind, option), (kind, option, config))


def all_parts(rank: int, world_size: int) -> list[Found]:
    return [part(kind, option, CONFIGS[config], rank, world_size) for kind, option, config in CASES]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_equal_cross_entropy(world_size: int) -> None:
    for case, *parts in zip(CASES, *run(all_parts, world_size), strict=True):
        check_close(parts, whole(case[0], case[1]), (world_size, *case))


def run_once(config: ContrastConfig, pairs: int = 32, scale: float = 30.0) -> tuple[Contrast, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    v, t = (normalize(torch.randn(pairs, 16, generator=g, dtype=torch.float64), dim=-1) for _ in range(2))
    v.requires_grad_(), t.requires_grad_()
    out = contrast(cosine, v, t, torch.tensor([scale], dtype=torch.float64), config)
    out.loss.backward()
    assert v.grad is not None and t.grad is not None
    return out, v.grad, t.grad


def test_logits_of_any_size() -> None:
    for scale in (0.0, 1.0, 1e4):
        out, v, t = run_once(PLAIN, scale=scale)
        assert all(x.isfinite().all() for x in (out.loss, v, t))
    assert run_once(PLAIN, scale=0.0)[0].correct_i2t.item() == pytest.approx(1.0), "equal scores are worth chance"


def test_filtering_loses_what_it_says() -> None:
    """Nothing at 0; otherwise the gradient of the loss in which the weak negatives' scores are constants."""
    _, v, t = run_once(PLAIN)
    eps = 0.01
    out, filtered_v, filtered_t = run_once(replace(PLAIN, filter_below=eps))
    g = torch.Generator().manual_seed(3)
    a, b = (normalize(torch.randn(32, 16, generator=g, dtype=torch.float64), dim=-1).requires_grad_() for _ in range(2))
    logits = 30.0 * a @ b.T
    p, q = logits.softmax(1).detach(), logits.softmax(0).detach()
    weak = (p < eps) & (q < eps) & ~torch.eye(32, dtype=torch.bool)
    own = torch.arange(32)
    frozen = torch.where(weak, logits.detach(), logits)
    loss = (cross_entropy(frozen, own, reduction="sum") + cross_entropy(frozen.T, own, reduction="sum")) / 2
    torch.testing.assert_close((filtered_v, filtered_t), torch.autograd.grad(loss, (a, b)))
    assert out.dropped is not None
    assert out.dropped.item() == pytest.approx(float(((p + q) * weak).sum() / 2)) and 0 < out.dropped.item() < 32
    assert not torch.equal(filtered_v, v)
    nothing, same_v, same_t = run_once(replace(PLAIN, filter_below=1e-300))
    assert nothing.dropped is not None and nothing.dropped.item() == 0
    assert torch.equal(same_v, v) and torch.equal(same_t, t)


def test_nothing_grows_with_the_square_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor that any operation makes has 8 images' scores, not those of all."""
    from tests.ops.late_interaction.test_op import _Largest

    monkeypatch.setattr(under_test, "SLAB_ELEMENTS", 1024)
    pairs = 512
    with _Largest() as blocked:
        run_once(ContrastConfig(score_bytes=8 * 8 * pairs), pairs)
    with _Largest() as kept:
        run_once(PLAIN, pairs)
    assert blocked.bytes == 8 * 16 * pairs, "the features"
    assert kept.bytes == 8 * pairs * pairs


def largest_of_a_rank(rank: int, world_size: int, exchange: str) -> int:
    """Bytes of the largest tensor that FILIP's loss makes there and back, of 48 pairs a rank."""
    from tests.ops.late_interaction.test_op import _Largest

    torch.manual_seed(rank)
    image, text = pack_equal(torch.randn(48, 4, 16)), pack([torch.randn(1 + i % 4, 16) for i in range(48)])
    v, t = image.x.requires_grad_(), text.x.requires_grad_()
    with _Largest() as largest:
        config = ContrastConfig(exchange)  # type: ignore[arg-type]
        contrast(late_interaction, image.with_x(v), text.with_x(t), torch.tensor([20.0]), config).loss.backward()
    return largest.bytes


@pytest.mark.slow
def test_a_ring_does_not_grow_with_the_ranks() -> None:
    ring = [run(largest_of_a_rank, world_size, "ring") for world_size in (2, 4)]
    assert len({*ring[0], *ring[1]}) == 1, ring
    gathered = [run(largest_of_a_rank, world_size, "gather")[0] for world_size in (2, 4)]
    assert gathered[1] == 2 * gathered[0] >= 2 * ring[0][0], gathered


def test_bad_targets_are_named() -> None:
    v, scale = torch.randn(4, 3), torch.ones(1)
    with pytest.raises(ValueError, match=r"\[B, N\] = \[4, 4\], got \[4, 3\]"):
        contrast(cosine, v, v, scale, PLAIN, soft=(torch.ones(4, 3), torch.ones(4, 4)))
    with pytest.raises(ValueError, match="without label smoothing"):
        contrast(cosine, v, v, scale, ContrastConfig(label_smoothing=0.1), soft=(torch.ones(4, 4), torch.ones(4, 4)))
    with pytest.raises(ValueError, match=r"a group for each of 4 pairs, got \[3\]"):
        contrast(cosine, v, v, scale, PLAIN, group=torch.ones(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"label_smoothing \(1.0\)"):
        ContrastConfig(label_smoothing=1.0)


def test_of_equal_scores_each_counts_its_share() -> None:
    """As if one were drawn; wherever the blocks are cut."""
    twins = torch.eye(4)
    twins[0, 1] = twins[1, 0] = 1.0
    for cut in (1, 2, 4):
        found = [Softmax(4, dim, twins.dtype, twins.device) for dim in (1, 0)]
        for i in range(0, 4, cut):
            rows = slice(i, i + cut)
            found[0].add(twins[:, rows], torch.eye(4, dtype=torch.bool)[:, rows], slice(None))
            found[1].add(twins[rows], torch.eye(4, dtype=torch.bool)[rows], slice(None))
        assert [float(softmax.correct(slice(None))) for softmax in found] == [3.0, 3.0]
        torch.testing.assert_close(found[0].log_sum_exp, twins.logsumexp(1))
