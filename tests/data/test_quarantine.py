from pathlib import Path

import pytest
from pyarrow import parquet

from mmpt.data.quarantine import FILE_NAME, BadSample, append, check_rate, merge, stand_ins


def bad(key: str, position: int) -> BadSample:
    return BadSample("a/0.tar", key, 512, "cannot be decoded", position, "other")


def test_stand_ins_are_all_the_others_in_an_order_of_their_own():
    orders = [tuple(stand_ins(7, 2, 5, 0, position)) for position in range(200)]
    assert all(sorted(order) == [0, 1, 3, 4, 5, 6] for order in orders)
    assert len(set(orders)) > 150 and orders[3] == tuple(stand_ins(7, 2, 5, 0, 3))
    assert stand_ins(1, 0, 5, 0, 0) == []


def test_the_ledger_counts_each_sample_and_survives_a_line_cut_by_a_kill(tmp_path: Path):
    append(tmp_path, 1, [])
    assert merge(tmp_path) == 0 and not (tmp_path / FILE_NAME).exists()
    append(tmp_path, 0, [bad("x", 40), bad("y", 3)])
    append(tmp_path, 3, [bad("x", 7)])
    ledger = tmp_path / "quarantine/rank-00003.jsonl"
    ledger.write_text(ledger.read_text() + '{"shard": "a/0.tar", "ke')
    append(tmp_path, 3, [bad("x", 7), bad("z", 9)])  # position 7 again: the run was resumed
    assert merge(tmp_path) == 3
    rows = parquet.read_table(tmp_path / FILE_NAME).to_pylist()
    assert [(row["key"], row["position"], row["times"]) for row in rows] == [("x", 7, 2), ("y", 3, 1), ("z", 9, 1)]
    assert rows[0]["shard"] == "a/0.tar" and rows[0]["offset"] == 512 and rows[0]["reason"] == "cannot be decoded"


def test_a_handful_is_always_allowed():
    check_rate(10, 10, 0.0, bad("x", 0))
    check_rate(11, 1100, 0.01, bad("x", 0))
    with pytest.raises(ValueError, match=r"12 of 1100 .*\(0.01\).*a/0.tar: sample 'x': cannot be decoded"):
        check_rate(12, 1100, 0.01, bad("x", 0))
