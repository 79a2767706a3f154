"""Noah-Wukong (Gu et al. 2022; github.com/huawei-noah/Pretrained-Language-Model, Noah_WuKong), vision transformers.

OpenAI's names, the text tower below `transformer.`. Its token-wise models compare patches with the pads of a text,
whose vectors are zero: recipes do so with `method.zero_pads`. The token reduction of its larger models has no
counterpart.
"""

from typing import Any

from mmpt.convert import openai_clip
from mmpt.convert.format import Format
from mmpt.convert.positions import OPEN_CLIP
from mmpt.convert.reading import Source
from mmpt.convert.rules import SCALAR, TRANSPOSED, Rule, at, rule
from mmpt.methods.filip import FILIP
from mmpt.methods.method import Method
from mmpt.models.dual_tower import DualTower
from mmpt.models.image import ViT
from mmpt.models.logit_scale import LogitScale
from mmpt.models.text import TextTransformer


def rules(method: Method) -> tuple[Rule, ...]:
    projections = (
        *openai_clip.IMAGE_PROJECTION,
        *rule("transformer.text_projection", "text_projection.weight", TRANSPOSED),
    )
    text = tuple(r._replace(theirs=(r.theirs[0].removeprefix("transformer."),)) for r in openai_clip.TEXT)
    return (
        *at(method, ViT, openai_clip.IMAGE, "visual."),
        *at(method, TextTransformer, text, "transformer."),
        *at(method, DualTower, projections),
        *at(method, LogitScale, rule("loss.logit_scale", "log_scale", SCALAR)),
    )


def settings(source: Source, method: Method) -> dict[str, Any]:
    told = openai_clip.image_settings(source, method)
    told |= openai_clip.text_settings(method, len(source.tensors["transformer.ln_final.weight"]))
    return told | ({"method.zero_pads": True} if isinstance(method, FILIP) else {})


FORMAT = Format(
    name="wukong",
    title="Noah-Wukong's",
    recognises=lambda source: {"visual.conv1.weight", "transformer.ln_final.weight"} <= source.tensors.keys(),
    rules=rules,
    stretch=OPEN_CLIP,
    settings=settings,
    optional=r".*logit_scale\.log_scale",  # the released code throws it away, and so may have the released files
    wrapper="state_dict",
)
