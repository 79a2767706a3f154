"""How much of the hardware a run uses: the model's FLOPs per second, and their share of what the device could do, MFU.

Model FLOPs (Chowdhery et al. 2022, appendix B) are those of the matrix products of one forward and its backward,
whatever is computed again to save memory. For the methods of which plan.py has formulas they follow from the recipe and
the length of the texts. For others those of the first step are counted by torch's formulas, which have none for
attention over packed tokens: a lower bound. A device or a precision without an entry has no MFU.
"""

import contextlib
import re
from collections.abc import Iterator

import torch

from mmpt import config, dist
from mmpt.batch import Batch
from mmpt.plan import Setting, has_formulas, work
from mmpt.plan_sample import Counter
from mmpt.recipe import Recipe

PEAK_TFLOPS = (
    (r"V100-SXM", 125.0, 0.0, 15.7),
    (r"\bT4\b", 65.0, 0.0, 8.1),
    (r"\bA100\b", 312.0, 312.0, 19.5),
    (r"\bA30\b", 165.0, 165.0, 10.3),
    (r"\bA40\b", 149.7, 149.7, 37.4),
    (r"\bL4\b", 121.0, 121.0, 30.3),
    (r"\bL40S\b", 362.0, 362.0, 91.6),
    (r"H100 PCIe", 756.0, 756.0, 51.0),
    (r"H100 NVL", 835.0, 835.0, 60.0),
    (r"H100 80GB HBM3|GH200|H200(?! NVL)", 989.0, 989.0, 67.0),
)
"""(pattern of the name, fp16, bf16, fp32): dense peaks in NVIDIA's data sheets; fp32 without TF32; 0 where there is
none."""


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOPs per second at best; None for what is not in the table."""
    for pattern, *peaks in PEAK_TFLOPS:
        if re.search(pattern, device_name):
            return peaks[("fp16", "bf16", "fp32").index(precision)] * 1e12 or None
    return None


class Utilisation:
    """Of one run on this device."""

    def __init__(self, recipe: Recipe, device: torch.device):
        self._recipe = recipe
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        exact = not torch.backends.cuda.matmul.allow_tf32 or recipe.engine.precision != "fp32"
        self._peak = peak_flops(name, recipe.engine.precision) if exact else None
        self._counted: float | None = None
        self._known = has_formulas(recipe.method)

    def _planned(self, mean_tokens: float) -> float:
        setting = Setting(self._recipe, dist.world_size(), mean_tokens)
        return sum(part.flops for part in work(setting, again=False)) / setting.pairs

    @contextlib.contextmanager
    def counting(self, micro_batches: list[Batch], couples_pairs: bool) -> Iterator[None]:
        """Around a step: count it, if that is still to be done. A step that computes something twice tells nothing."""
        twice = couples_pairs and len(micro_batches) > 1
        twice = twice or any(v is True for p, _, v, _ in config.leaves(self._recipe) if "checkpoint_activations" in p)
        if self._known or twice or self._counted is not None:
            yield
            return
        with Counter() as counter:
            yield
        self._counted = counter.flops / sum(len(batch) for batch in micro_batches)

    def record(self, mean_tokens: float, pairs_per_second: float) -> dict[str, float]:
        """For the metrics. mean_tokens: of a text. pairs_per_second: per device."""
        per_pair = self._planned(mean_tokens) if self._known else self._counted
        if per_pair is None:
            return {}
        flops = per_pair * pairs_per_second
        out = {"model_tflops_per_second_per_device": flops / 1e12}
        return out | ({"mfu": flops / self._peak} if self._peak else {})
