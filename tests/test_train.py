"""The command line as a user meets it: training, continuing after any kind of end, and errors in one line.

`launch` starts `deepspeed mmpt/train.py`, or `python mmpt/train.py`; `train` calls the same program on forked ranks.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mmpt import dist, exit_codes
from tests.forks import ENVIRONMENT, ROOT, Forks, call

SMALL = {
    "method.towers.image.trunk.width": 32, "method.towers.image.trunk.depth": 2, "method.towers.image.trunk.heads": 2,
    "method.towers.image.trunk.drop_path": 0.2, "method.towers.image.patch_size": 16,
    "method.towers.text.trunk.width": 32, "method.towers.text.trunk.depth": 1, "method.towers.text.trunk.heads": 2,
    "method.towers.text.trunk.dropout": 0.1, "method.towers.embed_dim": 16,
    "run.global_batch": 16, "run.samples": 16 * 12, "run.log_every_steps": 1, "run.checkpoint_every_steps": 2,
    "optim.warmup_steps": 3, "evals.retrieval": "", "evals.scenes": "", "engine.max_micro_batch": 4, "data.workers": 0,
}  # fmt: skip


def command(scenes: Path, run_dir: Path, ranks: int = 1, recipe: str = "filip.demo", **changes) -> list[str]:
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(ranks),
                "--master_port", str(dist.free_port()), "mmpt/train.py"]  # fmt: skip
    launch = launcher if ranks > 1 else [sys.executable, "mmpt/train.py"]
    return [*launch, *arguments(scenes, run_dir, recipe, **changes)]


def arguments(scenes: Path, run_dir: Path, recipe: str = "filip.demo", **changes) -> list[str]:
    flags = {"data.shards": scenes / "data/train", "data.tokenizer": scenes / "tokenizer", "run.dir": run_dir}
    flags |= SMALL | {name.replace("__", "."): value for name, value in changes.items()}
    return ["--recipe", recipe, *(text for name, value in flags.items() for text in (f"--{name}", str(value)))]


def launch(*where, **changes) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*where, **changes), capture_output=True, text=True, timeout=240, env=os.environ | ENVIRONMENT, cwd=ROOT
    )


def train(*where, ranks: int = 1, **changes) -> subprocess.CompletedProcess:
    return call("mmpt.train", arguments(*where, **changes), ranks)


def losses(run_dir: Path) -> list[tuple]:
    """What must not depend on interruptions: everything in the records but times and memory."""
    timing = re.compile("second|data_wait|memory|checkpoint|straggler|communication|mfu")
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [tuple((k, v) for k, v in record.items() if not timing.search(k)) for record in records]


def weights(run_dir: Path) -> dict[str, bytes]:
    newest = sorted((run_dir / "checkpoints").glob("step-*"))[-1]
    return {path.name: path.read_bytes() for path in newest.glob("*.safetensors")}


@pytest.mark.slow
def test_two_ranks_train_stop_and_continue_to_the_bit(scenes: Path, tmp_path: Path) -> None:
    """k + (n - k) steps equal n: records and every byte of weights, moments and random state (with dropout)."""
    whole = launch(scenes, tmp_path / "whole", ranks=2, data__workers=1)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert "finished at step 12" in whole.stdout
    for stop in (5, "none"):
        part = train(scenes, tmp_path / "parts", ranks=2, run__stop_at_step=stop)
        assert part.returncode == 0, part.stdout + part.stderr
    assert "continuing from" in part.stdout
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert len({dict(record)["loss"] for record in losses(tmp_path / "whole")}) == 12, "every step moved something"


def kill_after(records: int, run_dir: Path, pid: int) -> None:
    """Kill the process group, workers too, as the kernel does when it runs out of memory: when there are more records
    than so many, and for 0 as soon as there is a run directory."""
    metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + 200
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        lines = metrics.read_text().count("\n") if metrics.exists() else 0
        if lines > records or (records == 0 and (run_dir / "recipe.yaml").exists()):
            os.killpg(pid, signal.SIGKILL)
            return
        time.sleep(0.001)


@pytest.mark.slow
def test_kill_dash_nine_at_any_moment_changes_nothing(forks: Forks, scenes: Path, tmp_path: Path) -> None:
    """Killed at five moments, from start-up to the middle of a save, then continued: the run that was not killed."""
    whole = train(scenes, tmp_path / "whole")
    assert whole.returncode == 0, whole.stdout + whole.stderr
    kills = 0
    for after_records, workers in ((0, 0), (1, 1), (4, 0), (5, 1), (9, 0)):
        command = arguments(scenes, tmp_path / "killed", data__workers=workers)
        process = forks.start(command, ranks=1)
        killer = threading.Thread(target=kill_after, args=(after_records, tmp_path / "killed", process.pids[0]))
        killer.start()
        kills += process.wait() == [-signal.SIGKILL]
        killer.join()
    assert kills >= 4
    last = launch(scenes, tmp_path / "killed")
    assert last.returncode == 0, last.stdout + last.stderr
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


@pytest.mark.slow
def test_another_world_size_and_stage_continue_to_rounding(scenes: Path, tmp_path: Path) -> None:
    no_dropout = {"method__towers__image__trunk__drop_path": 0, "method__towers__text__trunk__dropout": 0}
    whole = train(scenes, tmp_path / "whole", **no_dropout)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    for stop, ranks, stage in ((4, 2, 1), (8, 1, 3), ("none", 2, 2)):
        part = train(scenes, tmp_path / "parts", ranks=ranks, run__stop_at_step=stop, engine__zero_stage=stage,
                     engine__max_micro_batch=16, **no_dropout)  # fmt: skip
        assert part.returncode == 0, part.stdout + part.stderr
    for a, b in zip(losses(tmp_path / "whole"), losses(tmp_path / "parts"), strict=True):
        whole_found, parts_found = ({k: v for k, v in record if k.startswith("accuracy")} for record in (a, b))
        # A record counts the winners among 16 pairs: two scores a rounding apart may change places.
        assert parts_found == pytest.approx(whole_found, abs=1.01 / 16)
        # Adam makes whole steps of a gradient that is nothing but rounding, so updates are alike to less.
        rounded = [{k: v for k, v in record if not k.startswith(("accuracy", "update_"))} for record in (a, b)]
        assert rounded[1] == pytest.approx(rounded[0], rel=2e-4), "the same samples, in the same steps"


def one_line(done: subprocess.CompletedProcess, status: int) -> str:
    """The one line of error; no traceback; the status of a failed run."""
    assert done.returncode == status, done.stdout + done.stderr
    lines = [line for line in (done.stderr + done.stdout).splitlines() if line.startswith("train.py: error:")]
    assert len(lines) == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return lines[0]


@pytest.mark.slow
def test_command_line_errors_are_one_line_and_status_2(scenes: Path, tmp_path: Path) -> None:
    """On two ranks, of which the second is silent: the launcher ends it when the first has spoken."""
    flag = {"optim__lrr": 1}, "unknown flag '--optim.lrr'; did you mean 'optim.lr'?"
    name = {"recipe": "filip.vit_b23"}, "unknown recipe 'filip.vit_b23'; did you mean 'filip.vit_b32'?"
    for way, (changes, said) in ((launch, flag), (train, flag), (train, name)):
        assert said in one_line(way(scenes, tmp_path, ranks=2, **changes), 2)


@pytest.mark.slow
def test_help_lists_every_field_once_on_two_ranks(scenes: Path, tmp_path: Path) -> None:
    from mmpt import config
    from mmpt.recipe import load

    deepspeed = command(scenes, tmp_path, ranks=2)[:6]
    done = subprocess.run(
        [*deepspeed, "--recipe", "clip.vit_b32", "--help"], capture_output=True, text=True, timeout=240,
        env=os.environ | ENVIRONMENT, cwd=ROOT, check=True,
    )  # fmt: skip
    for path, _, _, documentation in config.leaves(load("clip.vit_b32")):
        assert len(re.findall(rf"^  --{re.escape(path)} ", done.stdout, re.MULTILINE)) == 1, path
        assert documentation, f"{path} is not documented"


def copy_with(scenes: Path, to: Path, harm) -> Path:
    shutil.copytree(scenes / "data/train", to)
    harm(to / "00000.tar")
    return to


def flip_a_header(shard: Path) -> None:
    from mmpt.data.manifest import load_manifest

    data = bytearray(shard.read_bytes())
    data[int(load_manifest(str(shard.parent)).chunk_starts[3])] ^= 255  # the name of the fourth sample's first file
    shard.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("harm", "way", "said"),
    [
        (lambda shard: shutil.rmtree(shard.parent), train, "bad"),
        (lambda shard: shard.unlink(), train, "00000.tar"),
        (lambda shard: os.truncate(shard, 50_000), launch, "00000.tar"),
        (flip_a_header, train, "00000.tar at byte"),
    ],
    ids=["no folder", "missing shard", "truncated tar", "flipped header"],
)
def test_bad_data_is_one_line_and_status_1(scenes: Path, tmp_path: Path, harm, way, said: str) -> None:
    """On every rank, without a hang; the flipped header is met by a data worker in the middle of training."""
    shards = copy_with(scenes, tmp_path / "bad", harm)
    done = way(scenes, tmp_path / "run", ranks=2, data__shards=shards, data__workers=int(harm is flip_a_header))
    assert said in one_line(done, 1)


@pytest.mark.slow
def test_checkpoints_are_never_silently_ignored(scenes: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert train(scenes, run_dir, run__stop_at_step=4).returncode == 0
    newest = run_dir / "checkpoints/step-00000004"
    os.truncate(newest / "rank-00000.safetensors", 1000)
    done = train(scenes, run_dir, run__stop_at_step=4)
    assert done.returncode == 0 and "passed over step-00000004" in done.stdout and "step-00000002" in done.stdout

    for checkpoint in (run_dir / "checkpoints").glob("step-*"):
        os.truncate(checkpoint / "rank-00000.safetensors", 1000)
    assert "no checkpoint in" in one_line(train(scenes, run_dir, ranks=2), 1)
    shutil.rmtree(run_dir / "checkpoints")
    assert "records of training but no checkpoint" in one_line(train(scenes, run_dir, ranks=2), 1)


@pytest.mark.slow
def test_a_gradient_that_stays_infinite_stops_the_run_when_it_was_skipped_often_enough(
    scenes: Path, tmp_path: Path
) -> None:
    """The first update throws the weights so far that no later loss is a number; all ranks agree on that."""
    wild = {"optim__lr": 1e30, "optim__warmup_steps": 0, "optim__decay": "constant", "optim__clip_norm": 0}
    done = train(scenes, tmp_path, ranks=2, engine__max_consecutive_skips=3, **wild)
    assert "3 updates in a row, up to step 4, were dropped" in one_line(done, exit_codes.NOT_FINITE)
    assert [dict(record)["skipped_steps"] for record in losses(tmp_path)] == [0, 1, 2, 3]


@pytest.mark.slow
def test_a_run_directory_refuses_another_run(scenes: Path, tmp_path: Path) -> None:
    assert train(scenes, tmp_path, run__stop_at_step=2).returncode == 0
    assert "optim.lr=0.001, and this one has 0.5" in one_line(train(scenes, tmp_path, optim__lr=0.5), 1)
    other = tmp_path / "other"
    shutil.copytree(scenes / "data/held_out", other)
    assert "data.shards" in one_line(train(scenes, tmp_path, data__shards=other), 1)


@pytest.mark.slow
def test_fine_tuning_starts_from_weights_with_a_locked_tower(scenes: Path, tmp_path: Path) -> None:
    assert train(scenes, tmp_path / "first", run__stop_at_step=4).returncode == 0
    done = train(scenes, tmp_path / "second", run__init=tmp_path / "first", optim__lock="image",
                 optim__layer_decay=0.7, run__samples=16 * 4)  # fmt: skip
    assert done.returncode == 0 and "weights from" in done.stdout, done.stdout + done.stderr
    from mmpt.engine.checkpoint import weights as whole
    from mmpt.engine.resume import find_checkpoint

    before = whole(*find_checkpoint(tmp_path / "first")[:2])
    after = whole(*find_checkpoint(tmp_path / "second")[:2])
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved and not any(".image." in name for name in moved)
    assert any(".text." in name for name in moved) and any("image_projection" in name for name in moved)
    done = train(scenes, tmp_path / "third", run__init=tmp_path / "nothing")
    assert "neither a checkpoint nor a run directory" in one_line(done, 1)


def mmpt(*arguments, ranks: int = 1) -> subprocess.CompletedProcess:
    if ranks == 1:
        return call("mmpt.cli", arguments)
    launcher = [*command(Path(), Path(), ranks=ranks)[:5], "--module", "mmpt.cli"]
    return subprocess.run(
        [*launcher, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | ENVIRONMENT,
        cwd=ROOT,
    )


@pytest.mark.slow
def test_evaluation_in_training_is_that_of_mmpt_eval_and_leaves_training_alone(scenes: Path, tmp_path: Path) -> None:
    """On two ranks at stage 3 with every parameter sharded: what evaluation calls is the engine."""
    held_out = scenes / "data/held_out"
    sharded = {"ranks": 2, "engine__zero_stage": 3, "engine__keep_whole_elements": 0, "run__stop_at_step": 4}
    watched = {"evals__retrieval": held_out, "evals__scenes": held_out, "evals__every_steps": 2, "evals__batch": 5}
    for name, evals in (("alone", {}), ("watched", watched)):
        done = train(scenes, tmp_path / name, **sharded, **evals)
        assert done.returncode == 0, done.stdout + done.stderr
    records = [dict(record) for record in losses(tmp_path / "watched")]
    evaluated = [record for record in records if "loss" not in record]
    assert [record["step"] for record in evaluated] == [2, 4] and evaluated[0] != evaluated[1] | {"step": 2}
    assert [record for record in losses(tmp_path / "watched") if "loss" in dict(record)] == losses(tmp_path / "alone")
    assert weights(tmp_path / "watched") == weights(tmp_path / "alone")

    done = mmpt("eval", tmp_path / "watched")
    assert done.returncode == 0, done.stdout + done.stderr
    after = json.loads((tmp_path / "watched/evals.jsonl").read_text())
    del after["time"]
    assert after == pytest.approx(evaluated[1], abs=1e-6)


@pytest.mark.slow
def test_eval_and_report_of_a_run(scenes: Path, tmp_path: Path) -> None:
    """Two ranks score what one does; the report is one file; wrong tasks and folders are one line."""
    held_out = scenes / "data/held_out"
    assert train(scenes, tmp_path, run__stop_at_step=4).returncode == 0
    tasks = ["--task", f"retrieval:{held_out}", "--task", f"scenes:{held_out}", "--batch", 5]
    for ranks in (1, 2):
        done = mmpt("eval", tmp_path, *tasks, ranks=ranks)
        assert done.returncode == 0, done.stdout + done.stderr
    one, two = (json.loads(line) for line in (tmp_path / "evals.jsonl").read_text().splitlines())
    assert one["step"] == 4 and len(one) > 10 and any(name.endswith("image_to_text_R@5") for name in one)
    del one["time"], two["time"]
    assert two == pytest.approx(one, abs=1e-6)

    done = mmpt("report", tmp_path, *tasks)
    assert done.returncode == 0 and "bag of words" in done.stdout, done.stdout + done.stderr
    page = (tmp_path / "report.html").read_text()
    assert "<svg" in page and "data:image/" in page and "http://" not in page.replace("http://www.w3.org", "")

    for arguments, said in (
        (["eval", tmp_path, "--task", "retrievall:x"], "got 'retrievall:x'"),
        (["eval", tmp_path / "nothing"], "is not a run directory"),
        (["eval", tmp_path], "nothing to evaluate"),
    ):
        done = mmpt(*arguments)
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        assert said in done.stderr.splitlines()[-1] and done.stderr.splitlines()[-1].startswith("mmpt: error:")
