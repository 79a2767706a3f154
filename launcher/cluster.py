"""Facts about a machine or cluster, from a YAML file with strict keys. Nothing in them changes what is computed."""

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import yaml

CONFIGS = Path(__file__).parents[1] / "cluster_configs"
EXECUTORS = ("slurm", "local", "debug")
SET_BY_THE_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR",
                       "MASTER_PORT", "PYTHONPATH", "SLURM_CONF")  # fmt: skip
CHANGE_NUMBERS = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG", "MMPT_")
"""Prefixes of variables that decide what is computed: a recipe's business, or a shell's, not a machine's."""


@dataclass(frozen=True)
class Cluster:
    executor: str
    """slurm; local: this machine, restarted as on a cluster; debug: one rank in this terminal, for breakpoints."""
    ranks_per_node: int
    """Ranks on a node: one for each of its GPUs, or CPU processes where it has none (flag: also --gpus-per-node)."""
    nodes: int | str = 1
    """How many, or a range such as 60-64: SLURM then starts and restarts the run on as many as it has."""
    time: str | None = None
    """Time limit of a job, D-HH:MM:SS or minutes, in quotes; the run goes on in the next job."""
    partition: str | None = None
    """Partition."""
    account: str | None = None
    """Account that is charged."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Node features, such as a100&ib."""
    gpu_request: str = "--gpus-per-node={n}"
    """The sbatch option that asks for n GPUs on each node; --gres=gpu:a100:{n} on some clusters; empty: no GPUs."""
    cpus_per_rank: int | None = None
    """CPU cores for a rank and its data workers; a node's cores / ranks_per_node where it is used alone."""
    memory_gb_per_node: int | None = 0
    """Memory of a node; 0: all of it; null: the partition's default."""
    exclusive: bool = True
    """Whole nodes."""
    grace_seconds: int = 120
    """How long before the time limit the ranks are told to save; more than a checkpoint and a step take."""
    sbatch: dict[str, str | int | bool] = field(default_factory=dict)
    """Further options of sbatch, without dashes in front: {reservation: big, mail-type: FAIL}."""
    srun: list[str] = field(default_factory=list)
    """Further arguments of srun."""
    setup: list[str] = field(default_factory=list)
    """Shell lines before srun, on the first node: module load, ulimit."""
    python: str | None = None
    """Shell words that start Python on a node, such as a container's; null: the interpreter that runs the launcher."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables for every rank: fabric (NCCL_*), caches, DS_ACCELERATOR."""
    runs: str = "runs"
    """Folder of run directories, seen by all nodes; ~ and $VARIABLES are filled in."""
    max_restarts: int = 100
    """Restarts of one job after which it is given up."""
    max_fruitless_restarts: int = 3
    """Restarts in a row without a step that was not reached before: the crash-loop breaker."""
    max_excluded_share: float = 0.1
    """At most this share of the nodes asked for (but one at least) is excluded as bad."""
    parallel_sweep_jobs: int = 8
    """Runs of a sweep at the same time."""

    def __post_init__(self) -> None:
        if self.executor not in EXECUTORS:
            raise ValueError(f"executor should be one of {', '.join(EXECUTORS)}, got {self.executor!r}")
        if self.ranks_per_node < 1:
            raise ValueError(f"ranks_per_node should be a number from 1, got {self.ranks_per_node}")
        if not re.fullmatch(r"[1-9]\d*(-[1-9]\d*)?", str(self.nodes)):
            raise ValueError(f"nodes should be a number from 1 or a range such as 60-64, got {self.nodes!r}")
        if self.time is not None:
            minutes(self.time)
        if self.gpu_request and not re.fullmatch(r"--[a-z-]+=\S*\{n\}\S*", self.gpu_request):
            raise ValueError(f"gpu_request should look like --gres=gpu:{{n}}, or be empty, got {self.gpu_request!r}")
        for name in self.environment:
            if name in SET_BY_THE_LAUNCHER:
                raise ValueError(f"environment holds {name}, which the launcher sets")
            if name.startswith(CHANGE_NUMBERS):
                raise ValueError(f"environment holds {name}, which changes what is computed; set it in your shell")

    @property
    def least_nodes(self) -> int:
        return int(str(self.nodes).partition("-")[0])


def minutes(time: str) -> int:
    """SLURM's notation (minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS) in minutes, rounded up."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if match is None:
        raise ValueError(f"time should look like 24:00:00, 1-12:00:00 or 90 (minutes), got {time!r}")
    days, *parts = (int(part) if part is not None else None for part in match.groups())
    first, second, third = parts
    if days is not None or third is not None:
        seconds = (days or 0) * 86400 + (first or 0) * 3600 + (second or 0) * 60 + (third or 0)
    else:
        seconds = (first or 0) * 60 + (second or 0)
    return -(-seconds // 60)


def load_cluster(name: str) -> Cluster:
    """A file of cluster_configs/ by its name, or any other by its path (ending in .yaml).

    ValueError that names an unknown cluster or key with its near miss, or the key whose value is wrong.
    """
    path = Path(name) if name.endswith(".yaml") else CONFIGS / f"{name}.yaml"
    if not path.is_file():
        known = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
        named = f"known: {', '.join(known)}, or" if known else "give"
        raise ValueError(f"unknown cluster {name!r}{near_miss(name, known)} ({named} the path of a .yaml file)")
    try:
        data = yaml.safe_load(path.read_text())
        if not isinstance(data, dict):
            raise ValueError("should hold named fields such as executor and ranks_per_node")
        return from_values(data)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def from_values(values: Mapping[str, Any]) -> Cluster:
    """The cluster with these fields. ValueError for one that is unknown, missing or of the wrong kind."""
    kinds = get_type_hints(Cluster)
    for key, value in values.items():
        if key not in kinds:
            raise ValueError(f"unknown key {key!r}{near_miss(str(key), list(kinds))}")
        if not _is(value, kinds[key]):
            hint = "; put it in quotes" if isinstance(value, int) and kinds[key] == str | None else ""
            raise ValueError(f"{key} should be {_described(kinds[key])}, got {value!r}{hint}")
    for key in ("executor", "ranks_per_node"):
        if key not in values:
            raise ValueError(f"key {key!r} is missing")
    return Cluster(**values)


def changed(cluster: Cluster, texts: Mapping[str, str]) -> Cluster:
    """With the values of flags. ValueError that names the flag."""
    kinds, values = get_type_hints(Cluster), {}
    for key, text in texts.items():
        value: Any = text
        if bool in _choices(kinds[key]) and text.lower() in ("true", "false"):
            value = text.lower() == "true"
        elif int in _choices(kinds[key]) and re.fullmatch(r"\d+", text):
            value = int(text)
        elif float in _choices(kinds[key]) and re.fullmatch(r"\d*\.?\d+", text):
            value = float(text)
        elif type(None) in _choices(kinds[key]) and text in ("none", "null"):
            value = None
        if not _is(value, kinds[key]):
            raise ValueError(f"--{key.replace('_', '-')} wants {_described(kinds[key])}, got {text!r}")
        values[key] = value
    return replace(cluster, **values)


def flags() -> list[tuple[str, str]]:
    """(field, the words of its type) of every field that a flag can change: those that hold one value."""
    kinds = get_type_hints(Cluster)
    return [
        (f.name, _described(kinds[f.name])) for f in fields(Cluster) if get_origin(kinds[f.name]) not in (dict, list)
    ]


def filled_in(path: str) -> Path:
    """With ~ and $VARIABLES replaced, absolute. ValueError for a variable that is not set."""
    filled = os.path.expanduser(os.path.expandvars(path))
    if "$" in filled:
        raise ValueError(f"runs: {path!r} names a variable that is not set")
    return Path(os.path.abspath(filled))


def near_miss(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _choices(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if isinstance(kind, UnionType) else (kind,)


def _is(value: Any, kind: Any) -> bool:
    if isinstance(kind, UnionType):
        return any(_is(value, choice) for choice in get_args(kind))
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(
            isinstance(k, str) and _is(v, get_args(kind)[1]) for k, v in value.items()
        )
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is(item, get_args(kind)[0]) for item in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _described(kind: Any) -> str:
    if isinstance(kind, UnionType):
        return " or ".join(_described(choice) for choice in get_args(kind))
    words = {str: "a text", int: "a whole number", bool: "true or false", float: "a number", type(None): "none"}
    if get_origin(kind) is dict:
        return "names with texts"
    return "a list of texts" if get_origin(kind) is list else words[kind]
