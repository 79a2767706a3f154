"""timm's VisionTransformer, which DeiT, ALBEF, SLIP and ViLT took over."""

from typing import Any

from mmpt.convert.format import Format, fields, heads_of
from mmpt.convert.positions import DEIT
from mmpt.convert.reading import Source
from mmpt.convert.rules import ONE_BEFORE, PATCHES, TWO_BEFORE, Rule, at, pair, rule, under
from mmpt.methods.method import Method
from mmpt.methods.vilt import ViLT
from mmpt.models.image import PatchEmbedding, ViT

BLOCK = (
    *pair("norm1", "norm_1"),
    *pair("attn.qkv", "qkv"),
    *pair("attn.proj", "out"),
    *pair("norm2", "norm_2"),
    *pair("mlp.fc1", "mlp_in"),
    *pair("mlp.fc2", "mlp_out"),
)
PATCH_EMBEDDING = (
    *rule("patch_embed.proj.weight", "patch.weight", PATCHES),
    *rule("patch_embed.proj.bias", "patch.bias"),
    *rule("cls_token", "class_embedding", TWO_BEFORE),
    *rule("pos_embed", "position_embedding", ONE_BEFORE, resize="grid"),
)
BLOCKS = under(BLOCK, "blocks.{n}.", "trunk.blocks.{n}.")
IMAGE = (
    *under(PATCH_EMBEDDING, "", "embedding."),
    *pair("norm_pre", "ln_pre"),
    *BLOCKS,
    *pair("norm", "ln_post"),
)


def rules(method: Method) -> tuple[Rule, ...]:
    if isinstance(method, ViLT):  # begins as a vision transformer: patches, blocks and the norm after them
        return (*at(method, PatchEmbedding, PATCH_EMBEDDING), *BLOCKS, *pair("norm", "norm"))
    return at(method, ViT, IMAGE)


def image_settings(method: Method, names: set[str], prefix: str, width: int) -> dict[str, Any]:
    """Of a VisionTransformer below a prefix, as timm builds it unless told otherwise; its heads are 64 wide."""
    told = {
        "trunk.activation": "gelu",
        "trunk.norm_eps": 1e-6,
        "norm_before": f"{prefix}norm_pre.weight" in names,
        "patch_bias": f"{prefix}patch_embed.proj.bias" in names,
        "class_token": f"{prefix}cls_token" in names,
    }
    of_image = told | heads_of(width)
    return fields(method, ViT, of_image) | fields(method, PatchEmbedding, of_image)


def settings(source: Source, method: Method) -> dict[str, Any]:
    return image_settings(method, set(source.tensors), "", source.tensors["pos_embed"].shape[-1])


FORMAT = Format(
    name="timm_vit",
    title="timm's VisionTransformer (DeiT)",
    recognises=lambda source: {"patch_embed.proj.weight", "pos_embed"} <= source.tensors.keys(),
    rules=rules,
    stretch=DEIT,
    settings=settings,
    unneeded=r"(head|head_dist|fc_norm|pre_logits)\..*",
)
