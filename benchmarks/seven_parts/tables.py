"""Tables of what was answered, with intervals, and the orders that the intervals allow.

Resampled are questions, the same ones for all methods, and seeds, of each method on its own: 95 % percentile intervals
of 2,000 draws. An order of two methods is stated only where the interval of their difference excludes zero at 95 %
after Bonferroni's correction for all pairs of the table.
"""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from mmpt.evals.ranking import chance_hits, expected_hits

DRAWS = 2000
KS = (1, 5, 10)
SHORTLIST = 16
Answers = dict[str, list[dict[str, np.ndarray]]]
"""By row, what each seed answered. A row whose name begins with + is no method and takes part in no order."""


def answered(file: Path) -> dict[str, np.ndarray]:
    with np.load(file) as found:
        return dict(found)


def right_answers(says: np.ndarray) -> list[list[int]]:
    return [np.flatnonzero(says == said).tolist() for said in says]


def hits(i2t: np.ndarray, t2i: np.ndarray, says: np.ndarray) -> np.ndarray:
    """[len(KS), A]: of each question, the mean of both directions."""
    right = right_answers(says)
    both = [expected_hits(torch.from_numpy(s), right, KS) for s in (i2t, t2i.T)]
    return ((both[0] + both[1]) / 2).T.numpy()


def reranked(ranker: dict[str, np.ndarray], shortlister: tuple[np.ndarray, np.ndarray], says: np.ndarray) -> np.ndarray:
    """As `hits`, of the SHORTLIST answers to each question that score highest with the shortlister, in the ranker's
    order; the others follow."""
    sides = []
    for own, short in ((ranker["i2t"], shortlister[0]), (ranker["t2i"].T, shortlister[1].T)):
        order = np.argsort(np.argsort(-short, axis=1), axis=1)
        sides.append(np.where(order < SHORTLIST, own, own.min() - 1 - order))
    return hits(sides[0], sides[1].T, says)


def draws(values: np.ndarray, questions: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """[DRAWS] means of values [seeds, A] over drawn questions [DRAWS, A] and as many drawn seeds."""
    seeds = random.integers(0, len(values), (DRAWS, len(values)))
    return np.array([values[s][:, q].mean() for s, q in zip(seeds, questions, strict=True)])


def interval(drawn: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def cell(values: np.ndarray, questions: np.ndarray) -> str:
    low, high = interval(draws(values, questions, np.random.default_rng(1)))
    return f"{100 * values.mean():.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def orders(columns: dict[str, np.ndarray], questions: np.ndarray) -> list[str]:
    """`a > b` for each pair of methods whose difference is beyond doubt."""
    drawn = {name: draws(v, questions, np.random.default_rng(i)) for i, (name, v) in enumerate(columns.items())}
    pairs, found = list(combinations(columns, 2)), []
    for a, b in pairs:
        low, high = interval(drawn[a] - drawn[b], 1 - 0.05 / len(pairs))
        if low > 0:
            found.append(f"{a} > {b}")
        if high < 0:
            found.append(f"{b} > {a}")
    return found


def retrieval_table(found: Answers) -> list[str]:
    says = next(iter(found.values()))[0]["says"]
    questions = np.random.default_rng(0).integers(0, len(says), (DRAWS, len(says)))
    columns = {
        row: np.stack([hits(each["i2t"], each["t2i"], each["says"]) for each in seeds]) for row, seeds in found.items()
    }  # [seeds, len(KS), A]
    for row, ranker, shortlister in shortlists(found):
        both = zip(found[ranker], shortlister, strict=True)
        columns[row] = np.stack([reranked(own, other, own["says"]) for own, other in both])
    lines = ["| | " + " | ".join(f"R@{k}" for k in KS) + " |", "|---" * (len(KS) + 1) + "|"]
    for row, values in columns.items():
        cells = (cell(values[:, k], questions) for k in range(len(KS)))
        lines.append(f"| {row.lstrip('+')} | " + " | ".join(cells) + " |")
    chance = chance_hits(right_answers(says), len(says), KS).mean(0).tolist()
    lines.append("| chance | " + " | ".join(f"{100 * value:.1f}" for value in chance) + " |")
    methods = {row: values[:, 0] for row, values in columns.items() if not row.startswith("+")}
    return [*lines, "", "R@1, beyond doubt: " + ("; ".join(orders(methods, questions)) or "nothing") + "."]


def shortlists(found: Answers) -> list[tuple[str, str, list[tuple[np.ndarray, np.ndarray]]]]:
    """(row, who ranks, the scores of each seed's shortlister)."""
    rows = []
    if "ALBEF" in found:
        vectors = [(each["vectors"], each["vectors"]) for each in found["ALBEF"]]
        rows.append((f"+ALBEF, of the {SHORTLIST} best by its own vectors", "ALBEF", vectors))
    for ranker in ("ViLT", "UNITER"):
        if ranker in found and "CLIP" in found:
            short = [(each["i2t"], each["t2i"]) for each in found["CLIP"]]
            rows.append((f"+{ranker}, of the {SHORTLIST} best by CLIP", ranker, short))
    return rows


def scenes_table(found: Answers, text_only: float) -> list[str]:
    """Twins with their controls, and words on places."""
    count = len(next(iter(found.values()))[0]["twin"])
    questions = np.random.default_rng(0).integers(0, count, (DRAWS, count))
    lines = [
        "| | caption beats twin | ... before another image | words on their object : area share | colour / shape / "
        "size words |",
        "|---|---|---|---|---|",
    ]
    twins = dict[str, np.ndarray]()
    for row, seeds in found.items():
        own, other = (np.stack([each[name] for each in seeds]) for name in ("twin", "twin_shuffled"))
        kinds = (spread(seeds, f"word_patch_ratio_{kind}") for kind in ("colour", "shape", "size"))
        if not row.startswith("+"):
            twins[row] = own
        cells = (cell(own, questions), cell(other, questions), spread(seeds, "word_patch_ratio"), " / ".join(kinds))
        lines.append(f"| {row.lstrip('+')} | " + " | ".join(cells) + " |")
    lines.append(f"| text only (bigrams) | {100 * text_only:.1f} | | | |")
    lines.append("| chance | 50.0 | 50.0 | 1.00 | |")
    return [*lines, "", "Twins, beyond doubt: " + ("; ".join(orders(twins, questions)) or "nothing") + "."]


def spread(seeds: Sequence[dict[str, np.ndarray]], name: str) -> str:
    """The mean over seeds, and the lowest and highest."""
    values = [float(each[name]) for each in seeds if name in each]
    if not values:
        return "none"
    return f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else f"{values[0]:.2f}"
