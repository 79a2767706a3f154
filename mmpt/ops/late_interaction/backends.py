"""Who computes a late interaction: the fastest that can, or the one that MMPT_LATE_INTERACTION names.

A backend is a module with `refusal`, `forward` and `backward` as the protocol below has them; to add one, write the
module and enter it in BACKENDS.
"""

import os
from typing import Protocol

from torch import Tensor

from mmpt.batch import Tokens
from mmpt.ops.late_interaction import cpp_backend, gluon_backend, torch_tiles, triton_backend

VARIABLE = "MMPT_LATE_INTERACTION"


class Backend(Protocol):
    def refusal(self, image: Tokens, text: Tokens) -> str:
        """Why these cannot be done here, as a short phrase; empty where they can."""
        ...

    def forward(self, image: Tokens, text: Tokens, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """s_i2t and s_t2i, [B_i, B_t] in at least fp32, and the winners; [0, 0] of their types without keep."""
        ...

    def backward(
        self, image: Tokens, text: Tokens, word: Tensor, patch: Tensor, grad_i2t: Tensor, grad_t2i: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients [T_i, D], in the features' type or that of grad_i2t and grad_t2i [B_i, B_t], and [T_t, D], in the
        latter: it may be a part of a sum over images."""
        ...


BACKENDS: dict[str, Backend] = {
    "cpp": cpp_backend,
    "torch": torch_tiles,
    "triton": triton_backend,
    "gluon": gluon_backend,
}
"""`auto` takes the first that can. Triton and Gluon stand behind torch, which takes everything: they run only where
they are asked for by name, until they have run on a device."""


def choose(image: Tokens, text: Tokens) -> Backend:
    """The fastest backend that takes these, or the one asked for. Raises ValueError where that one does not."""
    name = os.environ.get(VARIABLE, "auto")
    if name == "auto":
        return next(backend for backend in BACKENDS.values() if not backend.refusal(image, text))
    if name not in BACKENDS:
        raise ValueError(f"{VARIABLE}={name}: there are auto, {', '.join(BACKENDS)}")
    if reason := BACKENDS[name].refusal(image, text):
        raise ValueError(f"{VARIABLE}={name}: {reason}")
    return BACKENDS[name]
