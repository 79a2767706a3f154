"""Every ZeRO stage on W ranks trains what one plain process holding the global batch trains."""

import itertools

import pytest
import torch
from torch import Tensor

from mmpt import dist
from mmpt.engine.build import EngineConfig, build
from mmpt.engine.optim import OptimConfig, parameter_groups
from mmpt.engine.partition import segments
from mmpt.engine.step import train_step
from mmpt.methods.method import loss_of
from tests.engine.toy import Toy, batches, toy
from tests.ranks import run

PAIRS, STEPS = 16, 3
ADAMW = OptimConfig(lr=0.02, eps=1e-4, weight_decay=0.1, clip_norm=0.3)
LAMB = OptimConfig(name="lamb", lr=0.02, betas=(0.9, 0.999), eps=1e-4, weight_decay=0.1, clip_norm=0.3)


def reference_step_lamb(state: dict, groups: list[dict], optim: OptimConfig, t: int) -> None:
    """Algorithm 2 of You et al., one parameter at a time, in the plainest form."""
    for group in groups:
        for x in group["params"]:
            m, v = state.get(x, (torch.zeros_like(x), torch.zeros_like(x)))
            m = optim.betas[0] * m + (1 - optim.betas[0]) * x.grad
            v = optim.betas[1] * v + (1 - optim.betas[1]) * x.grad**2
            state[x] = (m, v)
            r = (m / (1 - optim.betas[0] ** t)) / ((v / (1 - optim.betas[1] ** t)).sqrt() + optim.eps)
            u = r + group["weight_decay"] * x
            ratio = x.norm() / u.norm() if group["weight_decay"] else 1.0
            x -= optim.lr * ratio * u


def reference(optim: OptimConfig) -> tuple[dict[str, Tensor], list[float]]:
    """Parameters after STEPS, and the gradient norms, by a loop that shares nothing with the engine but the groups."""
    model = toy()
    groups = parameter_groups(model, optim)
    adamw = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
    state: dict = {}
    norms = []
    for t, batch in enumerate(batches(PAIRS, STEPS), 1):
        model.zero_grad()
        terms = model.objective(*model.encode(batch))
        loss = sum(term.weight * term.sum / term.count for term in terms.values() if term.weight)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)))
        with torch.no_grad():
            adamw.step() if optim.name == "adamw" else reference_step_lamb(state, groups, optim, t)
    return {name: p.detach().clone() for name, p in model.named_parameters()}, norms


def whole_parameters(engine) -> dict[str, Tensor]:
    """fp32 parameters put together from every rank's segments."""
    local = [(s.name, s.shape, s.start, s.of(s.flat).detach().clone()) for s in segments(engine.deepspeed)]
    out: dict[str, Tensor] = {}
    for pieces in dist.gather_objects(local):
        for name, shape, start, values in pieces:
            whole = out.setdefault(name, torch.full((torch.Size(shape).numel(),), float("nan")))
            whole[start : start + len(values)] = values
    shapes = {name: shape for pieces in dist.gather_objects(local) for name, shape, _, _ in pieces}
    return {name: values.view(shapes[name]) for name, values in out.items()}


def train(optim: OptimConfig, stage: int, parts: int, precision: str = "fp32"):
    # Of the toy's parameters some stay whole at stage 3 and some are sharded, as in a large model.
    config = EngineConfig(zero_stage=stage, precision=precision, keep_whole_elements=40)
    engine = build(toy(), config, optim, PAIRS // dist.world_size(), torch.device("cpu"))
    results = []
    for batch in batches(PAIRS, STEPS, dist.rank(), dist.world_size()):
        results.append(train_step(engine, batch.split(parts), optim.lr)[0])
    return engine, results


def check_stages(rank: int, world_size: int, wanted: dict, combinations: list) -> None:
    for (name, optim), stage, parts in combinations:
        engine, results = train(optim, stage, parts)
        parameters, norms = wanted[name]
        where = f"{name}, ZeRO {stage}, W {world_size}, {parts} micro-batches"
        assert all(result.applied for result in results), where
        assert [r.grad_norm for r in results] == pytest.approx(norms, rel=2e-6), where
        found = whole_parameters(engine)
        assert found.keys() == {name for name in parameters if not name.startswith("frozen")}
        for key, value in found.items():
            worst = float((value - parameters[key]).abs().max())
            assert torch.allclose(value, parameters[key], rtol=2e-6, atol=2e-6), f"{where}: {key} is off by {worst}"


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_equal_one_process_at_every_stage(world_size: int) -> None:
    optims = {"adamw": ADAMW, "lamb": LAMB}
    wanted = {name: reference(optim) for name, optim in optims.items()}
    assert all(min(norms) > optim.clip_norm for (_, norms), optim in zip(wanted.values(), optims.values())), "clipped"
    combinations = list(itertools.product(optims.items(), [0, 1, 2, 3], [1, 2]))
    run(check_stages, world_size, wanted, combinations, timeout_seconds=300)


def check_precision(rank: int, world_size: int) -> list[float]:
    exact = reference(ADAMW)[0]
    worst = []
    for stage in range(4):
        engine, _ = train(ADAMW, stage, 2, "bf16")
        found = whole_parameters(engine)
        worst.append(max(float((found[name] - exact[name]).abs().max()) for name in found))
    return worst


@pytest.mark.slow
def test_bf16_follows_fp32_at_every_stage() -> None:
    for worst in run(check_precision, 2)[0]:
        assert 0 < worst < 0.05, "3 steps of 0.02 move a parameter by at most 0.06"


class Broken(Toy):
    """NaN in the gradient of one pair, where its first pixel is 255 and `broken` is set."""

    broken = False

    def objective(self, image, words, ids):
        terms = super().objective(image, words, ids)
        if self.broken:
            terms["contrastive"] = terms["contrastive"]._replace(
                sum=terms["contrastive"].sum + (image * float("nan")).sum()
            )
        return terms


def check_nan(rank: int, world_size: int) -> None:
    for stage in range(4):
        torch.manual_seed(0)
        model = Broken()
        engine = build(
            model, EngineConfig(zero_stage=stage, precision="fp32"), ADAMW, PAIRS // world_size, torch.device("cpu")
        )
        seen = []
        for i, batch in enumerate(batches(PAIRS, 4, rank, world_size)):
            model.broken = i == 1 and rank == world_size - 1
            before = whole_parameters(engine)
            result, _ = train_step(engine, [batch], 0.02)
            after = whole_parameters(engine)
            seen.append(result.applied)
            changed = any(not torch.equal(before[name], after[name]) for name in before)
            assert changed == result.applied, f"ZeRO {stage}, step {i}"
            assert all(torch.isfinite(value).all() for value in after.values())
        assert seen == [True, False, True, True], f"ZeRO {stage}: {seen}"


@pytest.mark.slow
def test_a_nan_on_one_rank_skips_the_step_on_all() -> None:
    run(check_nan, 2)


def test_loss_divides_by_the_counts_of_all_ranks() -> None:
    model, batch = toy(), batches(PAIRS, 1)[0]
    terms = model.objective(*model.encode(batch))
    totals = {name: 3 * term.count for name, term in terms.items()}
    expected = sum(2 * t.weight * t.sum / (3 * t.count) for t in terms.values() if t.weight)
    torch.testing.assert_close(loss_of(terms, totals, world_size=2), expected)
