"""SigLIP (Zhai et al. 2023): the model as released; warm-up and length of the schedule are ours."""

from mmpt.data.image import ImageConfig
from mmpt.data.loader import DataConfig
from mmpt.engine.build import EngineConfig
from mmpt.engine.optim import OptimConfig
from mmpt.evals.suite import EvalConfig
from mmpt.methods.siglip import published
from mmpt.recipe import Recipe, RunConfig


def vit_b16() -> Recipe:
    """ViT-B/16 at 224 pixels; the text tower attends to its pads, as released."""
    return Recipe(
        method=published("B", 16),
        data=DataConfig(
            tokenizer="google/siglip-base-patch16-224", workers=8, image=ImageConfig(crop_scale=(0.9, 1.0))
        ),
        optim=OptimConfig(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-4, warmup_steps=20_000, clip_norm=1.0),
        engine=EngineConfig(zero_stage=1, precision="bf16", max_micro_batch=512),
        evals=EvalConfig(every_steps=5000),
        run=RunConfig(dir="runs/siglip.vit_b16", global_batch=32768, samples=9_000_000_000),
    )
