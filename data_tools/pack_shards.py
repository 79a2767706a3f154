"""What `mmpt-data pack` writes: shards in img2dataset's shape.

    00000.tar           KEY.{jpg,png,webp}, KEY.txt (a caption per line), KEY.json (what is known of the pair);
                        KEY.right.{jpg,png,webp} where a sample has a second image; KEY.regions.npz where regions
                        were given; no KEY.txt where it has no caption
    00000.parquet       a row per pair, those that failed included
    00000_stats.json    counts; its presence means that the shard is complete

Equal inputs give equal bytes: no time of day goes into any file.
"""

import io
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
from webdataset.writer import TarWriter

SUCCESS, MISSING, UNDECODABLE = "success", "failed_to_download", "failed_to_resize"
NO_CAPTION, NO_REGIONS = "no_caption", "no_regions"


@dataclass(frozen=True)
class Packed:
    """One pair made ready, or the reason why it could not be. `facts` go to its .json file and the parquet row.

    images: file contents by extension, regions among them. captions: None for a sample that has none by its nature.
    """

    status: str
    images: dict[str, bytes]
    captions: tuple[str, ...] | None
    facts: dict[str, Any]


class ShardWriter:
    """Writes pairs in order to numbered shards of one folder."""

    def __init__(self, folder: Path, samples_per_shard: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._samples_per_shard = folder, samples_per_shard
        self._index_digits = max(4, len(str(samples_per_shard - 1)))
        self._shard = 0
        self._rows: list[dict[str, Any]] = []
        self._tar: TarWriter | None = None

    def add(self, pair: Packed) -> None:
        key = f"{self._shard:05d}{len(self._rows):0{self._index_digits}d}"
        row = {"key": key, "caption": pair.captions[0] if pair.captions else "", "status": pair.status, **pair.facts}
        self._rows.append(row)
        if pair.status == SUCCESS:
            text = {} if pair.captions is None else {"txt": "\n".join(pair.captions).encode()}
            known = json.dumps(row, ensure_ascii=False).encode()
            self._open_tar().write({"__key__": key, **pair.images, **text, "json": known})
        if len(self._rows) == self._samples_per_shard:
            self._finish_shard()

    def close(self) -> None:
        if self._rows:
            self._finish_shard()

    def abandon(self) -> None:
        """Leave no unfinished shard behind."""
        if self._tar is not None:
            self._tar.close()
            self._temporary().unlink()
            self._tar = None

    def _open_tar(self) -> TarWriter:
        if self._tar is None:
            self._tar = TarWriter(str(self._temporary()), encoder=False, mtime=0)
        return self._tar

    def _finish_shard(self) -> None:
        name = f"{self._shard:05d}"
        if self._tar is not None:
            self._tar.close()
            self._temporary().replace(self._folder / f"{name}.tar")
        table = io.BytesIO()
        names = dict.fromkeys(name for row in self._rows for name in row)  # rows of JSON may differ in their fields
        columns = {name: _column([row.get(name) for row in self._rows]) for name in names}
        parquet.write_table(pa.table(columns), table)
        (self._folder / f"{name}.parquet").write_bytes(table.getvalue())
        statuses = Counter(row["status"] for row in self._rows)
        stats = {
            "count": len(self._rows), "successes": statuses[SUCCESS], "failed_to_download": statuses[MISSING],
            "failed_to_resize": statuses[UNDECODABLE], "status_dict": dict(sorted(statuses.items())),
        }  # fmt: skip
        (self._folder / f"{name}_stats.json").write_text(json.dumps(stats, indent=1))
        self._shard, self._rows, self._tar = self._shard + 1, [], None

    def _temporary(self) -> Path:
        return self._folder / f"{self._shard:05d}.tar.tmp"


def _column(values: list[Any]) -> pa.Array:
    """Scalars of one type, and lists of them, as they are; anything else as JSON."""
    if not any(_is_nested(value) for value in values):
        try:
            return pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            pass  # several types
    return pa.array([json.dumps(value, ensure_ascii=False) for value in values])


def _is_nested(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, (dict, list)) for v in value))
