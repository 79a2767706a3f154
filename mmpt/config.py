"""A tree of frozen dataclasses as flags, as YAML, and back. Strict: an unknown name is an error with the near miss.

A leaf is an int, float, str, bool, Literal, `X | None`, or a tuple of those; its flag is the dotted path to it, such as
`--optim.lr 1e-3`. A field annotated with a Protocol (a method's configuration, say) holds any dataclass of ours; YAML
names its class.
"""

import argparse
import ast
import difflib
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """Every leaf of the tree as (dotted path, type, value, documentation), in order of declaration."""
    hints, documentation = get_type_hints(type(config)), _field_docs(type(config))
    for field in fields(config):
        path, value = f"{prefix}{field.name}", getattr(config, field.name)
        if is_dataclass(value):
            yield from leaves(value, path + ".")
        elif isinstance(value, tuple) and value and is_dataclass(value[0]):
            for i, item in enumerate(value):
                yield from leaves(item, f"{path}.{i}.")
        else:
            yield path, hints[field.name], value, documentation.get(field.name, "")


def override(config: T, changes: dict[str, str]) -> T:
    """A copy with the leaves at the given dotted paths replaced by the parsed texts. ValueError for a bad one."""
    kinds = {path: kind for path, kind, _, _ in leaves(config)}
    for path in changes:
        if path not in kinds:
            raise ValueError(f"unknown field {path!r}{near_miss(path, list(kinds))}")
    return _replaced(config, {path: parse(text, kinds[path], path) for path, text in changes.items()}, "")


def _replaced(config: Any, values: dict[str, Any], prefix: str) -> Any:
    """All changes at once, so that a check sees only the whole that was asked for."""
    if isinstance(config, tuple):
        return tuple(_replaced(item, values, f"{prefix}{i}.") for i, item in enumerate(config))
    changed = {}
    for field in fields(config):
        path, value = f"{prefix}{field.name}", getattr(config, field.name)
        nested = is_dataclass(value) or (isinstance(value, tuple) and value and is_dataclass(value[0]))
        if path in values:
            changed[field.name] = values[path]
        elif nested and any(name.startswith(path + ".") for name in values):
            changed[field.name] = _replaced(value, values, path + ".")
    return replace(config, **changed)


def parse(text: str, kind: Any, path: str) -> Any:
    """The text of a flag as a value of the leaf's type; ValueError that names the flag and the text."""
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind in (int, float, str):
            return kind(text)
        if get_origin(kind) is Literal:
            return next(choice for choice in get_args(kind) if str(choice) == text)
        if get_origin(kind) in (Union, UnionType):
            if text.lower() == "none" and NoneType in get_args(kind):
                return None
            return parse(text, next(option for option in get_args(kind) if option is not NoneType), path)
        if get_origin(kind) is tuple:
            parts = [part for part in text.split(",") if part]
            inner = get_args(kind)
            if inner[-1] is not Ellipsis and len(parts) != len(inner):
                raise ValueError
            return tuple(parse(part, inner[0], path) for part in parts)
    except (KeyError, ValueError, StopIteration):
        pass
    raise ValueError(f"--{path} wants {describe(kind)}, got {text!r}")


def describe(kind: Any) -> str:
    """A leaf's type in words for messages and help."""
    if kind is bool:
        return "true or false"
    if get_origin(kind) is Literal:
        return " or ".join(str(choice) for choice in get_args(kind))
    if get_origin(kind) in (Union, UnionType):
        return " or ".join("none" if option is NoneType else describe(option) for option in get_args(kind))
    if get_origin(kind) is tuple:
        return f"comma-separated {describe(get_args(kind)[0])}"
    return getattr(kind, "__name__", str(kind))


def at_least(least: float, config: Any, *names: str) -> None:
    """Check fields of a dataclass that is being made: ValueError that names the first that is less, or no number."""
    for name in names:
        if not getattr(config, name) >= least:
            raise ValueError(f"{name} must be {least:g} or more, got {getattr(config, name)}")


def near_miss(name: str, known: list[str]) -> str:
    """'; did you mean ...?' with the closest known name, or nothing."""
    tails = {path.rsplit(".", 1)[-1]: path for path in known}
    close = difflib.get_close_matches(name, known, 1, 0.6) or [
        tails[tail] for tail in difflib.get_close_matches(name.rsplit(".", 1)[-1], list(tails), 1, 0.7)
    ]
    return f"; did you mean {close[0]!r}?" if close else ""


def add_flags(parser: argparse.ArgumentParser, config: Any) -> None:
    """One flag per leaf, grouped by the part of the tree it lives in. Values stay text until `override` parses them."""
    groups: dict[str, Any] = {}
    for path, kind, value, documentation in leaves(config):
        group = path.split(".")[0] if "." in path else "run"
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
        text = f"{documentation} [{describe(kind)}; {shown}]".replace("%", "%%")
        groups[group].add_argument(f"--{path}", default=argparse.SUPPRESS, metavar="X", help=text)


def to_dict(config: Any, declared: Any = None) -> dict[str, Any]:
    """Plain dicts, lists and scalars. Where the declared type does not fix the class, a `class` entry names it."""
    hints = get_type_hints(type(config))
    out: dict[str, Any] = {}
    if declared is not None and declared is not type(config):
        out["class"] = f"{type(config).__module__}.{type(config).__qualname__}"
    for field in fields(config):
        out[field.name] = _plain(getattr(config, field.name), hints[field.name])
    return out


def _plain(value: Any, declared: Any) -> Any:
    if is_dataclass(value):
        return to_dict(value, declared)
    if isinstance(value, tuple):
        inner = get_args(declared)[0] if get_args(declared) else None
        return [_plain(item, inner) for item in value]
    return value


def from_dict(kind: type[T], data: Any, path: str = "") -> T:
    """The inverse of `to_dict`. ValueError for a missing or unknown key, naming it and the near miss."""
    if not isinstance(data, dict):
        raise ValueError(f"{path or 'the file'} should hold named fields, got {data!r}")
    data = dict(data)
    if "class" in data:
        kind = _our_class(data.pop("class"), path)
    hints = get_type_hints(kind)
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for name in data:
        if name not in names:
            raise ValueError(f"unknown field {path + str(name)!r}{near_miss(str(name), names)}")
    for name in names:
        if name not in data:
            raise ValueError(f"field {path + name!r} is missing")
    return kind(**{name: _build(hints[name], value, f"{path}{name}") for name, value in data.items()})


def _build(kind: Any, value: Any, path: str) -> Any:
    if isinstance(value, dict):
        return from_dict(kind, value, path + ".")
    if isinstance(value, list):
        inner = get_args(kind)[0]
        return tuple(_build(inner, item, f"{path}.{i}") for i, item in enumerate(value))
    return parse("none" if value is None else str(value), kind, path)


def _our_class(name: str, path: str) -> Any:
    module, _, attribute = name.rpartition(".")
    if not module.startswith("mmpt."):
        raise ValueError(f"{path}class names {name!r}, which is not one of mmpt's configurations")
    found = getattr(importlib.import_module(module), attribute, None)
    if not is_dataclass(found):
        raise ValueError(f"{path}class names {name!r}, which does not exist")
    return found


def save_yaml(config: Any, path: Path) -> None:
    """Write the whole tree, defaults included."""
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False, width=120))


def load_yaml(kind: type[T], path: Path) -> T:
    """Read what `save_yaml` wrote. ValueError that names the file for anything amiss in it."""
    try:
        return from_dict(kind, yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]}") from error


def _field_docs(kind: type) -> dict[str, str]:
    """The string literal under each field of a dataclass, its base classes' included."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        if not is_dataclass(base):
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(tree, ast.ClassDef)
        for statement, following in zip(tree.body, tree.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
                and isinstance(following.value.value, str)
            ):
                docs[statement.target.id] = " ".join(following.value.value.split())
    return docs
