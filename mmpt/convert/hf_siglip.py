"""transformers' SiglipModel."""

from typing import Any

from mmpt.convert import hf_clip
from mmpt.convert.format import Format, fields
from mmpt.convert.positions import VILT
from mmpt.convert.reading import Source
from mmpt.convert.rules import FIRST_THIRD, LAST_TWO_THIRDS, NUMBER, ONE_BEFORE, Rule, at, pair, rule
from mmpt.methods.method import Method
from mmpt.methods.siglip import SigLIP
from mmpt.models.image import ViT
from mmpt.models.logit_scale import LogitBias, LogitScale
from mmpt.models.pooling import AttentionPooling
from mmpt.models.text import TextTransformer

POOLING = (
    *rule("probe", "query", ONE_BEFORE),
    *rule("attention.in_proj_weight", "q.weight", FIRST_THIRD),
    *rule("attention.in_proj_weight", "kv.weight", LAST_TWO_THIRDS),
    *rule("attention.in_proj_bias", "q.bias", FIRST_THIRD),
    *rule("attention.in_proj_bias", "kv.bias", LAST_TWO_THIRDS),
    *pair("attention.out_proj", "out"),
    *pair("layernorm", "norm"),
    *pair("mlp.fc1", "mlp_in"),
    *pair("mlp.fc2", "mlp_out"),
)


def rules(method: Method) -> tuple[Rule, ...]:
    if not isinstance(method, SigLIP):
        return ()
    return (
        *at(method, ViT, hf_clip.IMAGE, "vision_model."),
        *at(method, AttentionPooling, POOLING, "vision_model.head."),
        *at(method, TextTransformer, hf_clip.TEXT, "text_model."),
        *at(method, SigLIP, pair("text_model.head", "text_projection")),
        *at(method, LogitScale, rule("logit_scale", "log_scale", NUMBER)),
        *at(method, LogitBias, rule("logit_bias", "bias", NUMBER)),
    )


def settings(source: Source, method: Method) -> dict[str, Any]:
    image, text = (
        hf_clip.trunk_settings(DEFAULTS | source.config.get(part, {})) for part in ("vision_config", "text_config")
    )
    pixels = hf_clip.pixel_settings(source.preprocessor)
    built = {"norm_before": False, "patch_bias": True, "class_token": False}
    return fields(method, ViT, image | pixels | built) | fields(method, TextTransformer, text | {"causal": False})


DEFAULTS = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
"""What config.json leaves out."""

FORMAT = Format(
    name="hf_siglip",
    title="transformers' SiglipModel",
    recognises=lambda source: {"vision_model.head.probe", "text_model.head.weight"} <= source.tensors.keys(),
    rules=rules,
    stretch=VILT,
    settings=settings,
    unneeded=r".*\.position_ids",
)
