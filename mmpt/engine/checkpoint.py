"""An engine's state to and from checkpoint files, independent of ZeRO stage and world size.

Every rank writes the pieces it owns by parameter name: fp32 masters and optimizer moments as they lie in its partition,
frozen parameters, buffers, random state. A run with another stage or world size reads the overlapping pieces; the same
stage and world size read back exactly what was written. DeepSpeed's own formats are not used: its universal checkpoint
leaves frozen parameters and buffers at their fresh random values and, at stage 3, loses Adam's step.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from mmpt import dist
from mmpt.engine.build import Engine
from mmpt.engine.checkpoint_files import Manifest
from mmpt.engine.partition import Segment, frozen_segments, refresh_parameters, segments
from mmpt.engine.snapshot import Snapshot
from mmpt.engine.step import random_state, set_random_state
from mmpt.engine.teacher import advance

Piece = tuple[str, str, int, Tensor]
"""(kind, name, start in the flattened whole, values)."""


class Capture(NamedTuple):
    """What a rank knows of a checkpoint at its moment, besides the values. `fields` are alike on all ranks."""

    fields: dict[str, Any]
    """Of the manifest."""
    contents: list[tuple[str, str, int, int]]
    """(kind, name, start, length) of the tensors in this rank's file."""
    moments: list[str]
    """Names of the optimizer moments in this rank's file."""
    optimizer_step: int


def capture(engine: Engine, step: int, state: dict[str, Any], memory: Snapshot) -> Capture:
    """Copy what this rank owns of the engine's state into host memory. No rank waits for another."""
    pieces = list(_owned_pieces(engine))
    memory.fill({f"{kind}|{name}|{start}": values for kind, name, start, values in pieces})
    fields = {
        "step": step,
        "world_size": dist.world_size(),
        "zero_stage": engine.config.zero_stage,
        "precision": engine.config.precision,
        "shapes": _shapes(engine),
        "loss_scaler": _loss_scaler(engine),
        "state": state,
    }
    contents = [(kind, name, start, values.numel()) for kind, name, start, values in pieces]
    return Capture(fields, contents, _moments(engine), _optimizer_step(engine))


def _owned_pieces(engine: Engine) -> Iterator[Piece]:
    """What this rank writes. Where all ranks hold the same (stage 0, frozen parameters), they share the work."""
    rank, world_size, stage = dist.rank(), dist.world_size(), engine.config.zero_stage
    for i, segment in enumerate(segments(engine.deepspeed)):
        if stage == 0 and i % world_size != rank:
            continue
        yield "master", segment.name, segment.start, segment.of(segment.flat)
        for moment, flat in _moment_tensors(engine, segment.flat).items():
            yield moment, segment.name, segment.start, segment.of(flat)
    for i, segment in enumerate(frozen_segments(engine.deepspeed)):
        if stage == 3 or i % world_size == rank:
            yield "frozen", segment.name, segment.start, segment.of(segment.flat)
    if rank == 0:
        for name, buffer in _buffers(engine).items():
            yield "buffer", name, 0, buffer.flatten()
    for i, (name, parameter) in enumerate(_teacher(engine).items()):
        if i % world_size == rank:
            yield "teacher", name, 0, parameter.flatten()
    for i, values in enumerate(random_state(engine.device)):
        yield "rng", str(i), rank, values


def _buffers(engine: Engine) -> dict[str, Tensor]:
    """Buffers that belong to the state (not those a module declares as recomputable)."""
    kept = engine.method.state_dict().keys()
    return {name: buffer for name, buffer in engine.method.named_buffers() if name in kept}


def _teacher(engine: Engine) -> dict[str, Tensor]:
    """Parameters of the method's momentum copy, which lies whole on every rank."""
    return {} if engine.method.teacher is None else dict(engine.method.teacher.named_parameters())


def _shapes(engine: Engine) -> dict[str, tuple[int, ...]]:
    parameters = {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in engine.method.named_parameters()}
    return parameters | {name: tuple(buffer.shape) for name, buffer in _buffers(engine).items()}


def _moment_tensors(engine: Engine, flat: Tensor) -> dict[str, Tensor]:
    """The optimizer's state tensors that are laid out like `flat`."""
    state = engine.optimizer.state.get(flat, {})
    return {k: v for k, v in state.items() if torch.is_tensor(v) and v.shape == flat.shape and k != "step"}


def _moments(engine: Engine) -> list[str]:
    flats = [segment.flat for segment in segments(engine.deepspeed)]
    return sorted({name for flat in flats for name in _moment_tensors(engine, flat)})


def _optimizer_step(engine: Engine) -> int:
    """How many updates this rank's optimizer has applied: the t of Adam's bias correction."""
    local = max((int(state["step"]) for state in engine.optimizer.state.values() if "step" in state), default=0)
    return max([local, *(int(group["step"]) for group in engine.optimizer.param_groups if "step" in group)])


def _loss_scaler(engine: Engine) -> dict[str, float]:
    if engine.config.precision != "fp16":
        return {}
    scaler = vars(engine.deepspeed.optimizer.loss_scaler)
    return {name: scaler[name] for name in ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")}


class Pieces:
    """Random access to the tensors of a checkpoint by parameter name and range."""

    def __init__(self, checkpoint: Path, manifest: Manifest):
        self._files: dict[str, Any] = {}
        self._checkpoint = checkpoint
        self._index: dict[tuple[str, str], list[tuple[int, int, str]]] = defaultdict(list)
        for file in manifest.files:
            for kind, name, start, length in file.contents:
                self._index[kind, name].append((start, length, file.name))

    def names(self, kind: str) -> set[str]:
        return {name for found, name in self._index if found == kind}

    def kind_of(self, name: str) -> str:
        """How a parameter or buffer was saved: a file of weights alone tells none of them apart."""
        return next((kind for kind in ("master", "frozen", "buffer") if (kind, name) in self._index), "master")

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """Values [start, start + length) of the flattened whole. ValueError if the checkpoint does not hold all."""
        parts, reached = [], start
        for first, count, file in sorted(self._index[kind, name]):
            low, high = max(reached, first), min(start + length, first + count)
            if low == reached and low < high:
                parts.append(self._open(file).get_slice(f"{kind}|{name}|{first}")[low - first : high - first])
                reached = high
        if reached != start + length:
            raise ValueError(f"{self._checkpoint} holds no {kind} of {name} at [{reached}, {start + length})")
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def rng(self, rank: int) -> list[Tensor]:
        count = len(self.names("rng"))
        files = {start: file for start, _, file in self._index["rng", "0"]}
        return [self._open(files[rank]).get_tensor(f"rng|{i}|{rank}") for i in range(count)]

    def _open(self, file: str) -> Any:
        if file not in self._files:
            self._files[file] = safe_open(self._checkpoint / file, framework="pt")
        return self._files[file]


@torch.no_grad()
def load(checkpoint: Path, manifest: Manifest, engine: Engine, seed: int) -> dict[str, Any]:
    """Put a checkpoint's state into the engine and return the `state` it was saved with. Collective.

    With the world size it was saved at, random state is restored too; otherwise dropout is seeded anew from (seed,
    step, rank). ValueError, on every rank, if parameters differ in name or shape.
    """
    pieces = Pieces(checkpoint, manifest)
    _load_moments(pieces, manifest, engine)
    load_parameters(checkpoint, manifest, engine)
    if engine.config.precision == "fp16" and manifest.loss_scaler:
        vars(engine.deepspeed.optimizer.loss_scaler).update(manifest.loss_scaler)
    if manifest.world_size == dist.world_size():
        set_random_state(pieces.rng(dist.rank()), engine.device)
    else:
        torch.manual_seed(hash((seed, manifest.step, dist.rank())))
    return manifest.state


@torch.no_grad()
def load_parameters(checkpoint: Path, manifest: Manifest, engine: Engine) -> None:
    """Weights, buffers and the momentum copy, into masters and working copies alike. ValueError if a name or shape
    differs."""
    check_shapes(_shapes(engine), manifest.shapes, checkpoint)
    pieces = Pieces(checkpoint, manifest)
    for segment in segments(engine.deepspeed) + frozen_segments(engine.deepspeed):
        kind = pieces.kind_of(segment.name)
        segment.of(segment.flat).copy_(pieces.read(kind, segment.name, segment.start, segment.length))
    for name, buffer in _buffers(engine).items():
        buffer.copy_(pieces.read(pieces.kind_of(name), name, 0, buffer.numel()).view(buffer.shape))
    refresh_parameters(engine.deepspeed)
    if pieces.names("teacher"):
        for name, parameter in _teacher(engine).items():
            parameter.copy_(pieces.read("teacher", name, 0, parameter.numel()).view(parameter.shape))
    elif engine.method.teacher is not None:  # weights of a run that had none
        advance(engine.method, engine.deepspeed, momentum=0.0)


def _load_moments(pieces: Pieces, manifest: Manifest, engine: Engine) -> None:
    """Optimizer moments and step. A checkpoint from before the first update has none: then those there are go."""
    if not manifest.optimizer_step:
        engine.optimizer.state.clear()
    by_flat: dict[int, list[Segment]] = defaultdict(list)
    for segment in segments(engine.deepspeed):
        by_flat[id(segment.flat)].append(segment)
    for group in engine.optimizer.param_groups:
        if "step" in group:  # apex keeps one step per group
            group["step"] = manifest.optimizer_step
    if not manifest.optimizer_step:
        return
    for owned in by_flat.values():
        flat = owned[0].flat
        state = engine.optimizer.state[flat]
        fused = engine.optimizer.defaults.get("fused")
        state["step"] = torch.tensor(float(manifest.optimizer_step), device=flat.device if fused else "cpu")
        for moment in manifest.moments:
            state[moment] = torch.zeros_like(flat)
            for segment in owned:
                values = pieces.read(moment, segment.name, segment.start, segment.length)
                segment.of(state[moment]).copy_(values)


def check_shapes(ours: dict[str, tuple], theirs: dict[str, tuple], source: Path) -> None:
    """ValueError that names the first parameter in which a model and a checkpoint differ."""
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in theirs:
            raise ValueError(f"{source} has no parameter {name}, which this model needs")
        if name not in ours:
            raise ValueError(f"{source} has a parameter {name}, which this model does not know")
        if tuple(ours[name]) != tuple(theirs[name]):
            raise ValueError(f"{name} has shape {list(theirs[name])} in {source} and {list(ours[name])} in this model")


def weights(checkpoint: Path, manifest: Manifest) -> dict[str, Tensor]:
    """The whole model as a state dict in fp32 (buffers and frozen parameters in their own type), on the CPU."""
    pieces, out = Pieces(checkpoint, manifest), {}
    for kind in ("master", "frozen", "buffer"):
        for name in sorted(pieces.names(kind)):
            shape = manifest.shapes[name]
            out[name] = pieces.read(kind, name, 0, int(torch.Size(shape).numel())).view(shape)
    return out
