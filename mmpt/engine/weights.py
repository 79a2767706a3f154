"""A checkpoint of weights alone, without an engine: `mmpt import` writes it, `--run.init` and `mmpt eval` read it."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file as read_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from mmpt.engine.checkpoint import Pieces, weights
from mmpt.engine.checkpoint_files import Manifest, publish, temporary_of, write_part, write_synced
from mmpt.methods.method import Method

TEACHER = "teacher:"
"""Before the names of a momentum copy's tensors."""


def tensors_of(method: Method) -> dict[str, Tensor]:
    """Parameters and buffers of a method, and those of its momentum copy under names that begin with `teacher:`."""
    teacher = {} if method.teacher is None else method.teacher.state_dict()
    return method.state_dict() | {TEACHER + name: value for name, value in teacher.items()}


@torch.no_grad()
def put(method: Method, tensors: dict[str, Tensor]) -> None:
    """Copy tensors, named as `tensors_of` names them, into a method."""
    ours = tensors_of(method)
    for name, value in tensors.items():
        ours[name].copy_(value)


def publish_weights(folder: Path, method: Method, origins: dict[str, str], state: dict[str, Any]) -> Path:
    """Publish a method's tensors as the checkpoint of step 0; returns its directory. OSError if it cannot be written.

    origins: which tensor came from where; those it does not name have their initial values. state: what train.py keeps
    between steps.
    """
    parameters, taught = dict(method.named_parameters()), _taught(method)
    tensors: dict[str, Tensor] = {}
    for name, value in tensors_of(method).items():
        plain = name.removeprefix(TEACHER)
        kind = "teacher" if plain != name else "master" if name in parameters else "buffer"
        if kind == "teacher" and plain not in taught:
            continue  # buffers of a copy follow no step
        tensors[f"{kind}|{plain}|0"] = value.detach().flatten().cpu()
    shapes = {name: tuple(value.shape) for name, value in method.state_dict().items()}
    return _publish(folder, tensors, shapes, origins, state)


def _publish(
    folder: Path, tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], origins: dict[str, str],
    state: dict[str, Any],
) -> Path:  # fmt: skip
    """tensors: by `kind|name|0`, as rank 0 would write them if it owned everything; flat."""
    fields = {
        "step": 0, "world_size": 0, "zero_stage": 0, "precision": "fp32", "loss_scaler": {}, "state": state,
        "shapes": shapes, "origins": origins,
    }  # fmt: skip
    contents = [(*key.split("|")[:2], 0, value.numel()) for key, value in tensors.items()]
    data = memoryview(to_safetensors(tensors))
    write_part(temporary_of(folder, 0, "import"), 0, data, contents, moments=[], optimizer_step=0)
    return publish(folder, 0, "import", fields, ranks=1)[0]


def load_weights(checkpoint: Path, manifest: Manifest, method: Method) -> None:
    """A checkpoint's parameters, buffers and momentum copy into a method that no engine has. Where the checkpoint has
    no copy, it becomes equal to what it copies."""
    method.load_state_dict(weights(checkpoint, manifest))
    pieces, taught = Pieces(checkpoint, manifest), _taught(method)
    saved = pieces.names("teacher")
    student = method.get_submodule(method.student).state_dict() if taught else {}
    with torch.no_grad():
        for name, parameter in taught.items():
            values = pieces.read("teacher", name, 0, parameter.numel()) if saved else student[name].flatten()
            parameter.copy_(values.view(parameter.shape))


def write_tensors(checkpoint: Path, manifest: Manifest, out: Path) -> int:
    """Write a checkpoint's weights as one safetensors file, whole tensors in fp32 by name (whole numbers stay what they
    are); a momentum copy's under names that begin with `teacher:`. Returns how many. The file appears at once."""
    tensors, pieces = weights(checkpoint, manifest), Pieces(checkpoint, manifest)
    taught = sorted(pieces.names("teacher"))
    for name in taught:
        shape = manifest.shapes[_student_prefix(taught, manifest) + name]
        tensors[TEACHER + name] = pieces.read("teacher", name, 0, int(torch.Size(shape).numel())).view(shape)
    tensors = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    temporary = out.with_name(f".{out.name}.tmp")
    write_synced(temporary, to_safetensors({name: value.contiguous() for name, value in tensors.items()}))
    os.replace(temporary, out)
    return len(tensors)


def _student_prefix(taught: list[str], manifest: Manifest) -> str:
    """What the names of a momentum copy's parameters lack of those that they follow."""
    prefixes = sorted(whole.removesuffix(taught[0]) for whole in manifest.shapes if whole.endswith(taught[0]))
    return next(prefix for prefix in prefixes if all(prefix + name in manifest.shapes for name in taught))


def read_tensors(source: Path, folder: Path) -> Path:
    """Publish such a file as the checkpoint of step 0; returns its directory. ValueError if it is not such a file."""
    try:
        tensors = read_safetensors(source)
    except SafetensorError as error:
        raise ValueError(f"{source} is no safetensors file: {error}") from None
    kinds = {name: "teacher" if name.startswith(TEACHER) else "master" for name in tensors}
    parts = {f"{kinds[name]}|{name.removeprefix(TEACHER)}|0": value.flatten() for name, value in tensors.items()}
    shapes = {name: tuple(value.shape) for name, value in tensors.items() if kinds[name] == "master"}
    return _publish(folder, parts, shapes, {}, {})


def _taught(method: Method) -> dict[str, Tensor]:
    return {} if method.teacher is None else dict(method.teacher.named_parameters())
