"""One loader of the benchmark, in a process of its own, obeying lines on its standard input.

    python benchmarks/loader_parts/contender.py KIND SHARDS TOKENIZER BATCH SIZE

A line with a number makes it take so many batches and answer with a line of JSON: samples, wall and CPU seconds, of
this process and its worker together. Each round begins and ends with the worker idle, as many batches ahead as it may
be, so that what it makes in a round is what was taken. Kind `open_clip` imports nothing of ours, for it runs in an
environment of its own.
"""

import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import torch

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP, as open_clip has them
CROP_SCALE, CROP_RATIO, TEXT_TOKENS, ENDLESS = (0.9, 1.0), (3 / 4, 4 / 3), 77, 10**8
WARM_UP_BATCHES, IDLE_SECONDS = 3, 0.8


def main() -> None:
    kind, shards, tokenizer, batch, size = sys.argv[1:]
    torch.set_num_threads(1)
    batches = KINDS[kind](Path(shards), tokenizer, int(batch), int(size))
    for _ in range(WARM_UP_BATCHES):
        next(batches)
    _, cpu = when_idle()
    print("ready", flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        samples = sum(next(batches) for _ in range(int(line)))
        (end, after), before = when_idle(), cpu
        cpu = after
        print(json.dumps({"samples": samples, "wall": end - start, "cpu": after - before}), flush=True)


def when_idle() -> tuple[float, float]:
    """Waits until the workers have done nothing for a while; (when they stopped, CPU seconds up to then)."""
    last, stopped = workers()[1], time.perf_counter()
    while time.perf_counter() - stopped < IDLE_SECONDS:
        time.sleep(IDLE_SECONDS / 20)
        states, now = workers()
        if now != last or states & {"R", "D"}:  # running, or waiting for a disk
            last, stopped = now, time.perf_counter()
    return stopped, time.process_time() + last


def workers() -> tuple[set[str], float]:
    """(states, CPU seconds) of the worker processes; proc(5) has the fields."""
    states, ticks = set(), 0
    for child in multiprocessing.active_children():
        state, *fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        states.add(state)
        ticks += int(fields[10]) + int(fields[11])  # utime, stime
    return states, ticks / os.sysconf("SC_CLK_TCK")


def mmpt(shards: Path, tokenizer: str, batch: int, size: int) -> Iterator[int]:
    from mmpt.data.image import ImageConfig
    from mmpt.data.loader import DataConfig, build_loader
    from mmpt.inputs import InputSpec

    image = ImageConfig(crop_scale=CROP_SCALE)
    config = DataConfig(shards=str(shards), tokenizer=tokenizer, workers=1, image=image)
    inputs = InputSpec(image_size=size, max_text_tokens=TEXT_TOKENS, vocab_size=ENDLESS)
    for made in build_loader(config, inputs, 0, batch, 0, 1):
        assert made.pictures.pixels.shape == (batch, 3, size, size)
        yield len(made)


def webdataset(shards: Path, tokenizer: str, batch: int, size: int) -> Iterator[int]:
    """The stages of open_clip's data.py, with webdataset, PIL and torch as they are installed here."""
    import webdataset as wds
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(tokenizer)

    def tokenise(text: str) -> torch.Tensor:
        ids = made(text, padding="max_length", truncation=True, max_length=TEXT_TOKENS, return_tensors="pt").input_ids
        return ids[0]

    pipeline = wds.DataPipeline(
        wds.SimpleShardList([str(path) for path in sorted(shards.glob("*.tar"))]),
        wds.detshuffle(),
        wds.split_by_node,
        wds.split_by_worker,
        wds.tarfile_to_samples(),
        wds.shuffle(5000, initial=1000),
        wds.decode("pilrgb"),
        wds.rename(image="jpg", text="txt"),
        wds.map_dict(image=full_decode_transform(size), text=tokenise),
        wds.to_tuple("image", "text"),
        wds.batched(batch, partial=False),
    ).with_epoch(ENDLESS)
    for images, _ in wds.WebLoader(pipeline, batch_size=None, shuffle=False, num_workers=1):
        assert images.shape == (batch, 3, size, size)
        yield len(images)


def full_decode_transform(size: int) -> Callable:
    """RandomResizedCrop, ToTensor and Normalize with torchvision's semantics: whole-pixel crop, Pillow's bicubic."""
    import random

    import numpy as np
    from PIL import Image

    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))

    def crop_box(width: int, height: int) -> tuple[int, int, int, int]:
        for _ in range(10):
            area = width * height * random.uniform(*CROP_SCALE)
            ratio = math.exp(random.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = random.randint(0, width - w), random.randint(0, height - h)
                return left, top, left + w, top + h
        w, h = min(width, round(height * CROP_RATIO[1])), min(height, round(width / CROP_RATIO[0]))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h

    def transform(image: Image.Image) -> torch.Tensor:
        crop = image.crop(crop_box(*image.size)).resize((size, size), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1).contiguous()  # [3, H, W]
        return pixels.to(torch.float32).div(255).sub_(mean).div_(std)

    return transform


def open_clip(shards: Path, tokenizer: str, batch: int, size: int) -> Iterator[int]:
    """open_clip's own get_wds_dataset, train transform and tokenizer, untouched."""
    import open_clip
    from open_clip.transform import AugmentationCfg, image_transform
    from open_clip_train.data import get_wds_dataset

    names = sorted(path.stem for path in shards.glob("*.tar"))
    args = SimpleNamespace(
        train_data=f"{shards}/{{{names[0]}..{names[-1]}}}.tar", train_num_samples=ENDLESS, dataset_resampled=False,
        train_data_upsampling_factors=None, seed=0, batch_size=batch, workers=1, world_size=1,
    )  # fmt: skip
    transform = image_transform(size, is_train=True, mean=MEAN, std=STD, aug_cfg=AugmentationCfg(scale=CROP_SCALE))
    data = get_wds_dataset(args, transform, is_train=True, tokenizer=open_clip.get_tokenizer("ViT-B-32"))
    for images, _ in data.dataloader:
        assert images.shape == (batch, 3, size, size)
        yield len(images)


KINDS = {"mmpt": mmpt, "webdataset": webdataset, "open_clip": open_clip}


if __name__ == "__main__":
    main()
