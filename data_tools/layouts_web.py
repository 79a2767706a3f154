"""Captions with addresses of images: SBU, CC3M, CC12M, YFCC15M, Wukong.

The images are what some downloader has put into a folder, named by row, counted from 0, as img2dataset with
`--output_format files` names them (`00001/000010005.jpg` is row 10,005), or plainly (`10005.jpg`). With several
annotation files each has a folder with the name of its file (`wukong_100m_0/10005.jpg`). img2dataset's tars need no
packing: index them as they are.
"""

import html
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote_plus

import numpy as np

from data_tools.annotations import at_row, comma_separated, read_json, tab_separated, text_lines
from data_tools.pack_sources import ImageSource, Pair, find, texts

EXTENSIONS = ("jpg", "jpeg", "png", "webp")
ROWS_PER_FOLDER = 10_000
YFCC_COLUMNS = 25
FLICKR_HOST = re.compile(r"^https?://[^/]+/")
TAG = re.compile(r"</?[A-Za-z][^>]*>")


def read_cc3m(images: ImageSource, files: Sequence[Path]) -> Iterator[Pair]:
    """Conceptual Captions (Sharma et al. 2018): Train_GCC-training.tsv, Validation_GCC-1.1.0-Validation.tsv, or the
    file with image labels. Columns: caption, address[, labels, label ids, confidences]; no header."""
    for file in files:
        for row, number, cells in _rows_without_header(file, ("caption", "url")):
            labels = {"labels": cells[2].split(","), "label_scores": cells[4].split(",")} if len(cells) == 5 else {}
            yield _web_pair(images, files, file, number, row, cells[0], cells[1], labels)


def read_cc12m(images: ImageSource, files: Sequence[Path]) -> Iterator[Pair]:
    """Conceptual 12M (Changpinyo et al. 2021): cc12m.tsv. Columns: address, caption; no header."""
    for file in files:
        for row, number, cells in _rows_without_header(file, ("url", "caption")):
            yield _web_pair(images, files, file, number, row, cells[1], cells[0], {})


def read_wukong(images: ImageSource, files: Sequence[Path]) -> Iterator[Pair]:
    """Wukong (Gu et al. 2022): wukong_100m_0.csv to wukong_100m_255.csv. Columns `url` and `caption`, with header."""
    for file in files:
        for number, cells in comma_separated(file):
            with at_row(file, number):
                caption, url = cells["caption"], cells["url"]
            yield _web_pair(images, files, file, number, number - 1, caption, url, {})


def read_sbu(images: ImageSource, files: Sequence[Path]) -> Iterator[Pair]:
    """SBU Captions (Ordonez et al. 2011): SBU_captioned_photo_dataset_urls.txt with ..._captions.txt, or
    sbu-captions-all.json. Besides by row, images may be named by the path of their address (`3326_3596303505_3c.jpg` or
    `3596303505_3c.jpg` for http://static.flickr.com/3326/3596303505_3c.jpg)."""
    file, rows = files[0], _sbu_text(files) if len(files) == 2 else _sbu_json(files)
    for number, (url, caption, known) in enumerate(rows, start=1):
        path = FLICKR_HOST.sub("", url)
        names = (path.replace("/", "_"), path.rpartition("/")[2])
        yield _web_pair(images, [file], file, number, number - 1, caption, url, known, names)


def _sbu_text(files: Sequence[Path]) -> Iterator[tuple[str, str, dict]]:
    lines = {file: [line for _, line in text_lines(file)] for file in files}
    addresses = [file for file in files if lines[file] and FLICKR_HOST.match(lines[file][0])]
    if len(addresses) != 1:
        raise ValueError(f"{files[0]} and {files[1]}: one of them should begin with an address")
    captions = next(file for file in files if file != addresses[0])
    if len(lines[captions]) != len(lines[addresses[0]]):
        counts = f"{len(lines[captions]):,} rows and {addresses[0]} {len(lines[addresses[0]]):,}"
        raise ValueError(f"{captions} has {counts}: row i of one belongs to row i of the other")
    for url, caption in zip(lines[addresses[0]], lines[captions], strict=True):
        yield url, caption, {}


def _sbu_json(files: Sequence[Path]) -> Iterator[tuple[str, str, dict]]:
    if len(files) != 1:
        raise ValueError(f"the two text files or the one .json are wanted, got {len(files)} files")
    content = read_json(files[0])
    columns = [content.get(name) for name in ("image_urls", "captions", "user_ids")]
    if not all(isinstance(column, list) for column in columns):
        raise ValueError(f"{files[0]} should have lists 'image_urls', 'captions' and 'user_ids'")
    urls, captions, users = columns
    if not len(urls) == len(captions) == len(users):  # type: ignore[arg-type]
        raise ValueError(f"{files[0]}: its lists differ in length")
    for url, caption, user in zip(urls, captions, users, strict=True):  # type: ignore[arg-type]
        yield url, caption, {"user_id": user}


def read_yfcc15m(images: ImageSource, files: Sequence[Path]) -> Iterator[Pair]:
    """The part of YFCC100M (Thomee et al. 2016) that CLIP used: yfcc100m_subset_data.tsv (line, photograph, hash) and
    yfcc100m_dataset, the metadata of all, either as .bz2 too. The captions are the title and the description, decoded
    from their URL form, without tags and entities of HTML.

    Images are named by hash (`abc/def/abcdef0123.jpg`, as in the bucket multimedia-commons, or `abcdef0123.jpg`) or
    by photograph (`6185218911.jpg`).
    """
    lists = [file for file in files if len(next(tab_separated(file, 1), (0, [""]))[1]) == 3]
    if len(lists) != 1 or len(files) != 2:
        raise ValueError(f"a list of three columns and the metadata are wanted, got {', '.join(map(str, files))}")
    metadata = next(file for file in files if file != lists[0])
    wanted = _photographs(lists[0])
    found = 0
    for number, cells in tab_separated(metadata, YFCC_COLUMNS):
        with at_row(metadata, number):
            photograph = int(cells[1])
            i = int(np.searchsorted(wanted, photograph))
            if i == len(wanted) or wanted[i] != photograph:
                continue
            found += 1
            yield _photograph(images, cells)
    if found != len(wanted):
        raise ValueError(f"{metadata} has {found:,} of the {len(wanted):,} photographs that {lists[0]} lists")


def _photographs(file: Path) -> np.ndarray:
    """[n] int64, sorted: the second column."""
    numbers = []
    for number, cells in tab_separated(file, 3):
        with at_row(file, number):
            numbers.append(int(cells[1]))
    return np.unique(np.array(numbers, dtype=np.int64))


def _photograph(images: ImageSource, cells: list[str]) -> Pair:
    digest = cells[2]
    stems = (f"{digest[:3]}/{digest[3:6]}/{digest}", digest, cells[1])
    found = [text for cell in cells[8:10] for text in texts(html.unescape(TAG.sub(" ", unquote_plus(cell))))]
    return Pair(
        find(images, *(f"{stem}.{extension}" for stem in stems for extension in EXTENSIONS)),
        tuple(dict.fromkeys(found)),
        {
            "id": int(cells[1]), "line": int(cells[0]), "hash": digest, "user_id": cells[3], "page_url": cells[15],
            "url": cells[16], "license": cells[17], "license_url": cells[18],
        },
    )  # fmt: skip


def _rows_without_header(file: Path, header: tuple[str, str]) -> Iterator[tuple[int, int, list[str]]]:
    """(row counted from 0, row of the file counted from 1, cells), without the header that img2dataset has one add."""
    headed = 0
    for number, cells in tab_separated(file, 2):
        if number == 1 and tuple(cells[:2]) == header:
            headed = 1
            continue
        yield number - 1 - headed, number, cells


def _web_pair(
    images: ImageSource, files: Sequence[Path], file: Path, number: int, row: int, caption: str, url: str, known: dict,
    names: tuple[str, ...] = (),
) -> Pair:  # fmt: skip
    with at_row(file, number):
        if not FLICKR_HOST.match(url):
            raise ValueError(f"{url[:60]!r} is not an address")
        folder = f"{file.stem}/" if len(files) > 1 else ""
        stems = (f"{row // ROWS_PER_FOLDER:05d}/{row:09d}", f"{row:09d}", str(row))
        by_row = [f"{folder}{stem}.{extension}" for stem in stems for extension in EXTENSIONS]
        image = find(images, *(f"{folder}{name}" for name in names), *by_row)
        _check_address(images, image, url)
        return Pair(image, tuple(texts(caption)), {"id": row, "url": url, **known})


def _check_address(images: ImageSource, image: str, url: str) -> None:
    """img2dataset writes a .json beside each image, which tells when the rows have been counted differently."""
    data = images.read(f"{image.rpartition('.')[0]}.json")
    downloaded = json.loads(data).get("url", url) if data is not None else url
    if downloaded != url:
        raise ValueError(f"{image} was downloaded from {downloaded} and the row has {url}")
