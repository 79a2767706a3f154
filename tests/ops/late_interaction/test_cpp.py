"""The C++ backend, every variant that this CPU can run, against fp64; and how it is built, shared and refused."""

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmpt.batch import Tokens, pack, pack_equal
from mmpt.ops.late_interaction import cpp_backend, cpp_build, torch_tiles
from mmpt.ops.late_interaction.backends import choose
from mmpt.ops.late_interaction.op import late_interaction
from tests.ops.late_interaction.brute_force import check, tokens

COMPILER = cpp_build._compiler()
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
HERE = [pytest.param(variant, id=variant.name) for variant in cpp_build.here()]
LENGTHS = st.lists(st.integers(1, 77), min_size=1, max_size=4)
FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """What one test finds about compilers and caches is not so in the next."""
    yield
    cpp_build.library.cache_clear()
    cpp_build.here.cache_clear()


def only(variant: cpp_build.Variant, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Let there be a CPU whose best is this variant; the type that shows it."""
    rest = tuple(other for other in cpp_build.VARIANTS if not other.bf16 and other.needs <= variant.needs)
    monkeypatch.setattr(cpp_build, "here", lambda: (variant, *rest))
    return torch.bfloat16 if variant.bf16 else torch.float32


@needs_compiler
@pytest.mark.parametrize("variant", HERE)
@FEW
@given(LENGTHS, LENGTHS, st.integers(1, 300), st.integers(0, 99))
def test_any_lengths_and_widths(
    variant: cpp_build.Variant, monkeypatch: pytest.MonkeyPatch, images: list[int], texts: list[int], width: int,
    seed: int,
) -> None:  # fmt: skip
    with monkeypatch.context() as patch:
        dtype = only(variant, patch)
        check(cpp_backend, tokens(images, width, dtype, seed), tokens(texts, width, dtype, seed + 100))


@needs_compiler
@pytest.mark.parametrize("variant", [v for v in HERE if not v.values[0].bf16])  # type: ignore[union-attr]
def test_bf16_is_widened_where_it_cannot_be_multiplied(
    variant: cpp_build.Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(variant, monkeypatch)
    check(cpp_backend, tokens([49, 3], 33, torch.bfloat16, 0), tokens([5, 20, 1], 33, torch.bfloat16, 1))


@needs_compiler
@pytest.mark.parametrize("variant", HERE)
@FEW
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=40), min_size=1, max_size=3), st.integers(0, 9))
def test_a_tie_goes_to_the_first(
    variant: cpp_build.Variant, monkeypatch: pytest.MonkeyPatch, texts: list[list[int]], seed: int
) -> None:
    """Whole numbers multiply exactly in every type; three vectors make all the tokens, so that most of them tie."""
    with monkeypatch.context() as patch:
        dtype = only(variant, patch)
        kinds = torch.randint(-3, 4, (3, 6), generator=torch.Generator().manual_seed(seed)).to(dtype)
        image = pack([kinds[torch.arange(150) % 3], kinds[torch.tensor([2, 2])]])
        text = pack([kinds[torch.tensor(choice)] for choice in texts])
        _, _, word, best_patch = cpp_backend.forward(image, text, True)
        _, _, exact_word, exact_patch = torch_tiles.forward(
            image.with_x(image.x.double()), text.with_x(text.x.double()), True
        )
        assert torch.equal(word, exact_word) and torch.equal(best_patch, exact_patch)


@needs_compiler
@pytest.mark.parametrize("variant", HERE)
@pytest.mark.parametrize(("patches", "words"), [(300, 3), (3, 300), (257, 256)])
def test_more_tokens_than_a_byte_counts(
    variant: cpp_build.Variant, patches: int, words: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = only(variant, monkeypatch)
    check(cpp_backend, tokens([patches, 4], 20, dtype, 0), tokens([words, 2], 20, dtype, 1))


@needs_compiler
@pytest.mark.parametrize("variant", HERE)
def test_what_is_not_a_number_spoils_its_pairs_only(
    variant: cpp_build.Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = only(variant, monkeypatch)
    image, text = tokens([40, 70], 16, dtype, 0), tokens([9, 4, 7], 16, dtype, 1)
    image.x[3, 5] = float("nan")
    i2t, t2i, word, patch = cpp_backend.forward(image, text, True)
    assert i2t[0].isnan().all() and t2i[0].isnan().all() and i2t[1].isfinite().all() and t2i[1].isfinite().all()
    assert all(int(word[j].max()) < n for j, n in enumerate((9, 4, 7))) and int(patch[0].max()) < 40
    for infinite in (float("inf"), float("-inf")):
        image.x[3] = infinite
        i2t, _, word, patch = cpp_backend.forward(image, text, True)
        assert not i2t[0].isfinite().any() and i2t[1].isfinite().all() and int(patch[0].max()) < 40


@needs_compiler
def test_the_number_of_threads_changes_nothing() -> None:
    image, text = tokens([196] * 9, 64, torch.float32, 0), tokens([3, 9, 24, 17] * 10, 64, torch.float32, 1)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            i2t, t2i, word, patch = cpp_backend.forward(image, text, True)
            found.append((i2t, t2i, word, patch, *cpp_backend.backward(image, text, word, patch, i2t, t2i)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@needs_compiler
def test_strided_rows() -> None:
    wide = torch.randn(60, 34)
    image = Tokens(wide[:40, 1::2], torch.tensor([0, 25, 40], dtype=torch.int32), 25)
    text = Tokens(wide.T[:17].T[40:], torch.tensor([0, 5, 20], dtype=torch.int32), 15)
    assert not image.x.is_contiguous() and not text.x.is_contiguous()
    check(cpp_backend, image, text)


@needs_compiler
def test_pairs_without_gradient_are_not_looked_at() -> None:
    """Their features are not numbers, and nothing of them arrives."""
    image, text = pack_equal(torch.randn(3, 10, 8)), tokens([4, 6], 8, torch.float32, 1)
    i2t, _, word, patch = cpp_backend.forward(image, text, True)
    image.x[10:20] = float("nan")
    weights = torch.ones_like(i2t)
    weights[1] = 0
    grad_v, grad_t = cpp_backend.backward(image, text, word, patch, weights, weights)
    assert grad_v.isfinite().all() and grad_t.isfinite().all() and not grad_v[10:20].any()


@needs_compiler
def test_it_is_what_a_cpu_takes_by_itself_but_for_fp64() -> None:
    image, text = tokens([5], 8, torch.float32, 0), tokens([3], 8, torch.float32, 1)
    assert choose(image, text) is cpp_backend
    assert choose(image.with_x(image.x.double()), text.with_x(text.x.double())) is torch_tiles


def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpp_build.library.cache_clear()
    return tmp_path / "mmpt"


def refused(monkeypatch: pytest.MonkeyPatch) -> str:
    """The reason, having checked that all else goes on without and that asking by name says it."""
    image, text = tokens([5], 8, torch.float32, 0), tokens([3], 8, torch.float32, 1)
    assert choose(image, text) is torch_tiles
    late_interaction(image, text)
    monkeypatch.setenv("MMPT_LATE_INTERACTION", "cpp")
    with pytest.raises(ValueError, match="MMPT_LATE_INTERACTION=cpp: ") as error:
        late_interaction(image, text)
    monkeypatch.delenv("MMPT_LATE_INTERACTION")
    return str(error.value)


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh_cache(tmp_path, monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "there is no C++ compiler: set CXX" in refused(monkeypatch)


def test_with_a_compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh_cache(tmp_path, monkeypatch)
    broken = tmp_path / "broken-c++"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "no room on the moon" >&2\nexit 1\n')
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(broken))
    assert "broken-c++ failed: no room on the moon" in refused(monkeypatch)


@needs_compiler
def test_with_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    fresh_cache(in_the_way, monkeypatch)
    reason = refused(monkeypatch)
    assert "could not be built or loaded" in reason and str(in_the_way) in reason


@needs_compiler
def test_a_library_cut_short_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fresh_cache(tmp_path, monkeypatch)
    image, text = tokens([5], 8, torch.float32, 0), tokens([3], 8, torch.float32, 1)
    folder.mkdir()
    assert COMPILER
    portable = cpp_build.VARIANTS[-1]
    path = cpp_build._built(portable, COMPILER)
    path.write_bytes(path.read_bytes()[:-1000])
    only(portable, monkeypatch)
    check(cpp_backend, image, text)
    assert cpp_build._whole(path)


@needs_compiler
def test_two_processes_build_at_once(tmp_path: Path) -> None:
    """Both have it, one has built it, and nothing else is left."""
    program = (
        "from mmpt.ops.late_interaction import cpp_build as b; import ctypes\n"
        "assert isinstance(b.library(b.VARIANTS[-1]), ctypes.CDLL)"
    )
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    both = [subprocess.Popen([sys.executable, "-c", program], env=env) for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    names = sorted(path.name for path in (tmp_path / "mmpt").iterdir())
    assert [Path(name).suffix for name in names] == [".so", ".lock"]
