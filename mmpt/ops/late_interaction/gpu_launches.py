"""What the GPU kernels are launched with: a fixed table by shape and device, so that all ranks run the same kernels."""

from typing import NamedTuple

SHORTEST_BUCKET = 16


class Launch(NamedTuple):
    """How the texts of one bucket are computed."""

    words: int
    """L, tokens of its texts at most."""
    texts: int
    """NT, of a tile."""
    patches: int
    """BM, of a tile."""
    slab: int
    """BD, numbers of width that a backward's program owns."""
    warps: int
    stages: int


class Device(NamedTuple):
    """What a launch depends on."""

    shared_bytes: int
    """A program's shared memory at most."""
    hopper: bool
    """Products are asynchronous: two tiles of texts are under way at a time, where before there was one."""


def launches(longest_text: int, longest_image: int, width: int, bytes_each: int, device: Device) -> list[Launch]:
    """One for each bucket up to the longest text: texts of up to 16 tokens, up to 32, and so on."""
    return [_launch(words, longest_image, width, bytes_each, device) for words in _buckets(longest_text)]


def _launch(words: int, longest_image: int, width: int, bytes_each: int, device: Device) -> Launch:
    """An image's tile and the texts' lie in shared memory together; the tile of products lies in registers, which hold
    16 Ki of 64 columns, 8 Ki of more (compiled.json of the tests). Fewer than 16 patches: it does not fit."""
    texts = max(1, 64 // words)
    columns = texts * words
    rows = (device.shared_bytes - 2048) // (width * bytes_each)
    stages = 1 if columns > 64 or (device.hopper and rows < 2 * columns + 16) else 2
    rows -= 2 * columns if device.hopper and stages == 2 else columns
    most = min(rows, (16 << 10 if columns == 64 else 8 << 10) // columns)
    patches = min(_power_of_two(max(16, longest_image)), 1 << most.bit_length() - 1 if most > 0 else 0)
    warps = 8 if patches * columns >= 8 << 10 or width > 256 else 4
    return Launch(words, texts, patches, min(width, 128 if columns == 64 else 64), warps, stages)


def _buckets(longest_text: int) -> list[int]:
    most = max(SHORTEST_BUCKET, _power_of_two(longest_text))
    return [1 << power for power in range(SHORTEST_BUCKET.bit_length() - 1, most.bit_length())]


def _power_of_two(n: int) -> int:
    """The least that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def filled(width: int) -> int:
    """The width of features that the kernels take: a power of two, 16 at least."""
    return max(16, _power_of_two(width))


def hopper_launches(longest_text: int, longest_image: int) -> list[Launch]:
    """As launches, for the Gluon kernel: tiles of 64 tokens against a whole image."""
    patches = max(64, _power_of_two(longest_image))
    warps = 8 if patches > 64 else 4
    return [Launch(words, 64 // words, patches, 0, warps, 0) for words in _buckets(longest_text)]
