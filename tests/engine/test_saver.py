"""Saving behind training's back: the values of the moment, one at a time, all ranks or none."""

import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load as read_safetensors

from mmpt import dist
from mmpt.engine.build import Engine
from mmpt.engine.checkpoint import weights
from mmpt.engine.checkpoint_files import newest_valid
from mmpt.engine.saver import Saver, save
from mmpt.engine.snapshot import Snapshot
from tests.engine.test_checkpoint import ADAMW, engine_at, steps
from tests.engine.test_zero import whole_parameters
from tests.ranks import run


def test_a_snapshot_is_a_safetensors_file_and_a_copy(tmp_path: Path) -> None:
    """Read by the safetensors library: every type, odd sizes, strided and empty tensors; memory is used again."""
    torch.manual_seed(0)
    tensors = {
        "odd": torch.randn(7), "half": torch.randn(3).bfloat16(), "strided": torch.randn(4, 6).T,
        "bytes": torch.ones(5).byte(), "empty": torch.empty(0), "flag": torch.tensor([True, False, True]),
        "long": torch.arange(3), "double": torch.randn(2).double(),
    }  # fmt: skip
    memory = Snapshot()
    memory.fill(tensors)
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor.zero_()
    found = read_safetensors(bytes(memory.data()))
    assert found.keys() == kept.keys()
    for name, value in kept.items():
        assert torch.equal(found[name].flatten(), value.flatten()) and found[name].dtype == value.dtype, name
    (tmp_path / "x").write_bytes(memory.data())
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert torch.equal(file.get_slice("odd")[2:5], kept["odd"][2:5])

    address = memory._memory.data_ptr()
    memory.fill({"odd": torch.arange(4.0)})
    assert memory._memory.data_ptr() == address
    assert torch.equal(read_safetensors(bytes(memory.data()))["odd"], torch.arange(4.0))


def boundary(saver: Saver) -> None:
    """What the ballot of a step does."""
    saving, failed = dist.sum_over_ranks(torch.tensor(saver.votes(), dtype=torch.float32)).tolist()
    saver.hear(saving, failed)


def files_of(checkpoint: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoint.iterdir()}


def check_saver(rank: int, world_size: int, folder: str) -> None:
    place, torch_seed = Path(folder), 5
    engine = engine_at(2, ADAMW, 0)
    steps(engine, 0, 2)
    before = whole_parameters(engine)
    torch.manual_seed(torch_seed)
    save(place / "at-once", engine, 2, {"step": 2})

    saver = Saver(place / "behind", engine, keep_last=2, keep_every_steps=0)
    torch.manual_seed(torch_seed)
    saver.start(2, {"step": 2})
    for i in range(2, 4):  # goes on at once; nothing of it is in the checkpoint
        steps(engine, i, i + 1)
        boundary(saver)
    saver.finish()
    dist.barrier()
    assert files_of(place / "behind/step-00000002") == files_of(place / "at-once/step-00000002")
    checkpoint, manifest, _ = newest_valid(place / "behind")
    for name, value in weights(checkpoint, manifest).items():
        assert name not in before or torch.equal(value, before[name]), name

    for step in (3, 4, 5):  # each waits for the one before: at most one is in flight
        saver.start(step, {})
        assert not list((place / "behind").glob(f".tmp-*{step - 1}-*"))
        dist.barrier()
    saver.finish()
    dist.barrier()
    assert sorted(path.name for path in (place / "behind").glob("step-*")) == ["step-00000004", "step-00000005"]
    assert saver.last is not None and saver.last.step == 5
    total_bytes = sum(file.bytes for file in newest_valid(place / "behind")[1].files)
    assert saver.last.bytes == (0 if rank else total_bytes)
    record = saver.record()
    assert 0 < record["checkpoint_stall_seconds"] < 60 and saver.record()["checkpoint_stall_seconds"] == 0
    out_of_space(rank, saver, engine, place / "behind")


def out_of_space(rank: int, saver: Saver, engine: Engine, place: Path) -> None:
    """Rank 1 may write no more than 1 kB to any file: the kernel refuses, as it does on a full disk. All ranks are told
    at the same boundary, nothing is left, and the next save works."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    saver.start(6, {})
    try:
        while True:
            boundary(saver)
    except OSError as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    messages = dist.gather_objects(message)
    assert messages[0] == messages[1]
    assert "step 6 was not saved: rank 1: File too large" in messages[0] and "rank-00001.safetensors" in messages[0]
    assert newest_valid(place)[0].name == "step-00000005" and not list(place.glob(".tmp*"))
    dist.barrier()
    saver.start(7, {})
    saver.finish()
    assert newest_valid(place)[0].name == "step-00000007"
    saver.close()


@pytest.mark.slow
def test_saving_behind_training_on_two_ranks(tmp_path: Path) -> None:
    run(check_saver, 2, str(tmp_path))
