"""`mmpt bench step --recipe filip.vit_b32`: how fast a training step of a recipe is on this device.

One process, one micro-batch per step, batches of nothing in particular already on the device: no data is read and
nothing is exchanged.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from typing import NamedTuple

import torch

from mmpt import dist
from mmpt.engine.build import build, check_precision
from mmpt.engine.metrics import memory_gib
from mmpt.engine.step import train_step
from mmpt.flops import Utilisation
from mmpt.recipe import Recipe, parse_arguments
from mmpt.synthetic import synthetic_batch

WARM_UP_STEPS = 3
"""At least; every task of the method is met once."""


class Measured(NamedTuple):
    device: str
    pairs: int
    mean_text_tokens: float
    step_seconds: list[float]
    """Of each measured step, the device having come to rest."""
    memory_gib: float
    speed: dict[str, float]
    """What `Utilisation` knows at the median step."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["step"], metavar="step", help="a whole training step")
    parser.add_argument(
        "--recipe", required=True, metavar="NAME", help="a recipe, or a recipe.yaml; its flags may follow"
    )
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="steps that are measured [20]")
    parser.add_argument(
        "--micro-batch", type=int, metavar="M", help="pairs per step [engine.max_micro_batch, or the global batch]"
    )


def run(parsed: argparse.Namespace, flags: Sequence[str]) -> None:
    """Print what was measured. ValueError for flags that are wrong or numbers that cannot be."""
    if parsed.steps < 1 or (parsed.micro_batch is not None and parsed.micro_batch < 1):
        raise ValueError(f"--steps ({parsed.steps}) and --micro-batch ({parsed.micro_batch}) are 1 or more")
    recipe = parse_arguments(["--recipe", parsed.recipe, *flags])
    pairs = parsed.micro_batch or min(recipe.engine.max_micro_batch, recipe.run.global_batch)
    print("\n".join(lines(recipe, measure(recipe, parsed.steps, pairs))))


def measure(recipe: Recipe, steps: int, pairs: int) -> Measured:
    """Train `steps` steps after a warm-up, on one batch per task in turn."""
    device = dist.init()
    if dist.world_size() > 1:
        raise ValueError(f"mmpt bench step measures one process, and {dist.world_size()} were launched")
    check_precision(recipe.engine, device)
    engine_config = replace(recipe.engine, max_micro_batch=pairs, max_micro_batch_tokens=0)
    recipe = replace(recipe, run=replace(recipe.run, global_batch=pairs), engine=engine_config)
    torch.manual_seed(recipe.run.seed)
    engine = build(recipe.method.build(), recipe.engine, recipe.optim, pairs, device)
    inputs, utilisation = recipe.method.inputs(), Utilisation(recipe, device)
    tasks = [task for task, _ in inputs.tasks] or [""]
    batches = [synthetic_batch(inputs, pairs, recipe.run.seed + i, task).to(device) for i, task in enumerate(tasks)]
    warm_up, seconds = max(WARM_UP_STEPS, len(tasks)), list[float]()
    for step, batch in zip(range(warm_up + steps), cycle(batches), strict=False):
        _rest(device)
        began = time.perf_counter()
        with utilisation.counting([batch], engine.method.couples_pairs):
            result = train_step(engine, [batch], recipe.optim.lr)[0]
        _rest(device)
        if step >= warm_up:
            seconds.append(time.perf_counter() - began)
        if not result.applied and recipe.engine.precision != "fp16":
            raise RuntimeError(f"step {step + 1} had a gradient that is not finite: its time would mean nothing")
    mean_tokens = sum(len(batch.text.x) for batch in batches) / (pairs * len(batches))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    speed = utilisation.record(mean_tokens, pairs / statistics.median(seconds))
    return Measured(name, pairs, mean_tokens, seconds, memory_gib(), speed)


def _rest(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def lines(recipe: Recipe, found: Measured) -> list[str]:
    median = statistics.median(found.step_seconds)
    memory = "peak memory of the device" if torch.cuda.is_available() else "peak memory of the process"
    out = [
        f"{found.device}: {type(recipe.method).__name__.removesuffix('Config')}, {recipe.engine.precision}, ZeRO "
        f"{recipe.engine.zero_stage}, {found.pairs} pairs with texts of {found.mean_text_tokens:.1f} tokens",
        f"{'pairs per second':32}{found.pairs / median:>12.1f}",
        f"{'step, median':32}{1e3 * median:>12.1f} ms of {len(found.step_seconds)} "
        f"({1e3 * min(found.step_seconds):.1f} to {1e3 * max(found.step_seconds):.1f})",
        f"{memory:32}{found.memory_gib:>12.2f} GiB",
    ]
    tflops, mfu = (found.speed.get(key) for key in ("model_tflops_per_second_per_device", "mfu"))
    out.append(f"{'model TFLOP per second':32}" + (f"{tflops:>12.3f}" if tflops is not None else f"{'not known':>12}"))
    out.append(f"{'MFU':32}" + (f"{mfu:>12.1%}" if mfu is not None else f"{'peak unknown':>12}"))
    return out
