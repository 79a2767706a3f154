"""The GPU kernels, compiled for devices that are not here: every variant, against a committed table."""

import importlib.util
import json
from pathlib import Path

import pytest

from tests.ops.late_interaction import compiled


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_every_variant_compiles_as_the_table_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = {name: made._asdict() for name, made in compiled.table().items()}
    assert found == json.loads(compiled.TABLE.read_text()), "python -m tests.ops.late_interaction.compiled rewrites it"


def test_the_table_is_sound() -> None:
    """Registers are left, little is spilled, shared memory suffices, tensor cores multiply, and Gluon's do so while
    maxima are taken."""
    table = {name: compiled.Made(**made) for name, made in json.loads(compiled.TABLE.read_text()).items()}
    assert sum("sm_80" in name for name in table) == 20 and sum("sm_90" in name for name in table) == 26
    for name, made in table.items():
        hopper, gluon = "sm_90" in name, "gluon" in name
        assert made.registers <= 255 and made.spilled_bytes <= (192 if gluon else 64), name
        assert made.shared_bytes <= compiled.DEVICES[90 if hopper else 80].shared_bytes, name
        assert made.tensor_instructions == ("HGMMA" if hopper else "HMMA"), name
        assert made.overlaps == gluon, name
