import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmpt.batch import Batch
from mmpt.data.loader import DataConfig, Loader, build_loader
from mmpt.data.stream import stream_urls
from mmpt.inputs import InputSpec
from tests.data.test_loader_sources import damaged_copy
from tests.test_train import losses, train


@pytest.fixture
def config(shards: str, tokenizer: str) -> DataConfig:
    return DataConfig(tokenizer=tokenizer, workers=0, stream=f"{shards}/0000{{0,2,3}}.tar", max_quarantined_share=0.2)


def take(loader: Loader, steps: int) -> list[Batch]:
    try:
        return [next(loader) for _ in range(steps)]
    finally:
        loader.close()


def test_batches_of_what_the_shards_hold(config: DataConfig, inputs: InputSpec):
    loader = build_loader(config, inputs, 5, 24, rank=1, world_size=2)
    assert not loader.exactly_once and loader.epochs == ()
    batches = take(loader, 30)
    assert loader.state == 30 * 24
    keys = {key for batch in batches for key in batch.keys}
    assert len(keys) > 60 and keys <= {f"{number:06d}" for number in range(97)}
    assert all(batch.pictures.pixels.shape == (12, 3, 16, 16) for batch in batches)
    positions = torch.cat([batch.positions for batch in batches])
    assert len(positions.unique()) == len(positions), "each choice about a sample has a key of its own"


def test_ranks_and_starts_draw_differently(config: DataConfig, inputs: InputSpec):
    first = [take(build_loader(config, inputs, 5, 24, rank, 2), 1)[0].keys for rank in (0, 1)]
    later = take(build_loader(config, inputs, 5, 24, 0, 2, start=24), 1)[0].keys
    assert len({*first, later}) == 3


@pytest.mark.slow
def test_in_workers(config: DataConfig, inputs: InputSpec):
    batches = take(build_loader(replace(config, workers=2), inputs, 5, 24, 0, 1), 6)
    assert len({batch.keys for batch in batches}) == 6
    assert sorted(torch.cat([batch.positions for batch in batches]).tolist()) == list(range(6 * 24))


def test_pipes_only_when_allowed(config: DataConfig, inputs: InputSpec, shards: str):
    pipe = f"pipe:cat {shlex.quote(shards)}/00003.tar"
    with pytest.raises(ValueError, match=r"set data\.allow_shell"):
        build_loader(replace(config, stream=pipe), inputs, 5, 24, 0, 1)
    (batch,) = take(build_loader(replace(config, stream=pipe, allow_shell=True), inputs, 5, 24, 0, 1), 1)
    assert set(batch.keys) <= {f"{number:06d}" for number in range(57, 97)}


def test_bad_samples_and_cut_shards_are_noted(config: DataConfig, inputs: InputSpec, shards: str, tmp_path: Path):
    damaged = Path(damaged_copy(shards, tmp_path / "damaged"))
    cut, flipped = damaged / "00000.tar", damaged / "00003.tar"
    cut.write_bytes(cut.read_bytes()[:7000])
    data = bytearray(flipped.read_bytes())
    data[data.index(b"000060.json")] ^= 1
    flipped.write_bytes(data)
    stream = f"{damaged}/0000{{0,2,3}}.tar"
    loader = build_loader(replace(config, stream=stream, max_quarantined_share=1), inputs, 5, 24, 0, 1)
    batches = take(loader, 30)
    reasons = {(row.key, row.reason.split(":")[0]) for row in loader.take_quarantined()}
    assert ("000048", "cannot be decoded") in reasons
    assert ("", "the end-of-archive mark is missing") in reasons, "which webdataset alone would not notice"
    assert ("", "it was not read to its end") in reasons
    assert all("000048" not in batch.keys for batch in batches)


def test_a_stream_of_nothing_stops_with_one_line(config: DataConfig, inputs: InputSpec, tmp_path: Path):
    (tmp_path / "page.tar").write_bytes(b"<html>not found</html>" * 100)
    for stream in (str(tmp_path / "page.tar"), str(tmp_path / "missing.tar")):
        with pytest.raises(ValueError, match=r"data\.stream cannot be read") as caught:
            take(build_loader(replace(config, stream=stream), inputs, 5, 24, 0, 1), 1)
        assert "\n" not in str(caught.value)


def test_endless_generators(config: DataConfig, inputs: InputSpec, shards: str):
    """A program that never stops writing shards to its output; it ends when nobody reads any more."""
    program = f"import sys; data = open({shards + '/00003.tar'!r}, 'rb').read().rstrip(bytes(1))\n"
    program += "while True: sys.stdout.buffer.write(data + bytes(-len(data) % 512))"
    stream = f"pipe:exec {shlex.quote(sys.executable)} -c {shlex.quote(program)} 2> /dev/null"
    loader = build_loader(replace(config, stream=stream, allow_shell=True), inputs, 5, 24, 0, 1)
    assert len(take(loader, 8)) == 8


@pytest.mark.slow
def test_a_run_on_a_stream_says_what_is_off_and_goes_on(scenes: Path, tmp_path: Path):
    stream = {"data__shards": "", "data__stream": scenes / "data/train/00000.tar"}
    for stop, told in ((2, "starting in"), (4, "continuing from")):
        done = train(scenes, tmp_path, run__stop_at_step=stop, **stream)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "data.stream: exactly-once is off" in done.stdout and told in done.stdout
    assert [dict(record)["samples"] for record in losses(tmp_path)] == [16, 32, 48, 64]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shards": "somewhere"}, "data.stream takes the place of data.shards"),
        ({"stream": "https://a/b.tar"}, "set data.allow_shell"),
        ({"caption_field": "txt::txt"}, "data.caption_field names 2 sources"),
    ],
)
def test_what_is_amiss_is_one_line(config: DataConfig, inputs: InputSpec, change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        build_loader(replace(config, **change), inputs, 5, 24, 0, 1)


def test_urls():
    assert stream_urls("a/{00..02}.tar::b.tar", False) == ["a/00.tar", "a/01.tar", "a/02.tar", "b.tar"]
    assert stream_urls("pipe:cat {x}", True) == ["pipe:cat {x}"]
