"""Late interaction on a GPU by Triton (triton_forward.py, triton_backward.py), for compute capability 8.0 and above.

Nothing waits for the device: texts are put in buckets by length there, and every bucket that the longest text allows is
launched, empty or not. What to launch is a fixed table: all ranks run the same kernels, with nothing to tune.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmpt.batch import Tokens
from mmpt.ops.late_interaction.gpu_launches import Device, Launch, filled, launches
from mmpt.ops.late_interaction.winners import index_type

MOST_WORDS, MOST_WIDTH = 128, 512
PROGRAMS = 2048
"""To launch in the forward at least, where there are texts for them: some for each multiprocessor."""


def refusal(image: Tokens, text: Tokens) -> str:
    x = image.x
    if x.device.type != "cuda":
        return f"it is for CUDA devices, not {x.device.type}"
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return "it needs compute capability 8.0 or above"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return refused_shape(image, text, device_of(x))


def refused_shape(image: Tokens, text: Tokens, device: Device) -> str:
    if image.x.dtype not in (
        torch.bfloat16,
        torch.float16,
    ):  # fp32 products leave no registers: compiled.py of the tests
        return f"it takes bf16 and fp16, not {image.x.dtype}"
    width = image.x.shape[1]
    if width > MOST_WIDTH or text.longest > MOST_WORDS:
        return (
            f"it takes vectors of up to {MOST_WIDTH} numbers and texts of up to {MOST_WORDS} tokens, not "
            f"{width} and {text.longest}"
        )
    if min(launch.patches for launch in _table(image, text, device)) < 16:
        return f"texts of {text.longest} tokens by {width} numbers do not fit into shared memory"
    return ""


def _table(image: Tokens, text: Tokens, device: Device) -> list[Launch]:
    return launches(text.longest, image.longest, filled(image.x.shape[1]), image.x.itemsize, device)


def device_of(x: Tensor) -> Device:
    if x.device.type != "cuda":  # Triton's interpreter
        return Device(227 << 10, True)
    facts = torch.cuda.get_device_properties(x.device)
    return Device(facts.shared_memory_per_block_optin, facts.major >= 9)


class _Buckets(NamedTuple):
    """Texts by length, on the device: what the kernels know of them, in the order of their arguments."""

    order: Tensor
    """[B_t] int32."""
    rows: Tensor
    """[B_t] int64, where each of these begins."""
    lengths: Tensor
    """[B_t] int32."""
    bounds: Tensor
    """[buckets + 1] int32, into the three."""


def forward(image: Tokens, text: Tokens, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See backends.py. A feature that is not finite makes its scores NaN."""
    kernel = _kernels("forward").forward_kernel

    def run(grid: tuple[int, int], arguments: tuple, width: int, launch: Launch) -> None:
        kernel[grid](
            *arguments, D=width, BM=launch.patches, L=launch.words, NT=launch.texts, KEEP=keep,
            ONE=image.longest <= launch.patches, num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip

    return run_forward(image, text, keep, _table(image, text, device_of(image.x)), run)


def run_forward(
    image: Tokens, text: Tokens, keep: bool, table: list[Launch],
    run: Callable[[tuple[int, int], tuple, int, Launch], None],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What a backend's forward returns. run(grid, arguments, D, launch) computes a bucket, as forward_kernel does."""
    v, t = _rows(image.x), _rows(text.x)
    images, texts = len(image.offsets) - 1, len(text.offsets) - 1
    s_i2t, s_t2i = v.new_empty(2, images, texts, dtype=torch.float32)
    word = v.new_empty((texts, len(v)) if keep else (0, 0), dtype=index_type(text.longest))
    patch = v.new_empty((images, len(t)) if keep else (0, 0), dtype=index_type(image.longest))
    if not images or not texts:
        return s_i2t, s_t2i, word, patch
    buckets, found = _bucketed(text, table), (s_i2t, s_t2i, word, patch)
    for bucket, launch in enumerate(table):
        shares = min(-(-texts // launch.texts), max(1, PROGRAMS // images))
        arguments = (v, t, image.offsets.long(), *buckets, *found, texts, len(v), len(t), bucket)
        run((images, shares), arguments, v.shape[1], launch)
    spoilt = _not_finite(image)[:, None] | _not_finite(text)
    return s_i2t.masked_fill_(spoilt, torch.nan), s_t2i.masked_fill_(spoilt, torch.nan), word, patch


def backward(
    image: Tokens, text: Tokens, word: Tensor, patch: Tensor, grad_i2t: Tensor, grad_t2i: Tensor
) -> tuple[Tensor, Tensor]:
    """See backends.py. Gradients are multiplied in the inputs' type, scaled so that the largest is 1."""
    v, t = _rows(image.x), _rows(text.x)
    images, texts, width = len(image.offsets) - 1, len(text.offsets) - 1, v.shape[1]
    grad_v, grad_t = torch.zeros_like(v, dtype=torch.float32), torch.zeros_like(t, dtype=torch.float32)
    given = image.x.shape[1]
    if not images or not texts:
        return grad_v[:, :given], grad_t[:, :given]
    largest = torch.maximum(grad_i2t.abs().amax(), grad_t2i.abs().amax()).clamp(min=torch.finfo(torch.float32).tiny)
    g1, g2 = (grad_i2t / largest).contiguous(), (grad_t2i / largest).contiguous()
    table = _table(image, text, device_of(v))
    buckets, image_offsets = _bucketed(text, table), image.offsets.long()
    sparse = ((g1 == 0) & (g2 == 0)).count_nonzero() * 2 > g1.numel()
    shared = (image_offsets, *buckets, word, patch, g1, g2, sparse)
    kernels = _kernels("backward")
    for bucket, launch in enumerate(table):
        sizes = {
            "D": width, "BM": min(launch.patches, 128), "BD": launch.slab, "L": launch.words, "NT": launch.texts,
            "num_warps": launch.warps, "num_stages": launch.stages,
        }  # fmt: skip
        slabs = width // launch.slab
        kernels.patches_kernel[(images, -(-image.longest // sizes["BM"]), slabs)](
            t, *shared, grad_v, texts, len(v), len(t), bucket, **sizes
        )
        kernels.words_kernel[(-(-texts // launch.texts), slabs)](
            v, *shared, grad_t, images, texts, len(v), len(t), bucket, **sizes
        )
    return grad_v[:, :given] * largest, grad_t[:, :given] * largest


@functools.cache
def _kernels(which: str) -> ModuleType:
    """Imported when first needed: elsewhere triton may be missing."""
    return importlib.import_module(f"mmpt.ops.late_interaction.triton_{which}")


def _rows(x: Tensor) -> Tensor:
    """Contiguous, with the width filled up to a power of two, 16 at least."""
    missing = filled(x.shape[1]) - x.shape[1]
    return pad(x, (0, missing)) if missing else x.contiguous()


def _bucketed(text: Tokens, table: list[Launch]) -> _Buckets:
    lengths, order = torch.sort(text.lengths(), stable=True)
    limits = lengths.new_tensor([0] + [launch.words for launch in table])
    bounds = torch.searchsorted(lengths, limits, right=True)
    return _Buckets(order.int(), text.offsets.long()[order], lengths.int(), bounds.int())


def _not_finite(of: Tokens) -> Tensor:
    """[B] bool, for each sequence whether some number of it is NaN or infinite."""
    before, offsets = pad((~of.x.isfinite()).any(1).cumsum(0), (1, 0)), of.offsets.long()  # [T + 1]
    return before[offsets[1:]] != before[offsets[:-1]]
