"""From a sample's captions to packed token ids, with any tokenizer of transformers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

import torch

from mmpt.batch import Tokens, pack
from mmpt.inputs import InputSpec

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

TEXT_LINES, TEXT_WHOLE = "txt", "txt_whole"
Cleaning = Literal["none", "albef"]
PUNCTUATION = str.maketrans({**dict.fromkeys(",.'!?\"()*#:;~"), "-": " ", "/": " "})
MOST_WORDS = 30


def load_tokenizer(name_or_path: str) -> "PreTrainedTokenizerBase":
    """A tokenizer of transformers, by hub name or by the path of its folder.

    Raises ValueError in one line when there is none, or when it adds no special token to a text (the text towers read
    a caption off its first or last token).
    """
    from transformers import (
        AutoTokenizer,
    )  # takes seconds to import, and a module that only reads captions needs it not

    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"no tokenizer at {name_or_path!r}: {reason} (give a folder, or a hub name that is cached or reachable)"
        ) from error
    if not tokenizer.num_special_tokens_to_add():
        raise ValueError(f"tokenizer {name_or_path!r} adds no special token, such as an end of text, to a caption")
    return tokenizer


def check_vocabulary(tokenizer: "PreTrainedTokenizerBase", inputs: InputSpec) -> None:
    """Raises ValueError when the tokenizer can produce an id for which the model has no embedding."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= inputs.vocab_size:
        raise ValueError(
            f"the tokenizer's largest id is {largest} and the model's vocab_size is {inputs.vocab_size}: "
            f"vocab_size must be at least {largest + 1}"
        )
    if inputs.text_padding == "max" and tokenizer.pad_token_id is None:
        raise ValueError("the method pads captions and the tokenizer has no pad token")


def tokenise(tokenizer: "PreTrainedTokenizerBase", captions: Sequence[str], inputs: InputSpec) -> Tokens:
    """Token ids, special tokens added, packed: Tokens of len(captions) sequences, x [T] int64.

    A caption that is too long loses its last words, never its final special token.
    """
    return ids_of(encode(tokenizer, captions, inputs))


def encode(
    tokenizer: "PreTrainedTokenizerBase", captions: Sequence[str], inputs: InputSpec, masks: bool = False
) -> "BatchEncoding":
    """What `tokenise` packs, as the tokenizer has it. masks: with its special_tokens_mask and attention_mask."""
    return tokenizer(
        list(captions), truncation=True, max_length=inputs.max_text_tokens,
        padding="max_length" if inputs.text_padding == "max" else False, return_attention_mask=masks,
        return_special_tokens_mask=masks,
    )  # fmt: skip


def ids_of(encoded: "BatchEncoding") -> Tokens:
    """The ids, packed: x [T] int64."""
    return pack([torch.tensor(ids, dtype=torch.int64) for ids in encoded["input_ids"]])


def captions_of(files: dict[str, bytes], caption_field: str) -> list[str]:
    """All captions of a sample in one field, without empty ones. `files` maps extensions to bytes.

    caption_field: `txt` for the lines of the .txt file, `txt_whole` for that file as one caption, any other name for a
    text or a list of texts in the .json file. Raises ValueError when the sample has no such field, or no text in it.
    """
    if caption_field in (TEXT_LINES, TEXT_WHOLE):
        if "txt" not in files:
            raise ValueError("it has no .txt file")
        text = files["txt"].decode("utf-8")
        captions = text.splitlines() if caption_field == TEXT_LINES else [text]
    else:
        value: Any = metadata_of(files).get(caption_field)
        captions = value if isinstance(value, list) else [value]
        if not all(isinstance(caption, str) for caption in captions):
            raise ValueError(f"field {caption_field!r} of its .json file is {value!r}, not a text or a list of texts")
    captions = [caption.strip() for caption in captions if caption.strip()]
    if not captions:
        raise ValueError(f"its caption is empty ({caption_field})")
    return captions


@dataclass(frozen=True)
class CaptionFields:
    """Fields that captions are drawn from, and the probability of each."""

    names: tuple[str, ...]
    probabilities: tuple[float, ...]


def caption_fields(text: str) -> CaptionFields:
    """`txt` -> that field always; `txt=0.7,synthetic=0.3` -> one of them, drawn anew each time with these odds.

    Raises ValueError for odds that are missing, not positive, or do not sum to 1.
    """
    names, odds = [], []
    parts = text.split(",")
    for part in parts:
        name, _, odd = part.partition("=")
        names.append(name.strip())
        try:
            odds.append(float(odd) if odd or len(parts) > 1 else 1.0)
        except ValueError:
            odds.append(0.0)
    if not all(names) or min(odds) <= 0 or abs(sum(odds) - 1) > 1e-6:
        raise ValueError(f"caption_field wants FIELD or FIELD=ODDS,FIELD=ODDS with odds that sum to 1, got {text!r}")
    return CaptionFields(tuple(names), tuple(odds))


def draw_caption(files: dict[str, bytes], fields: CaptionFields, field_draw: float, caption_draw: float) -> str:
    """One caption: first a field by the odds of those that hold text, then one of its captions uniformly.

    field_draw, caption_draw: uniform in [0, 1). Raises ValueError when no field holds text, for the first's reason.
    """
    found, odds, reason = [], [], None
    for name, odd in zip(fields.names, fields.probabilities, strict=True):
        try:
            found.append(captions_of(files, name))
            odds.append(odd)
        except ValueError as error:
            reason = reason or error
    if not found:
        assert reason is not None
        raise reason
    choice = next((i for i, end in enumerate(accumulate(odds)) if field_draw * sum(odds) < end), len(odds) - 1)
    return found[choice][int(caption_draw * len(found[choice]))]


def clean_caption(caption: str, cleaning: Cleaning) -> str:
    """`albef`: lower case, without punctuation, hyphens and slashes made spaces, CC12M's <person> a plain word, and no
    more than 30 words, as ALBEF's code prepares its captions (Li et al. 2021). ValueError where nothing is left."""
    if cleaning == "none":
        return caption
    text = caption.lower().translate(PUNCTUATION).replace("<person>", "person")
    words = text.split()[:MOST_WORDS]
    if not words:
        raise ValueError(f"its caption {caption!r} has no words")
    return " ".join(words)


def metadata_of(files: dict[str, bytes]) -> dict:
    """The sample's .json file, or nothing. Raises ValueError when it is not a JSON object."""
    metadata = json.loads(files.get("json", b"{}"))
    if not isinstance(metadata, dict):
        raise ValueError("its .json file is not an object")
    return metadata
