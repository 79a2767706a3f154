from pathlib import Path

import pytest

from data_tools.index import index
from data_tools.tokenizer import save, train_bpe
from mmpt.inputs import InputSpec
from tests.data.shards import caption, write_shards


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """97 samples (a prime) in four shards, one of them empty, two captions each, with a manifest of chunks of 5."""
    folder = tmp_path_factory.mktemp("data") / "shards"
    write_shards(folder, [40, 0, 17, 40], captions_per_image=2)
    index(str(folder), chunk_samples=5)
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a byte-level BPE of 300 tokens."""
    folder = tmp_path_factory.mktemp("data") / "tokenizer"
    save(train_bpe(lambda: map(caption, range(200)), 300, lower_case=True), "bpe", Path(folder))
    return str(folder)


@pytest.fixture(scope="session")
def inputs() -> InputSpec:
    return InputSpec(image_size=16, max_text_tokens=12, vocab_size=300, patches=16, kept_patches=8)
