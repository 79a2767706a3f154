"""Every foreign format, and which of them a source is in."""

from mmpt.convert import (
    albef,
    chinese_clip,
    declip,
    hf_align,
    hf_bert,
    hf_clip,
    hf_roberta,
    hf_siglip,
    hf_vilt,
    hf_vit,
    open_clip,
    open_clip_siglip,
    openai_clip,
    slip,
    timm_vit,
    uniter,
    vilt,
    wukong,
)
from mmpt.convert.format import Format
from mmpt.convert.reading import Source

MODULES = (
    openai_clip, chinese_clip, declip, wukong, slip, open_clip_siglip, open_clip, hf_clip, hf_siglip, hf_align, hf_vilt,
    albef, vilt, uniter, hf_roberta, hf_bert, hf_vit, timm_vit,
)  # fmt: skip
FORMATS: tuple[Format, ...] = tuple(module.FORMAT for module in MODULES)
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
