"""Late interaction on Hopper: the forward in Gluon (gluon_forward.py), the backward in Triton."""

import importlib

import torch
from torch import Tensor

from mmpt.batch import Tokens
from mmpt.ops.late_interaction import triton_backend
from mmpt.ops.late_interaction.gpu_launches import Launch, filled, hopper_launches

MOST_WORDS, MOST_PATCHES, WIDTHS = 64, 256, (64, 256)
"""WIDTHS: a row of shared memory takes 64 numbers, and three tiles of 256 fit."""


def refusal(image: Tokens, text: Tokens) -> str:
    if reason := triton_backend.refusal(image, text):
        return reason
    if torch.cuda.get_device_capability(image.x.device) != (9, 0):
        return "it is for compute capability 9.0"
    return refused_shape(image, text)


def refused_shape(image: Tokens, text: Tokens) -> str:
    if not WIDTHS[0] <= filled(image.x.shape[1]) <= WIDTHS[1]:
        return f"it takes vectors of 33 to {WIDTHS[1]} numbers, not {image.x.shape[1]}"
    if image.longest > MOST_PATCHES or text.longest > MOST_WORDS:
        return (
            f"it takes images of up to {MOST_PATCHES} patches and texts of up to {MOST_WORDS} tokens, not "
            f"{image.longest} and {text.longest}"
        )
    return ""


def forward(image: Tokens, text: Tokens, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See backends.py. A feature that is not finite makes its scores NaN."""
    kernel = importlib.import_module("mmpt.ops.late_interaction.gluon_forward").forward_kernel

    def run(grid: tuple[int, int], arguments: tuple, width: int, launch: Launch) -> None:
        shape = {"D": width, "BM": launch.patches, "L": launch.words, "NT": launch.texts}
        kernel[grid](*arguments, **shape, KEEP=keep, num_warps=launch.warps)

    return triton_backend.run_forward(image, text, keep, hopper_launches(text.longest, image.longest), run)


backward = triton_backend.backward
