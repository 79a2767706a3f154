"""CLIP as published (Radford et al. 2021, section 2.5 and table 18 to 20), and a tiny one for any computer.

Peak learning rates follow the paper: 5e-4 for B/32 and B/16, 4e-4 for L/14.
"""

from dataclasses import replace
from typing import Literal

from mmpt.data.image import ImageConfig
from mmpt.data.loader import DataConfig
from mmpt.engine.build import EngineConfig
from mmpt.engine.optim import OptimConfig
from mmpt.evals.suite import EvalConfig
from mmpt.methods.clip import CLIPConfig
from mmpt.models.bert import bert
from mmpt.models.dual_tower import DualTowerConfig
from mmpt.models.image import ViTConfig, vit
from mmpt.models.resnet import clip_resnet
from mmpt.models.text import TextTransformerConfig
from mmpt.models.transformer import TransformerConfig
from mmpt.recipe import Recipe, RunConfig


def _published(size: Literal["B", "L"], patch: int, text_width: int, embed_dim: int, lr: float) -> Recipe:
    name = f"vit_{size.lower()}{patch}"
    text = TransformerConfig(text_width, depth=12, heads=text_width // 64, activation="quick_gelu")
    towers = DualTowerConfig(vit(size, patch, "quick_gelu"), TextTransformerConfig(text), embed_dim)
    return Recipe(
        method=CLIPConfig(towers),
        data=DataConfig(workers=8, image=ImageConfig(crop_scale=(0.9, 1.0))),
        optim=OptimConfig(lr=lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2, warmup_steps=2000),
        engine=EngineConfig(zero_stage=1, precision="bf16", max_micro_batch=512),
        evals=EvalConfig(every_steps=5000),
        run=RunConfig(dir=f"runs/clip.{name}", global_batch=32768, samples=32 * 400_000_000),
    )


def vit_b32() -> Recipe:
    """ViT-B/32 at 224 pixels, 151,277,313 parameters."""
    return _published("B", 32, text_width=512, embed_dim=512, lr=5e-4)


def vit_b16() -> Recipe:
    """ViT-B/16 at 224 pixels, 149,620,737 parameters."""
    return _published("B", 16, text_width=512, embed_dim=512, lr=5e-4)


def vit_l14() -> Recipe:
    """ViT-L/14 at 224 pixels, 427,616,513 parameters."""
    return _published("L", 14, text_width=768, embed_dim=768, lr=4e-4)


def rn50() -> Recipe:
    """ResNet-50 as CLIP modified it, 102,007,137 parameters."""
    recipe = _published("B", 32, text_width=512, embed_dim=1024, lr=5e-4)
    assert isinstance(recipe.method, CLIPConfig)
    towers = replace(recipe.method.towers, image=clip_resnet("RN50"), project_image=False)
    return replace(
        recipe,
        method=replace(recipe.method, towers=towers),
        optim=replace(recipe.optim, betas=(0.9, 0.999), eps=1e-8),
        run=replace(recipe.run, dir="runs/clip.rn50"),
    )


def chinese_vit_b16() -> Recipe:
    """Chinese-CLIP's ViT-B/16 with RoBERTa-wwm-base (Yang et al. 2022), 188,262,913 parameters, to be imported."""
    recipe = _published("B", 16, text_width=512, embed_dim=512, lr=2e-5)
    assert isinstance(recipe.method, CLIPConfig)
    towers = replace(recipe.method.towers, text=bert("base", vocab_size=21_128, max_tokens=52))
    return replace(
        recipe,
        method=replace(recipe.method, towers=towers),
        data=replace(recipe.data, tokenizer="hfl/chinese-roberta-wwm-ext"),
        run=replace(recipe.run, dir="runs/clip.chinese_vit_b16"),
    )


def tiny() -> Recipe:
    """64-pixel images, 2 million parameters: minutes on two CPU cores."""
    return Recipe(
        method=CLIPConfig(tiny_towers(embed_dim=128)),
        data=DataConfig(workers=1, image=ImageConfig(crop_scale=(0.9, 1.0))),
        optim=OptimConfig(lr=1e-3, weight_decay=0.1, warmup_steps=50, clip_norm=1.0),
        engine=EngineConfig(zero_stage=1, precision="fp32"),
        evals=EvalConfig(),
        run=RunConfig(dir="runs/clip.tiny", global_batch=128, samples=50_000, checkpoint_every_steps=200),
    )


def tiny_towers(embed_dim: int) -> DualTowerConfig:
    """Towers for a laptop: ViT 160 x 4 with 8-pixel patches on 64 pixels, text 160 x 3, at most 32 tokens."""
    image = ViTConfig(TransformerConfig(160, depth=4, heads=5), image_size=64, patch_size=8)
    text = TextTransformerConfig(TransformerConfig(160, depth=3, heads=5), vocab_size=2048, max_tokens=32)
    return DualTowerConfig(image, text, embed_dim)
