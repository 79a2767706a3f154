"""open_clip's --train-data and --aug-cfg in our words."""

import ast
import re

from braceexpand import braceexpand

RANGE = re.compile(r"\{\d+\.\.\d+\}")


def folders(source: str) -> list[str]:
    """The folders (or URLs of folders) that patterns of tar files lie in: `a/{000..123}.tar::b/{0..9}.tar` -> a, b.

    `pipe:aws s3 cp s3://...tar -` names an object store, which is read without a shell. ValueError for another pipe.
    """
    found: list[str] = []
    for part in source.split("::"):
        if part.startswith("pipe:"):
            url = re.search(r"\b(?:s3|gs|https?)://\S+", part)
            if url is None:
                raise ValueError(f"--train-data {part}: shell commands are not run; name a folder or a URL")
            part = url[0]
        for pattern in braceexpand(RANGE.sub("*", part)):
            folder = pattern.rpartition("/")[0] if pattern.endswith(".tar") else pattern
            if (folder or ".") not in found:
                found.append(folder or ".")
    return found


def crop_scale(text: str) -> tuple[tuple[float, float] | None, list[str]]:
    """`scale=(0.4, 1.0) color_jitter=0.4` -> ((0.4, 1.0), ["color_jitter=0.4"]). ValueError for what is no pair."""
    pairs = re.findall(r"(\w+)=((?:\([^)]*\)|\[[^\]]*\]|\S+))", text)
    scale: tuple[float, float] | None = None
    rest = []
    for name, value in pairs:
        if name != "scale":
            rest.append(f"{name}={value}")
            continue
        try:
            low, high = ast.literal_eval(value)
            scale = (float(low), float(high))
        except (ValueError, TypeError, SyntaxError):
            raise ValueError(f"--aug-cfg {name}={value} is not a pair of numbers") from None
    return scale, rest
