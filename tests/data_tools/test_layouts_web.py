"""Captions with addresses: small annotation files in the published shapes, images as a downloader leaves them."""

import bz2
import json
from pathlib import Path

import pytest

from tests.data.shards import picture
from tests.data_tools.layouts import failure, pack, write_images
from tests.data_tools.readback import read_back

URLS = [f"http://example.org/{i}/photograph_{i}.jpg?s=1" for i in range(4)]
CAPTIONS = ["a very typical bus station", 'sierra looked "stunning" in this top', "young confused girl", "the wall ."]
ALLOW = ("--missing-at-most", "0.25")


def check(found: list[dict], images: Path, names: dict[int, str]) -> None:
    """Row i of the annotations is the sample that has the image `names[i]`; the other rows are left out."""
    assert [sample["json"]["id"] for sample in found] == list(names)
    for (row, name), sample in zip(names.items(), found, strict=True):
        assert sample["json"]["url"] == URLS[row] and sample["json"]["source"] == name
        assert sample["txt"].decode() == CAPTIONS[row]
        extension = name.rpartition(".")[2]
        assert sample["jpg" if extension == "jpeg" else extension] == (images / name).read_bytes()


NAMINGS = [
    {0: "00000/000000000.jpg", 2: "00000/000000002.webp", 3: "00000/000000003.png"},
    {0: "0.jpg", 2: "2.jpeg", 3: "3.png"},
    {0: "000000000.jpg", 1: "000000001.png", 3: "000000003.jpg"},
]


@pytest.mark.parametrize("names", NAMINGS, ids=["img2dataset", "plain", "flat"])
@pytest.mark.parametrize("header", ["", "with header"])
@pytest.mark.parametrize("layout", ["cc3m", "cc12m"])
def test_conceptual_captions(tmp_path: Path, layout: str, header: str, names: dict[int, str]):
    kinds = {"jpg": "jpg", "jpeg": "jpg", "png": "png", "webp": "webp"}
    files = {name: picture(row, kinds[name.rpartition(".")[2]]) for row, name in names.items()}
    images = write_images(tmp_path, files)
    lines = [(caption, url) if layout == "cc3m" else (url, caption) for caption, url in zip(CAPTIONS, URLS)]
    if header:  # img2dataset asks its users to add one
        lines.insert(0, ("caption", "url") if layout == "cc3m" else ("url", "caption"))
    table = tmp_path / f"{layout}.tsv"
    table.write_text("".join("\t".join(cells) + "\n" for cells in lines))
    pack(tmp_path, layout, table, *ALLOW)
    check(read_back(tmp_path / "out"), images, names)


def test_cc3m_with_image_labels(tmp_path: Path):
    write_images(tmp_path, {"0.jpg": picture(0)})
    table = tmp_path / "labels.tsv"
    table.write_text(f"{CAPTIONS[0]}\t{URLS[0]}\tbus,station\t/m/01bjv,/m/0pmr5\t0.9,0.7\n")
    pack(tmp_path, "cc3m", table)
    (sample,) = read_back(tmp_path / "out")
    assert (sample["json"]["labels"], sample["json"]["label_scores"]) == (["bus", "station"], ["0.9", "0.7"])


def test_an_image_of_another_row_is_refused(tmp_path: Path):
    """The .json that img2dataset writes beside an image says where that was from."""
    write_images(tmp_path, {f"00000/00000000{i}.jpg": picture(i) for i in range(4)})
    table = tmp_path / "cc12m.tsv"
    table.write_text("".join(f"{url}\t{caption}\n" for caption, url in zip(CAPTIONS, URLS)))
    for i in range(4):
        beside = {"url": URLS[i], "caption": CAPTIONS[i], "status": "success"}
        (tmp_path / f"images/00000/00000000{i}.json").write_text(json.dumps(beside))
    pack(tmp_path, "cc12m", table)
    assert len(read_back(tmp_path / "out")) == 4
    table.write_text("".join(f"{url}\t{caption}\n" for caption, url in zip(CAPTIONS[1:], URLS[1:])))
    message = failure(tmp_path, "cc12m", table)
    assert f"cc12m.tsv: row 1: 00000/000000000.jpg was downloaded from {URLS[0]} and the row has {URLS[1]}" in message


def test_wukong(tmp_path: Path):
    texts = ["测试 图片,带逗号", '他说"好"']
    names = [f"wukong_100m_{file}/{row}.jpg" for file in (0, 255) for row in (0, 1)]
    images = write_images(tmp_path, {name: picture(i) for i, name in enumerate(names)})
    tables = []
    for file in (0, 255):
        table = tmp_path / f"wukong_100m_{file}.csv"
        quoted = [text.replace('"', '""') for text in texts]
        rows = "".join(f'http://example.cn/{file}/{row}.jpg,"{text}"\n' for row, text in enumerate(quoted))
        table.write_text("url,caption\n" + rows, encoding="utf-8")
        tables.append(table)
    pack(tmp_path, "wukong", *tables)
    found = read_back(tmp_path / "out")
    assert [sample["txt"].decode() for sample in found] == texts * 2
    assert [sample["json"]["url"] for sample in found] == [
        f"http://example.cn/{file}/{row}.jpg" for file in (0, 255) for row in (0, 1)
    ]
    assert [sample["jpg"] for sample in found] == [(images / name).read_bytes() for name in names]
    tables[1].write_text("url,caption\nhttp://x.cn/0.jpg\n")
    assert "wukong_100m_255.csv: row 1: it has not as many cells" in failure(tmp_path, "wukong", *tables)
    tables[1].write_text("address,caption\nhttp://x.cn/0.jpg,x\n")
    assert "wukong_100m_255.csv: row 1: there is no 'url'" in failure(tmp_path, "wukong", *tables, out="other")


FLICKR = ["http://static.flickr.com/2723/4385058960_b0f291553e.jpg", "http://static.flickr.com/5/77_a.jpg"]


@pytest.mark.parametrize("naming", ["path", "last part", "row"])
@pytest.mark.parametrize("form", ["text", "json"])
def test_sbu(tmp_path: Path, form: str, naming: str):
    names = {
        "path": ["2723_4385058960_b0f291553e.jpg", "5_77_a.jpg"],
        "last part": ["4385058960_b0f291553e.jpg", "77_a.jpg"],
        "row": ["00000/000000000.jpg", "00000/000000001.jpg"],
    }[naming]
    images = write_images(tmp_path, {name: picture(i) for i, name in enumerate(names)})
    captions = ["A wooden chair in the living room", "the view from my window &amp; beyond"]
    files = [tmp_path / "SBU_captioned_photo_dataset_captions.txt", tmp_path / "SBU_captioned_photo_dataset_urls.txt"]
    files[0].write_text("\n".join(captions) + "\n")
    files[1].write_text("\n".join(FLICKR) + "\n")
    if form == "json":
        files = [tmp_path / "sbu-captions-all.json"]
        files[0].write_text(json.dumps({"image_urls": FLICKR, "user_ids": ["a@N1", "b@N2"], "captions": captions}))
    pack(tmp_path, "sbu", *files)
    found = read_back(tmp_path / "out")
    assert [sample["txt"].decode() for sample in found] == captions
    assert [sample["json"]["url"] for sample in found] == FLICKR
    assert [sample["jpg"] for sample in found] == [(images / name).read_bytes() for name in names]
    if form == "json":
        assert [sample["json"]["user_id"] for sample in found] == ["a@N1", "b@N2"]
    else:
        files[0].write_text(captions[0] + "\n")
        assert "captions.txt has 1 rows and" in failure(tmp_path, "sbu", *files)
        assert "are wanted, got 3 files" in failure(tmp_path, "sbu", *files, files[0], out="b")


def photograph(line: int, number: int, digest: str, title: str, description: str) -> str:
    cells = [
        str(line), str(number), digest, "39019111@N00", "guckxzs", "2012-02-16 09:56:37.0", "1331840483", "Canon",
        title, description, "tag", "", "-81.8", "24.5", "12", f"http://www.flickr.com/photos/3@N0/{number}/",
        f"http://farm8.staticflickr.com/7205/{number}.jpg", "Attribution License",
        "http://creativecommons.org/licenses/by/2.0/", "7205", "8", "5a2c", "d0f1", "jpg", "0",
    ]  # fmt: skip
    return "\t".join(cells) + "\n"


@pytest.mark.parametrize("compressed", [False, True])
def test_yfcc15m(tmp_path: Path, compressed: bool):
    digests = [f"{letter}{i}cdef0123456789abcdef0123456789ab" for i, letter in enumerate("abcd")]
    tree = f"{digests[0][:3]}/{digests[0][3:6]}/{digests[0]}.jpg"
    images = write_images(tmp_path, {tree: picture(0), f"{digests[2]}.jpg": picture(2), "44.jpg": picture(3)})
    metadata = "".join([
        photograph(0, 11, digests[0], "Caf%C3%A9+at+night", "%3Cb%3ESee%3C%2Fb%3E%0A+Tom+%26amp%3B+me+%3C3"),
        photograph(1, 22, digests[1], "not+in+the+list", ""),
        photograph(2, 33, digests[2], "", "only+a+description"),
        photograph(3, 44, digests[3], "IMG+%2B1", "IMG+%2B1"),
    ])  # fmt: skip
    listed = "".join(f"{line}\t{number}\t{digests[line]}\n" for line, number in ((3, 44), (0, 11), (2, 33)))
    files = [tmp_path / "yfcc100m_dataset", tmp_path / "yfcc100m_subset_data.tsv"]
    for i, content in enumerate((metadata, listed)):
        if compressed:
            files[i] = files[i].with_name(files[i].name + ".bz2")
            files[i].write_bytes(bz2.compress(content.encode()))
        else:
            files[i].write_text(content)
    pack(tmp_path, "yfcc15m", *files)
    first, second, third = read_back(tmp_path / "out")
    assert first["txt"].decode().splitlines() == ["Café at night", "See Tom & me <3"]
    assert second["txt"].decode() == "only a description" and third["txt"].decode() == "IMG +1"
    assert [sample["json"]["id"] for sample in (first, second, third)] == [11, 33, 44]
    assert first["jpg"] == (images / tree).read_bytes() and third["jpg"] == (images / "44.jpg").read_bytes()
    assert first["json"]["license_url"] == "http://creativecommons.org/licenses/by/2.0/"
    assert (first["json"]["hash"], first["json"]["line"], first["json"]["user_id"]) == (digests[0], 0, "39019111@N00")
    if not compressed:
        files[1].write_text(listed + "9\t99\tffff\n")
        assert "yfcc100m_dataset has 3 of the 4 photographs" in failure(tmp_path, "yfcc15m", *files)
        assert "a list of three columns and the metadata are wanted" in failure(tmp_path, "yfcc15m", files[0], out="b")
        files[0].write_text(metadata + "5\t6\n")
        assert "yfcc100m_dataset: row 5: 2 columns where 25 are wanted" in failure(tmp_path, "yfcc15m", *files, out="c")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"{CAPTIONS[0]}\t{URLS[0]}\nonly a caption\n", "table.tsv: row 2: 1 columns where 2 are wanted"),
        (f"{URLS[0]}\t{CAPTIONS[0]}\n", "table.tsv: row 1: 'a very typical bus station' is not an address"),
    ],
)
def test_a_bad_row_is_one_line(tmp_path: Path, content: str, message: str):
    write_images(tmp_path, {"0.jpg": picture(0)})
    (tmp_path / "table.tsv").write_text(content)
    assert message in failure(tmp_path, "cc3m", tmp_path / "table.tsv")


def test_a_row_that_is_not_text_is_one_line(tmp_path: Path):
    write_images(tmp_path, {"0.jpg": picture(0)})
    (tmp_path / "table.tsv").write_bytes(f"{CAPTIONS[0]}\t{URLS[0]}\n".encode() + b"\xff\xfe\n")
    assert "table.tsv: after row" in failure(tmp_path, "cc3m", tmp_path / "table.tsv")
