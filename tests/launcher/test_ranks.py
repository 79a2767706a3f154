"""Ranks from SLURM's variables: node lists, tasks per node, ports; and that the process becomes the command."""

import json
import os
import subprocess
import sys

import pytest

from launcher import ranks
from launcher.ranks import PORTS, expand, host_names, port_of, rank_environment, tasks_per_node


def test_node_lists() -> None:
    assert expand("n1") == ["n1"]
    assert expand("gpu[001-003,7],login1") == ["gpu001", "gpu002", "gpu003", "gpu7", "login1"]
    assert expand("a[1-2]b[08-10]c,d") == [f"a{i}b{j}c" for i in (1, 2) for j in ("08", "09", "10")] + ["d"]
    assert len(expand("node[0001-1024]")) == 1024 and expand("node[0001-1024]")[-1] == "node1024"


@pytest.mark.parametrize("text", ["", "a,", ",a", "a[1-2", "a]", "a[]", "a[2-1]", "a[x]", "a[1,]", "a b", "a[1-2]]"])
def test_what_is_no_node_list_is_said(text: str) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        expand(text)


def test_own_parser_where_scontrol_has_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert host_names("a[1-2]") == ["a1", "a2"]


def test_tasks_per_node() -> None:
    assert tasks_per_node("8(x3),4") == [8, 8, 8, 4]
    assert tasks_per_node("2") == [2]
    with pytest.raises(ValueError, match=r"'2\(3\)'"):
        tasks_per_node("2(3)")


def test_ports_are_stable_spread_and_change_with_a_restart() -> None:
    assert port_of("1234567", 0) == 31317, "another value would part ranks that run different versions"
    ports = [port_of(str(job), restarts) for job in range(1000) for restarts in range(3)]
    assert all(port in PORTS for port in ports) and len(set(ports)) > 2500
    assert port_of("7", 0) != port_of("7", 1)


def slurm(rank: int, per_node: int, nodes: int, **more: str) -> dict[str, str]:
    """As srun sets them for a task, blocks of ranks on each node."""
    return {
        "SLURM_JOB_ID": "7", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % per_node),
        "SLURM_NODEID": str(rank // per_node), "SLURM_NTASKS": str(per_node * nodes),
        "SLURM_STEP_NUM_TASKS": str(per_node * nodes), "SLURM_STEP_TASKS_PER_NODE": f"{per_node}(x{nodes})",
        "SLURM_STEP_NODELIST": f"localhost,n[2-{nodes}]" if nodes > 2 else "localhost", **more,
    }  # fmt: skip


def test_every_rank_of_sixty_four_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "host_names", expand)
    everyone = [rank_environment(slurm(rank, 8, 64)) for rank in range(512)]
    assert [e["RANK"] for e in everyone] == list(map(str, range(512)))
    assert {e["WORLD_SIZE"] for e in everyone} == {"512"} and {e["LOCAL_WORLD_SIZE"] for e in everyone} == {"8"}
    assert {e["LOCAL_SIZE"] for e in everyone} == {"8"} and [e["LOCAL_RANK"] for e in everyone[:9]] == [
        *"01234567",
        "0",
    ]
    assert {(e["MASTER_ADDR"], e["MASTER_PORT"]) for e in everyone} == {("localhost", str(port_of("7", 0)))}
    again = rank_environment(slurm(0, 8, 64, SLURM_RESTART_COUNT="2"))
    assert again["MASTER_PORT"] == str(port_of("7", 2))


def test_an_unknown_host_is_an_error_not_this_machine() -> None:
    with pytest.raises(ValueError, match=r"address of node 'no-such-host\.invalid'"):
        rank_environment(slurm(0, 2, 1, SLURM_STEP_NODELIST="no-such-host.invalid"))


def test_outside_of_srun() -> None:
    command = [sys.executable, "-m", "launcher.ranks", "--", "true"]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    done = subprocess.run(command, capture_output=True, text=True, env=clean)
    assert done.returncode == 2 and "not a task of srun" in done.stderr and len(done.stderr.splitlines()) == 1


def test_it_becomes_the_command() -> None:
    """Same process id, so signals reach it; variables that were set before are replaced."""
    show = "import os, json; print(json.dumps([os.getpid(), os.environ['RANK'], os.environ['MASTER_ADDR']]))"
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher.ranks", "--", sys.executable, "-c", show], stdout=subprocess.PIPE,
        env=os.environ | slurm(3, 2, 2) | {"RANK": "99", "MASTER_ADDR": "elsewhere"},
    )  # fmt: skip
    out, _ = process.communicate(timeout=60)
    assert json.loads(out) == [process.pid, "3", "localhost"]
