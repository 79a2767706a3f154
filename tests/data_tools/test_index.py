import subprocess
import sys
from pathlib import Path

import pytest

from data_tools.__main__ import VERBS, main
from mmpt.data.manifest import FILE_NAME, load_manifest
from tests.data.shards import write_shards


def failure(arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    message = str(caught.value.code)
    assert message.startswith("mmpt-data: error: ") and "\n" not in message
    return message


def test_index_writes_the_manifest_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture):
    write_shards(tmp_path, [5, 0, 3])
    main(["index", str(tmp_path), "--chunk-samples", "2"])
    assert "8 samples in 3 shards" in capsys.readouterr().out
    assert load_manifest(str(tmp_path)).chunk_lengths.tolist() == [2, 2, 1, 2, 1]


def test_a_damaged_shard_is_refused_and_no_manifest_written(tmp_path: Path):
    write_shards(tmp_path, [5, 6])
    path = tmp_path / "00001.tar"
    path.write_bytes(path.read_bytes()[:4000])
    message = failure(["index", str(tmp_path)])
    assert "00001.tar at byte" in message and "cut short" in message
    assert not (tmp_path / FILE_NAME).exists()


@pytest.mark.parametrize(("name", "message"), [("nowhere", "is not a folder"), ("empty", "has no .tar shards")])
def test_what_cannot_be_indexed_is_one_line(tmp_path: Path, name: str, message: str):
    (tmp_path / "empty").mkdir()
    assert message in failure(["index", str(tmp_path / name)])


def test_a_wrong_command_line_exits_with_2(capsys: pytest.CaptureFixture):
    for arguments in ([], ["indx", "."], ["index"], ["index", ".", "--chunks", "3"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert "mmpt-data" in capsys.readouterr().err


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    assert VERBS[verb].split()[0] in capsys.readouterr().out


@pytest.mark.slow
def test_as_a_program(tmp_path: Path):
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "data_tools", *arguments], capture_output=True, text=True, check=False
        )

    failed = run("index", str(tmp_path / "nowhere"))
    assert failed.returncode == 1 and failed.stdout == ""
    assert failed.stderr == f"mmpt-data: error: {tmp_path / 'nowhere'} is not a folder\n"
    assert run("index").returncode == 2
    write_shards(tmp_path, [3])
    assert run("index", str(tmp_path)).returncode == 0
