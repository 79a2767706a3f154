"""What is in packed shards, read by two independent readers that must agree."""

import json
from pathlib import Path

import numpy as np
from webdataset.tariterators import group_by_keys, tar_file_expander

from mmpt.data.manifest import load_manifest
from mmpt.data.reader import Reader


def samples(folder: Path) -> list[dict]:
    """Through webdataset, as any other trainer would read them."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        with path.open("rb") as stream:
            files = tar_file_expander([{"url": str(path), "stream": stream}])
            found += [sample for sample in group_by_keys(files) if "__key__" in sample]
    return found


def read_back(folder: Path) -> list[dict]:
    """Each sample's files by extension, `.json` parsed, as webdataset finds them; mmpt's reader must find the same.

    For data sets of fewer than 8192 samples, which the index cuts into chunks of one sample.
    """
    through_webdataset = [{k: v for k, v in sample.items() if not k.startswith("__")} for sample in samples(folder)]
    manifest = load_manifest(str(folder))
    n = manifest.samples
    read = Reader(manifest).read(np.arange(n), np.zeros(n, dtype=np.int64))
    assert [sample.files for sample in read] == through_webdataset
    return [files | {"json": json.loads(files["json"])} for files in through_webdataset]
