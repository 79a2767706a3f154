"""Foreign state dicts with all names of the original projects, written out by hand from transformers' models.

The way from transformers' names to the originals' is this file's own, so that a table of rules that is wrong cannot
agree with it by being wrong twice.
"""

import torch
from torch import Tensor

from tests.models.weights import below

Weights = dict[str, Tensor]


def put(out: Weights, there: str, state: Weights, here: str, kinds: tuple[str, ...] = ("weight", "bias")) -> None:
    for kind in kinds:
        out[f"{there}.{kind}"] = state[f"{here}.{kind}"].clone()


def stacked(state: Weights, names: tuple[str, ...], kind: str) -> Tensor:
    return torch.cat([state[f"{name}.{kind}"] for name in names])


def openai_tower(state: Weights, tower: str, there: str, depth: int) -> Weights:
    """The blocks of a tower of transformers' CLIPModel as residual attention blocks of OpenAI's CLIP."""
    out: Weights = {}
    for n in range(depth):
        layer, block = f"{tower}.encoder.layers.{n}", f"{there}transformer.resblocks.{n}"
        attention = tuple(f"{layer}.self_attn.{x}_proj" for x in "qkv")
        for kind in ("weight", "bias"):
            out[f"{block}.attn.in_proj_{kind}"] = stacked(state, attention, kind)
        put(out, f"{block}.attn.out_proj", state, f"{layer}.self_attn.out_proj")
        for ours, theirs in (("ln_1", "layer_norm1"), ("ln_2", "layer_norm2")):
            put(out, f"{block}.{ours}", state, f"{layer}.{theirs}")
        put(out, f"{block}.mlp.c_fc", state, f"{layer}.mlp.fc1")
        put(out, f"{block}.mlp.c_proj", state, f"{layer}.mlp.fc2")
    return out


def openai_image(state: Weights, depth: int) -> Weights:
    """`visual.` of a vision transformer, from transformers' CLIPModel."""
    embedding = "vision_model.embeddings"
    out = openai_tower(state, "vision_model", "visual.", depth) | {
        "visual.class_embedding": state[f"{embedding}.class_embedding"],
        "visual.conv1.weight": state[f"{embedding}.patch_embedding.weight"],
        "visual.positional_embedding": state[f"{embedding}.position_embedding.weight"],
        "visual.proj": state["visual_projection.weight"].T.contiguous(),
    }
    put(out, "visual.ln_pre", state, "vision_model.pre_layrnorm")
    put(out, "visual.ln_post", state, "vision_model.post_layernorm")
    return out


def openai_text(state: Weights, there: str, depth: int) -> Weights:
    """The text tower below a prefix, without the projection."""
    embedding = "text_model.embeddings"
    out = openai_tower(state, "text_model", there, depth) | {
        f"{there}token_embedding.weight": state[f"{embedding}.token_embedding.weight"],
        f"{there}positional_embedding": state[f"{embedding}.position_embedding.weight"],
    }
    put(out, f"{there}ln_final", state, "text_model.final_layer_norm")
    return out


def openai(state: Weights, depth: int) -> Weights:
    """OpenAI's state dict of a vision transformer."""
    return (
        openai_image(state, depth)
        | openai_text(state, "", depth)
        | {
            "text_projection": state["text_projection.weight"].T.contiguous(),
            "logit_scale": state["logit_scale"],
            "input_resolution": torch.tensor(224),
            "context_length": torch.tensor(77),
            "vocab_size": torch.tensor(49408),
        }
    )


def timm(state: Weights, there: str, depth: int) -> Weights:
    """timm's vision transformer below a prefix, from transformers' ViTModel of version 5."""
    out = {
        f"{there}cls_token": state["embeddings.cls_token"],
        f"{there}pos_embed": state["embeddings.position_embeddings"],
    }
    put(out, f"{there}patch_embed.proj", state, "embeddings.patch_embeddings.projection")
    for n in range(depth):
        layer, block = f"layers.{n}", f"{there}blocks.{n}"
        for kind in ("weight", "bias"):
            names = tuple(f"{layer}.attention.{x}_proj" for x in "qkv")
            out[f"{block}.attn.qkv.{kind}"] = stacked(state, names, kind)
        put(out, f"{block}.attn.proj", state, f"{layer}.attention.o_proj")
        put(out, f"{block}.norm1", state, f"{layer}.layernorm_before")
        put(out, f"{block}.norm2", state, f"{layer}.layernorm_after")
        put(out, f"{block}.mlp.fc1", state, f"{layer}.mlp.fc1")
        put(out, f"{block}.mlp.fc2", state, f"{layer}.mlp.fc2")
    put(out, f"{there}norm", state, "layernorm")
    return out


def vilt(state: Weights, depth: int) -> Weights:
    """vilt_200k_mlm_itm.ckpt without its matching head, from transformers' ViltForMaskedLM."""
    body = below(state, "vilt.")
    out = {f"text_embeddings.{name}": value for name, value in below(body, "embeddings.text_embeddings.").items()}
    out["text_embeddings.position_ids"] = torch.arange(len(out["text_embeddings.position_embeddings.weight"]))[None]
    out["token_type_embeddings.weight"] = body["embeddings.token_type_embeddings.weight"]
    as_vit = {
        f"embeddings.{name}": body[f"embeddings.{name}"]
        for name in ("cls_token", "position_embeddings", "patch_embeddings.projection.weight",
                     "patch_embeddings.projection.bias")
    } | {name: body[name] for name in ("layernorm.weight", "layernorm.bias")}  # fmt: skip
    renamed = {
        "attention.attention.query": "attention.q_proj", "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj", "attention.output.dense": "attention.o_proj",
        "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2", "layernorm_before": "layernorm_before",
        "layernorm_after": "layernorm_after",
    }  # fmt: skip
    for n in range(depth):
        for before, after in renamed.items():
            put(as_vit, f"layers.{n}.{after}", body, f"encoder.layer.{n}.{before}")
    out |= timm(as_vit, "transformer.", depth)
    put(out, "pooler.dense", body, "pooler.dense")
    for name in ("transform.dense", "transform.LayerNorm"):
        put(out, f"mlm_score.{name}", state, f"mlm_score.{name}")
    out["mlm_score.decoder.weight"] = state["mlm_score.decoder.weight"]
    out["mlm_score.bias"] = state["mlm_score.decoder.bias"]
    return out


def albef_text(lower: Weights, upper: Weights, head: Weights, depth: int, copy: str = "") -> Weights:
    """`text_encoder` of ALBEF: transformers' BertModel, then a BlipTextModel's layers with their numbers moved up, and
    the head of a BertForMaskedLM."""
    text = f"text_encoder{copy}."
    out = {f"{text}bert.{name}": value for name, value in lower.items()}
    positions = len(lower["embeddings.position_embeddings.weight"])
    out[f"{text}bert.embeddings.position_ids"] = torch.arange(positions)[None]
    for name, value in upper.items():
        if name.startswith("encoder.layer."):
            number, rest = name.removeprefix("encoder.layer.").split(".", 1)
            out[f"{text}bert.encoder.layer.{int(number) + depth}.{rest}"] = value
    out |= {f"{text}cls.predictions.{name}": value for name, value in head.items()}
    out[f"{text}cls.predictions.decoder.weight"] = lower["embeddings.word_embeddings.weight"]
    out[f"{text}cls.predictions.decoder.bias"] = head["bias"]
    return out


CONSTANTS = ("input_resolution", "context_length", "vocab_size")
"""What OpenAI's TorchScript programs keep among the weights."""


def before_version_5(state: Weights, depth: int) -> Weights:
    """transformers' ViTModel in the names of version 4."""
    out = {name: value for name, value in state.items() if not name.startswith("layers.")}
    renamed = {
        "attention.q_proj": "attention.attention.query", "attention.k_proj": "attention.attention.key",
        "attention.v_proj": "attention.attention.value", "attention.o_proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense", "layernorm_before": "layernorm_before",
        "layernorm_after": "layernorm_after",
    }  # fmt: skip
    for n in range(depth):
        for here, there in renamed.items():
            put(out, f"encoder.layer.{n}.{there}", state, f"layers.{n}.{here}")
    return out
