import csv
import io
import json
import os
import re
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from data_tools.__main__ import main
from data_tools.pack_workers import WORTH_PROCESSES
from mmpt.data.image import decode
from mmpt.data.manifest import FILE_NAME, load_manifest
from tests.data.shards import caption, picture
from tests.data_tools.readback import samples
from tests.shared_data import shared_data


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for number in range(10):
        extension = ("jpg", "png", "webp")[number % 3]
        path = folder / f"group{number // 2}" / f"{number}.{extension}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number, extension))
    return folder


def names(images: Path) -> list[str]:
    return sorted(str(path.relative_to(images)) for path in images.rglob("*.*"))


def write_table(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("container", ["folder", "tar"])
def test_every_table_and_container_gives_the_same_shards(images: Path, tmp_path: Path, suffix: str, container: str):
    table = write_table(
        tmp_path / f"captions{suffix}",
        [{"image": name, "caption": caption(i), "who": f"person {i}"} for i, name in enumerate(names(images))],
    )
    source = images
    if container == "tar":
        source = tmp_path / "images.tar"
        with tarfile.open(source, "w") as tar:
            tar.add(images, arcname=".")
    out = tmp_path / "out"
    main(["pack", str(source), str(table), str(out), "--samples-per-shard", "4"])

    assert sorted(path.name for path in out.iterdir()) == [
        *(f"0000{i}{end}" for i in range(3) for end in (".parquet", ".tar", "_stats.json")), FILE_NAME,
    ]  # fmt: skip
    packed = samples(out)
    assert [sample["__key__"] for sample in packed] == [f"0000{i // 4}000{i % 4}" for i in range(10)]
    for i, (sample, name) in enumerate(zip(packed, names(images), strict=True)):
        assert sample[name.rpartition(".")[2]] == (images / name).read_bytes()
        assert sample["txt"].decode() == caption(i)
        known = json.loads(sample["json"])
        assert known["source"] == name and known["who"] == f"person {i}" and known["captions"] == [caption(i)]
        assert (known["width"], known["height"]) == Image.open(io.BytesIO((images / name).read_bytes())).size
    rows = parquet.read_table(out / "00000.parquet").to_pylist()
    assert [row["status"] for row in rows] == ["success"] * 4 and rows[2]["key"] == "000000002"
    assert json.loads((out / "00002_stats.json").read_text())["successes"] == 2
    assert load_manifest(str(out)).samples == 10


def test_the_same_input_gives_the_same_bytes(images: Path, tmp_path: Path):
    table = write_table(tmp_path / "c.csv", [{"image": name, "caption": "x"} for name in names(images)])
    for out in ("a", "b"):
        main(["pack", str(images), str(table), str(tmp_path / out), "--validation-fraction", "0.5", "--resize", "20"])
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 8
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)


def test_captions_of_one_image_are_gathered_cleaned_and_split(images: Path, tmp_path: Path):
    first, second = names(images)[:2]
    table = write_table(
        tmp_path / "c.jsonl",
        [
            {"file": first, "en": " a  cat\n", "more": "pet|feline| "},
            {"file": second, "en": ["one", "two"], "more": None},
            {"file": first, "en": "a cat", "more": "tom"},
        ],
    )
    arguments = [
        "--image-column",
        "file",
        "--caption-column",
        "en",
        "--caption-column",
        "more",
        "--caption-separator",
        "|",
    ]
    main(["pack", str(images), str(table), str(tmp_path / "out"), *arguments])
    assert [sample["txt"].decode() for sample in samples(tmp_path / "out")] == ["a cat\npet\nfeline\ntom", "one\ntwo"]


def test_what_cannot_be_packed_is_told_and_kept_in_the_table(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    good, bad, empty = names(images)[:3]
    (images / bad).write_bytes(b"<html>")
    (tmp_path / "secret.jpg").write_bytes(picture(1))
    rows = [
        {"image": good, "caption": "fine"}, {"image": bad, "caption": "a web page"}, {"image": empty, "caption": " "},
        {"image": "nowhere.jpg", "caption": "missing"}, {"image": "../secret.jpg", "caption": "outside"},
    ]  # fmt: skip
    main(["pack", str(images), str(write_table(tmp_path / "c.csv", rows)), str(tmp_path / "out")])
    told = capsys.readouterr().out
    assert "1 pairs packed, 4 left out" in told and f"{bad}: cannot be decoded" in told
    table = parquet.read_table(tmp_path / "out" / "00000.parquet").to_pylist()
    assert [row["status"] for row in table] == [
        "success", "failed_to_resize", "no_caption", "failed_to_download", "failed_to_download",
    ]  # fmt: skip
    stats = json.loads((tmp_path / "out" / "00000_stats.json").read_text())
    assert (stats["count"], stats["successes"], stats["failed_to_download"], stats["failed_to_resize"]) == (5, 1, 2, 1)


def test_resize_shrinks_upright_and_leaves_small_ones_alone(tmp_path: Path):
    images = tmp_path / "images"
    images.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter
    Image.new("RGB", (200, 100), "red").save(images / "turned.jpg", exif=exif)
    Image.new("RGB", (30, 20)).save(images / "small.jpg")
    Image.new("RGBA", (80, 64), (0, 0, 0, 0)).save(images / "clear.webp")
    rows = [{"image": name, "caption": "x"} for name in ("turned.jpg", "small.jpg", "clear.webp")]
    table = write_table(tmp_path / "c.csv", rows)
    main(["pack", str(images), str(table), str(tmp_path / "out"), "--resize", "32"])
    turned, small, clear = samples(tmp_path / "out")
    assert decode(turned["jpg"], (0, 0, 0), 10**6).size == (32, 64)
    assert small["jpg"] == (images / "small.jpg").read_bytes()
    assert decode(clear["png"], (0, 0, 0), 10**6).size == (40, 32)
    known = json.loads(turned["json"])
    assert (known["width"], known["height"], known["original_width"], known["original_height"]) == (32, 64, 100, 200)


def test_variants_of_one_thing_stay_on_one_side(images: Path, tmp_path: Path):
    table = write_table(tmp_path / "c.csv", [{"image": name, "caption": name} for name in names(images)])
    arguments = ["--validation-fraction", "0.5", "--split-group", r"group(\d+)"]
    main(["pack", str(images), str(table), str(tmp_path / "out"), *arguments])
    sides = {side: {s["txt"].decode() for s in samples(tmp_path / "out" / side)} for side in ("train", "validation")}
    groups = {side: {name.split("/")[0] for name in found} for side, found in sides.items()}
    assert len(sides["train"]) + len(sides["validation"]) == 10
    assert not groups["train"] & groups["validation"] and groups["train"] and groups["validation"]


def run(arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    message = str(caught.value.code)
    assert message.startswith("mmpt-data: error: ") and "\n" not in message
    return message


@pytest.mark.parametrize(
    ("table", "content", "message"),
    [
        ("c.csv", "file,caption\n", r"c\.csv has no rows"),
        ("c.csv", "file,caption\na.jpg,b\n", "row 1 has no column 'image'; it has 'file', 'caption'"),
        ("c.csv", "image,caption\na.jpg,b,c\n", "line 2 has not as many cells as the first line"),
        ("c.csv", "image,caption\na.jpg\n", "line 2 has not as many cells"),
        ("c.jsonl", "{\n", "line 1 is not JSON"),
        ("c.jsonl", "[1]\n", "line 1 is not an object"),
        ("c.txt", "image\n", "a table of captions ends in .tsv, .csv, .jsonl, .parquet"),
        ("c.parquet", "image\n", "c.parquet"),
    ],
)
def test_a_bad_table_is_one_line(images: Path, tmp_path: Path, table: str, content: str, message: str):
    (tmp_path / table).write_text(content)
    assert re.search(message, run(["pack", str(images), str(tmp_path / table), str(tmp_path / "out")]))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--validation-fraction", "0.5", "--split-group", "nothing(x)"], "'nothing(x)' is not found in image name"),
        (["--split-group", "("], "is not a regular expression"),
        (["--split-group", "x"], "has no group in parentheses"),
        (["--validation-fraction", "1"], "--validation-fraction in [0, 1)"),
    ],
)
def test_a_bad_option_is_one_line(images: Path, tmp_path: Path, extra: list[str], message: str):
    table = write_table(tmp_path / "c.csv", [{"image": name, "caption": "x"} for name in names(images)])
    assert message in run(["pack", str(images), str(table), str(tmp_path / "out"), *extra])


def test_existing_shards_and_damaged_archives_are_refused(images: Path, tmp_path: Path):
    table = write_table(tmp_path / "c.csv", [{"image": name, "caption": "x"} for name in names(images)])
    main(["pack", str(images), str(table), str(tmp_path / "out")])
    assert "already holds shards" in run(["pack", str(images), str(table), str(tmp_path / "out")])
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        tar.add(images, arcname=".")
    (tmp_path / "cut.tar").write_bytes(whole.getvalue()[:3000])
    assert "cut.tar at byte" in run(["pack", str(tmp_path / "cut.tar"), str(table), str(tmp_path / "other")])


@pytest.mark.slow
def test_the_emoji_pairs(tmp_path: Path):
    emoji = shared_data("emoji")
    main([
        "pack", str(emoji / "noto-emoji-128px.tar"), str(emoji / "captions.tsv"), str(tmp_path),
        "--image-column", "file", "--caption-column", "en", "--validation-fraction", "0.15",
        "--split-group", "emoji_u([0-9a-f]+)",
    ])  # fmt: skip
    sides = {}
    for side in ("train", "validation"):
        sources = [json.loads(sample["json"])["source"] for sample in samples(tmp_path / side)]
        assert load_manifest(str(tmp_path / side)).samples == len(sources)
        sides[side] = sources
    assert sum(map(len, sides.values())) == 3543
    bases = {side: {name.split("_")[1].partition(".")[0] for name in sources} for side, sources in sides.items()}
    assert not bases["train"] & bases["validation"]
    assert 0.1 < len(sides["validation"]) / 3543 < 0.2


def test_the_number_of_workers_changes_nothing(tmp_path: Path):
    """Enough pairs for processes to be worth it, a missing and a broken image among them."""
    images = tmp_path / "images"
    images.mkdir()
    rows = [{"image": f"{i}.jpg", "caption": caption(i)} for i in range(WORTH_PROCESSES + 70)]
    for i, row in enumerate(rows):
        if i not in (40, 500, WORTH_PROCESSES + 5):
            (images / row["image"]).write_bytes(picture(i % 50))
    (images / "500.jpg").write_bytes(b"<html>")
    table = write_table(tmp_path / "c.csv", rows)
    for workers in ("1", "3"):
        arguments = [str(images), str(table), str(tmp_path / workers), "--samples-per-shard", "200"]
        main(["pack", *arguments, "--workers", workers])
    files = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert len(files) == 10
    assert all((tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes() for name in files)
    assert len(samples(tmp_path / "3")) == len(rows) - 3


def test_a_packing_process_that_dies_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    images = tmp_path / "images"
    images.mkdir()
    rows = [{"image": f"{i}.jpg", "caption": "x"} for i in range(WORTH_PROCESSES)]
    table = write_table(tmp_path / "c.csv", rows)
    monkeypatch.setattr("data_tools.pack_workers._pack_chunk", die)
    arguments = ["pack", str(images), str(table), str(tmp_path / "out"), "--workers", "2"]
    assert "a packing process died" in run(arguments)


def die(*arguments: object) -> None:
    os._exit(9)
