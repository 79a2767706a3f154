"""`mmpt-data scenes OUT`: write the built-in data set of drawn scenes as image-text shards.

OUT/train and OUT/held_out hold `00000.tar`, ... with key.png, key.txt and key.json for each scene, and the manifest.
The metadata of a scene, key.json:

    objects     [{shape, colour, size, box: [left, top, right, bottom] in pixels, right and bottom exclusive}]
    words       [{text, start, end, object, kind: size|colour|shape}]: caption[start:end] speaks of objects[object]
    relation    what the caption says of the first object named in `says` ("left of", ...), or null
    says        the content of the caption; equal for two captions that say the same in other words

and, in held-out scenes only,

    twin        {caption, objects: [i, j]}: the caption with the colours of these objects exchanged; false of the scene
    recoloured  [{caption, object, other, word: {start, end}}]: only the colour word of `object` is replaced, by the
                colour of `other`; caption[start:end] is the new word
"""

import argparse
import json
import multiprocessing
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from webdataset.writer import TarWriter

from data_tools.index import index
from data_tools.scenes_captions import Caption, Word, recolour, write_caption
from data_tools.scenes_drawing import draw_scene
from data_tools.scenes_world import SceneObject, Split, is_true, sample_things

SPLITS: tuple[Split, Split] = ("train", "held_out")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; train/ and held_out/ appear in it")
    parser.add_argument("--train", type=int, default=8192, metavar="N", help="training scenes [8192]")
    parser.add_argument("--held-out", type=int, default=512, metavar="N", help="held-out scenes [512]")
    parser.add_argument("--seed", type=int, default=0, help="the data set is a function of the seed [0]")
    parser.add_argument("--image-size", type=int, default=64, metavar="PIXELS", help="height and width [64]")
    parser.add_argument("--shard-size", type=int, default=1024, metavar="N", help="scenes in a shard [1024]")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw [2]")


def run(args: argparse.Namespace) -> None:
    """Write both splits. ValueError for counts that make no data set or an OUT that already holds shards."""
    if min(args.train, args.held_out, args.shard_size, args.workers) < 1 or args.image_size < 16:
        raise ValueError("--train, --held-out, --shard-size and --workers want 1 or more, --image-size 16 or more")
    shards: list[tuple[Split, int, range]] = []
    for split, count in zip(SPLITS, (args.train, args.held_out)):
        folder = args.out / split
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.glob("*.tar")):
            raise ValueError(f"{folder} already holds shards; give an empty folder")
        for number, first in enumerate(range(0, count, args.shard_size)):
            shards.append((split, number, range(first, min(first + args.shard_size, count))))
    write = partial(write_shard, args.out, args.seed, args.image_size)
    if args.workers == 1:
        for shard in shards:
            write(shard)
    else:
        with multiprocessing.get_context("spawn").Pool(min(args.workers, len(shards))) as pool:
            pool.map(write, shards, chunksize=1)
    for split, count in zip(SPLITS, (args.train, args.held_out)):
        write_manifest(args.out / split)
        print(f"{args.out / split}: {count} scenes")


def write_manifest(folder: Path) -> None:
    """Index the shards of a folder, so that it can be trained on and evaluated."""
    index(str(folder))


def write_shard(out: Path, seed: int, image_size: int, shard: tuple[Split, int, range]) -> None:
    """Write one tar of scenes through webdataset's writer; the bytes depend on the arguments alone."""
    split, number, indices = shard
    with TarWriter(str(out / split / f"{number:05d}.tar"), encoder=False, mtime=0.0) as writer:
        for sample in map(partial(make_sample, seed, split, image_size), indices):
            writer.write(sample)


def make_sample(seed: int, split: Split, image_size: int, index: int) -> dict[str, Any]:
    """Scene `index` of a split as the files of one sample: a pure function of its arguments."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    things, caption = sample_scene(rng, split)
    image, boxes = draw_scene(rng, things, image_size)
    key = f"{split}-{index:07d}"
    metadata = describe(key, things, caption, boxes, image_size)
    if split == "held_out":
        metadata |= describe_changes(things, caption)
    png = BytesIO()
    Image.fromarray(image).save(png, "PNG", compress_level=1)
    return {
        "__key__": key,
        "png": png.getvalue(),
        "txt": metadata["caption"].encode(),
        "json": json.dumps(metadata).encode(),
    }


def sample_scene(rng: np.random.Generator, split: Split) -> tuple[tuple[SceneObject, ...], Caption]:
    """Objects and a caption; drawn again until the twin of a held-out caption is false of the scene."""
    while True:
        things = sample_things(rng, split)
        caption = write_caption(rng, things)
        assert is_true(caption.statement(), things)
        if split == "train" or not is_true(swapped(things, caption).statement(), things):
            return things, caption


def swapped(things: tuple[SceneObject, ...], caption: Caption) -> Caption:
    """The attribute-swapped twin: the colour words of objects 0 and 1 exchanged."""
    return recolour(caption, {0: things[1].colour, 1: things[0].colour})


def describe(
    key: str, things: tuple[SceneObject, ...], caption: Caption, boxes: list[tuple[int, int, int, int]], image_size: int
) -> dict[str, Any]:
    """The metadata that every scene has."""
    text, words = caption.render()
    return {
        "key": key,
        "caption": text,
        "width": image_size,
        "height": image_size,
        "objects": [
            {"shape": thing.shape, "colour": thing.colour, "size": thing.size, "box": list(box)}
            for thing, box in zip(things, boxes)
        ],
        "words": [_word(word) for word in words],
        "relation": caption.relation,
        "says": caption.statement().canonical(),
    }


def describe_changes(things: tuple[SceneObject, ...], caption: Caption) -> dict[str, Any]:
    """The false captions that go with a held-out scene: its twin, and one colour word replaced."""
    return {
        "twin": {"caption": swapped(things, caption).render()[0], "objects": [0, 1]},
        "recoloured": list(_recoloured(things, caption)),
    }


def _recoloured(things: tuple[SceneObject, ...], caption: Caption) -> Iterator[dict[str, Any]]:
    for thing, other in ((0, 1), (1, 0)):
        text, words = recolour(caption, {thing: things[other].colour}).render()
        word = next(word for word in words if word.thing == thing and word.kind == "colour")
        yield {"caption": text, "object": thing, "other": other, "word": {"start": word.start, "end": word.end}}


def _word(word: Word) -> dict[str, Any]:
    fields = asdict(word)
    fields["object"] = fields.pop("thing")
    return fields
