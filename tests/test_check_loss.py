"""`mmpt check-loss`: equal where it should be, and not where a gradient is lost."""

import re

import pytest
import torch

from mmpt import check_loss
from mmpt.recipe import load, names
from mmpt.synthetic import synthetic_batch
from tests.forks import call

TINY = [name for name in names() if name.endswith(".tiny")]


@pytest.mark.parametrize("name", TINY)
def test_every_method_takes_a_synthetic_batch(name: str) -> None:
    recipe = check_loss.comparable(load(name))
    for task, _ in recipe.method.inputs().tasks or (("", 1),):
        alone = check_loss.of_all(recipe, task, ranks=1)
        assert torch.isfinite(torch.tensor(alone.loss)) and any(g.abs().sum() > 0 for g in alone.gradients.values())


def test_a_batch_is_a_pure_function_of_its_arguments() -> None:
    inputs = load("vilt.base").method.inputs()
    a, b, c = (synthetic_batch(inputs, 3, seed) for seed in (0, 0, 1))
    assert a.text.x.equal(b.text.x) and not a.text.x.equal(c.text.x)
    assert a.pictures.patches is not None and len(a.pictures) == 3 and a.pictures.patches.longest <= 200


def said(lines: list[str], name: str) -> bool:
    tasks = len(load(name).method.inputs().tasks) or 1
    return len(lines) == tasks and all(
        re.search(r"2 ranks [\d.]+, one process [\d.]+: .*: ok$", line) for line in lines
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["filip.tiny", "albef.tiny", "uniter.tiny"])
def test_two_ranks_are_equal_to_one_process(name: str) -> None:
    done = call("mmpt.check_loss", ["--recipe", name], ranks=2)
    assert done.returncode == 0 and said(done.stdout.splitlines(), name), done.stdout + done.stderr


@pytest.mark.slow
def test_it_starts_ranks_itself(capfd: pytest.CaptureFixture[str]) -> None:
    assert check_loss.start_ranks(["--recipe", "clip.tiny"], 2) == 0
    assert said(capfd.readouterr().out.splitlines(), "clip.tiny")


def test_a_wrong_flag_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_loss.main(["--recipe", "clip.tinny"]) == 2
    assert capsys.readouterr().err.startswith("check-loss: error: unknown recipe 'clip.tinny'; did you mean")
