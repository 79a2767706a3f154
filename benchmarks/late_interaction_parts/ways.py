"""The ways to compute late interaction that are compared: each backend, and what people write without one."""

import os
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmpt.batch import Tokens, pack
from mmpt.ops.late_interaction.backends import BACKENDS, VARIABLE
from mmpt.ops.late_interaction.op import late_interaction

WIDTH = 256
Scores = Callable[[Tokens, Tokens], tuple[Tensor, Tensor]]


def inputs(
    pairs: int, patches: int, texts: int, shortest: int, longest: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tokens, Tokens]:
    """Vectors of length 1; lengths of texts are uniform between the two."""
    generator = torch.Generator().manual_seed(0)

    def vectors(count: int) -> Tensor:
        return normalize(torch.randn(count, WIDTH, generator=generator), dim=-1).to(dtype)

    lengths = torch.randint(shortest, longest + 1, (texts,), generator=generator).tolist()
    images = [vectors(patches) for _ in range(pairs)]
    return pack(images).to(device), pack([vectors(n) for n in lengths]).to(device)


def einsum(image: Tokens, text: Tokens) -> tuple[Tensor, Tensor]:
    """The formula as one writes it down: texts filled up to the longest, every product in memory at once.

    With `max`, whose gradient goes to the first of equal products as ours does; `amax` takes longer in the backward.
    """
    patches = image.x.unflatten(0, (-1, image.longest))  # [B_i, P, D]
    lengths = text.lengths().long()
    place = torch.arange(text.longest, device=lengths.device)
    real = place < lengths[:, None]  # [B_t, L]
    words = text.x[text.offsets[:-1, None] + place.minimum(lengths[:, None] - 1)]  # [B_t, L, D]
    products = torch.einsum("ipd,jrd->ijpr", patches, words).float()
    s_i2t = products.masked_fill(~real[None, :, None], float("-inf")).max(3).values.mean(2)
    return s_i2t, (products.max(2).values * real).sum(2) / lengths


def by_backend(name: str) -> Scores:
    def scores(image: Tokens, text: Tokens) -> tuple[Tensor, Tensor]:
        os.environ[VARIABLE] = name
        return late_interaction(image, text)

    return scores


def ways(image: Tokens, text: Tokens, compiled: bool) -> tuple[dict[str, Scores], dict[str, str]]:
    """Those that can run on these, by name, and why the others cannot."""
    found: dict[str, Scores] = {"einsum": einsum}
    if compiled:
        found["einsum, torch.compile"] = torch.compile(einsum)
    refusals = {f"mmpt {name}": backend.refusal(image, text) for name, backend in BACKENDS.items()}
    found |= {f"mmpt {name}": by_backend(name) for name in BACKENDS if not refusals[f"mmpt {name}"]}
    return found, {name: reason for name, reason in refusals.items() if reason}
