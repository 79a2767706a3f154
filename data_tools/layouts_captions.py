"""Images with captions written for them: COCO Captions, Flickr30k, Visual Genome."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_tools.annotations import at_row, json_array, read_json, rows_of, text_lines
from data_tools.pack_sources import ImageSource, Pair, find, texts


def read_coco(images: ImageSource, files: Sequence[Path]) -> Iterator[Pair]:
    """COCO Captions (Chen et al. 2015): captions_train2014.json, captions_val2017.json, ..., or dataset_coco.json of
    Karpathy and Fei-Fei 2015, whose splits are train, restval, val and test.

    Images lie in IMAGES or in a folder of it named as the split (`train2014/`).
    """
    for file in files:
        content = read_json(file)
        yield from _karpathy(images, file, content) if "annotations" not in content else _coco(images, file, content)


def _coco(images: ImageSource, file: Path, content: dict[str, Any]) -> Iterator[Pair]:
    named = re.fullmatch(r"captions_(\w+)", file.stem)
    split = {"split": named[1]} if named else {}
    licenses = {row["id"]: row for _, row in rows_of(file, content, "licenses")} if "licenses" in content else {}
    captions: dict[Any, list[tuple[str, Any]]] = {}
    for number, row in rows_of(file, content, "annotations"):
        with at_row(file, number):
            captions.setdefault(row["image_id"], []).extend((text, row["id"]) for text in texts(row["caption"]))
    if strangers := captions.keys() - {row.get("id") for _, row in rows_of(file, content, "images")}:
        raise ValueError(f"{file}: image_id {min(strangers)} of an annotation is not among the images")
    for number, row in rows_of(file, content, "images"):
        with at_row(file, number):
            name, found = row["file_name"], captions.get(row["id"], [])
            license_row = licenses.get(row.get("license"), {})
            yield Pair(
                find(images, name, *(f"{folder}/{name}" for folder in split.values())),
                _distinct([text for text, _ in found]),
                {
                    "id": row["id"], **split, "caption_ids": [number for _, number in found],
                    "url": row.get("coco_url"), "flickr_url": row.get("flickr_url"),
                    "license": license_row.get("name"), "license_url": license_row.get("url"),
                },
            )  # fmt: skip


def _karpathy(images: ImageSource, file: Path, content: dict[str, Any]) -> Iterator[Pair]:
    for number, row in rows_of(file, content, "images"):
        with at_row(file, number):
            name, folder = row["filename"], row.get("filepath", "flickr30k-images")
            ids = {key: row[key] for key in ("cocoid", "imgid", "sentids") if key in row}
            yield Pair(
                find(images, name, f"{folder}/{name}"),
                _distinct([text for sentence in row["sentences"] for text in texts(sentence["raw"])]),
                {"id": row.get("cocoid", Path(name).stem), "split": row["split"], **ids},
            )


def read_flickr30k(images: ImageSource, files: Sequence[Path]) -> Iterator[Pair]:
    """Flickr30k (Young et al. 2014): results_20130124.token, which names no splits, or dataset_flickr30k.json of
    Karpathy and Fei-Fei 2015 (train, val, test). Images lie in IMAGES or in its folder flickr30k-images/."""
    for file in files:
        if file.suffix == ".json":
            yield from _karpathy(images, file, read_json(file))
        else:
            yield from _flickr_tokens(images, file)


def _flickr_tokens(images: ImageSource, file: Path) -> Iterator[Pair]:
    captions: dict[str, list[str]] = {}
    for number, line in text_lines(file):
        with at_row(file, number):
            label, tab, caption = line.partition("\t")
            name, mark, place = label.rpartition("#")
            if not tab or not mark or not place.isdigit():
                raise ValueError(f"{line[:60]!r} is not IMAGE#NUMBER, a tab and a caption")
            captions.setdefault(name, []).extend(texts(caption))
    for name, found in captions.items():
        yield Pair(find(images, name, f"flickr30k-images/{name}"), _distinct(found), {"id": Path(name).stem})


def read_visual_genome(images: ImageSource, files: Sequence[Path]) -> Iterator[Pair]:
    """Visual Genome (Krishna et al. 2017): region_descriptions.json and, for addresses and the ids of the same images
    in COCO and Flickr, image_data.json. The captions are the phrases of the regions; `regions` has their boxes
    (x, y of the top left corner, width, height; pixels of the original image).

    Images lie in IMAGES or in its folders VG_100K/ and VG_100K_2/. No splits.
    """
    known: dict[int, dict[str, Any]] = {}
    regions_files = []
    for file in files:
        first = next(json_array(file), (0, {}))[1]
        if "regions" in first:
            regions_files.append(file)
            continue
        for number, row in json_array(file):
            with at_row(file, number):
                known[_image_id(row)] = {name: row.get(name) for name in ("url", "coco_id", "flickr_id")}
    if len(regions_files) != 1:
        raise ValueError(f"one region_descriptions.json is wanted, got {len(regions_files)} in {len(files)} files")
    file = regions_files[0]
    for number, row in json_array(file):
        with at_row(file, number):
            image_id = _image_id(row)
            name = f"{image_id}.jpg"
            if known and image_id not in known:
                raise ValueError(f"image {image_id} is not in the image data")
            yield Pair(
                find(images, name, f"VG_100K/{name}", f"VG_100K_2/{name}"),
                _distinct([text for region in row["regions"] for text in texts(region["phrase"])]),
                {"id": image_id, **known.get(image_id, {}), "regions": [_region(region) for region in row["regions"]]},
            )


def _image_id(row: dict[str, Any]) -> int:
    return row["id"] if "id" in row else row["image_id"]  # both names were published


def _region(region: dict[str, Any]) -> dict[str, Any]:
    return {name: region[name] for name in ("region_id", "phrase", "x", "y", "width", "height")}


def _distinct(captions: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(captions))
