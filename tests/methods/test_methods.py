"""What every method keeps to: published sizes, initialised parameters, counts, dispatch, and the sum of terms."""

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from mmpt import dist
from mmpt.batch import Tokens, concatenate
from mmpt.methods import siglip
from mmpt.methods.clip import CLIPConfig as OurCLIPConfig
from mmpt.methods.filip import FILIPConfig
from mmpt.methods.method import Method, Term, loss_of
from mmpt.models.dual_tower import DualTowerConfig
from mmpt.models.image import vit
from mmpt.models.text import TextTransformerConfig
from mmpt.models.transformer import TransformerConfig
from mmpt.ops.contrast.loss import ContrastConfig
from tests.methods.tiny import CONFIGS, FUSION, TOWERS, batch, build
from tests.ranks import run


def towers(size: str, patch: int, text_width: int, embed_dim: int) -> DualTowerConfig:
    text = TransformerConfig(text_width, 12, text_width // 64, activation="quick_gelu")
    return DualTowerConfig(vit(size, patch, "quick_gelu"), TextTransformerConfig(text), embed_dim)  # type: ignore[arg-type]


def parameters(method: torch.nn.Module) -> int:
    return sum(p.numel() for p in method.parameters())


PUBLISHED = {"B/32": ("B", 32, 512, 512), "B/16": ("B", 16, 512, 512), "L/14": ("L", 14, 768, 768)}
COUNTS = {"B/32": 151_277_313, "B/16": 149_620_737, "L/14": 427_616_513}


@pytest.mark.parametrize("name", PUBLISHED)
def test_clip_has_the_published_parameters(name: str) -> None:
    size, patch, text_width, embed_dim = PUBLISHED[name]
    vision = {"patch_size": patch}
    if size == "L":
        vision |= {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    text = {"hidden_size": text_width, "intermediate_size": 4 * text_width, "num_attention_heads": text_width // 64}
    with torch.device("meta"):
        ours = OurCLIPConfig(towers(size, patch, text_width, embed_dim)).build()
        theirs = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=embed_dim))
    assert parameters(ours) == parameters(theirs) == COUNTS[name]


@pytest.mark.parametrize(("name", "expected"), [("B/32", 150_949_633), ("L/14", 426_699_009)])
def test_filip_differs_from_clip_by_its_projections(name: str, expected: int) -> None:
    size, patch, text_width, embed_dim = PUBLISHED[name]
    width = {"B": 768, "L": 1024}[size]
    with torch.device("meta"):
        found = parameters(FILIPConfig(towers(size, patch, text_width, 256)).build())
    assert found == COUNTS[name] - (width + text_width) * (embed_dim - 256) == expected


def test_siglip_has_the_published_parameters() -> None:
    text = {"bos_token_id": 1, "eos_token_id": 1}
    with torch.device("meta"):
        ours, theirs = siglip.published("B", 16).build(), SiglipModel(SiglipConfig(text_config=text))
    assert parameters(ours) == parameters(theirs) == 203_155_970


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_is_initialised(name: str) -> None:
    """Memory that nobody writes to is filled with NaN here."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        method = CONFIGS[name].build()
    finally:
        torch.use_deterministic_algorithms(False)
    for key, parameter in method.named_parameters():
        assert parameter.isfinite().all(), key
        assert parameter.ndim > 0, f"{key} has no dimension: DeepSpeed cannot shard it"
    assert all(buffer.isfinite().all() for buffer in method.buffers())


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_depend_on_the_seed_alone(name: str) -> None:
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(torch.cat([p.flatten() for p in CONFIGS[name].build().parameters()]))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_trains(name: str) -> None:
    method, pairs = build(name), batch(name, 6, 0, 6)
    loss_of(method("terms", pairs), method.counts(pairs), 1).backward()
    trained_and_finite(name, method)


def trained_and_finite(name: str, method: Method) -> None:
    """Every parameter has a gradient; in a method with one task per step, every one but those of other tasks' heads."""
    for key, parameter in method.named_parameters():
        if name.startswith("uniter") and parameter.grad is None:
            assert re.match(r"(\w+_head|pooler)\.|image\.mask$", key), key
        else:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key


def test_the_tasks_of_uniter_reach_every_parameter() -> None:
    reached: set[str] = set()
    for name in (name for name in CONFIGS if name.startswith("uniter")):
        method, pairs = build(name), batch(name, 6, 0, 6)
        loss_of(method("terms", pairs), method.counts(pairs), 1).backward()
        reached |= {key for key, parameter in method.named_parameters() if parameter.grad is not None}
    assert reached == {key for key, _ in method.named_parameters()}


@pytest.mark.parametrize("name", CONFIGS)
def test_captions_and_images_are_encoded_one_by_one(name: str) -> None:
    """A sample's features do not depend on its batch."""
    method, whole = build(name).eval(), batch(name, 5, 0, 5)
    alone = [method("encode", batch(name, 5, i, 1)) for i in range(5)]
    for together, parts in zip(method("encode", whole), zip(*alone, strict=True), strict=True):
        if isinstance(together, Tokens):
            joined = concatenate(list(parts))
            assert torch.equal(together.offsets, joined.offsets) and together.longest == joined.longest
            torch.testing.assert_close(together.x, joined.x, rtol=1e-5, atol=1e-6)
        elif isinstance(together, Tensor):  # and not the name of a task
            torch.testing.assert_close(together, torch.cat(parts), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.split()[0] not in FUSION])
def test_features_have_length_one(name: str) -> None:
    for feature in build(name).encode(batch(name, 4, 0, 4)):
        x = feature.x if isinstance(feature, Tokens) else feature
        if name.endswith("zero pads"):
            x = x[(x != 0).any(1)]
        torch.testing.assert_close(x.norm(dim=-1), torch.ones(len(x)))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_half_precision_stays_close(name: str, precision: str) -> None:
    method, pairs = build(name), batch(name, 6, 0, 6)
    exact = loss_of(method("terms", pairs), method.counts(pairs), 1).item()
    if precision == "bf16":
        method = method.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        loss = loss_of(method("terms", pairs), method.counts(pairs), 1)
    loss.backward()
    assert loss.dtype == torch.float32
    if "cap" not in name:  # at a scale of 100 the rounding of the features themselves is tenths of a logit
        assert loss.item() == pytest.approx(exact, rel=0.05)
    trained_and_finite(name, method)


def test_filip_leaves_out_the_class_token_and_the_ends() -> None:
    pairs = batch("filip", 4, 0, 4)
    lengths = pairs.text.lengths()
    image, text = build("filip").encode(pairs)
    assert image.lengths().tolist() == [16] * 4 and torch.equal(text.lengths(), lengths)
    _, text = build("filip without ends").encode(pairs)
    assert torch.equal(text.lengths(), torch.where(lengths > 2, lengths - 2, lengths))
    bare = replace(TOWERS, image=replace(TOWERS.image, class_token=False))
    assert FILIPConfig(bare).build().encode(pairs)[0].lengths().tolist() == [16] * 4


def test_filip_selects_in_training_and_scores_with_all_tokens() -> None:
    pairs = batch("filip", 4, 0, 4)
    whole, part = build("filip"), build("filip local")
    features = whole.encode(pairs)
    torch.testing.assert_close(part.score(*features), whole.score(*features))  # type: ignore[operator]
    assert part.objective(*features)["contrastive"].sum != whole.objective(*features)["contrastive"].sum


@pytest.mark.parametrize("kind", [OurCLIPConfig, FILIPConfig])
def test_probability_that_filtering_drops_is_reported_and_not_trained_on(kind: type) -> None:
    pairs = batch("clip", 6, 0, 6)
    torch.manual_seed(0)
    method = kind(TOWERS, contrast=ContrastConfig(filter_below=0.5)).build()
    terms = method("terms", pairs)
    loss_of(terms, method.counts(pairs), 1).backward()  # where pairs are dropped
    dropped = terms["dropped_probability"]
    assert dropped.weight == 0 and 0 < float(dropped.sum / dropped.count) < 1
    assert "dropped_probability" not in build("clip")("terms", pairs)


def test_patch_dropout_reaches_the_towers() -> None:
    pairs = batch("filip", 3, 0, 3)
    kept = torch.tensor([[0, 5, 9]] * 3)
    image, _ = build("filip").encode(replace(pairs, pictures=replace(pairs.pictures, kept_patches=kept)))
    assert image.lengths().tolist() == [3, 3, 3]
    towers = replace(TOWERS, image=replace(TOWERS.image, patch_keep=0.5))
    inputs = OurCLIPConfig(towers).inputs()
    assert (inputs.patches, inputs.kept_patches, inputs.text_padding) == (16, 8, "none")
    assert siglip.published("B", 16).inputs().text_padding == "max"


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"token_keep_ratio .* got 0"):
        FILIPConfig(TOWERS, token_keep_ratio=0.0)
    with pytest.raises(ValueError, match="nothing to train on"):
        loss_of({"accuracy": Term(torch.ones(()), torch.ones(()), 0.0)}, {}, 1)


class Words(Method):
    """A term per word over a threshold, so that ranks have different counts, and one has none."""

    couples_pairs = False

    def __init__(self) -> None:
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))

    def objective(self, words: Tensor) -> dict[str, Term]:
        high = words[words > 2]
        return {
            "high": Term((self.slope * high).square().sum(), torch.tensor(float(len(high)))),
            "all": Term((self.slope * words).sum(), torch.tensor(float(len(words))), 0.5),
            "reported": Term(words.sum(), torch.tensor(float(len(words))), 0.0),
        }


WORDS = [torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0.5, 2.0]), torch.tensor([4.0])]


def unequal_counts(rank: int, world_size: int) -> tuple[float, float]:
    method = Words()
    terms = method.objective(WORDS[rank].double())
    totals = {name: dist.sum_over_ranks(term.count) for name, term in terms.items()}
    loss = loss_of(terms, totals, world_size)
    loss.backward()
    assert method.slope.grad is not None
    mean = [dist.sum_over_ranks(x) / world_size for x in (loss.detach(), method.slope.grad)]
    return float(mean[0]), float(mean[1])


@pytest.mark.slow
def test_unequal_counts_and_a_rank_that_has_none() -> None:
    slope = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    words = torch.cat(WORDS).double()
    expected = (slope * words[words > 2]).square().mean() + 0.5 * (slope * words).mean()
    expected.backward()
    assert slope.grad is not None
    for found in run(unequal_counts, 3):
        assert found == pytest.approx((expected.item(), slope.grad.item()))


def test_a_term_that_nothing_counts_towards_adds_zero() -> None:
    method = Words()
    words = torch.tensor([1.0, 2.0], dtype=torch.float64)
    terms = method.objective(words)
    loss = loss_of(terms, {name: term.count for name, term in terms.items()}, 1)
    torch.testing.assert_close(loss, 0.5 * (method.slope * words).mean())
    loss.backward()
    assert method.slope.grad is not None and method.slope.grad.isfinite().all()
