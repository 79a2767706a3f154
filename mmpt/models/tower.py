"""What every image tower and every text tower offers, so that any of them works in any method.

A tower turns its input into tokens. From them a method takes either one vector per image or text, the *summary*, or the
tokens that stand for places in the image, without [CLS].
"""

from typing import Protocol

from torch import Tensor, nn

from mmpt.batch import Pictures, Tokens
from mmpt.inputs import PictureSpec, TextSpec


class ImageTower(nn.Module):
    """Subclasses define all three; parameters that only the summary needs belong to a module that `summary` calls."""

    def forward(self, pictures: Pictures) -> Tokens:
        """Tokens [T, D] of B images. ValueError for pictures in a form that the tower does not take."""
        raise NotImplementedError

    def summary(self, tokens: Tokens) -> Tensor:
        """[B, S] of what `forward` returned."""
        raise NotImplementedError

    def local(self, tokens: Tokens) -> Tokens:
        """Of what `forward` returned, the tokens that stand for places: without [CLS]."""
        raise NotImplementedError


class TextTower(nn.Module):
    def forward(self, ids: Tokens) -> Tokens:
        """Tokens [T, D] of B texts, from ids [T] int64."""
        raise NotImplementedError

    def summary(self, tokens: Tokens) -> Tensor:
        """[B, S] of what `forward` returned."""
        raise NotImplementedError


class ImageTowerConfig(Protocol):
    """A frozen dataclass beside its tower."""

    @property
    def width(self) -> int:
        """D, of the tokens."""
        ...

    @property
    def summary_width(self) -> int:
        """S; 0 where the tower has no summary."""
        ...

    def inputs(self) -> PictureSpec: ...

    def build(self) -> ImageTower: ...


class TextTowerConfig(Protocol):
    @property
    def width(self) -> int: ...

    @property
    def summary_width(self) -> int: ...

    def inputs(self) -> TextSpec: ...

    def build(self) -> TextTower: ...


def no_summary(tower: nn.Module) -> ValueError:
    """For a method that reads one vector per image or text from a tower that has none."""
    return ValueError(f"{type(tower).__name__} has no summary as it is configured; the method reads one")
