"""`mmpt import`, `mmpt export` and `mmpt from-open-clip`: foreign checkpoints and command lines."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmpt import config
from mmpt.convert import formats
from mmpt.convert.from_open_clip import translate
from mmpt.convert.import_run import detected, import_into
from mmpt.convert.reading import read
from mmpt.recipe import load

VERBS = {
    "import": "bring foreign weights into a run",
    "export": "write a run's weights for other code",
    "from-open-clip": "translate a command line of open_clip",
}


def run(verb: str, arguments: Sequence[str]) -> None:
    """ValueError, in one line, for whatever does not fit."""
    {"import": run_import, "export": run_export, "from-open-clip": run_translation}[verb](arguments)


class _Parser(argparse.ArgumentParser):
    """Errors in one line, without the usage of two hundred flags."""

    def error(self, message: str):  # type: ignore[override]
        raise ValueError(f"{self.prog.removeprefix('mmpt ')}: {message}")

    def parsed(self, arguments: Sequence[str]) -> argparse.Namespace:
        """ValueError that names the near miss of an unknown flag."""
        found, unknown = self.parse_known_args(list(arguments))
        if unknown:
            known = [option.lstrip("-") for option in self._option_string_actions]
            name = unknown[0].lstrip("-").split("=")[0]
            self.error(f"unknown argument {unknown[0]!r}{config.near_miss(name, known)}")
        return found


def run_import(arguments: Sequence[str]) -> None:
    """Print what was loaded, resized and left. ValueError where it does not fit."""
    first = _Parser("mmpt import", add_help=False, allow_abbrev=False)
    first.add_argument("--as", dest="recipe")
    recipe_name = first.parse_known_args(list(arguments))[0].recipe
    parser = _Parser(
        "mmpt import", description="Foreign weights become a run directory for --run.init and `mmpt eval`.",
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("source", type=Path, metavar="SRC", help="a file of weights, or a folder of transformers' kind")
    parser.add_argument("out", type=Path, metavar="OUT", help="the run directory; several imports into one add up")
    parser.add_argument("--as", dest="recipe", required=True, metavar="NAME", help="a recipe; its flags may follow")
    parser.add_argument("--format", choices=formats.names(), help="the source's format [found by its names]")
    parser.add_argument(
        "--part", action="append", default=[], metavar="MODULE",
        help="fill only this module of the model, such as image or text; may be given again",
    )  # fmt: skip
    parser.add_argument("--partial", action="store_true", help="what one side has and the other lacks stays as it is")
    parser.add_argument("--keep-settings", action="store_true", help="the recipe's settings stay where they differ")
    if recipe_name is not None:
        config.add_flags(parser, load(recipe_name))
    parsed = parser.parsed(arguments)
    changes = {path: text for path, text in vars(parsed).items() if "." in path}
    recipe = config.override(load(parsed.recipe), changes | {"run.dir": str(parsed.out)})
    source = read(parsed.source)
    format = detected(source, parsed.format)
    account = import_into(parsed.out, recipe, source, format, tuple(parsed.part), parsed.partial, parsed.keep_settings)
    print("\n".join([*account, f"ready for --run.init {parsed.out}"]))


def run_export(arguments: Sequence[str]) -> None:
    """Write a run's weights for other code and print what to know. ValueError where they do not fit."""
    from mmpt.convert.export_run import FOLDERS, export_run  # takes a second, and no other command needs it

    parser = _Parser("mmpt export", description="A run's newest weights for other code.", allow_abbrev=False)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a run directory, or one of its checkpoints")
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder for hf and open_clip, else a file")
    parser.add_argument(
        "--to", required=True, choices=[*FOLDERS, *(name for name in formats.names() if name not in FOLDERS)],
        help="hf: from_pretrained of transformers; open_clip: local-dir:OUT; others: the layout of that project",
    )  # fmt: skip
    parser.add_argument("--tokenizer", metavar="NAME", help="tokenizer to write beside the weights [the recipe's]")
    parser.add_argument("--partial", action="store_true", help="leave out what the other layout has no place for")
    parsed = parser.parsed(arguments)
    print("\n".join([*export_run(parsed.run_dir, parsed.out, parsed.to, parsed.tokenizer, parsed.partial),
                     f"written to {parsed.out}"]))  # fmt: skip


def run_translation(arguments: Sequence[str]) -> None:
    """Print the command, and what is left to do. ValueError for a flag or value that is not known."""
    parser = _Parser(
        "mmpt from-open-clip", description="A training command of open_clip as one of mmpt; nothing is run."
    )
    parser.add_argument("command", metavar="COMMAND LINE", help="the whole command, in one pair of quotes")
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs in all, where the command does not say")
    parsed = parser.parsed(arguments)
    found = translate(parsed.command, parsed.gpus)
    print(found.command())
    if found.notes:
        print("\n".join(["", "what is left to do, or to know:", *(f"  {note}" for note in found.notes)]))
