"""A run, whole: one method, one data mixture, one optimiser, one engine, and how long.

A recipe is a function in mmpt/recipes/ that returns a `Recipe`; `--recipe filip.vit_l14` names it, flags change single
fields, and the resolved tree is saved in the run directory as recipe.yaml, which `--recipe` takes too.
"""

import argparse
import importlib
import inspect
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NoReturn

import mmpt.recipes
from mmpt import config, dist
from mmpt.data.loader import DataConfig
from mmpt.data.micro_batches import TokenBudget
from mmpt.engine.build import EngineConfig
from mmpt.engine.guard import GuardConfig
from mmpt.engine.optim import OptimConfig
from mmpt.engine.profile import check_steps
from mmpt.engine.resume import holds_imported_weights
from mmpt.evals.suite import EvalConfig
from mmpt.methods.method import MethodConfig


@dataclass(frozen=True)
class RunConfig(GuardConfig):
    """What to train on how much, how often to record and save, and (GuardConfig) what to do when something happens."""

    dir: str
    """Run directory: recipe, metrics, TensorBoard, checkpoints and report live here; an existing run is continued."""
    global_batch: int
    """Pairs per optimizer step, over all ranks and micro-batches."""
    samples: int
    """Train until this many pairs were seen, counting repeats."""
    seed: int = 0
    """Keys the sample order, every random choice about a sample, initial weights and dropout."""
    init: str | None = None
    """Start from the weights of this run directory or checkpoint (fine-tuning), with a new optimizer and data state."""
    log_every_steps: int = 10
    """Steps between records in metrics.jsonl and TensorBoard; ranks and device synchronise only then."""
    checkpoint_every_steps: int = 1000
    """Steps between checkpoints; one more is written at the end."""
    keep_last: int = 3
    """Checkpoints to keep, newest first."""
    keep_every_steps: int = 0
    """Checkpoints at multiples of this are kept for good; 0 keeps none."""
    stop_at_step: int | None = None
    """Save and stop at this step, without changing the schedule; the same command continues."""
    profile_steps: tuple[int, ...] = ()
    """First and last step, from 1 on, that are profiled on rank 0 into the run directory's profile/; empty: none."""
    prometheus_port: int = 0
    """Serve the core numbers to Prometheus at this port of the loopback interface too; 0 writes metrics.prom alone."""

    def __post_init__(self):
        super().__post_init__()
        config.at_least(
            1, self, "global_batch", "samples", "log_every_steps", "checkpoint_every_steps", "keep_last",
            *(["stop_at_step"] if self.stop_at_step is not None else []),
        )  # fmt: skip
        config.at_least(0, self, "keep_every_steps", "prometheus_port")
        check_steps(self.profile_steps)


@dataclass(frozen=True)
class Recipe:
    method: MethodConfig
    data: DataConfig
    optim: OptimConfig
    engine: EngineConfig
    evals: EvalConfig
    run: RunConfig

    def total_steps(self) -> int:
        """Optimizer steps of the whole run: samples / global batch, rounded up."""
        return -(-self.run.samples // self.run.global_batch)

    def micro_batches(self, world_size: int) -> int:
        """Forward passes per rank and step: the fewest that divide its share evenly into max_micro_batch or less.

        ValueError if the ranks cannot share the global batch evenly.
        """
        if self.run.global_batch % world_size:
            raise ValueError(f"run.global_batch={self.run.global_batch} cannot be shared by {world_size} ranks evenly")
        share = self.run.global_batch // world_size
        return next(n for n in range(1, share + 1) if share % n == 0 and share // n <= self.engine.max_micro_batch)

    def cut(self, world_size: int) -> int | TokenBudget:
        """How a rank's share becomes micro-batches: into so many equal ones, or by a budget of tokens."""
        parts, budget = self.micro_batches(world_size), self.engine.max_micro_batch_tokens
        return parts if budget < 1 else TokenBudget(budget, self.method.inputs().kept_patches)


MAY_CHANGE_ON_RESUME = (
    "engine.",
    "evals.",
    "data.workers",
    "run.dir",
    "run.log_every_steps",
    "run.checkpoint_every_steps",
    "run.keep_last",
    "run.keep_every_steps",
    "run.stop_at_step",
    "run.profile_steps",
    "run.prometheus_port",
    *(f"run.{field.name}" for field in fields(GuardConfig)),
)


def check_same_run(now: Recipe, before: Recipe) -> None:
    """ValueError that names the first field in which a resumed run differs in what it computes."""
    old = {path: value for path, _, value, _ in config.leaves(before)}
    for path, _, value, _ in config.leaves(now):
        if old.get(path) != value and not path.startswith(MAY_CHANGE_ON_RESUME):
            raise ValueError(
                f"{now.run.dir} holds a run with {path}={old.get(path)}, and this one has {value}; "
                "choose another --run.dir, or start from its weights with --run.init"
            )


def open_run_dir(recipe: Recipe) -> None:
    """Make the run directory and save the recipe in it; ValueError if it holds a run of another recipe. Collective."""
    run_dir, problem = Path(recipe.run.dir), ""
    if dist.rank() == 0:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            saved = run_dir / "recipe.yaml"
            if holds_imported_weights(run_dir):
                raise ValueError(
                    f"{run_dir} holds imported weights; start another --run.dir from them with --run.init {run_dir}"
                )
            if saved.exists() and (run_dir / "metrics.jsonl").exists():
                check_same_run(recipe, config.load_yaml(Recipe, saved))
            config.save_yaml(recipe, saved)
        except (ValueError, OSError) as error:
            problem = str(error)
    if problem := dist.broadcast_object(problem):
        raise ValueError(problem)


def load(name: str) -> Recipe:
    """The recipe of a name such as `clip.vit_b32`, or of a recipe.yaml. ValueError that names the near miss."""
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise ValueError(f"recipe file {name} does not exist")
        return config.load_yaml(Recipe, Path(name))
    known = names()
    if name not in known:
        raise ValueError(f"unknown recipe {name!r}{config.near_miss(name, known)} (known: {', '.join(known)})")
    module, _, function = name.partition(".")
    return getattr(importlib.import_module(f"mmpt.recipes.{module}"), function)()


def names() -> list[str]:
    """Every recipe: the functions of mmpt/recipes/*.py that need no arguments and return a Recipe."""
    found = []
    for module in pkgutil.iter_modules(mmpt.recipes.__path__):
        contents = vars(importlib.import_module(f"mmpt.recipes.{module.name}"))
        for name, value in contents.items():
            own = inspect.isfunction(value) and value.__module__ == f"mmpt.recipes.{module.name}"
            if own and not name.startswith("_") and inspect.signature(value).return_annotation is Recipe:
                found.append(f"{module.name}.{name}")
    return sorted(found)


class _Parser(argparse.ArgumentParser):
    """Errors in one line, without the usage of two hundred flags."""

    def error(self, message: str):  # type: ignore[override]
        raise ValueError(message)


def parse_arguments(arguments: Sequence[str]) -> Recipe:
    """The recipe with its flags applied. Prints and exits for --help; ValueError for a bad recipe, flag or value.

    Order: the recipe function's values, then flags.
    """
    first = _Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe")
    first.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # given by deepspeed; the env decides
    first.add_argument("-h", "--help", action="store_true")
    known, rest = first.parse_known_args(list(arguments))
    if known.recipe is None and not known.help:
        raise ValueError(f"--recipe is needed: one of {', '.join(names())}, or the path of a recipe.yaml")
    if known.recipe is None:
        _print_and_exit(
            f"usage: deepspeed mmpt/train.py --recipe NAME [--field value ...]\nrecipes: {', '.join(names())}"
        )
    recipe = load(known.recipe)
    parser = _Parser(
        "train.py", f"deepspeed mmpt/train.py --recipe {known.recipe} [--field value ...]", add_help=False,
        allow_abbrev=False, formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=44, width=120),
    )  # fmt: skip
    config.add_flags(parser, recipe)
    if known.help:
        _print_and_exit(parser.format_help())
    flags, unknown = parser.parse_known_args(rest)
    if unknown:
        paths = [path for path, _, _, _ in config.leaves(recipe)]
        name = unknown[0].lstrip("-").split("=")[0]
        raise ValueError(f"unknown flag {unknown[0]!r}{config.near_miss(name, paths)}")
    return config.override(recipe, vars(flags))


def _print_and_exit(text: str) -> NoReturn:
    """One copy, though every rank parses the same command line."""
    if dist.launched_rank() == 0:
        print(text)
    raise SystemExit(0)
