"""Crash-consistent checkpoint directories: what is on disk is a whole checkpoint or is not a checkpoint.

    checkpoints/
      step-00000200/            appears by one rename, after everything in it was synced to disk
        manifest.json           every file's size, SHA-256 and contents; counters and data state; its own SHA-256
        rank-00000.safetensors  one per rank
      latest                    the newest one's name: a hint for people, never read by the program
      .tmp-step-00000300-5ae1/  a save that did not finish; never a candidate

DeepSpeed's own `latest` is written before the other ranks are known to have finished, and is not synced; a rank killed
in the middle of a save then leaves a run that cannot start. Nothing here is pickled.

Ranks write their files each on their own; when all have (mmpt/engine/saver.py sees to that), rank 0 alone publishes.
"""

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmpt import dist

FORMAT = 2
DIGEST = re.compile(rb'\{"sha256": "([0-9a-f]{64})", ')
"""How a manifest begins: with the digest of what it would be without these characters but the first."""
CHUNK_BYTES = 1 << 24  # written and digested at a time


@dataclass(frozen=True)
class SavedFile:
    name: str
    bytes: int
    sha256: str
    contents: tuple[tuple[str, str, int, int], ...]
    """(kind, parameter, start, length) of every tensor; kind: `master`, a moment's name, `frozen`, `buffer`, `rng`."""


@dataclass(frozen=True)
class Manifest:
    step: int
    world_size: int
    zero_stage: int
    precision: str
    optimizer_step: int
    moments: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    """The full shape of every parameter and buffer."""
    loss_scaler: dict[str, float]
    state: dict[str, Any]
    """What train.py keeps between steps: counters and the loader's integer."""
    files: tuple[SavedFile, ...]
    origins: dict[str, str] = field(default_factory=dict)
    """Of imported weights: which tensor came from where. Those it does not name have their initial values; a run's own
    checkpoint names none."""


def told_origins(manifest: Manifest) -> list[str]:
    """Where imported weights came from, a line each, and how many of the model's tensors came from nowhere."""
    if not manifest.origins:
        return []
    counts = Counter(manifest.origins.values())
    initial = sorted(manifest.shapes.keys() - manifest.origins.keys())
    lines = [f"  {count} tensors from {origin}" for origin, count in counts.items()]
    if initial:
        shown = ", ".join(initial[:4]) + (f", and {len(initial) - 4} more" if len(initial) > 4 else "")
        lines.append(f"  {len(initial)} tensors with initial values, from no source: {shown}")
    return lines


def write_synced(path: Path, data: bytes) -> None:
    """Write and wait until the data is on disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Wait until the directory's own entries (names, renames) are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def temporary_of(folder: Path, step: int, token: str) -> Path:
    """Where a checkpoint is written before it is one. token: of this attempt, lest a rank that an earlier attempt left
    behind writes into it."""
    return folder / f".tmp-{step_name(step)}-{token}"


def write_part(
    temporary: Path, rank: int, data: memoryview, contents: list[tuple], moments: list[str], optimizer_step: int
) -> None:
    """One rank's values, and beside them what the manifest will say of them. OSError that names the file."""
    path, digest = temporary / f"rank-{rank:05d}.safetensors", hashlib.sha256()
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        with open(path, "wb", buffering=0) as file:
            for start in range(0, len(data), CHUNK_BYTES):
                chunk = data[start : start + CHUNK_BYTES]
                _write_all(file, chunk)
                digest.update(chunk)
            os.fsync(file.fileno())
        saved = SavedFile(path.name, len(data), digest.hexdigest(), tuple(map(tuple, contents)))
        part = {"file": asdict(saved), "moments": moments, "optimizer_step": optimizer_step}
        path = _part_path(temporary, rank)
        write_synced(path, json.dumps(part).encode())
    except OSError as error:
        raise OSError(f"rank {rank}: {error.strerror} ({path})") from error


def publish(folder: Path, step: int, token: str, fields: dict[str, Any], ranks: int) -> tuple[Path, int]:
    """Make a checkpoint of which every rank has written its part visible at once. Rank 0 alone calls it.

    fields: those of Manifest that are alike on all ranks. ranks: how many have written. Returns where it is and the
    bytes of all ranks' files. OSError if it cannot be done; older ones are untouched.
    """
    temporary, final = temporary_of(folder, step, token), folder / step_name(step)
    try:
        parts = [json.loads(_part_path(temporary, rank).read_bytes()) for rank in range(ranks)]
        manifest = Manifest(
            **fields,
            optimizer_step=max(part["optimizer_step"] for part in parts),
            moments=tuple(sorted({moment for part in parts for moment in part["moments"]})),
            files=tuple(SavedFile(**part["file"]) for part in parts),
        )
        write_manifest(temporary, manifest)
        for rank in range(len(parts)):
            _part_path(temporary, rank).unlink()
        sync_directory(temporary)
        if final.exists():  # it was rejected as damaged, or is being redone
            remove(final)
        os.rename(temporary, final)
        sync_directory(folder)
        write_synced(folder / ".latest", step_name(step).encode())
        os.replace(folder / ".latest", folder / "latest")
    except OSError as error:
        raise OSError(f"rank 0: {error.strerror} ({temporary})") from error
    return final, sum(file.bytes for file in manifest.files)


def _write_all(file: Any, data: memoryview) -> None:
    """An unbuffered file may take less than it is given, as on a disk that is nearly full."""
    while data:
        data = data[file.write(data) :]


def _part_path(temporary: Path, rank: int) -> Path:
    return temporary / f"rank-{rank:05d}.json"


def write_manifest(checkpoint: Path, manifest: Manifest) -> None:
    """Put the manifest in place at once, also where there is one."""
    body = json.dumps({"format": FORMAT, **asdict(manifest)}).encode()
    digest = hashlib.sha256(body).hexdigest()
    write_synced(checkpoint / ".manifest", b'{"sha256": "%s", ' % digest.encode() + body[1:])
    os.replace(checkpoint / ".manifest", checkpoint / "manifest.json")
    sync_directory(checkpoint)


def remove(checkpoint: Path) -> None:
    """Delete a directory. It is renamed away first: an interrupted deletion never leaves half under its name."""
    trash = checkpoint.with_name(f".trash-{checkpoint.name}")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(checkpoint, trash)
    shutil.rmtree(trash)


def remove_leftovers(folder: Path) -> None:
    """Delete what an interrupted save or deletion left. Only where nobody is saving: rank 0, at the start."""
    for pattern in (".tmp-*", ".trash-*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def read_manifest(checkpoint: Path) -> Manifest:
    """ValueError if there is none, or it is not one of ours."""
    path = checkpoint / "manifest.json"
    try:
        text = path.read_bytes()
        data = json.loads(text)
        if (found := data.pop("format")) != FORMAT:
            raise ValueError(f"its format is {found}, and this version of mmpt reads format {FORMAT} alone")
        told = DIGEST.match(text)
        if told is None or hashlib.sha256(b"{" + text[told.end() :]).hexdigest().encode() != told[1]:
            raise ValueError("it does not match its own SHA-256")
        del data["sha256"]
        data["files"] = tuple(
            SavedFile(f["name"], f["bytes"], f["sha256"], tuple(map(tuple, f["contents"]))) for f in data["files"]
        )
        data["shapes"] = {name: tuple(shape) for name, shape in data["shapes"].items()}
        data["moments"] = tuple(data["moments"])
        return Manifest(**data)
    except FileNotFoundError:
        raise ValueError(f"{checkpoint} has no manifest.json") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from None


def damage(checkpoint: Path, manifest: Manifest, digests: bool = True) -> str:
    """Why this checkpoint cannot be used, or nothing. Collective: each rank reads its share of the files.

    digests: whether to read them at all, or only to look at their sizes.
    """
    found = ""
    for file in manifest.files[dist.rank() :: dist.world_size()]:
        path = checkpoint / file.name
        if not path.is_file():
            found = found or f"{file.name} is missing"
        elif path.stat().st_size != file.bytes:
            found = found or f"{file.name} has {path.stat().st_size} bytes instead of {file.bytes}"
        elif digests:
            with open(path, "rb") as data:
                if hashlib.file_digest(data, "sha256").hexdigest() != file.sha256:
                    found = found or f"{file.name} does not match its SHA-256"
    return next((text for text in dist.gather_objects(found) if text), "")


def candidates(folder: Path) -> list[Path]:
    """Published checkpoints, newest first, valid or not. The same list on every rank."""
    found = sorted(folder.glob("step-*"), reverse=True) if dist.rank() == 0 and folder.is_dir() else []
    return dist.broadcast_object(found)


def _read_together(checkpoint: Path) -> Manifest | str:
    """The manifest as rank 0 reads it, or why it cannot be read: the same on all ranks."""
    found: Manifest | str = ""
    if dist.rank() == 0:
        try:
            found = read_manifest(checkpoint)
        except ValueError as error:
            found = str(error)
    return dist.broadcast_object(found)


def newest_valid(folder: Path, at_most: int | None = None) -> tuple[Path, Manifest, list[str]] | None:
    """The newest checkpoint that is whole, with the reasons why newer ones were passed over. Collective.

    at_most: of those up to this step. None if there is no such checkpoint at all; ValueError if there are some and none
    is valid.
    """
    passed_over: list[str] = []
    for checkpoint in candidates(folder):
        if at_most is not None and checkpoint.name > step_name(at_most):
            continue
        manifest = _read_together(checkpoint)
        reason = manifest if isinstance(manifest, str) else damage(checkpoint, manifest)
        if isinstance(manifest, Manifest) and not reason:
            return checkpoint, manifest, passed_over
        passed_over.append(f"{checkpoint.name}: {reason}")
    if passed_over:
        raise ValueError(f"no checkpoint in {folder} is valid ({'; '.join(passed_over)})")
    return None


def prunable(folder: Path, keep_last: int, keep_every_steps: int, protect: Path | None = None) -> list[Path]:
    """All but the newest `keep_last`, the multiples of `keep_every_steps` (0: none) and `protect`."""
    older = sorted(folder.glob("step-*"), reverse=True)[max(1, keep_last) :]
    steps = {path: int(path.name.removeprefix("step-")) for path in older if path != protect}
    return [path for path, step in steps.items() if not keep_every_steps or step % keep_every_steps]


def prune(folder: Path, keep_last: int, keep_every_steps: int, protect: Path | None = None) -> None:
    """Delete what is `prunable`. Rank 0 only."""
    for checkpoint in prunable(folder, keep_last, keep_every_steps, protect):
        remove(checkpoint)
