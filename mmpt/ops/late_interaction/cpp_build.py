"""late_interaction.cpp compiled for the CPU that is here: once for a machine, by whichever process comes first.

The library lies under ${XDG_CACHE_HOME:-~/.cache}/mmpt, named by a digest of the source, the flags and the compiler's
version, and ends with a digest of its own bytes, so that one that a full disk cut short is built again, not loaded.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("late_interaction.cpp")
COMPILERS = ("c++", "g++", "clang++")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma")


@dataclass(frozen=True)
class Variant:
    """The source compiled for CPUs with certain instructions."""

    name: str
    needs: frozenset[str]
    """As Linux names them in /proc/cpuinfo."""
    flags: tuple[str, ...]
    bf16: bool = False
    """Takes bf16 numbers, not fp32."""


VARIANTS = (
    Variant(
        "avx512_bf16",
        frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"}),
        ("-DMMPT_LANES=16", "-DMMPT_BF16", "-mavx512bf16", *AVX512),
        bf16=True,
    ),
    Variant("avx512", frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"}), ("-DMMPT_LANES=16", *AVX512)),
    Variant("avx2", frozenset({"avx2", "fma"}), ("-DMMPT_LANES=8", "-mavx2", "-mfma")),
    Variant("portable", frozenset(), ("-DMMPT_LANES=4",)),
)
"""Best first."""


@functools.cache
def here() -> tuple[Variant, ...]:
    """Variants that this CPU can run."""
    offered: set[str] = set()
    if platform.machine() in ("x86_64", "AMD64") and Path("/proc/cpuinfo").is_file():
        flags = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")]
        offered = set(flags[0].split()) if flags else set()
    return tuple(variant for variant in VARIANTS if variant.needs <= offered)


@functools.cache
def library(variant: Variant) -> ctypes.CDLL | str:
    """The compiled variant, or why there is none, as a short phrase."""
    compiler = _compiler()
    if compiler is None:
        return f"there is no C++ compiler: set CXX, or install one of {', '.join(COMPILERS)}"
    try:
        return ctypes.CDLL(str(_built(variant, compiler)))
    except subprocess.CalledProcessError as error:
        complaint = (error.stderr or str(error)).strip().splitlines()
        return f"{compiler} failed: {complaint[0] if complaint else error}"
    except OSError as error:
        return f"its library could not be built or loaded: {error}"


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmpt"


def _compiler() -> str | None:
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else COMPILERS
    return next((found for name in wanted if (found := shutil.which(name))), None)


def _built(variant: Variant, compiler: str) -> Path:
    """Path of the library, built if it is not there. OSError, CalledProcessError."""
    flags = ["-std=c++17", "-O3", "-shared", "-fPIC", "-Wno-psabi", *variant.flags]
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    key = hashlib.sha256("\0".join([SOURCE.read_text(), *flags, version]).encode()).hexdigest()[:24]
    folder = cache_folder()
    path = folder / f"late_interaction-{variant.name}-{key}.so"
    if _whole(path):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{path.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # others wait here, and then find it
        if not _whole(path):
            with tempfile.TemporaryDirectory(dir=folder) as workplace:
                made = Path(workplace) / path.name
                command = [compiler, *flags, str(SOURCE), "-o", str(made)]
                subprocess.run(command, check=True, capture_output=True, text=True)
                with open(made, "r+b") as file:
                    file.write(hashlib.file_digest(file, "sha256").digest())
                os.replace(made, path)
    return path


def _whole(path: Path) -> bool:
    """Whether the file is there and ends with the digest of what comes before."""
    if not path.is_file():
        return False
    content = path.read_bytes()
    return hashlib.sha256(content[:-32]).digest() == content[-32:]
