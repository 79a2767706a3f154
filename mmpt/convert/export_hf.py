"""`mmpt export --to hf`: a folder that transformers' `from_pretrained` reads: configuration, weights, tokenizer,
and the preparation of images."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import (
    AlignConfig,
    ChineseCLIPConfig,
    CLIPConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    SiglipConfig,
    ViltConfig,
)

from mmpt.convert import hf_align, hf_clip, hf_siglip, hf_vilt
from mmpt.convert.exporting import check_outputs, their_tensors
from mmpt.convert.format import ACTIVATIONS, Format
from mmpt.methods.align import ALIGN
from mmpt.methods.clip import CLIP
from mmpt.methods.filip import FILIP
from mmpt.methods.method import Method
from mmpt.methods.siglip import SigLIP, SigLIPConfig
from mmpt.methods.vilt import ViLT, ViLTConfig
from mmpt.models.bert import BertConfig
from mmpt.models.dual_tower import DualTowerConfig
from mmpt.models.efficientnet import EfficientNetConfig, their_config
from mmpt.models.image import ViTConfig
from mmpt.models.text import TextTransformerConfig
from mmpt.models.transformer import TransformerConfig
from mmpt.recipe import Recipe

THEIR_ACTIVATIONS = {ours: theirs for theirs, ours in ACTIVATIONS.items() if theirs != "gelu_new"}


def export_hf(
    out: Path, recipe: Recipe, method: Method, tokenizer: PreTrainedTokenizerBase, partial: bool
) -> list[str]:
    """Write the folder; returns notes. ValueError where transformers has no class that computes the same."""
    format, configuration, image, notes = their_class(recipe, method, tokenizer)
    theirs, left = their_tensors(format, method, partial)
    preprocessor = preparation(image, type(configuration).__name__)
    check_outputs(format, theirs, recipe, method, configuration.to_dict(), preprocessor)
    out.mkdir(parents=True, exist_ok=True)
    save_file(theirs, out / "model.safetensors", metadata={"format": "pt"})
    configuration.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2))
    return [*notes, *(f"left behind: {name}" for name in left)]


def their_class(
    recipe: Recipe, method: Method, tokenizer: PreTrainedTokenizerBase
) -> tuple[Format, PretrainedConfig, ViTConfig | EfficientNetConfig, list[str]]:
    """(layout, configuration, image tower, notes) of the class that computes what the method computes."""
    ours: Any = recipe.method
    if isinstance(method, CLIP | FILIP) and isinstance(ours.towers.image, ViTConfig):
        return hf_clip.FORMAT, clip_config(ours.towers, tokenizer), ours.towers.image, notes_of(method)
    if isinstance(method, SigLIP):
        return hf_siglip.FORMAT, siglip_config(ours, tokenizer), ours.image, []
    if isinstance(method, ALIGN) and isinstance(ours.towers.image, EfficientNetConfig):
        return hf_align.FORMAT, align_config(ours.towers), ours.towers.image, []
    if isinstance(method, ViLT):
        return hf_vilt.FORMAT, vilt_config(ours), ours.image, notes_of(method)
    raise ValueError(
        f"transformers has no class for {type(method).__name__} with these towers; --to with the name of its authors' "
        "layout writes that"
    )


def notes_of(method: Method) -> list[str]:
    if isinstance(method, ViLT):
        return [
            "for ViltModel, ViltForMaskedLM and ViltForImageAndTextRetrieval (the log odds of a match); transformers "
            "has one epsilon for all norms, here that of the blocks: outputs differ by about 1e-6"
        ]
    if not isinstance(method, FILIP):
        return []
    return [
        "transformers has no FILIP: as CLIPModel it gives [CLS] and the end of text; FILIP's patch vectors are "
        "visual_projection(vision_model.post_layernorm(last_hidden_state[:, 1:])), its word vectors "
        "text_projection(last_hidden_state), both then of length 1"
    ]


def clip_config(towers: DualTowerConfig, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """ValueError where CLIPModel is built otherwise."""
    image, text = towers.image, towers.text
    assert isinstance(image, ViTConfig)
    if not (image.class_token and image.norm_before and image.norm_after) or image.patch_bias:
        raise ValueError("CLIPModel's image tower has [CLS], norms before and after its blocks, and no bias of patches")
    vision = trunk(image.trunk) | {"image_size": image.image_size, "patch_size": image.patch_size}
    shared: dict[str, Any] = {"projection_dim": towers.embed_dim}
    first, *_, end = tokenizer("a").input_ids
    ids = {"bos_token_id": first, "eos_token_id": end}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    if isinstance(text, BertConfig):
        return ChineseCLIPConfig(text_config=bert(text) | {"pad_token_id": pad}, vision_config=vision, **shared)
    if not isinstance(text, TextTransformerConfig) or not text.causal:
        raise ValueError("CLIPModel's text tower is a causal transformer")
    if ids["eos_token_id"] == 2:
        raise ValueError(
            "transformers takes a CLIPModel whose end token has id 2 for an early conversion of OpenAI's, and reads "
            "its texts at their largest id; give the end of a text another id in the tokenizer"
        )
    words = {"vocab_size": text.vocab_size, "max_position_embeddings": text.max_tokens, "pad_token_id": pad}
    return CLIPConfig(text_config=trunk(text.trunk) | words | ids | shared, vision_config=vision | shared, **shared)


def siglip_config(ours: SigLIPConfig, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    image, text = ours.image, ours.text
    vision = trunk(image.trunk) | {"image_size": image.image_size, "patch_size": image.patch_size}
    words = {"vocab_size": text.vocab_size, "max_position_embeddings": text.max_tokens}
    end = tokenizer("a").input_ids[-1]
    words |= {"projection_size": image.width, "bos_token_id": end, "eos_token_id": end}  # which it does not read
    words |= {"pad_token_id": tokenizer.pad_token_id}
    return SiglipConfig(text_config=trunk(text.trunk) | words, vision_config=vision)


def align_config(towers: DualTowerConfig) -> PretrainedConfig:
    """ValueError where AlignModel is built otherwise."""
    image, text = towers.image, towers.text
    assert isinstance(image, EfficientNetConfig)
    if not isinstance(text, BertConfig) or not towers.text_projection_bias:
        raise ValueError("AlignModel's text tower is a BERT, and its projection has a bias")
    theirs = their_config(image)
    names = ("image_size", "width_coefficient", "depth_coefficient", "hidden_dim", "depthwise_padding", "strides",
             "num_block_repeats", "drop_connect_rate")  # fmt: skip
    vision = {name: getattr(theirs, name) for name in names}
    return AlignConfig(text_config=bert(text), vision_config=vision, projection_dim=towers.embed_dim)


def vilt_config(ours: ViLTConfig) -> PretrainedConfig:
    image, text = ours.image, ours.text
    return ViltConfig(
        **trunk(image.trunk), image_size=image.image_size, patch_size=image.patch_size, vocab_size=text.vocab_size,
        max_position_embeddings=text.positions, type_vocab_size=text.types, tie_word_embeddings=False,
        hidden_dropout_prob=text.dropout,
    )  # fmt: skip


def bert(text: BertConfig) -> dict[str, Any]:
    embedding = text.embedding
    return trunk(text.trunk) | {
        "vocab_size": embedding.vocab_size, "max_position_embeddings": embedding.positions,
        "type_vocab_size": embedding.types,
    }  # fmt: skip


def trunk(ours: TransformerConfig) -> dict[str, Any]:
    """What all their configurations call alike."""
    return {
        "hidden_size": ours.width, "intermediate_size": int(ours.width * ours.mlp_ratio),
        "num_hidden_layers": ours.depth, "num_attention_heads": ours.heads,
        "hidden_act": THEIR_ACTIVATIONS[ours.activation], "layer_norm_eps": ours.norm_eps,
    }  # fmt: skip


def preparation(image: ViTConfig | EfficientNetConfig, configuration: str) -> dict[str, Any]:
    """preprocessor_config.json: our evaluation's resize, centre crop and normalisation."""
    side = {"height": image.image_size, "width": image.image_size}
    out = {
        "do_resize": True, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": list(image.mean), "image_std": list(image.std), "do_convert_rgb": True,
    }  # fmt: skip
    if configuration == "ViltConfig":
        assert isinstance(image, ViTConfig)
        longest = {"size": {"shortest_edge": image.image_size}, "size_divisor": image.patch_size, "do_pad": True}
        return out | longest | {"image_processor_type": "ViltImageProcessor"}
    crop = {"size": {"shortest_edge": image.image_size}, "do_center_crop": True, "crop_size": side}
    return out | crop | {"image_processor_type": "CLIPImageProcessor"}
