"""Foreign checkpoints, read as the originals name them, against transformers' classes with the same weights.

Captions of mixed length in one batch. For projects that cannot be installed the state dict is a skeleton: every name
and shape that the original creates, filled with the weights of a transformers model that computes the same.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import (
    ChineseCLIPConfig,
    ChineseCLIPModel,
    CLIPModel,
    ViltConfig,
    ViltForMaskedLM,
    ViTModel,
)
from transformers import ViTConfig as TheirViTConfig

from mmpt.batch import Pictures, pack, unpack
from mmpt.convert import formats
from mmpt.convert.importing import take
from mmpt.convert.reading import Source, without_module
from mmpt.data.patches import pack_patches
from mmpt.engine.weights import put, tensors_of
from mmpt.methods.clip import CLIPConfig
from mmpt.methods.filip import FILIPConfig
from mmpt.methods.method import Method
from mmpt.methods.slip import SLIPConfig
from mmpt.methods.vilt import ViLTConfig
from mmpt.models.bert import BertConfig as OurBertConfig
from mmpt.models.bert import BertEmbeddingConfig
from mmpt.models.dual_tower import DualTowerConfig
from mmpt.models.image import CLIP_MEAN, CLIP_STD, ViT, ViTConfig
from mmpt.models.projector import ProjectorConfig
from mmpt.models.text import TextTransformerConfig
from mmpt.models.transformer import TransformerConfig
from tests.convert import skeletons
from tests.models.test_same_as_transformers import captions, images, pixels
from tests.models.weights import (
    EMBED,
    IMAGE_SIZE,
    MAX_TOKENS,
    PATCH,
    TEXT_WIDTH,
    VOCABULARY,
    WIDTH,
    clip_pair,
    shake,
)

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
DEPTH = 3
QUICK = TransformerConfig(WIDTH, DEPTH, 4, activation="quick_gelu")
TEXT = TextTransformerConfig(TransformerConfig(TEXT_WIDTH, DEPTH, 4, activation="quick_gelu"), VOCABULARY, MAX_TOKENS)
IMAGE = ViTConfig(QUICK, IMAGE_SIZE, PATCH)
BERT_TRUNK = TransformerConfig(
    TEXT_WIDTH, DEPTH, 4, norm="post", norm_eps=1e-12, dropout=0.1, attention_dropout=0.1, init="bert"
)
BERT = OurBertConfig(BertEmbeddingConfig(TEXT_WIDTH, VOCABULARY, 24), BERT_TRUNK, MAX_TOKENS)
TIMM = ViTConfig(
    TransformerConfig(WIDTH, DEPTH, 4, norm_eps=1e-6), IMAGE_SIZE, PATCH, patch_bias=True, norm_before=False
)


def read(state: dict[str, Tensor], expected: str, method: Method) -> Method:
    """Into the method in evaluation mode; the format is found by the names and everything is understood."""
    source = Source(Path("skeleton"), state, {}, {})
    format = formats.recognised(source)
    assert format.name == expected
    account = take(source, format, method, tensors_of(method), (), partial=False)
    put(method, account.loaded)
    return method.eval()


def padded(texts: list[Tensor], fill: int = 1) -> tuple[Tensor, Tensor]:
    ids = torch.full((len(texts), MAX_TOKENS), fill, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, text in enumerate(texts):
        ids[i, : len(text)], mask[i, : len(text)] = text, 1
    return ids, mask


def vectors_of(theirs: CLIPModel, texts: list[Tensor], raw: Tensor) -> Any:
    ids, mask = padded(texts)
    return theirs(input_ids=ids, attention_mask=mask, pixel_values=pixels(raw, CLIP_MEAN, CLIP_STD))


def token_vectors(theirs: CLIPModel, out: Any, texts: list[Tensor], before_norm: bool = False) -> tuple[Tensor, Tensor]:
    """Of patches [B, P, E] and of all words [T, E], before they are scaled to length 1."""
    patches = out.vision_model_output.last_hidden_state[:, 1:]
    patches = patches if before_norm else theirs.vision_model.post_layernorm(patches)
    states = out.text_model_output.last_hidden_state
    words = torch.cat([states[i, : len(text)] for i, text in enumerate(texts)])
    return theirs.visual_projection(patches), theirs.text_projection(words)


@pytest.mark.parametrize("origin", ["openai", "open_clip", "open_clip with text."])
@torch.no_grad()
def test_openai_and_open_clip(origin: str) -> None:
    theirs, _ = clip_pair("quick_gelu")
    state = skeletons.openai(theirs.state_dict(), DEPTH)
    if origin != "openai":
        state = {name: value for name, value in state.items() if name not in skeletons.CONSTANTS}
    if origin == "open_clip with text.":
        keep = ("visual.", "logit_scale")
        state = {name if name.startswith(keep) else f"text.{name}": value for name, value in state.items()}
    ours: Any = read(state, origin.split()[0], CLIPConfig(DualTowerConfig(IMAGE, TEXT, EMBED)).build())
    texts, raw = captions(), images(6)
    out = vectors_of(theirs, texts, raw)
    torch.testing.assert_close(ours.encode_image(Pictures(raw)), out.image_embeds, **TOLERANCE)
    torch.testing.assert_close(ours.encode_text(pack(texts)), out.text_embeds, **TOLERANCE)
    torch.testing.assert_close(ours.logit_scale()[0], theirs.logit_scale.exp(), **TOLERANCE)


@torch.no_grad()
def test_wukong_compares_patches_with_zero_valued_pads() -> None:
    """Its own formula: vectors of pads are set to zero and take part in the maximum over a text of full length; the
    other way round, sums over words are divided by how many there are."""
    theirs, _ = clip_pair("quick_gelu")
    state = theirs.state_dict()
    released = skeletons.openai_image(state, DEPTH) | skeletons.openai_text(state, "transformer.", DEPTH)
    released = {name.replace("transformer.transformer.", "transformer."): value for name, value in released.items()}
    released["transformer.text_projection"] = state["text_projection.weight"].T
    config = FILIPConfig(DualTowerConfig(IMAGE, TEXT, EMBED), zero_pads=True)
    ours: Any = read(released, "wukong", config.build())
    texts = [*captions(), torch.arange(2, 2 + MAX_TOKENS)]  # one without any pad
    raw = images(len(texts))
    patches, words = token_vectors(theirs, vectors_of(theirs, texts, raw), texts)
    patches, words = normalize(patches, dim=-1), normalize(words, dim=-1)
    full = torch.zeros(len(texts), MAX_TOKENS, EMBED)
    for i, vectors in enumerate(words.split([len(text) for text in texts])):
        full[i, : len(vectors)] = vectors
    products = torch.einsum("apd,ctd->acpt", patches, full)
    lengths = torch.tensor([len(text) for text in texts])
    i2t, t2i = ours.score(ours.encode_image(Pictures(raw)), ours.encode_text(pack(texts)))
    torch.testing.assert_close(i2t, products.amax(3).mean(2), **TOLERANCE)
    there = torch.arange(MAX_TOKENS) < lengths[:, None]
    torch.testing.assert_close(t2i, (products.amax(2) * there).sum(2) / lengths, **TOLERANCE)
    plain = FILIPConfig(DualTowerConfig(IMAGE, TEXT, EMBED)).build().eval()
    plain.load_state_dict(ours.state_dict())
    without, _ = plain.score(plain.encode_image(Pictures(raw)), plain.encode_text(pack(texts)))
    assert (i2t[:, :-1] - without[:, :-1]).max() > 1e-3, "pads matter"
    torch.testing.assert_close(i2t[:, -1], without[:, -1], **TOLERANCE)


@torch.no_grad()
def test_declip_filip_and_clip() -> None:
    theirs, _ = clip_pair("quick_gelu")
    state = theirs.state_dict()
    torch.manual_seed(3)
    released = skeletons.openai_image(state, DEPTH) | skeletons.openai_text(state, "encode_text.", DEPTH) | {
        "encode_text.text_projection.weight": state["text_projection.weight"],
        "encode_text.text_projection.bias": torch.randn(EMBED),
        "image_mapping.weight": torch.randn(8, WIDTH), "image_mapping.bias": torch.randn(8),
        "text_mapping.weight": torch.randn(8, TEXT_WIDTH), "text_mapping.bias": torch.randn(8),
        "logit_scale": state["logit_scale"].view(1), "logit_scale_dense": torch.tensor(1.5),
    }  # fmt: skip
    texts, raw = captions(), images(6)
    out = vectors_of(theirs, texts, raw)
    towers = DualTowerConfig(
        replace(IMAGE, norm_after=False), TEXT, 8, image_projection_bias=True, text_projection_bias=True
    )
    filip: Any = read(released, "declip", FILIPConfig(towers).build())
    patches = out.vision_model_output.last_hidden_state[:, 1:].flatten(0, 1)  # before the norm
    words = torch.cat([out.text_model_output.last_hidden_state[i, : len(text)] for i, text in enumerate(texts)])
    for found, states, name in ((filip.encode_image(Pictures(raw)).x, patches, "image"),
                                (filip.encode_text(pack(texts)).x, words, "text")):  # fmt: skip
        mapped = states @ released[f"{name}_mapping.weight"].T + released[f"{name}_mapping.bias"]
        torch.testing.assert_close(found, normalize(mapped, dim=-1), **TOLERANCE)
    assert filip.logit_scale.log_scale.item() == 1.5
    clip: Any = read(
        released, "declip", CLIPConfig(DualTowerConfig(IMAGE, TEXT, EMBED, text_projection_bias=True)).build()
    )
    torch.testing.assert_close(clip.encode_image(Pictures(raw)), out.image_embeds, **TOLERANCE)
    ends = torch.stack([out.text_model_output.last_hidden_state[i, len(text) - 1] for i, text in enumerate(texts)])
    pooled = ends @ state["text_projection.weight"].T
    expected = normalize(pooled + released["encode_text.text_projection.bias"], dim=-1)
    torch.testing.assert_close(clip.encode_text(pack(texts)), expected, **TOLERANCE)


def vit_pair() -> ViTModel:
    torch.manual_seed(0)
    theirs = ViTModel(
        TheirViTConfig(
            hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=4, intermediate_size=4 * WIDTH,
            image_size=IMAGE_SIZE, patch_size=PATCH, layer_norm_eps=1e-6,
        ),
        add_pooling_layer=False,
    ).eval()  # fmt: skip
    shake(theirs)
    return theirs


@torch.no_grad()
def test_slip() -> None:
    text, image = clip_pair("quick_gelu")[0], vit_pair()
    torch.manual_seed(4)
    released = skeletons.timm(image.state_dict(), "visual.", DEPTH)
    released |= skeletons.openai_text(text.state_dict(), "", DEPTH) | {
        "image_projection": torch.randn(WIDTH, EMBED), "text_projection": text.state_dict()["text_projection.weight"].T,
        "logit_scale": text.state_dict()["logit_scale"],
    }  # fmt: skip
    width = WIDTH
    for i, out_width in enumerate((20, 20, 6), 1):
        released |= {
            f"image_mlp.layer{i}.weight": torch.randn(out_width, width) * 0.3,
            f"image_mlp.layer{i}.bias": torch.randn(out_width),
        }
        width = out_width
    for i in (1, 2):
        released |= {
            f"image_mlp.bn{i}.{name}": torch.rand(20) + 0.5
            for name in ("weight", "bias", "running_mean", "running_var")
        }
        released[f"image_mlp.bn{i}.num_batches_tracked"] = torch.tensor(7)
    wrapped = {f"module.{name}": value for name, value in released.items()}
    config = SLIPConfig(DualTowerConfig(TIMM, TEXT, EMBED), projector=ProjectorConfig(20, 6))

    ours: Any = read(without_module(wrapped), "slip", config.build())
    texts, raw = captions(), images(6)
    states = image(pixels(raw, TIMM.mean, TIMM.std)).last_hidden_state[:, 0]
    expected = normalize(states @ released["image_projection"], dim=-1)
    torch.testing.assert_close(ours.encode_image(Pictures(raw)), expected, **TOLERANCE)
    torch.testing.assert_close(ours.encode_text(pack(texts)), vectors_of(text, texts, raw).text_embeds, **TOLERANCE)
    x = states
    for i in (1, 2):
        bn = {n: released[f"image_mlp.bn{i}.{n}"] for n in ("weight", "bias", "running_mean", "running_var")}
        x = x @ released[f"image_mlp.layer{i}.weight"].T + released[f"image_mlp.layer{i}.bias"]
        x = torch.nn.functional.batch_norm(x, bn["running_mean"], bn["running_var"], bn["weight"], bn["bias"]).relu()
    x = x @ released["image_mlp.layer3.weight"].T + released["image_mlp.layer3.bias"]
    torch.testing.assert_close(ours.projector(states), x, rtol=1e-4, atol=1e-4)
    read(without_module(wrapped), "slip", CLIPConfig(DualTowerConfig(TIMM, TEXT, EMBED)).build())


@pytest.mark.parametrize("origin", ["hf_vit", "hf_vit before version 5", "timm_vit"])
@torch.no_grad()
def test_vision_transformers(origin: str) -> None:
    """As one part of a model; DeiT's classifier is not needed."""
    theirs = vit_pair()
    state = theirs.state_dict()
    if origin == "timm_vit":
        state = skeletons.timm(state, "", DEPTH) | {"head.weight": torch.randn(10, WIDTH), "head.bias": torch.randn(10)}
    if origin.endswith("5"):
        state = {f"vit.{name}": value for name, value in skeletons.before_version_5(state, DEPTH).items()}
    method: Any = CLIPConfig(DualTowerConfig(TIMM, TEXT, EMBED)).build()
    source = Source(Path("skeleton"), state, {}, {})
    format = formats.recognised(source)
    assert format.name == origin.split()[0]
    account = take(source, format, method, tensors_of(method), ("image",), partial=False)
    put(method, account.loaded)
    assert not account.left and {name.split(".")[1] for name in account.loaded} == {"image"}
    raw = images(3)
    tower = method.towers.image
    assert isinstance(tower, ViT)
    expected = theirs(pixels(raw, TIMM.mean, TIMM.std)).last_hidden_state.flatten(0, 1)
    torch.testing.assert_close(tower.eval()(Pictures(raw)).x, expected, **TOLERANCE)


@pytest.mark.parametrize("origin", ["hf_clip", "chinese_clip"])
@torch.no_grad()
def test_chinese_clip(origin: str) -> None:
    torch.manual_seed(0)
    shared: dict[str, Any] = {"num_hidden_layers": DEPTH, "num_attention_heads": 4}
    text = {"hidden_size": TEXT_WIDTH, "intermediate_size": 4 * TEXT_WIDTH, "vocab_size": VOCABULARY}
    text |= {"max_position_embeddings": 24}
    vision = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "image_size": IMAGE_SIZE, "patch_size": PATCH}
    theirs = ChineseCLIPModel(
        ChineseCLIPConfig(text_config=text | shared, vision_config=vision | shared, projection_dim=EMBED)
    ).eval()
    shake(theirs)
    state = theirs.state_dict()
    if origin == "chinese_clip":
        state = skeletons.openai_image(state, DEPTH) | {
            f"bert.{name.removeprefix('text_model.')}": v for name, v in state.items() if name.startswith("text_model.")
        } | {"text_projection": state["text_projection.weight"].T, "logit_scale": state["logit_scale"]}  # fmt: skip
        state |= {"bert.pooler.dense.weight": torch.randn(3, 3), "bert.pooler.dense.bias": torch.randn(3)}
    ours: Any = read(state, origin, CLIPConfig(DualTowerConfig(IMAGE, BERT, EMBED)).build())
    texts, raw = captions(), images(6)
    ids, mask = padded(texts, fill=0)
    out = theirs(input_ids=ids, attention_mask=mask, pixel_values=pixels(raw, CLIP_MEAN, CLIP_STD))
    torch.testing.assert_close(ours.encode_image(Pictures(raw)), out.image_embeds, **TOLERANCE)
    torch.testing.assert_close(ours.encode_text(pack(texts)), out.text_embeds, **TOLERANCE)


@pytest.mark.parametrize("origin", ["hf_vilt", "vilt"])
@torch.no_grad()
def test_vilt(origin: str) -> None:
    """Each pair alone, since transformers shuffles patches where it pads; ours in one batch, images of any shape."""
    torch.manual_seed(0)
    theirs = ViltForMaskedLM(
        ViltConfig(
            hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=4, intermediate_size=4 * WIDTH,
            image_size=64, patch_size=16, vocab_size=VOCABULARY, max_position_embeddings=MAX_TOKENS,
            tie_word_embeddings=False, layer_norm_eps=1e-6,
        )
    ).eval()  # fmt: skip
    shake(theirs)
    state: dict[str, Tensor] = theirs.state_dict()
    state = state if origin == "hf_vilt" else skeletons.vilt(state, DEPTH)
    state |= {"itm_score.fc.weight": torch.randn(2, WIDTH), "itm_score.fc.bias": torch.randn(2)}
    image = ViTConfig(
        TransformerConfig(WIDTH, DEPTH, 4, norm_eps=1e-6), 64, 16, patch_bias=True, norm_before=False,
        image_resize="shorter_side", longest_side=96, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
    )  # fmt: skip
    words = BertEmbeddingConfig(WIDTH, VOCABULARY, MAX_TOKENS, norm_eps=1e-6)
    ours: Any = read(state, origin, ViLTConfig(image, words, MAX_TOKENS).build())
    texts, shapes = captions(), [(64, 96), (64, 64), (48, 32), (16, 80), (64, 48), (32, 32)]
    generator = torch.Generator().manual_seed(5)
    raw = [torch.randint(0, 256, (3, *shape), dtype=torch.uint8, generator=generator) for shape in shapes]
    patches, places, grids = pack_patches([image.numpy() for image in raw], 16, [None] * len(raw))
    seen = Pictures(patches=patches, places=places, grids=grids)
    joined = ours.fuse(ours.encode_text(pack(texts)), ours.encode_image(seen))
    half = (0.5, 0.5, 0.5)
    for i, sequence in enumerate(unpack(joined.tokens)):
        torch.manual_seed(0)
        one = {"input_ids": texts[i][None], "attention_mask": torch.ones_like(texts[i])[None],
               "pixel_values": pixels(raw[i], half, half)[None]}  # fmt: skip
        out = theirs.vilt(**one)
        length = len(texts[i]) + 1  # words and the image's [CLS]; patches come in random order
        torch.testing.assert_close(sequence[:length], out.last_hidden_state[0, :length], **TOLERANCE)
        torch.testing.assert_close(ours.pooler(sequence[:1]), out.pooler_output, **TOLERANCE)
        guesses = ours.word_head(sequence[: len(texts[i])])
        torch.testing.assert_close(guesses, theirs.mlm_score(out.last_hidden_state[0, : len(texts[i])]), **TOLERANCE)
