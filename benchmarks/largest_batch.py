"""The largest batch whose contrastive loss and gradients fit into a bounded memory, by bisection.

    python benchmarks/largest_batch.py [--mib 512] [--patches 49] [--loss filip clip]

Every probe is a process of its own that may allocate so much beyond what it holds after one small step (RLIMIT_DATA, so
that the allocation really fails). It gets features of b images and b texts and returns their gradients; the towers,
which gradient caching makes independent of the batch, are left out. The other ways:

    filip  x-clip-style: both texts and images padded, all b x b x P x L products by one einsum, maxima by autograd
    clip   open_clip-style: b x b logits both ways and two cross entropies, as its ClipLoss has them in one process
"""

import argparse
import resource
from collections.abc import Callable
from functools import partial

import torch
from late_interaction_parts.measure import in_fresh_process
from late_interaction_parts.ways import WIDTH, Scores, einsum, inputs
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from mmpt.ops.contrast.loss import ContrastConfig, contrast
from mmpt.ops.late_interaction.op import late_interaction
from mmpt.ops.similarity import similarity

SHORTEST, LONGEST, SCALE = 6, 24, 50.0
CLIP_WIDTH = 512


def dense_loss(i2t: Tensor, t2i: Tensor) -> Tensor:
    own = torch.arange(len(i2t))
    return (cross_entropy(SCALE * i2t, own) + cross_entropy(SCALE * t2i.T, own)) / 2


def filip_dense(pairs: int, patches: int) -> None:
    image, text = inputs(pairs, patches, pairs, SHORTEST, LONGEST, torch.float32)
    v, t = image.x.requires_grad_(), text.x.requires_grad_()
    dense_loss(*einsum(image.with_x(v), text.with_x(t))).backward()


def filip_ours(pairs: int, patches: int, config: ContrastConfig) -> None:
    image, text = inputs(pairs, patches, pairs, SHORTEST, LONGEST, torch.float32)
    v, t = image.x.requires_grad_(), text.x.requires_grad_()
    score: Scores = partial(late_interaction, winners="recompute")
    found = contrast(score, image.with_x(v), text.with_x(t), torch.tensor([SCALE]), config)
    (found.loss / pairs).backward()


def vectors(pairs: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image, text = (normalize(torch.randn(pairs, CLIP_WIDTH, generator=generator), dim=-1) for _ in range(2))
    return image.requires_grad_(), text.requires_grad_()


def clip_dense(pairs: int, patches: int) -> None:
    image, text = vectors(pairs)
    logits_per_image, logits_per_text = SCALE * image @ text.T, SCALE * text @ image.T
    own = torch.arange(pairs)
    ((cross_entropy(logits_per_image, own) + cross_entropy(logits_per_text, own)) / 2).backward()


def clip_ours(pairs: int, patches: int, config: ContrastConfig) -> None:
    image, text = vectors(pairs)

    def score(v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        cosines = similarity(v, t)
        return cosines, cosines

    (contrast(score, image, text, torch.tensor([SCALE]), config).loss / pairs).backward()


def fits(step: Callable[[int, int], None], pairs: int, patches: int, budget: int) -> bool:
    """In a fresh process: whether a step's allocations stay within `budget` bytes."""
    torch.set_num_threads(2)
    step(2, patches)
    with open("/proc/self/status") as status:
        held = next(1024 * int(line.split()[1]) for line in status if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (held + budget, held + budget))
    try:
        step(pairs, patches)
    except (RuntimeError, MemoryError) as error:
        if "allocate" in str(error) or isinstance(error, MemoryError):
            return False
        raise
    return True


def largest(step: Callable[[int, int], None], patches: int, budget: int) -> int:
    """To within 3 %."""
    works, fails = 8, 16
    while in_fresh_process(fits, step, fails, patches, budget):
        works, fails = fails, 2 * fails
    while fails - works > max(1, works // 32):
        middle = (works + fails) // 2
        if in_fresh_process(fits, step, middle, patches, budget):
            works = middle
        else:
            fails = middle
    return works


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512, help="memory of a step")
    parser.add_argument("--patches", type=int, nargs="+", default=[49])
    parser.add_argument("--loss", nargs="+", choices=("filip", "clip"), default=["filip", "clip"])
    args = parser.parse_args()
    budget = args.mib << 20
    config = ContrastConfig(score_bytes=budget // 8)  # the one knob that a smaller memory asks for
    print("| loss | written out | mmpt | times |\n|---|---|---|---|", flush=True)
    cases: list[tuple[str, int, Callable[[int, int], None], Callable[[int, int], None]]] = []
    if "filip" in args.loss:
        ours = partial(filip_ours, config=config)
        cases += [(f"FILIP, {p} patches, {WIDTH} wide", p, filip_dense, ours) for p in args.patches]
    if "clip" in args.loss:
        cases.append((f"CLIP, {CLIP_WIDTH} wide", 1, clip_dense, partial(clip_ours, config=config)))
    for name, patches, theirs, ours in cases:
        dense, found = largest(theirs, patches, budget), largest(ours, patches, budget)
        print(f"| {name}, {args.mib} MiB | {dense} | {found} | {found / dense:.1f} |", flush=True)


if __name__ == "__main__":
    main()
