"""ALBEF's own checkpoints (Li et al. 2021; github.com/salesforce/ALBEF), with their momentum copies (`_m`) and queues.

BERT's first blocks are the text encoder, the others with cross-attention the fusion encoder. Fine-tuned checkpoints,
whose text encoder lacks the head for masked words, want --partial.
"""

from typing import Any

import torch
from torch import Tensor

from mmpt.convert import timm_vit
from mmpt.convert.format import Format, fields, heads_of
from mmpt.convert.hf_bert import BERT_EMBEDDING, BLOCK, LAYER, WORD_HEAD, depth_of_text
from mmpt.convert.positions import DEIT
from mmpt.convert.reading import Source
from mmpt.convert.rules import SCALAR, TRANSPOSED, Rule, pair, rule, under
from mmpt.engine.weights import TEACHER
from mmpt.methods.albef import ALBEF
from mmpt.methods.method import Method
from mmpt.models.bert import Bert
from mmpt.models.fusion import Fusion
from mmpt.models.image import CLIP_MEAN, CLIP_STD, ViT

CROSS = (
    *pair("crossattention.self.query", "cross_q"),
    *pair(("crossattention.self.key", "crossattention.self.value"), "cross_kv"),
    *pair("crossattention.output.dense", "cross_out"),
    *pair("crossattention.output.LayerNorm", "norm_cross"),
)


def encoders(copy: str, depth: int) -> tuple[Rule, ...]:
    """Of all that has a momentum copy, whose names have `copy` behind the name of a module; text blocks: `depth`."""
    text = f"text_encoder{copy}."
    return (
        *under(timm_vit.IMAGE, f"visual_encoder{copy}.", "image."),
        *under(BERT_EMBEDDING, f"{text}bert.", "text.embedding."),
        *under(BLOCK, f"{text}bert.{LAYER}", "text.trunk.blocks.{n}."),
        *under((*BLOCK, *CROSS), f"{text}bert.{LAYER}", "fusion.blocks.{n}.", shift=depth),
        *under(WORD_HEAD, f"{text}cls.predictions.", "word_head."),
        *pair(f"vision_proj{copy}", "image_projection"),
        *pair(f"text_proj{copy}", "text_projection"),
    )


def rules(method: Method) -> tuple[Rule, ...]:
    if not isinstance(method, ALBEF):
        return ()
    depth = depth_of_text(method)
    return (
        *under(encoders("", depth), "", "encoders."),
        *under(encoders("_m", depth), "", TEACHER),
        *pair("itm_head", "match_head"),
        *rule("temp", "temperature.temperature", SCALAR),
        *rule("image_queue", "image_queue", TRANSPOSED),
        *rule("text_queue", "text_queue", TRANSPOSED),
        *rule("queue_ptr", "queue_next"),
    )


def settings(source: Source, method: Method) -> dict[str, Any]:
    width = source.tensors["visual_encoder.pos_embed"].shape[-1]
    image = timm_vit.image_settings(method, set(source.tensors), "visual_encoder.", width)
    bert = {"trunk.activation": "gelu", "trunk.norm_eps": 1e-12} | heads_of(width)
    of_text = fields(method, Bert, bert | {"embedding.norm_eps": 1e-12}) | fields(method, Fusion, bert)
    return image | fields(method, ViT, {"mean": CLIP_MEAN, "std": CLIP_STD}) | of_text


def numbers(method: Method) -> dict[str, Tensor]:
    """The buffer of position numbers that transformers 4.8 kept in BERT."""
    if not isinstance(method, ALBEF):
        return {}
    positions = torch.arange(method.config.text.embedding.positions)[None]
    return {f"text_encoder{copy}.bert.embeddings.position_ids": positions for copy in ("", "_m")}


FORMAT = Format(
    name="albef",
    title="ALBEF's",
    recognises=lambda source: "visual_encoder.pos_embed" in source.tensors,
    rules=rules,
    stretch=DEIT,
    settings=settings,
    respell=((r"^text_encoder(_m)?\.(embeddings|encoder)\.", r"text_encoder\1.bert.\2."),),
    unneeded=r".*position_ids|idx_queue|.*\.pooler\..*",
    optional="steps",
    repeats=tuple(
        (f"text_encoder{copy}.cls.predictions.decoder.{kind}", f"text_encoder{copy}.{same}")
        for copy in ("", "_m")
        for kind, same in (("weight", "bert.embeddings.word_embeddings.weight"), ("bias", "cls.predictions.bias"))
    ),
    extras=numbers,
    wrapper="model",
)
