"""The suite on real shards with a real FILIP and CLIP: what is asked for is measured, on one rank as on two."""

from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image
from webdataset.writer import TarWriter

from mmpt.data.loader import DataConfig
from mmpt.evals.maps import aligned
from mmpt.evals.suite import EvalConfig, caption_list, evaluate, prefix, what_is_said
from mmpt.methods.clip import CLIPConfig
from mmpt.methods.filip import FILIPConfig
from mmpt.models.dual_tower import DualTowerConfig
from mmpt.models.image import ViTConfig
from mmpt.models.text import TextTransformerConfig
from mmpt.models.transformer import TransformerConfig
from tests.ranks import run

TOWERS = DualTowerConfig(
    ViTConfig(TransformerConfig(32, 1, 2), image_size=64, patch_size=16, class_token=False),
    TextTransformerConfig(TransformerConfig(32, 1, 2), vocab_size=400, max_tokens=24),
    16,
)
WITH_CLS = replace(TOWERS, image=replace(TOWERS.image, class_token=True))


def configured(folder: Path) -> tuple[EvalConfig, DataConfig]:
    held_out = str(folder / "scenes/held_out")
    evals = EvalConfig(retrieval=(held_out,), scenes=(held_out,), batch=4, equal_captions=True)
    return evals, DataConfig(shards=str(folder / "scenes/train"), tokenizer=str(folder / "tokenizer"), workers=0)


def values(rank: int, world_size: int, folder: Path) -> dict[str, float]:
    evals, data = configured(folder)
    torch.manual_seed(0)
    method = FILIPConfig(TOWERS).build().eval()
    return evaluate(evals, data, TOWERS.inputs(), method, method, "cpu")


def values_and_maps(rank: int, world_size: int, folder: Path) -> dict[str, float]:
    evals, data = configured(folder)
    torch.manual_seed(0)
    method = CLIPConfig(WITH_CLS).build().eval()
    mapped = aligned(evals, data, TOWERS.inputs(), method, "cpu")
    return values(rank, world_size, folder) | {f"clip {name}": value for name, value in mapped.items()}


def test_everything_configured_is_measured_under_the_data_set_s_name(folder: Path):
    found = values(0, 1, folder)
    assert {name.rpartition("/")[0] for name in found} == {"eval/scenes/held_out"}
    names = {name.rpartition("/")[2] for name in found}
    assert {
        "image_to_text_R@1",
        "text_to_image_R@10_chance",
        "twin_i2t",
        "word_patch_ratio",
        "colour_swap_moved",
    } <= names
    assert all(0 <= value <= 10 for value in found.values())
    assert found["eval/scenes/held_out/image_to_text_R@10_chance"] == pytest.approx(10 / 21, abs=0.05)


def test_nothing_configured_needs_no_data():
    method = FILIPConfig(TOWERS).build()
    assert evaluate(EvalConfig(), DataConfig(shards="", tokenizer="none"), TOWERS.inputs(), method, method, "cpu") == {}


def test_a_method_of_one_vector_has_no_word_patches(folder: Path):
    evals, data = configured(folder)
    method = CLIPConfig(WITH_CLS).build().eval()
    found = evaluate(evals, data, TOWERS.inputs(), method, method, "cpu")
    assert "eval/scenes/held_out/twin_i2t" in found and not any("word_patch" in name for name in found)


@pytest.mark.slow
def test_two_ranks_give_what_one_process_gives(folder: Path):
    alone = values_and_maps(0, 1, folder)
    for found in run(values_and_maps, 2, folder):  # 21 scenes: the ranks hold 10 and 11
        assert found == pytest.approx(alone, abs=1e-6)


def zero_shot_values(rank: int, world_size: int, folder: Path, benchmark: Path) -> dict[str, float]:
    data = configured(folder)[1]
    torch.manual_seed(0)
    method = FILIPConfig(TOWERS).build().eval()
    return evaluate(EvalConfig(zero_shot=(str(benchmark),), batch=4), data, TOWERS.inputs(), method, method, "cpu")


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    """Eleven images of three classes as CLIP_benchmark lays them out."""
    (tmp_path / "test").mkdir()
    (tmp_path / "classnames.txt").write_text("red thing\ngreen thing\nblue thing\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a {c}\nthe {c}\n")
    (tmp_path / "test/nshards.txt").write_text("2")
    for shard, indices in enumerate((range(6), range(6, 11))):
        with TarWriter(str(tmp_path / f"test/{shard}.tar"), encoder=False) as writer:
            for i in indices:
                colour = tuple(200 * (channel == i % 3) for channel in range(3))
                png = BytesIO()
                Image.new("RGB", (70, 64), colour).save(png, "PNG")
                writer.write({"__key__": f"s{i:07d}", "png": png.getvalue(), "cls": str(i % 3).encode()})
    return tmp_path


def test_zero_shot_reads_clip_benchmark_s_layout_as_it_is(folder: Path, benchmark: Path):
    found = zero_shot_values(0, 1, folder, benchmark)
    assert set(found) == {prefix(str(benchmark)) + name for name in ("top1", "top5", "mean_class_top1")}
    assert found[prefix(str(benchmark)) + "top5"] == 1.0  # of three classes


@pytest.mark.slow
def test_two_ranks_classify_as_one_process_does(folder: Path, benchmark: Path):
    alone = zero_shot_values(0, 1, folder, benchmark)
    for found in run(zero_shot_values, 2, folder, benchmark):
        assert found == pytest.approx(alone)


def test_captions_count_as_equal_only_when_asked():
    known = [{"captions": ["A red  dot", "b"]}, {"captions": ["a red dot"]}, {"captions": ["c"], "says": "d"}]
    assert caption_list(known) == ([0, 0, 1, 2], ["A red  dot", "b", "a red dot", "c"])
    assert what_is_said(known, EvalConfig(equal_captions=True)) == ["a red dot", "b", "a red dot", "d"]
    assert len(set(what_is_said(known, EvalConfig()))) == 4
    assert prefix("/data/flickr/test/") == "eval/flickr/test/"


@pytest.mark.parametrize("change", [{"batch": 0}, {"every_steps": -1}])
def test_impossible_settings_are_refused(change: dict):
    with pytest.raises(ValueError, match="must be 1 or more"):
        EvalConfig(**change)


def test_two_data_sets_of_one_name_are_refused():
    """The values of one would overwrite those of the other."""
    with pytest.raises(ValueError, match=r"evals.zero_shot names /a/coco/test, /b/coco/test/: records tell"):
        EvalConfig(zero_shot=("/a/coco/test", "/b/coco/test/"))
    EvalConfig(retrieval=("/a/coco/test", "/a/flickr/test"), scenes=("/a/coco/test",))
