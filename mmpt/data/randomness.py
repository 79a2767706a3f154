"""Random choices keyed by what they are for, never by who makes them.

A stateful generator would give a sample another crop when the number of ranks or workers changes. Here each choice
draws from its own stream, named by (seed, purpose, epoch, position): the same wherever and whenever it is made.
"""

import hashlib
import struct
from collections.abc import Callable

import numpy as np

Random = Callable[[str], np.random.Generator]
"""One sample's stream of random numbers for each purpose."""


def streams(seed: int, epoch: int, position: int, prefix: str = "") -> Random:
    """The streams of one sample. prefix: put before each purpose."""
    return lambda purpose: generator(seed, prefix + purpose, epoch, position)


def generator(seed: int, purpose: str, epoch: int, position: int) -> np.random.Generator:
    """The stream of random numbers for one purpose of one sample: a pure function of its arguments.

    Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") from counter 0, its 128-bit key
    the BLAKE2b digest of the arguments. Draw with `.random()` only: it is the one method whose values numpy derives
    from the bits in the plainest way, so that they stay the same over platforms and releases.

    seed, epoch, position: integers that fit in 64 bits, signed. Raises ValueError for one that does not.
    """
    try:
        fields = struct.pack("<qqq", seed, epoch, position)
    except struct.error as error:
        raise ValueError(f"seed {seed}, epoch {epoch} and position {position} must each fit in 64 bits") from error
    digest = hashlib.blake2b(fields + purpose.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype="<u8")))
