"""Our weights in a foreign layout. What their code would compute differently, or has no place for, is an error."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mmpt import config
from mmpt.convert.format import Format
from mmpt.convert.importing import differing, listed, told_differences, unexpected
from mmpt.convert.reading import Source
from mmpt.convert.rules import exported
from mmpt.engine.weights import tensors_of
from mmpt.methods.method import Method
from mmpt.recipe import Recipe


def their_tensors(format: Format, method: Method, partial: bool) -> tuple[dict[str, Tensor], list[str]]:
    """(everything their code wants to find, names of ours that stay behind). ValueError where the layout has no place
    for the method, or without `partial` for one of its tensors."""
    theirs, left = exported(format.rules(method), tensors_of(method))
    left = unexpected(left, format.optional)
    if not theirs:
        raise ValueError(f"{format.title} layout has no place for {type(method).__name__}")
    if left and not partial:
        raise ValueError(
            f"{format.title} layout has no place for {len(left)} tensors of {type(method).__name__}: {listed(left)}; "
            "leave them out with --partial"
        )
    theirs |= {name: theirs[other].clone() for name, other in format.repeats if other in theirs}
    theirs |= format.extras(method)
    means = [name for name in theirs if name.endswith(".running_mean")]
    theirs |= {name.replace("running_mean", "num_batches_tracked"): torch.tensor(0) for name in means}  # torch counts
    return {name: value.detach().cpu().clone() for name, value in theirs.items()}, left


def check_outputs(
    format: Format, theirs: dict[str, Tensor], recipe: Recipe, method: Method, configuration: dict[str, Any],
    preprocessor: dict[str, Any],
) -> None:  # fmt: skip
    """ValueError where their code, reading these tensors and configurations, would compute something else than the
    recipe says: the settings that importing them would ask for must be the recipe's own."""
    said = format.settings(Source(Path(), theirs, configuration, preprocessor), method)
    fields = {path: value for path, _, value, _ in config.leaves(recipe)}
    if wrong := differing(said, fields):
        raise ValueError(
            f"{format.title} code would compute something else: there {told_differences(wrong, fields)}, and the "
            "layout cannot say so"
        )


def write_file(out: Path, format: Format, theirs: dict[str, Tensor]) -> None:
    """One file: safetensors by that ending, else torch's, below the entry that their code reads."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".tmp-{out.name}")
    if out.suffix == ".safetensors":
        save_file(theirs, temporary)
    else:
        torch.save({format.wrapper: theirs} if format.wrapper else theirs, temporary)
    os.replace(temporary, out)
