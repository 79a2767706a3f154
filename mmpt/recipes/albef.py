"""ALBEF as published (Li et al. 2021, section 3.5 and its code): ViT-B/16 on 256 pixels and BERT-base cut in two, 30
epochs in batches of 512, AdamW at 1e-4 with weight decay 0.02, cosine to 1e-5. It starts from DeiT and BERT: `mmpt
import` both, and name the result with --run.init (without, a re-run lost 12 points of recall).

One epoch is 5.1 million pairs (4M images: COCO, Visual Genome, SBU, CC3M) or 15.2 million (with CC12M).
"""

from dataclasses import replace

from mmpt.data.image import ImageConfig
from mmpt.data.loader import DataConfig
from mmpt.engine.build import EngineConfig
from mmpt.engine.optim import OptimConfig
from mmpt.evals.suite import EvalConfig
from mmpt.methods.albef import ALBEFConfig
from mmpt.models.bert import BertConfig, BertEmbeddingConfig, bert
from mmpt.models.fusion import FusionConfig
from mmpt.models.image import SIZES, ViTConfig
from mmpt.models.transformer import TransformerConfig
from mmpt.recipe import Recipe, RunConfig

PAIRS_4M, PAIRS_14M, BATCH = 5_100_000, 15_200_000, 512


def _published(name: str, pairs: int) -> Recipe:
    width, depth, heads = SIZES["B"]
    vision = TransformerConfig(width, depth, heads, norm_eps=1e-6, init="bert")
    image = ViTConfig(vision, image_size=256, patch_size=16, patch_bias=True, norm_before=False)
    text = bert("base", max_tokens=25)
    half = replace(text.trunk, depth=6)
    return Recipe(
        method=ALBEFConfig(
            image, replace(text, trunk=half), FusionConfig(half, context_width=width), alpha_ramp_steps=pairs // BATCH
        ),
        data=DataConfig(
            tokenizer="bert-base-uncased", workers=8, caption_cleaning="albef",
            image=ImageConfig(crop_scale=(0.2, 1.0), flip_probability=0.5, augment="albef"),
        ),
        optim=OptimConfig(
            lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.02, warmup_steps=2000, final_lr_fraction=0.1
        ),
        engine=EngineConfig(zero_stage=1, precision="bf16", max_micro_batch=64),
        evals=EvalConfig(shortlist=128),
        run=RunConfig(dir=f"runs/albef.{name}", global_batch=BATCH, samples=30 * pairs),
    )  # fmt: skip


def base() -> Recipe:
    """On 4 million images."""
    return _published("base", PAIRS_4M)


def base_14m() -> Recipe:
    """On 14 million images."""
    return _published("base_14m", PAIRS_14M)


def tiny() -> Recipe:
    """64-pixel images, for any computer."""
    image = ViTConfig(
        TransformerConfig(160, depth=4, heads=5, norm_eps=1e-6),
        image_size=64,
        patch_size=8,
        patch_bias=True,
        norm_before=False,
    )
    half = TransformerConfig(160, depth=2, heads=5, norm="post", norm_eps=1e-12, init="bert")
    text = BertConfig(BertEmbeddingConfig(160, 2048, positions=32, dropout=0.0), half, max_tokens=32)
    return Recipe(
        method=ALBEFConfig(
            image, text, FusionConfig(half, context_width=160), embed_dim=128, queue=1024, momentum=0.95,
            alpha_ramp_steps=100,
        ),
        data=DataConfig(image=ImageConfig(crop_scale=(0.9, 1.0))),
        optim=OptimConfig(lr=1e-3, weight_decay=0.02, warmup_steps=50, clip_norm=1.0),
        engine=EngineConfig(zero_stage=1, precision="fp32"),
        evals=EvalConfig(),
        run=RunConfig(dir="runs/albef.tiny", global_batch=128, samples=50_000, checkpoint_every_steps=200),
    )  # fmt: skip
