"""What the seven are trained and asked on: drawn scenes, emoji with their names, grids and boxes for UNITER.

Of each data set there is a part to train on, one to choose the learning rate on, and one to report on:

    DATA/train DATA/validation DATA/test    shards, with the regions of a grid in every sample
    DATA/tokenizer                          WordPiece, for all methods alike
    DATA/boxes/train DATA/boxes/test        scenes alone: regions from the true boxes of the objects
    DATA/shuffled-25 DATA/shuffled-50       scenes alone: train, but so many captions in a hundred are another's
"""

import csv
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel
from webdataset.writer import TarWriter

from data_tools.__main__ import main as mmpt_data
from data_tools.index import index
from data_tools.region_files import Choice, region_file
from data_tools.regions_models import feature_map, load_grid
from mmpt.data.regions import BOXES, CONFIDENCE, EXTENSION, FEATURES

GALLERY = 256
VALIDATED = 128
"""In a gallery to choose a learning rate by."""
CELLS = 4
"""Along a side of UNITER's grid."""
REGION_WIDTH = 192


def prepare(folder: Path, emoji: Path | None) -> list[str]:
    """Make what is not there yet; returns the names of the data sets."""
    encoder = folder / "encoder"
    if not encoder.exists():
        make_encoder(encoder)
    if not (folder / "scenes").exists():
        make(folder / "scenes", lambda out: scenes(out, encoder))
    if emoji is None:
        return ["scenes"]
    if not (folder / "emoji").exists():
        make(folder / "emoji", lambda out: emoji_pairs(out, emoji, encoder))
    return ["scenes", "emoji"]


def make(folder: Path, write: Callable[[Path], None]) -> None:
    """All of it or nothing."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    write(unfinished)
    unfinished.rename(folder)


def make_encoder(folder: Path) -> None:
    """A vision transformer of random weights, frozen: no trained one comes with this project, and it needs none to tell
    colours and rough shapes apart."""
    torch.manual_seed(0)
    shape = ViTConfig(
        hidden_size=REGION_WIDTH, num_hidden_layers=1, num_attention_heads=3, intermediate_size=4 * REGION_WIDTH,
        image_size=64, patch_size=64 // CELLS,
    )  # fmt: skip
    ViTModel(shape, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)


def scenes(out: Path, encoder: Path) -> None:
    raw = out / "raw"
    mmpt_data(["scenes", str(raw), "--train", "8192", "--held-out", str(GALLERY)])
    mmpt_data(["scenes", str(out / "raw-validation"), "--train", "1", "--held-out", str(GALLERY), "--seed", "1"])
    tokenizer(raw / "train", out, 256)
    for name, shards in (("train", raw / "train"), ("test", raw / "held_out"),
                         ("validation", out / "raw-validation/held_out")):  # fmt: skip
        with_grid(shards, out / name, encoder)
    model = load_grid(str(encoder), CELLS, torch.device("cpu"))
    for name in ("train", "test"):
        rewrite(out / name, out / "boxes" / name, lambda samples: (in_boxes(sample, model) for sample in samples))
    for percent in (25, 50):
        rewrite(out / "train", out / f"shuffled-{percent}", partial(shuffle_captions, percent=percent))


def emoji_pairs(out: Path, source: Path, encoder: Path) -> None:
    """The pictures of a base code point are all in one part. Parts go by a hash: what a smaller share holds out, a
    larger one does too."""
    pictures, captions = source / "noto-emoji-128px.tar", source / "captions.tsv"
    columns = ["--image-column", "file", "--caption-column", "en"]
    held = dict[str, set[str]]()
    for share in ("0.15", "0.25"):
        raw = out / f"raw-{share}"
        split = ["--validation-fraction", share, "--split-group", "emoji_u([0-9a-f]+)"]
        mmpt_data(["pack", str(pictures), str(captions), str(raw), *columns, *split])
        held[share] = {Path(str(json.loads(s["json"])["file"])).name for s in samples_in(raw / "validation")}
    with open(captions, newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    parts = {"test": held["0.15"], "validation": held["0.25"] - held["0.15"]}
    parts["train"] = {row["file"] for row in rows} - held["0.25"]
    for name, files in parts.items():
        table = out / f"{name}.tsv"
        with open(table, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), delimiter="\t")
            writer.writeheader()
            writer.writerows(row for row in rows if row["file"] in files)
        mmpt_data(["pack", str(pictures), str(table), str(out / f"raw-{name}"), *columns])
        with_grid(out / f"raw-{name}", out / name, encoder)
    tokenizer(out / "raw-train", out, 1024)


def tokenizer(shards: Path, out: Path, words: int) -> None:
    mmpt_data(["tokenizer", str(shards), str(out / "tokenizer"), "--kind", "wordpiece", "--vocab-size", str(words)])


def with_grid(shards: Path, out: Path, encoder: Path) -> None:
    mmpt_data(["regions", str(shards), str(out), "--encoder", str(encoder), "--grid", str(CELLS)])


Sample = dict[str, bytes]
"""Extension -> contents, and __key__."""


def samples_of(shard: Path) -> Iterator[Sample]:
    sample: Sample = {}
    with tarfile.open(shard) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            if sample.get("__key__") not in (None, key.encode()):
                yield sample
                sample = {}
            file = tar.extractfile(member)
            assert file is not None
            sample |= {"__key__": key.encode(), extension: file.read()}
    yield sample


def samples_in(folder: Path) -> Iterator[Sample]:
    return (sample for shard in sorted(folder.glob("*.tar")) for sample in samples_of(shard))


def rewrite(source: Path, out: Path, change: Callable[[Iterator[Sample]], Iterator[Sample]]) -> None:
    out.mkdir(parents=True)
    with TarWriter(str(out / "00000.tar"), encoder=False, mtime=0) as tar:
        for sample in change(samples_in(source)):
            tar.write(sample | {"__key__": sample["__key__"].decode()})
    index(str(out))


def shuffle_captions(some: Iterator[Sample], percent: int) -> Iterator[Sample]:
    """So many in a hundred, drawn at random, hand their captions on in a circle."""
    samples = list(some)
    chosen = np.random.default_rng(percent).permutation(len(samples))[: len(samples) * percent // 100]
    captions = {int(i): samples[int(j)]["txt"] for i, j in zip(chosen, np.roll(chosen, 1), strict=True)}
    for i, sample in enumerate(samples):
        yield sample | {"txt": captions.get(i, sample["txt"])}


def in_boxes(sample: Sample, grid) -> Sample:
    """The regions of the objects' true boxes: what the encoder says at the cells that a box touches, by the share of
    the box in each."""
    picture = Image.open(BytesIO(sample["png"])).convert("RGB")
    scene = json.loads(sample["json"])
    x = torch.from_numpy(np.array(picture.resize((grid.image_size,) * 2))).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        features = feature_map(grid.model(pixel_values=(x - grid.mean) / grid.deviation).last_hidden_state)[0]
    boxes = np.array([thing["box"] for thing in scene["objects"]], dtype=float) / scene["width"]  # [K, 4]
    edges = np.arange(CELLS + 1) / CELLS
    shares = [
        np.clip(np.minimum(edges[1:], boxes[:, [high]]) - np.maximum(edges[:-1], boxes[:, [low]]), 0, None)
        for low, high in ((1, 3), (0, 2))
    ]  # rows, columns, [K, CELLS] each
    weight = torch.from_numpy(shares[0][:, :, None] * shares[1][:, None, :]).float()  # [K, CELLS, CELLS]
    weight = weight / weight.sum((1, 2), keepdim=True)
    arrays = {
        FEATURES: torch.einsum("krc,drc->kd", weight, features).numpy(),
        BOXES: np.concatenate([boxes, boxes[:, 2:] - boxes[:, :2]], 1),
        CONFIDENCE: np.ones(len(boxes)),
    }
    most = len(boxes)
    return sample | {EXTENSION: region_file(arrays, Choice(0.0, most, most))}
