"""UNITER as published (Chen et al. 2020, section 4 and its released code): AdamW at 5e-5, 10,000 steps of warm-up, then
linearly to 0.

A step has 10,240 tokens on each of 8 GPUs, 6 times over, for base, and 6,144 on 16, 4 times, for large. Here a step is
counted in pairs: as many as hold that many tokens at 50 tokens a pair (15 of text, 35 of regions), rounded to 2^7.
"""

from typing import Literal

from mmpt.data.loader import DataConfig
from mmpt.engine.build import EngineConfig
from mmpt.engine.optim import OptimConfig
from mmpt.evals.suite import EvalConfig
from mmpt.methods.uniter import UNITERConfig
from mmpt.models.bert import SIZES, BertEmbeddingConfig
from mmpt.models.regions import RegionEmbeddingConfig
from mmpt.models.transformer import TransformerConfig
from mmpt.recipe import Recipe, RunConfig

CASED = 28_996
"""Word pieces of bert-base-cased."""


def _published(size: Literal["base", "large"], tokens: int, global_batch: int, steps: int) -> Recipe:
    width, depth = SIZES[size]
    trunk = TransformerConfig(
        width, depth, width // 64, norm="post", norm_eps=1e-12, dropout=0.1, attention_dropout=0.1, init="bert"
    )
    return Recipe(
        method=UNITERConfig(trunk, BertEmbeddingConfig(width, CASED), RegionEmbeddingConfig(width)),
        data=DataConfig(tokenizer="bert-base-cased", workers=4),
        optim=OptimConfig(
            lr=5e-5, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, warmup_steps=10_000, decay="linear", clip_norm=5.0
        ),
        engine=EngineConfig(zero_stage=1, precision="bf16", max_micro_batch_tokens=tokens),
        evals=EvalConfig(),
        run=RunConfig(dir=f"runs/uniter.{size}", global_batch=global_batch, samples=global_batch * steps),
    )  # fmt: skip


def base() -> Recipe:
    """UNITER-base: 491,520 tokens a step, 200,000 steps."""
    return _published("base", 10_240, 9856, 200_000)


def large() -> Recipe:
    """UNITER-large: 393,216 tokens a step, 500,000 steps."""
    return _published("large", 6144, 7808, 500_000)


def tiny() -> Recipe:
    """Regions of a fixed grid (`mmpt-data regions --grid`), without a detector's classes, for any computer."""
    trunk = TransformerConfig(160, depth=4, heads=5, norm="post", norm_eps=1e-12, init="bert")
    return Recipe(
        method=UNITERConfig(
            trunk, BertEmbeddingConfig(160, 2048, positions=32, dropout=0.0),
            RegionEmbeddingConfig(160, features=192, classes=0, most=64, dropout=0.0), max_tokens=32,
            divergence_weight=0,
        ),
        data=DataConfig(),
        optim=OptimConfig(lr=1e-3, weight_decay=0.01, warmup_steps=50, clip_norm=1.0, decay="linear"),
        engine=EngineConfig(zero_stage=1, precision="fp32"),
        evals=EvalConfig(),
        run=RunConfig(dir="runs/uniter.tiny", global_batch=128, samples=50_000, checkpoint_every_steps=200),
    )  # fmt: skip
