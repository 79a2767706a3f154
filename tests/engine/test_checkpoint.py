"""A resumed run is the uninterrupted one: to the bit at the same stage and world size, to rounding at others."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmpt import dist
from mmpt.engine.build import Engine, EngineConfig, build
from mmpt.engine.checkpoint import load, load_parameters, weights
from mmpt.engine.checkpoint_files import newest_valid
from mmpt.engine.optim import OptimConfig
from mmpt.engine.saver import save
from mmpt.engine.step import train_step
from mmpt.engine.weights import read_tensors, write_tensors
from tests.engine.test_zero import whole_parameters
from tests.engine.toy import batches, toy
from tests.ranks import run

PAIRS = 16
ADAMW = OptimConfig(lr=0.02, eps=1e-4, weight_decay=0.1, clip_norm=0.3)
LAMB = dataclasses.replace(ADAMW, name="lamb")


def engine_at(stage: int, optim: OptimConfig, seed: int, precision: str = "fp32", dropout: float = 0.0) -> Engine:
    config = EngineConfig(zero_stage=stage, precision=precision, keep_whole_elements=40)
    return build(toy(seed, dropout), config, optim, PAIRS // dist.world_size(), torch.device("cpu"))


def steps(engine: Engine, first: int, last: int) -> None:
    for batch in batches(PAIRS, last, dist.rank(), dist.world_size())[first:]:
        train_step(engine, batch.split(2), 0.02)


def everything(engine: Engine) -> dict[str, Tensor]:
    """Masters, frozen parameters and buffers, and the values the model computes with."""
    out = {f"master {name}": value for name, value in whole_parameters(engine).items()}
    out |= {f"buffer {name}": value.clone() for name, value in engine.method.named_buffers()}
    with torch.no_grad():
        terms = engine("terms", batches(PAIRS, 1, dist.rank(), dist.world_size())[0])
    return out | {f"term {name}": term.sum.detach().clone() for name, term in terms.items()}


def check_exact_resume(rank: int, world_size: int, folder: str) -> None:
    """k + (n - k) steps equal n, bit for bit, with dropout, at every stage, precision and optimizer."""
    cases = [(s, o, p) for s in range(4) for o, p in ((ADAMW, "fp32"), (LAMB, "fp32"), (ADAMW, "bf16"))]
    for stage, optim, precision in cases:
        where = f"ZeRO {stage}, {optim.name}, {precision}"
        place = Path(folder) / where.replace(" ", "-")
        torch.manual_seed(100 + rank)
        engine = engine_at(stage, optim, 0, precision, dropout=0.2)
        torch.manual_seed(200 + rank)
        steps(engine, 0, 2)
        save(place, engine, 2, {"step": 2})
        steps(engine, 2, 4)
        wanted = everything(engine)

        torch.manual_seed(300 + rank)
        engine = engine_at(stage, optim, 7, precision, dropout=0.2)  # other weights, other random state
        checkpoint, manifest, _ = newest_valid(place)
        assert load(checkpoint, manifest, engine, seed=0) == {"step": 2}, where
        steps(engine, 2, 4)
        found = everything(engine)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.equal(found[name], value), f"{where}: {name} differs by {(found[name] - value).abs().max()}"


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_resume_is_exact(tmp_path: Path, world_size: int) -> None:
    run(check_exact_resume, world_size, str(tmp_path), timeout_seconds=400)


def save_at(rank: int, world_size: int, folder: str, stage: int, optim: OptimConfig) -> tuple:
    engine = engine_at(stage, optim, 0)
    with torch.no_grad():
        engine.method.get_buffer("seen").add_(3.5)
    steps(engine, 0, 2)
    save(Path(folder), engine, 2, {})
    steps(engine, 2, 4)
    engine.deepspeed.destroy()
    return everything_whole(engine)


def everything_whole(engine: Engine) -> dict[str, Tensor]:
    values = everything(engine)
    del values["term temperature"]  # reported once per rank, so its sum depends on their number
    return {name: dist.sum_over_ranks(v) if name.startswith("term") else v for name, v in values.items()}


def load_at(rank: int, world_size: int, folder: str, optim: OptimConfig, wanted: dict) -> None:
    for stage in range(4):
        engine = engine_at(stage, optim, 7)
        checkpoint, manifest, _ = newest_valid(Path(folder))
        load(checkpoint, manifest, engine, seed=0)
        assert torch.equal(engine.method.get_buffer("seen"), torch.arange(5.0) + 3.5)
        steps(engine, 2, 4)
        for name, value in everything_whole(engine).items():
            where = f"W {world_size}, ZeRO {stage}, {name}"
            assert torch.allclose(value, wanted[name], rtol=5e-6, atol=5e-6), where


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saved_world", "saved_stage", "optim", "loaded_world"),
    [(2, 1, ADAMW, 1), (1, 3, ADAMW, 2), (2, 3, LAMB, 4), (4, 2, ADAMW, 2), (2, 0, LAMB, 1)],
)
def test_resume_elsewhere_equals_to_rounding(tmp_path: Path, saved_world, saved_stage, optim, loaded_world) -> None:
    """Another world size and every ZeRO stage; four steps, so that Adam's step and moments matter."""
    wanted = run(save_at, saved_world, str(tmp_path), saved_stage, optim)[0]
    run(load_at, loaded_world, str(tmp_path), optim, wanted, timeout_seconds=300)


def check_weights(rank: int, world_size: int, folder: str) -> None:
    for stage in (1, 3):
        place = Path(folder) / str(stage)
        engine = engine_at(stage, ADAMW, 0)
        steps(engine, 0, 1)
        save(place, engine, 1, {})
        checkpoint, manifest, _ = newest_valid(place)
        state = weights(checkpoint, manifest)
        plain = toy(seed=9)
        plain.load_state_dict(state)
        batch = batches(PAIRS, 1, rank, world_size)[0]
        torch.testing.assert_close(plain.terms(batch)["contrastive"].sum, engine("terms", batch)["contrastive"].sum)
        other = engine_at(2, ADAMW, 5, "bf16")
        load_parameters(checkpoint, manifest, other)
        for name, value in whole_parameters(other).items():
            assert torch.equal(value, state[name]), "bf16 masters keep fp32 values"
        if rank == 0:  # through a file that does not tell parameters, frozen ones and buffers apart
            write_tensors(checkpoint, manifest, place / "all.safetensors")
            read_tensors(place / "all.safetensors", place / "back")
        dist.barrier()
        other = engine_at(2, ADAMW, 6)
        other.method.get_buffer("seen").zero_()
        load_parameters(*newest_valid(place / "back")[:2], other)
        assert all(torch.equal(value, state[name]) for name, value in whole_parameters(other).items())
        assert torch.equal(other.method.get_buffer("seen"), state["seen"]) and state["seen"].any()


@pytest.mark.slow
def test_weights_alone_load_into_a_plain_model_and_a_new_engine(tmp_path: Path) -> None:
    run(check_weights, 2, str(tmp_path))
