"""The sigmoid loss of a global batch, with memory that does not grow with it.

    loss = sum_i sum_j  - log sigmoid( z_ij l_ij ),      l = scale * v_i . t_j + bias,  z 1 for a pair and -1 elsewhere

over the B images of a rank and all N texts; divided by the number of images it is Zhai et al. 2023, eq. 1. As in
loss.py, cosines lie in memory for as many images at a time as fit, are kept for the backward where all fit at once and
are computed again there otherwise; texts are gathered, or pass by in a ring (section 3.3 there).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from mmpt.ops.contrast.loss import Contrast, ContrastConfig, blocks, slabs
from mmpt.ops.contrast.softmax import Softmax
from mmpt.ops.contrast.targets import Targets, targets_of
from mmpt.ops.contrast.texts import Texts, exchange
from mmpt.ops.features import Features, values
from mmpt.ops.similarity import similarity


def sigmoid_contrast(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, config: ContrastConfig) -> Contrast:
    """The loss of this rank's B pairs, [B, D] each, among the N of all; see above. Collective, in the backward too.

    scale, bias: [1]. Differentiable in all four. Of the configuration only exchange and score_bytes matter.
    """
    here, texts = exchange(text, config.exchange)
    plan = _Plan(texts, targets_of(len(image), None, 0.0, None, scale.device), config.score_bytes)
    loss, correct_i2t, correct_t2i = _Sigmoid.apply(image, here, scale, bias, plan)
    return Contrast(loss, correct_i2t, correct_t2i, None)


@dataclass(frozen=True)
class _Plan:
    texts: Texts
    targets: Targets
    score_bytes: int


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, v: Tensor, t: Tensor, scale: Tensor, bias: Tensor, plan: _Plan
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.plan, ctx.kept = plan, None
        pairs, count, exact = len(v), plan.texts.count, torch.promote_types(v.dtype, torch.float32)
        over_texts, over_images = Softmax(pairs, 1, exact, v.device), Softmax(count, 0, exact, v.device)
        loss = v.new_zeros((), dtype=exact)
        for columns, text in plan.texts.visits(t):
            for image, images, _ in blocks(v, text, plan.score_bytes):
                cosines = similarity(values(image), values(text))
                if cosines.shape == (pairs, count) and any(ctx.needs_input_grad):
                    ctx.kept = cosines
                for slab, rows in slabs(images, cosines.shape[1]):
                    logits, positive = scale * cosines[slab] + bias, plan.targets.positive(rows, columns)
                    loss += softplus(torch.where(positive, -logits, logits)).sum()
                    over_texts.add(logits, positive, rows)
                    over_images.add(logits, positive, columns)
        over_images.join_ranks()
        own = slice(plan.targets.first, plan.targets.first + pairs)
        correct = over_texts.correct(slice(None)), over_images.correct(own)
        ctx.save_for_backward(v, t, scale, bias)
        ctx.mark_non_differentiable(*correct)
        return loss, *correct

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        v, t, scale, bias = ctx.saved_tensors
        plan: _Plan = ctx.plan
        grad_v, grad_scale, grad_bias = (
            v.new_zeros(v.shape, dtype=grad_loss.dtype),
            *map(torch.zeros_like, (scale, bias)),
        )

        def gradient_of(columns: slice, text: Features) -> Tensor:
            grad_text = torch.zeros_like(values(text), dtype=grad_loss.dtype)
            for image, images, _ in blocks(v, text, plan.score_bytes):
                cosines = similarity(values(image), values(text)) if ctx.kept is None else ctx.kept
                ctx.kept = None
                for slab, rows in slabs(images, cosines.shape[1]):
                    logits, positive = scale * cosines[slab] + bias, plan.targets.positive(rows, columns)
                    wrong = grad_loss * torch.sigmoid(torch.where(positive, -logits, logits))
                    by_logits = torch.where(positive, -wrong, wrong)
                    grad_scale.add_((by_logits * cosines[slab]).sum())
                    grad_bias.add_(by_logits.sum())
                    cosines[slab] = scale * by_logits  # in place of what is no longer needed
                grad_v[images] += similarity(cosines, values(text).T)  # cosines @ text
                grad_text += similarity(cosines.T, values(image).T)
            return grad_text

        grad_t = plan.texts.collect(t, gradient_of)
        return grad_v.to(v.dtype), grad_t.to(t.dtype), grad_scale, grad_bias, None
