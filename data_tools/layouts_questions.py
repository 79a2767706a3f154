"""Questions about images: VQA v2 and VCR. One sample per question; questions are no captions, so there is no .txt."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_tools.annotations import at_row, json_lines, read_json, rows_of
from data_tools.pack_sources import ImageSource, Pair, find

Tokens = list[str | list[int]]


def read_vqa2(images: ImageSource, files: Sequence[Path]) -> Iterator[Pair]:
    """VQA v2 (Goyal et al. 2017): v2_OpenEnded_mscoco_train2014_questions.json with
    v2_mscoco_train2014_annotations.json, and so on; questions of the test splits have no annotations. Files may be
    given in any order and of several splits.

    Images are COCO's, in IMAGES or in its folders train2014/, val2014/ and test2015/.
    """
    contents = [(file, read_json(file)) for file in files]
    answers: dict[str, dict[int, dict[str, Any]]] = {}
    for file, content in contents:
        if "annotations" in content:
            of_split = answers.setdefault(_subset(file, content), {})
            for number, row in rows_of(file, content, "annotations"):
                with at_row(file, number):
                    of_split[row["question_id"]] = row
    asked = [(file, content) for file, content in contents if "annotations" not in content]
    if lonely := answers.keys() - {_subset(file, content) for file, content in asked}:
        raise ValueError(f"there are annotations of {min(lonely)} and no questions")
    for file, content in asked:
        split = _subset(file, content)
        folder = "test2015" if split.startswith("test") else split
        license_row = content.get("license", {})
        for number, row in rows_of(file, content, "questions"):
            with at_row(file, number):
                name = f"COCO_{folder}_{row['image_id']:012d}.jpg"
                known = {"id": row["question_id"], "split": split, "image_id": row["image_id"]}
                known |= {"question": row["question"]} | _answers(row, answers.get(split))
                known |= {"license": license_row.get("name"), "license_url": license_row.get("url")}
                yield Pair(find(images, name, f"{folder}/{name}"), None, known)


def _subset(file: Path, content: dict[str, Any]) -> str:
    if not isinstance(content.get("data_subtype"), str):
        raise ValueError(f"{file} has no text 'data_subtype'")
    return content["data_subtype"]


def _answers(question: dict[str, Any], annotations: dict[int, dict[str, Any]] | None) -> dict[str, Any]:
    """`answer` is the most frequent of the ten `answers`."""
    if annotations is None:
        return {}
    row = annotations.get(question["question_id"])
    if row is None or row["image_id"] != question["image_id"]:
        raise ValueError(f"question {question['question_id']} has no annotation for image {question['image_id']}")
    return {
        "answer": row["multiple_choice_answer"], "answers": [answer["answer"] for answer in row["answers"]],
        "answer_confidences": [answer["answer_confidence"] for answer in row["answers"]],
        "question_type": row["question_type"], "answer_type": row["answer_type"],
    }  # fmt: skip


def read_vcr(images: ImageSource, files: Sequence[Path]) -> Iterator[Pair]:
    """VCR (Zellers et al. 2019): train.jsonl, val.jsonl, test.jsonl (which has no labels); the split is the first word
    of the annotation's id. Texts have `[person3]` where the annotation points at the third of the `objects`, and
    `..._tokens` keeps the pointers, counted from 0. `boxes` (left, top, right, bottom; pixels of the original
    image) and `box_scores` are from the .json file beside each image; its polygons are left out.

    Images are in IMAGES or in its folder vcr1images/.
    """
    for file in files:
        for number, row in json_lines(file):
            with at_row(file, number):
                objects = row["objects"]
                known = {
                    "id": row["annot_id"], "split": row["annot_id"].partition("-")[0], "image_id": row["img_id"],
                    "movie": row["movie"], "objects": objects,
                    "question": _text(row["question"], objects), "question_tokens": row["question"],
                }  # fmt: skip
                for kind in ("answer", "rationale"):
                    choices = row[f"{kind}_choices"]
                    known[f"{kind}_choices"] = [_text(choice, objects) for choice in choices]
                    known[f"{kind}_choices_tokens"] = choices
                    if f"{kind}_label" in row:
                        known[f"{kind}_label"] = _choice(row[f"{kind}_label"], choices)
                image = find(images, row["img_fn"], f"vcr1images/{row['img_fn']}")
                yield Pair(image, None, known | _boxes(images, image, row))


def _text(tokens: Tokens, objects: list[str]) -> str:
    """Tokens with spaces between them; [0, 2] becomes `[person1] and [dog3]`."""
    words = []
    for token in tokens:
        if isinstance(token, list):
            words += [" and ".join(f"[{objects[i]}{i + 1}]" for i in token)]
        else:
            words.append(token)
    return " ".join(words)


def _choice(label: int, choices: list[Tokens]) -> int:
    if not 0 <= label < len(choices):
        raise ValueError(f"label {label} is none of the {len(choices)} choices")
    return label


def _boxes(images: ImageSource, image: str, row: dict[str, Any]) -> dict[str, Any]:
    if not images.has(image):
        return {}  # the sample will be left out, and told
    data = images.read(image.removesuffix(row["img_fn"]) + row["metadata_fn"])
    if data is None:
        raise ValueError(f"there is {image} and not its {row['metadata_fn']}")
    boxes = json.loads(data)["boxes"]
    if len(boxes) != len(row["objects"]):
        raise ValueError(f"{len(boxes)} boxes for {len(row['objects'])} objects")
    return {"boxes": [box[:4] for box in boxes], "box_scores": [box[4] for box in boxes]}
