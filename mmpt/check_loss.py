"""W ranks against one process, on a few pairs: do the losses and gradients of a recipe agree here?

    mmpt check-loss --recipe filip.tiny --ranks 4              starts four processes on this node's CPU
    srun ... python -m mmpt.check_loss --recipe filip.vit_l14  in a job: the ranks, devices and fabric that will train

A gather without gradient, a loss divided by the wrong count, a fabric that corrupts: each shows as a difference. What a
paper defines per worker (`scope`, SLIP's gathered_gradient) is set to its global form first, and dropout to 0, because
one process has neither workers nor their random states.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmpt import config, dist
from mmpt.batch import Batch
from mmpt.methods.method import Method, loss_of
from mmpt.recipe import Recipe, parse_arguments
from mmpt.synthetic import synthetic_batch

PAIRS_PER_RANK = 2
TOLERANCE = 1e-4
"""Of fp32, relative to the loss and to the largest gradient: rounding is far below, mistakes are far above."""
ALIKE = {"dropout": "0", "attention_dropout": "0", "drop_path": "0", "drop_connect": "0", "scope": "global",
         "gathered_gradient": "true"}  # fmt: skip


class Result(NamedTuple):
    loss: float
    gradients: dict[str, Tensor]


def main(arguments: Sequence[str]) -> int:
    """0 where they agree, 1 where not, 2 for a wrong command line. Prints a line per task."""
    try:
        recipe = comparable(parse_arguments(arguments))
    except ValueError as error:
        if dist.launched_rank() == 0:
            print(f"check-loss: error: {error}", file=sys.stderr)
        return 2
    tasks = [task for task, _ in recipe.method.inputs().tasks] or [""]
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    alone = {task: of_all(recipe, task, ranks) for task in tasks}  # before there is a process group: W = 1
    device = dist.init()
    agree = [compared(recipe, task, alone[task], device) for task in tasks]  # all of them: they are collective
    dist.shutdown()
    return 0 if all(agree) else 1


def comparable(recipe: Recipe) -> Recipe:
    """The recipe with what one process cannot have set as ALIKE says."""
    paths = [path for path, _, _, _ in config.leaves(recipe) if path.startswith("method.")]
    return config.override(recipe, {path: ALIKE[path.split(".")[-1]] for path in paths if path.split(".")[-1] in ALIKE})


def of_all(recipe: Recipe, task: str, ranks: int) -> Result:
    """One process with the batch of all ranks, on the CPU."""
    method, batch = (
        built(recipe),
        synthetic_batch(recipe.method.inputs(), ranks * PAIRS_PER_RANK, recipe.run.seed, task),
    )
    terms = method("terms", batch)
    loss = loss_of(terms, method.counts(batch), 1)
    loss.backward()
    return Result(loss.item(), gradients(method))


def compared(recipe: Recipe, task: str, alone: Result, device: torch.device) -> bool:
    """Our share of the same batch with the other ranks; rank 0 says how far apart it is. Collective."""
    ranks = dist.world_size()
    whole = synthetic_batch(recipe.method.inputs(), ranks * PAIRS_PER_RANK, recipe.run.seed, task)
    own: Batch = whole.part(dist.rank() * PAIRS_PER_RANK, (dist.rank() + 1) * PAIRS_PER_RANK)
    method = built(recipe).to(device)
    if method.teacher is not None:
        method.teacher.to(device)
    terms = method("terms", own.to(device))
    counts = {name: torch.tensor(float(count), device=device) for name, count in method.counts(own).items()}
    totals = {name: dist.sum_over_ranks(count) for name, count in counts.items()}
    loss = loss_of(terms, totals, ranks)
    loss.backward()
    together = float(dist.sum_over_ranks(loss.detach())) / ranks
    worst, where = 0.0, ""
    largest = max(float(gradient.abs().max()) for gradient in alone.gradients.values())
    for name, gradient in gradients(method).items():
        averaged = dist.sum_over_ranks(gradient) / ranks
        difference = float((averaged.cpu() - alone.gradients[name]).abs().max()) / largest
        worst, where = max((worst, where), (difference, name))
    relative = abs(together / alone.loss - 1)
    agree = dist.all_true(relative < TOLERANCE and worst < TOLERANCE, device)
    if dist.rank() == 0:
        print(
            f"{f'task {task}: ' * bool(task)}{ranks} ranks {together:.7g}, one process {alone.loss:.7g}: apart by "
            f"{relative:.1e}; gradients by {worst:.1e} of the largest, in {where}: {'ok' if agree else 'NOT EQUAL'}"
        )
    return agree


def built(recipe: Recipe) -> Method:
    torch.manual_seed(recipe.run.seed)
    return recipe.method.build()


def gradients(method: Method) -> dict[str, Tensor]:
    """By name; zero where the task does not reach a parameter."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in method.named_parameters()
    }


def start_ranks(arguments: Sequence[str], ranks: int) -> int:
    """Run `main` in so many processes on this node's CPU; their worst exit status."""
    command = [sys.executable, "-m", "mmpt.check_loss", *arguments]
    place: dict[str, Any] = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(dist.free_port())}
    place |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "CUDA_VISIBLE_DEVICES": ""}
    started = [
        subprocess.Popen(command, env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]
    return max(process.wait() for process in started)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
