"""transformers' ViltModel, alone or below a head. Its classes have no head for matching but `rank_output`, the log odds
of a match; the original's two rows are written beside it, so that nothing is lost."""

from typing import Any

import torch
from torch import Tensor

from mmpt.convert.format import Format
from mmpt.convert.hf_bert import EMBEDDING, HEAD_TRANSFORM
from mmpt.convert.positions import VILT
from mmpt.convert.reading import Source
from mmpt.convert.rules import ONE_BEFORE, PATCHES, TWO_BEFORE, Rule, pair, rule, under
from mmpt.convert.vilt import built
from mmpt.methods.method import Method
from mmpt.methods.vilt import ViLT

ATTENTION = "attention.attention."
BLOCK = (
    *pair("layernorm_before", "norm_1"),
    *pair((f"{ATTENTION}query", f"{ATTENTION}key", f"{ATTENTION}value"), "qkv"),
    *pair("attention.output.dense", "out"),
    *pair("layernorm_after", "norm_2"),
    *pair("intermediate.dense", "mlp_in"),
    *pair("output.dense", "mlp_out"),
)
MODEL = (
    *under(EMBEDDING, "embeddings.text_embeddings.", "text."),
    *rule("embeddings.token_type_embeddings.weight", "modality.embedding"),
    *rule("embeddings.cls_token", "image.class_embedding", TWO_BEFORE),
    *rule("embeddings.position_embeddings", "image.position_embedding", ONE_BEFORE, resize="grid"),
    *rule("embeddings.patch_embeddings.projection.weight", "image.patch.weight", PATCHES),
    *rule("embeddings.patch_embeddings.projection.bias", "image.patch.bias"),
    *under(BLOCK, "encoder.layer.{n}.", "trunk.blocks.{n}."),
    *pair("layernorm", "norm"),
    *pair("pooler.dense", "pooler.dense"),
)
HEADS = (
    *under(HEAD_TRANSFORM, "mlm_score.", "word_head."),
    *rule("mlm_score.decoder.weight", "word_head.decoder"),
    *rule("mlm_score.decoder.bias", "word_head.bias"),
    *pair("itm_score.fc", "match_head"),
)


def rules(method: Method) -> tuple[Rule, ...]:
    return (*under(MODEL, "vilt.", ""), *HEADS) if isinstance(method, ViLT) else ()


def settings(source: Source, method: Method) -> dict[str, Any]:
    """All but epsilons: transformers has one, where the original has 1e-12 for words and 1e-6 in its blocks."""
    told = {name: value for name, value in built(0).items() if not name.endswith("norm_eps")}
    heads = source.config.get("num_attention_heads")
    return told | ({"method.image.trunk.heads": heads} if heads else {})


def rank_output(method: Method) -> dict[str, Tensor]:
    """The log odds of a match as one row."""
    if not isinstance(method, ViLT):
        return {}
    difference = torch.tensor([[-1.0, 1.0]])
    weight, bias = method.match_head.weight.detach().cpu(), method.match_head.bias.detach().cpu()
    return {
        "rank_output.weight": difference @ weight.float(),
        "rank_output.bias": difference[0] @ bias[:, None].float(),
    }


FORMAT = Format(
    name="hf_vilt",
    title="transformers' ViltModel",
    recognises=lambda source: any(
        f"{prefix}embeddings.text_embeddings.LayerNorm.weight" in source.tensors for prefix in ("", "vilt.")
    ),
    rules=rules,
    stretch=VILT,
    settings=settings,
    respell=(
        (r"^(embeddings|encoder|layernorm|pooler)\.", r"vilt.\1."),
        (r"^mlm_score\.bias$", "mlm_score.decoder.bias"),
    ),
    unneeded=r".*position_ids|rank_output\..*|classifier\..*",
    extras=rank_output,
)
