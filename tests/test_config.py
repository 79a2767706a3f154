"""Trees of dataclasses as flags and files, beyond what the recipes use today."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import pytest

from mmpt import config


class Shape(Protocol):
    def area(self) -> float: ...


@dataclass(frozen=True)
class Source:
    url: str
    """Where."""
    weight: float = 1.0
    """How much."""


@dataclass(frozen=True)
class Pair:
    low: int = 1
    """Lower end."""
    high: int = 2
    """Upper end."""

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise ValueError(f"low={self.low} is not below high={self.high}")


@dataclass(frozen=True)
class Root:
    pair: Pair
    sources: tuple[Source, ...]
    mode: Literal["a", "b"] = "a"
    """A choice."""
    limit: float | None = None
    """May be absent."""
    flag: bool = False
    """Yes or no."""
    names: tuple[str, ...] = ()
    """Any number."""


def root() -> Root:
    return Root(Pair(), (Source("x"), Source("y", 2.0)))


def test_leaves_in_order_with_their_words() -> None:
    found = {path: (value, words) for path, _, value, words in config.leaves(root())}
    assert list(found) == ["pair.low", "pair.high", "sources.0.url", "sources.0.weight", "sources.1.url",
                           "sources.1.weight", "mode", "limit", "flag", "names"]  # fmt: skip
    assert found["sources.1.weight"] == (2.0, "How much.")


def test_changes_apply_together() -> None:
    changed = config.override(root(), {"pair.low": "5", "pair.high": "6", "sources.1.weight": "0.5", "limit": "3"})
    assert changed.pair == Pair(5, 6) and changed.sources[1].weight == 0.5 and changed.limit == 3.0
    assert config.override(changed, {"limit": "none", "names": "a,b", "flag": "true"}).names == ("a", "b")
    with pytest.raises(ValueError, match="low=7 is not below high=2"):
        config.override(root(), {"pair.low": "7"})


@pytest.mark.parametrize(
    ("path", "text", "wanted"),
    [
        ("mode", "c", "a or b"),
        ("flag", "yes", "true or false"),
        ("limit", "x", "float or none"),
        ("pair.low", "1.5", "int"),
    ],
)
def test_a_bad_value_names_flag_type_and_text(path: str, text: str, wanted: str) -> None:
    with pytest.raises(ValueError, match=rf"--{path} wants {wanted}, got '{text}'"):
        config.override(root(), {path: text})


def test_file_round_trip_and_its_errors(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    config.save_yaml(root(), path)
    assert config.load_yaml(Root, path) == root()
    path.write_text(path.read_text().replace("flag:", "flagg:"))
    with pytest.raises(ValueError, match=r"x.yaml: unknown field 'flagg'; did you mean 'flag'"):
        config.load_yaml(Root, path)
    path.write_text("pair: [1, 2")
    with pytest.raises(ValueError, match=r"x\.yaml"):
        config.load_yaml(Root, path)


def test_a_protocol_field_names_its_class() -> None:
    from mmpt.recipe import load

    data = config.to_dict(load("clip.tiny"))
    assert data["method"]["class"] == "mmpt.methods.clip.CLIPConfig" and "class" not in data["optim"]
