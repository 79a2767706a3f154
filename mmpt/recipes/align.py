"""ALIGN as published (Jia et al. 2021, section 4 and 5), at the sizes that its authors and others trained; and with two
transformers, as surveys describe it (the paper used EfficientNet throughout).

LAMB, weight decay 1e-5, 10,000 steps up to 1e-3, then linearly to 0 at 1.2 million steps of 16,384 pairs. Images are
289-pixel crops of 346: a crop has (289 / 346)^2 of the area.
"""

from dataclasses import replace
from typing import Literal

from mmpt.data.image import ImageConfig
from mmpt.data.loader import DataConfig
from mmpt.engine.build import EngineConfig
from mmpt.engine.optim import OptimConfig
from mmpt.evals.suite import EvalConfig
from mmpt.methods.align import ALIGNConfig
from mmpt.models.bert import bert
from mmpt.models.dual_tower import DualTowerConfig
from mmpt.models.efficientnet import efficientnet
from mmpt.models.image import vit
from mmpt.models.resnet import ResNetConfig
from mmpt.models.tower import ImageTowerConfig
from mmpt.recipe import Recipe, RunConfig

AREA = (289 / 346) ** 2


def _published(name: str, towers: DualTowerConfig) -> Recipe:
    return Recipe(
        method=ALIGNConfig(towers),
        data=DataConfig(
            tokenizer="bert-base-uncased", workers=8,
            image=ImageConfig(crop_scale=(AREA, AREA), crop_ratio=(1.0, 1.0), flip_probability=0.5),
        ),
        optim=OptimConfig(
            name="lamb", lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=1e-5, warmup_steps=10_000, decay="linear"
        ),
        engine=EngineConfig(zero_stage=1, precision="bf16", max_micro_batch=256),
        evals=EvalConfig(every_steps=5000),
        run=RunConfig(dir=f"runs/align.{name}", global_batch=16_384, samples=16_384 * 1_200_000),
    )  # fmt: skip


def _towers(
    image: ImageTowerConfig, text: Literal["base", "large"], vocab_size: int, embed_dim: int
) -> DualTowerConfig:
    """Image features are projected only where they are not embed_dim wide already."""
    written = bert(text, vocab_size, max_tokens=64)
    project = image.summary_width != embed_dim
    return DualTowerConfig(image, written, embed_dim, project_image=project, text_projection_bias=True)


def l2_large() -> Recipe:
    """EfficientNet-L2 and BERT-large, with the 100,000 word pieces that ALIGN made from its captions."""
    image = replace(efficientnet("L2", image_size=289), top=False)
    return _published("l2_large", _towers(image, "large", 100_000, image.width))


def b7_base() -> Recipe:
    """EfficientNet-B7 and BERT-base, the size of the models that were released."""
    image = replace(efficientnet("B7", image_size=289), top=False)
    return _published("b7_base", _towers(image, "base", 30_522, image.width))


def vit_b16() -> Recipe:
    """ViT-B/16 and BERT-base: not the paper's."""
    recipe = _published("vit_b16", _towers(vit("B", 16, "gelu"), "base", 30_522, embed_dim=640))
    return replace(recipe, data=replace(recipe.data, image=ImageConfig(crop_scale=(0.9, 1.0), flip_probability=0.5)))


def tiny() -> Recipe:
    """A small ResNet and BERT on 64-pixel images, for any computer."""
    image = ResNetConfig(depths=(1, 1, 1, 1), bottleneck=16, image_size=64)
    text = bert("tiny", vocab_size=2048, max_tokens=32)
    return Recipe(
        method=ALIGNConfig(
            DualTowerConfig(image, text, embed_dim=128, text_projection_bias=True), initial_temperature=0.1
        ),
        data=DataConfig(image=ImageConfig(crop_scale=(0.9, 1.0))),
        optim=OptimConfig(lr=1e-3, weight_decay=0.1, warmup_steps=50, clip_norm=1.0),
        engine=EngineConfig(zero_stage=1, precision="fp32"),
        evals=EvalConfig(),
        run=RunConfig(dir="runs/align.tiny", global_batch=128, samples=50_000, checkpoint_every_steps=200),
    )
