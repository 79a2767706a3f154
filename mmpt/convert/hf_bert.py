"""transformers' BertModel, alone or in BertForMaskedLM and BertForPreTraining; and BERT files of before 2019, whose
norms have `gamma` and `beta`."""

from typing import Any

from mmpt.convert.format import ACTIVATIONS, Format, fields
from mmpt.convert.positions import DEIT
from mmpt.convert.reading import Source
from mmpt.convert.rules import Rule, at, pair, rule, under
from mmpt.methods.albef import ALBEF
from mmpt.methods.method import Method
from mmpt.methods.uniter import UNITER
from mmpt.models.bert import Bert, BertEmbedding
from mmpt.models.fusion import Fusion
from mmpt.models.heads import MaskedWordHead

OLD_NORMS = ((r"\.gamma$", ".weight"), (r"\.beta$", ".bias"))
EMBEDDING = (
    *rule("word_embeddings.weight", "token_embedding"),
    *rule("position_embeddings.weight", "position_embedding", resize="rows"),
    *rule("token_type_embeddings.weight", "type_embedding"),
    *pair("LayerNorm", "norm"),
)
BERT_EMBEDDING = under(EMBEDDING, "embeddings.", "")
BLOCK = (
    *pair(("attention.self.query", "attention.self.key", "attention.self.value"), "qkv"),
    *pair("attention.output.dense", "out"),
    *pair("attention.output.LayerNorm", "norm_1"),
    *pair("intermediate.dense", "mlp_in"),
    *pair("output.dense", "mlp_out"),
    *pair("output.LayerNorm", "norm_2"),
)
LAYER = "encoder.layer.{n}."
BERT_BLOCKS = under(BLOCK, LAYER, "trunk.blocks.{n}.")
HEAD_TRANSFORM = (*pair("transform.dense", "transform.dense"), *pair("transform.LayerNorm", "transform.norm"))
WORD_HEAD = (*HEAD_TRANSFORM, *rule("bias", "bias"))
"""Of a head whose decoder is the token embedding."""


def depth_of_text(method: Method) -> int:
    """Blocks of the text encoder; ALBEF's fusion blocks are those of BERT that follow."""
    return max((len(module.trunk.blocks) for module in method.modules() if isinstance(module, Bert)), default=0)


def rules(method: Method) -> tuple[Rule, ...]:
    found = (
        *at(method, BertEmbedding, BERT_EMBEDDING),
        *at(method, Bert, BERT_BLOCKS),
        *at(method, Fusion, under(BLOCK, LAYER, "blocks.{n}."), shift=depth_of_text(method)),
    )
    if isinstance(method, UNITER):
        found += (*under(BLOCK, LAYER, "trunk.blocks.{n}."), *pair("pooler.dense", "pooler.dense"))
    if isinstance(method, UNITER | ALBEF):
        found += at(method, MaskedWordHead, WORD_HEAD, "cls.predictions.")
    return found


def settings(source: Source, method: Method) -> dict[str, Any]:
    config = source.config
    told = {
        "trunk.activation": ACTIVATIONS.get(config.get("hidden_act", ""), config.get("hidden_act")),
        "trunk.norm_eps": config.get("layer_norm_eps"),
        "embedding.norm_eps": config.get("layer_norm_eps"),
        "trunk.heads": config.get("num_attention_heads"),
    }
    told = {name: value for name, value in told.items() if value is not None}
    of_trunk = {name: value for name, value in told.items() if name.startswith("trunk.")}
    return fields(method, Bert, told) | fields(method, Fusion, of_trunk)


FORMAT = Format(
    name="hf_bert",
    title="transformers' BertModel",
    recognises=lambda source: any(
        f"{prefix}encoder.layer.0.attention.self.query.weight" in source.tensors for prefix in ("", "bert.")
    ),
    rules=rules,
    stretch=DEIT,
    settings=settings,
    respell=((r"^bert\.", ""), *OLD_NORMS),
    unneeded=r".*position_ids|pooler\..*|cls\..*",
    repeats=(
        ("cls.predictions.decoder.weight", "embeddings.word_embeddings.weight"),
        ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ),
)
