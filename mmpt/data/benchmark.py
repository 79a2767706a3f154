"""Evaluation sets as CLIP_benchmark publishes them, read as they are:

    FOLDER/test/nshards.txt, 0.tar, 1.tar, ...    KEY.{jpg,png,webp} with KEY.cls (classification: the class index)
                                                  or KEY.txt (retrieval: one caption per line)
    FOLDER/classnames.txt                         one name per line, in the order of the indices
    FOLDER/zeroshot_classification_templates.txt  one prompt per line, {c} where the name goes

(LAION-AI/CLIP_benchmark, clip_benchmark/webdataset_builder.py and datasets/builder.py.)
"""

from mmpt.data import storage
from mmpt.data.manifest import Manifest
from mmpt.data.scan import build_manifest
from mmpt.data.storage import ListedFile

SPLIT = "test"
COUNT_FILE = "nshards.txt"
CLASS_NAMES_FILE = "classnames.txt"
TEMPLATES_FILE = "zeroshot_classification_templates.txt"


def load_benchmark(folder: str) -> Manifest | None:
    """The manifest of the test split, made by scanning its shards; None when the folder is not laid out this way.

    Raises ValueError when the number of shards is not a number, ShardError for a damaged shard, FileNotFoundError for a
    missing one.
    """
    split = storage.join(folder, SPLIT)
    count_file = storage.join(split, COUNT_FILE)
    if not storage.exists(count_file):
        return None
    text = storage.read_text(count_file).strip()
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"{count_file} should hold the number of shards and holds {text!r}")
    names = [f"{i}.tar" for i in range(int(text))]
    sizes = [storage.size_bytes(storage.join(split, name)) for name in names]
    return build_manifest(split, [ListedFile(name, size, "") for name, size in zip(names, sizes, strict=True)])


def read_class_names(folder: str) -> list[str]:
    """The class names in the order of their indices. Raises ValueError when the folder has none."""
    return _lines(folder, CLASS_NAMES_FILE)


def read_templates(folder: str) -> list[str]:
    """The prompts, each with {c} where the class name goes. Raises ValueError when there is none or one has no {c}."""
    templates = _lines(folder, TEMPLATES_FILE)
    for template in templates:
        if "{c}" not in template:
            raise ValueError(f"{storage.join(folder, TEMPLATES_FILE)}: {template!r} has no {{c}} for the class name")
    return templates


def _lines(folder: str, name: str) -> list[str]:
    place = storage.join(folder, name)
    if not storage.exists(place):
        raise ValueError(f"{place} does not exist")
    lines = [line.strip() for line in storage.read_text(place).splitlines()]
    if not (lines := [line for line in lines if line]):
        raise ValueError(f"{place} is empty")
    return lines
