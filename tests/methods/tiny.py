"""Every method at a size for tests, and batches of pairs for them."""

import torch

from mmpt.batch import Batch, Pictures, pack
from mmpt.methods.clip import CLIPConfig
from mmpt.methods.filip import FILIPConfig
from mmpt.methods.method import Method, MethodConfig
from mmpt.methods.siglip import SigLIPConfig
from mmpt.models.dual_tower import DualTowerConfig
from mmpt.models.image import ViTConfig
from mmpt.models.text import TextTransformerConfig
from mmpt.models.transformer import TransformerConfig
from mmpt.ops.contrast.loss import ContrastConfig

VOCABULARY, MAX_TOKENS, IMAGE_SIZE = 40, 10, 16
TRUNK = TransformerConfig(width=16, depth=2, heads=2)
TEXT = TextTransformerConfig(TRUNK, VOCABULARY, MAX_TOKENS)
TOWERS = DualTowerConfig(ViTConfig(TRUNK, IMAGE_SIZE, 4), TEXT, embed_dim=12)

CONFIGS: dict[str, MethodConfig] = {
    "clip": CLIPConfig(TOWERS),
    "clip at the cap": CLIPConfig(TOWERS, initial_temperature=0.01),
    "clip ring": CLIPConfig(TOWERS, contrast=ContrastConfig("ring", score_bytes=8)),
    "filip": FILIPConfig(TOWERS),
    "filip ring": FILIPConfig(TOWERS, contrast=ContrastConfig("ring")),
    "filip found again": FILIPConfig(TOWERS, winners="recompute"),
    "filip at the cap": FILIPConfig(TOWERS, initial_temperature=0.01),
    "filip without ends": FILIPConfig(TOWERS, text_special_tokens=False),
    "filip global": FILIPConfig(TOWERS, token_keep_ratio=0.4, scope="global"),
    "filip local": FILIPConfig(TOWERS, token_keep_ratio=0.4, scope="local"),
    "siglip": SigLIPConfig(
        ViTConfig(TRUNK, IMAGE_SIZE, 4, class_token=False, patch_bias=True, norm_before=False), TEXT, initial_bias=-2.0
    ),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> Method:
    """The same weights in every process; every one of them matters."""
    torch.manual_seed(0)
    method = CONFIGS[name].build()
    with torch.no_grad():
        for parameter_name, parameter in method.named_parameters():
            if "logit_" not in parameter_name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return method.to(dtype)


def batch(name: str, pairs: int, first: int, count: int, seed: int = 0) -> Batch:
    """Pairs first to first + count of a global batch of `pairs`; captions of mixed length, filled up for SigLIP."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (pairs, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8, generator=generator)
    lengths = torch.randint(1, MAX_TOKENS + 1, (pairs,), generator=generator).tolist()
    texts = [torch.randint(1, VOCABULARY, (n,), generator=generator) for n in lengths]
    if name == "siglip":
        texts = [torch.cat([text, text.new_zeros(MAX_TOKENS - len(text))]) for text in texts]
    own = slice(first, first + count)
    return Batch(Pictures(images[own]), pack(texts[own]), torch.arange(first, first + count), ("",) * count)
