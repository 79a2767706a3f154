"""SLIP (github.com/facebookresearch/SLIP): CLIP, SimCLR and SLIP of Mu et al. 2022.

A timm vision transformer, without CLIP's norm before the blocks, and a text tower in OpenAI's names; the projections
lie beside both.
"""

from typing import Any

from mmpt.convert import openai_clip, timm_vit
from mmpt.convert.clip_resnet import norm
from mmpt.convert.format import Format, fields
from mmpt.convert.positions import DEIT
from mmpt.convert.reading import Source
from mmpt.convert.rules import TRANSPOSED, Rule, at, pair, rule
from mmpt.methods.method import Method
from mmpt.models.dual_tower import DualTower
from mmpt.models.image import ViT
from mmpt.models.logit_scale import LogitScale
from mmpt.models.projector import Projector
from mmpt.models.resnet import IMAGENET_MEAN, IMAGENET_STD
from mmpt.models.text import TextTransformer

PROJECTOR = (
    *pair("layer1", "linear_1"),
    *norm("bn1", "norm_1"),
    *pair("layer2", "linear_2"),
    *norm("bn2", "norm_2"),
    *pair("layer3", "linear_3"),
)


def rules(method: Method) -> tuple[Rule, ...]:
    projections = rule("image_projection", "image_projection.weight", TRANSPOSED) + openai_clip.TEXT_PROJECTION
    return (
        *at(method, ViT, timm_vit.IMAGE, "visual."),
        *at(method, TextTransformer, openai_clip.TEXT),
        *at(method, DualTower, projections),
        *at(method, LogitScale, openai_clip.SCALE),
        *at(method, Projector, PROJECTOR, "image_mlp."),
    )


def settings(source: Source, method: Method) -> dict[str, Any]:
    width = source.tensors["visual.pos_embed"].shape[-1]
    image = timm_vit.image_settings(method, set(source.tensors), "visual.", width)
    if width == 384:  # its ViT-S is MoCo v3's, with heads of 32
        image |= fields(method, ViT, {"trunk.heads": 12})
    image |= fields(method, ViT, {"mean": IMAGENET_MEAN, "std": IMAGENET_STD})
    text = source.tensors.get("ln_final.weight")
    return image | ({} if text is None else openai_clip.text_settings(method, len(text)))


FORMAT = Format(
    name="slip",
    title="SLIP's",
    recognises=lambda source: (
        "visual.patch_embed.proj.weight" in source.tensors
        and any(name in source.tensors for name in ("image_projection", "image_mlp.layer1.weight"))
    ),
    rules=rules,
    stretch=DEIT,
    settings=settings,
    unneeded=r"image_mlp\..*",
    wrapper="state_dict",
)
