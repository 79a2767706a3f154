"""What is wrong with a node is found, named, and blamed on the right one."""

from pathlib import Path

import pytest
import torch

from mmpt.engine import preflight
from mmpt.engine.preflight import Problem, raise_for
from mmpt.failure import UnfitNode

CPU = torch.device("cpu")


def test_a_healthy_node_has_no_faults(tmp_path: Path) -> None:
    assert preflight.preflight(tmp_path / "new", CPU) == []
    assert (tmp_path / "new").is_dir() and not list((tmp_path / "new").iterdir())


def test_one_wrong_number_in_a_matrix_product_shows() -> None:
    def flawed(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        product = a @ b
        product[17, 101] += 1
        return product

    assert preflight.matmul_fault(CPU) == ""
    assert preflight.matmul_fault(CPU, flawed) == "cpu: 1 of 256 rows of a matrix product are wrong"


def test_an_all_reduce_is_compared_with_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    assert preflight.all_reduce_fault(CPU) == ""
    monkeypatch.setattr(preflight.dist, "sum_over_ranks", lambda x: x.index_fill(0, torch.tensor([5, 9]), -1))
    assert preflight.all_reduce_fault(CPU) == "cpu: 2 of 1048576 numbers of an all-reduce are wrong"


def test_memory(tmp_path: Path) -> None:
    assert preflight.memory_fault(preflight.available_memory_bytes(), 1) == ""
    assert preflight.memory_fault(100 << 20, 2) == "100 MiB of memory are free, 2 ranks need at least 1024"
    assert preflight.shared_memory_fault(tmp_path / "nothing", 2) == ""
    assert "the data workers need" in preflight.shared_memory_fault(tmp_path, 1 << 30)


def test_the_run_directory(tmp_path: Path) -> None:
    newest = tmp_path / "checkpoints/step-00000002"
    newest.mkdir(parents=True)
    with open(newest / "huge", "wb") as file:
        file.truncate(1 << 43)  # sparse: it takes no room itself
    assert "MiB free, a checkpoint needs 8388672" in preflight.storage_fault(tmp_path, 0)
    (tmp_path / "file").write_text("")
    assert "cannot be written: Not a directory" in preflight.storage_fault(tmp_path / "file/run", 0)


def test_whom_to_blame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    raise_for([], {"n0", "n1"})
    full = [Problem("n0", "full", True), Problem("n1", "full", True)]
    with pytest.raises(OSError, match="full"):
        raise_for(full, {"n0", "n1"})
    for node, here in (("n0", False), ("n1", True)):
        with pytest.raises(UnfitNode, match=f"1 of 2 nodes cannot train: node {node}: full") as caught:
            raise_for([Problem(node, "full", True)], {"n0", "n1"})
        assert caught.value.here == here
    with pytest.raises(UnfitNode, match="1 of 1 nodes cannot train: node n0: no memory"):
        raise_for([Problem("n0", "no memory")], {"n0"})
