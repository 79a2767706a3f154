"""Statements that are true or false of images: NLVR and NLVR2. They are no captions, so there is no .txt file."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from data_tools.annotations import at_row, json_lines
from data_tools.pack_sources import ImageSource, Pair, find

PERMUTATIONS = 6
LABELS = {"true": True, "false": False}


def read_nlvr(images: ImageSource, files: Sequence[Path]) -> Iterator[Pair]:
    """NLVR (Suhr et al. 2017): train.json, dev.json, test.json, hidden.json; the name of the file is the split. Each
    example is six samples, one for each order of its three boxes (`permutation`).

    Images are `dev-1373-0-5.png`, in IMAGES, or as published below IMAGES in images/DIRECTORY/, DIRECTORY/ or
    dev/images/DIRECTORY/.
    """
    for file in files:
        split = file.name.partition(".")[0]
        for number, row in json_lines(file):
            with at_row(file, number):
                known = {
                    "id": row["identifier"], "split": split, "sentence": row["sentence"], "label": _label(row["label"]),
                    "directory": row.get("directory"), "structured_rep": row.get("structured_rep"),
                    "evals": row.get("evals"),
                }  # fmt: skip
                folders = ("", f"images/{row['directory']}/", f"{row['directory']}/")
                folders += (f"{split}/images/{row['directory']}/",)
                for permutation in range(PERMUTATIONS):
                    name = f"{split}-{row['identifier']}-{permutation}.png"
                    image = find(images, *(folder + name for folder in folders))
                    yield Pair(image, None, known | {"permutation": permutation})


def read_nlvr2(images: ImageSource, files: Sequence[Path]) -> Iterator[Pair]:
    """NLVR2 (Suhr et al. 2019): train.json, dev.json, test1.json, test2.json, or the balanced and unbalanced parts. The
    split is the first word of the identifier. The right image is the sample's second one.

    Images are `dev-850-0-img0.png` (left) and `dev-850-0-img1.png`, in IMAGES or below it in dev/, images/dev/ or
    images/train/DIRECTORY/.
    """
    for file in files:
        for number, row in json_lines(file):
            with at_row(file, number):
                identifier = row["identifier"]
                split, _, rest = identifier.partition("-")
                pair, dash, sentence = rest.rpartition("-")
                if not dash or not sentence.isdigit():
                    raise ValueError(f"identifier {identifier!r} is not SPLIT-SET-PAIR-SENTENCE")
                directory = row.get("directory", "")
                folders = ("", f"{split}/", f"images/{split}/", f"images/{split}/{directory}/", f"{directory}/")
                left, right = (
                    find(images, *(f"{folder}{split}-{pair}-img{side}.png" for folder in folders)) for side in (0, 1)
                )
                known = {
                    "id": identifier, "split": split, "sentence": row["sentence"], "label": _label(row["label"]),
                    "url": row.get("left_url"), "right_url": row.get("right_url"), "directory": row.get("directory"),
                    "synset": row.get("synset"), "query": row.get("query"), "writer": row.get("writer"),
                }  # fmt: skip
                yield Pair(left, None, known, right)


def _label(text: str) -> bool:
    if text.lower() not in LABELS:
        raise ValueError(f"label {text!r} is neither true nor false")
    return LABELS[text.lower()]
