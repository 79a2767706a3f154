"""OpenAI's CLIP (github.com/openai/CLIP): the names that open_clip and many others took over.

Its blocks use QuickGELU, its heads are 64 wide, and projections are stored transposed. The released .pt files are
TorchScript programs, of which only the state dict is read.
"""

from typing import Any

from mmpt.convert import clip_resnet
from mmpt.convert.format import Format, fields, heads_of
from mmpt.convert.positions import OPEN_CLIP
from mmpt.convert.reading import Source
from mmpt.convert.rules import PATCHES, SCALAR, TRANSPOSED, Rule, at, pair, rule, under
from mmpt.methods.method import Method
from mmpt.models.dual_tower import DualTower
from mmpt.models.image import CLIP_MEAN, CLIP_STD, ViT
from mmpt.models.logit_scale import LogitScale
from mmpt.models.resnet import ResNet
from mmpt.models.text import TextTransformer

BLOCK = (
    *pair("ln_1", "norm_1"),
    *rule("attn.in_proj_weight", "qkv.weight"),
    *rule("attn.in_proj_bias", "qkv.bias"),
    *pair("attn.out_proj", "out"),
    *pair("ln_2", "norm_2"),
    *pair("mlp.c_fc", "mlp_in"),
    *pair("mlp.c_proj", "mlp_out"),
)
BLOCKS = under(BLOCK, "transformer.resblocks.{n}.", "trunk.blocks.{n}.")
IMAGE = (
    *rule("conv1.weight", "embedding.patch.weight", PATCHES),
    *rule("class_embedding", "embedding.class_embedding"),
    *rule("positional_embedding", "embedding.position_embedding", resize="grid"),
    *pair("ln_pre", "ln_pre"),
    *BLOCKS,
    *pair("ln_post", "ln_post"),
)
TEXT = (
    *rule("token_embedding.weight", "embedding.token_embedding"),
    *rule("positional_embedding", "embedding.position_embedding", resize="rows"),
    *BLOCKS,
    *pair("ln_final", "ln_final"),
)
IMAGE_PROJECTION = rule("visual.proj", "image_projection.weight", TRANSPOSED)
TEXT_PROJECTION = rule("text_projection", "text_projection.weight", TRANSPOSED)
SCALE = rule("logit_scale", "log_scale", SCALAR)


def rules(method: Method) -> tuple[Rule, ...]:
    return (
        *at(method, ViT, IMAGE, "visual."),
        *clip_resnet.rules(method, "visual."),
        *at(method, TextTransformer, TEXT),
        *at(method, DualTower, (*IMAGE_PROJECTION, *TEXT_PROJECTION)),
        *at(method, LogitScale, SCALE),
    )


def image_settings(source: Source, method: Method) -> dict[str, Any]:
    """Of an image tower in OpenAI's names and activation."""
    pixels = {"mean": CLIP_MEAN, "std": CLIP_STD}
    if "visual.class_embedding" not in source.tensors:
        return fields(method, ResNet, pixels | {"form": "modified", "pool": "attention"})
    width = len(source.tensors["visual.class_embedding"])
    blocks = {"trunk.activation": "quick_gelu", "trunk.norm_eps": 1e-5} | heads_of(width)
    return fields(method, ViT, blocks | pixels | {"norm_before": True, "patch_bias": False})


def text_settings(method: Method, width: int) -> dict[str, Any]:
    known = {"trunk.activation": "quick_gelu", "trunk.norm_eps": 1e-5, "causal": True}
    return fields(method, TextTransformer, known | heads_of(width))


def settings(source: Source, method: Method) -> dict[str, Any]:
    return image_settings(source, method) | text_settings(method, len(source.tensors["ln_final.weight"]))


FORMAT = Format(
    name="openai",
    title="OpenAI's CLIP",
    recognises=lambda source: {"input_resolution", "visual.conv1.weight", "ln_final.weight"} <= source.tensors.keys(),
    rules=rules,
    stretch=OPEN_CLIP,
    settings=settings,
    unneeded=rf"input_resolution|context_length|vocab_size|{clip_resnet.UNNEEDED}",
)
