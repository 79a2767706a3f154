"""open_clip: OpenAI's names, in the classes CLIP and CustomTextCLIP (which puts `text.` before the text tower's).

A training checkpoint does not say which activation its model has; open_clip_config.json does (`quick_gelu`).
"""

from typing import Any

from mmpt.convert import clip_resnet, openai_clip
from mmpt.convert.format import Format, fields
from mmpt.convert.positions import OPEN_CLIP
from mmpt.convert.reading import Source
from mmpt.methods.method import Method
from mmpt.models.image import ViT
from mmpt.models.text import TextTransformer


def settings(source: Source, method: Method) -> dict[str, Any]:
    model = source.config.get("model_cfg", source.config)
    if "vision_cfg" not in model:
        return {}
    image, text = model["vision_cfg"], model.get("text_cfg", {})
    pixels = source.config.get("preprocess_cfg", {})
    told = {
        **trunk(model, image),
        "norm_before": not image.get("no_ln_pre", False),
        **({"trunk.heads": image["width"] // image.get("head_width", 64)} if "width" in image else {}),
        **{name: tuple(pixels[name]) for name in ("mean", "std") if name in pixels},
    }
    of_text = trunk(model, text) | {"causal": not text.get("no_causal_mask", False)}
    of_text |= {"trunk.heads": text["heads"]} if "heads" in text else {}
    return fields(method, ViT, told) | fields(method, TextTransformer, of_text)


def trunk(model: dict[str, Any], tower: dict[str, Any]) -> dict[str, Any]:
    """Activation and epsilon of a tower's blocks."""
    exact = "quick_gelu" if model.get("quick_gelu", False) else "gelu"
    approximate = (tower.get("act_kwargs") or {}).get("approximate") == "tanh"
    eps = (tower.get("norm_kwargs") or {}).get("eps", 1e-5)
    return {"trunk.activation": "gelu_tanh" if approximate else exact, "trunk.norm_eps": eps}


def unsaid(source: Source) -> str:
    if source.config:
        return ""
    return (
        "the file does not say whether its blocks use gelu or quick_gelu (OpenAI's, and names that end in -quickgelu): "
        "the recipe's activation is used"
    )


FORMAT = Format(
    name="open_clip",
    title="open_clip's CLIP",
    recognises=lambda source: (
        "visual.conv1.weight" in source.tensors
        and any(f"{prefix}token_embedding.weight" in source.tensors for prefix in ("", "text."))
    ),
    rules=openai_clip.rules,
    stretch=OPEN_CLIP,
    settings=settings,
    respell=((r"^text\.", ""),),
    unneeded=rf"(.*\.)?attn_mask|{clip_resnet.UNNEEDED}",
    unsaid=unsaid,
)
