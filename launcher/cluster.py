"""Facts about a machine or cluster, from cluster_configs/NAME.yaml. Nothing in them changes what is computed."""

import difflib
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

CONFIGS = Path(__file__).parents[1] / "cluster_configs"


@dataclass(frozen=True)
class Cluster:
    accelerators: int
    """Ranks to start on a node: its GPUs, or the CPU processes to use where it has none."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables for every rank: fabric (NCCL_*), caches, DS_ACCELERATOR."""


def load_cluster(name: str) -> Cluster:
    """ValueError that names an unknown cluster or key with its near miss, or the key whose value is wrong."""
    known = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    if name not in known:
        raise ValueError(f"unknown cluster {name!r}{_near_miss(name, known)} (known: {', '.join(known)})")
    path = CONFIGS / f"{name}.yaml"
    data = yaml.safe_load(path.read_text())
    keys = [f.name for f in fields(Cluster)]
    if not isinstance(data, dict):
        raise ValueError(f"{path}: should hold {', '.join(keys)}")
    for key in data:
        if key not in keys:
            raise ValueError(f"{path}: unknown key {key!r}{_near_miss(str(key), keys)}")
    if not isinstance(data.get("accelerators"), int) or data["accelerators"] < 1:
        raise ValueError(f"{path}: accelerators should be a number from 1, got {data.get('accelerators')!r}")
    environment = data.get("environment") or {}
    if not all(isinstance(k, str) and isinstance(v, str) for k, v in environment.items()):
        raise ValueError(f"{path}: environment should map names to texts, got {environment!r}")
    return Cluster(data["accelerators"], environment)


def _near_miss(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]!r}?" if close else ""
