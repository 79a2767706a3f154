"""open_clip's SigLIP: CustomTextCLIP with timm's vision transformer (`visual.trunk.`) and a text tower that sees both
ways. timm's blocks have the exact GELU, where transformers' and big_vision's have its tanh approximation."""

from typing import Any

from mmpt.convert import openai_clip, timm_vit
from mmpt.convert.format import Format, fields
from mmpt.convert.open_clip import trunk
from mmpt.convert.positions import OPEN_CLIP
from mmpt.convert.reading import Source
from mmpt.convert.rules import ONE_BEFORE, SCALAR, Rule, at, pair, rule
from mmpt.methods.method import Method
from mmpt.methods.siglip import SigLIP
from mmpt.models.image import ViT
from mmpt.models.logit_scale import LogitBias, LogitScale
from mmpt.models.pooling import AttentionPooling
from mmpt.models.text import TextTransformer

POOLING = (
    *rule("latent", "query", ONE_BEFORE),
    *pair("q", "q"),
    *pair("kv", "kv"),
    *pair("proj", "out"),
    *pair("norm", "norm"),
    *pair("mlp.fc1", "mlp_in"),
    *pair("mlp.fc2", "mlp_out"),
)


def rules(method: Method) -> tuple[Rule, ...]:
    if not isinstance(method, SigLIP):
        return ()
    return (
        *at(method, ViT, timm_vit.IMAGE, "visual.trunk."),
        *at(method, AttentionPooling, POOLING, "visual.trunk.attn_pool."),
        *at(method, TextTransformer, openai_clip.TEXT, "text."),
        *at(method, SigLIP, pair("text.text_projection", "text_projection")),
        *at(method, LogitScale, rule("logit_scale", "log_scale", SCALAR)),
        *at(method, LogitBias, rule("logit_bias", "bias", SCALAR)),
    )


def settings(source: Source, method: Method) -> dict[str, Any]:
    width = source.tensors["visual.trunk.pos_embed"].shape[-1]
    image = timm_vit.image_settings(method, set(source.tensors), "visual.trunk.", width)
    model = source.config.get("model_cfg", source.config)
    text = model.get("text_cfg", {})
    told = trunk(model, text) | ({"trunk.heads": text["heads"]} if "heads" in text else {})
    return image | fields(method, TextTransformer, (told if text else {}) | {"causal": False})


FORMAT = Format(
    name="open_clip_siglip",
    title="open_clip's SigLIP",
    recognises=lambda source: {"visual.trunk.attn_pool.latent", "text.ln_final.weight"} <= source.tensors.keys(),
    rules=rules,
    stretch=OPEN_CLIP,
    settings=settings,
)
