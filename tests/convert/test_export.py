"""Exports: `from_pretrained` of what was written gives our outputs; and what cannot be carried is refused in a line."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import (
    AlignModel,
    AutoConfig,
    AutoTokenizer,
    ChineseCLIPModel,
    CLIPModel,
    SiglipModel,
    ViltForImageAndTextRetrieval,
    ViltForMaskedLM,
)

from mmpt import config
from mmpt.batch import Pictures, pack, pack_equal
from mmpt.cli import main
from mmpt.convert import formats
from mmpt.convert.export_hf import clip_config
from mmpt.convert.exporting import their_tensors, write_file
from mmpt.engine.resume import find_checkpoint
from mmpt.engine.weights import load_weights, tensors_of
from mmpt.methods.align import ALIGNConfig
from mmpt.methods.clip import CLIPConfig
from mmpt.methods.filip import FILIPConfig
from mmpt.methods.method import Method, MethodConfig
from mmpt.methods.siglip import SigLIPConfig
from mmpt.methods.vilt import ViLTConfig
from mmpt.models.bert import BertConfig, BertEmbeddingConfig
from mmpt.models.dual_tower import DualTowerConfig
from mmpt.models.efficientnet import EfficientNetConfig
from mmpt.models.image import ViTConfig
from mmpt.models.text import TextTransformerConfig
from mmpt.models.transformer import TransformerConfig
from tests.convert.runs import WORDS, recipe_of, save_run, word_tokenizer
from tests.convert.test_tables import METHODS
from tests.models.test_same_as_transformers import pixels

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
VOCABULARY, MAX_TOKENS, SIDE = len(WORDS), 12, 32
TRUNK = TransformerConfig(32, 2, 4)
IMAGE = ViTConfig(TRUNK, SIDE, 8)
TEXT = TextTransformerConfig(TransformerConfig(24, 2, 4), VOCABULARY, MAX_TOKENS)
CAPTIONS = ["w1 w2 w3", "w4", "w29 w5 w6 w7 w8 w9 w10", "w2 w2"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    word_tokenizer(folder)
    return folder


def method_of(ours: MethodConfig) -> Method:
    torch.manual_seed(0)
    method = ours.build().eval()
    with torch.no_grad():
        for name, value in tensors_of(method).items():
            if value.is_floating_point() and "logit" not in name:
                value.add_(torch.randn_like(value) * 0.1)
    return method


def exported(ours: MethodConfig, tmp_path: Path, tokenizer: Path, to: str = "hf") -> tuple[Any, Path]:
    """Our method, and the folder that the command wrote."""
    method = method_of(ours)
    run = save_run(tmp_path / "run", recipe_of(ours, tokenizer), method)
    assert main(["export", str(run), str(tmp_path / "out"), "--to", to]) == 0
    return method, tmp_path / "out"


def reimported(ours: MethodConfig, out: Path, tmp_path: Path) -> Method:
    """What `mmpt import` makes of the export."""
    recipe = tmp_path / "recipe.yaml"
    config.save_yaml(recipe_of(ours), recipe)
    assert main(["import", str(out), str(tmp_path / "back"), "--as", str(recipe)]) == 0
    method = ours.build().eval()
    checkpoint, manifest, _ = find_checkpoint(tmp_path / "back")
    load_weights(checkpoint, manifest, method)
    return method


def check_same(one: Method, other: Method) -> None:
    assert tensors_of(one).keys() == tensors_of(other).keys()
    for name, value in tensors_of(one).items():
        assert torch.equal(value, tensors_of(other)[name]), name


def raw_images(count: int) -> Tensor:
    shape = (count, 3, SIDE, SIDE)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def encoded(out: Path) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Captions by the tokenizer that was written: as transformers wants them, and as we do."""
    found = AutoTokenizer.from_pretrained(out)(CAPTIONS, padding=True, return_tensors="pt")
    texts = [ids[mask.bool()] for ids, mask in zip(found["input_ids"], found["attention_mask"], strict=True)]
    return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}, texts


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@torch.no_grad()
def test_clip_for_transformers(activation: Any, tmp_path: Path, tokenizer: Path) -> None:
    towers = DualTowerConfig(
        replace(IMAGE, trunk=replace(TRUNK, activation=activation)),
        replace(TEXT, trunk=replace(TEXT.trunk, activation=activation)), 16,
    )  # fmt: skip
    ours, out = exported(CLIPConfig(towers), tmp_path, tokenizer)
    theirs = CLIPModel.from_pretrained(out).eval()
    inputs, texts = encoded(out)
    raw = raw_images(len(texts))
    found = theirs(**inputs, pixel_values=pixels(raw, IMAGE.mean, IMAGE.std), return_loss=True)
    image, text = ours.encode_image(Pictures(raw)), ours.encode_text(pack(texts))
    torch.testing.assert_close(found.image_embeds, image, **TOLERANCE)
    torch.testing.assert_close(found.text_embeds, text, **TOLERANCE)
    torch.testing.assert_close(found.loss, ours.objective(image, text)["contrastive"].sum / len(raw), **TOLERANCE)
    check_same(ours, reimported(CLIPConfig(towers), out, tmp_path))


@torch.no_grad()
def test_filip_for_transformers(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture) -> None:
    """The vectors of patches and words, as the note says how to get them."""
    ours, out = exported(FILIPConfig(DualTowerConfig(IMAGE, TEXT, 16)), tmp_path, tokenizer)
    assert "transformers has no FILIP" in capsys.readouterr().out
    theirs = CLIPModel.from_pretrained(out).eval()
    inputs, texts = encoded(out)
    raw = raw_images(len(texts))
    states = theirs.vision_model(pixels(raw, IMAGE.mean, IMAGE.std)).last_hidden_state[:, 1:]
    patches = normalize(theirs.visual_projection(theirs.vision_model.post_layernorm(states)), dim=-1)
    torch.testing.assert_close(patches.flatten(0, 1), ours.encode_image(Pictures(raw)).x, **TOLERANCE)
    states = theirs.text_model(**inputs).last_hidden_state[inputs["attention_mask"].bool()]
    words = normalize(theirs.text_projection(states), dim=-1)
    torch.testing.assert_close(words, ours.encode_text(pack(texts)).x, **TOLERANCE)


@torch.no_grad()
def test_bert_clip_for_transformers(tmp_path: Path, tokenizer: Path) -> None:
    trunk = TransformerConfig(24, 2, 4, norm="post", norm_eps=1e-12, init="bert")
    text = BertConfig(BertEmbeddingConfig(24, VOCABULARY, 16), trunk, MAX_TOKENS)
    config = CLIPConfig(DualTowerConfig(IMAGE, text, 16))
    ours, out = exported(config, tmp_path, tokenizer)
    theirs = ChineseCLIPModel.from_pretrained(out).eval()
    inputs, texts = encoded(out)
    raw = raw_images(len(texts))
    found = theirs(**inputs, pixel_values=pixels(raw, IMAGE.mean, IMAGE.std))
    torch.testing.assert_close(found.image_embeds, ours.encode_image(Pictures(raw)), **TOLERANCE)
    torch.testing.assert_close(found.text_embeds, ours.encode_text(pack(texts)), **TOLERANCE)
    check_same(ours, reimported(config, out, tmp_path))


@torch.no_grad()
def test_siglip_for_transformers(tmp_path: Path, tokenizer: Path) -> None:
    trunk = TransformerConfig(32, 2, 4, activation="gelu_tanh", norm_eps=1e-6, init="xavier")
    half = (0.5, 0.5, 0.5)
    image = ViTConfig(trunk, SIDE, 8, class_token=False, patch_bias=True, norm_before=False, mean=half, std=half)
    config = SigLIPConfig(image, TextTransformerConfig(trunk, VOCABULARY, MAX_TOKENS, causal=False))
    ours, out = exported(config, tmp_path, tokenizer)
    theirs = SiglipModel.from_pretrained(out).eval()
    raw, ids = raw_images(3), torch.randint(0, VOCABULARY, (3, MAX_TOKENS))
    found = theirs(input_ids=ids, pixel_values=pixels(raw, half, half))
    torch.testing.assert_close(normalize(found.image_embeds, dim=-1), ours.encode_image(Pictures(raw)), **TOLERANCE)
    torch.testing.assert_close(normalize(found.text_embeds, dim=-1), ours.encode_text(pack_equal(ids)), **TOLERANCE)
    check_same(ours, reimported(config, out, tmp_path))


@torch.no_grad()
def test_vilt_for_transformers(tmp_path: Path, tokenizer: Path) -> None:
    """One square image and one text at a time, since transformers shuffles patches wherever it pads."""
    half = (0.5, 0.5, 0.5)
    image = ViTConfig(
        replace(TRUNK, norm_eps=1e-6), SIDE, 8, patch_bias=True, norm_before=False, mean=half, std=half,
        image_resize="shorter_side", longest_side=64,
    )  # fmt: skip
    config = ViLTConfig(image, BertEmbeddingConfig(32, VOCABULARY, MAX_TOKENS, norm_eps=1e-6), MAX_TOKENS)
    ours, out = exported(config, tmp_path, tokenizer)
    words, pairs = (kind.from_pretrained(out).eval() for kind in (ViltForMaskedLM, ViltForImageAndTextRetrieval))
    raw, text = raw_images(1), torch.tensor([2, 7, 8, 9, 3])
    inputs = {"input_ids": text[None], "attention_mask": torch.ones(1, 5), "pixel_values": pixels(raw, half, half)}
    image_tokens, text_tokens = ours.encode_image(Pictures(raw)), ours.encode_text(pack([text]))
    states = ours.fuse(text_tokens, image_tokens).tokens.x
    torch.testing.assert_close(words(**inputs).logits[0], ours.word_head(states[:5]), **TOLERANCE)
    torch.testing.assert_close(pairs(**inputs).logits[0], ours.score_pairs(image_tokens, text_tokens), **TOLERANCE)
    check_same(ours, reimported(config, out, tmp_path))


@torch.no_grad()
def test_align_for_transformers(tmp_path: Path, tokenizer: Path) -> None:
    """At a size whose grids have odd sides: 36, 18, 9, 5 and so on, padded alike on both sides there."""
    trunk = TransformerConfig(24, 2, 4, norm="post", norm_eps=1e-12, init="bert")
    text = BertConfig(BertEmbeddingConfig(24, VOCABULARY, 16), trunk, MAX_TOKENS)
    image = EfficientNetConfig(0.1, 0.3, 36, top=False)
    config = ALIGNConfig(DualTowerConfig(image, text, image.width, project_image=False, text_projection_bias=True))
    ours, out = exported(config, tmp_path, tokenizer)
    theirs = AlignModel.from_pretrained(out).eval()
    inputs, texts = encoded(out)
    raw = torch.randint(0, 256, (4, 3, 36, 36), dtype=torch.uint8)
    found = theirs(**inputs, pixel_values=pixels(raw, image.mean, image.std))
    torch.testing.assert_close(found.image_embeds, ours.encode_image(Pictures(raw)), **TOLERANCE)
    torch.testing.assert_close(found.text_embeds, ours.encode_text(pack(texts)), **TOLERANCE)
    check_same(ours, reimported(config, out, tmp_path))


FILES = {
    "openai": "clip, resnet", "slip": "slip, timm", "albef": "albef local", "vilt": "vilt", "uniter": "uniter mlm",
    "hf_align": "align, efficientnet",
}  # fmt: skip


@pytest.mark.parametrize("to", FILES)
def test_files_hold_what_their_own_code_loads(to: str, tmp_path: Path) -> None:
    """Below the entry that their loader reads; every name that a strict load wants is there."""
    format = formats.named(to)
    method = method_of(METHODS[FILES[to]])
    theirs, left = their_tensors(format, method, partial=False)
    out = tmp_path / "theirs.pt"
    write_file(out, format, theirs)
    data = torch.load(out, weights_only=True)
    data = data[format.wrapper] if format.wrapper else data
    assert data.keys() == theirs.keys() and not left
    extra = {
        "albef": "text_encoder_m.bert.embeddings.position_ids", "slip": "image_mlp.bn1.num_batches_tracked",
        "openai": "visual.layer2.0.downsample.1.num_batches_tracked", "hf_align": "text_model.pooler.dense.weight",
    }  # fmt: skip
    assert to not in extra or extra[to] in data


class EndsWithTwo:
    pad_token_id = 0

    def __call__(self, _: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[1, 5, 2])


def test_an_end_of_text_that_transformers_misreads() -> None:
    with pytest.raises(ValueError, match="whose end token has id 2"):
        clip_config(DualTowerConfig(IMAGE, TEXT, 16), EndsWithTwo())  # type: ignore[arg-type]


def refused(capsys: pytest.CaptureFixture, arguments: list[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert said.startswith("mmpt: error: ") and said.count("\n") == 1, said
    return said


def test_what_cannot_be_carried_is_refused(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture) -> None:
    def saying(name: str, ours: MethodConfig, to: str) -> str:
        run = save_run(tmp_path / name, recipe_of(ours, tokenizer), method_of(ours))
        out = refused(capsys, ["export", str(run), str(tmp_path / f"{name}.out"), "--to", to])
        assert not (tmp_path / f"{name}.out").exists()
        return out

    said = saying("a", CLIPConfig(DualTowerConfig(IMAGE, TEXT, 16)), "openai")
    assert "OpenAI's CLIP code would compute something else: there method.towers.image.trunk.activation is" in said
    no_class = CLIPConfig(DualTowerConfig(replace(IMAGE, class_token=False), TEXT, 16))
    assert "has [CLS]" in saying("b", no_class, "hf")
    assert "has [CLS]" in saying("c", no_class, "open_clip")
    assert "transformers has no class for ALBEF" in saying("d", METHODS["albef local"], "hf")
    assert "open_clip has no UNITER" in saying("e", METHODS["uniter mlm"], "open_clip")
    assert "layout has no place for UNITER" in saying("f", METHODS["uniter mlm"], "albef")
    assert "no place for SLIP" in saying("g", METHODS["slip, timm"], "open_clip_siglip")
    assert "no place for 14 tensors of SLIP: projector.linear_1.bias" in saying("h", METHODS["slip, timm"], "hf_clip")
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").touch()
    assert "is there already" in refused(capsys, ["export", str(tmp_path / "a"), str(tmp_path / "there"), "--to", "hf"])
    assert "no recipe.yaml" in refused(capsys, ["export", str(tmp_path), str(tmp_path / "x"), "--to", "hf"])
    said = refused(
        capsys,
        ["export", str(tmp_path / "a"), str(tmp_path / "x"), "--to", "hf", "--tokenizer", str(tmp_path / "none")],
    )
    assert "no tokenizer at" in said


def test_configuration_is_read_by_auto_classes(tmp_path: Path, tokenizer: Path) -> None:
    _, out = exported(CLIPConfig(DualTowerConfig(IMAGE, TEXT, 16)), tmp_path, tokenizer)
    found = AutoConfig.from_pretrained(out)
    assert (found.model_type, found.text_config.eos_token_id, found.vision_config.patch_size) == ("clip", 3, 8)
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    prepare = CLIPImageProcessorPil.from_pretrained(out)
    assert prepare.crop_size["height"] == SIDE and tuple(prepare.image_mean) == pytest.approx(IMAGE.mean)
