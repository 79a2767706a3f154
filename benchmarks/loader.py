"""Our loader against webdataset with full decoding, and against open_clip's own: CPU time per sample, data only.

    python benchmarks/loader.py [--photos FOLDER_OR_TAR] [--open-clip-python PATH]

From tar shards to batches, one worker each, in interleaved rounds, on photographs at their original size, shrunk to 256
pixels, and enlarged to 2.5 megapixels. `--open-clip-python` names the interpreter of an environment that has open_clip
and torchvision. Then the fidelity of our images. Prints Markdown; medians, with quartiles in brackets.
"""

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from loader_parts.fidelity import evaluation_decibels, training_decibels
from loader_parts.shards import LARGE, caption_of, read_photographs, write_all

from data_tools.index import index
from data_tools.tokenizer import save, train_bpe
from mmpt.data.image import ImageConfig

PHOTOS = Path(__file__).parents[1] / "../shared/data/photos/imagenet-samples-400.tar"
CONTENDER = Path(__file__).parent / "loader_parts/contender.py"
BATCH, IMAGE_SIZE, VOCABULARY = 128, 224, 1000
BATCHES_PER_ROUND, BATCHES_PER_LARGE_ROUND = 5, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, default=PHOTOS, help="JPEG photographs: a folder or a tar")
    parser.add_argument("--open-clip-python", type=Path, help="interpreter that has open_clip")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    if not args.photos.exists():
        print(f"loader: not measured, there are no photographs at {args.photos} (--photos)")
        return
    photographs = read_photographs(args.photos)
    interpreters = {"mmpt": sys.executable, "webdataset": sys.executable}
    if args.open_clip_python:
        interpreters["open_clip"] = str(args.open_clip_python)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder) / "tokenizer"
        captions = [caption_of(name) for name, _ in photographs]
        save(train_bpe(lambda: captions, VOCABULARY, lower_case=True), "bpe", tokenizer)
        places = write_all(photographs, Path(folder) / "shards")
        print("| shards | loader | CPU ms per sample | samples/s per core | samples/s, one worker | mmpt is |")
        print("|---|---|---|---|---|---|")
        for kind, place in places.items():
            index(str(place))
            rounds = measure(interpreters, place, tokenizer, kind, args.rounds)
            print_rows(f"{kind}, {mean_kilobytes(place):.0f} kB", rounds)
    if not args.open_clip_python:
        print("\nopen_clip's own loader: not measured (--open-clip-python)")
    print_fidelity([data for _, data in photographs])


def measure(
    interpreters: dict[str, str], shards: Path, tokenizer: Path, kind: str, rounds: int
) -> dict[str, list[dict]]:
    """The rows of every contender's rounds. All are alive all the time, and one at a time is at work."""
    batches = BATCHES_PER_LARGE_ROUND if kind == LARGE else BATCHES_PER_ROUND
    processes = {name: start(name, python, shards, tokenizer) for name, python in interpreters.items()}
    try:
        for name, process in processes.items():
            assert process.stdout.readline() == "ready\n", f"{name} did not start"
        rows = {name: [] for name in processes}
        for turn in range(rounds):
            names = list(processes)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                process = processes[name]
                process.stdin.write(f"{batches}\n")
                process.stdin.flush()
                rows[name].append(json.loads(process.stdout.readline()))
        return rows
    finally:
        for process in processes.values():
            process.stdin.close()
            process.wait()


def start(name: str, python: str, shards: Path, tokenizer: Path) -> subprocess.Popen:
    command = [python, str(CONTENDER), name, str(shards), str(tokenizer), str(BATCH), str(IMAGE_SIZE)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def print_rows(kind: str, rounds: dict[str, list[dict]]) -> None:
    cpu = {name: [1e3 * row["cpu"] / row["samples"] for row in rows] for name, rows in rounds.items()}
    ours = np.median(cpu["mmpt"])
    for name, rows in rounds.items():
        low, middle, high = np.percentile(cpu[name], [25, 50, 75])
        wall = np.median([row["samples"] / row["wall"] for row in rows])
        ratio = "" if name == "mmpt" else f"{middle / ours:.2f} times as fast"
        print(
            f"| {kind} | {name} | {middle:.2f} ({low:.2f} - {high:.2f}) | {1e3 / middle:.0f} | {wall:.0f} | {ratio} |"
        )


def mean_kilobytes(shards: Path) -> float:
    sizes = []
    for path in shards.glob("*.tar"):
        with tarfile.open(path) as tar:
            sizes += [member.size for member in tar if member.name.endswith(".jpg")]
    return float(np.mean(sizes)) / 1e3


def print_fidelity(photographs: list[bytes]) -> None:
    print(f"\n| images ({len(photographs)} photographs) | pixels | mean dB | worst dB |\n|---|---|---|---|")
    for size in (IMAGE_SIZE, IMAGE_SIZE // 2):
        for scale in ((0.9, 1.0), (0.08, 1.0)):
            config = ImageConfig(crop_scale=scale)
            found = [training_decibels(data, size, config, i) for i, data in enumerate(photographs)]
            print(f"| crops of {scale} | {size} | {np.mean(found):.1f} | {min(found):.1f} |")
        found = [evaluation_decibels(data, size, ImageConfig()) for data in photographs]
        print(f"| evaluation | {size} | {np.mean(found):.1f} | {min(found):.1f} |")


if __name__ == "__main__":
    main()
