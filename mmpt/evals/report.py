"""report.html: what a run has learned, in one file that needs nothing else."""

from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import torch

from mmpt.batch import Tokens, to_device
from mmpt.data.loader import DataConfig
from mmpt.data.text import load_tokenizer
from mmpt.evals.exhibits import evenly, image_queries, text_queries, words_on_image
from mmpt.evals.features import join
from mmpt.evals.findings import Findings
from mmpt.evals.fused import PairScorer, scorer_of
from mmpt.evals.report_curves import draw, read_curves
from mmpt.evals.report_pictures import Album, image_query, text_query, word_maps_figure
from mmpt.evals.report_tables import retrieval_table, short_name, tiles, understanding
from mmpt.evals.retrieval import find_truth
from mmpt.evals.suite import EvalConfig, Rank, caption_list, what_is_said
from mmpt.inputs import InputSpec
from mmpt.ops.features import Features

SHOWN_QUERIES = 6
SEARCHED_IMAGES = 1000
"""A gallery searches this many images of a data set, the first ones."""


def write_report(
    run_dir: Path,
    title: str,
    about: str,
    findings: Findings,
    config: EvalConfig,
    data: DataConfig,
    inputs: InputSpec,
    method: Any,
    device: torch.device | str,
) -> Path:
    """Write RUN_DIR/report.html and return its path. In one process.

    title, about: plain text. findings: of the same configuration. method: the plain module, in evaluation mode.
    Curves come from RUN_DIR/metrics.jsonl, the gallery and the word maps from each folder of `config.retrieval`.
    """
    rank = Rank(config, data, inputs, method, device, load_tokenizer(data.tokenizer))
    sections, pictures = [tiles(findings, config), curves(run_dir)], []
    for folder in config.retrieval:
        sections.append(retrieval_table(findings, folder))
    for folder in config.scenes:
        sections.append(understanding(findings, folder))
    for number, folder in enumerate(config.retrieval):
        album, gallery = exhibition(rank, method, folder, f"set{number}")
        sections.append(gallery)
        pictures.append(album.definitions())
    recipe = run_dir / "recipe.yaml"
    if recipe.exists():
        sections.append(
            f"<h2>Recipe</h2><details><summary>recipe.yaml</summary><pre>{escape(recipe.read_text())}</pre></details>"
        )
    page = Template(files("mmpt.evals").joinpath("report_page.html").read_text())
    path = run_dir / "report.html"
    path.write_text(
        page.substitute(title=escape(title), about=escape(about), images="".join(pictures), body="\n".join(sections))
    )
    return path


def curves(run_dir: Path) -> str:
    found = read_curves(run_dir / "metrics.jsonl")
    if not found:
        return ""
    return (
        f'<h2>Training</h2><p class="soft">By optimizer step.</p><div class="curves">{"".join(map(draw, found))}</div>'
    )


@torch.no_grad()
def exhibition(rank: Rank, method: Any, folder: str, name: str) -> tuple[Album, str]:
    """Retrievals and word maps of evenly spaced samples, chosen before their results are known."""
    pixels, features, known = _first_images(rank, folder)
    method = scorer_of(method, rank.call)
    owner, captions = caption_list(known)
    text = rank.encode_texts(captions)
    truth, album = find_truth(len(known), owner, what_is_said(known, rank.config)), Album(pixels, name)
    by_text = text_queries(method, features, text, truth, evenly(len(captions), SHOWN_QUERIES))
    by_image = image_queries(method, features, text, truth, evenly(len(known), SHOWN_QUERIES))
    parts = [
        f"<h2>Retrievals on {escape(short_name(folder))}</h2>",
        f"<p>Queries spread evenly over the first {len(known)} images, chosen before their results were known. Right "
        "answers are marked in green.</p><h3>Caption to image</h3><div class='gallery'>",
        *(text_query(album, found, captions[found.query]) for found in by_text),
        "</div><h3>Image to caption</h3><div class='gallery'>",
        *(image_query(album, found, captions, truth) for found in by_image),
        "</div>",
    ]
    if isinstance(features, Tokens) and isinstance(text, Tokens) and not isinstance(method, PairScorer):
        parts.append(
            "<h2>Which patches each word matched</h2><p>Each picture is lit where the word's cosine with the patch is "
            "high, from the word's lowest to its highest value; the white square is its best patch. Special tokens are "
            "left out, and subword tokens are merged into words. Where the object that a word speaks of is known, its "
            "box is dashed, and a tick marks a match inside it.</p>"
        )
        for query in evenly(len(known), SHOWN_QUERIES):
            place, caption = owner.index(query), captions[owner.index(query)]
            maps = words_on_image(features, query, text, place, caption, rank.spans(caption), known[query])
            parts.append(word_maps_figure(album, query, caption, maps, known[query]))
    return album, "\n".join(parts)


def _first_images(rank: Rank, folder: str) -> tuple[torch.Tensor, Features, list[dict]]:
    """Pixels and features of the first SEARCHED_IMAGES or a few more, and what is known of each."""
    pixels, features, known = [], [], []
    for (batch, samples), (seen, _) in zip(rank.batches(folder), rank.pixels(folder), strict=True):
        pixels.append(seen)
        features.append(rank.call("encode_image", to_device(batch.pictures, rank.device)))
        known += samples
        if len(known) >= SEARCHED_IMAGES:
            break
    return torch.cat(pixels), join(features), known
