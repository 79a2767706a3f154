"""Any image tower and any text tower in CLIP and in FILIP; locked, with learning rates by depth, and over ranks."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mmpt import dist
from mmpt.batch import Batch, MaskedWords, Pictures, pack, unpack
from mmpt.engine.build import EngineConfig, build
from mmpt.engine.optim import OptimConfig, freeze, parameter_groups
from mmpt.engine.step import train_step
from mmpt.methods.clip import CLIPConfig
from mmpt.methods.filip import FILIPConfig
from mmpt.methods.method import Method, Term, loss_of
from mmpt.models.batch_norm import batch_norms
from mmpt.models.bert import BertConfig, BertEmbeddingConfig
from mmpt.models.dual_tower import DualTowerConfig
from mmpt.models.efficientnet import EfficientNetConfig
from mmpt.models.heads import MaskedWordHead
from mmpt.models.image import ViTConfig
from mmpt.models.lstm import LSTMConfig
from mmpt.models.resnet import ResNetConfig
from mmpt.models.text import TextTransformerConfig
from mmpt.models.transformer import TransformerConfig
from tests.objectives import test_two_views
from tests.ops import test_batch_norm
from tests.ranks import run

SIZE, VOCABULARY, PAIRS, EMBED = 64, 30, 8, 12
TRUNK = TransformerConfig(width=16, depth=2, heads=2)
IMAGES: dict[str, Any] = {
    "ViT": ViTConfig(TRUNK, SIZE, 32),
    "ResNet": ResNetConfig((1, 1, 1, 1), 2, image_size=SIZE),
    "ResNet, half of its places": ResNetConfig((1, 1, 1, 1), 2, image_size=SIZE, kept_places=2),
    "CLIP's ResNet": ResNetConfig((1, 1, 1, 1), 2, "modified", "attention", EMBED, SIZE),
    "EfficientNet": EfficientNetConfig(0.25, 0.3, SIZE, drop_connect=0.0),
}
TEXTS: dict[str, Any] = {
    "transformer": TextTransformerConfig(TRUNK, VOCABULARY, 10),
    "BERT": BertConfig(
        BertEmbeddingConfig(16, VOCABULARY, positions=10, dropout=0.0), replace(TRUNK, norm="post", init="bert"), 10
    ),
    "LSTM": LSTMConfig(7, 2, 5, VOCABULARY, 10),
    "LSTM, maximum": LSTMConfig(7, 2, 5, VOCABULARY, 10, pool="max"),
}
METHODS: dict[str, Any] = {"CLIP": CLIPConfig, "FILIP": FILIPConfig}
OPTIM = OptimConfig(lr=3e-3, eps=1e-4, warmup_steps=0)  # what has no gradient but rounding does not move


def config_of(name: str, image: str, text: str) -> Any:
    """FILIP reads no summary, and a tower's parameters for it would not train."""
    tower = IMAGES[image]
    if name == "FILIP" and isinstance(tower, ResNetConfig | EfficientNetConfig):
        tower = replace(tower, pool="none", **({"embed_dim": 0} if isinstance(tower, ResNetConfig) else {}))
    projected = tower.summary_width != EMBED
    return METHODS[name](DualTowerConfig(tower, TEXTS[text], EMBED, project_image=projected))


def fresh(config: Any, dtype: torch.dtype = torch.float32) -> Method:
    """The same weights in every process; every one of them matters."""
    torch.manual_seed(0)
    method = config.build()
    with torch.no_grad():
        for name, parameter in method.named_parameters():
            if "logit_" not in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return method.to(dtype)


def pairs(seed: int = 0, kept: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (PAIRS, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    lengths = torch.randint(1, 11, (PAIRS,), generator=generator).tolist()
    texts = [torch.randint(1, VOCABULARY, (n,), generator=generator) for n in lengths]
    drawn = torch.rand(PAIRS, 4, generator=generator).argsort(1)[:, :kept].sort(1).values if kept else None
    return Batch(Pictures(images, drawn), pack(texts), torch.arange(PAIRS), ("",) * PAIRS)


def joined(parts: list[Batch]) -> Batch:
    images = torch.cat([part.pictures.pixels for part in parts])  # type: ignore[misc]
    texts = pack([text for part in parts for text in unpack(part.text)])
    return Batch(Pictures(images), texts, torch.arange(len(images)), ("",) * len(images))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("name", METHODS)
def test_any_towers_train(name: str, image: str, text: str) -> None:
    """Encode, objective, backward: every parameter gets a gradient, and one step along them lowers the loss."""
    method, inputs = fresh(config_of(name, image, text)), IMAGES[image].inputs()
    kept = inputs.kept_patches if inputs.kept_patches < inputs.patches else 0
    batch = pairs(kept=kept)
    features = method("encode", batch)
    if name == "FILIP":
        assert features[0].lengths().tolist() == [inputs.kept_patches] * PAIRS
        assert torch.equal(features[1].lengths(), batch.text.lengths())
    loss = loss_of(method("objective", *features), method.counts(batch), 1)
    loss.backward()
    for key, parameter in method.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), key
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.sub_(1e-3 * parameter.grad / (parameter.grad.norm() + 1e-9))  # type: ignore[operator]
    assert loss_of(method("terms", batch), method.counts(batch), 1) < loss
    method.after_step()
    method.eval()
    with torch.no_grad():
        alone = method("encode", batch.part(2, 3))[0]
        whole = method("encode", batch)[0]
    alone, whole = (alone.x, unpack(whole)[2]) if name == "FILIP" else (alone, whole[2:3])
    torch.testing.assert_close(alone, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("image", "text"), [("CLIP's ResNet", "BERT"), ("EfficientNet", "LSTM")])
def test_a_locked_tower_stands_still(image: str, text: str) -> None:
    for locked, other in (("image", "text"), ("text", "image")):
        method = fresh(config_of("CLIP", image, text))
        freeze(method, locked)
        before = {name: value.clone() for name, value in method.state_dict().items()}
        loss_of(method("terms", pairs()), {"contrastive": PAIRS}, 1).backward()
        with torch.no_grad():
            for parameter in method.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.sign(), alpha=1e-2)
        method.after_step()
        changed = {name for name, value in method.state_dict().items() if not torch.equal(value, before[name])}
        assert not any(name.startswith(f"towers.{locked}.") for name in changed)
        assert {name for name in before if name.startswith(f"towers.{other}.")} <= changed


@pytest.mark.parametrize(("image", "text"), [("CLIP's ResNet", "BERT"), ("EfficientNet", "LSTM")])
def test_learning_rates_by_depth(image: str, text: str) -> None:
    method = fresh(config_of("CLIP", image, text))
    groups = parameter_groups(method, replace(OPTIM, layer_decay=0.5))
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for tower in ("image", "text"):
        module: Any = method.get_submodule(f"towers.{tower}")
        blocks = module.trunk.blocks if text == "BERT" and tower == "text" else module.blocks
        for height, block in enumerate([module.embedding, *blocks]):
            assert {scales[id(p)] for p in block.parameters()} == {0.5 ** (len(blocks) - height)}
    top = "towers.image.pooling" if image == "CLIP's ResNet" else "towers.image.top"
    above = [*method.get_submodule(top).parameters(), *method.get_submodule("towers.text_projection").parameters()]
    assert {scales[id(p)] for p in above} == {1.0}
    for name, parameter in method.named_parameters():
        assert (decays[id(parameter)] > 0) == (parameter.ndim > 1), name


class Words(Method):
    """Masked words alone: the token embedding is read in two modules' forwards."""

    couples_pairs = False

    def __init__(self) -> None:
        super().__init__()
        self.text = TEXTS["BERT"].build()
        self.head = MaskedWordHead(16, VOCABULARY, tied=self.text.embedding.token_embedding)

    def encode(self, batch: Batch) -> tuple[Any, ...]:
        assert batch.masked_words is not None
        tokens = self.text(batch.text.with_x(batch.masked_words.ids))
        return self.head(tokens.x[batch.masked_words.chosen]), batch.text.x[batch.masked_words.chosen]

    def objective(self, logits: Tensor, ids: Tensor) -> dict[str, Term]:
        return {"words": Term(cross_entropy(logits, ids, reduction="sum"), torch.tensor(float(len(ids))))}

    def counts(self, batch: Batch) -> dict[str, float]:
        assert batch.masked_words is not None
        return {"words": batch.masked_words.count}


class WordsConfig:
    def build(self) -> Words:
        return Words()


def masked(batch: Batch) -> Batch:
    chosen = batch.text.x % 3 == 0
    return replace(batch, masked_words=MaskedWords(batch.text.x.masked_fill(chosen, 1), chosen, int(chosen.sum())))


ENGINES: dict[str, Any] = {
    "CLIP of ResNet and LSTM": config_of("CLIP", "CLIP's ResNet", "LSTM"),
    "FILIP of EfficientNet and BERT": config_of("FILIP", "EfficientNet", "BERT"),
    "masked words": WordsConfig(),
}
STEPS = 2
Case = tuple[str, int, int]
"""(name, micro-batches, ZeRO stage)"""
CASES: dict[int, list[Case]] = {
    2: [
        ("CLIP of ResNet and LSTM", 2, 0), ("CLIP of ResNet and LSTM", 2, 2), ("CLIP of ResNet and LSTM", 1, 3),
        ("masked words", 1, 3), ("FILIP of EfficientNet and BERT", 1, 1), ("FILIP of EfficientNet and BERT", 2, 3),
    ],
    4: [("CLIP of ResNet and LSTM", 1, 1)],
}  # fmt: skip
Run = tuple[list[float], dict[str, Tensor]]


def reference(name: str, parts: int, world_size: int) -> Run:
    """Losses and running statistics by plain torch in one process. A micro-batch is normalised over all ranks; nothing
    is cached: all micro-batches are encoded with gradients, then scored together."""
    method = fresh(ENGINES[name])
    groups = [{key: group[key] for key in ("params", "weight_decay")} for group in parameter_groups(method, OPTIM)]
    optimizer = torch.optim.AdamW(groups, lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps)
    losses = []
    for step in range(STEPS + 1):
        slices = pairs(step).split(world_size * parts)
        groups_of_ranks = [joined(slices[i::parts]) for i in range(parts)]
        if name == "masked words":
            groups_of_ranks = [masked(group) for group in groups_of_ranks]
        features = [method("encode", group) for group in groups_of_ranks]
        whole = [
            torch.cat(same) if isinstance(same[0], Tensor) else pack([row for tokens in same for row in unpack(tokens)])
            for same in zip(*features, strict=True)
        ]
        counts = [method.counts(group) for group in groups_of_ranks]
        totals = {key: sum(count[key] for count in counts) for key in counts[0]}
        loss = loss_of(method("objective", *whole), totals, 1)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step()
    return losses, {name: buffer.clone() for name, buffer in method.named_buffers()}


def by_engine(name: str, stage: int, parts: int, precision: str = "fp32") -> Run:
    share = PAIRS // dist.world_size()
    config = EngineConfig(zero_stage=stage, precision=precision, keep_whole_elements=0)  # type: ignore[arg-type]
    engine = build(fresh(ENGINES[name]), config, OPTIM, share, torch.device("cpu"))
    assert stage < 3 or not any(p.numel() for p in engine.method.parameters()), "a parameter stayed whole"
    losses = []
    for step in range(STEPS + 1):
        own = pairs(step).part(dist.rank() * share, (dist.rank() + 1) * share)
        own = masked(own) if name == "masked words" else own
        result, terms = train_step(engine, own.split(parts), OPTIM.lr)
        assert result.applied
        (term,) = (term for term in terms.values() if term.weight)
        total, count = dist.sum_over_ranks(torch.stack([term.sum, term.count]))
        losses.append(float(total / count))
    return losses, dict(engine.method.named_buffers())


def check(rank: int, world_size: int, cases: list[Case], expected: list[Run], views: Any) -> None:
    test_batch_norm.check(rank, world_size)
    test_two_views.check(rank, world_size, views)
    for (name, parts, stage), (losses, statistics) in zip(cases, expected, strict=True):
        where = f"{name}, ZeRO {stage}, {parts} micro-batches"
        found, buffers = by_engine(name, stage, parts)
        assert found == pytest.approx(losses, rel=1e-4), where
        assert buffers.keys() == statistics.keys()
        for key, value in statistics.items():
            deviation = statistics[key.replace("running_mean", "running_variance")].sqrt()
            worst = float(((buffers[key] - value) / deviation).abs().max())
            assert worst < 1e-4, f"{where}: {key} is off by {worst}"
    if world_size == 2:
        name, parts, stage = cases[-1]
        found, buffers = by_engine(name, stage, parts, "bf16")
        assert found[0] == pytest.approx(expected[-1][0][0], rel=0.05)
        assert all(buffer.dtype == torch.float32 for buffer in buffers.values()), "the engine rounded the statistics"


@pytest.mark.slow
@pytest.mark.parametrize("world_size", CASES)
def test_ranks_are_one_process(world_size: int) -> None:
    """Towers with batch norm, undivided and with cached accumulation; and the pieces' own checks, in the same ranks."""
    cases = CASES[world_size]
    references = {(name, parts): reference(name, parts, world_size) for name, parts, _ in cases}
    for losses, statistics in references.values():
        assert losses[-1] != losses[0]
        for name, value in statistics.items():
            assert not torch.equal(value, torch.full_like(value, "variance" in name)), f"{name} stands still"
    expected = [references[name, parts] for name, parts, _ in cases]
    run(check, world_size, cases, expected, test_two_views.projected(0, 1), timeout_seconds=400)


def test_every_norm_is_ours() -> None:
    for image in IMAGES:
        method = fresh(config_of("CLIP", image, "transformer"))
        assert not [module for module in method.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        assert all(norm.normalise is not None for norm in batch_norms(method))
