"""The arithmetic behind the tables of benchmarks/seven.py: entropies, re-ranking, orders that are stated."""

import math
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data_tools.scenes_world import OPPOSITE, Mention, Statement

KINDS = [Mention(None, colour, "circle") for colour in ("red", "blue", "green")]


@pytest.fixture
def seven(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from seven_parts import information, tables

    monkeypatch.setattr(information, "KINDS", len(KINDS))
    yield SimpleNamespace(information=information, tables=tables)
    for name in [name for name in sys.modules if name.startswith("seven_parts")]:
        del sys.modules[name]


@pytest.mark.parametrize(("objects", "related"), [(1, False), (2, False), (2, True), (3, False), (3, True)])
def test_what_captions_say_has_the_entropy_of_their_content(seven, objects: int, related: bool) -> None:
    """Of the statements that the data set itself takes for equal, over all kinds, places and orders of speaking."""
    chance = Counter[str]()
    for kinds in product(KINDS, repeat=objects):
        relations = tuple(OPPOSITE) if related else (None,)
        for relation in relations:
            said = Statement(kinds, relation).canonical()
            if related:  # said the other way around it is the same
                swapped = (kinds[1], kinds[0], *kinds[2:])
                assert Statement(swapped, OPPOSITE[relation]).canonical() == said
            chance[said] += 1 / len(KINDS) ** objects / len(relations)
    assert sum(chance.values()) == pytest.approx(1)
    entropy = -sum(p * math.log(p) for p in chance.values())
    assert seven.information.information_nats(seven.information.Sort(objects, related)) == pytest.approx(entropy)


def test_reranking_is_a_loop_over_questions(seven) -> None:
    random, n = np.random.default_rng(0), 40
    ranker, shortlister = ({"i2t": random.normal(size=(n, n)), "t2i": random.normal(size=(n, n))} for _ in range(2))
    found = seven.tables.reranked(ranker, (shortlister["i2t"], shortlister["t2i"]), np.arange(n))
    expected = np.zeros((len(seven.tables.KS), n))
    for side, own in (("i2t", ranker["i2t"]), ("t2i", ranker["t2i"].T)):
        short = shortlister[side] if side == "i2t" else shortlister[side].T
        for question in range(n):
            some = sorted(range(n), key=lambda answer: -short[question, answer])[: seven.tables.SHORTLIST]
            best = sorted(some, key=lambda answer: -own[question, answer])
            expected[:, question] += [question in best[:k] for k in seven.tables.KS]
    np.testing.assert_allclose(found, expected / 2)


def test_an_order_is_stated_only_where_the_interval_excludes_zero(seven) -> None:
    random = np.random.default_rng(0)
    questions = random.integers(0, 200, (seven.tables.DRAWS, 200))
    alike = (random.random((3, 200)) < 0.5).astype(float)
    better = np.maximum(alike, random.random((3, 200)) < 0.5)
    columns = {"a": alike, "b": alike[[2, 0, 1]], "c": better}
    assert sorted(seven.tables.orders(columns, questions)) == ["c > a", "c > b"]
    low, high = seven.tables.interval(seven.tables.draws(alike, questions, random))
    independent = 2 * 1.96 * alike.std() / math.sqrt(alike.size)
    assert low < alike.mean() < high and independent < high - low < 3 * independent, "drawing both ways is the wider"
