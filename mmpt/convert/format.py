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


def nothing_unsaid(source: Source) -> str:
    return ""


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
    optional: str = "(?!)"
    """A regular expression for tensors of ours that a source need not hold."""
    repeats: tuple[tuple[str, str], ...] = ()
    """(name, other name) of tensors that are another one once more, because the two are tied."""
    extras: Callable[[Method], dict[str, Tensor]] = nothing_more
    """What their code wants to find beyond what is learned."""
    unsaid: Callable[[Source], str] = nothing_unsaid
    """What the source does not tell and the recipe had to, in a line for the person who imports."""
    wrapper: str = ""
    """The entry of the file under which their code looks for the weights."""


def fields(method: Method, kind: type[nn.Module], values: dict[str, Any]) -> dict[str, Any]:
    """The values as fields of the recipe, for each module of a kind: the module `towers.image` is configured by the
    recipe's `method.towers.image`. Encoders that have a momentum copy are configured as if they lay beside it."""
    return {
        f"method.{name.removeprefix(method.student + '.')}.{path}": value
        for name, module in method.named_modules()
        if isinstance(module, kind)
        for path, value in values.items()
    }


def heads_of(width: int) -> dict[str, int]:
    """The number of heads where each is 64 wide, as in all published sizes; nothing where that is impossible."""
    return {"trunk.heads": width // 64} if width % 64 == 0 else {}
