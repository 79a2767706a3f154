"""The scene data set keeps its promises: what is unseen is unseen, captions are true, twins are false."""

import argparse
import json
import tarfile
from collections import Counter
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools import scenes
from data_tools.scenes_captions import SHAPE_WORDS, SIZE_WORDS, recolour, write_caption
from data_tools.scenes_drawing import coverage, draw_scene
from data_tools.scenes_world import (
    COLOURS,
    NEVER_TRAINED,
    SHAPES,
    Mention,
    SceneObject,
    Statement,
    is_true,
    sample_things,
)


def metadata(split: scenes.Split, count: int) -> list[dict]:
    return [json.loads(scenes.make_sample(5, split, 64, i)["json"]) for i in range(count)]


def kinds(scene: dict) -> list[tuple[str, str]]:
    return [(thing["colour"], thing["shape"]) for thing in scene["objects"]]


def test_training_scenes_hold_none_of_the_unseen_kinds_and_held_out_scenes_at_least_one():
    trained = Counter(kind for scene in metadata("train", 800) for kind in kinds(scene))
    assert not set(trained) & NEVER_TRAINED
    assert set(trained) == {(c, s) for c in COLOURS for s in SHAPES} - NEVER_TRAINED  # and all the others occur
    for scene in metadata("held_out", 300):
        assert set(kinds(scene)) & NEVER_TRAINED


def test_every_colour_and_shape_is_trained_in_most_of_its_combinations():
    colours, shapes = Counter(c for c, _ in NEVER_TRAINED), Counter(s for _, s in NEVER_TRAINED)
    assert set(colours) == set(COLOURS) and set(colours.values()) == {2}
    assert set(shapes) == set(SHAPES) and max(shapes.values()) <= 3


def test_a_twin_has_as_many_unseen_kinds_and_the_same_words_in_another_order():
    for scene in metadata("held_out", 300):
        twin = scene["twin"]["caption"]
        articles_dropped = [sorted(w for w in t.split() if w not in ("a", "an")) for t in (twin, scene["caption"])]
        assert articles_dropped[0] == articles_dropped[1]
        assert twin != scene["caption"]
        a, b = (scene["objects"][i] for i in scene["twin"]["objects"])
        before = [(a["colour"], a["shape"]), (b["colour"], b["shape"])]
        after = [(b["colour"], a["shape"]), (a["colour"], b["shape"])]
        assert sum(k in NEVER_TRAINED for k in before) == sum(k in NEVER_TRAINED for k in after) > 0


def test_captions_are_true_and_twins_are_false():
    rng = np.random.default_rng(0)
    for _ in range(300):
        things, caption = scenes.sample_scene(rng, "held_out")
        assert is_true(caption.statement(), things)
        assert not is_true(scenes.swapped(things, caption).statement(), things)


def test_truth_needs_distinct_objects_and_the_relation():
    circle = SceneObject("circle", "red", "large", 0.1, 0.1, 0.4, 0.0)
    square = SceneObject("square", "blue", "small", 0.7, 0.1, 0.2, 0.0)
    red, blue = Mention(None, "red", "circle"), Mention("small", "blue", "square")
    assert is_true(Statement((red, blue), "left of"), (circle, square))
    assert is_true(Statement((blue, red), "right of"), (circle, square))
    assert not is_true(Statement((red, blue), "right of"), (circle, square))
    assert not is_true(Statement((red, red), None), (circle, square))
    assert not is_true(Statement((Mention("large", "blue", "square"),), None), (circle, square))


def test_says_is_equal_exactly_for_the_same_content():
    red, blue = Mention(None, "red", "circle"), Mention(None, "blue", "square")
    assert Statement((red, blue), "left of").canonical() == Statement((blue, red), "right of").canonical()
    assert Statement((red, blue), "above").canonical() == Statement((blue, red), "below").canonical()
    assert Statement((red, blue), None).canonical() == Statement((blue, red), None).canonical()
    different = [
        Statement((red, blue), "left of"), Statement((red, blue), "right of"), Statement((red, blue), "above"),
        Statement((red, blue), None), Statement((red,), None),
        Statement((Mention("large", "red", "circle"), blue), None),
    ]  # fmt: skip
    assert len({statement.canonical() for statement in different}) == len(different)


def test_word_spans_name_the_words_of_each_object():
    for split in scenes.SPLITS:
        for scene in metadata(split, 200):
            for word in scene["words"]:
                thing = scene["objects"][word["object"]]
                assert scene["caption"][word["start"] : word["end"]] == word["text"]
                said = {"colour": (thing["colour"],), "shape": SHAPE_WORDS[thing["shape"]]}
                said["size"] = SIZE_WORDS[thing["size"]]
                assert word["text"] in said[word["kind"]]
            assert {word["object"] for word in scene["words"]} == set(range(len(scene["objects"])))
            assert all(a["end"] < b["start"] for a, b in pairwise(scene["words"]))


def test_a_recoloured_caption_differs_in_the_marked_word_alone():
    for scene in metadata("held_out", 200):
        assert {(change["object"], change["other"]) for change in scene["recoloured"]} == {(0, 1), (1, 0)}
        for change in scene["recoloured"]:
            start, end = change["word"]["start"], change["word"]["end"]
            new, old = (scene["objects"][change[name]]["colour"] for name in ("other", "object"))
            assert change["caption"][start:end] == new != old
            restored = (change["caption"][:start] + old + change["caption"][end:]).split()
            words = scene["caption"].split()
            assert [w for w in restored if w not in ("a", "an")] == [w for w in words if w not in ("a", "an")]


def test_articles_agree_with_the_word_that_follows():
    texts = [scene["caption"] for scene in metadata("train", 200)] + [
        scene["twin"]["caption"] for scene in metadata("held_out", 200)
    ]
    for text in texts:
        for article, word in pairwise(text.split()):
            if article in ("a", "an"):
                assert (article == "an") == (word[0] in "aeiou")
    assert any(" an orange" in text for text in texts)


@pytest.mark.parametrize("image_size", [64, 100])
def test_boxes_are_tight_and_disjoint(image_size: int):
    rng = np.random.default_rng(1)
    for _ in range(100):
        things = sample_things(rng, "train")
        image, boxes = draw_scene(rng, things, image_size)
        assert image.shape == (image_size, image_size, 3) and image.dtype == np.uint8
        taken = np.zeros((image_size, image_size), int)
        for thing, (left, top, right, bottom) in zip(things, boxes):
            cover = coverage(thing, image_size) > 0
            assert cover[top:bottom, left:right].sum() == cover.sum() > 0
            assert cover[top].any() and cover[bottom - 1].any() and cover[:, left].any() and cover[:, right - 1].any()
            taken[top:bottom, left:right] += 1
        assert taken.max() == 1


def test_the_object_s_colour_is_what_is_drawn():
    for scene_index in range(30):
        sample = scenes.make_sample(2, "train", 64, scene_index)
        image = np.asarray(Image.open(BytesIO(sample["png"])).convert("RGB"), float)
        for thing in json.loads(sample["json"])["objects"]:
            if thing["shape"] == "ring":
                continue  # hollow in the middle
            left, top, right, bottom = thing["box"]
            row, column = (top + bottom) // 2, (left + right) // 2
            seen = image[row - 1 : row + 2, column - 1 : column + 2].mean((0, 1))
            distances = {colour: np.linalg.norm(seen - rgb) for colour, rgb in COLOURS.items()}
            assert min(distances, key=lambda colour: distances[colour]) == thing["colour"]


def test_wording_varies_but_meaning_stays():
    things = sample_things(np.random.default_rng(3), "held_out")
    captions = [write_caption(np.random.default_rng(i), things) for i in range(200)]
    texts = {caption.render()[0] for caption in captions}
    assert len(texts) > 30
    assert len({caption.statement().canonical() for caption in captions}) <= 4  # with or without sizes, relation
    assert recolour(captions[0], {}).render() == captions[0].render()


def arguments(out: Path, workers: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    scenes.add_arguments(parser)
    small = ["--train", "50", "--held-out", "10", "--shard-size", "20", "--seed", "7"]
    return parser.parse_args([str(out), *small, "--workers", str(workers)])


def test_shards_depend_on_the_seed_alone(tmp_path: Path):
    scenes.run(arguments(tmp_path / "a", workers=1))
    scenes.run(arguments(tmp_path / "b", workers=2))
    tars = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.tar"))
    assert list(map(str, tars)) == ["held_out/00000.tar", "train/00000.tar", "train/00001.tar", "train/00002.tar"]
    for path in tars:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()
    with tarfile.open(tmp_path / "a/train/00002.tar") as tar:
        names = tar.getnames()
    assert names[:3] == ["train-0000040.json", "train-0000040.png", "train-0000040.txt"] and len(names) == 30
    assert scenes.make_sample(7, "train", 64, 3)["png"] != scenes.make_sample(8, "train", 64, 3)["png"]


def test_a_folder_that_holds_shards_is_refused(tmp_path: Path):
    scenes.run(arguments(tmp_path, workers=1))
    with pytest.raises(ValueError, match="already holds shards"):
        scenes.run(arguments(tmp_path, workers=1))
