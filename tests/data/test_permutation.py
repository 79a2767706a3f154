import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from mmpt.data.permutation import hash_key, permute, unpermute


@given(n=st.integers(1, 5000), key=st.integers(0, 2**40))
@settings(max_examples=100, deadline=None)
def test_every_index_has_one_image(n: int, key: int):
    image = permute(np.arange(n), n, hash_key(key))
    assert np.array_equal(np.sort(image), np.arange(n))


@given(n=st.integers(1, 5000), key=st.integers(0, 2**40))
@settings(max_examples=100, deadline=None)
def test_unpermute_is_the_inverse(n: int, key: int):
    assert np.array_equal(unpermute(permute(np.arange(n), n, hash_key(key)), n, hash_key(key)), np.arange(n))


@given(sizes=st.lists(st.integers(1, 300), min_size=1, max_size=30), key=st.integers(0, 2**40))
@settings(max_examples=50, deadline=None)
def test_sizes_and_keys_may_differ_by_element(sizes: list[int], key: int):
    keys = hash_key(key, np.arange(len(sizes)))
    index = np.concatenate([np.arange(n) for n in sizes])
    together = permute(index, np.repeat(sizes, sizes), np.repeat(keys, sizes))
    apart = [permute(np.arange(n), n, keys[i : i + 1]) for i, n in enumerate(sizes)]
    assert np.array_equal(together, np.concatenate(apart))


@pytest.mark.parametrize("n", [4**15 - 1, 4**15, 4**15 + 1, 2**62])
def test_large_ranges(n: int):
    index = np.array([0, 1, n // 2, n - 2, n - 1])
    image = permute(index, n, hash_key(3))
    assert len(set(image.tolist())) == 5 and image.min() >= 0 and image.max() < n


@pytest.mark.parametrize("n", [2, 3, 4])
def test_orders_of_few_items_are_equally_likely(n: int):
    orders, expected = math.factorial(n), 50
    keys = np.repeat(hash_key(1, np.arange(orders * expected)), n)
    images = permute(np.tile(np.arange(n), orders * expected), n, keys).reshape(-1, n)
    codes, counts = np.unique(images @ (n ** np.arange(n)), return_counts=True)
    assert len(codes) == orders
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert chi2.sf(statistic, orders - 1) > 1e-3


def test_keys_depend_on_the_order_of_their_parts():
    triples = list(itertools.product(range(8), repeat=3))
    assert len({hash_key(*triple).item() for triple in triples}) == len(triples)


def test_neighbouring_keys_give_unrelated_permutations():
    n = 2000
    images = [permute(np.arange(n), n, hash_key(0, epoch)) for epoch in range(4)] + [
        permute(np.arange(n), n, hash_key(1, epoch)) for epoch in range(4)
    ]
    for a, b in itertools.combinations([np.arange(n), *images], 2):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / math.sqrt(n)
        assert (a == b).sum() < 10  # 1 is expected


def test_all_orders_of_six_items_occur_within_a_factor_of_two():
    n, expected = 6, 200
    keys = np.repeat(hash_key(2, np.arange(math.factorial(n) * expected)), n)
    images = permute(np.tile(np.arange(n), math.factorial(n) * expected), n, keys).reshape(-1, n)
    codes, counts = np.unique(images @ (n ** np.arange(n)), return_counts=True)
    assert len(codes) == math.factorial(n)
    assert counts.min() > expected / 2 and counts.max() < expected * 2
