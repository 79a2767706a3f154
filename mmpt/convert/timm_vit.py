"""timm's VisionTransformer, which DeiT, ALBEF, SLIP and ViLT took over."""

from typing import Any

from mmpt.convert.format import Format, fields
from mmpt.convert.positions import DEIT
from mmpt.convert.reading import Source
from mmpt.convert.rules import ONE_BEFORE, PATCHES, TWO_BEFORE, Rule, at, pair, rule, under
from mmpt.methods.method import Method
from mmpt.models.image import ViT

BLOCK = (
    *pair("norm1", "norm_1"),
    *pair("attn.qkv", "qkv"),
    *pair("attn.proj", "out"),
    *pair("norm2", "norm_2"),
    *pair("mlp.fc1", "mlp_in"),
    *pair("mlp.fc2", "mlp_out"),
)
IMAGE = (
    *rule("patch_embed.proj.weight", "embedding.patch.weight", PATCHES),
    *rule("patch_embed.proj.bias", "embedding.patch.bias"),
    *rule("cls_token", "embedding.class_embedding", TWO_BEFORE),
    *rule("pos_embed", "embedding.position_embedding", ONE_BEFORE, resize="grid"),
    *pair("norm_pre", "ln_pre"),
    *under(BLOCK, "blocks.{n}.", "trunk.blocks.{n}."),
    *pair("norm", "ln_post"),
)


def rules(method: Method) -> tuple[Rule, ...]:
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
    return fields(method, ViT, told | ({"trunk.heads": width // 64} if width % 64 == 0 else {}))


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
