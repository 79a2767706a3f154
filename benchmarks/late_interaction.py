"""Late interaction on a CPU, forward and backward: ours against plain autograd over the tensor of all products.

    python benchmarks/late_interaction.py [--pairs 48] [--patches 196] [--threads 1 2] [--repeats 9]

The runs of both are interleaved, so that other work on the machine slows both alike. Prints the median and quartiles
of milliseconds, of their ratio within a round, and the peak of memory of each in a process of its own.
"""

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from statistics import quantiles

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from mmpt.batch import Tokens, pack, pack_equal
from mmpt.ops.late_interaction.op import late_interaction

WIDTH, SHORTEST, LONGEST = 256, 6, 24
Scores = Callable[[Tokens, Tokens], tuple[Tensor, Tensor]]


def naive(image: Tokens, text: Tokens) -> tuple[Tensor, Tensor]:
    """The formula as one writes it down: texts padded to the longest, every product in memory at once.

    With `max`, whose gradient goes to the first of equal products as ours does; `amax` takes longer in the backward.
    """
    patches = image.x.unflatten(0, (-1, image.longest))  # [B_i, P, D]
    lengths = text.lengths().long()
    real = torch.arange(text.longest) < lengths[:, None]  # [B_t, L]
    words = text.x.new_zeros(*real.shape, text.x.shape[1]).index_put((real,), text.x)
    products = torch.einsum("ipd,jrd->ijpr", patches, words).float()
    s_i2t = products.masked_fill(~real[None, :, None], float("-inf")).max(3).values.mean(2)
    return s_i2t, (products.max(2).values * real).sum(2) / lengths


WAYS: dict[str, Scores] = {"ours": late_interaction, "naive": naive}


def inputs(pairs: int, patches: int, dtype: torch.dtype) -> tuple[Tokens, Tokens]:
    torch.manual_seed(0)
    image = pack_equal(normalize(torch.randn(pairs, patches, WIDTH), dim=-1).to(dtype))
    lengths = torch.randint(SHORTEST, LONGEST + 1, (pairs,)).tolist()
    return image, pack([normalize(torch.randn(n, WIDTH), dim=-1).to(dtype) for n in lengths])


def step(scores: Scores, image: Tokens, text: Tokens) -> tuple[Tensor, float, float]:
    """Gradients of both contrastive losses at a scale of 50, with milliseconds of the forward and the backward."""
    v, t = image.x.clone().requires_grad_(), text.x.clone().requires_grad_()
    own = torch.arange(len(image.offsets) - 1)
    start = time.perf_counter()
    s_i2t, s_t2i = scores(image.with_x(v), text.with_x(t))
    middle = time.perf_counter()
    (cross_entropy(50 * s_i2t, own) + cross_entropy(50 * s_t2i.T, own)).backward()
    end = time.perf_counter()
    assert v.grad is not None and t.grad is not None
    return torch.cat([v.grad, t.grad]), 1e3 * (middle - start), 1e3 * (end - middle)


def interleaved(pairs: int, patches: int, dtype: torch.dtype, threads: int, repeats: int) -> None:
    """Print the medians of `repeats` rounds, in each of which both ways run once, after one round to warm up."""
    torch.set_num_threads(threads)
    image, text = inputs(pairs, patches, dtype)
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in WAYS}
    gradients: dict[str, Tensor] = {}
    for _ in range(repeats + 1):
        for name, scores in WAYS.items():
            gradients[name], forward, backward = step(scores, image, text)
            times[name].append((forward, backward, forward + backward))
    for name, rounds in times.items():
        forward, backward, both = [quartiles(column) for column in zip(*rounds[1:], strict=True)]
        print(f"  {name:6} forward {forward}   backward {backward}   both {both} ms")
    ratios = [b[2] / a[2] for a, b in zip(times["ours"][1:], times["naive"][1:], strict=True)]
    difference = (gradients["ours"] - gradients["naive"]).abs().max() / gradients["naive"].abs().max()
    print(f"  naive / ours {quartiles(ratios, 2)}, gradients differ by at most {float(difference):.1e} of the largest")


def quartiles(values: Sequence[float], digits: int = 0) -> str:
    """Median and, in brackets, the first and third quartile."""
    low, middle, high = quantiles(values, n=4)
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def peak_mebibytes(name: str, pairs: int, patches: int, dtype: torch.dtype, answer: Connection) -> None:
    """Memory that one step adds to the process at its peak. Runs in a fresh process, whose peak is otherwise old."""
    step(WAYS[name], *inputs(2, patches, dtype))  # what libraries allocate once
    image, text = inputs(pairs, patches, dtype)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(WAYS[name], image, text)
    answer.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def print_peaks(pairs: int, patches: int, dtype: torch.dtype) -> None:
    context = multiprocessing.get_context("spawn")
    for name in WAYS:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=peak_mebibytes, args=(name, pairs, patches, dtype, sender))
        process.start()
        print(f"  {name:6} peak memory of a step {receiver.recv():6.0f} MiB")
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=48)
    parser.add_argument("--patches", type=int, default=196)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    size = f"{args.pairs} images of {args.patches} patches x {args.pairs} texts of {SHORTEST} to {LONGEST} tokens"
    for dtype in (torch.float32, torch.bfloat16):
        for threads in args.threads:
            print(f"{size}, D = {WIDTH}, {dtype}, {threads} threads; median [quartiles] of {args.repeats} rounds")
            interleaved(args.pairs, args.patches, dtype, threads, args.repeats)
        print_peaks(args.pairs, args.patches, dtype)


if __name__ == "__main__":
    main()
