"""Late interaction on a CPU in C++ (late_interaction.cpp): products, both reductions and winners in one pass over tiles
that never leave the registers; a backward that adds rows, the only ones a gradient has.

Threads own images in the forward and for the gradients of patches, texts for those of words: nothing is shared, and
results are equal to the bit for any number of threads.
"""

import functools
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ctypes import CDLL, c_int64, c_void_p

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmpt.batch import Tokens
from mmpt.ops.late_interaction import cpp_build
from mmpt.ops.late_interaction.winners import index_type

TASKS_PER_THREAD = 4
"""Threads that other work slows down leave more to the others."""


def refusal(image: Tokens, text: Tokens) -> str:
    if image.x.device.type != "cpu":
        return f"it is for CPUs, not {image.x.device.type}"
    if image.x.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes fp32 and bf16, not {image.x.dtype}"
    found = _library(image.x.dtype)
    return found if isinstance(found, str) else ""


def forward(image: Tokens, text: Tokens, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See backends.py."""
    images, texts = len(image.offsets) - 1, len(text.offsets) - 1
    word = torch.empty((texts, len(image.x)) if keep else (0, 0), dtype=index_type(text.longest))
    patch = torch.empty((images, len(text.x)) if keep else (0, 0), dtype=index_type(image.longest))
    s_i2t, s_t2i = torch.empty(images, texts), torch.empty(images, texts)
    library, v, t = _prepared(image.x, text.x)
    image_offsets, text_offsets = image.offsets.long(), text.offsets.long()

    def score(from_image: int, to_image: int) -> int:
        return library.mmpt_forward(
            _pointer(v), _pointer(t), _pointer(image_offsets), _pointer(text_offsets), c_int64(images), c_int64(texts),
            c_int64(v.shape[1]), c_int64(from_image), c_int64(to_image), c_int64(keep),
            _pointer(word), c_int64(word.itemsize), _pointer(patch), c_int64(patch.itemsize),
            _pointer(s_i2t), _pointer(s_t2i),
        )  # fmt: skip

    _in_threads([functools.partial(score, *part) for part in _parts(images)])
    return s_i2t, s_t2i, word, patch


def backward(
    image: Tokens, text: Tokens, word: Tensor, patch: Tensor, grad_i2t: Tensor, grad_t2i: Tensor
) -> tuple[Tensor, Tensor]:
    """See backends.py. Pairs whose two gradients are 0 cost nothing."""
    images, texts = len(image.offsets) - 1, len(text.offsets) - 1
    library, v, t = _prepared(image.x, text.x)
    width = v.shape[1]
    image_offsets, text_offsets = image.offsets.long(), text.offsets.long()
    grad_i2t, grad_t2i = grad_i2t.contiguous(), grad_t2i.contiguous()

    def add(grad_v: Tensor, grad_t: Tensor, images_to_do: tuple[int, int], texts_to_do: tuple[int, int]) -> int:
        return library.mmpt_backward(
            _pointer(v), _pointer(t), _pointer(image_offsets), _pointer(text_offsets), c_int64(images), c_int64(texts),
            c_int64(width), *map(c_int64, images_to_do), *map(c_int64, texts_to_do),
            _pointer(word), c_int64(word.itemsize), _pointer(patch), c_int64(patch.itemsize),
            _pointer(grad_i2t), _pointer(grad_t2i), _pointer(grad_v), _pointer(grad_t),
        )  # fmt: skip

    given, nothing = image.x.shape[1], torch.zeros(0)
    sums = torch.zeros(len(v), width)
    _in_threads([functools.partial(add, sums, nothing, part, (0, 0)) for part in _parts(images)])
    grad_v = sums[:, :given].to(image.x.dtype)  # before the other sums need memory
    sums = torch.zeros(len(t), width)
    _in_threads([functools.partial(add, nothing, sums, (0, 0), part) for part in _parts(texts)])
    return grad_v, sums[:, :given]


def _library(dtype: torch.dtype) -> CDLL | str:
    """The best that this CPU can run for this type: bf16 is widened where it cannot be multiplied."""
    fits = [variant for variant in cpp_build.here() if dtype == torch.bfloat16 or not variant.bf16]
    return cpp_build.library(fits[0])


def _prepared(v: Tensor, t: Tensor) -> tuple[CDLL, Tensor, Tensor]:
    """The library with rows as it takes them: contiguous, in its type, bf16 numbers evenly many."""
    library = _library(v.dtype)
    assert isinstance(library, CDLL), library
    takes_bf16 = any(variant.bf16 and library is cpp_build.library(variant) for variant in cpp_build.here())
    if not takes_bf16:
        return library, v.float().contiguous(), t.float().contiguous()
    if v.shape[1] % 2:
        v, t = pad(v, (0, 1)), pad(t, (0, 1))
    return library, v.contiguous(), t.contiguous()


def _pointer(tensor: Tensor) -> c_void_p:
    return c_void_p(tensor.data_ptr())


def _parts(count: int) -> list[tuple[int, int]]:
    """0 to count in about equal ranges, some for each thread."""
    tasks = min(count, 1 if torch.get_num_threads() == 1 else TASKS_PER_THREAD * torch.get_num_threads())
    bounds = [count * i // max(1, tasks) for i in range(tasks + 1)]
    return list(itertools.pairwise(bounds))


def _in_threads(tasks: list[Callable[[], int]]) -> None:
    """Run them all. MemoryError where one found none. A foreign call leaves Python's lock to the other threads."""
    threads = torch.get_num_threads()
    codes = [task() for task in tasks] if threads == 1 else list(_pool(threads).map(lambda task: task(), tasks))
    if any(codes):
        raise MemoryError("late interaction in C++ found no memory for its panels")


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "late_interaction")
