"""What a compiler makes of the GPU kernels for devices that are not here.

python -m tests.ops.late_interaction.compiled        rewrites compiled.json: every variant, both architectures
"""

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from mmpt.ops.late_interaction.gpu_launches import Device, hopper_launches, launches

TABLE = Path(__file__).with_name("compiled.json")
DEVICES = {80: Device(163 << 10, False), 90: Device(227 << 10, True)}
PATCHES, LONGEST_TEXT = 196, 128
WIDTHS = (256, 512)
POINTERS = {
    "V": "bf16", "T": "bf16",
    "IMAGE_OFFSETS": "i64", "ORDER": "i32", "ROWS": "i64", "LENGTHS": "i32", "BOUNDS": "i32", "I2T": "fp32",
    "T2I": "fp32", "WORD": "u8", "PATCH": "u8", "G1": "fp32", "G2": "fp32", "SPARSE": "u8", "GRAD": "fp32",
}  # fmt: skip


class Kernel(NamedTuple):
    name: str
    function: Any
    constants: dict[str, Any]
    options: dict[str, int]


class Made(NamedTuple):
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_instructions: str
    """HGMMA are Hopper's asynchronous products of warp groups, HMMA those of a warp."""
    overlaps: bool
    """Whether maxima are taken between an asynchronous product's start and the wait for it."""


def kernels(architecture: int) -> Iterator[Kernel]:
    """Every one of the launch tables for images of 196 patches: at FILIP's width all, at others texts of 32 words."""
    for width in WIDTHS:
        for kernel in _triton_kernels(architecture, width):
            if width == WIDTHS[0] or " 32 words" in kernel.name:
                yield kernel
    if architecture == 90:
        yield from _gluon_kernels(WIDTHS[0])


def _triton_kernels(architecture: int, width: int) -> Iterator[Kernel]:
    from mmpt.ops.late_interaction import triton_backward, triton_forward

    for launch in launches(LONGEST_TEXT, PATCHES, width, 2, DEVICES[architecture]):
        shape = {"D": width, "L": launch.words, "NT": launch.texts}
        options = {"num_warps": launch.warps, "num_stages": launch.stages}
        what = f"triton, {width} wide, {launch.words} words"
        for keep in (True, False):
            one = shape | {"BM": launch.patches, "ONE": launch.patches >= PATCHES, "KEEP": keep}
            name = f"{what}, forward {'with' if keep else 'without'} winners"
            yield Kernel(name, triton_forward.forward_kernel, one, options)
        for to in ("patches", "words"):
            slab = shape | {"BM": min(launch.patches, 128), "BD": launch.slab}
            yield Kernel(f"{what}, to {to}", getattr(triton_backward, f"{to}_kernel"), slab, options)


def _gluon_kernels(width: int) -> Iterator[Kernel]:
    from mmpt.ops.late_interaction import gluon_forward

    for launch in hopper_launches(64, PATCHES):
        for keep in (True, False):
            shape = {"D": width, "BM": launch.patches, "L": launch.words, "NT": launch.texts, "KEEP": keep}
            name = f"gluon, {width} wide, {launch.words} words, forward {'with' if keep else 'without'} winners"
            yield Kernel(name, gluon_forward.forward_kernel, shape, {"num_warps": launch.warps})


def make(kernel: Kernel, architecture: int) -> Made:
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # as triton does, which warns that it will not for ever
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    names = kernel.function.arg_names
    signature = {
        name: "constexpr" if name in kernel.constants else f"*{POINTERS[name]}" if name in POINTERS else "i32"
        for name in names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    Source = GluonASTSource if kernel.name.startswith("gluon") else ASTSource
    source = Source(kernel.function, signature, constexprs=kernel.constants, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=kernel.options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = _output(str(tools / "cuobjdump"), "-res-usage", file.name)
        listing = _output(str(tools / "nvdisasm"), "-ndf", "-c", file.name)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    found = re.search(r"\b(HGMMA|HMMA)\b", listing)
    return Made(
        int(registers), int(stack), made.metadata.shared, found.group(1) if found else "none", _overlaps(listing)
    )


def _overlaps(listing: str) -> bool:
    steps = "".join(name[0] for name in re.findall(r"\b(HGMMA|FMNMX|WARPGROUP\.DEPBAR)\b", listing))
    return re.search(r"H+F+W", steps) is not None


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def table() -> dict[str, Made]:
    """By architecture and kernel, made by two processes."""
    jobs = [(architecture, kernel.name) for architecture in DEVICES for kernel in kernels(architecture)]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return dict(pool.map(_row, jobs))


def _row(job: tuple[int, str]) -> tuple[str, Made]:
    architecture, name = job
    kernel = next(kernel for kernel in kernels(architecture) if kernel.name == name)
    return f"sm_{architecture}, {name}", make(kernel, architecture)


if __name__ == "__main__":
    TABLE.write_text(json.dumps({name: made._asdict() for name, made in table().items()}, indent=1) + "\n")
