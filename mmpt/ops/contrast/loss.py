"""The symmetric contrastive loss of a global batch, with memory that does not grow with it.

    loss = 1/2 sum_i [ log sum_j exp a_ij - sum_j y_ij a_ij ]  +  1/2 sum_j [ log sum_i exp b_ij - sum_i z_ij b_ij ]

a = scale * s_i2t and b = scale * s_t2i over all N images and N texts; y and z are what each should find (targets.py).
Each rank scores its own B images with all texts, once for both sums: rows are whole, columns need one all-reduced [N]
vector, images are never gathered. Scores lie in memory for as many images at a time as fit; where all fit at once they
are kept for the backward, otherwise they are computed again there.

Sources: van den Oord et al. 2018, eq. 4, in both directions as in CLIP (Radford et al. 2021, figure 3); label smoothing
as in ALIGN (Jia et al. 2021, section 4.1); backward from the saved log-sum-exps as in Inf-CLIP (Cheng et al. 2024).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mmpt import dist
from mmpt.ops.contrast.softmax import Softmax
from mmpt.ops.contrast.targets import Targets, targets_of
from mmpt.ops.contrast.texts import Texts, exchange
from mmpt.ops.features import Features, cut, sequences, travelling, values, with_values

Score = Callable[[Any, Any], tuple[Tensor, Tensor]]
"""(s_i2t, s_t2i), [A, C] each, of A images with C texts, both Features; differentiable. May be one tensor twice."""
SLAB_ELEMENTS = 1 << 18
"""Elementwise work on scores goes over so many at a time."""


@dataclass(frozen=True)
class ContrastConfig:
    """How the images of a rank meet the texts of all. Only the two last change what is computed."""

    exchange: Literal["gather", "ring"] = "gather"
    """Texts of all ranks on every rank, or passing by one rank's at a time: memory does not grow with the ranks."""
    score_bytes: int = 1 << 30
    """Scores, 8 bytes a pair, are kept for the backward up to this size; beyond, blocks of it are computed twice."""
    label_smoothing: float = 0.0
    """Share of each target that is spread over the whole batch."""
    filter_below: float = 0.0
    """Negatives to which both softmaxes give less than this have no gradient; what is lost is reported."""

    def __post_init__(self):
        if not 0 <= self.label_smoothing < 1 or not 0 <= self.filter_below < 1 or self.score_bytes < 1:
            raise ValueError(
                f"label_smoothing ({self.label_smoothing}) and filter_below ({self.filter_below}) are shares in "
                f"[0, 1), score_bytes ({self.score_bytes}) is 1 or more"
            )


class Contrast(NamedTuple):
    """Local shares; over all ranks they add up to those of the global batch. Scalars."""

    loss: Tensor
    correct_i2t: Tensor
    """Images that find a positive text first; ties count by chance."""
    correct_t2i: Tensor
    dropped: Tensor | None
    """Probability that filter_below left without gradient, half of each softmax; 0 until the backward has run."""


def contrast(
    score: Score, image: Features, text: Features, scale: Tensor, config: ContrastConfig,
    group: Tensor | None = None, soft: tuple[Tensor, Tensor] | None = None,
) -> Contrast:  # fmt: skip
    """The loss of this rank's B pairs among the N of all; see above. Collective, in the backward too.

    scale: [1], multiplies the scores. group: [B] int64, pairs of one group (captions of one picture, say) are each
    other's positives; soft: the targets y and z themselves, [B, N] each. Differentiable in image, text and scale.
    Raises ValueError for targets of another shape.
    """
    image, text = travelling(image), travelling(text)
    here, texts = exchange(text, config.exchange)
    targets = targets_of(sequences(image), group, config.label_smoothing, soft, scale.device)
    dropped = torch.zeros((), device=scale.device) if config.filter_below else None
    plan = _Plan(score, image, texts, targets, config, dropped)
    loss, correct_i2t, correct_t2i = _Contrast.apply(values(image), here, scale, plan)
    return Contrast(loss, correct_i2t, correct_t2i, dropped)


@dataclass(frozen=True)
class _Plan:
    score: Score
    layout: Features
    """The images, of which the values are replaced."""
    texts: Texts
    targets: Targets
    config: ContrastConfig
    dropped: Tensor | None

    def blocks(self, v: Tensor, text: Features) -> Iterator[tuple[Features, slice, slice]]:
        """The images, as many at a time as may be scored with these texts."""
        return blocks(with_values(self.layout, v), text, self.config.score_bytes)


def blocks(image: Features, text: Features, score_bytes: int) -> Iterator[tuple[Features, slice, slice]]:
    """The images, as many at a time as two scores each with these texts fit into so many bytes of fp32."""
    return cut(image, max(1, score_bytes // (8 * max(1, sequences(text)))))


class _Scored(NamedTuple):
    """Scores of a block with the graph that made them; the features are leaves."""

    image: Tensor
    text: Tensor
    i2t: Tensor
    t2i: Tensor


def _scored(score: Score, image: Features, text: Features) -> _Scored:
    v, t = values(image).detach().requires_grad_(), values(text).detach().requires_grad_()
    with torch.enable_grad():
        i2t, t2i = score(with_values(image, v), with_values(text, t))
    return _Scored(v, t, i2t, t2i)


class _Contrast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, t: Tensor, scale: Tensor, plan: _Plan) -> tuple[Tensor, Tensor, Tensor]:
        ctx.plan, ctx.kept = plan, None
        pairs, count = sequences(plan.layout), plan.texts.count
        exact = torch.promote_types(v.dtype, torch.float32)
        over_texts, over_images = Softmax(pairs, 1, exact, v.device), Softmax(count, 0, exact, v.device)
        attraction = v.new_zeros((), dtype=exact)
        for columns, text in plan.texts.visits(t):
            for image, images, _ in plan.blocks(v, text):
                whole = sequences(image) == pairs and sequences(text) == count
                if whole and any(ctx.needs_input_grad):
                    ctx.kept = _scored(plan.score, image, text)
                    s_i2t, s_t2i = ctx.kept.i2t.detach(), ctx.kept.t2i.detach()
                else:
                    s_i2t, s_t2i = plan.score(image, text)
                for slab, rows in slabs(images, s_i2t.shape[1]):
                    a, b = scale * s_i2t[slab], scale * s_t2i[slab]
                    positive = plan.targets.positive(rows, columns)
                    y, z = plan.targets.distributions(positive, rows, columns, exact)
                    over_texts.add(a, positive, rows)
                    over_images.add(b, positive, columns)
                    attraction += (y * a).sum() + (z * b).sum()
        over_images.join_ranks()
        own = slice(plan.targets.first, plan.targets.first + pairs)
        loss = (over_texts.log_sum_exp.sum() + over_images.log_sum_exp[own].sum() - attraction) / 2
        correct = over_texts.correct(slice(None)), over_images.correct(own)
        ctx.save_for_backward(v, t, scale, over_texts.log_sum_exp, over_images.log_sum_exp)
        ctx.mark_non_differentiable(*correct)
        return loss, *correct

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        v, t, scale, *log_sum_exps = ctx.saved_tensors
        plan: _Plan = ctx.plan
        exact = grad_loss.dtype
        upstream = dist.gather(grad_loss.reshape(1)).repeat_interleave(sequences(plan.layout))  # [N]; one per rank
        grad_v, grad_scale = _Sum(v, exact), torch.zeros_like(scale)

        def gradient_of(columns: slice, text: Features) -> Tensor:
            grad_text = _Sum(values(text), exact)
            for image, images, rows in plan.blocks(v, text):
                scored = ctx.kept or _scored(plan.score, image, text)
                ctx.kept = None
                grad_scale.add_(_to_score_gradients(plan, scored, scale, log_sum_exps, upstream, images, columns))
                outputs = (scored.i2t, scored.t2i)
                own, theirs = torch.autograd.grad(
                    outputs, (scored.image, scored.text), [output.detach() for output in outputs]
                )
                del scored, outputs, image
                grad_v.add(rows, own)
                grad_text.add(slice(None), theirs)
            return grad_text.total()

        if plan.dropped is not None:
            plan.dropped.zero_()
        grad_t = plan.texts.collect(t, gradient_of)
        return grad_v.total().to(v.dtype), grad_t.to(t.dtype), grad_scale, None


class _Sum:
    """A sum of gradients of (parts of) one tensor, which costs no memory of its own while there is one addend."""

    def __init__(self, of: Tensor, exact: torch.dtype):
        self._of, self._exact = of, exact
        self._sum: Tensor | None = None

    def add(self, rows: slice, part: Tensor) -> None:
        if self._sum is None and len(part) == len(self._of):
            self._sum = part
            return
        if self._sum is None:
            self._sum = torch.zeros_like(self._of, dtype=self._exact)
        self._sum = self._sum.to(self._exact)
        self._sum[rows] += part

    def total(self) -> Tensor:
        return torch.zeros_like(self._of) if self._sum is None else self._sum


def _to_score_gradients(
    plan: _Plan, scored: _Scored, scale: Tensor, log_sum_exps: list[Tensor], upstream: Tensor, images: slice,
    columns: slice,
) -> Tensor:  # fmt: skip
    """Overwrite the scores of a block with the loss's gradients by them; return the gradient of the scale.

    By a_ij it is (p_ij - y_ij) / 2 times what arrives at this rank, by b_ij likewise, except that the sum behind q_ij
    belongs to the rank of text j. Where both scores are one tensor, so are their gradients, each holding half.
    """
    s_i2t, s_t2i, exact = scored.i2t.detach(), scored.t2i.detach(), scored.i2t.dtype
    one = scored.i2t is scored.t2i
    over_texts, over_images = log_sum_exps
    here, there = upstream[plan.targets.first] / 2, upstream[columns] / 2
    grad_scale = torch.zeros_like(scale)
    for slab, rows in slabs(images, s_i2t.shape[1]):
        positive = plan.targets.positive(rows, columns)
        y, z = plan.targets.distributions(positive, rows, columns, exact)
        p = (scale * s_i2t[slab] - over_texts[rows, None]).exp_()
        q = (scale * s_t2i[slab] - over_images[columns]).exp_()
        by_i2t, by_t2i = (p - y) * here, q * there - z * here
        if plan.dropped is not None:
            weak = (p < plan.config.filter_below) & (q < plan.config.filter_below) & ~positive
            plan.dropped.add_(((p + q) * weak).sum() / 2)
            by_i2t, by_t2i = by_i2t.masked_fill_(weak, 0), by_t2i.masked_fill_(weak, 0)
        grad_scale += (by_i2t * s_i2t[slab]).sum() + (by_t2i * s_t2i[slab]).sum()
        s_i2t[slab] = scale * ((by_i2t + by_t2i) / 2 if one else by_i2t)
        if not one:
            s_t2i[slab] = scale * by_t2i
    return grad_scale


def slabs(images: slice, columns: int) -> Iterator[tuple[slice, slice]]:
    """Runs of the rows of a block, within it and among all images of this rank."""
    each = max(1, SLAB_ELEMENTS // max(1, columns))
    for first in range(images.start, images.stop, each):
        rows = slice(first, min(first + each, images.stop))
        yield slice(rows.start - images.start, rows.stop - images.start), rows
