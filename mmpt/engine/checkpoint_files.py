"""Crash-consistent checkpoint directories: what is on disk is a whole checkpoint or is not a checkpoint.

    checkpoints/
      step-00000200/            appears by one rename, after everything in it was synced to disk
        manifest.json           every file's size, SHA-256 and contents; counters and data state
        rank-00000.safetensors  one per rank
      latest                    the newest one's name: a hint for people, never read by the program
      .tmp-step-00000300/       a save that did not finish; never a candidate

DeepSpeed's own `latest` is written before the other ranks are known to have finished, and is not synced; a rank killed
in the middle of a save then leaves a run that cannot start. Nothing here is pickled.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmpt import dist

FORMAT = 1


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


def publish(folder: Path, step: int, rank_data: bytes, contents: list[tuple], manifest: dict[str, Any]) -> Path:
    """Write every rank's data and make the whole visible at once, or not at all. Collective.

    `manifest` holds the fields of Manifest but for `files`. Raises OSError on every rank if any rank could not write;
    the unfinished directory is removed and older checkpoints are untouched.
    """
    final, temporary = folder / step_name(step), folder / f".tmp-{step_name(step)}"
    if dist.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in (temporary, final):  # `final` exists only if it was rejected as damaged, or is being redone
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir()
    dist.barrier()
    name, failure = f"rank-{dist.rank():05d}.safetensors", ""
    try:
        write_synced(temporary / name, rank_data)
    except OSError as error:
        failure = f"rank {dist.rank()}: {error.strerror} ({temporary / name})"
    saved = SavedFile(name, len(rank_data), hashlib.sha256(rank_data).hexdigest(), tuple(map(tuple, contents)))
    reports = dist.gather_objects((failure, saved))
    failures = [text for text, _ in reports if text]
    if dist.rank() == 0 and not failures:
        try:
            whole = Manifest(**manifest, files=tuple(file for _, file in reports))
            text = json.dumps({"format": FORMAT, **asdict(whole)})
            write_synced(temporary / "manifest.json", text.encode())
            sync_directory(temporary)
            os.rename(temporary, final)
            sync_directory(folder)
            write_synced(folder / ".latest", step_name(step).encode())
            os.replace(folder / ".latest", folder / "latest")
        except OSError as error:
            failures = [f"rank 0: {error.strerror} ({temporary})"]
    failures = dist.broadcast_object(failures)
    if failures:
        if dist.rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"checkpoint of step {step} was not saved: {'; '.join(failures)}")
    return final


def read_manifest(checkpoint: Path) -> Manifest:
    """ValueError if there is none, or it is not one of ours."""
    path = checkpoint / "manifest.json"
    try:
        data = json.loads(path.read_bytes())
        if data.pop("format") != FORMAT:
            raise ValueError("its format is not known to this version")
        data["files"] = tuple(
            SavedFile(f["name"], f["bytes"], f["sha256"], tuple(map(tuple, f["contents"]))) for f in data["files"]
        )
        data["shapes"] = {name: tuple(shape) for name, shape in data["shapes"].items()}
        data["moments"] = tuple(data["moments"])
        return Manifest(**data)
    except FileNotFoundError:
        raise ValueError(f"{checkpoint} has no manifest.json") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error})") from None


def damage(checkpoint: Path, manifest: Manifest) -> str:
    """Why this checkpoint cannot be used, or nothing. Collective: each rank reads its share of the files."""
    found = ""
    for file in manifest.files[dist.rank() :: dist.world_size()]:
        path = checkpoint / file.name
        if not path.is_file():
            found = found or f"{file.name} is missing"
        elif path.stat().st_size != file.bytes:
            found = found or f"{file.name} has {path.stat().st_size} bytes instead of {file.bytes}"
        else:
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


def newest_valid(folder: Path) -> tuple[Path, Manifest, list[str]] | None:
    """The newest checkpoint that is whole, with the reasons why newer ones were passed over. Collective.

    None if the folder holds no checkpoint at all; ValueError if it holds some and none is valid.
    """
    passed_over: list[str] = []
    for checkpoint in candidates(folder):
        manifest = _read_together(checkpoint)
        reason = manifest if isinstance(manifest, str) else damage(checkpoint, manifest)
        if isinstance(manifest, Manifest) and not reason:
            return checkpoint, manifest, passed_over
        passed_over.append(f"{checkpoint.name}: {reason}")
    if passed_over:
        raise ValueError(f"no checkpoint in {folder} is valid ({'; '.join(passed_over)})")
    return None


def prune(folder: Path, keep_last: int, keep_every_steps: int, protect: Path | None = None) -> list[str]:
    """Delete all but the newest `keep_last`, the multiples of `keep_every_steps` (0: none) and `protect`. Rank 0 only.

    A directory is renamed away first, so that an interrupted deletion never leaves half a checkpoint under its name.
    """
    removed = []
    for checkpoint in sorted(folder.glob("step-*"), reverse=True)[max(1, keep_last) :]:
        step = int(checkpoint.name.removeprefix("step-"))
        if (keep_every_steps and step % keep_every_steps == 0) or checkpoint == protect:
            continue
        trash = folder / f".trash-{checkpoint.name}"
        shutil.rmtree(trash, ignore_errors=True)
        os.rename(checkpoint, trash)
        shutil.rmtree(trash)
        removed.append(checkpoint.name)
    return removed
