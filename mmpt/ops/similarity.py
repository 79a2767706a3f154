"""Products of feature vectors in fp32, whatever the precision around them."""

import torch
from torch import Tensor


def similarity(image: Tensor, text: Tensor) -> Tensor:
    """image @ text^T: [A, D], [C, D] -> [A, C] in at least fp32.

    A logit scale of 100 turns the 2^-9 of a bf16 product into whole tenths of a logit, so autocast is shut out.
    """
    exact = torch.promote_types(torch.promote_types(image.dtype, text.dtype), torch.float32)
    with torch.autocast(image.device.type, enabled=False):
        return image.to(exact) @ text.to(exact).T
