"""A foreign layout of weights, as one value: how to recognise it, its table of rules, and what else is known of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mmpt.convert.positions import Stretch
from mmpt.convert.reading import Source
from mmpt.convert.rules import Rule
from mmpt.methods.method import Method

ACTIVATIONS = {
    "quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
}  # fmt: skip
"""transformers' `hidden_act` in our words."""


def nothing_said(source: Source, method: Method) -> dict[str, Any]:
    return {}


def nothing_more(method: Method) -> dict[str, Tensor]:
    return {}


@dataclass(frozen=True)
class Format:
    name: str
    """What --format and --to call it."""
    title: str
    """What messages call it."""
    recognises: Callable[[Source], bool]
    """Whether the source is in this format. Asked in the order of formats.py."""
    rules: Callable[[Method], tuple[Rule, ...]]
    """The table, for the modules that a method has."""
    stretch: Stretch
    """How a grid of positions comes to another size."""
    settings: Callable[[Source, Method], dict[str, Any]] = nothing_said
    """Fields of the recipe, by dotted path, that the source fixes and shapes do not show: activations, heads, ..."""
    respell: tuple[tuple[str, str], ...] = ()
    """Regular expressions and replacements that bring older spellings of names to the table's."""
    unneeded: str = "(?!)"
    """A regular expression for names that say nothing which our model does not know."""
    repeats: tuple[tuple[str, str], ...] = ()
    """(name, other name) of tensors that are another one once more, because the two are tied."""
    extras: Callable[[Method], dict[str, Tensor]] = nothing_more
    """What their code wants to find beyond what is learned."""
    wrapper: str = ""
    """The entry of the file under which their code looks for the weights."""


def fields(method: nn.Module, kind: type[nn.Module], values: dict[str, Any]) -> dict[str, Any]:
    """The values as fields of the recipe, for each module of a kind: a module `towers.image` is configured by the
    recipe's `method.towers.image`."""
    return {
        f"method.{name}.{path}": value
        for name, module in method.named_modules()
        if isinstance(module, kind)
        for path, value in values.items()
    }
