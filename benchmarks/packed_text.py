"""CLIP's text tower over captions of mixed length: packed, against padded to 77 tokens as most code does.

    python benchmarks/packed_text.py

Prints milliseconds per forward and backward, best of several, and the largest difference between the outputs.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from mmpt.batch import Tokens, pack, pack_equal
from mmpt.models.text import TextTransformer, TextTransformerConfig
from mmpt.models.transformer import TransformerConfig

CAPTIONS, SHORTEST, LONGEST, PADDED, REPEATS = 32, 8, 23, 77, 3


def main() -> None:
    torch.manual_seed(0)
    model = TextTransformer(TextTransformerConfig(TransformerConfig(512, 12, 8, activation="quick_gelu")))
    captions = [torch.randint(1, 49408, (n,)) for n in torch.randint(SHORTEST, LONGEST + 1, (CAPTIONS,)).tolist()]
    filled = torch.stack([torch.cat([caption, caption.new_zeros(PADDED - len(caption))]) for caption in captions])
    packed, padded = pack(captions), pack_equal(filled)
    ends = torch.arange(CAPTIONS) * PADDED + packed.lengths() - 1
    times = {
        "packed": best_milliseconds(lambda: step(model, packed, packed.offsets[1:].long() - 1)),
        "padded": best_milliseconds(lambda: step(model, padded, ends)),
    }
    with torch.no_grad():
        difference = (model(packed).x[packed.offsets[1:].long() - 1] - model(padded).x[ends]).abs().max().item()
    print(f"{CAPTIONS} captions of {SHORTEST} to {LONGEST} tokens, 12 layers, {torch.get_num_threads()} threads")
    for name, milliseconds in times.items():
        print(f"{name}: {milliseconds:7.0f} ms  ({len(packed.x if name == 'packed' else padded.x)} tokens)")
    print(f"ratio {times['padded'] / times['packed']:.2f}, outputs differ by at most {difference:.1e}")


def step(model: TextTransformer, ids: Tokens, ends: Tensor) -> None:
    model.zero_grad()
    model(ids).x[ends].square().sum().backward()


def best_milliseconds(function: Callable[[], None]) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


if __name__ == "__main__":
    main()
