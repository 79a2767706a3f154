"""COCO, Flickr30k and Visual Genome: small annotation files in the published shapes, packed and read back."""

import json
from pathlib import Path

import pytest

from tests.data.shards import picture
from tests.data_tools.layouts import failure, pack, write_images
from tests.data_tools.readback import read_back

COCO = {
    "info": {"year": 2014, "version": "1.0"},
    "licenses": [
        {"url": "http://creativecommons.org/licenses/by/2.0/", "id": 4, "name": "Attribution License"},
        {"url": "http://flickr.com/commons/usage/", "id": 7, "name": "No known copyright restrictions"},
    ],
    "images": [
        {"license": 4, "file_name": "COCO_val2014_000000391895.jpg", "id": 391895, "height": 25, "width": 25,
         "coco_url": "http://mscoco.org/391895", "flickr_url": "http://farm9.staticflickr.com/8186/8119.jpg"},
        {"license": 7, "file_name": "COCO_val2014_000000000042.jpg", "id": 42, "height": 26, "width": 26,
         "coco_url": "http://mscoco.org/42", "flickr_url": "http://farm1.staticflickr.com/7/42.jpg"},
    ],
    "annotations": [
        {"image_id": 42, "id": 641613, "caption": "This wire metal rack holds several pairs of shoes and sandals"},
        {"image_id": 391895, "id": 770337, "caption": " A man with a red helmet on a small moped on a dirt road. \n"},
        {"image_id": 42, "id": 645309, "caption": "A dog sleeping on a show rack in the shoes."},
        {"image_id": 391895, "id": 771687, "caption": "Man riding a motor bike on a dirt road on the countryside."},
    ],
}  # fmt: skip


def written(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("inside", ["", "val2014/"])
def test_coco_captions(tmp_path: Path, inside: str):
    names = [image["file_name"] for image in COCO["images"]]
    images = write_images(tmp_path, {inside + name: picture(i, "jpg") for i, name in enumerate(names)})
    pack(tmp_path, "coco", written(tmp_path / "captions_val2014.json", COCO))
    first, second = read_back(tmp_path / "out")
    assert first["txt"].decode().splitlines() == [
        "A man with a red helmet on a small moped on a dirt road.",
        "Man riding a motor bike on a dirt road on the countryside.",
    ]
    assert first["jpg"] == (images / inside / names[0]).read_bytes()
    known = second["json"]
    assert second["txt"].decode().startswith("This wire metal rack") and known["caption_ids"] == [641613, 645309]
    assert (known["id"], known["split"], known["source"]) == (42, "val2014", inside + names[1])
    assert (known["url"], known["flickr_url"]) == ("http://mscoco.org/42", "http://farm1.staticflickr.com/7/42.jpg")
    assert known["license"] == "No known copyright restrictions"
    assert known["license_url"] == "http://flickr.com/commons/usage/"


def karpathy(dataset: str) -> dict:
    images = []
    for number, split in enumerate(["train", "restval", "val", "test", "train"]):
        sentences = [
            {"tokens": ["x"], "raw": f"Sentence {i}  of image {number}. ", "imgid": number, "sentid": 5 * number + i}
            for i in range(5)
        ]
        image = {"filename": f"{number}.jpg", "imgid": number, "split": split, "sentences": sentences}
        image |= {"sentids": [s["sentid"] for s in sentences]}
        images.append(image | ({"filepath": "val2014", "cocoid": 1000 + number} if dataset == "coco" else {}))
    return {"images": images, "dataset": dataset}


@pytest.mark.parametrize(("dataset", "folder"), [("coco", "val2014"), ("flickr30k", "flickr30k-images")])
def test_karpathy_splits(tmp_path: Path, dataset: str, folder: str):
    images = write_images(tmp_path, {f"{folder}/{i}.jpg": picture(i) for i in range(5)})
    file = written(tmp_path / f"dataset_{dataset}.json", karpathy(dataset))
    pack(tmp_path, dataset, file, "--split", "train", "--split", "restval")
    found = read_back(tmp_path / "out")
    assert [sample["json"]["split"] for sample in found] == ["train", "restval", "train"]
    for number, sample in zip((0, 1, 4), found, strict=True):
        assert sample["jpg"] == (images / folder / f"{number}.jpg").read_bytes()
        assert sample["txt"].decode().splitlines() == [f"Sentence {i} of image {number}." for i in range(5)]
        assert sample["json"]["sentids"] == [5 * number + i for i in range(5)]
        assert sample["json"]["id"] == (1000 + number if dataset == "coco" else str(number))
    assert "--split dev: there is none; there is restval, test, train, val" in failure(
        tmp_path, dataset, file, "--split", "dev", out="other"
    )


def test_flickr30k_token_file(tmp_path: Path):
    write_images(tmp_path, {"1000092795.jpg": picture(1), "10002456.jpg": picture(2)})
    file = tmp_path / "results_20130124.token"
    file.write_text(
        "1000092795.jpg#0\tTwo young guys with shaggy hair look at their hands .\n"
        "1000092795.jpg#1\tTwo young , White males are outside near many bushes .\n"
        "10002456.jpg#0\tSeveral men in hard hats # 5 are operating a giant pulley system .\n"
    )
    pack(tmp_path, "flickr30k", file)
    first, second = read_back(tmp_path / "out")
    assert len(first["txt"].decode().splitlines()) == 2 and first["json"]["id"] == "1000092795"
    assert second["txt"].decode() == "Several men in hard hats # 5 are operating a giant pulley system ."
    assert "name no splits" in failure(tmp_path, "flickr30k", file, "--split", "train", out="other")
    file.write_text(file.read_text() + "10002456.jpg\tno number\n")
    assert "results_20130124.token: row 4: '10002456.jpg\\tno number' is not" in failure(
        tmp_path, "flickr30k", file, out="other"
    )


def region(number: int, phrase: str, image: int) -> dict:
    return {"region_id": number, "width": 20, "height": 9, "image_id": image, "phrase": phrase, "y": -1, "x": number}


def test_visual_genome(tmp_path: Path):
    images = write_images(tmp_path, {"VG_100K_2/1.jpg": picture(1), "VG_100K/61512.jpg": picture(2)})
    regions = [
        {"id": 1, "regions": [region(1382, "the clock is\n green in colour", 1), region(1383, "shade is along", 1)]},
        {"id": 61512, "regions": [region(1, "A brown horse", 61512), region(2, "A brown horse", 61512)]},
    ]
    known = [
        {"image_id": 1, "url": "https://cs.stanford.edu/VG_100K_2/1.jpg", "width": 800, "height": 600,
         "coco_id": None, "flickr_id": None},
        {"image_id": 61512, "url": "https://cs.stanford.edu/VG_100K/61512.jpg", "width": 1024, "height": 768,
         "coco_id": 248774, "flickr_id": 6273011878},
    ]  # fmt: skip
    descriptions = tmp_path / "region_descriptions.json"
    descriptions.write_text(json.dumps(regions, indent=2))  # white space between the objects, too
    data = written(tmp_path / "image_data.json", known)
    pack(tmp_path, "vg", data, descriptions)
    first, second = read_back(tmp_path / "out")
    assert first["txt"].decode().splitlines() == ["the clock is green in colour", "shade is along"]
    assert first["jpg"] == (images / "VG_100K_2/1.jpg").read_bytes()
    assert second["txt"].decode() == "A brown horse"  # said twice, of two boxes
    assert [r["region_id"] for r in second["json"]["regions"]] == [1, 2]
    assert first["json"]["regions"][1] == {
        "region_id": 1383, "phrase": "shade is along", "x": 1383, "y": -1, "width": 20, "height": 9,
    }  # fmt: skip
    assert (second["json"]["id"], second["json"]["coco_id"], second["json"]["flickr_id"]) == (61512, 248774, 6273011878)
    assert second["json"]["url"].endswith("61512.jpg")

    assert "one region_descriptions.json is wanted, got 0" in failure(tmp_path, "vg", data, out="b")
    written(data, known[:1])
    assert "region_descriptions.json: row 2: image 61512 is not in the image data" in failure(
        tmp_path, "vg", data, descriptions, out="c"
    )
    descriptions.write_text(json.dumps(regions)[:-1])
    assert "region_descriptions.json: row 2: the file ends after it" in failure(tmp_path, "vg", descriptions, out="d")
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotations": [{"image_id": 42, "caption": "x"}]}, r"captions_x.json: row 1: there is no 'id'"),
        ({"annotations": [{"image_id": 5, "id": 1, "caption": "x"}]}, "image_id 5 of an annotation is not among"),
        ({"annotations": ["x"]}, "captions_x.json: row 1: 'x' is not an object"),
        ({"images": {}}, "has no list 'images'"),
    ],
)
def test_a_bad_row_is_one_line(tmp_path: Path, change: dict, message: str):
    write_images(tmp_path, {image["file_name"]: picture(i) for i, image in enumerate(COCO["images"])})
    assert message in failure(tmp_path, "coco", written(tmp_path / "captions_x.json", COCO | change))


def test_missing_images_are_an_error_above_a_share(tmp_path: Path, capsys: pytest.CaptureFixture):
    write_images(tmp_path, {f"val2014/{i}.jpg": picture(i) for i in range(4)})
    file = written(tmp_path / "dataset_coco.json", karpathy("coco"))
    message = failure(tmp_path, "coco", file, out="strict")
    assert "1 of 5 samples were left out and --missing-at-most is 0: the first is 4.jpg: there is no image" in message
    assert not list((tmp_path / "strict").glob("manifest*"))
    assert "--missing-at-most is 0.19" in failure(tmp_path, "coco", file, "--missing-at-most", "0.19", out="less")
    pack(tmp_path, "coco", file, "--missing-at-most", "0.2")
    assert "4 pairs packed, 1 left out" in capsys.readouterr().out
    assert len(read_back(tmp_path / "out")) == 4
    assert "--missing-at-most must be in [0, 1]" in failure(tmp_path, "coco", file, "--missing-at-most", "2", out="x")


def test_what_is_given_wrongly_is_one_line(tmp_path: Path):
    write_images(tmp_path, {"0.jpg": picture(0)})
    assert "there is no annotation file" in failure(tmp_path, "coco", tmp_path / "captions_nowhere.json")
    empty = written(tmp_path / "captions_empty.json", {"images": [], "annotations": []})
    assert "captions_empty.json has no samples" in failure(tmp_path, "coco", empty)
    (tmp_path / "captions_bad.json").write_text("{")
    assert "captions_bad.json is not JSON" in failure(tmp_path, "coco", tmp_path / "captions_bad.json")
    assert "holds a list where an object is wanted" in failure(
        tmp_path, "coco", written(tmp_path / "captions_list.json", [])
    )
