"""FILIP as published (Yao et al. 2022, section 4.1 and appendix A.3), the demo, and a tiny one for any computer.

FILIP-base is ViT-B/32 and FILIP-large ViT-L/14 with a token dimension of 256. The peak learning rate is the base rate
times sqrt(batch / 512): 2e-3 at 40,960 for base, 8e-4 at 30,720 for large, both with LAMB.
"""

import math
from dataclasses import replace
from typing import Literal

from mmpt.data.image import ImageConfig
from mmpt.data.loader import DataConfig
from mmpt.engine.build import EngineConfig
from mmpt.engine.optim import OptimConfig
from mmpt.evals.suite import EvalConfig
from mmpt.methods.filip import FILIPConfig
from mmpt.models.dual_tower import DualTowerConfig
from mmpt.models.image import ViTConfig, vit
from mmpt.models.text import TextTransformerConfig
from mmpt.models.transformer import TransformerConfig
from mmpt.recipe import Recipe, RunConfig
from mmpt.recipes.clip import tiny_towers


def _published(size: Literal["B", "L"], patch: int, text_width: int, batch: int, base_lr: float) -> Recipe:
    text = TransformerConfig(text_width, depth=12, heads=text_width // 64, activation="quick_gelu")
    towers = DualTowerConfig(vit(size, patch, "quick_gelu"), TextTransformerConfig(text), embed_dim=256)
    return Recipe(
        method=FILIPConfig(towers, token_keep_ratio=0.25),
        data=DataConfig(workers=8, image=ImageConfig(crop_scale=(0.9, 1.0), augment="auto_augment")),
        optim=OptimConfig(
            name="lamb", lr=base_lr * math.sqrt(batch / 512), betas=(0.9, 0.999), eps=1e-4, weight_decay=3e-3,
            decay_embeddings=False, warmup_steps=3000,
        ),
        engine=EngineConfig(zero_stage=1, precision="bf16", max_micro_batch=512),
        evals=EvalConfig(every_steps=5000),
        run=RunConfig(dir=f"runs/filip.vit_{size.lower()}{patch}", global_batch=batch, samples=30 * 340_000_000),
    )  # fmt: skip


def vit_b32() -> Recipe:
    """FILIP-base."""
    return _published("B", 32, text_width=512, batch=40_960, base_lr=2e-3)


def vit_l14() -> Recipe:
    """FILIP-large."""
    return _published("L", 14, text_width=768, batch=30_720, base_lr=8e-4)


def wukong_vit_b32() -> Recipe:
    """Noah-Wukong's ViT-B/32 (Gu et al. 2022), which reads Chinese and compares patches with pads; to be imported."""
    recipe = vit_b32()
    assert isinstance(recipe.method, FILIPConfig)
    method, towers = recipe.method, recipe.method.towers
    assert isinstance(towers.text, TextTransformerConfig)
    text = replace(towers.text, vocab_size=21_128, max_tokens=32)
    return replace(
        recipe,
        method=replace(method, towers=replace(towers, text=text), token_keep_ratio=1.0, zero_pads=True),
        data=replace(recipe.data, tokenizer="bert-base-chinese"),
        run=replace(recipe.run, dir="runs/filip.wukong_vit_b32"),
    )


def tiny() -> Recipe:
    """64-pixel images, 2 million parameters: minutes on two CPU cores."""
    return Recipe(
        method=FILIPConfig(tiny_towers(embed_dim=128)),
        data=DataConfig(workers=1, image=ImageConfig(crop_scale=(0.9, 1.0))),
        optim=OptimConfig(lr=1e-3, weight_decay=0.1, warmup_steps=50, clip_norm=1.0),
        engine=EngineConfig(zero_stage=1, precision="fp32"),
        evals=EvalConfig(),
        run=RunConfig(dir="runs/filip.tiny", global_batch=128, samples=50_000, checkpoint_every_steps=200),
    )


def demo() -> Recipe:
    """`make demo`: the built-in scenes on two CPU ranks with ZeRO-2."""
    image = ViTConfig(TransformerConfig(128, depth=4, heads=4), image_size=64, patch_size=8, class_token=False)
    text = TextTransformerConfig(TransformerConfig(128, depth=2, heads=4), vocab_size=256, max_tokens=32)
    return Recipe(
        method=FILIPConfig(DualTowerConfig(image, text, embed_dim=64)),
        data=DataConfig(
            shards="runs/demo/data/train", tokenizer="runs/demo/tokenizer", image=ImageConfig(crop_scale=(0.9, 1.0))
        ),
        optim=OptimConfig(lr=1e-3, weight_decay=0.1, warmup_steps=30, clip_norm=1.0),
        engine=EngineConfig(zero_stage=2, precision="fp32"),
        evals=EvalConfig(
            retrieval=("runs/demo/data/held_out",), scenes=("runs/demo/data/held_out",), equal_captions=True
        ),
        run=RunConfig(dir="runs/demo", global_batch=128, samples=45_000, checkpoint_every_steps=100),
    )
