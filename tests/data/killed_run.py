"""A run of W ranks over real loaders, killed again and again: `python -m tests.data.killed_run SHARDS TOKENIZER OUT`.

Every rank writes down the keys of each batch; every few steps rank 0 saves the loader's integer, as a checkpoint does.
A forked child is a rank: forking spares it the seconds of importing.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from mmpt import dist
from mmpt.data.loader import DataConfig, build_loader
from mmpt.data.text import load_tokenizer
from mmpt.inputs import InputSpec

STEPS, GLOBAL_BATCH, SAVE_EVERY, KILLS = 60, 24, 3, 20
INPUTS = InputSpec(image_size=16, max_text_tokens=12, vocab_size=300)


def rank_of_a_run(config: DataConfig, out: Path, attempt: int) -> None:
    """Train from the saved state to the end, if nobody kills us."""
    dist.init()
    saved = out / "state.json"
    state = json.loads(saved.read_text()) if saved.exists() else 0
    loader = build_loader(config, INPUTS, 5, GLOBAL_BATCH, dist.rank(), dist.world_size(), state)
    with (out / f"attempt-{attempt:02d}-rank-{dist.rank()}.jsonl").open("w") as log:
        while loader.state < STEPS * GLOBAL_BATCH:
            step = loader.state // GLOBAL_BATCH
            log.write(json.dumps({"step": step, "keys": next(loader).keys}) + "\n")
            log.flush()
            time.sleep(0.005)  # the model's part
            dist.barrier()
            if dist.rank() == 0 and (step + 1) % SAVE_EVERY == 0:
                (out / "state.tmp").write_text(json.dumps(loader.state))
                (out / "state.tmp").replace(saved)
    loader.close()


def start(config: DataConfig, out: Path, attempt: int, world_size: int) -> list[int]:
    """The process ids of the ranks."""
    port, pids = dist.free_port(), []
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_PORT": str(port)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
            try:
                rank_of_a_run(config, out, attempt)
            finally:
                os._exit(0)
        pids.append(pid)
    return pids


def main(shards: str, tokenizer: str, out: Path) -> None:
    """Print how many attempts were really killed."""
    chance, kills, attempt = random.Random(7), 0, 0
    config = DataConfig(shards, tokenizer, workers=0, lanes=6, window_chunks=2)
    load_tokenizer(tokenizer)  # for what it imports
    while kills < KILLS:
        world_size = (2, 1, 4)[attempt % 3]
        pids = start(config, out, attempt, world_size)
        logs = [out / f"attempt-{attempt:02d}-rank-{rank}.jsonl" for rank in range(world_size)]
        while not all(log.exists() and log.stat().st_size for log in logs):
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.15))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)
        kills, attempt = kills + 1, attempt + 1
    for pid in start(config, out, attempt, world_size=2):
        os.waitpid(pid, 0)
    print(kills)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
