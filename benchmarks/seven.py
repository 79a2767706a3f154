"""The seven systems side by side: the tiny recipes on drawn scenes and on emoji, three seeds, two CPU cores.

    python benchmarks/seven.py [runs/seven] [--emoji DIR] [--samples 32768] [--seeds 3] [--jobs 2] [--parts ...]

In order, and each left out where it has been done before: data; a learning rate for each method, the best of three on
a validation part after 8,192 pairs, by the mean of R@1, R@5 and R@10, or by the training loss where none has left
chance; training; answers; tables, printed and written to OUT/tables.md. Recipes are the tiny ones with patches of 16
pixels, batches of 64, fp32, and a learning rate that stays (see seven_parts/runs.py). DIR holds captions.tsv and
noto-emoji-128px.tar; without it there are scenes only.
"""

import argparse
import json
from pathlib import Path

from seven_parts import information, scores, tables
from seven_parts.data import VALIDATED, prepare, samples_in
from seven_parts.runs import BATCH, LEARNING_RATES, METHODS, Run, flops_per_pair, marks, pool, train_all

from mmpt.evals.controls import fit_bigrams, text_only_twins

NAMES = {"clip": "CLIP", "align": "ALIGN", "slip": "SLIP", "filip": "FILIP", "vilt": "ViLT", "uniter": "UNITER",
         "albef": "ALBEF"}  # fmt: skip
TUNING_SEED, TUNING_SAMPLES = 100, 8192
ABOVE_CHANCE = 1.5
"""Times chance: what counts as having learnt something."""
PARTS = ("tables", "information", "noise")
ALPHAS, NOISE = (0.0, 0.4), ("train", "shuffled-25", "shuffled-50")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs/seven"), help="goes on there [runs/seven]")
    parser.add_argument("--emoji", type=Path)
    parser.add_argument(
        "--samples",
        type=int,
        default=32_768,
        help="pairs of scenes that every method sees; of emoji half as many [32768]",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, with a core each [2]")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to do [all]")
    parsed = parser.parse_args()
    root, lines = parsed.out.absolute(), list[str]()
    for data in prepare(root / "data", parsed.emoji):
        samples = parsed.samples if data == "scenes" else parsed.samples // 2  # there are fewer of them
        rates = tune(root, data, parsed.jobs)
        for part, make in zip(PARTS, (side_by_side, bounds, noise), strict=True):
            if part in parsed.parts and (data == "scenes" or part == "tables"):
                lines += make(root, data, rates, samples, parsed.seeds, parsed.jobs)
                (root / "tables.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def scored(root: Path, asked: list[tuple[Run, int, str]], jobs: int) -> list[Path]:
    """The answers of each (run, step, part), made side by side."""
    with pool(jobs) as processes:
        waiting = [
            processes.submit(scores.score, run.checkpoint(root, step), root / "data" / run.data, part)
            for run, step, part in asked
            if not scores.answers_file(run.checkpoint(root, step), part).exists()
        ]
        for future in waiting:
            future.result()
    return [scores.answers_file(run.checkpoint(root, step), part) for run, step, part in asked]


def tune(root: Path, data: str, jobs: int) -> dict[str, float]:
    """The best learning rate of each method."""
    step = TUNING_SAMPLES // BATCH
    runs = [Run(method, data, TUNING_SEED, lr) for method in METHODS for lr in LEARNING_RATES]
    train_all(root, {run: [step] for run in runs}, jobs)
    found = scored(root, [(run, step, "validation") for run in runs], jobs)
    quality = {run: answer_quality(file) for run, file in zip(runs, found, strict=True)}
    best = {}
    for method in METHODS:
        own = [run for run in runs if run.method == method]
        learnt = max(quality[run] for run in own) > ABOVE_CHANCE * sum(tables.KS) / len(tables.KS) / VALIDATED
        best[method] = max(own, key=lambda run: quality[run] if learnt else -last_loss(root, run)).lr
        print(f"{data}, {method}: " + ", ".join(f"{run.lr:g} {100 * quality[run]:.1f}" for run in own)
              + f"; taken is {best[method]:g}" + ", by its loss" * (not learnt), flush=True)  # fmt: skip
    return best


def answer_quality(file: Path) -> float:
    found = tables.answered(file)
    return float(tables.hits(found["i2t"], found["t2i"], found["says"]).mean())


def last_loss(root: Path, run: Run) -> float:
    records = (run.folder(root) / "metrics.jsonl").read_text().splitlines()
    return sum(json.loads(record)["loss"] for record in records[-3:]) / 3


def side_by_side(root: Path, data: str, rates: dict[str, float], samples: int, seeds: int, jobs: int) -> list[str]:
    """Both tables of a data set."""
    steps = marks(root, data, samples)
    runs = {Run(m, data, seed, rates[m]): sorted(set(steps[m])) for seed in range(seeds) for m in METHODS}
    oracle = [Run("uniter", data, seed, rates["uniter"], "boxes/train") for seed in range(seeds) if data == "scenes"]
    train_all(root, runs | {run: [steps["uniter"][0]] for run in oracle}, jobs)
    parts = dict.fromkeys(oracle, "boxes/test")
    asked = [(run, step, "test") for run, own in runs.items() for step in own]
    asked += [(run, steps["uniter"][0], parts[run]) for run in oracle]
    answers = {(r, step): tables.answered(f) for (r, step, _), f in zip(asked, scored(root, asked, jobs), strict=True)}
    lines = [f"## {data}", ""]
    for m in METHODS:
        flops = flops_per_pair(root, Run(m, data, 0, LEARNING_RATES[0]))
        lines.append(
            f"- {NAMES[m]}: learning rate {rates[m]:g}, {flops / 1e9:.3f} GFLOP a pair, {BATCH * steps[m][1]:,} pairs "
            "at equal FLOPs"
        )
    for which, title in enumerate((f"equal samples: {BATCH * (samples // BATCH):,} pairs each", "equal FLOPs")):
        found = {NAMES[m]: [answers[run, steps[m][which]] for run in runs if run.method == m] for m in METHODS}
        found["+ALBEF, by its vectors alone"] = [
            each | {"i2t": each["vectors"], "t2i": each["vectors"]} for each in found["ALBEF"]
        ]
        if which == 0:
            if oracle:
                found["+UNITER on the true boxes (oracle)"] = [answers[run, steps["uniter"][0]] for run in oracle]
            found |= untrained(root, data, rates)
        lines += ["", f"### {data}, {title}", "", *tables.retrieval_table(found)]
        if data == "scenes":
            lines += ["", *tables.scenes_table(found, text_only(root))]
    return [*lines, ""]


def untrained(root: Path, data: str, rates: dict[str, float]) -> tables.Answers:
    """As they begin, of one seed."""
    found = tables.Answers()
    for m in METHODS:
        run = Run(m, data, 0, rates[m])
        file = run.folder(root) / "untrained-test.npz"
        scores.score_untrained(run.recipe(root), file, root / "data" / data, "test")
        found[f"+{NAMES[m]}, untrained"] = [tables.answered(file)]
    return found


def text_only(root: Path) -> float:
    train = [sample["txt"].decode() for sample in samples_in(root / "data/scenes/train")]
    held = [json.loads(sample["json"]) for sample in samples_in(root / "data/scenes/test")]
    captions = [sample["txt"].decode() for sample in samples_in(root / "data/scenes/test")]
    return text_only_twins(fit_bigrams(train), captions, [scene["twin"]["caption"] for scene in held])


def bounds(root: Path, data: str, rates: dict[str, float], samples: int, seeds: int, jobs: int) -> list[str]:
    """log N - L_ITC of CLIP and ALBEF against what there is to know; a table, and OUT/information.svg."""
    fresh = root / "data/scenes-fresh"
    if not fresh.exists():
        information.write_fresh(fresh)
    with pool(jobs) as processes:
        waiting = {
            NAMES[m]: [
                processes.submit(
                    information.bounds, Run(m, data, seed, rates[m]).checkpoint(root, samples // BATCH),
                    root / "data" / data, fresh,
                )
                for seed in range(seeds)
            ]
            for m in ("clip", "albef")
        }  # fmt: skip
        found = {name: [future.result() for future in futures] for name, futures in waiting.items()}
    information.plot(found, root / "information.svg")
    return ["### scenes, log N - L_ITC and what there is to know", "", *information.table(found), ""]


def noise(root: Path, data: str, rates: dict[str, float], samples: int, seeds: int, jobs: int) -> list[str]:
    """ALBEF with and without distillation, where so many captions in a hundred are another picture's, after half
    the pairs."""
    step, lr = samples // 2 // BATCH, rates["albef"]
    runs = [Run("albef", data, s, lr, shards, alpha) for s in range(seeds) for shards in NOISE for alpha in ALPHAS]
    train_all(root, {run: [step] for run in runs}, jobs)
    files = scored(root, [(run, step, "test") for run in runs], jobs)
    fused, vectors = tables.Answers(), tables.Answers()
    for shards in NOISE:
        for alpha in ALPHAS:
            own = [f for run, f in zip(runs, files, strict=True) if (run.shards, run.alpha) == (shards, alpha)]
            name = f"alpha {alpha:g}, {shards.removeprefix('shuffled-') if shards != 'train' else 0} % shuffled"
            fused[name] = [tables.answered(file) for file in own]
            vectors[name] = [each | {"i2t": each["vectors"], "t2i": each["vectors"]} for each in fused[name]]
    title = f"### ALBEF, shuffled captions, {BATCH * step:,} pairs each"
    lines = [title, "", "By the vectors:", "", *tables.retrieval_table(vectors)]
    return [*lines, "", "By the whole model:", "", *tables.retrieval_table(fused), ""]


if __name__ == "__main__":
    main()
