"""`mmpt checkpoint`: look at a run's checkpoints, check them, thin them out, and take weights out and in.

mmpt checkpoint list RUN_DIR                             what is there
mmpt checkpoint verify RUN_DIR                           read all of it and compare the digests
mmpt checkpoint prune RUN_DIR --keep-last 1              delete older ones, never the newest that is whole
mmpt checkpoint convert RUN_DIR OUT.safetensors          fp32 weights by name in one file ...
mmpt checkpoint convert IN.safetensors RUN_DIR           ... and back, for --run.init
"""

import argparse
import time
from pathlib import Path

from mmpt.engine.checkpoint_files import (
    Manifest,
    candidates,
    damage,
    newest_valid,
    prunable,
    read_manifest,
    remove,
    step_name,
)
from mmpt.engine.resume import checkpoints_of, find_checkpoint
from mmpt.engine.weights import read_tensors, write_tensors


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="checkpoint_verb", required=True, metavar="VERB")
    verb = verbs.add_parser("list", help="what is there; sizes are compared, contents are not read")
    verb.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    verb = verbs.add_parser("verify", help="read everything and compare the digests; status 1 if anything is damaged")
    verb.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a run directory, or one of its checkpoints")
    verb = verbs.add_parser("prune", help="delete all but the newest ones; never the newest that is whole")
    verb.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    verb.add_argument("--keep-last", type=int, required=True, metavar="N", help="keep so many, newest first")
    verb.add_argument("--keep-every-steps", type=int, default=0, metavar="M", help="keep multiples of this too [none]")
    verb.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    verb = verbs.add_parser("convert", help="weights to one safetensors file of fp32 tensors by name, or back")
    verb.add_argument("source", type=Path, metavar="SRC", help="a run directory or checkpoint; or a .safetensors file")
    verb.add_argument("out", type=Path, metavar="OUT", help="a new .safetensors file; or a new run directory")


def run(parsed: argparse.Namespace) -> None:
    {"list": run_list, "verify": run_verify, "prune": run_prune, "convert": run_convert}[parsed.checkpoint_verb](parsed)


def checkpoints_in(path: Path) -> list[Path]:
    """Of a run directory, oldest first; or the checkpoint itself. ValueError if there is none."""
    found = [path] if (path / "manifest.json").is_file() else candidates(checkpoints_of(path))[::-1]
    if not found:
        raise ValueError(f"{path} is neither a checkpoint nor a run directory with one")
    return found


def state_of(checkpoint: Path, digests: bool) -> tuple[Manifest | None, str]:
    """(its manifest, `whole` or why it cannot be used)."""
    try:
        manifest = read_manifest(checkpoint)
    except ValueError as error:
        return None, str(error)
    return manifest, damage(checkpoint, manifest, digests) or "whole"


def run_list(parsed: argparse.Namespace) -> None:
    print("step\tsaved\tranks\tzero\tprecision\tMiB\tstate")
    for checkpoint in checkpoints_in(parsed.run_dir):
        manifest, state = state_of(checkpoint, digests=False)
        facts: list[object] = ["?"] * 4
        if manifest:
            size = sum(file.bytes for file in manifest.files) / 2**20
            facts = [manifest.world_size, manifest.zero_stage, manifest.precision, f"{size:.1f}"]
        saved = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(checkpoint.stat().st_mtime))
        print(int(checkpoint.name.removeprefix("step-")), saved, *facts, state, sep="\t")


def run_verify(parsed: argparse.Namespace) -> None:
    """ValueError if any is damaged."""
    states = {path.name: state_of(path, digests=True)[1] for path in checkpoints_in(parsed.run_dir)}
    for name, state in states.items():
        print(name, state, sep="\t")
    damaged = [name for name, state in states.items() if state != "whole"]
    if damaged:
        raise ValueError(f"{len(damaged)} of {len(states)} checkpoints cannot be used: {', '.join(damaged)}")


def run_prune(parsed: argparse.Namespace) -> None:
    if parsed.keep_last < 1:
        raise ValueError(f"--keep-last wants a number from 1, got {parsed.keep_last}")
    folder = checkpoints_of(parsed.run_dir)
    newest = newest_valid(folder)
    if newest is None:
        raise ValueError(f"{parsed.run_dir} has no checkpoints")
    for path in prunable(folder, parsed.keep_last, parsed.keep_every_steps, protect=newest[0]):
        print(f"{'would delete' if parsed.dry_run else 'deleting'} {path}", flush=True)
        if not parsed.dry_run:
            remove(path)


def run_convert(parsed: argparse.Namespace) -> None:
    source, out = parsed.source, parsed.out
    if out.exists():
        raise ValueError(f"{out} exists; choose another name")
    if source.suffix == ".safetensors":
        print(read_tensors(source, checkpoints_of(out)))
        return
    if out.suffix != ".safetensors":
        raise ValueError(f"one of SRC and OUT should be a .safetensors file, got {source} and {out}")
    checkpoint, manifest, passed_over = find_checkpoint(source)
    for reason in passed_over:
        print(f"passed over {reason}")
    count = write_tensors(checkpoint, manifest, out)
    print(f"{out}: {count} tensors of {step_name(manifest.step)}")
