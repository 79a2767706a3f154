"""Where an image shows what each word of its caption says, for methods in which the two meet.

transport         The word's rows of the plan that moves words onto places at least cost (objectives/transport.py) after
                  the last block, as ViLT's authors show them (Kim et al. 2021, figure 4; their demo's beta and
                  iterations).
cross_attention   A * relu(dS/dA), the mean over heads: A the attention of the word to the places in one block, S the
                  log odds of a match (Li et al. 2021, ALBEF, section 6.4 and its released code, which takes S to be
                  the logit of a match alone). The block is the third of six, as there: number (depth + 1) // 2.

The map of a word is the mean over its tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mmpt.batch import Tokens
from mmpt.methods.albef import ALBEF
from mmpt.methods.meter import METER
from mmpt.methods.tasks import pair_sets
from mmpt.methods.uniter import UNITER
from mmpt.methods.vilt import ViLT
from mmpt.models.fusion import CrossBlock
from mmpt.models.image import ViT
from mmpt.objectives.transport import costs, transport_plan
from mmpt.ops.packing import padded

SHOWN_BETA, SHOWN_ITERATIONS = 0.1, 1000
"""Of the plan that is shown: closer to the optimum than training's."""

WordRows = list[list[list[int]]]
"""For each pair, for each of its words, the places of the word's tokens in the text."""


@torch.no_grad()
def transport_maps(method: ViLT | UNITER, image: Tokens, text: Tokens, words: WordRows) -> list[Tensor]:
    """[words, P] of each pair. image, text: features of B images and their captions."""
    pairs = method.fuse(text, image)
    classed = isinstance(method, ViLT) and method.config.image.class_token
    ends = isinstance(method, UNITER)
    x, y, x_real, y_real = pair_sets(pairs, text, image, text_ends=ends, image_first=not classed)
    plan = transport_plan(costs(x.double(), y.double()), x_real, y_real, SHOWN_BETA, SHOWN_ITERATIONS)  # [B, L, P]
    return _of_words(plan.float(), image, words, int(classed))


def cross_attention_maps(method: ALBEF | METER, image: Tokens, text: Tokens, words: WordRows) -> list[Tensor]:
    """[words, P] of each pair. image, text: features of B images and their captions."""
    if isinstance(method, ALBEF):
        blocks, tower = method.encoders.fusion.blocks, method.encoders.image
    else:
        blocks, tower = method.fusion.text_blocks, method.image
    block = blocks[(len(blocks) - 1) // 2]
    assert isinstance(block, CrossBlock)
    with torch.enable_grad(), attention_in_sight(block, text, image) as found:
        score = method.score_pairs(image, text).sum()  # a pair's weights move its own score alone
        weights = found[0]  # more are found where the backward computes a block again
        (gradient,) = torch.autograd.grad(score, weights)
    cam = (weights.detach() * gradient.clamp(min=0)).mean(1)  # [B, L, P]
    return _of_words(cam, image, words, int(isinstance(tower, ViT) and tower.config.class_token))


def _of_words(maps: Tensor, image: Tokens, words: WordRows, first: int) -> list[Tensor]:
    """maps [B, L, P'] of tokens over image tokens -> [words, P] of each pair; first: the first image token that is a
    place."""
    lengths = image.lengths().tolist()
    return [
        torch.stack([own[rows, first:length].mean(0) for rows in pair]) if pair else own[:0, first:length]
        for own, length, pair in zip(maps, lengths, words, strict=True)
    ]


@contextmanager
def attention_in_sight(block: CrossBlock, sequences: Tokens, context: Tokens) -> Iterator[list[Tensor]]:
    """Inside, the block's cross-attention is softmax(q k^T / sqrt(Dh)) v written out, so that its weights are known and
    have a gradient: fused attention never holds them. Yields the weights [B, H, L, P] of each forward, without dropout.

    sequences, context: how queries and keys are packed.
    """
    heads, entered, seen = block.config.heads, dict[str, Tensor](), list[Tensor]()

    def keep(module: nn.Module, _: object, out: Tensor) -> None:
        entered["query" if module is block.cross_q else "context"] = out

    def written_out(_: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        q = padded(sequences.with_x(entered["query"].unflatten(1, (heads, -1))))[0]  # [B, L, H, Dh]
        both, real = padded(context.with_x(entered["context"].unflatten(1, (2, heads, -1))))
        k, v = both.unbind(2)  # [B, P, H, Dh] each
        scores = torch.einsum("blhd,bphd->bhlp", q, k) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(~real[:, None, None, :], -torch.inf).softmax(-1)
        seen.append(weights)
        out = torch.einsum("bhlp,bphd->blhd", weights, v).flatten(0, 1)  # [B * L, H, Dh]
        rows = sequences.sequence_index() * sequences.longest + sequences.position()
        return (out[rows].flatten(1).to(arguments[0].dtype),)

    hooks = [
        block.cross_q.register_forward_hook(keep),
        block.cross_kv.register_forward_hook(keep),
        block.cross_out.register_forward_pre_hook(written_out),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
