"""The command line of a launch: the launcher's flags before --, train.py's after it."""

import argparse
import ast
import inspect
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from launcher import cluster
from launcher.cluster import Cluster, near_miss
from launcher.launch import Request

USAGE = "mmpt-launch CLUSTER [--nodes N --gpus-per-node G --time 24:00:00 ...] -- --recipe NAME [--field value ...]"


@dataclass(frozen=True)
class Invocation:
    request: Request
    dry_run: bool
    detach: bool


class Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse_launch(words: Sequence[str]) -> Invocation:
    """ValueError for a flag that is unknown, naming the near miss. Prints and exits for --help."""
    own, theirs = _split(words)
    parser = launch_parser()
    parsed, unknown = parser.parse_known_args(own)
    if unknown:
        known = [flag for action in parser._actions for flag in action.option_strings]
        hint = near_miss(unknown[0].partition("=")[0], known)
        after = "" if theirs else "; train.py's arguments come after --"
        raise ValueError(f"unknown argument {unknown[0]!r}{after or hint}")
    exclude = tuple(host for text in parsed.exclude for host in text.split(",") if host)
    request = Request(parsed.cluster, cluster_changes(parsed), tuple(theirs), tuple(parsed.sweep), parsed.name, exclude)
    return Invocation(request, parsed.dry_run, parsed.detach)


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    if "--" not in words:
        return list(words), []
    cut = list(words).index("--")
    return list(words[:cut]), list(words[cut + 1 :])


def launch_parser() -> Parser:
    """One flag for every value of the cluster file, and those of the launch itself."""
    parser = Parser(
        "mmpt-launch", USAGE, allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=120),
    )  # fmt: skip
    parser.add_argument("cluster", metavar="CLUSTER", help="a file of cluster_configs/, without .yaml, or a path")
    parser.add_argument("--name", help="the run directory's name in the cluster's folder of runs [the recipe's]")
    parser.add_argument(
        "--sweep", action="append", default=[], metavar="FIELD=V,V|FILE",
        help="one run for each value, as an array; several sweeps multiply; a YAML file maps fields to lists",
    )  # fmt: skip
    parser.add_argument("--exclude", action="append", default=[], metavar="NODES", help="nodes to keep away from")
    parser.add_argument("--dry-run", action="store_true", help="print the sbatch file, command and environment; stop")
    parser.add_argument("--detach", action="store_true", help="leave a local run to itself and return")
    add_cluster_flags(parser)
    return parser


def add_cluster_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("instead of the cluster file's values")
    documentation = field_documentation(Cluster)
    for name, kind in cluster.flags():
        names = [f"--{name.replace('_', '-')}", *(["--gpus-per-node"] if name == "ranks_per_node" else [])]
        text = f"{documentation[name]} [{kind}]".replace("%", "%%")
        group.add_argument(*names, dest=name, metavar="X", help=text)


def cluster_changes(parsed: argparse.Namespace) -> dict[str, str]:
    """The flags that were given, by field."""
    return {name: text for name, _ in cluster.flags() if (text := getattr(parsed, name)) is not None}


def field_documentation(kind: type) -> dict[str, str]:
    """The string under each field of a dataclass."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        text = following.value if isinstance(following, ast.Expr) else None
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            assert isinstance(text, ast.Constant), f"{statement.target.id} is not documented"
            found[statement.target.id] = " ".join(str(text.value).split())
    return found
