"""Every foreign format, and which of them a source is in."""

from mmpt.convert import hf_bert, hf_clip, hf_siglip, hf_vit, openai_clip, timm_vit
from mmpt.convert.format import Format
from mmpt.convert.reading import Source

FORMATS: tuple[Format, ...] = tuple(
    module.FORMAT for module in (openai_clip, hf_clip, hf_siglip, hf_bert, hf_vit, timm_vit)
)
"""In the order in which they are asked whether a source is theirs."""


def names() -> list[str]:
    return [format.name for format in FORMATS]


def named(name: str) -> Format:
    """ValueError for a name that is none."""
    for format in FORMATS:
        if format.name == name:
            return format
    raise ValueError(f"unknown format {name!r} (known: {', '.join(names())})")


def recognised(source: Source) -> Format:
    """The format of a source, from the names of its tensors. ValueError where it is none of ours."""
    for format in FORMATS:
        if format.recognises(source):
            return format
    some = ", ".join(list(source.tensors)[:4])
    raise ValueError(
        f"{source.path} holds weights of no known format (its first names: {some}); known are {', '.join(names())}, "
        "which --format names"
    )
