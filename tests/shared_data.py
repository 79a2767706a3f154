"""Real pictures and captions that lie beside the checkout, where there are any."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "../shared/data"


def shared_data(place: str) -> Path:
    """A file or folder of them; without it the test that asks is skipped."""
    if not (FOLDER / place).exists():
        pytest.skip(f"needs ../shared/data/{place}")
    return FOLDER / place
