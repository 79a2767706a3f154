"""`mmpt export --to open_clip`: a folder that open_clip reads as `local-dir:FOLDER`, or from the Hugging Face hub."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from mmpt.convert import open_clip, open_clip_siglip
from mmpt.convert.exporting import check_outputs, their_tensors
from mmpt.convert.format import Format
from mmpt.methods.clip import CLIP
from mmpt.methods.filip import FILIP
from mmpt.methods.method import Method
from mmpt.methods.siglip import SigLIP, SigLIPConfig
from mmpt.models.dual_tower import DualTowerConfig
from mmpt.models.image import SIZES, ViTConfig
from mmpt.models.resnet import ResNetConfig
from mmpt.models.text import TextTransformerConfig
from mmpt.models.transformer import TransformerConfig
from mmpt.recipe import Recipe

CLIP_VOCABULARY = 49408
TIMM_SIZES = {SIZES["B"]: "base", SIZES["L"]: "large"}


def export_open_clip(
    out: Path, recipe: Recipe, method: Method, tokenizer: PreTrainedTokenizerBase, partial: bool
) -> list[str]:
    """Write the folder; returns notes. ValueError where open_clip has no model that computes the same."""
    format, model, pixels, notes = their_model(recipe, method, tokenizer, out)
    configuration = {"model_cfg": model, "preprocess_cfg": pixels}
    theirs, left = their_tensors(format, method, partial)
    check_outputs(format, theirs, recipe, method, configuration, {})
    out.mkdir(parents=True, exist_ok=True)
    save_file(theirs, out / "open_clip_model.safetensors")
    tokenizer.save_pretrained(out)
    (out / "open_clip_config.json").write_text(json.dumps(configuration, indent=2))
    return [*notes, *(f"left behind: {name}" for name in left)]


def their_model(
    recipe: Recipe, method: Method, tokenizer: PreTrainedTokenizerBase, out: Path
) -> tuple[Format, dict[str, Any], dict[str, Any], list[str]]:
    """(layout, model_cfg, preprocess_cfg, notes)."""
    ours: Any = recipe.method
    if isinstance(method, CLIP | FILIP):
        model, image = clip_model(ours.towers, tokenizer, out), ours.towers.image
        note = "open_clip has no FILIP: it gives one vector per image and text, from [CLS] and the end of text"
        return open_clip.FORMAT, model, preparation(image), [note] if isinstance(method, FILIP) else []
    if isinstance(method, SigLIP):
        return open_clip_siglip.FORMAT, siglip_model(ours, out), preparation(ours.image), []
    raise ValueError(f"open_clip has no {type(method).__name__}; it trains dual towers only")


def clip_model(towers: DualTowerConfig, tokenizer: PreTrainedTokenizerBase, out: Path) -> dict[str, Any]:
    """model_cfg of its class CLIP."""
    image, text = towers.image, towers.text
    if not isinstance(text, TextTransformerConfig) or not isinstance(image, ViTConfig | ResNetConfig):
        raise ValueError("open_clip's CLIP has a vision transformer or CLIP's ResNet, and a text transformer")
    quick = text.trunk.activation == "quick_gelu"
    if isinstance(image, ViTConfig):
        if not image.class_token or not image.norm_after or image.patch_bias:
            raise ValueError("open_clip's CLIP has [CLS], a norm after its blocks, and no bias of patches")
        if (image.trunk.activation == "quick_gelu") != quick:
            raise ValueError("open_clip's CLIP has QuickGELU in both towers or in none")
        vision = trunk(image.trunk) | {"patch_size": image.patch_size, "no_ln_pre": not image.norm_before}
        vision |= {"head_width": image.trunk.width // image.trunk.heads}
    else:
        if image.form != "modified" or image.pool != "attention":
            raise ValueError("open_clip's ResNets are CLIP's, modified and with attention pooling")
        vision = {"layers": list(image.depths), "width": image.bottleneck}
    words = trunk(text.trunk) | {"heads": text.trunk.heads, "no_causal_mask": not text.causal}
    words |= {"context_length": text.max_tokens, "vocab_size": text.vocab_size}
    end = tokenizer("a").input_ids[-1]
    if text.vocab_size != CLIP_VOCABULARY or end != CLIP_VOCABULARY - 1:  # not CLIP's tokenizer, which is built in
        words |= {"hf_tokenizer_name": str(out.resolve()), "pool_type": "eos", "eos_id": end}
    return {
        "embed_dim": towers.embed_dim, "quick_gelu": quick, "vision_cfg": {"image_size": image.image_size} | vision,
        "text_cfg": words,
    }  # fmt: skip


def siglip_model(ours: SigLIPConfig, out: Path) -> dict[str, Any]:
    """model_cfg of CustomTextCLIP with timm's tower, which open_clip knows by name only."""
    image, text, blocks = ours.image, ours.text, ours.image.trunk
    size = TIMM_SIZES.get((blocks.width, blocks.depth, blocks.heads))
    if size is None:
        raise ValueError(f"open_clip's SigLIP has timm's towers by name, none of which is {blocks.width} wide")
    vision = {
        "image_size": image.image_size, "timm_model_pretrained": False, "timm_pool": "map", "timm_proj": "none",
        "timm_model_name": f"vit_{size}_patch{image.patch_size}_siglip_{image.image_size}",
    }  # fmt: skip
    words = trunk(text.trunk) | {"heads": text.trunk.heads, "no_causal_mask": True, "proj_bias": True}
    words |= {"context_length": text.max_tokens, "vocab_size": text.vocab_size, "pool_type": "last"}
    words |= {"hf_tokenizer_name": str(out.resolve())}
    return {
        "embed_dim": image.width, "init_logit_bias": ours.initial_bias, "custom_text": True, "vision_cfg": vision,
        "text_cfg": words,
    }  # fmt: skip


def trunk(ours: TransformerConfig) -> dict[str, Any]:
    told: dict[str, Any] = {"width": ours.width, "layers": ours.depth, "mlp_ratio": ours.mlp_ratio}
    if ours.norm_eps != 1e-5:
        told["norm_kwargs"] = {"eps": ours.norm_eps}
    if ours.activation == "gelu_tanh":
        told["act_kwargs"] = {"approximate": "tanh"}
    return told


def preparation(image: ViTConfig | ResNetConfig) -> dict[str, Any]:
    """preprocess_cfg: our evaluation's resize of the shorter side, and centre crop."""
    return {
        "size": image.image_size, "mode": "RGB", "mean": list(image.mean), "std": list(image.std),
        "interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0,
    }  # fmt: skip
