"""Every command in the README and the documentation is one that the programs take, with flags that they have."""

import argparse
import importlib
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_tools.__main__ import VERBS
from mmpt import cli, cli_audit, cli_bench, cli_checkpoint, cli_convert, cli_plan
from mmpt.recipe import parse_arguments

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(program: str) -> list[tuple[str, list[str]]]:
    """(page, words) of the indented lines that begin with it; a continued line is one, comments, which may stand in a
    column of their own, and `...` are none."""
    found = []
    for page in PAGES:
        shown = "\n".join(line[4:] for line in page.read_text().splitlines() if line.startswith("    "))
        for line in re.sub(r"\\\n *", "", shown).splitlines():
            if line.split(" ")[0] == program:
                words = shlex.split(re.split(r" {3,}", line)[0], comments=True)
                found.append((page.name, [word for word in words[1:] if word != "..."]))
    return found


def ids(found: list[tuple[str, list[str]]]) -> list[str]:
    return [f"{page}: {' '.join(words)[:60]}" for page, words in found]


TRAINING = [(page, words) for page, words in commands("deepspeed") if "mmpt/train.py" in words]
OFFLINE, LOOKING = commands("mmpt-data"), commands("mmpt")
SHAPES = ("RECIPE", "LAYOUT", "COMMAND LINE", "...")  # stand for a word that the reader puts there


@pytest.mark.parametrize(("page", "words"), TRAINING, ids=ids(TRAINING))
def test_training(page: str, words: list[str]) -> None:
    recipe = parse_arguments(words[words.index("mmpt/train.py") + 1 :])
    ranks = int(words[words.index("--num_accelerators") + 1]) if "--num_accelerators" in words else 1
    assert recipe.micro_batches(ranks) > 0


@pytest.mark.parametrize(("page", "words"), OFFLINE, ids=ids(OFFLINE))
def test_offline_programs(page: str, words: list[str]) -> None:
    verb, *arguments = words
    assert verb in VERBS
    parser = argparse.ArgumentParser(exit_on_error=False)
    importlib.import_module(f"data_tools.{verb.replace('-', '_')}").add_arguments(parser)
    parser.parse_args(arguments)


@pytest.mark.parametrize(("page", "words"), LOOKING, ids=ids(LOOKING))
def test_looking_at_runs(page: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    taken = SimpleNamespace(flags=None)

    def take(parsed: argparse.Namespace, flags: list[str] | None = None) -> None:
        taken.parsed, taken.flags = parsed, flags or []

    for name in ("run_eval", "run_report", "run_explain", "print_recipes"):
        monkeypatch.setattr(cli, name, take)
    for module in (cli_audit, cli_checkpoint, cli_plan, cli_bench):
        monkeypatch.setattr(module, "run", take)
    if any(shape in word for shape in SHAPES for word in words):
        return
    if words[0] == "import":  # whether the weights fit is for tests/convert
        for name in ("read", "detected"):
            monkeypatch.setattr(cli_convert, name, lambda *_: "")
        monkeypatch.setattr(cli_convert, "import_into", lambda out, *_: take(out) or [])
    assert cli.main(words) == 0 and taken.flags is not None
    if words[0] in ("plan", "bench"):
        parse_arguments(["--recipe", taken.parsed.recipe, *taken.flags])


def test_there_are_commands() -> None:
    assert len(TRAINING) > 5 and len(OFFLINE) > 20 and len(LOOKING) > 5
