"""transformers' ViTModel, alone or below a classifier, in the names of version 5 and of those before."""

from typing import Any

from mmpt.convert.format import Format, fields
from mmpt.convert.hf_clip import trunk_settings
from mmpt.convert.positions import DEIT
from mmpt.convert.reading import Source
from mmpt.convert.rules import ONE_BEFORE, PATCHES, TWO_BEFORE, Rule, at, pair, rule, under
from mmpt.methods.method import Method
from mmpt.models.image import ViT

BLOCK = (
    *pair("layernorm_before", "norm_1"),
    *pair(("attention.q_proj", "attention.k_proj", "attention.v_proj"), "qkv"),
    *pair("attention.o_proj", "out"),
    *pair("layernorm_after", "norm_2"),
    *pair("mlp.fc1", "mlp_in"),
    *pair("mlp.fc2", "mlp_out"),
)
IMAGE = (
    *rule("embeddings.patch_embeddings.projection.weight", "embedding.patch.weight", PATCHES),
    *rule("embeddings.patch_embeddings.projection.bias", "embedding.patch.bias"),
    *rule("embeddings.cls_token", "embedding.class_embedding", TWO_BEFORE),
    *rule("embeddings.position_embeddings", "embedding.position_embedding", ONE_BEFORE, resize="grid"),
    *under(BLOCK, "layers.{n}.", "trunk.blocks.{n}."),
    *pair("layernorm", "ln_post"),
)
BEFORE_VERSION_5 = (
    (r"^encoder\.layer\.(\d+)\.attention\.attention\.query\.", r"layers.\1.attention.q_proj."),
    (r"^encoder\.layer\.(\d+)\.attention\.attention\.key\.", r"layers.\1.attention.k_proj."),
    (r"^encoder\.layer\.(\d+)\.attention\.attention\.value\.", r"layers.\1.attention.v_proj."),
    (r"^encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"layers.\1.attention.o_proj."),
    (r"^encoder\.layer\.(\d+)\.intermediate\.dense\.", r"layers.\1.mlp.fc1."),
    (r"^encoder\.layer\.(\d+)\.output\.dense\.", r"layers.\1.mlp.fc2."),
    (r"^encoder\.layer\.(\d+)\.layernorm_", r"layers.\1.layernorm_"),
)


def rules(method: Method) -> tuple[Rule, ...]:
    return at(method, ViT, IMAGE)


def settings(source: Source, method: Method) -> dict[str, Any]:
    built = {"norm_before": False, "patch_bias": True, "class_token": True}
    return fields(method, ViT, trunk_settings(source.config) | built)


FORMAT = Format(
    name="hf_vit",
    title="transformers' ViTModel",
    recognises=lambda source: any(
        f"{prefix}embeddings.patch_embeddings.projection.weight" in source.tensors for prefix in ("", "vit.")
    ),
    rules=rules,
    stretch=DEIT,
    settings=settings,
    respell=((r"^vit\.", ""), *BEFORE_VERSION_5),
    unneeded=r"pooler\..*|classifier\..*",
)
