from pathlib import Path

import pytest
from transformers import AutoTokenizer

from data_tools.__main__ import main
from data_tools.index import index
from tests.data.shards import write_shards


@pytest.fixture
def shards(tmp_path: Path) -> str:
    write_shards(tmp_path / "shards", [60, 40], captions_per_image=2)
    index(str(tmp_path / "shards"))
    return str(tmp_path / "shards")


def test_bpe_covers_every_text_and_comes_back_from_ids(shards: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    main(["tokenizer", shards, str(tmp_path / "bpe"), "--vocab-size", "320"])
    assert "320 tokens" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "bpe")
    assert len(tokenizer) == 320
    for text in ("a red cat", "größe 写真 \U0001f600 naïve", "line\nbreak  and\tspaces"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == " ".join(text.split())
    assert tokenizer.convert_ids_to_tokens([ids[0], ids[-1]]) == ["<|startoftext|>", "<|endoftext|>"]
    assert tokenizer("A RED Cat")["input_ids"] == tokenizer("a red cat")["input_ids"]
    assert len(tokenizer("killer whale")["input_ids"]) <= 4  # whole words of the data are learned
    assert tokenizer.mask_token == "<mask>" and tokenizer.mask_token_id == 319


def test_wordpiece_has_the_special_tokens_of_bert(shards: str, tmp_path: Path):
    main(["tokenizer", shards, str(tmp_path / "wp"), "--kind", "wordpiece", "--vocab-size", "200"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "wp")
    assert tokenizer.convert_ids_to_tokens(tokenizer("a RED cat")["input_ids"]) == ["[CLS]", "a", "red", "cat", "[SEP]"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("写")["input_ids"]) == ["[CLS]", "[UNK]", "[SEP]"]
    assert tokenizer.mask_token == "[MASK]" and tokenizer.pad_token_id == 0


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_case_is_kept_when_asked_and_training_repeats(shards: str, tmp_path: Path, kind: str):
    for name in ("a", "b"):
        main(["tokenizer", shards, str(tmp_path / name), "--kind", kind, "--vocab-size", "300", "--keep-case"])
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert tokenizer("A")["input_ids"] != tokenizer("a")["input_ids"]


def test_captions_from_a_json_field(shards: str, tmp_path: Path):
    main(["tokenizer", shards, str(tmp_path / "a"), "--caption-field", "captions", "--vocab-size", "300"])
    main(["tokenizer", shards, str(tmp_path / "b"), "--vocab-size", "300"])
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--vocab-size", "100"], "--vocab-size must be at least 259, got 100"),
        (["--caption-field", "alt"], "sample '000000': field 'alt' of its .json file is None"),
    ],
)
def test_what_is_amiss_is_one_line(shards: str, tmp_path: Path, extra: list[str], message: str):
    with pytest.raises(SystemExit) as caught:
        main(["tokenizer", shards, str(tmp_path / "out"), *extra])
    assert message in str(caught.value.code) and "\n" not in str(caught.value.code)
