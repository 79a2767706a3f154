"""A trained model's numbers beside those of the same model untrained, and of the controls: what a report is made of."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from mmpt import dist
from mmpt.data.loader import DataConfig
from mmpt.data.text import load_tokenizer
from mmpt.evals.controls import colour_histograms, fit_bag_of_words, fit_bigrams, text_only_twins
from mmpt.evals.maps import aligned
from mmpt.evals.retrieval import KS, Pairs, retrieval
from mmpt.evals.suite import EvalConfig, Rank, caption_list, evaluate, prefix, what_is_said
from mmpt.inputs import InputSpec

FITTED_PAIRS = 20_000
"""Training pairs that controls are fitted on, at most."""
DIRECTIONS = ("image_to_text", "text_to_image")


@dataclass(frozen=True)
class Findings:
    """Values by the names that `evaluate` gives them; a control has only those that it can have."""

    trained: dict[str, float]
    untrained: dict[str, float]
    bag_of_words: dict[str, float]
    text_only: dict[str, float]


def find(
    config: EvalConfig, data: DataConfig, inputs: InputSpec, method: Any, untrained: Any, device: torch.device | str
) -> Findings:
    """Evaluate both models and fit the controls on `data.shards`. In one process: the controls are not shared out.

    method, untrained: plain modules on the device, in evaluation mode.
    """
    assert dist.world_size() == 1, "a report is made by one process"
    rank = Rank(config, data, inputs, method, device, load_tokenizer(data.tokenizer))
    bag_of_words, text_only = {}, {}
    if data.shards and (config.retrieval or config.scenes):
        histograms, captions = training_pairs(rank, data.shards)
        control = fit_bag_of_words(histograms, captions)
        bigrams = fit_bigrams(captions)
        for folder in config.retrieval:
            pairs = _control_pairs(rank, control, folder)
            bag_of_words |= {prefix(folder) + name: value for name, value in retrieval(control, pairs)}
        for folder in config.scenes:
            scenes = [known for _, sample in rank.batches(folder) for known in sample]
            captions, twins = [s["caption"] for s in scenes], [s["twin"]["caption"] for s in scenes]
            text_only[prefix(folder) + "twin_i2t"] = text_only_twins(bigrams, captions, twins)
    return Findings(
        evaluate(config, data, inputs, method, method, device) | aligned(config, data, inputs, method, device),
        evaluate(config, data, inputs, untrained, untrained, device) | aligned(config, data, inputs, untrained, device),
        bag_of_words,
        text_only,
    )


def training_pairs(rank: Rank, shards: str) -> tuple[torch.Tensor, list[str]]:
    """Colour histograms and first captions of the first FITTED_PAIRS training samples."""
    histograms, captions = [], []
    for pixels, known in rank.pixels(shards):
        histograms.append(colour_histograms(pixels))
        captions += [sample["captions"][0] for sample in known]
        if len(captions) >= FITTED_PAIRS:
            break
    return torch.cat(histograms), captions


def _control_pairs(rank: Rank, control: Any, folder: str) -> Pairs:
    histograms, known = [], []
    for pixels, samples in rank.pixels(folder):
        histograms.append(colour_histograms(pixels))
        known += samples
    owner, texts = caption_list(known)
    image, text = control.encode_image(torch.cat(histograms)), control.encode_text(texts)
    return Pairs(image, text, owner, what_is_said(known, rank.config))


def retrieval_rows(findings: Findings, folder: str) -> Iterator[tuple[str, list[float]]]:
    """(row name, R@1, R@5, R@10 image to text, then text to image), the trained model first, chance last."""
    names = [f"{prefix(folder)}{direction}_R@{k}" for direction in DIRECTIONS for k in KS]
    yield "trained", [findings.trained[name] for name in names]
    if findings.bag_of_words:
        yield "bag of words + colour histogram", [findings.bag_of_words[name] for name in names]
    yield "untrained", [findings.untrained[name] for name in names]
    yield "chance", [findings.trained[f"{name}_chance"] for name in names]


def text_table(findings: Findings, config: EvalConfig) -> str:
    """All numbers for a console."""
    lines = []
    for folder in config.retrieval:
        lines += [f"retrieval on {folder}, %", f"{'':34}{'image to text':^24}{'text to image':^24}"]
        lines.append(f"{'':34}" + 2 * "".join(f"{f'R@{k}':>8}" for k in KS))
        lines += [
            f"{name:34}" + "".join(f"{100 * value:8.1f}" for value in values)
            for name, values in retrieval_rows(findings, folder)
        ]
    others = [name for name in findings.trained if "_R@" not in name]
    if others:
        lines += ["", f"{'':58}{'trained':>10}{'untrained':>10}{'text only':>10}"]
    for name in others:
        values = [scores.get(name) for scores in (findings.trained, findings.untrained, findings.text_only)]
        lines.append(f"{name:58}" + "".join(f"{'' if v is None else f'{v:.3f}':>10}" for v in values))
    return "\n".join(lines)
