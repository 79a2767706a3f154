"""Cluster files: strict, about machines only, each value changeable by a flag."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from launcher import arguments, cluster
from launcher.cluster import Cluster, changed, flags, from_values, load_cluster, minutes

ROOT = Path(__file__).parents[2]
LEAST = {"executor": "slurm", "ranks_per_node": 8}


@pytest.mark.parametrize("path", sorted((ROOT / "cluster_configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_cluster_file_is_valid(path: Path) -> None:
    assert load_cluster(path.stem) == load_cluster(str(path))


def test_the_template_names_every_key_once_with_its_default() -> None:
    """Commented lines are defaults: uncommenting all of them changes nothing."""
    text = (ROOT / "cluster_configs/template.yaml").read_text()
    entries = [line.removeprefix("#") for line in text.splitlines() if re.match(r"#?[a-z_]+: ", line)]
    everything = yaml.safe_load("\n".join(entries))
    assert len(entries) == len(everything) and set(everything) == {field.name for field in fields(Cluster)}
    assert from_values(everything) == load_cluster("template")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rank_per_node: 4", "unknown key 'rank_per_node'; did you mean 'ranks_per_node'"),
        ("ranks_per_node: many", "ranks_per_node should be a whole number, got 'many'"),
        ("ranks_per_node: true", "ranks_per_node should be a whole number, got True"),
        ("ranks_per_node: 0", "ranks_per_node should be a number from 1, got 0"),
        ("executor: pbs", "executor should be one of slurm, local, debug, got 'pbs'"),
        ("environment: {A: 1}", "environment should be names with texts, got {'A': 1}"),
        ("environment: {RANK: '0'}", "environment holds RANK, which the launcher sets"),
        ("environment: {NVIDIA_TF32_OVERRIDE: '1'}", "changes what is computed"),
        ("environment: {MMPT_LATE_INTERACTION: torch}", "changes what is computed"),
        ("nodes: some", "nodes should be a number from 1 or a range such as 60-64, got 'some'"),
        ("time: 24:00:00", "time should be a text or none, got 86400; put it in quotes"),
        ("time: a day", "time should look like 24:00:00"),
        ("gpu_request: gpu:8", "gpu_request should look like --gres=gpu:{n}"),
        ("- 3", "should hold named fields"),
        ("a: [", "flow node"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str) -> None:
    monkeypatch.setattr(cluster, "CONFIGS", tmp_path)
    base = "" if text.startswith(("-", "a:")) else "executor: slurm\nranks_per_node: 8\n"
    lines = [line for line in base.splitlines() if line.partition(":")[0] != text.partition(":")[0]]
    (tmp_path / "mine.yaml").write_text("\n".join([*lines, text]))
    with pytest.raises(ValueError, match=r"mine\.yaml: ") as error:
        load_cluster("mine")
    assert said in str(error.value) and "\n" not in str(error.value)


def test_missing_keys_and_files_are_named() -> None:
    with pytest.raises(ValueError, match="key 'ranks_per_node' is missing"):
        from_values({"executor": "slurm"})
    with pytest.raises(ValueError, match=r"unknown cluster 'slurm-a10'; did you mean 'slurm-a100'\? \(known: local, "):
        load_cluster("slurm-a10")
    with pytest.raises(ValueError, match=r"unknown cluster 'nowhere/mine\.yaml'"):
        load_cluster("nowhere/mine.yaml")


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("90", 90),
        ("90:30", 91),
        ("24:00:00", 1440),
        ("0:00:01", 1),
        ("1-00", 1440),
        ("2-01:30", 2970),
        ("1-0:0:1", 1441),
    ],
)
def test_times_as_slurm_writes_them(time: str, expected: int) -> None:
    assert minutes(time) == expected


def test_every_single_value_has_a_flag() -> None:
    words = ["slurm-a100", "--nodes", "60-64", "--gpus-per-node", "4", "--time", "1-0", "--exclusive", "false",
             "--max-excluded-share", "0.5", "--account", "none", "--gpu-request", ""]  # fmt: skip
    request = arguments.parse_launch([*words, "--", "--recipe", "filip.tiny"]).request
    made = changed(from_values(LEAST | {"account": "group"}), request.changes)
    assert (made.nodes, made.ranks_per_node, made.time, made.exclusive) == ("60-64", 4, "1-0", False)
    assert (made.max_excluded_share, made.account, made.gpu_request, made.least_nodes) == (0.5, None, "", 60)
    assert {name for name, _ in flags()} | {"sbatch", "srun", "setup", "environment"} == {
        f.name for f in fields(Cluster)
    }
    documented = arguments.field_documentation(Cluster)
    assert documented.keys() == {f.name for f in fields(Cluster)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"nodes": "-3"}, "nodes should be a number from 1"),
        ({"ranks_per_node": "x"}, "--ranks-per-node wants a whole number, got 'x'"),
        ({"exclusive": "maybe"}, "--exclusive wants true or false, got 'maybe'"),
    ],
)
def test_bad_flags_are_named(changes: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        changed(from_values(LEAST), changes)


def test_the_documentation_explains_every_key_with_its_default() -> None:
    page = (ROOT / "docs/cluster.md").read_text().partition("## Every knob")[2].partition("Of the launch")[0]
    rows = {name: line for line in page.splitlines() if line.startswith("| `") for name in re.findall(r"`(\w+)`", line)}
    for field in fields(Cluster):
        assert field.name in rows, field.name
        if isinstance(field.default, int | float) and not isinstance(field.default, bool):
            assert rows[field.name].split("|")[2].strip() == str(field.default), rows[field.name]
