"""METER as published (Dou et al. 2022, section 3.2): CLIP's ViT-B/16 on 288 pixels and RoBERTa-base, six blocks of
co-attention, 4,096 pairs a step for 100,000 steps; AdamW at 1e-5 for the towers and 5e-5 for what joins them."""

from mmpt.data.image import ImageConfig
from mmpt.data.loader import DataConfig
from mmpt.engine.build import EngineConfig
from mmpt.engine.optim import OptimConfig
from mmpt.evals.suite import EvalConfig
from mmpt.methods.meter import METERConfig
from mmpt.models.bert import BertConfig, BertEmbeddingConfig
from mmpt.models.image import SIZES, ViTConfig
from mmpt.models.transformer import TransformerConfig
from mmpt.recipe import Recipe, RunConfig

ROBERTA_VOCABULARY, ROBERTA_POSITIONS = 50_265, 512
"""Positions but for the two that no word has."""


def base() -> Recipe:
    """CLIP-ViT-B/16 and RoBERTa-base."""
    width, depth, heads = SIZES["B"]
    image = ViTConfig(TransformerConfig(width, depth, heads, activation="quick_gelu"), image_size=288, patch_size=16)
    trunk = TransformerConfig(
        width, depth, heads, norm="post", norm_eps=1e-5, dropout=0.1, attention_dropout=0.1, init="bert"
    )
    text = BertConfig(
        BertEmbeddingConfig(width, ROBERTA_VOCABULARY, ROBERTA_POSITIONS, types=1, norm_eps=1e-5), trunk, max_tokens=50
    )
    fusion = TransformerConfig(
        width, 6, heads, norm="post", norm_eps=1e-12, dropout=0.1, attention_dropout=0.1, init="bert"
    )
    return Recipe(
        method=METERConfig(image, text, fusion),
        data=DataConfig(tokenizer="roberta-base", workers=8, image=ImageConfig(crop_scale=(0.9, 1.0))),
        optim=OptimConfig(
            lr=5e-5, tower_lr=0.2, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.01, warmup_steps=10_000, decay="linear"
        ),
        engine=EngineConfig(zero_stage=1, precision="bf16", max_micro_batch=32),
        evals=EvalConfig(),
        run=RunConfig(dir="runs/meter.base", global_batch=4096, samples=4096 * 100_000),
    )


def tiny() -> Recipe:
    """64-pixel images, for any computer."""
    image = ViTConfig(TransformerConfig(160, depth=3, heads=5), image_size=64, patch_size=8)
    half = TransformerConfig(160, depth=2, heads=5, norm="post", norm_eps=1e-12, init="bert")
    text = BertConfig(BertEmbeddingConfig(160, 2048, positions=32, dropout=0.0), half, max_tokens=32)
    return Recipe(
        method=METERConfig(image, text, half),
        data=DataConfig(image=ImageConfig(crop_scale=(0.9, 1.0))),
        optim=OptimConfig(lr=1e-3, weight_decay=0.01, warmup_steps=50, clip_norm=1.0, decay="linear"),
        engine=EngineConfig(zero_stage=1, precision="fp32"),
        evals=EvalConfig(),
        run=RunConfig(dir="runs/meter.tiny", global_batch=128, samples=50_000, checkpoint_every_steps=200),
    )
