"""The Triton backend: its kernels in Triton's interpreter, in a process of their own; what it takes and refuses."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmpt.batch import Tokens
from mmpt.ops.late_interaction.op import late_interaction
from mmpt.ops.late_interaction.triton_backend import launches, refused_shape
from tests.ops.late_interaction.brute_force import check, tokens

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_kernels_in_the_interpreter() -> None:
    cases = Path(__file__).with_name("triton_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", str(cases)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "16 passed" in done.stdout


def test_every_text_has_a_bucket_and_every_tile_fits() -> None:
    for longest_text in (1, 8, 9, 77, 256):
        for longest_image in (1, 49, 196, 4096):
            for width in (16, 256, 512):
                for bytes_each in (2, 4):
                    table = launches(longest_text, longest_image, width, bytes_each)
                    assert [launch.words for launch in table] == [8 << i for i in range(len(table))]
                    assert table[-1].words >= longest_text > (table[-2].words if len(table) > 1 else 0)
                    for launch in table:
                        assert launch.patches >= 16 and launch.texts * launch.words >= 16
                        assert launch.patches * width * bytes_each <= 128 << 10
                        assert launch.patches * launch.texts * launch.words <= 16 << 10
                        assert width % launch.slab == 0


def test_what_it_does_not_take_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    image, text = tokens([4], 16, torch.float32, 0), tokens([3], 16, torch.float32, 1)
    wide, long = tokens([4], 513, torch.float32, 0), tokens([257], 16, torch.float32, 0)
    assert refused_shape(image, text) == ""
    assert "not torch.float64" in refused_shape(image.with_x(image.x.double()), text)
    assert "not 513 and 3" in refused_shape(wide, text) and "not 16 and 257" in refused_shape(image, long)
    monkeypatch.setenv("MMPT_LATE_INTERACTION", "triton")
    with pytest.raises(ValueError, match="MMPT_LATE_INTERACTION=triton: it is for CUDA devices, not cpu"):
        late_interaction(image, text)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_the_device(dtype: torch.dtype) -> None:
    from mmpt.ops.late_interaction import triton_backend

    class Moved:
        """The backend on the device, seen from the CPU."""

        @staticmethod
        def refusal(image: Tokens, text: Tokens) -> str:
            return triton_backend.refusal(image.to("cuda"), text.to("cuda"))

        @staticmethod
        def forward(image: Tokens, text: Tokens, keep: bool) -> tuple[torch.Tensor, ...]:
            return tuple(x.cpu() for x in triton_backend.forward(image.to("cuda"), text.to("cuda"), keep))

        @staticmethod
        def backward(image: Tokens, text: Tokens, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
            moved = (x.cuda() for x in rest)
            return tuple(x.cpu() for x in triton_backend.backward(image.to("cuda"), text.to("cuda"), *moved))

    image, text = tokens([49, 196, 300], 256, dtype, 0), tokens([5, 9, 20, 1, 77, 130], 256, dtype, 1)
    check(Moved, image, text, gradient_tolerance=1e-5 if dtype == torch.float32 else 1e-2)  # type: ignore[arg-type]
