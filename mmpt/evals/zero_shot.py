"""Zero-shot classification: each image against the prompts of every class, shared by all ranks.

An image is scored against a prompt by s_i2t. How the prompts of a class become one score is the method's `ensemble`:

    features      the class is the normalised mean of its prompts' normalised vectors (CLIP, Radford et al. 2021)
    similarities  the class's score is the mean of its prompts' scores (FILIP, Yao et al. 2021): a mean of
                  token vectors would have no meaning there
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmpt import dist
from mmpt.batch import Batch, Tokens
from mmpt.evals.features import (
    Call,
    encode_all_texts,
    encode_images,
    gather_features,
    in_step,
    select,
)
from mmpt.evals.ranking import expected_hits
from mmpt.inputs import InputSpec
from mmpt.ops.features import Features, cut, sequences

KS = (1, 5)
CLASSES_AT_ONCE = 1024


@torch.no_grad()
def zero_shot(
    method: Any,
    call: Call,
    batches: Iterator[tuple[Batch, list[dict]]],
    prompts: Iterator[Tokens],
    templates: int,
    inputs: InputSpec,
    device: torch.device | str,
) -> Iterator[tuple[str, float]]:
    """Yield top-1, top-5 and mean per-class top-1 accuracy, in [0, 1], the same on all ranks. Collective.

    batches:   our share of the images, each with its `label` in the metadata.
    prompts:   our share of the C * M prompt texts as token ids, in parts; the ranks' shares follow one another.
    templates: M, prompts per class.
    ValueError for a label that is not the number of a class, or an image without one.
    """
    encoded = gather_features(encode_all_texts(call, prompts, inputs, device))
    classes = class_features(method.ensemble, encoded, templates)
    total = sequences(encoded) // templates
    hits = torch.zeros(total, len(KS) + 1, dtype=torch.float64)  # the last column counts images
    for item in in_step(batches, device):
        image = encode_images(call, None if item is None else item[0].pictures, inputs, device)
        scores = class_scores(method, image, classes)  # [B, C]; of no image where our share is at its end
        if item is None:
            continue
        labels = [_label(known, total) for known in item[1]]
        found = expected_hits(scores, [[label] for label in labels], KS).cpu()
        hits.index_add_(0, torch.tensor(labels), torch.cat([found, torch.ones(len(labels), 1, dtype=torch.float64)], 1))
    hits = dist.sum_over_ranks(hits.to(device)).cpu()
    images = hits[:, -1]
    for i, k in enumerate(KS):
        yield f"top{k}", float(hits[:, i].sum() / images.sum())
    yield "mean_class_top1", float((hits[:, 0] / images)[images > 0].mean())


def class_features(ensemble: str, prompts: Features, templates: int) -> list[Features]:
    """What images are scored against: for each of the M templates, or for their mean, features of the C classes.

    prompts: features of C * M texts, class by class.
    """
    if ensemble == "features":
        assert isinstance(prompts, Tensor), "a mean of features is for methods with one vector per text"
        vectors = normalize(prompts.float(), dim=-1).view(-1, templates, prompts.shape[-1])  # [C, M, D]
        return [normalize(vectors.mean(1), dim=-1).to(prompts.dtype)]
    return [select(prompts, list(range(m, sequences(prompts), templates))) for m in range(templates)]


def class_scores(method: Any, image: Features, classes: list[Features]) -> Tensor:
    """[B, C] float32: the mean over class features of s_i2t, which for one mean feature is s_i2t itself."""
    total = sum(
        torch.cat([method.score(image, part)[0].float() for part, _, _ in cut(features, CLASSES_AT_ONCE)], 1)
        for features in classes
    )
    assert isinstance(total, Tensor)
    return total / len(classes)


def _label(known: dict, classes: int) -> int:
    label = known.get("label")
    if label is None or not 0 <= label < classes:
        raise ValueError(f"image {known.get('key')!r} has label {label}, not one of {classes} classes")
    return label
