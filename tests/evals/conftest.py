"""Data that several tests of evaluation share."""

import argparse
from pathlib import Path
from typing import Any

import pytest

from data_tools import scenes, tokenizer


def verb(module: Any, *arguments: str) -> None:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    module.run(parser.parse_args(list(arguments)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes and a tokenizer trained on their captions."""
    out = tmp_path_factory.mktemp("data")
    verb(scenes, str(out / "scenes"), "--train", "60", "--held-out", "21", "--workers", "1", "--shard-size", "15")
    verb(tokenizer, str(out / "scenes/train"), str(out / "tokenizer"), "--vocab-size", "400")
    return out
