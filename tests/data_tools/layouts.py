"""Packing small annotation files in the shape of published data sets."""

from pathlib import Path

import pytest

from data_tools.__main__ import main


def write_images(folder: Path, files: dict[str, bytes]) -> Path:
    """Files below folder/images by name."""
    for name, data in files.items():
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder / "images"


def pack(folder: Path, layout: str, *arguments: Path | str, out: str = "out") -> Path:
    """`mmpt-data pack folder/images ANNOTATIONS folder/out --layout LAYOUT OPTIONS`."""
    files = [str(argument) for argument in arguments if isinstance(argument, Path)]
    options = [argument for argument in arguments if isinstance(argument, str)]
    main(["pack", str(folder / "images"), *files, str(folder / out), "--layout", layout, *options])
    return folder / out


def failure(folder: Path, layout: str, *arguments: Path | str, out: str = "failed") -> str:
    """The one line that packing ends with."""
    with pytest.raises(SystemExit) as caught:
        pack(folder, layout, *arguments, out=out)
    message = str(caught.value.code)
    assert message.startswith("mmpt-data: error: ") and "\n" not in message
    return message
