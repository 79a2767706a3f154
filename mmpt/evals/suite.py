"""What is measured during and after training, and one call that measures it."""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmpt import dist
from mmpt.batch import Batch, Tokens
from mmpt.data.loader import DataConfig, eval_batches
from mmpt.data.text import load_tokenizer, tokenise
from mmpt.evals.alignment import Span, token_spans
from mmpt.evals.features import Call, encode_all_texts, encode_images, in_step, join
from mmpt.evals.fused import PairScorer, Shortlist, scorer_of
from mmpt.evals.prompts import load_prompts
from mmpt.evals.retrieval import Pairs, reranked, retrieval
from mmpt.evals.scenes import scenes
from mmpt.evals.zero_shot import zero_shot
from mmpt.inputs import InputSpec
from mmpt.ops.features import Features


@dataclass(frozen=True)
class EvalConfig:
    """Which data sets are evaluated, how, and how often."""

    every_steps: int = 0
    """Steps between evaluations during training; 0 evaluates only at the end."""
    retrieval: tuple[str, ...] = ()
    """Folders of shards for image-text retrieval, R@1, R@5 and R@10 both ways; an image may have several captions."""
    zero_shot: tuple[str, ...] = ()
    """Folders of labelled shards for zero-shot classification, with classnames.txt there or in the folder above."""
    scenes: tuple[str, ...] = ()
    """Folders of held-out scenes (`mmpt-data scenes`) for word-patch alignment, colour swaps and twin captions."""
    batch: int = 64
    """Images, or texts, encoded at once on each rank."""
    shortlist: int = 0
    """In retrieval with a method that fuses and also aligns vectors (ALBEF), only so many answers of each query are
    scored by the whole model, those whose vectors are closest; 0 scores all pairs."""
    equal_captions: bool = False
    """In retrieval, captions that are equal, or that say the same where the data knows, are right for each other."""

    def __post_init__(self):
        if self.batch < 1 or self.every_steps < 0:
            raise ValueError(f"batch ({self.batch}) must be 1 or more, every_steps ({self.every_steps}) 0 or more")
        for name, folders in (("retrieval", self.retrieval), ("zero_shot", self.zero_shot), ("scenes", self.scenes)):
            if len({prefix(folder) for folder in folders}) < len(folders):
                raise ValueError(
                    f"evals.{name} names {', '.join(folders)}: records tell data sets apart by the last two parts of "
                    "their paths, and two of these are alike there"
                )


@torch.no_grad()
def evaluate(
    config: EvalConfig, data: DataConfig, inputs: InputSpec, call: Call, method: Any, device: torch.device | str
) -> dict[str, float]:
    """Everything that is configured, as {"eval/SET/NAME": value}, the same on all ranks. Collective.

    call: the engine or the plain method, through which all parameters are used. method: for `score` and `ensemble`,
    which use none but in methods that fuse (evals/fused.py). SET is the last two parts of the folder's path.
    ValueError for anything amiss in the data.
    """
    if not (config.retrieval or config.zero_shot or config.scenes):
        return {}
    rank = Rank(config, data, inputs, call, device, load_tokenizer(data.tokenizer))
    scorer, scores = scorer_of(method, call), dict[str, float]()
    for run, folders in (
        (run_retrieval, config.retrieval), (run_zero_shot, config.zero_shot), (run_scenes, config.scenes),
    ):  # fmt: skip
        for folder in folders:
            scores |= {f"{prefix(folder)}{name}": value for name, value in run(rank, scorer, folder)}
    return scores


def prefix(folder: str) -> str:
    """What the names of a data set's values begin with."""
    return "eval/" + "/".join(folder.rstrip("/").split("/")[-2:]) + "/"


@dataclass(frozen=True)
class Rank:
    """What one rank needs to encode its share of any data set."""

    config: EvalConfig
    data: DataConfig
    inputs: InputSpec
    call: Call
    device: torch.device | str
    tokenizer: Any
    alone: bool = False
    """Whether its share is everything, on every rank alike."""

    def _share(self) -> tuple[int, int]:
        return (0, 1) if self.alone else (dist.rank(), dist.world_size())

    def batches(self, folder: str) -> Iterator[tuple[Batch, list[dict]]]:
        """Our share of the samples, as `eval_batches` makes them."""
        return eval_batches(folder, self.data, self.inputs, *self._share(), self.config.batch)

    def pixels(self, folder: str) -> Iterator[tuple[Tensor, list[dict]]]:
        """Our share of the images as [B, 3, S, S] uint8, whatever the method takes, and what is known of each."""
        square = replace(self.inputs, image_resize="square", patches=0, kept_patches=0, regions=None)
        made = eval_batches(folder, self.data, square, *self._share(), self.config.batch)
        for batch, known in made:
            assert batch.pictures.pixels is not None
            yield batch.pictures.pixels, known

    def encode_images(self, folder: str) -> tuple[Features, list[dict]]:
        """Features of our share of the images, and what is known of each. Collective."""
        features, known = [], []
        for item in in_step(self.batches(folder), self.device):
            features.append(encode_images(self.call, item and item[0].pictures, self.inputs, self.device))
            known += item[1] if item else []
        return join(features), known

    def ids(self, texts: list[str]) -> Iterator[Tokens]:
        """Token ids of the texts, `config.batch` at a time."""
        for first in range(0, len(texts), self.config.batch):
            yield tokenise(self.tokenizer, texts[first : first + self.config.batch], self.inputs)

    def encode_texts(self, texts: list[str]) -> Features:
        """Features of our texts, of which there may be none, though not on all ranks. Collective."""
        return encode_all_texts(self.call, self.ids(texts), self.inputs, self.device)

    def spans(self, text: str) -> list[Span]:
        """The characters that each token id of the text stands for."""
        return token_spans(self.tokenizer, text, self.inputs.max_text_tokens)


def run_retrieval(rank: Rank, method: Any, folder: str) -> Iterator[tuple[str, float]]:
    """R@K of one folder of images with captions."""
    image, known = rank.encode_images(folder)
    owner, texts = caption_list(known)
    pairs = Pairs(image, rank.encode_texts(texts), owner, what_is_said(known, rank.config))
    if not rank.config.shortlist or not isinstance(method, PairScorer):
        return retrieval(method, pairs)
    vectors = rank.call("vectors", pairs.image, pairs.text)
    found = reranked(Shortlist(method, rank.config.shortlist), pairs, vectors)
    return ((f"shortlist_{rank.config.shortlist}_{name}", value) for name, value in found)


def run_zero_shot(rank: Rank, method: Any, folder: str) -> Iterator[tuple[str, float]]:
    """Accuracy on one folder of labelled images. Each rank encodes a consecutive share of the prompts."""
    prompts = load_prompts(folder)
    texts = prompts.texts()
    first, last = (r * len(texts) // dist.world_size() for r in (dist.rank(), dist.rank() + 1))
    ids = rank.ids(texts[first:last])
    return zero_shot(method, rank.call, rank.batches(folder), ids, len(prompts.templates), rank.inputs, rank.device)


def run_scenes(rank: Rank, method: Any, folder: str) -> Iterator[tuple[str, float]]:
    """Word-patch alignment, colour swaps and twins of one folder of held-out scenes."""
    image, known = rank.encode_images(folder)
    return scenes(method, image, known, rank.encode_texts, rank.spans)


def caption_list(known: list[dict]) -> tuple[list[int], list[str]]:
    """All captions, and for each the place of its image."""
    pairs = [(image, caption) for image, sample in enumerate(known) for caption in sample["captions"]]
    return [image for image, _ in pairs], [caption for _, caption in pairs]


def what_is_said(known: list[dict], config: EvalConfig) -> list[Hashable]:
    """For each caption, something equal for captions that count as equal."""
    if not config.equal_captions:
        return [(dist.rank(), i) for i in range(sum(len(sample["captions"]) for sample in known))]
    return [
        sample["says"] if "says" in sample and len(sample["captions"]) == 1 else " ".join(caption.lower().split())
        for sample in known
        for caption in sample["captions"]
    ]
