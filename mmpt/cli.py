"""`mmpt`: look at runs. Training itself is `deepspeed mmpt/train.py`.

    mmpt recipes                                             every recipe with its number of parameters
    mmpt eval RUN_DIR --task retrieval:SHARDS                zero-shot classification, retrieval, scenes
    mmpt plan --recipe filip.vit_l14 --gpus 64               memory and FLOPs per device, before anything runs
    mmpt bench step --recipe filip.vit_b32                   pairs per second, MFU and memory on this device
    mmpt check-loss --recipe filip.tiny --ranks 4            W ranks against one process: losses and gradients
    mmpt checkpoint verify RUN_DIR                           are they whole? also list, prune, convert
    mmpt report RUN_DIR                                      RUN_DIR/report.html, and its tables here
    mmpt explain RUN_DIR SHARDS                              what ALBEF's momentum copy believes of some samples
    mmpt import SRC OUT --as clip.vit_b32                    foreign weights as a run, for --run.init and eval
    mmpt export RUN_DIR OUT --to hf                          a run's weights for transformers, open_clip, ...
    mmpt from-open-clip "COMMAND LINE"                       the same run as flags of a recipe

`deepspeed --num_accelerators 8 --module mmpt.cli eval RUN_DIR ...` shares the evaluation among eight ranks.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from mmpt import (
    check_loss,
    cli_audit,
    cli_bench,
    cli_checkpoint,
    cli_convert,
    cli_explain,
    cli_plan,
    config,
    dist,
    failure,
)  # fmt: skip
from mmpt.data.text import load_tokenizer
from mmpt.engine.resume import find_checkpoint
from mmpt.engine.weights import load_weights
from mmpt.evals.findings import find, text_table
from mmpt.evals.maps import aligned
from mmpt.evals.report import write_report
from mmpt.evals.suite import EvalConfig, Rank, evaluate
from mmpt.methods.method import Method
from mmpt.recipe import Recipe, load, names

TASKS = ("retrieval", "zero_shot", "scenes")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed (one line says why), 2 the command line is wrong."""
    parser = argparse.ArgumentParser("mmpt", description="Look at runs; training is `deepspeed mmpt/train.py`.")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # given by deepspeed
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verbs.add_parser("recipes", help="every recipe with its number of parameters")
    verb = verbs.add_parser("eval", help="evaluate the newest checkpoint of a run")
    add_evaluation_arguments(verb)
    verb = verbs.add_parser("report", help="write report.html and print its tables")
    add_evaluation_arguments(verb)
    verb.add_argument("--title", default="", help="heading of the report [the run directory's name]")
    cli_explain.add_arguments(verbs.add_parser("explain", help="show what ALBEF's momentum copy believes"))
    cli_audit.add_arguments(verbs.add_parser("audit", help="tell which samples a run has seen, and when"))
    cli_checkpoint.add_arguments(verbs.add_parser("checkpoint", help="list, verify, prune or convert checkpoints"))
    verb = verbs.add_parser("plan", help="tell what a recipe will need on each device", allow_abbrev=False)
    cli_plan.add_arguments(verb)
    verb = verbs.add_parser("bench", help="measure a training step of a recipe here", allow_abbrev=False)
    cli_bench.add_arguments(verb)
    verb = verbs.add_parser("check-loss", help="hold W ranks against one process", allow_abbrev=False)
    verb.add_argument("--ranks", type=int, default=2, metavar="W", help="processes on this node's CPU [2]")
    for name, text in cli_convert.VERBS.items():
        verbs.add_parser(name, help=text, add_help=False, prefix_chars="\0")  # it reads its own arguments
    parsed, flags = parser.parse_known_args(arguments)
    if flags and parsed.verb not in ("plan", "bench", "check-loss", *cli_convert.VERBS):
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    run = {"recipes": print_recipes, "eval": run_eval, "report": run_report, "audit": cli_audit.run,
           "explain": run_explain, "checkpoint": cli_checkpoint.run}  # fmt: skip
    try:
        if parsed.verb == "check-loss":
            return check_loss.start_ranks(flags, parsed.ranks)
        if parsed.verb == "plan":
            cli_plan.run(parsed, flags)
        elif parsed.verb == "bench":
            cli_bench.run(parsed, flags)
        elif parsed.verb in cli_convert.VERBS:
            cli_convert.run(parsed.verb, flags)
        else:
            run[parsed.verb](parsed)
    except (ValueError, OSError, RuntimeError) as error:
        failure.report("mmpt", error)
        return 1
    dist.shutdown()
    return 0


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a run directory, or one of its checkpoints")
    parser.add_argument(
        "--task", action="append", default=[], metavar="KIND:SHARDS",
        help=f"what to evaluate on what, KIND one of {', '.join(TASKS)}; may be given again [those of the recipe]",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=0, metavar="N", help="images or texts per forward [the recipe's]")


def print_recipes(_: argparse.Namespace) -> None:
    for name in names():
        with torch.device("meta"):
            method = load(name).method.build()
        print(f"{name:20}{sum(parameter.numel() for parameter in method.parameters()):>15,} parameters")


def run_eval(parsed: argparse.Namespace) -> None:
    """Print the scores and append them to RUN_DIR/evals.jsonl. Distributed over the ranks that were launched."""
    device = dist.init()
    recipe, method, step = load_run(parsed.run_dir, device)
    evals = evaluation_of(recipe, parsed)
    with torch.no_grad():
        what = (evals, recipe.data, recipe.method.inputs())
        scores = evaluate(*what, method, method, device) | aligned(*what, method, device)
    if dist.rank() == 0:
        for name, value in scores.items():
            print(f"{name:60} {value:.4f}")
        record = {"step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%S"), **scores}
        with open(run_dir_of(parsed.run_dir) / "evals.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")


def run_report(parsed: argparse.Namespace) -> None:
    """Write RUN_DIR/report.html and print its tables and its path. In one process."""
    device = dist.init()
    recipe, method, step = load_run(parsed.run_dir, device)
    evals, inputs, run_dir = evaluation_of(recipe, parsed), recipe.method.inputs(), run_dir_of(parsed.run_dir)
    torch.manual_seed(recipe.run.seed)
    untrained = recipe.method.build().to(device).eval()
    with torch.no_grad():
        findings = find(evals, recipe.data, inputs, method, untrained, device)
        title = parsed.title or run_dir.name
        path = write_report(
            run_dir, title, f"{type(method).__name__} after {step} steps of {recipe.run.global_batch} pairs.",
            findings, evals, recipe.data, inputs, method, device,
        )  # fmt: skip
    print(text_table(findings, evals))
    print(f"\nreport: {path}")


def run_explain(parsed: argparse.Namespace) -> None:
    """What the momentum copy believes, printed. In one process."""
    device = dist.init()
    recipe, method, _ = load_run(Path(parsed.run_dir), device)
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    rank = Rank(recipe.evals, recipe.data, recipe.method.inputs(), method, device, tokenizer)
    cli_explain.run(rank, method, parsed)


def run_dir_of(path: Path) -> Path:
    """The run directory that a run directory or one of its checkpoints belongs to."""
    return path.parents[1] if (path / "manifest.json").is_file() else path


def load_run(path: Path, device: torch.device) -> tuple[Recipe, Method, int]:
    """The recipe, the model with the newest checkpoint's weights in evaluation mode, and its step. Collective."""
    recipe_file = run_dir_of(path) / "recipe.yaml"
    if not recipe_file.is_file():
        raise ValueError(f"{path} is not a run directory: it has no recipe.yaml")
    recipe = config.load_yaml(Recipe, recipe_file)
    checkpoint, manifest, passed_over = find_checkpoint(path)
    for reason in passed_over:
        print(f"passed over {reason}", file=sys.stderr)
    method = recipe.method.build()
    load_weights(checkpoint, manifest, method)
    return recipe, method.to(device).eval(), manifest.step


def evaluation_of(recipe: Recipe, parsed: argparse.Namespace) -> EvalConfig:
    """The recipe's evaluation with the command line's tasks in place of its own."""
    tasks: dict[str, tuple[str, ...]] = dict.fromkeys(TASKS, ())
    for text in parsed.task:
        kind, _, folder = text.partition(":")
        if kind not in TASKS or not folder:
            raise ValueError(f"--task wants KIND:SHARDS with KIND one of {', '.join(TASKS)}, got {text!r}")
        tasks[kind] += (folder,)
    evals = replace(recipe.evals, batch=parsed.batch or recipe.evals.batch)
    evals = replace(evals, **tasks) if parsed.task else evals
    if not any(getattr(evals, kind) for kind in TASKS):
        raise ValueError("nothing to evaluate: the recipe names no data set; give --task KIND:SHARDS")
    return evals


if __name__ == "__main__":
    sys.exit(main())
