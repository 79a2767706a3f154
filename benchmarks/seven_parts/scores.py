"""What a trained model answers: all pairs of the gallery, twins, words on places. Kept beside its run, so that tables
are made without a model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmpt.cli import load_run
from mmpt.data.text import load_tokenizer
from mmpt.evals.features import select
from mmpt.evals.fused import paired_scores, scorer_of
from mmpt.evals.maps import aligned
from mmpt.evals.suite import Rank, caption_list, evaluate, what_is_said
from mmpt.methods.albef import ALBEF
from mmpt.methods.method import Method
from mmpt.ops.features import Features, cut
from mmpt.ops.similarity import similarity
from mmpt.recipe import Recipe
from seven_parts.data import GALLERY, VALIDATED

CPU = torch.device("cpu")
PAIRS_AT_ONCE = 64


def score(checkpoint: Path, data: Path, part: str) -> Path:
    """The file with the answers of a checkpoint, made if it is not there. data: the data set; part: of it."""
    file = answers_file(checkpoint, part)
    if not file.exists():
        torch.set_num_threads(1)
        recipe, method, _ = load_run(checkpoint, CPU)
        save(file, answers(recipe, method, data, part, VALIDATED if part == "validation" else GALLERY))
    return file


def answers_file(checkpoint: Path, part: str) -> Path:
    return checkpoint.parents[1] / f"{checkpoint.name}-{part.replace('/', '-')}.npz"


def score_untrained(recipe: Recipe, file: Path, data: Path, part: str) -> Path:
    if not file.exists():
        torch.set_num_threads(1)
        torch.manual_seed(recipe.run.seed)
        save(file, answers(recipe, recipe.method.build().eval(), data, part, GALLERY))
    return file


def save(file: Path, found: dict[str, np.ndarray]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished.npz")
    np.savez(unfinished, **found)  # type: ignore[arg-type]
    unfinished.rename(file)


@torch.no_grad()
def answers(recipe: Recipe, method: Method, data: Path, part: str, gallery: int) -> dict[str, np.ndarray]:
    """i2t, t2i [A, A] of the first A = gallery samples and their captions; says [A], equal for captions that say the
    same. For scenes twin, twin_shuffled [A]: 1 where the caption scores higher than its twin by s_i2t, the image its
    own or another's. For ALBEF vectors [A, A]: cosines before the fusion. word_patch_*: see evals/maps.py."""
    folder = str(data / part)
    data_config = replace(recipe.data, tokenizer=str(data / "tokenizer"), workers=0)
    rank = Rank(recipe.evals, data_config, recipe.method.inputs(), method, CPU, load_tokenizer(data_config.tokenizer))
    image, known = rank.encode_images(folder)
    image = select(image, list(range(gallery)))
    known = [sample | {"captions": sample["captions"][:1]} for sample in known[:gallery]]
    _, captions = caption_list(known)
    text, scorer = rank.encode_texts(captions), scorer_of(method, method)
    i2t, t2i = (side.float().numpy() for side in scorer.score(image, text))
    found = {"i2t": i2t, "t2i": t2i, "says": numbered(what_is_said(known, replace(recipe.evals, equal_captions=True)))}
    if isinstance(method, ALBEF):
        found["vectors"] = similarity(*method.vectors(image, text)).float().numpy()  # type: ignore[arg-type]
    if "twin" in known[0] and gallery == GALLERY:
        twin = rank.encode_texts([sample["twin"]["caption"] for sample in known])
        others = select(image, [*range(1, GALLERY), 0])
        found["twin"], found["twin_shuffled"] = (wins(scorer, pictures, text, twin) for pictures in (image, others))
        evals = replace(recipe.evals, scenes=(folder,), retrieval=(), zero_shot=())
        for values in (evaluate(evals, data_config, rank.inputs, method, method, CPU),
                       aligned(evals, data_config, rank.inputs, method, CPU)):  # fmt: skip
            found |= {name.rpartition("/")[2]: np.array(v) for name, v in values.items() if "word_patch" in name}
    return found


def numbered(says: list) -> np.ndarray:
    numbers = {said: i for i, said in enumerate(dict.fromkeys(says))}
    return np.array([numbers[said] for said in says])


def wins(scorer, image: Features, text: Features, twin: Features) -> np.ndarray:
    """[A]: 1 where the text scores higher, 0.5 where both score alike."""
    out = list[Tensor]()
    for own, right, wrong in zip(*(cut(side, PAIRS_AT_ONCE) for side in (image, text, twin)), strict=True):
        difference = (paired_scores(scorer, own[0], right[0])[0] - paired_scores(scorer, own[0], wrong[0])[0]).float()
        out.append((difference > 0).float() + 0.5 * (difference == 0).float())
    return torch.cat(out).numpy()
