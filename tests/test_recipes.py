"""Every recipe builds, says what it is, and survives the trip through its file."""

import re
from functools import cache
from pathlib import Path

import pytest
import torch

from mmpt import config
from mmpt.recipe import Recipe, check_same_run, load, names, parse_arguments

PUBLISHED = {
    "clip.vit_b32": 151_277_313, "clip.vit_b16": 149_620_737, "clip.vit_l14": 427_616_513, "clip.rn50": 102_007_137,
    "clip.chinese_vit_b16": 188_262_913,
}  # fmt: skip


@cache
def parameters(name: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in load(name).method.build().parameters())


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_published_parameter_counts(name: str, count: int) -> None:
    assert parameters(name) == count


@pytest.mark.parametrize(
    ("filip", "clip", "image_width", "text_width", "clip_dim"),
    [("filip.vit_b32", "clip.vit_b32", 768, 512, 512), ("filip.vit_l14", "clip.vit_l14", 1024, 768, 768)],
)
def test_filip_by_arithmetic(filip: str, clip: str, image_width: int, text_width: int, clip_dim: int) -> None:
    """FILIP publishes no count. Its towers are CLIP's; only both projections are narrower: to 256 dimensions."""
    narrower = (clip_dim - 256) * (image_width + text_width)
    assert parameters(filip) == PUBLISHED[clip] - narrower


def test_the_table_of_the_readme_has_every_recipe_with_its_parameters() -> None:
    told: dict[str, int] = {}
    for row in (Path(__file__).parents[1] / "README.md").read_text().splitlines():
        cells = row.split("|")
        if len(cells) != 5 or not (counts := re.findall(r"\d{1,3}(?:,\d{3})+", cells[3])):
            continue
        found, module = re.findall(r"`(\w*)\.(\w+)`", cells[1]), ""
        for i, (named, function) in enumerate(found):
            module = named or module
            told[f"{module}.{function}"] = int(counts[min(i, len(counts) - 1)].replace(",", ""))
    small = {name for name in names() if name.endswith((".tiny", ".demo"))}
    assert told == {name: parameters(name) for name in names() if name not in small}
    assert all(1.25e6 < parameters(name) < 4.05e6 for name in small), "1.3 to 4 M"


@pytest.mark.parametrize("name", names())
def test_yaml_round_trip(name: str, tmp_path: Path) -> None:
    recipe = load(name)
    config.save_yaml(recipe, tmp_path / "recipe.yaml")
    assert load(str(tmp_path / "recipe.yaml")) == recipe
    check_same_run(recipe, load(str(tmp_path / "recipe.yaml")))


@pytest.mark.parametrize("name", names())
def test_every_field_is_documented_and_a_flag(name: str) -> None:
    recipe = load(name)
    for path, kind, value, documentation in config.leaves(recipe):
        assert documentation, f"{path} has no documentation"
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        assert config.parse(text, kind, path) == value, path


def test_flags_change_single_fields() -> None:
    recipe = parse_arguments(
        ["--local_rank=1", "--recipe", "clip.tiny", "--optim.lr", "0.5", "--method.towers.image.trunk.depth=7",
         "--run.init", "none", "--data.image.crop_scale", "0.2,1"]
    )  # fmt: skip
    assert recipe.optim.lr == 0.5 and recipe.method.towers.image.trunk.depth == 7 and recipe.run.init is None
    assert recipe.data.image.crop_scale == (0.2, 1.0)
    assert recipe.optim.betas == load("clip.tiny").optim.betas


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--recipe is needed"),
        (["--recipe", "clip.vit_b23"], "did you mean 'clip.vit_b32'"),
        (["--recipe", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["--recipe", "clip.tiny", "--optim.lrr", "1"], "unknown flag '--optim.lrr'; did you mean 'optim.lr'"),
        (["--recipe", "clip.tiny", "--lr", "1"], "did you mean 'optim.lr'"),
        (["--recipe", "clip.tiny", "--optim.lr"], "expected one argument"),
        (["--recipe", "clip.tiny", "--engine.zero_stage", "4"], "--engine.zero_stage wants 0 or 1 or 2 or 3, got '4'"),
        (["--recipe", "clip.tiny", "--optim.betas", "0.9"], "--optim.betas wants"),
        (["--recipe", "clip.tiny", "surplus"], "surplus"),
        (["--recipe", "clip.tiny", "--method.towers.image.patch_size", "7"], "7 pixels do not"),
        (["--recipe", "clip.tiny", "--method.towers.image.patch_size", "0"], "patch_size must be 1 or more, got 0"),
        (["--recipe", "clip.tiny", "--method.towers.text.trunk.heads", "0"], "heads must be 1 or more, got 0"),
        (["--recipe", "clip.tiny", "--engine.max_micro_batch", "0"], "max_micro_batch must be 1 or more, got 0"),
        (["--recipe", "clip.tiny", "--engine.timeout_seconds", "0"], "timeout_seconds must be above 0, got 0.0"),
        (["--recipe", "clip.tiny", "--run.global_batch", "-8"], "global_batch must be 1 or more, got -8"),
        (["--recipe", "clip.tiny", "--run.checkpoint_every_steps", "0"], "checkpoint_every_steps must be 1 or more"),
        (["--recipe", "clip.tiny", "--run.stop_at_step", "0"], "stop_at_step must be 1 or more, got 0"),
        (["--recipe", "clip.tiny", "--optim.clip_norm", "-1"], "clip_norm must be 0 or more, got -1.0"),
        (["--recipe", "clip.tiny", "--optim.lr", "nan"], "lr must be 0 or more, got nan"),
        (["--recipe", "clip.tiny", "--optim.betas", "0.9,1"], "betas lie from 0 to below 1, got (0.9, 1.0)"),
        (["--recipe", "clip.tiny", "--optim.layer_decay", "1.5"], "layer_decay lies above 0 and up to 1, got 1.5"),
    ],
)
def test_bad_command_lines_are_named(arguments: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=r".*") as error:
        parse_arguments(arguments)
    assert said in str(error.value)


def test_micro_batches_divide_each_ranks_share() -> None:
    recipe = parse_arguments(["--recipe", "clip.tiny", "--run.global_batch", "96", "--engine.max_micro_batch", "20"])
    assert [recipe.micro_batches(world) for world in (1, 2, 4)] == [6, 3, 2]
    with pytest.raises(ValueError, match="cannot be shared by 5 ranks"):
        recipe.micro_batches(5)


def test_a_changed_field_of_a_run_is_named() -> None:
    before = load("clip.tiny")
    after = config.override(before, {"optim.weight_decay": "0.3", "engine.zero_stage": "3"})
    with pytest.raises(ValueError, match=r"optim.weight_decay=0.1, and this one has 0.3"):
        check_same_run(after, before)
    check_same_run(config.override(before, {"engine.zero_stage": "3", "data.workers": "5"}), before)


def test_a_recipe_file_cannot_name_other_classes(tmp_path: Path) -> None:
    config.save_yaml(load("clip.tiny"), tmp_path / "recipe.yaml")
    text = (tmp_path / "recipe.yaml").read_text()
    for bad, said in (("os.system", "not one of mmpt"), ("mmpt.methods.clip.Nothing", "does not exist")):
        (tmp_path / "bad.yaml").write_text(text.replace("mmpt.methods.clip.CLIPConfig", bad))
        with pytest.raises(ValueError, match=said):
            config.load_yaml(Recipe, tmp_path / "bad.yaml")
    for old, new, said in (("  lr:", "  lrr:", "did you mean 'lr'"), ("  lr: 0.001\n", "", "'optim.lr' is missing")):
        (tmp_path / "bad.yaml").write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=said):
            config.load_yaml(Recipe, tmp_path / "bad.yaml")
