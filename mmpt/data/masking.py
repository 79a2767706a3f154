"""Words to be guessed: which tokens of a caption are chosen, and what is shown in their place.

Everything is drawn per sample from streams of its own, so that a sample's masks depend on nothing but its position.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from mmpt.batch import MaskedWords, Tokens
from mmpt.data.randomness import Random
from mmpt.inputs import WordMasking

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

NEVER = -1
SHOW_MASK, SHOW_ANY = 0.8, 0.9  # of a draw in [0, 1): below the first [MASK], below the second any id, else the token


def check_masking(tokenizer: "PreTrainedTokenizerBase", masking: WordMasking) -> None:
    """Raises ValueError, naming the cure, for a tokenizer that has no mask token or cannot tell words apart."""
    if tokenizer.mask_token_id is None:
        raise ValueError(
            f"the method guesses masked words and the tokenizer {tokenizer.name_or_path!r} has no mask token: "
            "choose one that has (BERT's, say), or train one with `mmpt-data tokenizer`"
        )
    if not masking.whole_words:
        return
    if not tokenizer.is_fast or len(set(tokenizer("two words").word_ids()) - {None}) != 2:
        raise ValueError(
            f"the method masks whole words and the tokenizer {tokenizer.name_or_path!r} does not tell where words end: "
            "choose one of the tokenizers library that splits at white space, such as BERT's or byte-level BPE"
        )


def words_of(encoded: "BatchEncoding", masking: WordMasking) -> list[np.ndarray]:
    """Which word of its caption each token is part of: [L] int64 per caption, from 0; NEVER for what is not chosen.

    A token is a word of its own unless whole words are masked. Special tokens, pads among them, are never chosen; but
    for the last that is no pad, where `last_token` says so. An unknown word's token is no special one.
    encoded: of a fast tokenizer where whole words are masked, with special_tokens_mask and attention_mask.
    """
    out = []
    for i, (special, real) in enumerate(zip(encoded["special_tokens_mask"], encoded["attention_mask"], strict=True)):
        ordinary = np.array(special) == 0
        if masking.whole_words:
            words = np.array([NEVER if word is None else word for word in encoded.word_ids(i)])
            _, numbers = np.unique(words[ordinary], return_inverse=True)
        else:
            numbers = np.arange(ordinary.sum())
        words = np.full(len(ordinary), NEVER, dtype=np.int64)
        words[ordinary] = numbers
        last = int(np.flatnonzero(real)[-1])
        if masking.last_token and last > 0 and not ordinary[last]:
            words[last] = words.max() + 1
        out.append(words)
    return out


def mask_words(
    tokenizer: "PreTrainedTokenizerBase", text: Tokens, words: Sequence[np.ndarray], masking: WordMasking,
    randoms: Sequence[Random],
) -> MaskedWords:  # fmt: skip
    """Choose words of B captions and show something else in their place (Devlin et al. 2019, section 3.1).

    Each word is chosen with probability `share`, by itself: so is each token, whole words or not. (BERT's and ViLT's
    code fill a quota of tokens instead, which has the same mean.) Of the chosen tokens, each by itself, 80 % show the
    mask token, 10 % an id drawn from the whole vocabulary (as BERT's and ALBEF's code do), 10 % themselves.

    text: x [T] int64. words: B of [L] int64, see `words_of`. randoms: of the B samples.
    """
    assert tokenizer.mask_token_id is not None
    ids = text.x.numpy().copy()
    chosen = np.concatenate([
        choose(own, masking, random("masked words")) for own, random in zip(words, randoms, strict=True)
    ])  # fmt: skip
    draws = np.concatenate(
        [random("shown words").random((len(own), 2)) for own, random in zip(words, randoms, strict=True)]
    )  # [T, 2]
    ids[chosen & (draws[:, 0] < SHOW_MASK)] = tokenizer.mask_token_id
    other = chosen & (draws[:, 0] >= SHOW_MASK) & (draws[:, 0] < SHOW_ANY)
    ids[other] = (draws[other, 1] * len(tokenizer)).astype(np.int64)
    return MaskedWords(torch.from_numpy(ids), torch.from_numpy(chosen), int(chosen.sum()))


def choose(words: np.ndarray, masking: WordMasking, random: np.random.Generator) -> np.ndarray:
    """[L] bool, the tokens of the words that are to be guessed. words: [L] int64, see `words_of`."""
    count = int(words.max()) + 1
    draws = random.random(count + 1)
    hit = draws[:count] < masking.share
    if masking.at_least_one and count and not hit.any():
        hit[int(draws[count] * count)] = True
    return np.append(hit, False)[words]  # NEVER reads the last
