"""`mmpt import`: foreign weights become a run directory, which `--run.init` and `mmpt eval` take. Imports add up."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from mmpt import config
from mmpt.convert import formats
from mmpt.convert.format import Format
from mmpt.convert.importing import Account, check_settings, listed, take
from mmpt.convert.reading import Source
from mmpt.engine.progress import Progress
from mmpt.engine.resume import checkpoints_of, find_checkpoint
from mmpt.engine.weights import load_weights, publish_weights, put, tensors_of
from mmpt.methods.method import Method
from mmpt.recipe import Recipe, check_same_run


def import_into(
    out: Path, recipe: Recipe, source: Source, format: Format, parts: Sequence[str], partial: bool, keep_settings: bool
) -> list[str]:
    """Put a source's weights into the run directory `out`, made for this recipe or holding earlier imports for it.

    Returns the account, a line each. ValueError where something does not fit; then `out` is as it was.
    """
    method, origins, state = _begun(out, recipe)
    if not keep_settings:
        fields = {path: value for path, _, value, _ in config.leaves(recipe)}
        check_settings(format.settings(source, method), fields, parts, source)
    account = take(source, format, method, tensors_of(method), parts, partial)
    put(method, account.loaded)
    origins |= dict.fromkeys(account.loaded, f"{source.path.name} ({format.title})")
    out.mkdir(parents=True, exist_ok=True)
    config.save_yaml(recipe, out / "recipe.yaml")
    publish_weights(checkpoints_of(out), method, origins, state)
    return told(account, source, format, parts, tensors_of(method).keys() - origins.keys())


def _begun(out: Path, recipe: Recipe) -> tuple[Method, dict[str, str], dict]:
    """The method with initial weights or those of earlier imports, what came from where, and the run's counters."""
    torch.manual_seed(recipe.run.seed)
    method, fresh = recipe.method.build(), asdict(Progress())
    if not (out / "recipe.yaml").exists():
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"{out} is not empty and no earlier import; choose another folder")
        return method, {}, fresh
    check_same_run(recipe, config.load_yaml(Recipe, out / "recipe.yaml"))
    checkpoint, manifest, _ = find_checkpoint(out)
    if not manifest.origins or (out / "metrics.jsonl").exists():
        raise ValueError(f"{out} holds a run of its own, which an import would overwrite; choose another folder")
    load_weights(checkpoint, manifest, method)
    return method, dict(manifest.origins), fresh


def told(account: Account, source: Source, format: Format, parts: Sequence[str], initial: set[str]) -> list[str]:
    """The account for a person."""
    lines = [f"{source.path}: {format.title}, {len(source.tensors)} tensors"]
    into = f" into {', '.join(parts)}" if parts else ""
    lines.append(f"  loaded    {len(account.loaded)} tensors{into}")
    lines += [f"  resized   {text}" for text in account.resized]
    lines += [f"  not taken {text}" for text in account.differing]
    if account.left:
        lines.append(f"  left      {len(account.left)} tensors of the source: {listed(account.left)}")
    if unsaid := format.unsaid(source):
        lines.append(f"  note      {unsaid}")
    if initial:
        lines.append(f"  initial   {len(initial)} tensors of the model come from no source: {listed(sorted(initial))}")
    return lines


def detected(source: Source, name: str | None) -> Format:
    return formats.named(name) if name else formats.recognised(source)
