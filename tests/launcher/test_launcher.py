"""What the launcher would run is text that can be compared; what it runs is real."""

import subprocess
import sys
from pathlib import Path

import pytest

from launcher import cluster
from launcher.cluster import Cluster, load_cluster
from launcher.command import node_command, shown

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "cluster_configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_cluster_file_is_valid(path: Path) -> None:
    assert load_cluster(path.stem).accelerators >= 1


def test_the_command_is_what_one_would_type() -> None:
    command = node_command(Cluster(8, {"B": "two words", "A": "1"}), ["--recipe", "clip.vit_b32", "--run.dir", "a b"])
    text = shown(command, {"B": "two words", "A": "1"})
    assert text.startswith("A=1 B='two words' ") and "/deepspeed --num_accelerators 8 " in text
    assert text.endswith("mmpt/train.py --recipe clip.vit_b32 --run.dir 'a b'")
    assert node_command(Cluster(8), [], accelerators=3)[2] == "3"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("accelerator: 4", "unknown key 'accelerator'; did you mean 'accelerators'"),
        ("accelerators: many", "accelerators should be a number from 1, got 'many'"),
        ("accelerators: 2\nenvironment: {A: 1}", "environment should map names to texts"),
        ("- 3", "should hold accelerators"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, monkeypatch, text: str, said: str) -> None:
    monkeypatch.setattr(cluster, "CONFIGS", tmp_path)
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"mine\.yaml") as error:
        load_cluster("mine")
    assert said in str(error.value)


def test_dry_run_and_unknown_cluster() -> None:
    command = [sys.executable, "-m", "launcher"]
    done = subprocess.run(
        [*command, "local", "--dry-run", "--", "--recipe", "x"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0 and "--num_accelerators 2" in done.stdout and done.stdout.endswith("--recipe x\n")
    done = subprocess.run([*command, "locall"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith(
        "launcher: error: unknown cluster 'locall'; did you mean 'local'"
    )
    assert len(done.stderr.splitlines()) == 1
