"""One task per step: drawn by weight, known to all ranks, with only what it needs in its batches."""

from dataclasses import replace
from itertools import pairwise

import pytest
from scipy import stats

from mmpt.data.loader import DataConfig, build_loader
from mmpt.data.tasks import check_tasks, inputs_for, task_of
from mmpt.inputs import InputSpec, WordMasking
from tests.data.batches import GLOBAL_BATCH, SEED, VARIED, assert_same, global_batches, resumed, take

UNITER = (("itm", 6), ("mlm", 8), ("mrfr", 4), ("mrckl", 4))


@pytest.fixture
def wanting(inputs: InputSpec) -> InputSpec:
    return replace(
        inputs, partners=True, masked_words=WordMasking(at_least_one=True), draws=1,
        tasks=(("itm", 1), ("mlm", 2), ("other", 1)),
    )  # fmt: skip


@pytest.fixture(scope="session")
def config(shards: str, tokenizer: str) -> DataConfig:
    return DataConfig(shards, tokenizer, workers=0, lanes=6, window_chunks=2, image=VARIED)


def test_as_often_as_their_weights_say_and_one_after_another_independent():
    drawn = [task_of(UNITER, 1, step * 64, 64) for step in range(22 * 300)]
    counts = [drawn.count(name) for name, _ in UNITER]
    assert stats.chisquare(counts, [300 * weight for _, weight in UNITER]).pvalue > 1e-3
    pairs = [[sum(a == x and b == y for a, b in pairwise(drawn)) for y, _ in UNITER] for x, _ in UNITER]
    assert stats.chi2_contingency(pairs).pvalue > 1e-3
    assert drawn != [task_of(UNITER, 2, step * 64, 64) for step in range(22 * 300)]
    assert task_of((), 1, 0, 64) == "" and {task_of((("a", 3),), 1, i, 1) for i in range(9)} == {"a"}


def test_the_step_is_what_keys_it():
    """Whatever the global batch: a run that goes on with twice of it draws anew from where it is."""
    for step in range(20):
        assert task_of(UNITER, 1, step * 64, 64) == task_of(UNITER, 1, step * 128, 128)


def test_what_a_task_needs(inputs: InputSpec):
    everything = replace(inputs, partners=True, masked_words=WordMasking(), masked_regions=0.15, draws=2, tasks=UNITER)
    for task, words, partners, regions in (
        ("mlm", WordMasking(), False, 0.0), ("itm", None, True, 0.0), ("mrfr", None, False, 0.15),
        ("mrckl", None, False, 0.15), ("other", None, False, 0.0),
    ):  # fmt: skip
        needed = inputs_for(everything, task)
        assert (needed.masked_words, needed.partners, needed.masked_regions) == (words, partners, regions)
        assert needed.draws == 2
    whole = replace(everything, tasks=())
    assert inputs_for(whole, "") is whole


def test_all_ranks_have_the_same_task_and_only_its_inputs(config: DataConfig, wanting: InputSpec):
    whole = global_batches(config, wanting, 8)
    for others in (global_batches(config, wanting, 8, 4), resumed(config, wanting, [3, 5, 8], (2, 4, 1))):
        for a, b in zip(whole, others, strict=True):
            assert_same(a, b)  # joining the ranks asserts that their tasks are one
    assert [batch.task for batch in whole] == [
        task_of(wanting.tasks, SEED, step * GLOBAL_BATCH, GLOBAL_BATCH) for step in range(8)
    ]
    assert {batch.task for batch in whole} == {"itm", "mlm", "other"}
    for batch in whole:
        assert (batch.partners is not None) == (batch.task == "itm")
        assert (batch.masked_words is not None) == (batch.task == "mlm")
        assert batch.draws is not None
    plain = global_batches(config, replace(wanting, tasks=()), 8)
    for a, b in zip(whole, plain, strict=True):
        left_out = {name: None for name in ("partners", "masked_words") if getattr(a, name) is None}
        assert_same(a, replace(b, task=a.task, **left_out))


def test_streams_have_tasks_but_none_that_needs_partners(shards: str, tokenizer: str, wanting: InputSpec):
    stream = DataConfig(tokenizer=tokenizer, workers=0, stream=f"{shards}/0000{{0,2,3}}.tar")
    guessing = replace(wanting, partners=False, tasks=(("mlm", 1), ("other", 1)))
    ranks = [take(build_loader(stream, guessing, SEED, GLOBAL_BATCH, rank, 2), 6) for rank in range(2)]
    tasks = [[batch.task for batch in batches] for batches in ranks]
    assert tasks[0] == tasks[1] and set(tasks[0]) == {"mlm", "other"}
    assert all((batch.masked_words is not None) == (batch.task == "mlm") for batches in ranks for batch in batches)
    with pytest.raises(ValueError, match=r"data\.stream has no second order"):
        build_loader(stream, wanting, SEED, GLOBAL_BATCH, 0, 1)


@pytest.mark.parametrize("tasks", [(("a", 1), ("a", 2)), (("a", 0),)])
def test_tasks_that_make_no_sense_are_refused(config: DataConfig, inputs: InputSpec, tasks: tuple):
    for refuse in (lambda: check_tasks(tasks),
                   lambda: build_loader(config, replace(inputs, tasks=tasks), SEED, GLOBAL_BATCH, 0, 1)):  # fmt: skip
        with pytest.raises(ValueError, match="tasks want names that differ"):
            refuse()
