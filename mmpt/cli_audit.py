"""`mmpt audit RUN_DIR`: which samples a run has seen, and whether and when it has seen given ones."""

import argparse
import sys
from pathlib import Path

from mmpt import config
from mmpt.data.audit import exposures, seen, stand_ins_of
from mmpt.data.left_out import Stretches, delivered, delivered_until, is_left_out, join, step_of
from mmpt.data.loader import open_sources, plan_of
from mmpt.engine.progress import Progress
from mmpt.engine.resume import find_checkpoint
from mmpt.recipe import Recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a run directory")
    parser.add_argument(
        "--steps", default="", metavar="A:B", help="steps A + 1 to B, as 0:1000 for the first thousand [all so far]"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--takedown", type=Path, metavar="FILE", help="a list of keys, one per line: tell which were seen, and when"
    )
    what.add_argument(
        "--left-out", action="store_true",
        help="the samples that were not trained on: left out by a rollback, or in a step whose update was dropped",
    )  # fmt: skip


def run(parsed: argparse.Namespace) -> None:
    """Print a table with tabs. Without --takedown: step, position, epoch, shard, key of every sample."""
    recipe_file = parsed.run_dir / "recipe.yaml"
    if not recipe_file.is_file():
        raise ValueError(f"{parsed.run_dir} is not a run directory: it has no recipe.yaml")
    recipe = config.load_yaml(Recipe, recipe_file)
    _, checkpoint, passed_over = find_checkpoint(parsed.run_dir)
    for reason in passed_over:
        print(f"passed over {reason}", file=sys.stderr)
    batch, progress = recipe.run.global_batch, Progress(**checkpoint.state)
    first, last = parse_steps(parsed.steps, checkpoint.step)
    start, stop = (delivered_until(steps, batch, progress.left_out) for steps in (first, last))
    untrained = all_untrained(progress)
    if gone := sum(min(end, stop) - max(begin, start) for begin, end in untrained if begin < stop and end > start):
        print(f"{gone} samples here were not trained on; --left-out lists them", file=sys.stderr)
    sources, mixture = open_sources(recipe.data, recipe.run.seed, check_shards=True)
    stood_in = stand_ins_of(parsed.run_dir)
    if parsed.takedown is None:
        kept = delivered(start, stop, untrained)
        shown = delivered(start, stop, kept) if parsed.left_out else kept
        print("step\tposition\tepoch\tshard\tkey" + "\twhy" * parsed.left_out)
        for begin, end in shown:
            for sample in seen(sources, mixture, begin, end, stood_in):
                skipped = is_left_out(sample.position, progress.left_out)
                step = "-" if skipped else step_of(sample.position, batch, progress.left_out)
                why = ["left out by a rollback" if skipped else "its update was dropped"] * parsed.left_out
                print(step, *sample, *why, sep="\t")
        return
    wanted = frozenset(line.strip() for line in parsed.takedown.read_text().splitlines() if line.strip())
    plan = plan_of(recipe.data, recipe.method.inputs(), sources, mixture, recipe.run.seed)
    print("key", "times_seen", "steps", "shard", *["steps_with_other_texts"] * plan.inputs.partners, sep="\t")
    found = set()
    for exposure in exposures(sources, plan, wanted, stop, batch, stood_in):
        found.add(exposure.key)
        steps, others = (
            [step_of(p, batch, progress.left_out) for p in positions if p >= start and not is_left_out(p, untrained)]
            for positions in (exposure.positions, exposure.as_partner)
        )
        shown = [listed(others)] * plan.inputs.partners
        print(exposure.key, len(steps), listed(steps), exposure.shard, *shown, sep="\t")
    for key in sorted(wanted - found):
        print(key, 0, "not in the data", "-", *["-"] * plan.inputs.partners, sep="\t")


def listed(steps: list[int]) -> str:
    return ",".join(map(str, steps)) or "never"


def all_untrained(progress: Progress) -> Stretches:
    """Stretches of positions that no update was made of."""
    untrained: Stretches = progress.left_out
    for first, last in progress.unapplied:
        untrained = join(untrained, first, last)
    return untrained


def parse_steps(text: str, newest: int) -> tuple[int, int]:
    """`A:B` -> (A, B); nothing -> (0, newest). ValueError unless 0 <= A <= B <= newest."""
    first, colon, last = text.partition(":") if text else ("0", ":", str(newest))
    if not colon or not first.isdecimal() or not last.isdecimal() or not int(first) <= int(last) <= newest:
        raise ValueError(f"--steps wants A:B with A <= B <= {newest}, the newest checkpoint's step; got {text!r}")
    return int(first), int(last)
