"""The GPU backends: Triton's kernels in its interpreter, in a process of their own; what both take and refuse."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmpt.batch import Tokens
from mmpt.ops.late_interaction import gluon_backend
from mmpt.ops.late_interaction.backends import BACKENDS
from mmpt.ops.late_interaction.gpu_launches import Device, hopper_launches, launches
from mmpt.ops.late_interaction.op import late_interaction
from mmpt.ops.late_interaction.triton_backend import refused_shape
from tests.ops.late_interaction.brute_force import check, tokens

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_kernels_in_the_interpreter() -> None:
    cases = Path(__file__).with_name("triton_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", str(cases)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "17 passed" in done.stdout


@pytest.mark.parametrize("device", [Device(99 << 10, False), Device(163 << 10, False), Device(227 << 10, True)])
def test_every_text_has_a_bucket_and_every_tile_fits(device: Device) -> None:
    """The shared memory of an RTX 4090, an A100 and an H100."""
    for longest_text in (1, 8, 9, 77, 128):
        for longest_image in (1, 49, 196, 4096):
            for width in (16, 256, 512):
                for bytes_each in (2, 4):
                    table = launches(longest_text, longest_image, width, bytes_each, device)
                    assert [launch.words for launch in table] == [16 << i for i in range(len(table))]
                    assert table[-1].words >= longest_text > (table[-2].words if len(table) > 1 else 0)
                    for launch in table:
                        columns = launch.texts * launch.words
                        assert columns >= 64 and width % launch.slab == 0
                        assert launch.patches * columns <= 16 << 10
                        least = (16 + columns) * width * bytes_each + 2048
                        assert (launch.patches >= 16) == (least <= device.shared_bytes), "refused without need"
                        if launch.patches >= 16:
                            assert (launch.patches + columns) * width * bytes_each <= device.shared_bytes


def test_what_it_does_not_take_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    image, text = tokens([4], 16, torch.float16, 0), tokens([3], 16, torch.float16, 1)
    wide, long = tokens([4], 513, torch.float16, 0), tokens([129], 16, torch.float16, 0)
    hopper, small = Device(227 << 10, True), Device(99 << 10, False)
    assert refused_shape(image, text, hopper) == ""
    assert "not torch.float32" in refused_shape(image.with_x(image.x.float()), text, hopper)
    assert "not 513 and 3" in refused_shape(wide, text, hopper)
    assert "not 16 and 129" in refused_shape(image, long, hopper)
    wide, long = tokens([4], 512, torch.float16, 0), tokens([100], 512, torch.float16, 0)
    assert "100 tokens by 512 numbers do not fit into shared memory" in refused_shape(wide, long, small)
    monkeypatch.setenv("MMPT_LATE_INTERACTION", "triton")
    with pytest.raises(ValueError, match="MMPT_LATE_INTERACTION=triton: it is for CUDA devices, not cpu"):
        late_interaction(image, text)


def test_what_gluon_does_not_take_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    image, text = tokens([196], 256, torch.bfloat16, 0), tokens([64], 256, torch.bfloat16, 1)
    assert gluon_backend.refused_shape(image, text) == ""
    narrow = tokens([4], 32, torch.bfloat16, 0), tokens([4], 32, torch.bfloat16, 0)
    assert "33 to 256 numbers, not 32" in gluon_backend.refused_shape(*narrow)
    assert "not 257 and 64" in gluon_backend.refused_shape(tokens([257], 256, torch.bfloat16, 0), text)
    assert "not 196 and 65" in gluon_backend.refused_shape(image, tokens([65], 256, torch.bfloat16, 0))
    monkeypatch.setenv("MMPT_LATE_INTERACTION", "gluon")
    with pytest.raises(ValueError, match="MMPT_LATE_INTERACTION=gluon: it is for CUDA devices, not cpu"):
        late_interaction(image, text)


def test_hopper_tiles_take_whole_images() -> None:
    for longest_image in (1, 64, 65, 196, 256):
        for launch in hopper_launches(64, longest_image):
            assert launch.patches >= longest_image and launch.texts * launch.words == 64
            assert launch.patches % (16 * launch.warps) == 0, "every warp has its rows of products"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["triton", "gluon"])
def test_on_the_device(name: str, dtype: torch.dtype) -> None:
    backend = BACKENDS[name]

    class Moved:
        """The backend on the device, seen from the CPU."""

        @staticmethod
        def refusal(image: Tokens, text: Tokens) -> str:
            return backend.refusal(image.to("cuda"), text.to("cuda"))

        @staticmethod
        def forward(image: Tokens, text: Tokens, keep: bool) -> tuple[torch.Tensor, ...]:
            return tuple(x.cpu() for x in backend.forward(image.to("cuda"), text.to("cuda"), keep))

        @staticmethod
        def backward(image: Tokens, text: Tokens, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
            word, patch, grad_i2t, grad_t2i = (x.cuda() for x in rest)
            found = backend.backward(image.to("cuda"), text.to("cuda"), word, patch, grad_i2t, grad_t2i)
            return tuple(x.cpu() for x in found)

    image, text = tokens([49, 196, 256], 256, dtype, 0), tokens([5, 9, 20, 1, 64], 256, dtype, 1)
    check(Moved, image, text, gradient_tolerance=1e-2)  # type: ignore[arg-type]
    if name == "triton":
        image, text = tokens([49, 300], 256, dtype, 0), tokens([5, 77, 128], 256, dtype, 1)
        check(Moved, image, text, gradient_tolerance=1e-2)  # type: ignore[arg-type]
