"""`mmpt-data regions SHARDS OUT --grid N --encoder MODEL | --detector MODEL`: the same shards, with regions added.

Each shard is written whole or not at all, under its own name, with every file of its samples and KEY.regions.npz; the
.parquet and _stats.json beside it come along. A run that was stopped goes on with the next shard, if it is the same:
regions.json in OUT says what it was. A picture that cannot be decoded gets no regions, and training puts another in its
place.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from webdataset.writer import TarWriter

from data_tools.index import index
from data_tools.region_files import Choice, add_choice, read_file, region_file
from data_tools.regions_models import RegionModel, load_detector, load_grid
from mmpt.data import storage
from mmpt.data.decode import ImageError
from mmpt.data.image import ImageConfig, decode
from mmpt.data.manifest import Manifest, load_manifest
from mmpt.data.reader import RawSample, Reader
from mmpt.data.regions import CLASSES, EXTENSION, FEATURES, RegionError

SHOWN, FACTS = 5, "regions.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("shards", help="folder of shards with a manifest, or the manifest")
    add("out", type=Path, help="folder to write; goes on where an earlier run of the same command stopped")
    add("--detector", metavar="MODEL", help="an object detector of transformers (DETR family): hub name or folder")
    add("--encoder", metavar="MODEL", help="a vision model of transformers: hub name or folder; with --grid")
    add("--grid", type=int, metavar="N", help="N x N cells over the feature map of --encoder in place of boxes")
    add("--batch", type=int, default=16, metavar="N", help="pictures at a time [16]")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where the model runs [cuda, or cpu]")
    add_choice(parser)


def run(args: argparse.Namespace) -> None:
    if (args.detector is None) == (args.encoder is None) or (args.encoder is None) != (args.grid is None):
        raise ValueError("either --detector MODEL, or --encoder MODEL and --grid N")
    if args.batch < 1 or (args.grid is not None and args.grid < 1):
        raise ValueError(f"--batch {args.batch} and --grid {args.grid} must be 1 or more")
    manifest, device = load_manifest(args.shards), torch.device(args.device)
    if storage.is_local(manifest.folder) and args.out.resolve() == Path(manifest.folder).resolve():
        raise ValueError(f"{args.out} is where the shards are: name another folder")
    if args.grid is None:
        model, choice = load_detector(args.detector, device), Choice(args.confidence, args.least, args.most)
    else:
        model, choice = load_grid(args.encoder, args.grid, device), Choice(0.0, args.grid**2, args.grid**2)
    go_on(args.out, {
        "shards": manifest.content_hash, "detector": args.detector, "encoder": args.encoder, "grid": args.grid,
        **vars(choice),
    })  # fmt: skip
    left = [shard for shard, name in enumerate(manifest.names) if not (args.out / name).exists()]
    print(f"{len(manifest.names) - len(left)} of {len(manifest.names)} shards were written before")
    left_out: list[str] = []
    for shard in track(left, "regions", transient=True, disable=len(left) < 2):
        left_out += write_shard(manifest, shard, args.out, model, choice, args.batch)
    made = index(str(args.out), manifest.chunk_samples)  # so that the order of samples stays
    print("".join(f"  {line}\n" for line in left_out[:SHOWN]), end="")
    print(f"{args.out}: {made.samples:,} samples, {len(left_out):,} of them without regions; {_widths(made)}")


def go_on(out: Path, facts: dict) -> None:
    """Begin a folder, or make sure that what is in it was begun with these facts. ValueError where it was not."""
    file = out / FACTS
    if not file.exists() and any(out.rglob("*.tar")):
        raise ValueError(f"{out} already holds shards: remove it or name another folder")
    if file.exists() and json.loads(file.read_text()) != facts:
        raise ValueError(f"{out} was begun with other shards or another model ({file}): name another folder")
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(facts))


def write_shard(manifest: Manifest, shard: int, out: Path, model: RegionModel, choice: Choice, batch: int) -> list[str]:
    """Write one shard with its regions. Returns which samples have none, and why."""
    name, left_out = manifest.names[shard], []
    temporary = out / f"{name}.tmp"
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        with TarWriter(str(temporary), encoder=False, mtime=0) as tar:
            for samples in batches(manifest, shard, batch):
                for sample, regions in zip(samples, regions_of(samples, model, choice), strict=True):
                    files = {extension: data for extension, data in sample.files.items() if extension != EXTENSION}
                    if isinstance(regions, bytes):
                        files[EXTENSION] = regions
                    else:
                        left_out.append(f"{name}: sample {sample.key!r}: {regions}")
                    tar.write({"__key__": sample.key, **files})
        if storage.is_local(manifest.folder):
            for beside in (f"{Path(name).stem}.parquet", f"{Path(name).stem}_stats.json"):
                source = Path(manifest.folder) / Path(name).parent / beside
                if source.exists():
                    shutil.copyfile(source, temporary.parent / beside)
        temporary.replace(out / name)
    finally:
        temporary.unlink(missing_ok=True)
    return left_out


def batches(manifest: Manifest, shard: int, size: int) -> Iterator[list[RawSample]]:
    """The samples of a shard that are part of the data set, in order."""
    reader, waiting = Reader(manifest), list[RawSample]()
    for chunk in range(int(manifest.first_chunks[shard]), int(manifest.first_chunks[shard + 1])):
        length = int(manifest.chunk_lengths[chunk])
        waiting += reader.read(np.full(length, chunk), np.arange(length))
        while len(waiting) >= size:
            yield waiting[:size]
            waiting = waiting[size:]
    if waiting:
        yield waiting


def regions_of(samples: list[RawSample], model: RegionModel, choice: Choice) -> list[bytes | str]:
    """The .regions.npz of each sample, or why it has none."""
    images, out = {}, list[bytes | str]()
    for i, sample in enumerate(samples):
        try:
            images[i] = decode(sample.image(), ImageConfig.background, ImageConfig.max_pixels)
        except ImageError as error:
            out.append(" ".join(str(error).split()))
        else:
            out.append("")
    found = model(list(images.values())) if images else []
    for i, arrays in zip(images, found, strict=True):
        try:
            out[i] = region_file(arrays, choice)
        except RegionError as error:
            out[i] = str(error)
    return out


def _widths(manifest: Manifest) -> str:
    """What a method must be told of the regions: from the first sample that has some."""
    reader = Reader(manifest)
    for chunk in np.flatnonzero(manifest.chunk_lengths).tolist():
        length = int(manifest.chunk_lengths[chunk])
        for sample in reader.read(np.full(length, chunk), np.arange(length)):
            if EXTENSION in sample.files:
                arrays = read_file(sample.files[EXTENSION])
                classes = arrays[CLASSES].shape[1] if CLASSES in arrays else 0
                return f"a region has {arrays[FEATURES].shape[1]} numbers and {classes} classes"
    raise ValueError("no sample has regions: none of the pictures could be used")
