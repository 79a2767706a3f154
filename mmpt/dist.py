"""Ranks and collectives: the only file that calls torch.distributed.

Everything works without a process group too, as one rank of one. Collectives that carry gradients follow one
convention: **backward sums what arrives from all ranks**. With the engine averaging parameter gradients over ranks and
each rank's loss multiplied by W, W ranks then give the gradients of one process holding the global batch.
"""

import os
import socket
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_distributed
from torch import Tensor

from mmpt.batch import Tokens
from mmpt.waits import waiting


def init(timeout_seconds: float = 600.0) -> torch.device:
    """Join the process group that the launcher's environment describes, or make a group of one; return our device.

    The launcher sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. NCCL on CUDA, gloo elsewhere.
    ValueError where srun started several of us and nobody set them: each would train alone in the same directory.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1 and "RANK" not in os.environ:
        raise ValueError(
            f"srun started {tasks} tasks and none knows its rank (nor does `deepspeed --launcher slurm` tell them); "
            "use mmpt-launch, or srun ... python -m launcher.ranks -- python mmpt/train.py ..."
        )
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(free_port())
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        if "OMP_NUM_THREADS" not in os.environ:  # ranks that each take all cores slow one another down many times
            local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_ranks))
    if not torch_distributed.is_initialized():
        torch_distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=timedelta(seconds=timeout_seconds),
            device_id=device if device.type == "cuda" else None,
        )
    return device


def set_timeout(timeout_seconds: float) -> None:
    """From now on a collective of any process group, DeepSpeed's included, fails after this long."""
    if torch_distributed.is_initialized():
        for group in list(torch_distributed.distributed_c10d._world.pg_map):
            torch_distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_seconds), group)


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if torch_distributed.is_initialized():
        torch_distributed.destroy_process_group()


def free_port() -> int:
    """A TCP port on the loopback interface that nobody listens on at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def node_name() -> str:
    """What the scheduler calls this node; its host name elsewhere."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def launched_rank() -> int:
    """The rank that the launcher or srun gave this process, known before `init`."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0")


def first_to_fail() -> bool:
    """Whether no other rank has called this before: the rank whose error is the cause of the others'.

    When rank 0, which keeps the account, cannot be reached any more, rank 1 counts as the first.
    """
    if world_size() == 1:
        return launched_rank() == 0
    try:
        return torch_distributed.distributed_c10d._get_default_store().add("mmpt/failed", 1) == 1
    except RuntimeError:
        return rank() == 1


def lost_a_rank(error: Exception) -> bool:
    """Whether a collective failed because another rank is gone."""
    return isinstance(error, torch_distributed.DistError) or "gloo/transport" in str(error)


def leave_failed(wait_seconds: float) -> None:
    """Break the connections, so that ranks that wait for us fail too, and wait until they have said so, each by
    `first_to_fail`, or for so long: rank 0 keeps the account.

    NCCL has no such way out: its ranks wait for the launcher to end them.
    """
    if not torch_distributed.is_initialized():
        return
    store, ranks = torch_distributed.distributed_c10d._get_default_store(), world_size()
    if torch_distributed.get_backend() == "gloo":
        torch_distributed.destroy_process_group()
    deadline = time.monotonic() + wait_seconds
    try:
        while store.add("mmpt/failed", 0) < ranks and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)  # those who asked last have yet to be answered
    except RuntimeError:
        return  # rank 0 is gone


def rank() -> int:
    return torch_distributed.get_rank() if torch_distributed.is_initialized() else 0


def world_size() -> int:
    return torch_distributed.get_world_size() if torch_distributed.is_initialized() else 1


def barrier() -> None:
    if world_size() > 1:
        torch_distributed.barrier()


def sum_over_ranks(x: Tensor) -> Tensor:
    """Elementwise sum over ranks, without gradient. The input is left as it was."""
    return _all_reduce(x, torch_distributed.ReduceOp.SUM)


def max_over_ranks(x: Tensor) -> Tensor:
    """Elementwise maximum over ranks, without gradient. The input is left as it was."""
    return _all_reduce(x, torch_distributed.ReduceOp.MAX)


def _all_reduce(x: Tensor, operation: Any) -> Tensor:
    out = x.detach().clone(memory_format=torch.contiguous_format)
    if world_size() > 1:
        with waiting(x.device):
            torch_distributed.all_reduce(out, op=operation)
    return out


def host_group() -> torch_distributed.ProcessGroup | None:
    """A group for facts that hosts settle without waiting for their devices; None where the only group is such a one.

    All ranks make it together, and use it in one thread.
    """
    if world_size() == 1 or torch_distributed.get_backend() == "gloo":
        return None
    group = torch_distributed.new_group(backend="gloo")
    assert isinstance(group, torch_distributed.ProcessGroup)
    return group


def largest_over_ranks(value: int, group: torch_distributed.ProcessGroup | None) -> int:
    """The largest of the ranks' values, over a `host_group`."""
    out = torch.tensor(value)
    if world_size() > 1:
        torch_distributed.all_reduce(out, op=torch_distributed.ReduceOp.MAX, group=group)
    return int(out)


def all_true(flag: bool, device: torch.device | str = "cpu") -> bool:
    """Whether the flag is true on every rank. All ranks get the same answer."""
    if world_size() == 1:
        return flag
    return not bool(max_over_ranks(torch.tensor([0 if flag else 1], device=device)).item())


def gather_objects(value: Any) -> list[Any]:
    """Every rank's picklable value, in rank order, on every rank. For small host-side facts only."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    torch_distributed.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """Rank 0's picklable value, on every rank."""
    if world_size() == 1:
        return value
    holder = [value]
    torch_distributed.broadcast_object_list(holder, src=0)
    return holder[0]


class _AllGather(torch.autograd.Function):
    """[R, ...] -> [W * R, ...], rank-major; backward sums the gradients of all ranks and returns our own rows.

    Own function because `torch.distributed.nn.functional.all_gather` returns wrong gradients on gloo when the incoming
    gradient is strided.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.new_empty((world_size() * len(x), *x.shape[1:]))
        with waiting(x.device):
            torch_distributed.all_gather_single(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        own = grad.new_empty((len(grad) // world_size(), *grad.shape[1:]))
        with waiting(grad.device):
            torch_distributed.reduce_scatter_single(own, grad.contiguous())
        return own


def gather(x: Tensor) -> Tensor:
    """[R, ...] on each rank -> [W * R, ...] on every rank, rank-major, with gradient. R must be equal on all ranks."""
    return _AllGather.apply(x) if world_size() > 1 else x


def gather_tokens(tokens: Tokens) -> Tokens:
    """Every rank's sequences, rank-major, as one packed Tokens with gradient.

    Ranks hold the same number of sequences B but different numbers of tokens: rows travel padded to the largest
    total and are packed again on arrival, so that no pad is ever seen outside this function.
    """
    if world_size() == 1:
        return tokens
    lengths = gather(tokens.lengths())  # [W * B]
    totals = lengths.view(world_size(), -1).sum(1)  # [W]
    facts = torch.stack([totals.max().int(), lengths.max()]).tolist()
    largest, longest = int(facts[0]), int(facts[1])
    padded = torch.cat([tokens.x, tokens.x.new_zeros((largest - len(tokens.x), *tokens.x.shape[1:]))])
    everything = gather(padded).view(world_size(), largest, *tokens.x.shape[1:])
    rows = torch.cat([everything[r, :total] for r, total in enumerate(totals.tolist())])  # [T_all, ...]
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=torch.int32)])
    return Tokens(rows, offsets.to(tokens.offsets.dtype), longest)


class PassedOn:
    """A tensor on its way to the next rank, and the previous rank's on its way here."""

    def __init__(self, sent: Tensor, tag: int):
        self._sent = sent.contiguous()
        self._arriving = torch.empty_like(self._sent)
        following, previous = (rank() + 1) % world_size(), (rank() - 1) % world_size()
        operations = [
            torch_distributed.P2POp(torch_distributed.isend, self._sent, following, tag=tag),
            torch_distributed.P2POp(torch_distributed.irecv, self._arriving, previous, tag=tag),
        ]
        self._works = torch_distributed.batch_isend_irecv(operations)

    def wait(self) -> Tensor:
        """The previous rank's tensor."""
        with waiting(self._sent.device):
            for work in self._works:
                work.wait()
        return self._arriving


def pass_on(x: Tensor, tag: int = 0) -> PassedOn:
    """Send a tensor to the next rank of the ring while work goes on; all ranks call it, with equal shapes.

    Tensors that are under way at the same time have different tags.
    """
    return PassedOn(x, tag)


class _LogSumExpOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        top = max_over_ranks(x)
        out = top + sum_over_ranks((x - top).exp()).log()
        ctx.save_for_backward(x, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, out = ctx.saved_tensors
        return sum_over_ranks(grad) * (x - out).exp()


def logsumexp_over_ranks(x: Tensor) -> Tensor:
    """log sum over ranks of exp(x), elementwise, with gradient; every rank gets the same values."""
    return _LogSumExpOverRanks.apply(x) if world_size() > 1 else x
