"""Token-wise late interaction of every image with every text, both directions from one product per tile.

    s_i2t[a, b] = 1/P_a  sum_p  max_r  <v_ap, t_br>          s_t2i[a, b] = 1/L_b  sum_r  max_p  <v_ap, t_br>

FILIP (Yao et al. 2022), eq. 3 and 4; either one alone is ColBERT's MaxSim (Khattab and Zaharia 2020, eq. 3) as a mean.
The [B_i, B_t, P, L] tensor of all products is never stored. A backend (backends.py) makes a tile of it, reduces it both
ways and drops it. For the backward only the winners are needed, one or two bytes each: kept, or found again.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from mmpt.batch import Tokens
from mmpt.ops.features import cut, sequences
from mmpt.ops.late_interaction.backends import choose
from mmpt.ops.late_interaction.winners import index_type, winner_bytes

WinnersPolicy = Literal["store", "recompute", "auto"]
STORED_BYTES = 4 << 30
"""`auto` keeps winners up to this many bytes."""
FOUND_AGAIN_BYTES = 256 << 20
"""Winners that are found again exist for so many images at a time that they take up to this."""


def late_interaction(image: Tokens, text: Tokens, winners: WinnersPolicy = "auto") -> tuple[Tensor, Tensor]:
    """(s_i2t, s_t2i), [B_i, B_t] each, in fp32 (fp64 for fp64 inputs); products are summed in that type too.

    image: [T_i, D], text: [T_t, D] of one type, packed, sequences of any length from 1. A tie goes to the token that
    comes first, and that one alone has the gradient. Differentiable once in both; runs are equal to the bit. A product
    that is NaN makes its scores NaN. Under autocast the inputs are rounded to bf16.

    winners: `store` keeps B_t T_i + B_i T_t indices, a byte each up to 256 tokens and two beyond, for the backward;
    `recompute` finds them again there, for one more forward; `auto` stores up to STORED_BYTES.

    Raises ValueError for a sequence without tokens, which has no mean, on a CPU; on other devices, where looking would
    wait for the device, it comes out as NaN. Also for inputs of two types or widths, or longer than 65,536 tokens.
    """
    _check(image, text)
    needed = torch.is_grad_enabled() and (image.x.requires_grad or text.x.requires_grad)
    keep = needed and (winners == "store" or (winners == "auto" and winner_bytes(image, text) <= STORED_BYTES))
    s_i2t, s_t2i, _, _ = _forward(
        image.x, text.x, image.offsets, text.offsets, image.longest, text.longest, keep
    )  # fmt: skip
    return s_i2t, s_t2i


def _check(image: Tokens, text: Tokens) -> None:
    if image.x.dtype != text.x.dtype or image.x.shape[1:] != text.x.shape[1:]:
        raise ValueError(
            f"late interaction wants one type and width, got {image.x.dtype} {list(image.x.shape)} for images and "
            f"{text.x.dtype} {list(text.x.shape)} for texts"
        )
    for name, tokens in (("image", image), ("text", text)):
        if tokens.longest > 1 << 16:
            raise ValueError(f"late interaction takes up to 65,536 tokens per {name}, got {tokens.longest}")
        if tokens.offsets.device.type == "cpu" and not torch.compiler.is_compiling():
            short = (tokens.lengths() < 1).nonzero()
            if len(short):
                raise ValueError(
                    f"{name} {int(short[0])} has no tokens; late interaction takes a mean over at least one"
                )


def images_at_a_time(image: Tokens, text: Tokens) -> int:
    """Images whose winners take up to FOUND_AGAIN_BYTES, one at least."""
    return max(1, (len(image.offsets) - 1) * FOUND_AGAIN_BYTES // max(1, winner_bytes(image, text)))


@torch.library.custom_op("mmpt::late_interaction", mutates_args=())
def _forward(
    v: Tensor, t: Tensor, image_offsets: Tensor, text_offsets: Tensor, longest_image: int, longest_text: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """s_i2t, s_t2i, and the winners (winners.py) or, without keep, empty tensors of their types."""
    image, text = Tokens(v, image_offsets, longest_image), Tokens(t, text_offsets, longest_text)
    return choose(image, text).forward(image, text, keep)


@_forward.register_fake
def _(
    v: Tensor, t: Tensor, image_offsets: Tensor, text_offsets: Tensor, longest_image: int, longest_text: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images, texts = image_offsets.shape[0] - 1, text_offsets.shape[0] - 1
    exact = torch.promote_types(v.dtype, torch.float32)
    s_i2t, s_t2i = v.new_empty(images, texts, dtype=exact), v.new_empty(images, texts, dtype=exact)
    word = v.new_empty((texts, v.shape[0]) if keep else (0, 0), dtype=index_type(longest_text))
    patch = v.new_empty((images, t.shape[0]) if keep else (0, 0), dtype=index_type(longest_image))
    return s_i2t, s_t2i, word, patch


@torch.library.custom_op("mmpt::late_interaction_backward", mutates_args=())
def _backward(
    grad_i2t: Tensor, grad_t2i: Tensor, v: Tensor, t: Tensor, image_offsets: Tensor, text_offsets: Tensor,
    longest_image: int, longest_text: int, word: Tensor, patch: Tensor, kept: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of v and t, in their types."""
    image, text = Tokens(v, image_offsets, longest_image), Tokens(t, text_offsets, longest_text)
    backend = choose(image, text)
    at_a_time = images_at_a_time(image, text)
    if kept or at_a_time >= sequences(image):
        if not kept:
            _, _, word, patch = backend.forward(image, text, True)
        grad_v, grad_t = backend.backward(image, text, word, patch, grad_i2t, grad_t2i)
        return grad_v.to(v.dtype), grad_t.to(t.dtype)
    grad_v, grad_t = v.new_zeros(v.shape), t.new_zeros(t.shape, dtype=grad_i2t.dtype)
    for part, images, rows in cut(image, at_a_time):
        assert isinstance(part, Tokens)
        _, _, word, patch = backend.forward(part, text, True)
        part_v, part_t = backend.backward(part, text, word, patch, grad_i2t[images], grad_t2i[images])
        grad_v[rows] = part_v.to(v.dtype)
        grad_t += part_t
    return grad_v, grad_t.to(t.dtype)


@_backward.register_fake
def _(
    grad_i2t: Tensor, grad_t2i: Tensor, v: Tensor, t: Tensor, image_offsets: Tensor, text_offsets: Tensor,
    longest_image: int, longest_text: int, word: Tensor, patch: Tensor, kept: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return v.new_empty(v.shape), t.new_empty(t.shape)


def _remember(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    v, t, image_offsets, text_offsets, *ctx.rest = inputs
    ctx.save_for_backward(v, t, image_offsets, text_offsets, *output[2:])


def _differentiate(ctx: Any, grad_i2t: Tensor, grad_t2i: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    v, t, image_offsets, text_offsets, word, patch = ctx.saved_tensors
    longest_image, longest_text, keep = ctx.rest
    grads = _backward(
        grad_i2t, grad_t2i, v, t, image_offsets, text_offsets, longest_image, longest_text, word, patch, keep
    )
    return *grads, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_remember)
for _device in ("cpu", "cuda"):
    _forward.register_autocast(_device, torch.bfloat16)
