"""SLIP as published (Mu et al. 2022, section 4 and its code): 25 epochs of YFCC15M, of which 14.6 million pairs were
to be had, in batches of 4,096; AdamW at 3e-3 with weight decay 0.1, one epoch of warm-up, cosine to 1e-5."""

from typing import Literal

from mmpt.data.image import ImageConfig
from mmpt.data.loader import DataConfig
from mmpt.engine.build import EngineConfig
from mmpt.engine.optim import OptimConfig
from mmpt.evals.suite import EvalConfig
from mmpt.methods.slip import SLIPConfig
from mmpt.models.dual_tower import DualTowerConfig
from mmpt.models.image import SIZES, ViTConfig
from mmpt.models.projector import ProjectorConfig
from mmpt.models.resnet import IMAGENET_MEAN, IMAGENET_STD
from mmpt.models.text import TextTransformerConfig
from mmpt.models.transformer import TransformerConfig
from mmpt.recipe import Recipe, RunConfig
from mmpt.recipes.clip import tiny_towers

PAIRS, EPOCHS, BATCH = 14_600_000, 25, 4096


def _published(size: Literal["S", "B", "L"]) -> Recipe:
    width, depth, heads = SIZES[size]
    heads = 12 if size == "S" else heads  # as MoCo v3 has its small one
    trunk = TransformerConfig(width, depth, heads, norm_eps=1e-6)
    image = ViTConfig(trunk, patch_size=16, patch_bias=True, norm_before=False, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    text = TextTransformerConfig(TransformerConfig(512, depth=12, heads=8, activation="quick_gelu"))
    return Recipe(
        method=SLIPConfig(DualTowerConfig(image, text, embed_dim=512), gathered_gradient=False),
        data=DataConfig(workers=8, image=ImageConfig(crop_scale=(0.5, 1.0))),
        optim=OptimConfig(
            lr=3e-3, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1, warmup_steps=PAIRS // BATCH,
            final_lr_fraction=1e-5 / 3e-3,
        ),
        engine=EngineConfig(zero_stage=1, precision="bf16", max_micro_batch=64),
        evals=EvalConfig(every_steps=PAIRS // BATCH),
        run=RunConfig(dir=f"runs/slip.vit_{size.lower()}16", global_batch=BATCH, samples=EPOCHS * PAIRS),
    )  # fmt: skip


def vit_s16() -> Recipe:
    """ViT-S/16 with the 12 heads of MoCo v3."""
    return _published("S")


def vit_b16() -> Recipe:
    """ViT-B/16."""
    return _published("B")


def vit_l16() -> Recipe:
    """ViT-L/16."""
    return _published("L")


def tiny() -> Recipe:
    """64-pixel images, for any computer."""
    return Recipe(
        method=SLIPConfig(tiny_towers(embed_dim=128), projector=ProjectorConfig(512, 128)),
        data=DataConfig(image=ImageConfig(crop_scale=(0.9, 1.0))),
        optim=OptimConfig(lr=1e-3, weight_decay=0.1, warmup_steps=50, clip_norm=1.0),
        engine=EngineConfig(zero_stage=1, precision="fp32"),
        evals=EvalConfig(),
        run=RunConfig(dir="runs/slip.tiny", global_batch=128, samples=50_000, checkpoint_every_steps=200),
    )
