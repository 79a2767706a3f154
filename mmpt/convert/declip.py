"""DeCLIP's benchmark (github.com/Sense-GVT/DeCLIP): its CLIP and its FILIP, with vision transformers.

Its FILIP trains two losses; what is taken as FILIP is the token side (`image_mapping`, `text_mapping`,
`logit_scale_dense`), and as CLIP the other. Patches are mapped as they leave the blocks, before the last norm
(`norm_after` is false), and mappings have biases. Its own loss compares patches with pads too, which here are none.
"""

from typing import Any

from mmpt.convert import openai_clip
from mmpt.convert.format import Format, fields
from mmpt.convert.positions import OPEN_CLIP
from mmpt.convert.reading import Source
from mmpt.convert.rules import NUMBER, SCALAR, TRANSPOSED, Rule, at, pair, rule
from mmpt.methods.filip import FILIP
from mmpt.methods.method import Method
from mmpt.models.dual_tower import DualTower
from mmpt.models.image import ViT
from mmpt.models.logit_scale import LogitScale
from mmpt.models.resnet import IMAGENET_MEAN, IMAGENET_STD
from mmpt.models.text import TextTransformer

TOKENS = (*pair("image_mapping", "image_projection"), *pair("text_mapping", "text_projection"))
VECTORS = (
    *rule("visual.proj", "image_projection.weight", TRANSPOSED),
    *pair("encode_text.text_projection", "text_projection"),
)
SCALE, DENSE_SCALE = rule("logit_scale", "log_scale", NUMBER), rule("logit_scale_dense", "log_scale", SCALAR)


def rules(method: Method) -> tuple[Rule, ...]:
    tokens = isinstance(method, FILIP)
    return (
        *at(method, ViT, openai_clip.IMAGE, "visual."),
        *at(method, TextTransformer, openai_clip.TEXT, "encode_text."),
        *at(method, DualTower, TOKENS if tokens else VECTORS),
        *at(method, LogitScale, DENSE_SCALE if tokens else SCALE),
    )


def settings(source: Source, method: Method) -> dict[str, Any]:
    tokens, text = isinstance(method, FILIP), len(source.tensors["encode_text.ln_final.weight"])
    told = openai_clip.image_settings(source, method) | openai_clip.text_settings(method, text)
    told |= fields(method, ViT, {"norm_after": not tokens, "mean": IMAGENET_MEAN, "std": IMAGENET_STD})
    biases = {"image_projection_bias": tokens, "text_projection_bias": True}
    return told | fields(method, DualTower, biases)


FORMAT = Format(
    name="declip",
    title="DeCLIP's",
    recognises=lambda source: {"visual.class_embedding", "encode_text.ln_final.weight"} <= source.tensors.keys(),
    rules=rules,
    stretch=OPEN_CLIP,
    settings=settings,
    unneeded=(
        r"visual\.(ln_post\..*|proj)|encode_text\.text_projection\..*|(image|text)_mapping\..*|logit_scale(_dense)?|"
        r"text_label_predictor\..*"
    ),
    wrapper="model",
)
