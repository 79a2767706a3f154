"""What the training loader delivers in one epoch."""

from pathlib import Path

from data_tools.__main__ import main
from mmpt.data.loader import DataConfig, build_loader
from mmpt.data.manifest import load_manifest
from mmpt.inputs import InputSpec


def index_and_load(
    folder: Path, tokenizer: str, inputs: InputSpec, batch: int = 4, caption_field: str = "txt"
) -> list[str]:
    """`mmpt-data index`, then the keys of one epoch in the order of delivery, one process for all batches."""
    main(["index", str(folder)])
    samples = load_manifest(str(folder)).samples
    config = DataConfig(shards=str(folder), tokenizer=tokenizer, caption_field=caption_field, workers=0)
    loader = build_loader(config, inputs, seed=0, global_batch=batch, rank=0, world_size=1)
    keys: list[str] = []
    try:
        while len(keys) < samples:
            made = next(loader)
            assert made.pictures.pixels.shape == (batch, 3, inputs.image_size, inputs.image_size)
            keys += made.keys
        assert not loader.take_quarantined()
    finally:
        loader.close()
    return keys[:samples]
