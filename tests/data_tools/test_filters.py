from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from data_tools.__main__ import main
from data_tools.filters import parse_condition
from mmpt.data.manifest import load_manifest
from mmpt.data.reader import Reader
from tests.data.shards import write_shards
from tests.data_tools.test_index import failure


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Parquet files as img2dataset leaves them: with rows of failed downloads, and a missing value."""
    write_shards(tmp_path, [6, 4])
    first = 0
    for shard, count in enumerate([6, 4]):
        rows = [
            {"key": f"{n:06d}", "similarity": n / 10 if n != 5 else None, "language": "en" if n % 2 else "de",
             "status": "success"} for n in range(first, first + count)
        ]  # fmt: skip
        rows.append({"key": f"9{shard}", "similarity": 0.99, "language": "en", "status": "failed_to_download"})
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{shard:05d}.parquet")
        first += count
    return tmp_path


def keys(folder: Path) -> list[str]:
    manifest, reader = load_manifest(str(folder)), None
    reader = Reader(manifest)
    return [extent.key[-1] for chunk in range(len(manifest.chunk_lengths)) for extent in reader.extents(chunk)[1]]


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        (["similarity > 0.3"], "46789"),
        (["similarity >= 0.3", "language == en"], "379"),
        (["language != 'en'"], "02468"),
        (["similarity < 0.15"], "01"),
        (["similarity <= 0.1", "language == de"], "0"),
    ],
)
def test_conditions_on_columns(folder: Path, where: list[str], kept: str, capsys: pytest.CaptureFixture):
    arguments = [part for condition in where for part in ("--where", condition)]
    main(["index", str(folder), "--workers", "0", "--chunk-samples", "3", *arguments])
    assert f"{len(kept)} samples ({10 - len(kept)} of 10 left out)" in capsys.readouterr().out
    assert keys(folder) == list(kept)


def test_lists_of_keys_are_left_out(folder: Path):
    (folder / "gone.txt").write_text("000003\n\n000009\nnever there\n")
    parquet.write_table(pyarrow.Table.from_pylist([{"key": "000000"}]), folder / "quarantine.parquet")
    lists = ["--exclude", str(folder / "gone.txt"), "--exclude", str(folder / "quarantine.parquet")]
    main(["index", str(folder), "--workers", "0", *lists, "--where", "similarity > 0.2"])
    assert keys(folder) == list("4678")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--where", "similarity"], "--where wants COLUMN < VALUE"),
        (["--where", "similarty > 0.3"], r"00000.parquet has no column 'similarty'; it has key, similarity"),
        (["--where", "similarity > high"], "do not fit its columns"),
        (["--where", "similarity > 2"], "the filter keeps none of the 10 samples"),
        (["--exclude", "nowhere.txt"], "nowhere.txt"),
        (["--where", "similarity > 0.3", "--from", "counts"], "read the headers"),
    ],
)
def test_what_cannot_be_filtered_is_one_line(folder: Path, arguments: list[str], message: str):
    assert message in failure(["index", str(folder), "--workers", "0", *arguments])


def test_a_shard_without_its_parquet_is_named(folder: Path):
    (folder / "00001.parquet").unlink()
    said = failure(["index", str(folder), "--workers", "0", "--where", "similarity > 0.3"])
    assert "00001.parquet does not exist" in said


def test_conditions_are_parsed():
    assert parse_condition("a>=3") == ("a", ">=", 3.0)
    assert parse_condition(" language == 'en' ") == ("language", "==", "en")
