"""What is to be run, as pure functions: one run for each point of a sweep, each with its directory and arguments."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

RUN_DIR_FLAG = "--run.dir"
SWEEP_FILE = "sweep.json"


@dataclass(frozen=True)
class Run:
    dir: Path
    """Absolute."""
    arguments: tuple[str, ...]
    """Of train.py, --run.dir among them."""


def plan_runs(arguments: Sequence[str], sweeps: Sequence[str], runs: Path, name: str | None) -> list[Run]:
    """The runs of one launch. ValueError for a sweep that cannot be read or a run without a name.

    A run's directory is --run.dir where `arguments` have it, else `runs`/name, else `runs`/the recipe's name. The
    points of a sweep get directories in it, named by what differs: `lr=1e-3_seed=0`.
    """
    base = _base(arguments, runs, name)
    rest = _without(arguments, RUN_DIR_FLAG)
    points = sweep_points(sweeps)
    if not points:
        return [Run(base, (*rest, RUN_DIR_FLAG, str(base)))]
    found = []
    for point, label in zip(points, labels(points), strict=True):
        flags = [text for field, value in point.items() for text in (f"--{field}", value)]
        folder = base / label
        found.append(Run(folder, (*rest, *flags, RUN_DIR_FLAG, str(folder))))
    return found


def _base(arguments: Sequence[str], runs: Path, name: str | None) -> Path:
    given = value_of(arguments, RUN_DIR_FLAG)
    recipe = value_of(arguments, "--recipe")
    if given is not None and name is not None:
        raise ValueError("--name and --run.dir both name the run directory; give one")
    if given is not None:
        base = Path(given).absolute()
    elif name is not None:
        base = runs / name
    elif recipe is None:
        raise ValueError("the arguments after -- lack --recipe NAME")
    elif recipe.endswith((".yaml", ".yml")):
        raise ValueError(f"a run of {recipe} needs a directory of its own: --name NAME, or --run.dir DIR after --")
    else:
        base = runs / recipe
    if "%" in str(base):
        raise ValueError(f"the run directory {base} holds a %, which SLURM reads as a pattern")
    return base


def value_of(arguments: Sequence[str], flag: str) -> str | None:
    """The last value of a flag given as `--flag value` or `--flag=value`."""
    found = None
    for i, text in enumerate(arguments):
        if text == flag and i + 1 < len(arguments):
            found = arguments[i + 1]
        elif text.startswith(f"{flag}="):
            found = text.partition("=")[2]
    return found


def _without(arguments: Sequence[str], flag: str) -> list[str]:
    rest, skip = [], False
    for text in arguments:
        if not skip and text != flag and not text.startswith(f"{flag}="):
            rest.append(text)
        skip = not skip and text == flag
    return rest


def sweep_points(sweeps: Sequence[str]) -> list[dict[str, str]]:
    """Every combination of the given sweeps: `field=v1,v2`, or a YAML file with a mapping of fields to lists of values
    (all their combinations) or a list of mappings (these points and no others)."""
    if not sweeps:
        return []
    axes = [_file_points(Path(text)) if text.endswith((".yaml", ".yml")) else _flag_points(text) for text in sweeps]
    points = []
    for combination in itertools.product(*axes):
        point: dict[str, str] = {}
        for part in combination:
            if twice := point.keys() & part.keys():
                raise ValueError(f"{sorted(twice)[0]} is swept twice")
            point |= part
        points.append(point)
    if len({tuple(sorted(point.items())) for point in points}) < len(points):
        raise ValueError("the sweep holds the same point twice")
    return points


def _flag_points(text: str) -> list[dict[str, str]]:
    field, equals, values = text.partition("=")
    if not equals or not _is_field(field) or not all(values.split(",")):
        raise ValueError(f"--sweep wants FIELD=VALUE,VALUE,... or a YAML file, got {text!r}")
    return [{field: value} for value in values.split(",")]


def _file_points(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise ValueError(f"sweep file {path} does not exist")
    try:
        data = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    if isinstance(data, dict) and data and all(isinstance(values, list) and values for values in data.values()):
        axes = [[(field, value) for value in values] for field, values in data.items()]
        points: list[dict[str, Any]] = [dict(point) for point in itertools.product(*axes)]
    elif isinstance(data, list) and data and all(isinstance(point, dict) and point for point in data):
        points = data
    else:
        raise ValueError(f"{path}: should map fields to lists of values, or list mappings of fields to values")
    for field in itertools.chain.from_iterable(points):
        if not isinstance(field, str) or not _is_field(field):
            raise ValueError(f"{path}: {field!r} is not a field such as optim.lr")
    return [{field: _text(value) for field, value in point.items()} for point in points]


def _is_field(text: str) -> bool:
    return re.fullmatch(r"\w+(\.\w+)+", text) is not None


def _text(value: Any) -> str:
    """As train.py reads it: lists with commas, true, false, none."""
    if isinstance(value, list):
        return ",".join(map(_text, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def labels(points: Sequence[Mapping[str, str]]) -> list[str]:
    """A directory name for each point: what differs between points, by the last part of the field's name where that
    is clear. ValueError when two names would be the same."""
    fields = list(dict.fromkeys(field for point in points for field in point))
    varying = [f for f in fields if len({point.get(f) for point in points}) > 1] or fields
    tails = [field.rpartition(".")[2] for field in fields]
    short = {f: f.rpartition(".")[2] if tails.count(f.rpartition(".")[2]) == 1 else f for f in fields}
    names = []
    for point in points:
        parts = [f"{short[f]}={re.sub(r'[^A-Za-z0-9.,+-]+', '-', point[f])}" for f in varying if f in point]
        names.append("_".join(parts)[:200] or "default")
    if len(set(names)) < len(names):
        raise ValueError(f"two points of the sweep would share the directory {max(names, key=names.count)!r}")
    return names
