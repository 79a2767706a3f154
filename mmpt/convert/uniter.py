"""UNITER's own checkpoints (Chen et al. 2020; github.com/ChenRocks/UNITER), such as uniter-base.pt."""

from typing import Any

from mmpt.convert.format import Format, heads_of
from mmpt.convert.hf_bert import BERT_EMBEDDING, BLOCK, LAYER, OLD_NORMS, WORD_HEAD
from mmpt.convert.positions import DEIT
from mmpt.convert.reading import Source
from mmpt.convert.rules import SECOND_ROW, Rule, pair, rule, under
from mmpt.methods.method import Method
from mmpt.methods.uniter import UNITER

REGIONS = (
    *pair("img_linear", "feature"),
    *pair("img_layer_norm", "feature_norm"),
    *pair("pos_linear", "location"),
    *pair("pos_layer_norm", "location_norm"),
    *rule("mask_embedding.weight", "mask", SECOND_ROW),
    *pair("LayerNorm", "norm"),
)
TRANSFORM = (*pair("net.0", "transform.dense"), *pair("net.2", "transform.norm"))
RULES = (
    *under(BERT_EMBEDDING, "uniter.", "text."),
    *under(REGIONS, "uniter.img_embeddings.", "image."),
    *under(BLOCK, f"uniter.{LAYER}", "trunk.blocks.{n}."),
    *pair("uniter.pooler.dense", "pooler.dense"),
    *under(WORD_HEAD, "cls.predictions.", "word_head."),
    *under((*TRANSFORM, *rule("bias", "bias")), "feat_regress.", "feature_head."),
    *under((*TRANSFORM, *pair("net.3", "classes")), "region_classifier.", "class_head."),
    *pair("itm_output", "match_head"),
)


def rules(method: Method) -> tuple[Rule, ...]:
    return RULES if isinstance(method, UNITER) else ()


def settings(source: Source, method: Method) -> dict[str, Any]:
    width = source.tensors["uniter.img_embeddings.img_linear.bias"].shape[0]
    told = {"trunk.activation": "gelu", "trunk.norm_eps": 1e-12, "text.norm_eps": 1e-12, "regions.norm_eps": 1e-12}
    return {f"method.{name}": value for name, value in (told | heads_of(width)).items()}


FORMAT = Format(
    name="uniter",
    title="UNITER's",
    recognises=lambda source: "uniter.img_embeddings.img_linear.weight" in source.tensors,
    rules=rules,
    stretch=DEIT,
    settings=settings,
    respell=OLD_NORMS,
    repeats=(
        ("cls.predictions.decoder.weight", "uniter.embeddings.word_embeddings.weight"),
        ("feat_regress.weight", "uniter.img_embeddings.img_linear.weight"),
    ),
)
