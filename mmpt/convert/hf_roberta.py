"""transformers' RobertaModel (Liu et al. 2019), alone or in RobertaForMaskedLM: BERT whose words begin at the third row
of its table of positions, because fairseq counts them from behind the pad's id, which is 1."""

from typing import Any

import torch

from mmpt.convert import hf_bert
from mmpt.convert.format import Format
from mmpt.convert.positions import DEIT
from mmpt.convert.reading import Source
from mmpt.convert.rules import Rule, Via, at
from mmpt.methods.method import Method
from mmpt.models.bert import Bert, BertEmbedding

PAD = 1
KINDS = ("roberta", "xlm-roberta", "camembert")
"""`model_type` in config.json of those with this layout."""
QUERY = "encoder.layer.0.attention.self.query.weight"
WITHOUT_TWO = Via(
    lambda theirs: theirs[0][PAD + 1 :], lambda ours, _: [torch.cat([torch.zeros_like(ours[: PAD + 1]), ours])]
)
EMBEDDING = tuple(r._replace(via=WITHOUT_TWO) if r.ours == "position_embedding" else r for r in hf_bert.BERT_EMBEDDING)


def rules(method: Method) -> tuple[Rule, ...]:
    return (*at(method, BertEmbedding, EMBEDDING), *at(method, Bert, hf_bert.BERT_BLOCKS))


def recognises(source: Source) -> bool:
    """By its prefix or its configuration; without either, by a table of token types that has one row."""
    if f"roberta.{QUERY}" in source.tensors:
        return True
    if QUERY not in source.tensors:
        return False
    if "model_type" in source.config:
        return source.config["model_type"] in KINDS
    return len(source.tensors.get("embeddings.token_type_embeddings.weight", ())) == 1


def settings(source: Source, method: Method) -> dict[str, Any]:
    pad = source.config.get("pad_token_id", PAD)
    if pad != PAD:
        raise ValueError(f"{source.path}: its pad has id {pad}; positions are known to begin behind {PAD} alone")
    return hf_bert.settings(source, method)


FORMAT = Format(
    name="hf_roberta",
    title="transformers' RobertaModel",
    recognises=recognises,
    rules=rules,
    stretch=DEIT,
    settings=settings,
    respell=((r"^roberta\.", ""),),
    unneeded=r".*position_ids|pooler\..*|lm_head\..*",
)
