"""ViLT's own checkpoints (Kim et al. 2021; github.com/dandelin/ViLT), such as vilt_200k_mlm_itm.ckpt of Lightning."""

from typing import Any

from mmpt.convert import timm_vit
from mmpt.convert.format import Format, heads_of
from mmpt.convert.hf_bert import EMBEDDING, HEAD_TRANSFORM
from mmpt.convert.positions import VILT
from mmpt.convert.reading import Source
from mmpt.convert.rules import Rule, pair, rule, under
from mmpt.methods.method import Method
from mmpt.methods.vilt import ViLT

WORD_HEAD = (*HEAD_TRANSFORM, *rule("bias", "bias"), *rule("decoder.weight", "decoder"))
RULES = (
    *under(EMBEDDING, "text_embeddings.", "text."),
    *rule("token_type_embeddings.weight", "modality.embedding"),
    *under(timm_vit.PATCH_EMBEDDING, "transformer.", "image."),
    *under(timm_vit.BLOCKS, "transformer.", ""),
    *pair("transformer.norm", "norm"),
    *pair("pooler.dense", "pooler.dense"),
    *under(WORD_HEAD, "mlm_score.", "word_head."),
    *pair("itm_score.fc", "match_head"),
)


def rules(method: Method) -> tuple[Rule, ...]:
    return RULES if isinstance(method, ViLT) else ()


def settings(source: Source, method: Method) -> dict[str, Any]:
    return built(source.tensors["transformer.pos_embed"].shape[-1])


def built(width: int) -> dict[str, Any]:
    """Settings of the published model; width 0 says nothing of heads."""
    trunk = {"trunk.activation": "gelu", "trunk.norm_eps": 1e-6} | (heads_of(width) if width else {})
    half = (0.5, 0.5, 0.5)
    image = trunk | {"patch_bias": True, "class_token": True, "mean": half, "std": half}
    return {f"method.image.{name}": value for name, value in image.items()} | {"method.text.norm_eps": 1e-12}


FORMAT = Format(
    name="vilt",
    title="ViLT's",
    recognises=lambda source: {"transformer.pos_embed", "text_embeddings.LayerNorm.weight"} <= source.tensors.keys(),
    rules=rules,
    stretch=VILT,
    settings=settings,
    unneeded=r".*position_ids|rank_output\..*|mpp_score\..*|(vqa|nlvr2)_classifier\..*",
    wrapper="state_dict",
)
