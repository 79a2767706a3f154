"""Learning rate as a pure function of the optimizer step: linear warm-up, then cosine, linear or no decay."""

import math
from typing import Literal

Decay = Literal["cosine", "linear", "constant"]


def lr_factor(step: int, warmup_steps: int, total_steps: int, decay: Decay, final_fraction: float) -> float:
    """The factor on the peak learning rate for the update that takes parameters from `step` to `step` + 1.

        warm-up   (step + 1) / warmup_steps                     while step < warmup_steps
        cosine    f + (1 - f) * (1 + cos(pi * t)) / 2           t = (step - warmup) / (total - warmup)
        linear    f + (1 - f) * (1 - t)                         f = final_fraction

    Loshchilov and Hutter, "SGDR", eq. 5 without restarts; CLIP (Radford et al. 2021, section 2.5) uses cosine.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if decay == "constant":
        return 1.0
    shape = (1 + math.cos(math.pi * progress)) / 2 if decay == "cosine" else 1 - progress
    return final_fraction + (1 - final_fraction) * shape
