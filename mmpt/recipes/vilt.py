"""ViLT as published (Kim et al. 2021, section 4.2 and its code): ViT-B/32 on whole images with a shorter side of 384
pixels, at most 200 patches, 4,096 pairs a step for 200,000 steps; AdamW at 1e-4, a tenth of the steps to warm up,
then linearly to 0. It starts from a vision transformer: `mmpt import` one, and name the result with --run.init."""

from mmpt.data.loader import DataConfig
from mmpt.engine.build import EngineConfig
from mmpt.engine.optim import OptimConfig
from mmpt.evals.suite import EvalConfig
from mmpt.methods.vilt import ViLTConfig
from mmpt.models.bert import BertEmbeddingConfig
from mmpt.models.image import SIZES, ViTConfig
from mmpt.models.transformer import TransformerConfig
from mmpt.recipe import Recipe, RunConfig

HALF = (0.5, 0.5, 0.5)


def base() -> Recipe:
    """ViLT-B/32."""
    width, depth, heads = SIZES["B"]
    trunk = TransformerConfig(width, depth, heads, norm_eps=1e-6, dropout=0.1, init="bert")
    image = ViTConfig(
        trunk,
        image_size=384,
        patch_size=32,
        patch_bias=True,
        norm_before=False,
        mean=HALF,
        std=HALF,
        image_resize="shorter_side",
        longest_side=639,
        most_patches=200,
    )
    return Recipe(
        method=ViLTConfig(image, BertEmbeddingConfig(width, positions=40)),
        data=DataConfig(tokenizer="bert-base-uncased", workers=8),
        optim=OptimConfig(
            lr=1e-4, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.01, warmup_steps=20_000, decay="linear"
        ),
        engine=EngineConfig(zero_stage=1, precision="bf16", max_micro_batch=64),
        evals=EvalConfig(),
        run=RunConfig(dir="runs/vilt.base", global_batch=4096, samples=4096 * 200_000),
    )  # fmt: skip


def tiny() -> Recipe:
    """64-pixel images, for any computer."""
    trunk = TransformerConfig(160, depth=4, heads=5, norm_eps=1e-6, init="bert")
    image = ViTConfig(
        trunk,
        image_size=64,
        patch_size=8,
        patch_bias=True,
        norm_before=False,
        mean=HALF,
        std=HALF,
        image_resize="shorter_side",
        longest_side=96,
    )
    return Recipe(
        method=ViLTConfig(image, BertEmbeddingConfig(160, 2048, positions=32, dropout=0.0), max_tokens=32),
        data=DataConfig(),
        optim=OptimConfig(lr=1e-3, weight_decay=0.01, warmup_steps=50, clip_norm=1.0, decay="linear"),
        engine=EngineConfig(zero_stage=1, precision="fp32"),
        evals=EvalConfig(),
        run=RunConfig(dir="runs/vilt.tiny", global_batch=128, samples=50_000, checkpoint_every_steps=200),
    )  # fmt: skip
