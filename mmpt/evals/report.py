"""report.html: what a run has learned, in one file that needs nothing else."""

from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import torch

from mmpt.data.loader import DataConfig
from mmpt.data.text import load_tokenizer
from mmpt.evals.exhibition import exhibit
from mmpt.evals.findings import Findings
from mmpt.evals.report_curves import draw, read_curves
from mmpt.evals.report_pictures import Album, image_query, text_query, word_maps_figure
from mmpt.evals.report_tables import retrieval_table, short_name, tiles, understanding
from mmpt.evals.suite import EvalConfig, Rank
from mmpt.inputs import InputSpec

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


def exhibition(rank: Rank, method: Any, folder: str, name: str) -> tuple[Album, str]:
    """Retrievals and word maps of evenly spaced samples, chosen before their results are known."""
    found = exhibit(rank, method, folder, SEARCHED_IMAGES, SHOWN_QUERIES)
    album = Album(found.pixels, name)
    parts = [
        f"<h2>Retrievals on {escape(short_name(folder))}</h2>",
        f"<p>Queries spread evenly over the first {len(found.known)} images, chosen before their results were known. "
        "Right answers are marked in green.</p><h3>Caption to image</h3><div class='gallery'>",
        *(text_query(album, query, found.captions[query.query]) for query in found.by_text),
        "</div><h3>Image to caption</h3><div class='gallery'>",
        *(image_query(album, query, found.captions, found.truth) for query in found.by_image),
        "</div>",
    ]
    if found.words:
        parts.append(
            "<h2>Which patches each word matched</h2><p>Each picture is lit where the word's cosine with the patch is "
            "high, from the word's lowest to its highest value; the white square is its best patch. Special tokens are "
            "left out, and subword tokens are merged into words. Where the object that a word speaks of is known, its "
            "box is dashed, and a tick marks a match inside it.</p>"
        )
        for image, caption, words in found.words:
            parts.append(word_maps_figure(album, image, caption, words, found.known[image]))
    return album, "\n".join(parts)
