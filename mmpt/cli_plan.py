"""`mmpt plan --recipe filip.vit_l14 --gpus 64`: memory and FLOPs per device before anything runs."""

import argparse
from collections.abc import Sequence

from mmpt.plan import Setting, gib, memory, work
from mmpt.plan_knobs import knobs
from mmpt.recipe import parse_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recipe", required=True, metavar="NAME", help="a recipe, or a recipe.yaml; its flags may follow"
    )
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="devices that share the global batch")
    parser.add_argument("--global-batch", type=int, metavar="N", help="pairs per step [the recipe's]")
    parser.add_argument(
        "--mean-tokens", type=float, default=20.0, metavar="N", help="tokens of a text, on average [20]"
    )
    parser.add_argument("--gpu-gib", type=float, default=80.0, metavar="N", help="memory of a device, in GiB [80]")


def run(parsed: argparse.Namespace, flags: Sequence[str]) -> None:
    """Print the plan. Raises ValueError for flags of the recipe that are wrong, or numbers that cannot be."""
    if parsed.gpus < 1 or parsed.mean_tokens < 1 or parsed.gpu_gib <= 0:
        raise ValueError(
            f"--gpus ({parsed.gpus}) and --mean-tokens ({parsed.mean_tokens:g}) are 1 or more, "
            f"--gpu-gib ({parsed.gpu_gib:g}) is above 0"
        )
    batch = [] if parsed.global_batch is None else ["--run.global_batch", str(parsed.global_batch)]
    recipe = parse_arguments(["--recipe", parsed.recipe, *batch, *flags])
    print("\n".join(lines(Setting(recipe, parsed.gpus, parsed.mean_tokens), parsed)))


def lines(setting: Setting, parsed: argparse.Namespace) -> list[str]:
    recipe, parts = setting.recipe, memory(setting)
    total, available = sum(part.bytes for part in parts), parsed.gpu_gib * (1 << 30)
    out = [
        f"{parsed.recipe}: {recipe.run.global_batch:,} pairs on {setting.devices} devices, {setting.pairs} each in "
        f"{-(-setting.pairs // setting.micro_pairs)} micro-batch(es); {recipe.engine.precision}, ZeRO "
        f"{recipe.engine.zero_stage}; texts of {setting.mean_tokens:g} tokens",
        "",
        f"{'memory per device':32}{'GiB':>9}",
    ]
    out += [f"  {part.name:30}{gib(part.bytes):>9}  {part.why}" for part in parts]
    verdict = "fits into" if total <= available else "DOES NOT FIT into"
    out += [f"  {'together':30}{gib(total):>9}  {verdict} {parsed.gpu_gib:g} GiB", ""]
    works = work(setting)
    flops = sum(part.flops for part in works)
    out += [f"{'work per step and device':32}{'TFLOP':>9}"]
    out += [f"  {part.name:30}{part.flops / 1e12:>9.2f}  {part.flops / flops:.0%}" for part in works]
    out += ["", f"{'what would save memory':62}{'GiB':>9}{'work':>8}"]
    for knob in knobs(setting):
        fits = "" if total <= available or knob.bytes > available else "  fits"
        out.append(f"  {knob.flags:60}{gib(knob.bytes):>9}{knob.flops / flops - 1:>+8.0%}{fits}")
    return out
