"""Real photographs and emoji: packed, indexed, and delivered once each by the training loader."""

import json
import re
import tarfile
from pathlib import Path

import pytest

from data_tools.__main__ import main
from mmpt.inputs import InputSpec
from tests.data_tools.delivery import index_and_load
from tests.data_tools.readback import read_back
from tests.shared_data import shared_data


@pytest.mark.slow
@pytest.mark.parametrize("resize", [[], ["--resize", "64"]], ids=["original size", "resized"])
def test_photographs(tmp_path: Path, tokenizer: str, inputs: InputSpec, resize: list[str]):
    archive = shared_data("photos/imagenet-samples-400.tar")
    with tarfile.open(archive) as tar:
        stored = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}  # type: ignore[union-attr]
    table = tmp_path / "captions.jsonl"
    captions = {name: re.sub(r"^n\d+_|\.JPEG$", "", name).replace("_", " ") for name in stored}
    table.write_text("".join(json.dumps({"image": name, "caption": text}) + "\n" for name, text in captions.items()))
    out = tmp_path / "out"
    main(["pack", str(archive), str(table), str(out), "--samples-per-shard", "150", *resize])
    assert sorted(path.name for path in out.glob("*.tar")) == ["00000.tar", "00001.tar", "00002.tar"]
    for sample, (name, data) in zip(read_back(out), stored.items(), strict=True):
        assert sample["json"]["source"] == name and sample["txt"].decode() == captions[name]
        assert resize or sample["jpg"] == data
    delivered = index_and_load(out, tokenizer, inputs, batch=16)
    assert len(set(delivered)) == len(delivered) == len(stored) == 400


@pytest.mark.slow
def test_emoji(tmp_path: Path, tokenizer: str, inputs: InputSpec):
    emoji = shared_data("emoji")
    main([
        "pack", str(emoji / "noto-emoji-128px.tar"), str(emoji / "captions.tsv"), str(tmp_path / "out"),
        "--image-column", "file", "--caption-column", "en",
    ])  # fmt: skip
    delivered = index_and_load(tmp_path / "out", tokenizer, inputs, batch=32)
    assert len(set(delivered)) == len(delivered) == 3543
