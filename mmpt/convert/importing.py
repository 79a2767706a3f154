"""Foreign weights into one of our methods, with an account of what was loaded, resized and left.

Nothing is passed over in silence: without `partial`, every tensor of the model (of the chosen parts) must come from the
source and every tensor of the source must be understood.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mmpt.convert.format import Format
from mmpt.convert.positions import stretched_grid
from mmpt.convert.reading import Source
from mmpt.convert.rules import Match, matches
from mmpt.engine.weights import TEACHER
from mmpt.methods.method import Method

SHOWN = 4
"""Names in a message."""


@dataclass
class Account:
    """What became of every tensor on either side."""

    loaded: dict[str, Tensor] = field(default_factory=dict)
    resized: list[str] = field(default_factory=list)
    """Of the loaded, those that changed their size, and how."""
    missing: list[str] = field(default_factory=list)
    """Of the model, those that the source does not hold."""
    differing: list[str] = field(default_factory=list)
    """Of the model, those that the source holds in another shape, and in which."""
    left: list[str] = field(default_factory=list)
    """Of the source, those that nothing of the model corresponds to."""


def respelled(source: Source, format: Format) -> dict[str, Tensor]:
    """The source's tensors under the names of the format's table. ValueError where what should be tied is not equal."""
    tensors: dict[str, Tensor] = {}
    for name, value in source.tensors.items():
        for pattern, replacement in format.respell:
            name = re.sub(pattern, replacement, name)
        tensors[name] = value
    for name, other in format.repeats:
        if name in tensors and other in tensors:
            if not tensors[name].equal(tensors[other]):
                raise ValueError(
                    f"{source.path}: {name} differs from {other}, and {format.title} has them tied; "
                    "this model cannot hold both"
                )
            del tensors[name]
    return tensors


def take(
    source: Source, format: Format, method: Method, ours: dict[str, Tensor], parts: Sequence[str], partial: bool
) -> Account:
    """What the source gives to tensors `ours` (by name), in their shapes, fp32.

    parts: only what lies in these modules; empty for all. ValueError, in one line, where no tensor matches, and without
    `partial` where any tensor on either side would be left over.
    """
    tensors, account, used = respelled(source, format), Account(), set[str]()
    chosen = {name for name in ours if inside(name, parts)}
    table = list(matches(format.rules(method), ours))
    for match in table:
        if all(name in tensors for name in match.theirs):
            used |= set(match.theirs)
            if match.ours in chosen:
                _take_one(match, tensors, ours[match.ours], format, account)
    account.loaded |= _twins(account.loaded, method, ours)
    account.missing = sorted(chosen - account.loaded.keys() - {text.split(" ")[0] for text in account.differing})
    account.left = unexpected(sorted(tensors.keys() - used), format.unneeded)
    _check(account, source, format, chosen, parts, partial)
    return account


def _twins(loaded: dict[str, Tensor], method: Method, ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """For the momentum copy, what the source gives to the student alone: a copy begins as what it copies."""
    prefix, twins = f"{method.student}.", dict[str, Tensor]()
    for name, value in loaded.items():
        twin = TEACHER + name.removeprefix(prefix)
        if name.startswith(prefix) and twin in ours and twin not in loaded:
            twins[twin] = value
    return twins


def _take_one(match: Match, tensors: dict[str, Tensor], ours: Tensor, format: Format, account: Account) -> None:
    try:
        value = match.rule.via.to_ours([tensors[name] for name in match.theirs])
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{', '.join(match.theirs)} cannot become {match.ours}: {error}") from None
    value = value.float() if value.is_floating_point() else value
    found, wanted = list(value.shape), list(ours.shape)
    if found != wanted and found[1:] == wanted[1:] and match.rule.resize == "grid":
        value = stretched_grid(value, wanted[0], format.stretch)
        account.resized.append(f"{match.ours} {found} -> {wanted} ({format.stretch})")
    elif found != wanted and found[1:] == wanted[1:] and match.rule.resize == "rows" and found[0] > wanted[0]:
        value = value[: wanted[0]]
        account.resized.append(f"{match.ours} {found} -> {wanted} (the first {wanted[0]} positions)")
    if list(value.shape) != wanted:
        account.differing.append(f"{match.ours} is {found} in the source and {wanted} in the model")
    else:
        account.loaded[match.ours] = value


def _check(
    account: Account, source: Source, format: Format, chosen: set[str], parts: Sequence[str], partial: bool
) -> None:
    where = f"in {' and '.join(parts)} of the model" if parts else "in the model"
    if not chosen:
        raise ValueError(f"the model has no part {' or '.join(parts)}")
    if not account.loaded:
        why = f": {account.differing[0]}" if account.differing else ""
        raise ValueError(f"nothing in {source.path} ({format.title}) corresponds to anything {where}{why}")
    if partial:
        return
    if account.differing:
        raise ValueError(
            f"{source.path}: {listed(account.differing, '; ')}. Set the recipe's fields to the source's sizes; or keep "
            "the initial values there with --partial"
        )
    if missing := unexpected(account.missing, format.optional):
        raise ValueError(
            f"{source.path} ({format.title}) lacks {len(missing)} of {len(chosen)} tensors {where}: "
            f"{listed(missing)}. Choose the parts that it has with --part, or keep the initial values of the "
            "rest with --partial"
        )
    if account.left:
        raise ValueError(
            f"{source.path} ({format.title}) holds {len(account.left)} tensors that the model has no place for: "
            f"{listed(account.left)}. Choose a recipe that has one, or leave them out with --partial"
        )


def unexpected(names: Sequence[str], pattern: str) -> list[str]:
    """Those that no regular expression excuses."""
    return [name for name in names if not re.fullmatch(pattern, name)]


def inside(name: str, parts: Sequence[str]) -> bool:
    """Whether a tensor lies in one of the parts: a module's name, or the end of one, such as `image`."""
    return not parts or any(re.search(rf"(^|[.:]){re.escape(part)}(\.|$)", name) for part in parts)


def differing(said: dict[str, Any], recipe: dict[str, Any], parts: Sequence[str] = ()) -> dict[str, Any]:
    """Of fields by dotted path, those of the parts in which a recipe says otherwise; fields it lacks do not count."""
    return {
        path: value
        for path, value in said.items()
        if path in recipe and recipe[path] != value and inside(path.removeprefix("method."), parts)
    }


def check_settings(said: dict[str, Any], recipe: dict[str, Any], parts: Sequence[str], source: Source) -> None:
    """ValueError with the flags to add where the recipe says otherwise than the source about what no shape shows.

    said: fields by dotted path. recipe: all fields of the recipe, by dotted path.
    """
    if wrong := differing(said, recipe, parts):
        flags = " ".join(f"--{path} {_flag(value)}" for path, value in wrong.items())
        raise ValueError(
            f"in {source.path} {told_differences(wrong, recipe)}. Add {flags} for the same outputs; or keep the "
            "recipe's settings with --keep-settings"
        )


def told_differences(wrong: dict[str, Any], recipe: dict[str, Any]) -> str:
    return listed([f"{path} is {_flag(value)}, not {_flag(recipe[path])}" for path, value in wrong.items()], "; ")


def _flag(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def listed(names: Sequence[str], separator: str = ", ") -> str:
    """The first few, and how many more."""
    more = f"{separator}and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return separator.join(names[:SHOWN]) + more
