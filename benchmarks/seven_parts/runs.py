"""The runs: which recipe on what, at which learning rate and seed, and how far. A run that exists goes on or is left.

After a warm-up the learning rate stays as it is. So one run has, on its way, the model of every sample count, and both
tables, at equal samples and at equal FLOPs, are marks on the same curve.
"""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import torch

import mmpt.train
from mmpt.data.device import DeviceLoader
from mmpt.data.loader import build_loader
from mmpt.engine.checkpoint_files import step_name
from mmpt.flops import Counter
from mmpt.methods.method import loss_of
from mmpt.recipe import Recipe, parse_arguments
from seven_parts.data import CELLS

BATCH, WARM_UP_STEPS = 64, 50
LEARNING_RATES = (3e-4, 1e-3, 3e-3)
METHODS = ("clip", "align", "slip", "filip", "vilt", "uniter", "albef")
REFERENCE = "clip"
"""Its FLOPs at the wanted samples are what the table at equal FLOPs allows everybody."""
PATCHES = {
    "clip": "method.towers.image.patch_size", "slip": "method.towers.image.patch_size",
    "filip": "method.towers.image.patch_size", "vilt": "method.image.patch_size", "albef": "method.image.patch_size",
}  # fmt: skip
COUNTED_STEPS = 12
"""Whose FLOPs are averaged: UNITER's tasks differ."""


@dataclass(frozen=True)
class Run:
    method: str
    data: str
    seed: int
    lr: float
    shards: str = "train"
    alpha: float | None = None
    """ALBEF's; None is the recipe's."""

    def folder(self, root: Path) -> Path:
        name = self.method if self.alpha is None else f"{self.method}-alpha-{self.alpha:g}"
        return (
            root / "runs" / self.data / self.shards.replace("/", "-") / name / f"lr-{self.lr:g}" / f"seed-{self.seed}"
        )

    def flags(self, root: Path, samples: int) -> list[str]:
        data = root / "data" / self.data
        flags = {
            "recipe": f"{self.method}.tiny", "data.shards": data / self.shards, "data.tokenizer": data / "tokenizer",
            "data.workers": 0, "run.dir": self.folder(root), "run.seed": self.seed, "run.global_batch": BATCH,
            "run.samples": samples, "run.checkpoint_every_steps": 10**9, "run.keep_last": 100, "engine.zero_stage": 0,
            "optim.lr": self.lr, "optim.warmup_steps": WARM_UP_STEPS, "optim.decay": "constant",
        }  # fmt: skip
        if self.method in PATCHES:
            flags[PATCHES[self.method]] = 64 // CELLS
        if self.method == "uniter":
            flags["method.regions.most"] = CELLS**2
        if self.alpha is not None:
            flags["method.alpha"] = self.alpha
        return [word for name, value in flags.items() for word in (f"--{name}", str(value))]

    def recipe(self, root: Path) -> Recipe:
        return parse_arguments(self.flags(root, BATCH))

    def checkpoint(self, root: Path, step: int) -> Path:
        return self.folder(root) / "checkpoints" / step_name(step)


def train(root: Path, run: Run, step: int) -> None:
    """Train to this step and leave a checkpoint there. RuntimeError if it failed; its log says why."""
    run.folder(root).mkdir(parents=True, exist_ok=True)
    with open(run.folder(root) / "log", "a") as log, redirect_stdout(log), redirect_stderr(log):
        status = mmpt.train.main([*run.flags(root, 10**9), "--run.stop_at_step", str(step)])
    if status:
        raise RuntimeError(f"{run} ended with status {status}: {run.folder(root) / 'log'}")


def pool(jobs: int) -> ProcessPoolExecutor:
    """Processes of one thread that live for one call each, forked from one that has imported everything."""
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
    context = get_context("forkserver")
    context.set_forkserver_preload(["seven_parts.scores", "seven_parts.runs"])
    return ProcessPoolExecutor(jobs, context, max_tasks_per_child=1)


def train_all(root: Path, runs: dict[Run, list[int]], jobs: int) -> None:
    """Each to its steps, ascending; side by side, `jobs` at a time with a core each."""
    for mark in range(max(map(len, runs.values()))):
        missing = {
            run: steps[mark]
            for run, steps in runs.items()
            if mark < len(steps) and not run.checkpoint(root, steps[mark]).exists()
        }
        with pool(jobs) as processes:
            waiting = {run: processes.submit(train, root, run, step) for run, step in missing.items()}
            for i, (run, future) in enumerate(waiting.items()):
                future.result()
                print(f"[{i + 1}/{len(waiting)}] {run}", flush=True)


@cache
def flops_per_pair(root: Path, run: Run) -> float:
    """Of one pair's share of a step, forward and backward, by torch's formulas on the data itself. What a method
    computes without gradient (ALBEF's copy) counts; element by element arithmetic (transport plans) does not."""
    file = run.folder(root).parent / "flops_per_pair.json"
    if file.exists():
        return json.loads(file.read_text())
    os.environ["MMPT_LATE_INTERACTION"] = "torch"  # matrix products that the formulas know
    try:
        found = count(run.recipe(root))
    finally:
        del os.environ["MMPT_LATE_INTERACTION"]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found))
    return found


def count(recipe: Recipe) -> float:
    device = torch.device("cpu")
    torch.manual_seed(0)
    method = recipe.method.build()
    loader = build_loader(recipe.data, recipe.method.inputs(), 0, BATCH, 0, 1, 0, [])
    deliveries = DeviceLoader(loader, device, recipe.cut(1), overlap=False)
    with Counter() as counter:
        for _, delivery in zip(range(COUNTED_STEPS), deliveries, strict=False):
            for batch in delivery.micro_batches:
                totals = {name: torch.tensor(float(n)) for name, n in method.counts(batch).items()}
                loss_of(method.terms(batch), totals, 1).backward()
    deliveries.close()
    return counter.flops / (COUNTED_STEPS * BATCH)


def marks(root: Path, data: str, samples: int) -> dict[str, tuple[int, int]]:
    """Of each method: the step at which it has seen so many pairs, and that at which it has spent the reference's
    FLOPs for them."""
    each = {method: flops_per_pair(root, Run(method, data, 0, LEARNING_RATES[0])) for method in METHODS}
    step = samples // BATCH
    return {method: (step, round(step * each[REFERENCE] / flops)) for method, flops in each.items()}
