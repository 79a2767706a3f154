"""Copying ahead in a thread changes nothing but when; the state is that of what was delivered."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mmpt.data.device import DeviceLoader
from mmpt.data.loader import DataConfig, build_loader
from mmpt.inputs import InputSpec
from tests.data.batches import GLOBAL_BATCH, assert_same, joined
from tests.data.test_loader_sources import damaged_copy

CPU = torch.device("cpu")


@pytest.fixture
def config(shards: str, tokenizer: str, tmp_path: Path) -> DataConfig:
    """With an image that cannot be decoded, so that there are notes to deliver."""
    damaged = damaged_copy(shards, tmp_path / "damaged")
    return DataConfig(damaged, tokenizer, workers=0, lanes=6, window_chunks=2, max_quarantined_share=0.2)


def device_loader(config: DataConfig, inputs: InputSpec, overlap: bool, start: int = 0) -> DeviceLoader:
    return DeviceLoader(build_loader(config, inputs, 5, GLOBAL_BATCH, 0, 1, start), CPU, 3, overlap)


def test_ahead_of_time_is_the_same(config: DataConfig, inputs: InputSpec):
    plain, ahead = (device_loader(config, inputs, overlap) for overlap in (False, True))
    noted = 0
    for step in range(1, 9):
        a, b = next(plain), next(ahead)
        assert a.state == b.state == step * GLOBAL_BATCH and a.epochs == b.epochs == (a.state / 97,)
        assert a.quarantined == b.quarantined
        noted += len(a.quarantined)
        assert len(a.micro_batches) == 3
        assert_same(joined(a.micro_batches), joined(b.micro_batches))
    assert noted
    plain.close()
    ahead.close()


def test_an_error_comes_where_the_batch_was_asked_for_and_again(config: DataConfig, inputs: InputSpec):
    loader = device_loader(config, inputs, overlap=True)
    good = loader._loader._batches

    def breaks() -> Iterator:
        yield next(good)
        raise ValueError("the shard is gone")

    loader.close()
    inner = build_loader(config, inputs, 5, GLOBAL_BATCH, 0, 1)
    inner._batches = breaks()
    loader = DeviceLoader(inner, CPU, 3, overlap=True)
    next(loader)
    for _ in range(2):
        with pytest.raises(ValueError, match="the shard is gone"):
            next(loader)
    loader.close()


def test_closing_ends_the_thread_at_once_and_twice(config: DataConfig, inputs: InputSpec):
    loader = device_loader(config, inputs, overlap=True)
    next(loader)
    loader.close()
    loader.close()
    assert loader._thread is not None and not loader._thread.is_alive()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: copies on a stream of their own")
def test_on_a_device_the_tensors_are_the_same(config: DataConfig, inputs: InputSpec):
    plain = device_loader(config, inputs, overlap=False)
    inner = build_loader(config, inputs, 5, GLOBAL_BATCH, 0, 1)
    ahead = DeviceLoader(inner, torch.device("cuda"), 3, overlap=True)
    for _ in range(6):
        a, b = joined(next(plain).micro_batches), joined([part.to("cpu") for part in next(ahead).micro_batches])
        assert_same(a, b)
    plain.close()
    ahead.close()
