import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from data_tools.tokenizer import save, train_wordpiece
from mmpt.batch import unpack
from mmpt.data.text import (
    CaptionFields,
    caption_fields,
    captions_of,
    check_vocabulary,
    clean_caption,
    draw_caption,
    load_tokenizer,
    tokenise,
)
from mmpt.inputs import InputSpec
from tests.data.shards import caption


@pytest.fixture(params=["bpe", "wordpiece"])
def loaded(request: pytest.FixtureRequest, tokenizer: str, tmp_path: Path):
    if request.param == "wordpiece":
        save(train_wordpiece(lambda: map(caption, range(200)), 300, lower_case=True), "wordpiece", tmp_path)
        tokenizer = str(tmp_path)
    return load_tokenizer(tokenizer)


def test_captions_come_packed_between_special_tokens(loaded, inputs: InputSpec):
    texts = ["a red cat", "", "a blue elephant beside another animal"]
    tokens = tokenise(loaded, texts, replace(inputs, max_text_tokens=60))
    assert tokens.x.dtype == torch.int64 and tokens.offsets.dtype == torch.int32
    start, end = (
        (loaded.cls_token_id, loaded.sep_token_id) if loaded.cls_token else (loaded.bos_token_id, loaded.eos_token_id)
    )
    sequences = [sequence.tolist() for sequence in unpack(tokens)]
    assert all(ids[0] == start and ids[-1] == end for ids in sequences)
    assert sequences[1] == [start, end]
    assert tokens.longest == max(map(len, sequences))
    decoded = [loaded.decode(ids, skip_special_tokens=True).strip() for ids in sequences]
    assert decoded == texts


def test_a_long_caption_keeps_its_last_special_token(loaded, inputs: InputSpec):
    (whole,) = unpack(tokenise(loaded, ["a cat beside a dog " * 10], replace(inputs, max_text_tokens=500)))
    (cut,) = unpack(tokenise(loaded, ["a cat beside a dog " * 10], inputs))
    assert len(whole) > len(cut) == 12
    assert cut[:-1].tolist() == whole[:11].tolist() and cut[-1] == whole[-1]


def test_case_is_the_tokenizers_business(loaded, inputs: InputSpec):
    upper, lower = unpack(tokenise(loaded, ["A RED CAT", "a red cat"], inputs))
    assert torch.equal(upper, lower)


def test_padding_to_the_maximum_where_pads_are_tokens(loaded, inputs: InputSpec):
    tokens = tokenise(loaded, ["a cat", "a dog " * 20], replace(inputs, text_padding="max"))
    assert tokens.lengths().tolist() == [12, 12] and tokens.longest == 12
    short = tokens.x[:12].tolist()
    plain = tokenise(loaded, ["a cat"], inputs).x.tolist()
    assert short == plain + [loaded.pad_token_id] * (12 - len(plain))


def test_ids_beyond_the_vocabulary_are_refused(loaded, inputs: InputSpec):
    largest = max(loaded.get_vocab().values())
    check_vocabulary(loaded, replace(inputs, vocab_size=largest + 1))
    with pytest.raises(ValueError, match=rf"largest id is {largest} and the model's vocab_size is {largest}:"):
        check_vocabulary(loaded, replace(inputs, vocab_size=largest))


@pytest.mark.parametrize("name", ["/nowhere/at/all", "no-such-owner-xyz/no-such-tokenizer"])
def test_a_missing_tokenizer_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=f"no tokenizer at '{name}'") as caught:
        load_tokenizer(name)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_special_tokens_is_refused(tmp_path: Path):
    bare = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="[UNK]").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="adds no special token"):
        load_tokenizer(str(tmp_path))


def test_where_captions_come_from():
    known = json.dumps({"caption": "one", "captions": ["one", " two "], "width": 3}).encode()
    files = {"txt": b"  a\r\n\nb  \n", "json": known, "jpg": b""}
    assert captions_of(files, "txt") == ["a", "b"]
    assert captions_of(files, "txt_whole") == ["a\r\n\nb"]
    assert captions_of(files, "caption") == ["one"]
    assert captions_of(files, "captions") == ["one", "two"]


@pytest.mark.parametrize(
    ("files", "field", "message"),
    [
        ({"jpg": b""}, "txt", "no .txt file"),
        ({"json": b"{}"}, "caption", "field 'caption' of its .json file is None"),
        ({"json": b'{"caption": 3}'}, "caption", "is 3, not a text"),
        ({"json": b"[1]"}, "caption", "not an object"),
        ({"json": b"{"}, "caption", "Expecting property name"),
        ({"txt": b"\xff\xfe"}, "txt", "codec can't decode"),
        ({"txt": b" \n"}, "txt", "its caption is empty"),
        ({"json": b'{"caption": " "}'}, "caption", "its caption is empty"),
    ],
)
def test_what_holds_no_caption_is_refused(files: dict, field: str, message: str):
    with pytest.raises(ValueError, match=message):
        captions_of(files, field)


def test_fields_are_drawn_with_their_odds_and_cede_their_share_when_empty():
    fields = caption_fields("txt=0.7, synthetic=0.3")
    assert fields == CaptionFields(("txt", "synthetic"), (0.7, 0.3))
    files = {"txt": b"a\nb", "json": b'{"synthetic": "c"}'}
    drawn = [draw_caption(files, fields, i / 10, j / 4) for i in range(10) for j in range(4)]
    assert [drawn.count(caption) for caption in "abc"] == [14, 14, 12]
    assert draw_caption({"txt": b"a", "json": b"{}"}, fields, 0.95, 0) == "a"
    assert draw_caption({"json": b'{"synthetic": "c"}'}, fields, 0.0, 0) == "c"
    with pytest.raises(ValueError, match=r"no \.txt file"):
        draw_caption({"json": b"{}"}, fields, 0.5, 0)
    assert caption_fields("caption") == CaptionFields(("caption",), (1.0,))


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A dog, running; it's FAST!", "a dog running its fast"),
        ("black-and-white / red", "black and white red"),
        ('"Hello" (world)  #1: ~yes*?', "hello world 1 yes"),
        ("<PERSON> at the beach.\n", "person at the beach"),
        ("café & größe_x", "café & größe_x"),
        (" ".join(map(str, range(40))), " ".join(map(str, range(30)))),
    ],
)
def test_captions_cleaned_as_albef_cleans_them(caption: str, expected: str):
    assert clean_caption(caption, "albef") == expected == published_cleaning(caption)
    assert clean_caption(caption, "none") == caption


def published_cleaning(caption: str) -> str:
    """What ALBEF's repository says it does, step by step."""
    text = re.sub(r"[,.'!?\"()*#:;~]", "", caption.lower())
    for old, new in (("-", " "), ("/", " "), ("<person>", "person")):
        text = text.replace(old, new)
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:30])


def test_a_caption_of_punctuation_alone_is_a_bad_one():
    with pytest.raises(ValueError, match=r"its caption '\?!\.' has no words"):
        clean_caption("?!.", "albef")


@pytest.mark.parametrize("text", ["", "txt=0.5", "txt=0.5,b=0.6", "txt,b", "txt=1,b=0", "=1", "txt=x,b=0.5"])
def test_odds_that_make_no_sense_are_refused(text: str):
    with pytest.raises(ValueError, match="caption_field wants"):
        caption_fields(text)
