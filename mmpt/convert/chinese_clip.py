"""Chinese-CLIP (Yang et al. 2022; github.com/OFA-Sys/Chinese-CLIP): OpenAI's image towers, and a BERT for text."""

from typing import Any

from mmpt.convert import clip_resnet, openai_clip
from mmpt.convert.format import Format, fields, heads_of
from mmpt.convert.hf_bert import BERT_BLOCKS, BERT_EMBEDDING
from mmpt.convert.positions import OPEN_CLIP
from mmpt.convert.reading import Source
from mmpt.convert.rules import Rule, at
from mmpt.methods.method import Method
from mmpt.models.bert import Bert, BertEmbedding
from mmpt.models.dual_tower import DualTower
from mmpt.models.image import ViT
from mmpt.models.logit_scale import LogitScale


def rules(method: Method) -> tuple[Rule, ...]:
    return (
        *at(method, ViT, openai_clip.IMAGE, "visual."),
        *clip_resnet.rules(method, "visual."),
        *at(method, BertEmbedding, BERT_EMBEDDING, "bert."),
        *at(method, Bert, BERT_BLOCKS, "bert."),
        *at(method, DualTower, openai_clip.IMAGE_PROJECTION + openai_clip.TEXT_PROJECTION),
        *at(method, LogitScale, openai_clip.SCALE),
    )


def settings(source: Source, method: Method) -> dict[str, Any]:
    width = source.tensors["bert.embeddings.word_embeddings.weight"].shape[1]
    text = {"trunk.activation": "gelu", "trunk.norm_eps": 1e-12, "embedding.norm_eps": 1e-12} | heads_of(width)
    return openai_clip.image_settings(source, method) | fields(method, Bert, text)


FORMAT = Format(
    name="chinese_clip",
    title="Chinese-CLIP's",
    recognises=lambda source: (
        {"visual.conv1.weight", "bert.embeddings.word_embeddings.weight"} <= source.tensors.keys()
    ),
    rules=rules,
    stretch=OPEN_CLIP,
    settings=settings,
    unneeded=rf"bert\.pooler\..*|.*position_ids|{clip_resnet.UNNEEDED}",
    wrapper="state_dict",
)
