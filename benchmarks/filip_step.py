"""Where a FILIP step's time goes on two ranks: towers, late interaction, the loss on top, communication.

    python benchmarks/filip_step.py [--pairs 48] [--rounds 5]

Before is FILIP as one writes it down (einsum over padded texts, gathered by the same collective, dense cross
entropies); after is mmpt's contrast over its late interaction. Towers are half as deep as those of filip.vit_b32,
in bf16 under autocast; both ways interleaved, medians over rounds, each rank with one thread of its own.
"""

import argparse
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from late_interaction_parts.measure import now
from late_interaction_parts.ways import Scores, einsum
from torch.nn.functional import cross_entropy

from mmpt import dist
from mmpt.batch import Batch, Pictures, Tokens, pack
from mmpt.methods.filip import FILIP
from mmpt.ops.contrast.loss import contrast
from mmpt.ops.late_interaction.op import late_interaction
from mmpt.recipe import load

PARTS = ("towers", "late interaction", "the loss on top", "communication", "step")


class Clock:
    """Seconds by part; a part inside another is taken out of it by whoever asks."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def time(self, part: str, function: Callable[[], Any]) -> Any:
        start = now("cpu")
        result = function()
        self.seconds[part] += now("cpu") - start
        return result


def build() -> tuple[FILIP, Any]:
    config: Any = load("filip.vit_b32").method
    towers = config.towers
    towers = replace(
        towers,
        image=replace(towers.image, trunk=replace(towers.image.trunk, depth=6)),
        text=replace(towers.text, trunk=replace(towers.text.trunk, depth=6)),
    )
    torch.manual_seed(0)
    config = replace(config, towers=towers, token_keep_ratio=1.0)
    return config.build(), config


def batch(pairs: int, config: Any) -> Batch:
    inputs, generator = config.inputs(), torch.Generator().manual_seed(dist.rank())
    images = torch.randint(0, 256, (pairs, 3, inputs.image_size, inputs.image_size), dtype=torch.uint8)
    lengths = torch.randint(6, 25, (pairs,), generator=generator).tolist()
    return Batch(
        Pictures(images), pack([torch.randint(1, 999, (n,)) for n in lengths]), torch.arange(pairs), ("",) * pairs
    )


def gradients_of_scores(clock: Clock, scores: Scores, image: Tokens, text: Tokens, loss: Callable) -> None:
    """Backward of a loss of the scores, with the part that late interaction takes of it told apart."""
    v, t = image.x.detach().requires_grad_(), text.x.detach().requires_grad_()
    i2t, t2i = clock.time("late interaction", lambda: scores(image.with_x(v), text.with_x(t)))
    outer = (i2t.detach().requires_grad_(), t2i.detach().requires_grad_())
    grads = clock.time("the loss on top", lambda: torch.autograd.grad(loss(*outer), outer))
    clock.time("late interaction", lambda: torch.autograd.backward((i2t, t2i), grads))


def exchange(clock: Clock, text: Tokens) -> Tokens:
    """Texts of all ranks, timed there and back."""
    own = text.with_x(text.x.detach().requires_grad_())
    texts = clock.time("communication", lambda: dist.gather_tokens(own))
    clock.time("communication", lambda: texts.x.backward(torch.ones_like(texts.x)))
    return texts.with_x(texts.x.detach())


def before(clock: Clock, image: Tokens, text: Tokens, scale: torch.Tensor) -> None:
    """Each rank's images with all texts, and the columns by gathering the scores of the others."""
    texts = exchange(clock, text)

    def loss(i2t: torch.Tensor, t2i: torch.Tensor) -> torch.Tensor:
        own = dist.rank() * len(i2t) + torch.arange(len(i2t))
        columns = dist.gather(t2i)[:, own]  # [N, B]
        return cross_entropy(scale * i2t, own) + cross_entropy(scale * columns.T, own)

    gradients_of_scores(clock, einsum, image, texts, loss)


def after(clock: Clock, image: Tokens, text: Tokens, scale: torch.Tensor, config: Any) -> None:
    """The loss as it is; late interaction alone is timed again on the same inputs and taken out."""
    v, t = image.x.detach().requires_grad_(), text.x.detach().requires_grad_()
    whole = Clock()

    def loss_and_gradients() -> None:
        contrast(late_interaction, image.with_x(v), text.with_x(t), scale, config.contrast).loss.backward()

    whole.time("step", loss_and_gradients)
    alone = Clock()
    texts = exchange(alone, text)
    alone.time("communication", lambda: dist.logsumexp_over_ranks(torch.zeros(len(texts.offsets) - 1)))
    gradients_of_scores(alone, late_interaction, image, texts, lambda a, b: a.sum() + b.sum())
    for part in ("late interaction", "communication"):
        clock.seconds[part] += alone.seconds[part]
    left = whole.seconds["step"] - alone.seconds["late interaction"] - alone.seconds["communication"]
    clock.seconds["the loss on top"] += max(0.0, left)


def one_rank(rank: int, port: int, pairs: int, rounds: int, answer: Any) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
    )  # fmt: skip
    torch.set_num_threads(1)
    dist.init()
    method, config = build()
    given, scale = batch(pairs, config), torch.tensor([50.0])
    losses = {"before": before, "after": partial(after, config=config)}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in losses}
    for turn in range(rounds + 1):
        for name, loss in losses.items():
            clock = Clock()
            with torch.autocast("cpu", torch.bfloat16):
                image, text = clock.time("towers", lambda: method.encode(given))
                dist.barrier()
                rounded = (side.with_x(side.x.detach().bfloat16()) for side in (image, text))
                loss(clock, *rounded, scale)
                dist.barrier()
            gradients = [torch.ones_like(image.x), torch.ones_like(text.x)]
            clock.time("towers", partial(torch.autograd.backward, [image.x, text.x], gradients))
            clock.seconds["step"] = sum(clock.seconds.values())
            if turn:
                found[name].append(clock.seconds)
    if rank == 0:
        answer.send({name: {part: median(row[part] for row in rows) for part in PARTS} for name, rows in found.items()})
    dist.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=48, help="per rank")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    port = dist.free_port()
    ranks = [context.Process(target=one_rank, args=(r, port, args.pairs, args.rounds, sender)) for r in range(2)]
    for process in ranks:
        process.start()
    found = receiver.recv()
    for process in ranks:
        process.join()
    print(f"{args.pairs} pairs on each of 2 ranks; milliseconds, medians of {args.rounds} rounds\n")
    print("| part | before | after | before / after |\n|---|---|---|---|")
    for part in PARTS:
        old, new = (1e3 * found[name][part] for name in ("before", "after"))
        print(f"| {part} | {old:.0f} | {new:.0f} | {old / new:.1f} |" if new else f"| {part} | {old:.0f} | 0 | |")


if __name__ == "__main__":
    main()
