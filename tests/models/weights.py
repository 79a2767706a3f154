"""transformers' CLIP and SigLIP, small and random, and their weights under our names: the oracle of the towers."""

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from mmpt.methods.clip import CLIP
from mmpt.methods.clip import CLIPConfig as OurCLIPConfig
from mmpt.methods.siglip import SigLIP
from mmpt.methods.siglip import SigLIPConfig as OurSigLIPConfig
from mmpt.models.dual_tower import DualTowerConfig
from mmpt.models.image import ViTConfig
from mmpt.models.text import TextTransformerConfig
from mmpt.models.transformer import TransformerConfig

VOCABULARY, END, MAX_TOKENS, IMAGE_SIZE, PATCH = 99, 98, 20, 48, 16
WIDTH, TEXT_WIDTH, EMBED = 32, 24, 16


def clip_pair(activation: str) -> tuple[CLIPModel, CLIP]:
    """transformers' CLIP and ours with the same weights; activation `gelu` or `quick_gelu`."""
    torch.manual_seed(0)
    shared = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_act": activation}
    text = {"hidden_size": TEXT_WIDTH, "intermediate_size": 4 * TEXT_WIDTH, "vocab_size": VOCABULARY}
    text |= {"max_position_embeddings": MAX_TOKENS, "eos_token_id": END, "bos_token_id": 97, "pad_token_id": 1}
    vision = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "image_size": IMAGE_SIZE, "patch_size": PATCH}
    theirs = CLIPModel(CLIPConfig(text_config=text | shared, vision_config=vision | shared, projection_dim=EMBED))
    shake(theirs)
    trunk = TransformerConfig(WIDTH, 3, 4, activation=activation)  # type: ignore[arg-type]
    text_trunk = TransformerConfig(TEXT_WIDTH, 3, 4, activation=activation)  # type: ignore[arg-type]
    ours = OurCLIPConfig(
        DualTowerConfig(
            ViTConfig(trunk, IMAGE_SIZE, PATCH), TextTransformerConfig(text_trunk, VOCABULARY, MAX_TOKENS), EMBED
        )
    ).build()
    ours.load_state_dict(clip_weights(theirs.state_dict()))
    return theirs.eval(), ours.eval()


def siglip_pair() -> tuple[SiglipModel, SigLIP]:
    """transformers' SigLIP and ours with the same weights."""
    torch.manual_seed(0)
    shared = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": MAX_TOKENS, "bos_token_id": 1, "eos_token_id": 1}
    theirs = SiglipModel(
        SiglipConfig(text_config=text | shared, vision_config={"image_size": IMAGE_SIZE, "patch_size": PATCH} | shared)
    )
    shake(theirs)
    trunk = TransformerConfig(WIDTH, 3, 4, activation="gelu_tanh", norm_eps=1e-6, init="xavier")
    half = (0.5, 0.5, 0.5)
    image = ViTConfig(
        trunk, IMAGE_SIZE, PATCH, class_token=False, patch_bias=True, norm_before=False, mean=half, std=half
    )
    ours = OurSigLIPConfig(image, TextTransformerConfig(trunk, VOCABULARY, MAX_TOKENS, causal=False)).build()
    ours.load_state_dict(siglip_weights(theirs.state_dict()))
    return theirs.eval(), ours.eval()


def shake(model: torch.nn.Module) -> None:
    """Make every weight matter: norms, biases and embeddings start at ones, zeros and small numbers."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def clip_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {
        "logit_scale.log_scale": state["logit_scale"].view(1),
        "towers.image_projection.weight": state["visual_projection.weight"],
        "towers.text_projection.weight": state["text_projection.weight"],
        "towers.image.embedding.class_embedding": state["vision_model.embeddings.class_embedding"],
    }
    out |= tower(state, "vision_model", "towers.image") | tower(state, "text_model", "towers.text")
    out |= norm(state, "vision_model.pre_layrnorm", "towers.image.ln_pre")
    out |= norm(state, "vision_model.post_layernorm", "towers.image.ln_post")
    return out | norm(state, "text_model.final_layer_norm", "towers.text.ln_final")


def siglip_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    head, pooling = "vision_model.head", "image_pooling"
    width = state[f"{head}.attention.in_proj_weight"].shape[1]
    out = {
        "logit_scale.log_scale": state["logit_scale"].view(1),
        "logit_bias.bias": state["logit_bias"].view(1),
        "image.embedding.patch.bias": state["vision_model.embeddings.patch_embedding.bias"],
        f"{pooling}.query": state[f"{head}.probe"].view(1, width),
    }
    for kind in ("weight", "bias"):
        query, rest = state[f"{head}.attention.in_proj_{kind}"].split([width, 2 * width])
        out |= {f"{pooling}.q.{kind}": query, f"{pooling}.kv.{kind}": rest}
        out[f"{pooling}.out.{kind}"] = state[f"{head}.attention.out_proj.{kind}"]
        out[f"{pooling}.mlp_in.{kind}"] = state[f"{head}.mlp.fc1.{kind}"]
        out[f"{pooling}.mlp_out.{kind}"] = state[f"{head}.mlp.fc2.{kind}"]
        out[f"text_projection.{kind}"] = state[f"text_model.head.{kind}"]
    out |= tower(state, "vision_model", "image") | tower(state, "text_model", "text")
    out |= norm(state, f"{head}.layernorm", f"{pooling}.norm")
    out |= norm(state, "vision_model.post_layernorm", "image.ln_post")
    return out | norm(state, "text_model.final_layer_norm", "text.ln_final")


def tower(state: dict[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    """Embeddings and blocks of one tower."""
    out = {f"{ours}.embedding.position_embedding": state[f"{theirs}.embeddings.position_embedding.weight"]}
    if f"{theirs}.embeddings.token_embedding.weight" in state:
        out[f"{ours}.embedding.token_embedding"] = state[f"{theirs}.embeddings.token_embedding.weight"]
    else:
        out[f"{ours}.embedding.patch.weight"] = state[f"{theirs}.embeddings.patch_embedding.weight"].flatten(1)
    for i in range(3):
        block, layer = f"{ours}.trunk.blocks.{i}", f"{theirs}.encoder.layers.{i}"
        out |= norm(state, f"{layer}.layer_norm1", f"{block}.norm_1") | norm(
            state, f"{layer}.layer_norm2", f"{block}.norm_2"
        )
        for kind in ("weight", "bias"):
            parts = [state[f"{layer}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            out[f"{block}.qkv.{kind}"] = torch.cat(parts)
            out[f"{block}.out.{kind}"] = state[f"{layer}.self_attn.out_proj.{kind}"]
            out[f"{block}.mlp_in.{kind}"] = state[f"{layer}.mlp.fc1.{kind}"]
            out[f"{block}.mlp_out.{kind}"] = state[f"{layer}.mlp.fc2.{kind}"]
    return out


def norm(state: dict[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    return {f"{ours}.{kind}": state[f"{theirs}.{kind}"] for kind in ("weight", "bias")}


def bert_weights(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """transformers' BertModel without its pooler."""
    embedding = {"token": "word", "position": "position", "type": "token_type"}
    out = {
        f"embedding.{ours}_embedding": state[f"embeddings.{theirs}_embeddings.weight"]
        for ours, theirs in embedding.items()
    }
    out |= norm(state, "embeddings.LayerNorm", "embedding.norm")
    for i in range(depth):
        block, layer = f"trunk.blocks.{i}", f"encoder.layer.{i}"
        out |= norm(state, f"{layer}.attention.output.LayerNorm", f"{block}.norm_1")
        out |= norm(state, f"{layer}.output.LayerNorm", f"{block}.norm_2")
        for kind in ("weight", "bias"):
            parts = [state[f"{layer}.attention.self.{name}.{kind}"] for name in ("query", "key", "value")]
            out[f"{block}.qkv.{kind}"] = torch.cat(parts)
            out[f"{block}.out.{kind}"] = state[f"{layer}.attention.output.dense.{kind}"]
            out[f"{block}.mlp_in.{kind}"] = state[f"{layer}.intermediate.dense.{kind}"]
            out[f"{block}.mlp_out.{kind}"] = state[f"{layer}.output.dense.{kind}"]
    return out


def masked_word_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' head of BertForMaskedLM, `cls.predictions`, without the decoder that it shares."""
    out = {"bias": state["bias"]} | norm(state, "transform.LayerNorm", "transform.norm")
    return out | {f"transform.dense.{kind}": state[f"transform.dense.{kind}"] for kind in ("weight", "bias")}


def below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The part of a state dict under a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
