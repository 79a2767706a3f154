"""The annotation layouts of published data sets, by name. docs/datasets.md says what each wants to be given.

A layout is a function of (images, annotation files) that yields one Pair per sample, in the order of the annotations.
Its rows carry `id`, the sample's name in the data set, and `split` where the annotations name one.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from data_tools.layouts_captions import read_coco, read_flickr30k, read_visual_genome
from data_tools.layouts_questions import read_vcr, read_vqa2
from data_tools.layouts_statements import read_nlvr, read_nlvr2
from data_tools.layouts_web import read_cc3m, read_cc12m, read_sbu, read_wukong, read_yfcc15m
from data_tools.pack_sources import ImageSource, Pair

LAYOUTS = {
    "coco": read_coco,
    "flickr30k": read_flickr30k,
    "vg": read_visual_genome,
    "sbu": read_sbu,
    "cc3m": read_cc3m,
    "cc12m": read_cc12m,
    "yfcc15m": read_yfcc15m,
    "wukong": read_wukong,
    "vqa2": read_vqa2,
    "nlvr": read_nlvr,
    "nlvr2": read_nlvr2,
    "vcr": read_vcr,
}


def read_layout(name: str, images: ImageSource, files: Sequence[Path], splits: Sequence[str]) -> Iterator[Pair]:
    """The samples of these splits; of all when none is named.

    Raises ValueError for a missing file, for a row that does not follow the layout, and when there is no such sample.
    """
    for file in files:
        if not file.is_file():
            raise ValueError(f"there is no annotation file {file}")
    found, kept = dict.fromkeys(splits, 0), 0
    others: set[str] = set()
    for pair in LAYOUTS[name](images, files):
        split = pair.row.get("split")
        if splits and split is None:
            raise ValueError(f"--split {splits[0]}: these annotations of {name} name no splits")
        if splits and split not in found:
            others.add(str(split))
            continue
        if splits:
            found[str(split)] += 1
        kept += 1
        yield pair
    for split, count in found.items():
        if not count:
            raise ValueError(f"--split {split}: there is none; there is {', '.join(sorted(others)) or 'no other'}")
    if not kept:
        raise ValueError(f"{files[0]} has no samples")
