"""Evaluation sets in CLIP_benchmark's layout, read as its exporter writes them."""

from pathlib import Path

import pytest
from webdataset.writer import TarWriter

from mmpt.data.benchmark import load_benchmark, read_class_names, read_templates
from mmpt.data.loader import DataConfig, eval_batches
from mmpt.data.tar import ShardError
from mmpt.inputs import InputSpec
from tests.data.shards import picture


def write(folder: Path, samples: list[dict], shards: int = 2) -> None:
    (folder / "test").mkdir(parents=True)
    for shard in range(shards):
        with TarWriter(str(folder / "test" / f"{shard}.tar"), encoder=False) as tar:
            for number, sample in enumerate(samples):
                if number * shards // len(samples) == shard:
                    tar.write({"__key__": f"s{number:07d}", **sample})
    (folder / "test" / "nshards.txt").write_text(f"{shards}\n")


def test_classification(tmp_path: Path, tokenizer: str, inputs: InputSpec):
    labels = [4, 0, 2, 1, 3]
    write(
        tmp_path,
        [
            {("jpg", "webp")[i % 2]: picture(i, ("jpg", "webp")[i % 2]), "cls": str(y).encode()}
            for i, y in enumerate(labels)
        ],
    )
    (tmp_path / "classnames.txt").write_text("cat\ndog\nkiller whale\nant\nbee\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\na drawing of {c}\n")
    batches = list(eval_batches(str(tmp_path), DataConfig(tokenizer=tokenizer, workers=0), inputs, 0, 1, 3))
    assert [known["label"] for _, metadata in batches for known in metadata] == labels
    assert all(known["captions"] == [] for _, metadata in batches for known in metadata)
    assert [len(batch) for batch, _ in batches] == [3, 2]
    assert read_class_names(str(tmp_path)) == ["cat", "dog", "killer whale", "ant", "bee"]
    assert read_templates(str(tmp_path)) == ["a photo of a {c}.", "a drawing of {c}"]


def test_retrieval_with_several_captions(tmp_path: Path, tokenizer: str, inputs: InputSpec):
    captions = [[f"image {i} says {j}" for j in range(3 + i % 2)] for i in range(7)]
    write(
        tmp_path, [{"png": picture(i, "png"), "txt": "\n".join(c).encode()} for i, c in enumerate(captions)], shards=3
    )
    config = DataConfig(tokenizer=tokenizer, workers=0, caption_field="ignored: the layout says where captions are")
    ranks = [list(eval_batches(str(tmp_path), config, inputs, rank, 2, 100)) for rank in range(2)]
    assert [known["captions"] for rank in ranks for _, metadata in rank for known in metadata] == captions


def test_other_folders_are_not_taken_for_one(shards: str, tmp_path: Path):
    assert load_benchmark(shards) is None
    assert load_benchmark(str(tmp_path / "nowhere")) is None


def test_what_is_amiss_is_named(tmp_path: Path):
    write(tmp_path, [{"png": picture(0, "png"), "cls": b"0"}], shards=1)
    with pytest.raises(ValueError, match=r"classnames.txt does not exist"):
        read_class_names(str(tmp_path))
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a photo of a {}.\n")
    with pytest.raises(ValueError, match=r"'a photo of a {}.' has no {c}"):
        read_templates(str(tmp_path))
    (tmp_path / "test" / "nshards.txt").write_text("two")
    with pytest.raises(ValueError, match="should hold the number of shards and holds 'two'"):
        load_benchmark(str(tmp_path))
    (tmp_path / "test" / "nshards.txt").write_text("1")
    shard = tmp_path / "test" / "0.tar"
    shard.write_bytes(shard.read_bytes()[: -1024 * 9])
    with pytest.raises(ShardError, match=r"0\.tar"):
        load_benchmark(str(tmp_path))
