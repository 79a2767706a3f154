"""`mmpt-data tokenizer SHARDS OUT`: train a tokenizer on the captions of a data set.

Byte-level BPE in the shape of CLIP's (Radford et al. 2021: lower case, <|startoftext|> and <|endoftext|>), with a
<mask> as its last id for methods that guess masked words; or WordPiece in the shape of BERT's (Devlin et al. 2019:
[CLS], [SEP] and [MASK]). The folder it writes is one that AutoTokenizer of transformers loads, and the tokenizer adds
the special tokens at either end itself.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from mmpt.data.manifest import Manifest, load_manifest
from mmpt.data.reader import Reader
from mmpt.data.text import captions_of

START, END, MASK = "<|startoftext|>", "<|endoftext|>", "<mask>"
BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BYTES = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", help="folder of shards with a manifest")
    parser.add_argument("out", type=Path, help="folder to write the tokenizer to")
    parser.add_argument(
        "--kind", choices=("bpe", "wordpiece"), default="bpe", help="byte-level BPE as CLIP, WordPiece as BERT"
    )
    parser.add_argument("--vocab-size", type=int, default=8192, help="most tokens, special ones included")
    parser.add_argument("--keep-case", action="store_true", help="do not lower-case captions")
    parser.add_argument(
        "--caption-field", default="txt", help="as in training: txt, txt_whole, or a field of the .json file"
    )


def run(args: argparse.Namespace) -> None:
    manifest = load_manifest(args.shards)
    train = train_bpe if args.kind == "bpe" else train_wordpiece
    tokenizer = train(
        lambda: read_captions(manifest, args.caption_field), args.vocab_size, lower_case=not args.keep_case
    )
    save(tokenizer, args.kind, args.out)
    print(f"{args.out}: {tokenizer.get_vocab_size():,} tokens")


def read_captions(manifest: Manifest, caption_field: str) -> Iterator[str]:
    """Every caption of every sample, in stored order. Raises ValueError naming the sample that lacks one."""
    reader = Reader(manifest)
    for chunk, length in enumerate(manifest.chunk_lengths.tolist()):
        for sample in reader.read(np.full(length, chunk), np.arange(length)):
            try:
                yield from captions_of(sample.files, caption_field)
            except ValueError as error:
                raise ValueError(f"{sample.shard}: sample {sample.key!r}: {error}") from error


def train_bpe(read: Callable[[], Iterable[str]], vocab_size: int, lower_case: bool) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016, on bytes): no text is outside its vocabulary. `read` gives all captions."""
    _check_vocab_size(vocab_size, BYTES + 3)
    tokenizer = Tokenizer(models.BPE())
    clean = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    tokenizer.normalizer = normalizers.Sequence(clean + [normalizers.Lowercase()] * lower_case)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, special_tokens=[START, END], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(read(), trainer)
    tokenizer.add_special_tokens([AddedToken(MASK, lstrip=True)])  # it stands for a word and the space before it
    _add_special(tokenizer, START, END)
    return tokenizer


def train_wordpiece(read: Callable[[], Iterable[str]], vocab_size: int, lower_case: bool) -> Tokenizer:
    """WordPiece (Schuster and Nakajima 2012) with BERT's cleaning; a word with an unseen character becomes [UNK].

    read: gives all captions, and is called twice: the characters inside words are numbered before training, because the
    trainer would number them in the random order of a hash table and break ties between merges by these numbers.
    """
    normalizer, splitter = normalizers.BertNormalizer(lowercase=lower_case), pre_tokenizers.BertPreTokenizer()
    inside = sorted({
        f"##{character}"
        for caption in read()
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(caption))
        for character in word[1:]
    })  # fmt: skip
    _check_vocab_size(vocab_size, len(BERT_SPECIAL) + len(inside) + 1)
    learner = _wordpiece(models.WordPiece(unk_token="[UNK]"), normalizer, splitter)
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=[*BERT_SPECIAL, *inside], show_progress=False
    )
    learner.train_from_iterator(read(), trainer)
    tokenizer = _wordpiece(models.WordPiece(learner.get_vocab(), unk_token="[UNK]"), normalizer, splitter)
    tokenizer.add_special_tokens(list(BERT_SPECIAL))
    _add_special(tokenizer, "[CLS]", "[SEP]")
    return tokenizer


def _wordpiece(
    model: models.WordPiece, normalizer: normalizers.Normalizer, splitter: pre_tokenizers.PreTokenizer
) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, splitter, decoders.WordPiece()
    return tokenizer


def save(tokenizer: Tokenizer, kind: str, folder: Path) -> None:
    """Write the folder that AutoTokenizer loads."""
    from transformers import PreTrainedTokenizerFast

    if kind == "bpe":
        special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}  # as CLIP's
        special |= {"mask_token": MASK}
    else:
        names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
        special = dict(zip(names, BERT_SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(str(folder))


def _add_special(tokenizer: Tokenizer, start: str, end: str) -> None:
    pair = [(token, tokenizer.token_to_id(token)) for token in (start, end)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{start} $A {end}", special_tokens=pair)


def _check_vocab_size(vocab_size: int, least: int) -> None:
    if vocab_size < least:
        raise ValueError(f"--vocab-size must be at least {least}, got {vocab_size}")
