"""What the sample order costs at 2 billion samples: milliseconds a step, seconds an epoch, bytes of the manifest.

    python benchmarks/order.py [--samples 2e9] [--steps 200]

A rank's share of a step is `batch_positions` (which part of the global batch is ours) and `place_of` (where its samples
lie). Medians and quartiles over steps.
"""

import argparse
import time
from statistics import quantiles

import numpy as np

from mmpt.data.mixture import Mixture, batch_positions, place_of
from mmpt.data.order import Order, locate

CHUNK_SAMPLES, LANES, WINDOW_CHUNKS = 256, 64, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=float, default=2e9)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    lengths = np.full(int(args.samples) // CHUNK_SAMPLES, CHUNK_SAMPLES, dtype=np.int32)
    order = Order(lengths, 3, LANES, WINDOW_CHUNKS * CHUNK_SAMPLES)
    start = time.perf_counter()
    locate(order, np.zeros(1, dtype=np.int64))
    print(
        f"{order.samples:,} samples in {len(lengths):,} chunks; an epoch's order: {time.perf_counter() - start:.1f} s"
    )
    mixture = Mixture((order,), (1,), (0,))
    print("| global batch | ranks | samples a rank | milliseconds a step |\n|---|---|---|---|")
    for global_batch, world_size in ((4096, 8), (32768, 64), (32768, 256), (32768, 512)):
        times = []
        for step in range(args.steps):
            start = time.perf_counter()
            positions = batch_positions(
                mixture, (1000 + step) * global_batch, global_batch, world_size // 2, world_size
            )
            place_of(mixture, positions)
            times.append(1e3 * (time.perf_counter() - start))
        low, middle, high = quantiles(times, n=4)
        print(f"| {global_batch} | {world_size} | {len(positions)} | {middle:.2f} [{low:.2f}, {high:.2f}] |")


if __name__ == "__main__":
    main()
