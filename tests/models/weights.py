"""transformers' CLIP and SigLIP, small and random, and their weights under our names: the oracle of the towers."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from mmpt.convert import hf_bert, hf_clip, hf_siglip
from mmpt.convert.format import Format
from mmpt.convert.importing import take
from mmpt.convert.reading import Source
from mmpt.convert.rules import Rule, matches
from mmpt.engine.weights import put, tensors_of
from mmpt.methods.clip import CLIP
from mmpt.methods.clip import CLIPConfig as OurCLIPConfig
from mmpt.methods.method import Method
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
    give(ours, theirs.state_dict(), hf_clip.FORMAT)
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
    give(ours, theirs.state_dict(), hf_siglip.FORMAT)
    return theirs.eval(), ours.eval()


def shake(model: torch.nn.Module) -> None:
    """Make every weight matter: norms, biases and embeddings start at ones, zeros and small numbers."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def give(method: Method, state: dict[str, Tensor], format: Format) -> None:
    """A foreign state dict's weights into our method, all of them on both sides."""
    put(method, take(Source(Path("state"), state, {}, {}), format, method, tensors_of(method), (), False).loaded)


def bert_weights(state: dict[str, Tensor], ours: nn.Module) -> dict[str, Tensor]:
    """What belongs to transformers' BertModel without its pooler, as ours is named."""
    return renamed(hf_bert.rules(ours), state, ours)  # type: ignore[arg-type]


def masked_word_weights(state: dict[str, Tensor], ours: nn.Module) -> dict[str, Tensor]:
    """transformers' head of BertForMaskedLM, below `cls.predictions.`, without the decoder that it shares."""
    return renamed(hf_bert.WORD_HEAD, state, ours)


def renamed(rules: Iterable[Rule], state: dict[str, Tensor], ours: nn.Module) -> dict[str, Tensor]:
    """Of a foreign state dict (of weights, of gradients), what the rules give to each of our tensors."""
    return {
        match.ours: match.rule.via.to_ours([state[name] for name in match.theirs])
        for match in matches(rules, ours.state_dict())
    }


def below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The part of a state dict under a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
