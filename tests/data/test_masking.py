"""Masked words: how many, which, what is shown instead; the same for any world size and after any resume."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_tools.tokenizer import save, train_wordpiece
from mmpt.batch import MaskedWords, Tokens, unpack
from mmpt.data.loader import DataConfig, build_loader, eval_batches
from mmpt.data.masking import check_masking, mask_words, words_of
from mmpt.data.randomness import generator
from mmpt.data.text import encode, ids_of, load_tokenizer
from mmpt.inputs import InputSpec, WordMasking
from tests.data.batches import VARIED, assert_same, global_batches, resumed
from tests.data.shards import caption

LONG = "un elephantine heronry, don't beside killer whales"


@pytest.fixture(scope="session")
def wordpiece(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data") / "wordpiece"
    save(train_wordpiece(lambda: map(caption, range(200)), 90, lower_case=True), "wordpiece", folder)
    return str(folder)


@pytest.fixture(params=["bpe", "wordpiece"])
def loaded(request: pytest.FixtureRequest, tokenizer: str, wordpiece: str):
    return load_tokenizer(wordpiece if request.param == "wordpiece" else tokenizer)


@pytest.fixture
def wanting(inputs: InputSpec) -> InputSpec:
    return replace(inputs, max_text_tokens=40)


def masked(
    tokenizer, captions: list[str], inputs: InputSpec, masking: WordMasking, first: int = 0
) -> tuple[Tokens, MaskedWords]:
    encoded = encode(tokenizer, captions, inputs, masks=True)
    text, words = ids_of(encoded), words_of(encoded, masking)
    randoms = [partial(generator, 7, epoch=0, position=first + i) for i in range(len(captions))]
    return text, mask_words(tokenizer, text, words, masking, randoms)


def word_starts(tokenizer, ids: torch.Tensor) -> list[bool]:
    """Whether a word begins at each token, by the marks that the two kinds of tokens carry: BERT's own rule, and
    GPT-2's."""
    tokens = tokenizer.convert_ids_to_tokens(ids.tolist())
    if tokenizer.cls_token:
        return [not token.startswith("##") for token in tokens]
    return [token.startswith("Ġ") or not (token.isalpha() and token.isascii()) for token in tokens]


def test_as_many_as_asked_shown_as_published_and_special_ones_never(loaded, wanting: InputSpec):
    captions = [caption(i) for i in range(4000)]
    text, words = masked(loaded, captions, wanting, WordMasking())
    special = torch.isin(text.x, torch.tensor([loaded.cls_token_id or 0, loaded.sep_token_id or 1]))
    assert words.ids.dtype == torch.int64 and words.chosen.dtype == torch.bool and words.count == words.chosen.sum()
    assert not words.chosen[special].any() and words.ids[~words.chosen].equal(text.x[~words.chosen])
    ordinary, hits = int((~special).sum()), words.count
    assert stats.binomtest(hits, ordinary, 0.15).pvalue > 1e-3
    shown, original = words.ids[words.chosen], text.x[words.chosen]
    hidden = int((shown == loaded.mask_token_id).sum())
    assert stats.binomtest(hidden, hits, 0.8 + 0.1 / len(loaded)).pvalue > 1e-3
    other = shown[(shown != original) & (shown != loaded.mask_token_id)]
    assert stats.binomtest(len(other), hits, 0.1 * (1 - 2 / len(loaded))).pvalue > 1e-3
    counts = torch.bincount(other, minlength=len(loaded))
    assert len(counts) == len(loaded), "no id beyond the vocabulary"
    ends = [counts[:half].sum() for half in (len(loaded) // 2, len(loaded))]
    assert stats.binomtest(int(ends[0]), int(ends[1]), 0.5).pvalue > 1e-3, "from the whole of it"


def test_choices_of_neighbours_are_independent(loaded, wanting: InputSpec):
    _, words = masked(loaded, [caption(1)] * 3000, wanting, WordMasking(share=0.3))
    table = words.chosen.view(3000, -1)[:, 1:-1].numpy()
    assert np.abs(np.corrcoef(table.T) - np.eye(table.shape[1])).max() < 0.09


def test_whole_words_fall_together_and_the_share_stays(loaded, wanting: InputSpec):
    captions = [LONG, caption(3), caption(8)] * 700
    text, words = masked(loaded, captions, wanting, WordMasking(whole_words=True))
    assert stats.binomtest(words.count, len(text.x) - 2 * len(captions), 0.15).pvalue > 1e-9  # words are of many tokens
    split = 0
    for ids, chosen in zip(unpack(text), unpack(text.with_x(words.chosen)), strict=True):
        number = np.cumsum(word_starts(loaded, ids))
        for _, group in groupby(zip(number, chosen.tolist(), strict=True), key=lambda pair: pair[0]):
            flags = [flag for _, flag in group]
            assert len(set(flags)) == 1, "a word is masked in part"
            split += len(flags) > 1 and flags[0]
    assert split > 100
    shown = words.ids[words.chosen] == loaded.mask_token_id
    assert 0.75 < shown.float().mean() < 0.85, "what is shown is drawn per token"


def test_words_of_single_tokens_are_tokens(loaded, wanting: InputSpec):
    encoded = encode(loaded, [LONG], wanting, masks=True)
    (single,), (whole,) = words_of(encoded, WordMasking()), words_of(encoded, WordMasking(whole_words=True))
    assert single.tolist() == [-1, *range(len(single) - 2), -1]
    assert whole[0] == whole[-1] == -1 and (np.diff(whole[1:-1]) >= 0).all() and whole[1] == 0
    assert whole.max() < single.max()


def test_the_last_special_token_only_where_allowed_and_pads_never(loaded, wanting: InputSpec):
    padded = replace(wanting, text_padding="max")
    for inputs in (wanting, padded):
        for whole_words in (False, True):
            masking = WordMasking(share=0.5, last_token=True, whole_words=whole_words)
            captions = [caption(i) for i in range(300)]
            encoded = encode(loaded, captions, inputs, masks=True)
            text, words = masked(loaded, captions, inputs, masking)
            chosen = unpack(text.with_x(words.chosen))
            lasts = [sum(real) - 1 for real in encoded["attention_mask"]]
            assert not any(bool(c[0]) for c in chosen)
            assert 100 < sum(bool(c[last]) for c, last in zip(chosen, lasts, strict=True)) < 200
            assert not any(bool(c[last + 1 :].any()) for c, last in zip(chosen, lasts, strict=True))


def test_at_least_one_where_asked_and_evenly(loaded, wanting: InputSpec):
    rare = WordMasking(share=0.01, whole_words=True)
    captions = [caption(1)] * 1500
    _, plain = masked(loaded, captions, wanting, rare)
    _, words = masked(loaded, captions, wanting, replace(rare, at_least_one=True))
    chosen = words.chosen.view(1500, -1)
    assert chosen.any(1).all() and not plain.chosen.view(1500, -1).any(1).all()
    before = plain.chosen.view(1500, -1)
    assert chosen[before.any(1)].equal(before[before.any(1)]), "where the draw chose, nothing is added"
    (number,) = words_of(encode(loaded, [caption(1)], wanting, masks=True), rare)
    per_word = [int(chosen[:, number == word].any(1).sum()) for word in range(number.max() + 1)]
    assert stats.chisquare(per_word).pvalue > 1e-3


def test_a_caption_without_words_has_none_to_guess(loaded, wanting: InputSpec):
    _, words = masked(loaded, ["", " "], wanting, WordMasking(at_least_one=True, whole_words=True))
    assert words.count == 0


def test_unknown_words_may_be_chosen(wordpiece: str, wanting: InputSpec):
    """[UNK] is a token of the text, not one that the tokenizer puts around it."""
    loaded = load_tokenizer(wordpiece)
    (words,) = words_of(encode(loaded, ["a 写 cat"], wanting, masks=True), WordMasking())
    assert words.tolist() == [-1, 0, 1, 2, -1]


@pytest.fixture(scope="session")
def config(shards: str, tokenizer: str) -> DataConfig:
    return DataConfig(shards, tokenizer, workers=0, lanes=6, window_chunks=2, image=VARIED)


@pytest.mark.parametrize("masking", [WordMasking(), WordMasking(whole_words=True, at_least_one=True, last_token=True)])
def test_batches_are_the_same_for_any_world_size_and_after_a_resume(
    config: DataConfig, inputs: InputSpec, masking: WordMasking
):
    wanting = replace(inputs, masked_words=masking)
    whole = global_batches(config, wanting, 5)
    for others in (global_batches(config, wanting, 5, 4), resumed(config, wanting, [2, 3, 5], (2, 1, 3))):
        for a, b in zip(whole, others, strict=True):
            assert_same(a, b)
    for a, b in zip(whole, global_batches(config, inputs, 5), strict=True):
        assert b.masked_words is None and a.masked_words is not None
        assert_same(replace(a, masked_words=None), b)
        assert len(a.masked_words.ids) == len(a.text.x) and a.masked_words.count > 0
    (one, *_), (other, *_) = (global_batches(config, wanting, 5, start=start) for start in (0, 97 * 24))
    assert one.masked_words.count != other.masked_words.count or not one.masked_words.ids.equal(other.masked_words.ids)


def test_evaluation_masks_nothing_and_asks_for_no_mask_token(config: DataConfig, inputs: InputSpec, bare: str):
    wanting = replace(inputs, masked_words=WordMasking())
    batch, _ = next(iter(eval_batches(config.shards, replace(config, tokenizer=bare), wanting, 0, 1, 8)))
    assert batch.masked_words is None


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer whose words are whole captions, without a mask token."""
    model = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1, "<end>": 2}, unk_token="[UNK]"))
    model.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 2)])
    folder = tmp_path_factory.mktemp("data") / "bare"
    PreTrainedTokenizerFast(tokenizer_object=model, unk_token="[UNK]", eos_token="<end>").save_pretrained(folder)
    return str(folder)


def test_a_tokenizer_without_a_mask_is_refused_at_the_start(config: DataConfig, inputs: InputSpec, bare: str):
    wanting = replace(inputs, masked_words=WordMasking())
    with pytest.raises(ValueError, match=r"bare' has no mask token: choose.*`mmpt-data tokenizer`") as caught:
        build_loader(replace(config, tokenizer=bare), wanting, 5, 24, 0, 1)
    assert "\n" not in str(caught.value)


def with_mask(folder: str, change: Callable[[Tokenizer], None]):
    loaded = AutoTokenizer.from_pretrained(folder, mask_token="[UNK]")
    change(loaded.backend_tokenizer)
    return loaded


def test_a_tokenizer_that_cannot_tell_words_apart_is_refused_for_whole_words(bare: str):
    loaded = with_mask(bare, lambda _: None)
    check_masking(loaded, WordMasking())
    with pytest.raises(ValueError, match="does not tell where words end"):
        check_masking(loaded, WordMasking(whole_words=True))

    def split(tokenizer: Tokenizer) -> None:
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()

    check_masking(with_mask(bare, split), WordMasking(whole_words=True))


def test_the_mask_survives_saving_and_takes_the_space_before_it(tokenizer: str, tmp_path: Path):
    loaded = load_tokenizer(tokenizer)
    assert loaded.mask_token == "<mask>" and loaded.mask_token_id == len(loaded) - 1
    ids = loaded("a red <mask> cat")["input_ids"]
    assert ids.count(loaded.mask_token_id) == 1
    plain = loaded("a red cat")["input_ids"]
    assert [i for i in ids if i != loaded.mask_token_id] == plain
