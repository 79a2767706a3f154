"""`mmpt export`: a run's newest weights for other code."""

from pathlib import Path

from mmpt import config
from mmpt.convert import formats
from mmpt.convert.export_hf import export_hf
from mmpt.convert.export_open_clip import export_open_clip
from mmpt.convert.exporting import check_outputs, their_tensors, write_file
from mmpt.data.text import load_tokenizer
from mmpt.engine.resume import find_checkpoint
from mmpt.engine.weights import load_weights
from mmpt.recipe import Recipe

FOLDERS = {"hf": export_hf, "open_clip": export_open_clip}


def export_run(run_dir: Path, out: Path, to: str, tokenizer: str | None, partial: bool) -> list[str]:
    """Write the weights of a run, or of one of its checkpoints, to `out`; returns notes, a line each.

    to: `hf` or `open_clip` for a folder, a format's name for a file. ValueError where `out` is not free, or their code
    would compute something else.
    """
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise ValueError(f"{out} is there already; choose another name")
    recipe_file = (run_dir.parents[1] if (run_dir / "manifest.json").is_file() else run_dir) / "recipe.yaml"
    if not recipe_file.is_file():
        raise ValueError(f"{run_dir} is not a run directory: it has no recipe.yaml")
    recipe = config.load_yaml(Recipe, recipe_file)
    checkpoint, manifest, passed_over = find_checkpoint(run_dir)
    method = recipe.method.build().eval()
    load_weights(checkpoint, manifest, method)
    notes = [f"passed over {reason}" for reason in passed_over] + [f"weights of {checkpoint}"]
    if to in FOLDERS:
        words = load_tokenizer(tokenizer or recipe.data.tokenizer)
        return notes + FOLDERS[to](out, recipe, method, words, partial)
    format = formats.named(to)
    theirs, left = their_tensors(format, method, partial)
    check_outputs(format, theirs, recipe, method, {}, {})
    write_file(out, format, theirs)
    return notes + [f"left behind: {name}" for name in left]
