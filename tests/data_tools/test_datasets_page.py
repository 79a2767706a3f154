"""docs/datasets.md: every command on it is one that the program takes, and every layout has one."""

import argparse
import re
import shlex
from pathlib import Path

from data_tools import index, pack
from data_tools.layouts import LAYOUTS

PAGE = (Path(__file__).parents[2] / "docs" / "datasets.md").read_text(encoding="utf-8")


def test_the_commands_are_valid_and_every_layout_has_one():
    indented = "\n".join(line[4:] for line in PAGE.splitlines() if line.startswith("    "))
    commands = [shlex.split(line, comments=True) for line in indented.replace("\\\n", " ").splitlines()]
    shown = set()
    for program, verb, *arguments in (command for command in commands if command[:1] == ["mmpt-data"]):
        parser = argparse.ArgumentParser(prog=f"{program} {verb}", exit_on_error=False)
        {"pack": pack, "index": index}[verb].add_arguments(parser)
        shown.add(getattr(parser.parse_args(arguments), "layout", None))
    assert shown == {*LAYOUTS, None}


def test_every_source_is_used_and_listed():
    text, _, sources = PAGE.partition("## Sources")
    used = {int(number) for numbers in re.findall(r"\[(\d+(?:, \d+)*)\]", text) for number in numbers.split(", ")}
    assert used == {int(number) for number in re.findall(r"^ ?(\d+)\. ", sources, re.MULTILINE)}
