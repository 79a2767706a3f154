"""Late interaction on a GPU by Triton (triton_forward.py, triton_backward.py), for compute capability 8.0 and above.

Nothing waits for the device: texts are put in buckets by length there, and every bucket that the longest text allows is
launched, empty or not. What to launch is a fixed table: all ranks run the same kernels, with nothing to tune.
"""

import functools
import importlib.util
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmpt.batch import Tokens
from mmpt.ops.late_interaction.winners import index_type

MOST_WORDS, MOST_WIDTH = 256, 512
PROGRAMS = 2048
"""To launch in the forward at least, where there are texts for them: some for each multiprocessor."""


class Launch(NamedTuple):
    """How the texts of one bucket are computed."""

    words: int
    """L, tokens of its texts at most."""
    texts: int
    """NT, of a tile."""
    patches: int
    """BM, of a tile."""
    slab: int
    """BD, numbers of width that a backward's program owns."""
    warps: int
    stages: int


def launches(longest_text: int, longest_image: int, width: int, bytes_each: int) -> list[Launch]:
    """One for each bucket up to the longest text. A tile of patches takes up to 128 KiB, of products 64 Ki."""
    out, words = [], 8
    while True:
        texts = max(1, 64 // words)
        most = min((128 << 10) // (width * bytes_each), (16 << 10) // (words * texts), 256)
        patches = max(16, min(_power_of_two(longest_image), most))
        slab = min(width, 128 if words * texts <= 128 else 64)
        out.append(Launch(words, texts, patches, slab, 8 if patches >= 128 else 4, 2))
        if words >= longest_text:
            return out
        words *= 2


def _power_of_two(n: int) -> int:
    """The least that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def refusal(image: Tokens, text: Tokens) -> str:
    x = image.x
    if x.device.type != "cuda":
        return f"it is for CUDA devices, not {x.device.type}"
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return "it needs compute capability 8.0 or above"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return refused_shape(image, text)


def refused_shape(image: Tokens, text: Tokens) -> str:
    if image.x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it takes bf16, fp16 and fp32, not {image.x.dtype}"
    if image.x.shape[1] > MOST_WIDTH or text.longest > MOST_WORDS:
        return (
            f"it takes vectors of up to {MOST_WIDTH} numbers and texts of up to {MOST_WORDS} tokens, not "
            f"{image.x.shape[1]} and {text.longest}"
        )
    return ""


class _Buckets(NamedTuple):
    """Texts by length, on the device."""

    order: Tensor
    """[B_t] int32."""
    bounds: Tensor
    """[buckets + 1] int32, into order."""
    offsets: Tensor
    """[B_t + 1] int64, of the texts as they were."""


def forward(image: Tokens, text: Tokens, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See backends.py. A feature that is not finite makes its scores NaN."""
    v, t = _rows(image.x), _rows(text.x)
    images, texts = len(image.offsets) - 1, len(text.offsets) - 1
    s_i2t, s_t2i = v.new_empty(2, images, texts, dtype=torch.float32)
    word = v.new_empty((texts, len(v)) if keep else (0, 0), dtype=index_type(text.longest))
    patch = v.new_empty((images, len(t)) if keep else (0, 0), dtype=index_type(image.longest))
    if not images or not texts:
        return s_i2t, s_t2i, word, patch
    table = launches(text.longest, image.longest, v.shape[1], v.itemsize)
    buckets, image_offsets = _bucketed(text, table), image.offsets.long()
    for bucket, launch in enumerate(table):
        shares = min(-(-texts // launch.texts), max(1, PROGRAMS // images))
        _kernels("forward").forward_kernel[(images, shares)](
            v, t, image_offsets, buckets.offsets, buckets.order, buckets.bounds, s_i2t, s_t2i, word, patch,
            texts, len(v), len(t), bucket,
            D=v.shape[1], BM=launch.patches, L=launch.words, NT=launch.texts, ONE=image.longest <= launch.patches,
            KEEP=keep, PRECISION=_precision(v), num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
    spoilt = _not_finite(image.x, image_offsets)[:, None] | _not_finite(text.x, buckets.offsets)
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
    table = launches(text.longest, image.longest, width, v.itemsize)
    buckets, image_offsets = _bucketed(text, table), image.offsets.long()
    kernels = _kernels("backward")
    for bucket, launch in enumerate(table):
        shared = (image_offsets, buckets.offsets, buckets.order, buckets.bounds, word, patch, g1, g2)
        sizes = {
            "D": width, "BM": min(launch.patches, 128), "BD": launch.slab, "L": launch.words, "NT": launch.texts,
            "PRECISION": _precision(v), "num_warps": launch.warps, "num_stages": launch.stages,
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
    return pad(x, (0, max(16, _power_of_two(x.shape[1])) - x.shape[1])).contiguous()


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"  # the latter is not looked at for 16-bit types


def _bucketed(text: Tokens, table: list[Launch]) -> _Buckets:
    lengths, order = torch.sort(text.lengths(), stable=True)
    limits = lengths.new_tensor([0] + [launch.words for launch in table])
    bounds = torch.searchsorted(lengths, limits, right=True)
    return _Buckets(order.int(), bounds.int(), text.offsets.long())


def _not_finite(x: Tensor, offsets: Tensor) -> Tensor:
    """[B] bool, for each sequence whether some number of it is NaN or infinite."""
    before = pad((~x.isfinite()).any(1).cumsum(0), (1, 0))  # [T + 1]
    return before[offsets[1:]] != before[offsets[:-1]]
