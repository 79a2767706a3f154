"""`mmpt check-loss`: equal where it should be, and not where a gradient is lost."""

import re

import pytest
import torch

from mmpt import check_loss
from mmpt.recipe import load, names
from mmpt.synthetic import synthetic_batch

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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["filip.tiny", "albef.tiny", "uniter.tiny"])
def test_two_ranks_are_equal_to_one_process(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert check_loss.start_ranks(["--recipe", name], 2) == 0
    lines = capfd.readouterr().out.splitlines()
    tasks = len(load(name).method.inputs().tasks) or 1
    assert len(lines) == tasks and all(
        re.search(r"2 ranks [\d.]+, one process [\d.]+: .*: ok$", line) for line in lines
    )


def test_a_wrong_flag_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_loss.main(["--recipe", "clip.tinny"]) == 2
    assert capsys.readouterr().err.startswith("check-loss: error: unknown recipe 'clip.tinny'; did you mean")
