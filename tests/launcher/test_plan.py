"""Which runs a command line means: directories, sweeps, arguments."""

import itertools
from pathlib import Path

import pytest

from launcher.plan import Run, labels, plan_runs, sweep_points, value_of

RUNS = Path("/scratch/runs")


def test_one_run_is_named_by_its_recipe_by_name_or_by_run_dir() -> None:
    arguments = ["--recipe", "filip.vit_l14", "--run.seed", "3"]
    assert plan_runs(arguments, [], RUNS, None) == [
        Run(RUNS / "filip.vit_l14", (*arguments, "--run.dir", "/scratch/runs/filip.vit_l14"))
    ]
    assert plan_runs(arguments, [], RUNS, "mine")[0].dir == RUNS / "mine"
    for given in (["--run.dir", "/a/b"], ["--run.dir=/a/b"]):
        run = plan_runs([*arguments, *given], [], RUNS, None)[0]
        assert run == Run(Path("/a/b"), (*arguments, "--run.dir", "/a/b"))
    assert plan_runs(["--recipe=x", "--run.dir", "rel"], [], RUNS, None)[0].dir == Path.cwd() / "rel"


@pytest.mark.parametrize(
    ("arguments", "name", "said"),
    [
        (["--run.seed", "3"], None, "lack --recipe"),
        (["--recipe", "runs/a/recipe.yaml"], None, "needs a directory of its own"),
        (["--recipe", "x", "--run.dir", "y"], "z", "--name and --run.dir"),
        (["--recipe", "x", "--run.dir", "100%"], None, "holds a %"),
    ],
)
def test_runs_without_a_place_are_refused(arguments: list[str], name: str | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan_runs(arguments, [], RUNS, name)


def test_values_of_flags() -> None:
    assert value_of(["--a", "1", "--a=2", "--ab", "3"], "--a") == "2"
    assert value_of(["--b", "1"], "--a") is None and value_of(["--a"], "--a") is None


def test_a_sweep_is_every_combination() -> None:
    runs = plan_runs(["--recipe", "r"], ["optim.lr=1e-3,3e-4", "run.seed=0,1"], RUNS, "sweep")
    assert [run.dir.name for run in runs] == [f"lr={lr}_seed={s}" for lr in ("1e-3", "3e-4") for s in "01"]
    assert {run.dir.parent for run in runs} == {RUNS / "sweep"}
    assert runs[3].arguments == (
        "--recipe", "r", "--optim.lr", "3e-4", "--run.seed", "1", "--run.dir", "/scratch/runs/sweep/lr=3e-4_seed=1",
    )  # fmt: skip


def test_sweeps_from_files(tmp_path: Path) -> None:
    grid, points = tmp_path / "grid.yaml", tmp_path / "points.yml"
    grid.write_text("optim.lr: [0.001, 0.0003]\nevals.retrieval: [[a, b], null]\ndata.equal: [true]\n")
    found = sweep_points([str(grid)])
    assert len(found) == 4 and found[0] == {"optim.lr": "0.001", "evals.retrieval": "a,b", "data.equal": "true"}
    assert found[1]["evals.retrieval"] == "none"
    points.write_text("- {optim.lr: 1, run.seed: 2}\n- {optim.lr: 3}\n")
    assert sweep_points([str(points)]) == [{"optim.lr": "1", "run.seed": "2"}, {"optim.lr": "3"}]
    assert labels(sweep_points([str(points)])) == ["lr=1_seed=2", "lr=3"]
    assert len(sweep_points([str(points), "run.keep_last=1,2"])) == 4


@pytest.mark.parametrize(
    ("sweeps", "said"),
    [
        (["optim.lr"], "wants FIELD=VALUE"),
        (["optim.lr=1,,2"], "wants FIELD=VALUE"),
        (["lr=1"], "wants FIELD=VALUE"),
        (["optim.lr=1,1"], "same point twice"),
        (["optim.lr=1", "optim.lr=2"], "optim.lr is swept twice"),
        (["missing.yaml"], "does not exist"),
        (["optim.lr=a/b,a-b"], "share the directory"),
    ],
)
def test_bad_sweeps_are_named(sweeps: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan_runs(["--recipe", "r"], sweeps, RUNS, None)


@pytest.mark.parametrize("text", ["3", "[]", "{}", "optim.lr: 1", "{3: [1]}", "- 1", "a: ["])
def test_bad_sweep_files_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"s\.yaml"):
        sweep_points([str(tmp_path / "s.yaml")])


def test_labels_name_what_differs_and_tell_fields_apart() -> None:
    points = [{"optim.lr": a, "method.text.lr": b, "run.seed": "0"} for a, b in itertools.product("12", "34")]
    assert labels(points)[0] == "optim.lr=1_method.text.lr=3", "run.seed is the same for all"
    assert labels([{"run.seed": "0"}]) == ["seed=0"]
    assert labels([{"data.shards": "s3://a b/c"}, {"data.shards": "x"}]) == ["shards=s3-a-b-c", "shards=x"]
