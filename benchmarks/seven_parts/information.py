"""log N - L_ITC against the mutual information that there is between drawn scenes and their captions.

Of captions that say a colour and a shape of each of n objects, and of two of them where they stand to one another or
not, a scene leaves no choice: what such a caption says, T, follows from the scene, so I(scene; caption) = H(T) (its
wording says nothing more of the scene). Objects are n independent draws of 32 kinds, and of the four ways in which two
can stand none is likelier, so H(T) is exact.

The bound is that of InfoNCE (Li et al. 2021, ALBEF, section 4): N fresh scenes with captions of one sort, each caption
told from the N by the model's vectors at its temperature, and each scene likewise, with one-hot targets. Beside it
stands the best that any vectors could do on the same N: the critic that knows what is true of which scene.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from itertools import permutations, product
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.nn.functional import cross_entropy
from webdataset.writer import TarWriter

from data_tools.index import index
from data_tools.scenes import make_sample
from data_tools.scenes_world import COLOURS, NEVER_TRAINED, SHAPES
from mmpt.cli import load_run
from mmpt.data.text import load_tokenizer
from mmpt.evals.suite import Rank, caption_list
from mmpt.methods.albef import ALBEF
from mmpt.ops.similarity import similarity

FRESH_SEED = 2
KINDS = len(COLOURS) * len(SHAPES) - len(NEVER_TRAINED)
CANDIDATES = (64, 256, 1024)


class Sort(NamedTuple):
    """Of captions."""

    objects: int
    related: bool

    def __str__(self) -> str:
        related = ", related" if self.related else ""
        return f"{self.objects} object{'s' if self.objects > 1 else ''}{related}"


SORTS = (Sort(1, False), Sort(2, False), Sort(2, True), Sort(3, False), Sort(3, True))


def information_nats(sort: Sort) -> float:
    """H(T), exactly: what is said is a multiset of kinds and, of the first two, who stands where to whom."""
    if sort == Sort(3, True):
        return _three_related()
    chance = Counter[tuple]()
    for kinds in product(range(KINDS), repeat=sort.objects):
        share = KINDS ** -float(sort.objects)
        if not sort.related:
            chance[tuple(sorted(kinds))] += share
            continue
        for axis, (first, second) in product(("left of", "above"), permutations(kinds[:2])):
            chance[first, axis, second] += share / 4
    return -sum(p * math.log(p) for p in chance.values())


def _three_related() -> float:
    """Two related kinds a, b and a third c: what is said holds the multiset {a, b, c} and the related two, hence c too.
    So T is the statement of two and an independent third kind."""
    return information_nats(Sort(2, True)) + math.log(KINDS)


def write_fresh(folder: Path) -> None:
    """As many scenes of each sort as the largest N."""
    unfinished, most = folder.with_name(folder.name + ".unfinished"), max(CANDIDATES)
    unfinished.mkdir(parents=True, exist_ok=True)
    for sort in SORTS:
        place = unfinished / str(sort).replace(" ", "-").replace(",", "")
        place.mkdir(exist_ok=True)
        with TarWriter(str(place / "00000.tar"), encoder=False, mtime=0) as tar:
            for sample, _ in zip(of_sort(sort), range(most), strict=False):
                tar.write(sample)
        index(str(place))
    unfinished.rename(folder)


def of_sort(sort: Sort) -> Iterator[dict]:
    number = 0
    while True:
        sample = make_sample(FRESH_SEED, "train", 64, number)
        scene = json.loads(sample["json"])
        sized = any(word["kind"] == "size" for word in scene["words"])
        if not sized and Sort(len(scene["objects"]), scene["relation"] is not None) == sort:
            yield sample
        number += 1


class Bound(NamedTuple):
    sort: str
    information_nats: float
    candidates: int
    bound_nats: float
    best_nats: float
    """Of the critic that knows."""


@torch.no_grad()
def bounds(checkpoint: Path, data: Path, fresh: Path) -> list[Bound]:
    """Of one checkpoint of CLIP or ALBEF."""
    torch.set_num_threads(1)
    recipe, method, _ = load_run(checkpoint, torch.device("cpu"))
    tokenizer = load_tokenizer(str(data / "tokenizer"))
    rank, found = Rank(recipe.evals, recipe.data, recipe.method.inputs(), method, "cpu", tokenizer), list[Bound]()
    scale = method.temperature() if isinstance(method, ALBEF) else method.logit_scale()  # type: ignore[operator]
    for sort in SORTS:
        image, known = rank.encode_images(str(fresh / str(sort).replace(" ", "-").replace(",", "")))
        text = rank.encode_texts(caption_list(known)[1])
        vectors = method.vectors(image, text) if isinstance(method, ALBEF) else (image, text)
        logits = (scale * similarity(*vectors)).double()  # type: ignore[misc]
        said = np.unique([scene["says"] for scene in known], return_inverse=True)[1]
        for n in CANDIDATES:
            parts = range(0, len(known) - n + 1, n)
            losses = [itc(logits[i : i + n, i : i + n]) for i in parts]
            same = [np.log((said[i : i + n, None] == said[None, i : i + n]).sum(1)).mean() for i in parts]
            found.append(Bound(str(sort), information_nats(sort), n, math.log(n) - float(np.mean(losses)),
                               math.log(n) - float(np.mean(same))))  # fmt: skip
    return found


def itc(logits: torch.Tensor) -> float:
    """The mean of both directions, one-hot targets."""
    own = torch.arange(len(logits))
    return float(cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2


def table(found: dict[str, list[list[Bound]]]) -> list[str]:
    """found: by method, of each seed."""
    named = " | ".join(f"{name}: log N - L" for name in found)
    lines = [f"| captions | N | I, nats | {named} | the best possible |", "|---" * (4 + len(found)) + "|"]
    for row in zip(*(seed for seeds in found.values() for seed in seeds), strict=True):
        cells = []
        taken = iter(row)
        for seeds in found.values():
            values = [next(taken).bound_nats for _ in seeds]
            cells.append(f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        first = row[0]
        lines.append(f"| {first.sort} | {first.candidates} | {first.information_nats:.2f} | " + " | ".join(cells)
                     + f" | {first.best_nats:.2f} |")  # fmt: skip
    return lines


def plot(found: dict[str, list[list[Bound]]], file: Path) -> None:
    plt.rcParams["svg.hashsalt"] = "mmpt"
    figure, axes = plt.subplots(1, len(CANDIDATES), figsize=(10, 3.4), sharey=True)
    for axis, n in zip(axes, CANDIDATES, strict=True):
        axis.set_title(f"N = {n}")
        axis.axline((0, 0), slope=1, color="0.6", linewidth=0.8, label="I")
        axis.axhline(math.log(n), color="0.6", linewidth=0.8, linestyle=":", label="log N")
        for i, (name, seeds) in enumerate(found.items()):
            rows = [[bound for bound in seed if bound.candidates == n] for seed in seeds]
            x = [bound.information_nats for bound in rows[0]]
            y = np.array([[bound.bound_nats for bound in row] for row in rows])
            error = np.stack([y.mean(0) - y.min(0), y.max(0) - y.mean(0)])
            axis.errorbar(x, y.mean(0), error, marker="os"[i % 2], linestyle="none", label=name, capsize=2)
        best = [bound.best_nats for bound in next(iter(found.values()))[0] if bound.candidates == n]
        axis.plot(x, best, "k_", markersize=10, label="best possible")
        axis.set_xlabel("I(scene; caption), nats")
    axes[0].set_ylabel("log N - L_ITC, nats")
    axes[-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
