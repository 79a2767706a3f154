"""ALBEF.pth, uniter-base.pt, ALIGN and the beginnings of ALBEF and UNITER, against transformers' classes with the same
weights; texts of mixed length in one batch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import (
    AlignConfig,
    AlignModel,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BlipTextConfig,
    BlipTextModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaModel,
    ViTModel,
)

from mmpt.batch import Pictures, Regions, Tokens, pack, unpack
from mmpt.convert import formats, reading
from mmpt.convert.exporting import their_tensors
from mmpt.convert.importing import take
from mmpt.convert.positions import DEIT, OPEN_CLIP, VILT, stretched_grid
from mmpt.convert.reading import Source
from mmpt.engine.weights import put, tensors_of
from mmpt.methods.albef import ALBEFConfig
from mmpt.methods.align import ALIGNConfig
from mmpt.methods.meter import METERConfig
from mmpt.methods.method import Method
from mmpt.methods.uniter import UNITERConfig
from mmpt.models.bert import BertConfig as OurBertConfig
from mmpt.models.bert import BertEmbeddingConfig
from mmpt.models.dual_tower import DualTowerConfig
from mmpt.models.efficientnet import EfficientNetConfig
from mmpt.models.fusion import FusionConfig
from mmpt.models.regions import RegionEmbeddingConfig
from mmpt.models.transformer import TransformerConfig
from mmpt.recipe import load
from tests.convert import skeletons
from tests.convert.test_same_outputs import DEPTH, TIMM, TOLERANCE, padded, read, vit_pair
from tests.models.test_same_as_transformers import captions, images, pixels
from tests.models.weights import EMBED, MAX_TOKENS, VOCABULARY, WIDTH, below, shake

POSITIONS, LOWER, UPPER, QUEUE = 24, 2, 3, 8
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH, "num_attention_heads": 4, "intermediate_size": 4 * WIDTH, "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
}  # fmt: skip
EMBEDDING = BertEmbeddingConfig(WIDTH, VOCABULARY, POSITIONS)


def post(depth: int) -> TransformerConfig:
    return TransformerConfig(WIDTH, depth, 4, norm="post", norm_eps=1e-12, init="bert")


class ALBEFParts(nn.Module):
    """What computes the same as ALBEF's encoders."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.image = vit_pair()
        shake(self.image)
        self.lower = BertModel(BertConfig(num_hidden_layers=LOWER, **SIZES), add_pooling_layer=False)
        upper = BlipTextConfig(num_hidden_layers=UPPER, encoder_hidden_size=WIDTH, is_decoder=True, **SIZES)
        self.upper = BlipTextModel(upper, add_pooling_layer=False)
        self.words = BertForMaskedLM(BertConfig(num_hidden_layers=1, **SIZES))
        self.vision_proj, self.text_proj = nn.Linear(WIDTH, EMBED), nn.Linear(WIDTH, EMBED)
        for part in (self.lower, self.upper, self.words):
            shake(part)
        self.words.bert.embeddings.word_embeddings.weight = self.lower.embeddings.word_embeddings.weight
        self.words.cls.predictions.decoder.weight = self.lower.embeddings.word_embeddings.weight
        self.eval()

    def state(self, copy: str) -> dict[str, Tensor]:
        head = below(self.words.cls.predictions.state_dict(), "")
        head = {name: value for name, value in head.items() if not name.startswith("decoder")}
        out = skeletons.timm(self.image.state_dict(), f"visual_encoder{copy}.", DEPTH)
        out |= skeletons.albef_text(self.lower.state_dict(), self.upper.state_dict(), head, LOWER, copy)
        for name in ("vision_proj", "text_proj"):
            skeletons.put(out, f"{name}{copy}", self.state_dict(), name)
        return out

    def read(self, texts: list[Tensor], raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Image tokens [B, 1 + P, D], text tokens and fused tokens [B, L, D]."""
        ids, mask = padded(texts, fill=0)
        image = self.image(pixels(raw, TIMM.mean, TIMM.std)).last_hidden_state
        text = self.lower(input_ids=ids, attention_mask=mask).last_hidden_state
        fused = self.upper(
            encoder_embeds=text, attention_mask=mask, encoder_hidden_states=image, is_decoder=False,
            encoder_attention_mask=torch.ones(image.shape[:2]),
        ).last_hidden_state  # fmt: skip
        return image, text, fused


def as_packed(texts: list[Tensor], states: Tensor) -> Tensor:
    return torch.cat([states[i, : len(text)] for i, text in enumerate(texts)])


def check_encoders(encoders: Any, parts: ALBEFParts) -> None:
    texts, raw = captions(), images(6)
    image, text, fused = parts.read(texts, raw)
    our_image, our_text = encoders.image(Pictures(raw)), encoders.text(pack(texts))
    torch.testing.assert_close(our_image.x, image.flatten(0, 1), **TOLERANCE)
    torch.testing.assert_close(our_text.x, as_packed(texts, text), **TOLERANCE)
    our_fused = encoders.fusion(our_text, our_image)
    torch.testing.assert_close(our_fused.x, as_packed(texts, fused), **TOLERANCE)
    for found, proj, states in ((encoders.image_vector(our_image), parts.vision_proj, image),
                                (encoders.text_vector(our_text), parts.text_proj, text)):  # fmt: skip
        torch.testing.assert_close(found, normalize(proj(states[:, 0]), dim=-1), **TOLERANCE)
    torch.testing.assert_close(encoders.word_head(our_fused.x), parts.words.cls(our_fused.x), rtol=1e-4, atol=1e-4)


def albef_config() -> ALBEFConfig:
    text = OurBertConfig(EMBEDDING, post(LOWER), MAX_TOKENS)
    return ALBEFConfig(TIMM, text, FusionConfig(post(UPPER), WIDTH), EMBED, queue=QUEUE)


@torch.no_grad()
def test_albef_with_its_momentum_copy_and_queues() -> None:
    student, teacher = ALBEFParts(0), ALBEFParts(1)
    queues = {f"{name}_queue": torch.randn(EMBED, QUEUE) for name in ("image", "text")}
    released = student.state("") | teacher.state("_m") | queues | {
        "itm_head.weight": torch.randn(2, WIDTH), "itm_head.bias": torch.randn(2), "temp": torch.tensor(0.05),
        "queue_ptr": torch.tensor([4]),
    }  # fmt: skip
    ours: Any = read(released, "albef", albef_config().build())
    check_encoders(ours.encoders, student)
    check_encoders(ours.teacher.eval(), teacher)
    torch.testing.assert_close(ours.image_queue, queues["image_queue"].T)
    assert ours.queue_next.item() == 4 and ours.temperature().item() == pytest.approx(20.0)
    texts, raw = captions(), images(6)
    _, _, fused = student.read(texts, raw)
    logits = fused[:, 0] @ released["itm_head.weight"].T + released["itm_head.bias"]
    scores = ours.score_pairs(ours.encode_image(Pictures(raw)), ours.encode_text(pack(texts)))
    torch.testing.assert_close(scores, logits[:, 1] - logits[:, 0], rtol=1e-4, atol=1e-4)
    back, left = their_tensors(formats.named("albef"), ours, partial=False)
    assert not left and back.keys() == released.keys()
    for name, value in released.items():
        assert torch.equal(back[name], value.reshape(back[name].shape)), name


@torch.no_grad()
def test_an_untied_decoder_is_refused() -> None:
    student = ALBEFParts(0)
    released = student.state("") | student.state("_m")
    name = "text_encoder.cls.predictions.decoder.weight"
    released[name] = released[name] + 1
    with pytest.raises(ValueError, match="has them tied"):
        read(released, "albef", albef_config().build())


@torch.no_grad()
def test_albef_begins_with_deit_and_bert() -> None:
    """Two sources, each for parts of the model; BERT's upper half goes to the fusion encoder, whose cross-attention
    keeps its initial values."""
    torch.manual_seed(0)
    bert = BertForMaskedLM(BertConfig(num_hidden_layers=LOWER + UPPER, **SIZES)).eval()
    shake(bert)
    method: Any = albef_config().build()
    before = {name: value.clone() for name, value in tensors_of(method).items()}
    source = Source(Path("bert"), dict(bert.state_dict()), {}, {})
    format = formats.recognised(source)
    with pytest.raises(ValueError, match=r"lacks .* of .* tensors in fusion of the model: .*cross_"):
        take(source, format, method, before, ("fusion",), partial=False)
    account = take(source, format, method, before, ("text", "fusion", "word_head"), partial=True)
    put(method, account.loaded)
    assert account.missing and all("cross" in name for name in account.missing)
    copied = {name for name in account.loaded if name.startswith("teacher:")}
    assert 2 * len(copied) == len(account.loaded), "the copy begins as what it copies"
    for name in copied:
        assert torch.equal(account.loaded[name], account.loaded[name.replace("teacher:", "encoders.")])
    for name, value in tensors_of(method).items():
        assert name in account.loaded or torch.equal(value, before[name])
    texts = captions()
    ids, mask = padded(texts, fill=0)
    states = bert(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    found = method.eval().encode_text(pack(texts))
    torch.testing.assert_close(found.x, as_packed(texts, states[LOWER]), **TOLERANCE)
    first = method.encoders.fusion.blocks[0]
    x = first.norm_1(found.x + first._attend(found.x, found))  # without cross-attention it is BERT's next layer
    x = first.norm_2(x + first._mlp(x))
    torch.testing.assert_close(x, as_packed(texts, states[LOWER + 1]), **TOLERANCE)


def our_uniter() -> UNITERConfig:
    return UNITERConfig(post(DEPTH), EMBEDDING, RegionEmbeddingConfig(WIDTH, 10, 7), MAX_TOKENS)


def seen_regions(counts: tuple[int, ...]) -> Pictures:
    generator = torch.Generator().manual_seed(7)
    features = pack([torch.randn(n, 10, generator=generator) for n in counts])
    boxes = torch.rand(sum(counts), 7, generator=generator)
    return Pictures(regions=Regions(features, boxes, torch.zeros(sum(counts), 7)))


@pytest.mark.parametrize("old_names", [False, True])
@torch.no_grad()
def test_uniter(old_names: bool) -> None:
    """Embeddings of regions by the published formula; then transformers' BERT over words and regions, padded."""
    torch.manual_seed(0)
    bert = BertForMaskedLM(BertConfig(num_hidden_layers=DEPTH, **SIZES)).eval()
    pooled = BertModel(BertConfig(num_hidden_layers=1, **SIZES))
    shake(bert), shake(pooled)
    state = bert.state_dict()
    released = {name.replace("bert.", "uniter.", 1): v for name, v in state.items() if name.startswith("bert.")}
    released |= {
        name: v for name, v in state.items() if name.startswith("cls.") and name != "cls.predictions.decoder.bias"
    }
    skeletons.put(released, "uniter.pooler.dense", pooled.state_dict(), "pooler.dense")
    image = "uniter.img_embeddings."
    for name, (wide, narrow) in {
        f"{image}img_linear": (WIDTH, 10), f"{image}pos_linear": (WIDTH, 7), "feat_regress.net.0": (WIDTH, WIDTH),
        "region_classifier.net.0": (WIDTH, WIDTH), "region_classifier.net.3": (7, WIDTH), "itm_output": (2, WIDTH),
    }.items():  # fmt: skip
        released |= {f"{name}.weight": torch.randn(wide, narrow) * 0.3, f"{name}.bias": torch.randn(wide)}
    for name in ("img_layer_norm", "pos_layer_norm", "LayerNorm"):
        released |= {f"{image}{name}.weight": torch.rand(WIDTH) + 0.5, f"{image}{name}.bias": torch.randn(WIDTH)}
    for name in ("feat_regress.net.2", "region_classifier.net.2"):
        released |= {f"{name}.weight": torch.rand(WIDTH) + 0.5, f"{name}.bias": torch.randn(WIDTH)}
    released["feat_regress.bias"] = torch.randn(10)
    released["feat_regress.weight"] = released[f"{image}img_linear.weight"]
    released[f"{image}mask_embedding.weight"] = torch.stack([torch.zeros(10), torch.randn(10)])
    w = dict(released)
    if old_names:
        norms = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        for new, old in norms.items():
            released = {name.replace(new, old): value for name, value in released.items()}
    ours: Any = read(released, "uniter", our_uniter().build())

    texts, counts = captions(), (4, 1, 3, 2, 5, 2)
    seen = seen_regions(counts)
    assert seen.regions is not None
    features, boxes = seen.regions.features, seen.regions.boxes
    masked = torch.rand(sum(counts), generator=torch.Generator().manual_seed(8)) < 0.4
    zeroed = (
        torch.where(masked[:, None], torch.zeros(10), features.x) + w[f"{image}mask_embedding.weight"][masked.long()]
    )

    def norm(x: Tensor, name: str) -> Tensor:
        return nn.functional.layer_norm(x, (WIDTH,), w[f"{image}{name}.weight"], w[f"{image}{name}.bias"], 1e-12)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{image}{name}.weight"].T + w[f"{image}{name}.bias"]

    types = w["uniter.embeddings.token_type_embeddings.weight"][1]
    places = norm(linear(boxes, "pos_linear"), "pos_layer_norm")
    regions = norm(norm(linear(zeroed, "img_linear"), "img_layer_norm") + places + types, "LayerNorm")
    torch.testing.assert_close(ours.encode_image(seen, masked).x, regions, **TOLERANCE)
    joined = ours.fuse(ours.encode_text(pack(texts)), ours.encode_image(seen, masked))
    for found, text, own in zip(unpack(joined.tokens), texts, regions.split(counts), strict=True):
        words = bert.bert.embeddings(input_ids=text[None])
        expected = bert.bert.encoder(torch.cat([words, own[None]], dim=1)).last_hidden_state[0]
        torch.testing.assert_close(found, expected, **TOLERANCE)
        torch.testing.assert_close(ours.word_head(found), bert.cls(found), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.pooler(found[:1]), pooled.pooler(found[None]), **TOLERANCE)
    x = joined.tokens.x
    hidden = nn.functional.gelu(x @ w["feat_regress.net.0.weight"].T + w["feat_regress.net.0.bias"])
    hidden = nn.functional.layer_norm(
        hidden, (WIDTH,), w["feat_regress.net.2.weight"], w["feat_regress.net.2.bias"], 1e-12
    )
    expected = hidden @ w["feat_regress.weight"] + w["feat_regress.bias"]
    torch.testing.assert_close(ours.feature_head(x), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_uniter_begins_with_bert() -> None:
    torch.manual_seed(0)
    bert = BertForMaskedLM(BertConfig(num_hidden_layers=DEPTH, **SIZES)).eval()
    shake(bert)
    method: Any = our_uniter().build().eval()
    source = Source(Path("bert"), dict(bert.state_dict()), {}, {})
    parts = ("text", "trunk", "word_head")
    account = take(source, formats.recognised(source), method, tensors_of(method), parts, partial=False)
    put(method, account.loaded)
    texts = captions()
    ids, mask = padded(texts, fill=0)
    words = method.trunk(method.encode_text(pack(texts)))
    assert isinstance(words, Tokens)
    torch.testing.assert_close(
        method.word_head(words.x), as_packed(texts, bert(ids, attention_mask=mask).logits), **TOLERANCE
    )


@torch.no_grad()
def test_align() -> None:
    torch.manual_seed(0)
    vision = {"image_size": 33, "width_coefficient": 0.2, "depth_coefficient": 0.3, "hidden_dim": 64}
    theirs = AlignModel(
        AlignConfig(text_config=SIZES | {"num_hidden_layers": DEPTH}, vision_config=vision, projection_dim=64)
    ).eval()
    for name, value in theirs.state_dict().items():  # so that something passes through
        if "norm" in name or "_bn" in name or "running" in name:
            value.copy_(torch.rand_like(value, dtype=torch.float32) + 0.5)
        elif "vision_model" in name and value.ndim == 4:
            value.copy_(torch.randn_like(value) * (2 / value[0].numel()) ** 0.5)
    shake(theirs.text_model)
    image = EfficientNetConfig(0.2, 0.3, 33, top=False, padding="even")
    text = OurBertConfig(EMBEDDING, post(DEPTH), MAX_TOKENS)
    towers = DualTowerConfig(image, text, 64, project_image=False, text_projection_bias=True)
    ours: Any = read(dict(theirs.state_dict()), "hf_align", ALIGNConfig(towers).build())
    texts, raw = captions(), torch.randint(0, 256, (6, 3, 33, 33), dtype=torch.uint8)
    ids, mask = padded(texts, fill=0)
    out = theirs(input_ids=ids, attention_mask=mask, pixel_values=pixels(raw, image.mean, image.std))
    torch.testing.assert_close(ours.encode_image(Pictures(raw)), out.image_embeds, **TOLERANCE)
    torch.testing.assert_close(ours.encode_text(pack(texts)), out.text_embeds, **TOLERANCE)
    torch.testing.assert_close(ours.temperature()[0], 1 / theirs.temperature, **TOLERANCE)


@torch.no_grad()
def test_positions_are_stretched_as_their_own_code_does() -> None:
    """transformers' ViT for DeiT and ALBEF; scipy for SigLIP; torch's antialiased bicubic for open_clip; ViLT's by its
    published formula."""
    from scipy.ndimage import zoom

    theirs: ViTModel = vit_pair()
    positions = theirs.embeddings.position_embeddings[0]  # [1 + 9, D]
    for side in (2, 5):
        raw = torch.zeros(1, 1 + side * side, WIDTH)
        expected = theirs.embeddings.interpolate_pos_encoding(raw, side * 16, side * 16)[0]
        torch.testing.assert_close(stretched_grid(positions, 1 + side * side, DEIT), expected)
        grid = positions[1:].view(3, 3, WIDTH).numpy()
        smooth = torch.from_numpy(zoom(grid, (side / 3, side / 3, 1), order=1)).flatten(0, 1)
        torch.testing.assert_close(stretched_grid(positions[1:], side * side, VILT), smooth)
        antialiased = nn.functional.interpolate(
            positions[1:].T.view(1, WIDTH, 3, 3), (side, side), mode="bicubic", antialias=True
        )
        found = stretched_grid(positions, 1 + side * side, OPEN_CLIP)
        torch.testing.assert_close(found[1:], antialiased[0].flatten(1).T)
        assert torch.equal(found[0], positions[0]), "[CLS] stays"
    with pytest.raises(ValueError, match="198 positions cannot be stretched to 197"):
        stretched_grid(torch.zeros(198, 4), 197, DEIT)  # DeiT's distilled models


PUBLISHED_TENSORS = {
    "albef": ("albef.base", 844), "uniter": ("uniter.base", 230), "openai": ("clip.vit_b32", 302),
    "hf_clip": ("clip.vit_b32", 398),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED_TENSORS)
def test_published_sizes_have_as_many_tensors(name: str) -> None:
    recipe, expected = PUBLISHED_TENSORS[name]
    with torch.device("meta"):
        method: Method = load(recipe).method.build()
        theirs, left = their_tensors_on_meta(name, method)
    assert not left and len(theirs) == expected


def their_tensors_on_meta(name: str, method: Method) -> tuple[dict[str, Tensor], list[str]]:
    from mmpt.convert.rules import exported

    format = formats.named(name)
    theirs, left = exported(format.rules(method), tensors_of(method))
    names = dict.fromkeys([n for n, other in format.repeats if other in theirs]) | format.extras(method)
    return theirs | names, [n for n in left if n != "steps"]


@torch.no_grad()
@pytest.mark.parametrize("saved", ["alone", "with its head", "tensors alone"])
def test_meter_begins_with_roberta(saved: str, tmp_path: Path) -> None:
    """Its positions begin two rows further on than BERT's; the file says which of the two it is."""
    config = RobertaConfig(
        num_hidden_layers=DEPTH, type_vocab_size=1, layer_norm_eps=1e-5, bos_token_id=0, eos_token_id=2, **SIZES
    )
    torch.manual_seed(0)
    kind = RobertaForMaskedLM if saved == "with its head" else RobertaModel
    theirs = kind(config).eval()
    shake(theirs)
    if saved == "tensors alone":
        torch.save(theirs.state_dict(), tmp_path / "roberta.pt")
        source = reading.read(tmp_path / "roberta.pt")
    else:
        theirs.save_pretrained(tmp_path / "roberta")
        source = reading.read(tmp_path / "roberta")
    words = BertEmbeddingConfig(WIDTH, VOCABULARY, POSITIONS - 2, types=1, norm_eps=1e-5)
    trunk = replace(post(DEPTH), norm_eps=1e-5)
    method: Any = METERConfig(albef_config().image, OurBertConfig(words, trunk, POSITIONS - 2), post(1)).build()
    format = formats.recognised(source)
    assert format.name == "hf_roberta"
    put(method, take(source, format, method, tensors_of(method), ("text",), partial=False).loaded)
    if saved != "tensors alone":
        told = format.settings(source, method)
        assert told["method.text.embedding.norm_eps"] == 1e-5 and told["method.text.trunk.heads"] == 4
        with pytest.raises(ValueError, match="its pad has id 0"):
            format.settings(Source(source.path, {}, {"pad_token_id": 0}, {}), method)
    texts = captions()
    ids, mask = padded(texts, fill=1)
    encoder = theirs.roberta if isinstance(theirs, RobertaForMaskedLM) else theirs
    expected = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(method.eval().text(pack(texts)).x, as_packed(texts, expected), **TOLERANCE)
