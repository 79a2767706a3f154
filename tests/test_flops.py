"""Utilisation: model FLOPs against torch's counter, and no number that nobody measured."""

import contextlib

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmpt.flops import Utilisation, peak_flops
from mmpt.methods.method import loss_of
from mmpt.plan import Setting, work
from mmpt.plan_sample import Counter
from mmpt.recipe import parse_arguments
from tests.methods import tiny
from tests.test_plan import PAIRS, SAVING, TOKENS, recipe_of


def test_peaks_are_the_data_sheets_and_nothing_else_is() -> None:
    for name, precision, tflops in (
        ("NVIDIA A100-SXM4-80GB", "bf16", 312), ("NVIDIA A100 80GB PCIe", "fp32", 19.5),
        ("NVIDIA H100 80GB HBM3", "bf16", 989), ("NVIDIA H100 PCIe", "bf16", 756), ("NVIDIA H200", "fp16", 989),
        ("Tesla V100-SXM2-32GB", "fp16", 125), ("NVIDIA L4", "bf16", 121), ("NVIDIA L40S", "bf16", 362),
    ):  # fmt: skip
        assert peak_flops(name, precision) == tflops * 1e12
    for name, precision in (("", "fp32"), ("NVIDIA L40", "bf16"), ("Tesla V100-SXM2-32GB", "bf16"), ("X1", "bf16")):
        assert peak_flops(name, precision) is None
    assert peak_flops("NVIDIA A1000", "bf16") is None and peak_flops("NVIDIA RTX A4000", "bf16") is None


def test_the_counter_is_torch_s() -> None:
    method, batch = tiny.build("slip"), tiny.batch("slip", 8, 0, 8)
    totals = method.counts(batch)
    with FlopCounterMode(display=False) as torch_counter:
        loss_of(method("terms", batch), totals, 1).backward()
    with Counter() as ours:
        loss_of(method("terms", batch), totals, 1).backward()
    assert ours.flops == torch_counter.get_total_flops() > 0


def test_model_flops_leave_out_what_is_computed_again_and_locked_towers_have_no_backward() -> None:
    def total(*flags: str, again: bool) -> float:
        return sum(part.flops for part in work(Setting(recipe_of("filip.tiny", *flags), 1, TOKENS), again))

    plain = total(again=False)
    saving = (*SAVING, "--engine.max_micro_batch", "2")
    assert plain == total(again=True) == total(*saving, again=False) < total(*saving, again=True)
    assert total("--optim.lock", "both", again=False) < 0.5 * plain


def test_a_run_has_mfu_only_where_the_peak_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of("filip.tiny")
    found = Utilisation(recipe, torch.device("cpu")).record(TOKENS, 100.0)
    per_pair = sum(part.flops for part in work(Setting(recipe, 1, TOKENS), False)) / PAIRS
    assert found == {"model_tflops_per_second_per_device": pytest.approx(100 * per_pair / 1e12)}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    found = Utilisation(recipe, torch.device("cuda")).record(TOKENS, 100.0)
    assert found["mfu"] == pytest.approx(100 * per_pair / 19.5e12)


def test_methods_that_no_plan_knows_are_counted_once_unless_a_step_computes_twice() -> None:
    recipe = parse_arguments(["--recipe", "slip.vit_b16"])
    method, batch = tiny.build("slip"), tiny.batch("slip", 8, 0, 8)
    utilisation = Utilisation(recipe, torch.device("cpu"))
    with utilisation.counting([batch, batch], couples_pairs=True):
        method("terms", batch)
    assert utilisation.record(TOKENS, 1.0) == {}
    counter = Counter()
    for again in (False, True):
        with utilisation.counting([batch], couples_pairs=True), contextlib.nullcontext() if again else counter:
            method("terms", batch)
    assert utilisation.record(TOKENS, 8.0) == {
        "model_tflops_per_second_per_device": pytest.approx(counter.flops / 1e12)
    }
