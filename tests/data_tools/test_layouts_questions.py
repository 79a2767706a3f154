"""VQA v2, VCR, NLVR and NLVR2: questions and statements, packed and read back."""

import hashlib
import json
import tarfile
from pathlib import Path

import pytest

from data_tools.__main__ import main
from mmpt.inputs import InputSpec
from tests.data.shards import picture
from tests.data_tools.delivery import index_and_load
from tests.data_tools.layouts import failure, pack, write_images
from tests.data_tools.readback import read_back
from tests.shared_data import shared_data


def vqa(subset: str, ids: list[tuple[int, int]]) -> tuple[dict, dict]:
    """(questions, annotations) as in v2_OpenEnded_mscoco_{subset}_questions.json and v2_mscoco_..._annotations.json."""
    common = {
        "info": {"version": "2.0"}, "data_type": "mscoco", "data_subtype": subset,
        "license": {"url": "http://creativecommons.org/licenses/by/4.0/", "name": "CC BY 4.0"},
    }  # fmt: skip
    questions = [
        {"image_id": image, "question": f"What is {question}?", "question_id": question} for image, question in ids
    ]
    annotations = [
        {
            "question_type": "what is", "multiple_choice_answer": "net", "answer_type": "other", "image_id": image,
            "question_id": question,
            "answers": [
                {"answer": ("net", "netting")[i % 3 == 2], "answer_confidence": ("yes", "maybe")[i % 2],
                 "answer_id": i + 1}
                for i in range(10)
            ],
        }
        for image, question in reversed(ids)
    ]  # fmt: skip
    return common | {"task_type": "Open-Ended", "questions": questions}, common | {"annotations": annotations}


def test_vqa2(tmp_path: Path):
    names = ["train2014/COCO_train2014_000000458752.jpg", "COCO_test2015_000000000001.jpg"]
    images = write_images(tmp_path, {name: picture(i) for i, name in enumerate(names)})
    train, answers = vqa("train2014", [(458752, 458752000), (458752, 458752001)])
    test, _ = vqa("test-dev2015", [(1, 1000)])
    files = []
    for name, content in (("answers", answers), ("test", test), ("train", train)):
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(content))
    pack(tmp_path, "vqa2", *files)
    found = [sample["json"] for sample in read_back(tmp_path / "out")]
    assert [known["id"] for known in found] == [1000, 458752000, 458752001]
    assert [known["question"] for known in found] == ["What is 1000?", "What is 458752000?", "What is 458752001?"]
    assert [known["split"] for known in found] == ["test-dev2015", "train2014", "train2014"]
    assert "answer" not in found[0] and "answers" not in found[0]
    assert found[1]["answer"] == "net" and found[1]["answers"].count("netting") == 3 and len(found[1]["answers"]) == 10
    assert (found[2]["question_type"], found[2]["answer_type"], found[2]["image_id"]) == ("what is", "other", 458752)
    assert found[2]["answer_confidences"][:2] == ["yes", "maybe"]
    assert found[1]["license_url"] == "http://creativecommons.org/licenses/by/4.0/"
    samples = read_back(tmp_path / "out")
    assert all("txt" not in sample for sample in samples)
    assert samples[1]["jpg"] == samples[2]["jpg"] == (images / names[0]).read_bytes()
    pack(tmp_path, "vqa2", *files, "--split", "train2014", out="train")
    assert len(read_back(tmp_path / "train")) == 2

    assert "there are annotations of train2014 and no questions" in failure(tmp_path, "vqa2", files[0], out="b")
    answers["annotations"].pop()
    files[0].write_text(json.dumps(answers))
    assert "train.json: row 1: question 458752000 has no annotation" in failure(tmp_path, "vqa2", *files, out="c")


VCR = {
    "movie": "3015_CHARLIE_ST_CLOUD", "objects": ["person", "person", "person", "car"], "interesting_scores": [0],
    "answer_likelihood": "possible", "img_fn": "lsmdc_3015/3015_00.23.57.935-00.24.00.783@0.jpg",
    "metadata_fn": "lsmdc_3015/3015_00.23.57.935-00.24.00.783@0.json", "question_orig": "Does 3 feel comfortable?",
    "question": ["Does", [2], "feel", "comfortable", "?"],
    "answer_choices": [["Yes", "."], ["No", "."], [[0, 1], "do", "."], ["It", "is", [3], "."]], "answer_label": 1,
    "rationale_choices": [["Snow", "."], ["She", "stands", "."], ["She", "sits", "."], [[2], "is", "in", "bed", "."]],
    "rationale_label": 3, "img_id": "train-0", "question_number": 0, "annot_id": "train-0", "match_fold": "train-0",
}  # fmt: skip
BOXES = {
    "boxes": [[1.5, 2.0, 3.0, 9.25, 0.99], [0, 0, 5, 5, 0.9], [2, 2, 8, 8, 0.8], [1, 1, 2, 2, 0.7]],
    "segms": [[[[0, 0], [1, 1], [2, 0]]]] * 4, "names": VCR["objects"], "width": 24, "height": 24,
}  # fmt: skip


@pytest.mark.parametrize("inside", ["", "vcr1images/"])
def test_vcr(tmp_path: Path, inside: str):
    files = {inside + VCR["img_fn"]: picture(0), inside + VCR["metadata_fn"]: json.dumps(BOXES).encode()}
    images = write_images(tmp_path, files)
    test = {k: v for k, v in VCR.items() if not k.endswith("_label")} | {"annot_id": "test-7", "img_id": "test-3"}
    (tmp_path / "train.jsonl").write_text(json.dumps(VCR) + "\n")
    (tmp_path / "test.jsonl").write_text(json.dumps(test) + "\n")
    pack(tmp_path, "vcr", tmp_path / "train.jsonl", tmp_path / "test.jsonl")
    first, second = read_back(tmp_path / "out")
    assert "txt" not in first and first["jpg"] == (images / inside / VCR["img_fn"]).read_bytes()
    known = first["json"]
    assert known["question"] == "Does [person3] feel comfortable ?" and known["question_tokens"] == VCR["question"]
    assert known["answer_choices"] == ["Yes .", "No .", "[person1] and [person2] do .", "It is [car4] ."]
    assert known["rationale_choices"][3] == "[person3] is in bed ."
    assert known["rationale_choices_tokens"] == VCR["rationale_choices"]
    assert (known["answer_label"], known["rationale_label"], known["split"]) == (1, 3, "train")
    assert known["objects"] == VCR["objects"] and known["boxes"] == [box[:4] for box in BOXES["boxes"]]
    assert known["box_scores"] == [0.99, 0.9, 0.8, 0.7] and "segms" not in known
    assert second["json"]["split"] == "test" and "answer_label" not in second["json"]

    (images / inside / VCR["metadata_fn"]).unlink()
    assert "train.jsonl: row 1: there is" in failure(tmp_path, "vcr", tmp_path / "train.jsonl", out="b")
    (images / inside / VCR["img_fn"]).unlink()
    assert "1 of 1 samples were left out" in failure(tmp_path, "vcr", tmp_path / "train.jsonl", out="c")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": ["Does", [9]]}, "row 1: list index out of range"),
        ({"answer_label": 4}, "row 1: label 4 is none of the 4 choices"),
        ({"objects": ["person"] * 5}, "row 1: 4 boxes for 5 objects"),
        ({"img_fn": None}, "row 1: "),
    ],
)
def test_a_bad_vcr_row_is_one_line(tmp_path: Path, change: dict, message: str):
    write_images(tmp_path, {VCR["img_fn"]: picture(0), VCR["metadata_fn"]: json.dumps(BOXES).encode()})
    (tmp_path / "val.jsonl").write_text(json.dumps(VCR | change) + "\n")
    assert f"val.jsonl: {message}" in failure(tmp_path, "vcr", tmp_path / "val.jsonl")


def statement(identifier: str, label: str, **more: object) -> str:
    return json.dumps({"identifier": identifier, "sentence": f"About {identifier} .", "label": label, **more}) + "\n"


@pytest.mark.parametrize("inside", ["", "images/2/", "2/", "dev/images/2/"])
def test_nlvr(tmp_path: Path, inside: str):
    names = [f"{inside}dev-{identifier}-{k}.png" for identifier in ("1572-0", "17-3") for k in range(6)]
    images = write_images(tmp_path, {name: picture(i, "png") for i, name in enumerate(names)})
    boxes = [[{"y_loc": 80, "type": "triangle", "color": "#0099ff", "x_loc": 80, "size": 20}], [], []]
    (tmp_path / "dev.json").write_text(
        statement("1572-0", "true", directory="2", structured_rep=boxes, evals={"r0": "true"})
        + statement("17-3", "false", directory="2", structured_rep=boxes, evals={"r7": "false"})
    )
    pack(tmp_path, "nlvr", tmp_path / "dev.json", "--split", "dev")
    found = read_back(tmp_path / "out")
    assert [sample["png"] for sample in found] == [(images / name).read_bytes() for name in names]
    assert [sample["json"]["permutation"] for sample in found] == [*range(6), *range(6)]
    assert [sample["json"]["label"] for sample in found] == [True] * 6 + [False] * 6
    assert all(sample["json"]["structured_rep"] == boxes and "txt" not in sample for sample in found)
    assert (found[6]["json"]["sentence"], found[6]["json"]["evals"]) == ("About 17-3 .", {"r7": "false"})
    (tmp_path / "dev.json").write_text(statement("1572-0", "maybe", directory="2"))
    assert "dev.json: row 1: label 'maybe' is neither true nor false" in failure(
        tmp_path, "nlvr", tmp_path / "dev.json"
    )


def test_nlvr2_has_two_images_in_a_sample(tmp_path: Path, tokenizer: str, inputs: InputSpec):
    train, dev = "images/train/7/train-10171-0-img", "dev/dev-850-0-img"
    names = [f"{train}0.png", f"{train}1.png", f"{dev}0.png", f"{dev}1.png"]
    kinds = ["png", "jpg", "jpg", "webp"]  # whatever they are called: some of the published ones are not PNG
    files = {name: picture(i, kind, (60 + i, 50)) for i, (name, kind) in enumerate(zip(names, kinds, strict=True))}
    images = write_images(tmp_path, files)
    (tmp_path / "train.json").write_text(
        statement("train-10171-0-0", "False", directory=7, left_url="http://l/0.jpg", right_url="http://r/1.jpg")
        + statement("train-10171-0-1", "True", directory=7, left_url="http://l/0.jpg", right_url="http://r/1.jpg")
    )
    (tmp_path / "dev.json").write_text(
        statement("dev-850-0-0", "True", left_url="http://l/2.jpg", right_url="http://r/3.jpg", synset="beer bottle")
    )
    pack(tmp_path, "nlvr2", tmp_path / "train.json", tmp_path / "dev.json")
    found = read_back(tmp_path / "out")
    for sample, (left, right) in zip(found, [(0, 1), (0, 1), (2, 3)], strict=True):
        assert sample[kinds[left]] == (images / names[left]).read_bytes()
        assert sample[f"right.{kinds[right]}"] == (images / names[right]).read_bytes()
        known = sample["json"]
        assert (known["source"], known["right_source"]) == (names[left], names[right])
        assert (known["url"], known["right_url"]) == (f"http://l/{left}.jpg", f"http://r/{right}.jpg")
        assert (known["width"], known["right_width"]) == (60 + left, 60 + right)
        assert known["right_sha256"] == hashlib.sha256(files[names[right]]).hexdigest()
    assert [sample["json"]["label"] for sample in found] == [False, True, True]
    assert [sample["json"]["split"] for sample in found] == ["train", "train", "dev"]
    assert (found[2]["json"]["sentence"], found[2]["json"]["synset"]) == ("About dev-850-0-0 .", "beer bottle")

    delivered = index_and_load(tmp_path / "out", tokenizer, inputs, batch=3, caption_field="sentence")
    assert sorted(delivered) == ["000000000", "000000001", "000000002"]

    pack(tmp_path, "nlvr2", tmp_path / "train.json", "--resize", "25", out="small")
    assert read_back(tmp_path / "small")[0]["json"]["right_height"] == 25
    (images / names[3]).unlink()
    assert "there is no image dev-850-0-img1.png" in failure(tmp_path, "nlvr2", tmp_path / "dev.json")
    (tmp_path / "dev.json").write_text(statement("dev-850", "True"))
    assert "'dev-850' is not SPLIT-SET-PAIR-SENTENCE" in failure(tmp_path, "nlvr2", tmp_path / "dev.json", out="b")


@pytest.mark.slow
@pytest.mark.parametrize(("split", "examples"), [("dev", 989), ("test", 990)])
def test_the_published_nlvr(tmp_path: Path, split: str, examples: int):
    """Every example of the corpus, read back and held against a plain reading of its file."""
    nlvr = shared_data("nlvr")
    rows = [json.loads(line) for line in (nlvr / f"{split}.jsonl").read_text().splitlines()]
    with tarfile.open(nlvr / f"{split}-images.tar") as tar:
        stored = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}  # type: ignore[union-attr]
    arguments = [nlvr / f"{split}-images.tar", nlvr / f"{split}.jsonl", tmp_path / "out"]
    main(["pack", *map(str, arguments), "--layout", "nlvr"])
    found = read_back(tmp_path / "out")
    assert len(rows) == examples and len(found) == 6 * examples == len(stored)
    for i, sample in enumerate(found):
        row, known = rows[i // 6], sample["json"]
        assert sample["png"] == stored[f"{split}-{row['identifier']}-{i % 6}.png"]
        assert (known["sentence"], known["id"], known["permutation"]) == (row["sentence"], row["identifier"], i % 6)
        assert known["label"] is (row["label"] == "true") and known["structured_rep"] == row["structured_rep"]


def test_the_same_input_gives_the_same_bytes(tmp_path: Path):
    names = ["dev-1-0-img0.png", "dev-1-0-img1.png"]
    write_images(tmp_path, {name: picture(i, "png") for i, name in enumerate(names)})
    (tmp_path / "dev.json").write_text(statement("dev-1-0-0", "True") + statement("dev-1-0-1", "False"))
    a, b = (pack(tmp_path, "nlvr2", tmp_path / "dev.json", out=out) for out in "ab")
    files = sorted(path.name for path in a.iterdir())
    assert len(files) == 4 and all((a / name).read_bytes() == (b / name).read_bytes() for name in files)
