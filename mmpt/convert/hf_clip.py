"""transformers' CLIPModel; and its ChineseCLIPModel, which has a BERT for text."""

from typing import Any

from mmpt.convert.format import ACTIVATIONS, Format, fields
from mmpt.convert.hf_bert import BERT_BLOCKS, BERT_EMBEDDING
from mmpt.convert.positions import DEIT
from mmpt.convert.reading import Source
from mmpt.convert.rules import PATCHES, SCALAR, Rule, at, pair, rule, under
from mmpt.methods.method import Method
from mmpt.models.bert import Bert, BertEmbedding
from mmpt.models.dual_tower import DualTower
from mmpt.models.image import ViT
from mmpt.models.logit_scale import LogitScale
from mmpt.models.text import TextTransformer

BLOCK = (
    *pair("layer_norm1", "norm_1"),
    *pair(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "qkv"),
    *pair("self_attn.out_proj", "out"),
    *pair("layer_norm2", "norm_2"),
    *pair("mlp.fc1", "mlp_in"),
    *pair("mlp.fc2", "mlp_out"),
)
BLOCKS = under(BLOCK, "encoder.layers.{n}.", "trunk.blocks.{n}.")
IMAGE = (
    *rule("embeddings.patch_embedding.weight", "embedding.patch.weight", PATCHES),
    *rule("embeddings.patch_embedding.bias", "embedding.patch.bias"),
    *rule("embeddings.class_embedding", "embedding.class_embedding"),
    *rule("embeddings.position_embedding.weight", "embedding.position_embedding", resize="grid"),
    *pair("pre_layrnorm", "ln_pre"),  # their spelling
    *BLOCKS,
    *pair("post_layernorm", "ln_post"),
)
TEXT = (
    *rule("embeddings.token_embedding.weight", "embedding.token_embedding"),
    *rule("embeddings.position_embedding.weight", "embedding.position_embedding", resize="rows"),
    *BLOCKS,
    *pair("final_layer_norm", "ln_final"),
)
PROJECTIONS = (
    *rule("visual_projection.weight", "image_projection.weight"),
    *rule("text_projection.weight", "text_projection.weight"),
)


def rules(method: Method) -> tuple[Rule, ...]:
    return (
        *at(method, ViT, IMAGE, "vision_model."),
        *at(method, TextTransformer, TEXT, "text_model."),
        *at(method, BertEmbedding, BERT_EMBEDDING, "text_model."),
        *at(method, Bert, BERT_BLOCKS, "text_model."),
        *at(method, DualTower, PROJECTIONS),
        *at(method, LogitScale, rule("logit_scale", "log_scale", SCALAR)),
    )


def trunk_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Fields of a TransformerConfig below `trunk.`, from a tower's part of config.json."""
    told = {
        "activation": ACTIVATIONS.get(config.get("hidden_act", ""), config.get("hidden_act")),
        "norm_eps": config.get("layer_norm_eps"),
        "heads": config.get("num_attention_heads"),
    }
    return {f"trunk.{name}": value for name, value in told.items() if value is not None}


def pixel_settings(preprocessor: dict[str, Any]) -> dict[str, Any]:
    """Fields of a ViTConfig, from preprocessor_config.json."""
    told = {"mean": preprocessor.get("image_mean"), "std": preprocessor.get("image_std")}
    return {name: tuple(value) for name, value in told.items() if value is not None}


def settings(source: Source, method: Method) -> dict[str, Any]:
    image, text = (trunk_settings(source.config.get(part, {})) for part in ("vision_config", "text_config"))
    of_text = fields(method, TextTransformer, text | {"causal": True}) | fields(method, Bert, text)
    built = {"norm_before": True, "patch_bias": False, "class_token": True}
    return fields(method, ViT, image | pixel_settings(source.preprocessor) | built) | of_text


FORMAT = Format(
    name="hf_clip",
    title="transformers' CLIPModel",
    recognises=lambda source: {"vision_model.pre_layrnorm.weight", "visual_projection.weight"} <= source.tensors.keys(),
    rules=rules,
    stretch=DEIT,
    settings=settings,
    unneeded=r".*\.position_ids|text_model\.pooler\..*",
)
