"""Small run directories, made without training, and a tokenizer for them."""

from dataclasses import asdict, replace
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from mmpt import config
from mmpt.engine.resume import Progress, checkpoints_of
from mmpt.engine.weights import publish_weights
from mmpt.methods.method import Method, MethodConfig
from mmpt.recipe import Recipe, load

WORDS = ("[PAD]", "[UNK]", "[START]", "[END]", *(f"w{i}" for i in range(30)))
"""The end of a text is not the largest id, as in most vocabularies but CLIP's."""


def word_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """[START] words [END]; saved in the folder."""
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    inner.post_processor = TemplateProcessing(  # type: ignore[assignment]
        single="[START] $A [END]", special_tokens=[("[START]", 2), ("[END]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", bos_token="[START]", eos_token="[END]", unk_token="[UNK]"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def recipe_of(method: MethodConfig, tokenizer: Path | str = "") -> Recipe:
    recipe = load("clip.tiny")
    return replace(recipe, method=method, data=replace(recipe.data, tokenizer=str(tokenizer)))


def save_run(folder: Path, recipe: Recipe, method: Method) -> Path:
    """A run directory with these weights as its newest checkpoint."""
    folder.mkdir(parents=True)
    config.save_yaml(recipe, folder / "recipe.yaml")
    publish_weights(checkpoints_of(folder), method, {}, asdict(Progress()))
    return folder
