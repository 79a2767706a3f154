"""Settings for the whole suite: CPU, two threads, no network to a model hub; and what many tests share."""

import os
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from data_tools.__main__ import main as mmpt_data
from tests.forks import Forks


@pytest.fixture(scope="session")
def forks() -> Forks:
    """Runs of train.py in a second."""
    return Forks()


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 96 scenes with its tokenizer, made by the commands of the README."""
    folder = tmp_path_factory.mktemp("scenes")
    made, tokenizer = str(folder / "data"), str(folder / "tokenizer")
    mmpt_data(["scenes", made, "--train", "96", "--held-out", "16", "--workers", "1"])
    mmpt_data(["tokenizer", f"{made}/train", tokenizer, "--kind", "wordpiece", "--vocab-size", "256"])
    return folder
