"""What the seven cost: training pairs a second and memory, and the time that one query takes.

    python benchmarks/seven_costs.py [--rounds 3] [--published]

The tiny recipes, or with --published those of the papers' sizes, all with random weights, one thread. Training: `mmpt
bench step` of each in turn, `rounds` times, medians; memory is the process's peak. A query is a text against a gallery
of images whose features are there. It is measured whole where vectors or token vectors are compared. A fused model can
do no more than score pair by pair: there the text alone and a few pairs are measured, and a gallery is so many pairs.
"""

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from mmpt.batch import Tokens, pack_equal
from mmpt.methods.albef import ALBEF
from mmpt.methods.method import Method
from mmpt.ops.features import Features, values
from mmpt.ops.packing import take
from mmpt.ops.similarity import similarity
from mmpt.recipe import load
from mmpt.synthetic import synthetic_batch

TINY = {name: f"{name.lower()}.tiny" for name in ("CLIP", "ALIGN", "SLIP", "FILIP", "ViLT", "UNITER", "ALBEF")}
PUBLISHED = {"CLIP": "clip.vit_b32", "ALIGN": "align.b7_base", "SLIP": "slip.vit_b16", "FILIP": "filip.vit_b32",
             "ViLT": "vilt.base", "UNITER": "uniter.base", "ALBEF": "albef.base"}  # fmt: skip
GALLERIES, SHORTLIST, QUERY_WORDS = (1_000, 10_000), 128, 12


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--published", action="store_true")
    parsed = parser.parse_args()
    recipes, pairs, scored = (PUBLISHED, 8, 8) if parsed.published else (TINY, 64, 256)
    speed = training(recipes, pairs, parsed.rounds)
    torch.set_num_threads(1)
    print("| | recipe | pairs a second | peak GiB | ms a query, 1,000 images | 10,000 images |\n" + "|---" * 6 + "|")
    for name, recipe in recipes.items():
        rates, memory = zip(*speed[name], strict=True)
        for row, seconds in queries(recipe, scored).items():
            cells = [f"{1e3 * seconds[n]:,.1f}" for n in GALLERIES]
            made = f"{median(rates):.1f}" if not row else ""
            print(f"| {name}{row} | {recipe if not row else ''} | {made} | {median(memory) if not row else '':.4} | "
                  + " | ".join(cells) + " |", flush=True)  # fmt: skip


def training(recipes: dict[str, str], pairs: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(pairs a second, peak GiB) of each round."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in recipes}
    for _ in range(rounds):
        for name, recipe in recipes.items():
            command = [
                sys.executable, "-m", "mmpt.cli", "bench", "step", "--recipe", recipe, "--micro-batch", str(pairs),
                "--steps", "4", "--engine.precision", "fp32", "--engine.zero_stage", "0",
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
            numbers = [re.search(rf"{what} +([\d.]+)", done.stdout) for what in ("pairs per second", "the process")]
            if None in numbers:
                raise RuntimeError(f"{' '.join(command)}:\n{done.stdout}{done.stderr[-2000:]}")
            found[name].append((float(numbers[0][1]), float(numbers[1][1])))  # type: ignore[index]
    return found


@torch.no_grad()
def queries(recipe: str, scored: int) -> dict[str, dict[int, float]]:
    """Seconds of a query by the size of the gallery; by row, of which the first has no name."""
    torch.manual_seed(0)
    config = load(recipe).method
    method = config.build().eval()
    batch = synthetic_batch(config.inputs(), max(2, scored), 0)
    text = pack_equal(batch.text.x[: min(QUERY_WORDS, len(batch.text.x))][None])
    images = method.encode_image(batch.pictures)  # type: ignore[operator]
    encode = timed(lambda: method.encode_text(text))  # type: ignore[operator]
    query = method.encode_text(text)  # type: ignore[operator]
    if not method.fuses:
        return {"": {n: encode + timed(lambda n=n: method.score(gallery(images, n), query)) for n in GALLERIES}}  # type: ignore[operator]
    pair = timed(lambda: score_pairs(method, images, query, scored), times=3) / scored
    rows = {"": {n: encode + n * pair for n in GALLERIES}}
    if isinstance(method, ALBEF):
        vectors = method.vectors(images, query)
        rows[f", shortlist {SHORTLIST}"] = {
            n: encode + SHORTLIST * pair + timed(lambda n=n: similarity(gallery(vectors[0], n), vectors[1]))
            for n in GALLERIES
        }
    return rows


def gallery(features: Features, images: int) -> Features:
    """So many images, the same few again and again: made outside of what is timed, on the first call."""
    key = (id(values(features)), images)
    if key not in _GALLERIES:
        few = len(features.offsets) - 1 if isinstance(features, Tokens) else len(features)
        places = torch.arange(images) % few
        _GALLERIES[key] = take(features, places) if isinstance(features, Tokens) else features[places]
    return _GALLERIES[key]


_GALLERIES: dict[tuple[int, int], Features] = {}


def score_pairs(method: Method, images: Features, query: Features, count: int) -> None:
    assert isinstance(images, Tokens) and isinstance(query, Tokens)
    some, same = torch.arange(count) % (len(images.offsets) - 1), torch.zeros(count, dtype=torch.int64)
    method.score_pairs(take(images, some), take(query, same))  # type: ignore[operator]


def timed(function: Callable[[], object], times: int = 5) -> float:
    """Median seconds, after one call that is not counted."""
    function()
    found = []
    for _ in range(times):
        began = time.perf_counter()
        function()
        found.append(time.perf_counter() - began)
    return median(found)


if __name__ == "__main__":
    main()
