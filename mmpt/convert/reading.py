"""Foreign weights from disk: a file, or a folder as Hugging Face and open_clip lay it out.

Nothing is unpickled but tensors and plain containers. A few kinds of object that trainers leave beside the weights are
read as something inert; for any other the error gives the line that cures it.
"""

import argparse
import json
import pickle
import re
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHTS = (
    "model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin",
)  # fmt: skip
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WRAPPERS = ("state_dict", "model", "model_state_dict")
"""Under which entry trainers keep the weights."""


@dataclass(frozen=True)
class Source:
    """What was found on disk."""

    path: Path
    tensors: dict[str, Tensor]
    """All tensors, without the `module.` that DistributedDataParallel puts before names."""
    config: dict[str, Any]
    """The model's configuration, where it lies beside the weights."""
    preprocessor: dict[str, Any]
    """preprocessor_config.json, where there is one."""


def read(path: Path) -> Source:
    """ValueError in one line for what is not there, is no weights, is damaged or would run code."""
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if path.is_file():
        return Source(path, without_module(_tensors(path)), {}, {})
    if (path / "recipe.yaml").exists() or (path / "manifest.json").exists():
        raise ValueError(f"{path} is a run of mmpt already: give it to --run.init or `mmpt eval` as it is")
    tensors: dict[str, Tensor] = {}
    files = _files(path)
    for file in files:
        tensors |= _tensors(file)
    config = path / ("open_clip_config.json" if files[0].name.startswith("open_clip") else "config.json")
    found = [_json(file) if file.is_file() else {} for file in (config, path / "preprocessor_config.json")]
    return Source(path, without_module(tensors), *found)


def _files(folder: Path) -> list[Path]:
    for name in INDEXES:
        if (folder / name).is_file():
            shards = sorted(set(_json(folder / name).get("weight_map", {}).values()))
            if missing := [shard for shard in shards if not (folder / shard).is_file()]:
                raise ValueError(f"{folder / name} names {missing[0]}, which is not there")
            return [folder / shard for shard in shards]
    for name in WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
    raise ValueError(f"{folder} holds no weights: none of {', '.join(WEIGHTS + INDEXES)}")


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds {type(data).__name__}, not named values")
    return data


def _tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    data = _unpickled(path)
    for wrapper in WRAPPERS:
        if isinstance(data, dict) and isinstance(data.get(wrapper), dict):
            data = data[wrapper]
            break
    found = {name: value for name, value in data.items() if torch.is_tensor(value)} if isinstance(data, dict) else {}
    if not found:
        held = f"entries {', '.join(map(str, list(data)[:5]))}" if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{path} holds no weights by name, but {held}")
    return found


class Inert:
    """Stands for a trainer's object: it can do nothing, and nothing of it is kept."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


SACRED = "sacred.config.custom_containers"
HARMLESS: tuple[tuple[type, str], ...] = (
    (argparse.Namespace, "argparse.Namespace"),
    (OrderedDict, "pytorch_lightning.utilities.parsing.AttributeDict"),
    (Inert, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
    (Inert, "pytorch_lightning.callbacks.lr_monitor.LearningRateMonitor"),
    (OrderedDict, f"{SACRED}.ReadOnlyDict"),
    (list, f"{SACRED}.ReadOnlyList"),
    (Inert, "numpy.core.multiarray.scalar"),
    (Inert, "numpy._core.multiarray.scalar"),
    (Inert, "numpy.dtype"),
    *((Inert, f"numpy.dtypes.{kind}DType") for kind in ("Float32", "Float64", "Int32", "Int64")),
)
"""What is read in place of a class: flags are kept as a Namespace (SLIP, open_clip), hyper-parameters and callbacks by
Lightning and sacred (ViLT), a best score by numpy."""


def _unpickled(path: Path) -> Any:
    trust = "if you trust the file, write its weights alone: "
    target = f"'{path.stem}.weights.pt'"
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise ValueError(
                    f'{path} is a TorchScript program, which is not run here; {trust}python -c "import torch; '
                    f"torch.save(torch.jit.load('{path}', map_location='cpu').state_dict(), {target})\""
                )
    try:
        with torch.serialization.safe_globals(list(HARMLESS)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        kind = re.search(r"GLOBAL ([\w.]+)", str(error))
        if kind is None:
            raise ValueError(f"{path} is damaged, or no file of torch: {_first_words(error)}") from None
        raise ValueError(
            f"{path} holds an object of {kind[1]}, which is not loaded because that could run code; {trust}"
            f"python -c \"import torch; d = torch.load('{path}', map_location='cpu', weights_only=False); "
            f"torch.save(d.get('state_dict', d.get('model', d)), {target})\""
        ) from None


def _first_words(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0].split(". ")[0]
    return text if text and not text.startswith("Weights only") else type(error).__name__


def without_module(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("module."): value for name, value in tensors.items()}
