"""Class names and prompt templates for zero-shot classification."""

from typing import NamedTuple

from mmpt.data import storage
from mmpt.data.benchmark import TEMPLATES_FILE, read_class_names, read_templates

DEFAULT_TEMPLATES = (
    "{c}",
    "a photo of {c}.",
    "a picture with {c} in it.",
    "this image shows {c}.",
    "a close view of {c}.",
    "{c} seen from some distance.",
    "a drawing of {c}.",
)


class Prompts(NamedTuple):
    class_names: tuple[str, ...]
    templates: tuple[str, ...]

    def texts(self) -> list[str]:
        """[C * M] one text per class and template, the templates of a class together."""
        return [template.replace("{c}", name) for name in self.class_names for template in self.templates]


def load_prompts(folder: str) -> Prompts:
    """The class names and templates of a data set as CLIP_benchmark lays it out; own templates where it has none.

    ValueError when there are no class names, or a template lacks `{c}`.
    """
    own = not storage.exists(storage.join(folder, TEMPLATES_FILE))
    templates = DEFAULT_TEMPLATES if own else tuple(read_templates(folder))
    return Prompts(tuple(read_class_names(folder)), templates)
