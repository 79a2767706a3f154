"""transformers' AlignModel: an EfficientNet without its last convolution, whose names are ours, and BERT."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmpt.convert.format import Format, fields
from mmpt.convert.hf_bert import BERT_BLOCKS, BERT_EMBEDDING
from mmpt.convert.hf_clip import pixel_settings, trunk_settings
from mmpt.convert.positions import DEIT
from mmpt.convert.reading import Source
from mmpt.convert.rules import SCALAR, Rule, at, pair, rule
from mmpt.methods.align import ALIGN
from mmpt.methods.method import Method
from mmpt.models.bert import Bert, BertEmbedding
from mmpt.models.dual_tower import DualTower
from mmpt.models.efficientnet import EfficientNet, their_config
from mmpt.models.logit_scale import Temperature


def rules(method: Method) -> tuple[Rule, ...]:
    if not isinstance(method, ALIGN):
        return ()
    return (
        *(r for name in convolutional(method) for r in rule(theirs(name), f"towers.image.{name}")),
        *at(method, BertEmbedding, BERT_EMBEDDING, "text_model."),
        *at(method, Bert, BERT_BLOCKS, "text_model."),
        *at(method, DualTower, pair("text_projection", "text_projection")),
        *at(method, Temperature, rule("temperature", "temperature", SCALAR)),
    )


def convolutional(method: ALIGN) -> list[str]:
    """Names of the image tower's tensors."""
    tower = method.towers.image
    return list(tower.state_dict()) if isinstance(tower, EfficientNet) else []


def theirs(name: str) -> str:
    name = name.replace("running_variance", "running_var")
    below = f"embeddings.{name.removeprefix('embedding.')}" if name.startswith("embedding.") else f"encoder.{name}"
    return f"vision_model.{below}"


def settings(source: Source, method: Method) -> dict[str, Any]:
    text = trunk_settings(source.config.get("text_config", {}))
    told = fields(method, Bert, text) | fields(method, DualTower, {"project_image": False})
    for name, tower in method.named_modules():
        if isinstance(tower, EfficientNet):
            image = pixel_settings(source.preprocessor) | {"top": False} | padding(tower, source)
            told |= {f"method.{name}.{path}": value for path, value in image.items()}
    return told


def padding(tower: EfficientNet, source: Source) -> dict[str, Any]:
    """Where a grid has an odd side, transformers pads as if it were even, but for blocks that config.json names."""
    same = replace(tower.config, padding="same")
    odd = set(their_config(same).depthwise_padding)
    named = set(source.config.get("vision_config", {}).get("depthwise_padding", ()))
    if not odd and same.image_size % 2 == 0:
        return {}
    return {"padding": "same" if odd <= named and same.image_size % 2 == 0 else "even"}


def pooler(method: Method) -> dict[str, Tensor]:
    """Of BERT, which their text vectors do not pass."""
    if not isinstance(method, ALIGN):
        return {}
    width = method.towers.text_projection.in_features
    weight, bias = torch.zeros(width, width), torch.zeros(width)
    return {"text_model.pooler.dense.weight": weight, "text_model.pooler.dense.bias": bias}


FORMAT = Format(
    name="hf_align",
    title="transformers' AlignModel",
    recognises=lambda source: {"vision_model.embeddings.convolution.weight", "temperature"} <= source.tensors.keys(),
    rules=rules,
    stretch=DEIT,
    settings=settings,
    unneeded=r"text_model\.pooler\..*|.*position_ids|.*num_batches_tracked",
    extras=pooler,
)
