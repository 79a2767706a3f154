"""Late interaction, forward and backward: every backend against what people write without one.

    python benchmarks/late_interaction.py [--pairs 48] [--patches 196] [--texts 48] [--shortest 6] [--threads 1 2]

Runs are interleaved. Prints for each way the median and quartiles of milliseconds, the useful GFLOP/s (real tokens:
2 T_i T_t D forward), how many times faster than einsum it is within a round, and the peak of memory beyond the features
and their gradients, each in a process of its own.
"""

import argparse
from collections.abc import Callable
from statistics import median

import torch
from late_interaction_parts.measure import in_fresh_process, interleaved, now, peak_bytes, quartiles
from late_interaction_parts.ways import Scores, inputs, ways
from torch.nn.functional import cross_entropy

from mmpt.batch import Tokens

SHORTEST, LONGEST = 6, 24
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def step(scores: Scores, image: Tokens, text: Tokens) -> tuple[float, float, float]:
    """Milliseconds of the forward, the backward and both, for both contrastive losses at a scale of 50.

    Images past the texts have no positive; the first ones' are what the loss asks for.
    """
    v, t = image.x.clone().requires_grad_(), text.x.clone().requires_grad_()
    device = v.device.type
    own = torch.arange(min(len(image.offsets), len(text.offsets)) - 1, device=device)
    start = now(device)
    s_i2t, s_t2i = scores(image.with_x(v), text.with_x(t))
    middle = now(device)
    loss = cross_entropy(50 * s_i2t[: len(own)].float(), own) + cross_entropy(50 * s_t2i.T[: len(own)].float(), own)
    loss.backward()
    end = now(device)
    return 1e3 * (middle - start), 1e3 * (end - middle), 1e3 * (end - start)


def bare(image: Tokens, text: Tokens) -> tuple[float, float, float]:
    """The bare product and the two of a backward, of the same useful size, without anything around them."""
    products = torch.empty(len(image.x), len(text.x), dtype=image.x.dtype, device=image.x.device)
    device = image.x.device.type
    start = now(device)
    torch.mm(image.x, text.x.T, out=products)
    middle = now(device)
    products @ text.x
    products.T @ image.x
    end = now(device)
    return 1e3 * (middle - start), 1e3 * (end - middle), 1e3 * (end - start)


def print_times(image: Tokens, text: Tokens, compiled: bool, rounds: int) -> None:
    found, refusals = ways(image, text, compiled)
    steps: dict[str, Callable[[], tuple[float, ...]]] = {
        name: (lambda scores=scores: step(scores, image, text)) for name, scores in found.items()
    }
    times = interleaved({**steps, "bare products": lambda: bare(image, text)}, rounds)
    gigaflop = 2e-9 * len(image.x) * len(text.x) * image.x.shape[1]
    print("| way | forward ms | both ms | forward GFLOP/s | forward, share of bare | einsum's both / its both |")
    print("|---|---|---|---|---|---|")
    for name, rows in times.items():
        forward, _, both = zip(*rows, strict=True)
        of_bare = median(b[0] / f for b, f in zip(times["bare products"], forward))
        ratio = [e[2] / b for e, b in zip(times["einsum"], both, strict=True)]
        rate = f"{1e3 * gigaflop / median(forward):.0f}"
        print(f"| {name} | {quartiles(forward)} | {quartiles(both)} | {rate} | {of_bare:.2f} | {quartiles(ratio, 2)} |")
    for name, reason in refusals.items():
        print(f"| {name} | not run: {reason} | | | | |")
    print(flush=True)


def peak(name: str, pairs: int, patches: int, texts: int, dtype: torch.dtype) -> int:
    """Bytes of a step beyond the features and their gradients."""
    image, text = inputs(pairs, patches, texts, SHORTEST, LONGEST, dtype)
    scores = ways(image, text, False)[0][name]
    step(scores, *inputs(2, patches, 2, SHORTEST, LONGEST, dtype))
    features = 2 * (image.x.nbytes + text.x.nbytes)  # the clones that `step` makes, and their gradients
    return peak_bytes(lambda: step(scores, image, text)) - features


def print_peaks(pairs: int, patches: int, texts: int, dtype: torch.dtype) -> None:
    image, text = inputs(pairs, patches, texts, SHORTEST, LONGEST, dtype)
    peaks = {name: in_fresh_process(peak, name, pairs, patches, texts, dtype) for name in ways(image, text, False)[0]}
    print("| way | peak MiB beyond the features | einsum's / its |")
    print("|---|---|---|")
    for name, size in peaks.items():
        print(f"| {name} | {size / (1 << 20):.0f} | {peaks['einsum'] / max(size, 1):.0f} |")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=48, help="images")
    parser.add_argument("--patches", type=int, default=196, help="of an image")
    parser.add_argument("--texts", type=int, default=48)
    parser.add_argument("--shortest", type=int, default=SHORTEST, help=f"tokens of a text; the longest has {LONGEST}")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9, help="2 at least")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--compiled", action="store_true", help="torch.compile of einsum too: a minute to compile")
    parser.add_argument("--peaks", type=int, nargs=2, default=[64, 512], metavar=("IMAGES", "TEXTS"), help="0 0: none")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: quartiles want 2 at least")
    for name in args.types:
        for threads in args.threads:
            torch.set_num_threads(threads)
            image, text = inputs(args.pairs, args.patches, args.texts, args.shortest, LONGEST, TYPES[name], args.device)
            print(
                f"{args.pairs} images of {args.patches} patches, {args.texts} texts of {args.shortest} to {LONGEST} "
                f"tokens, D = 256, {name}, {args.device}, {threads} threads; medians [quartiles] of {args.rounds} "
                "rounds\n"
            )
            print_times(image, text, args.compiled, args.rounds)
        if all(args.peaks) and args.device == "cpu":
            print(f"{args.peaks[0]} images of {args.patches} patches, {args.peaks[1]} texts, {name}\n")
            print_peaks(args.peaks[0], args.patches, args.peaks[1], TYPES[name])


if __name__ == "__main__":
    main()
