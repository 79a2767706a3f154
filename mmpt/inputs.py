"""What a method wants from the loader: derived from the model's configuration, so that each fact has one knob."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RegionSpec:
    """Regions of an image from its `.regions.npz` file."""

    width: int = 2048
    """F, numbers in a region's feature vector."""
    classes: int = 0
    """C, classes of the detector's distribution, background included; 0 leaves it in the file."""
    most: int = 100
    """The most regions of an image that are used: those the detector is surest of."""


@dataclass(frozen=True, kw_only=True)
class PictureSpec:
    """What an image tower takes."""

    image_size: int
    """Height and width of the crop, in pixels; of extra views too. The shorter side where image_resize says so."""
    patches: int = 0
    """Patches per image before any is dropped; 0 where the image tower has no patches."""
    kept_patches: int = 0
    """Patches kept per image in training (FLIP's patch dropout); equal to `patches` where all are kept."""
    image_resize: Literal["square", "shorter_side", "native"] = "square"
    """`square` crops; or whole images of any shape as packed patches: resized so that the shorter side is image_size,
    or as large as they are. Both within longest_side, their sides cut down to multiples of patch_size."""
    longest_side: int = 0
    """Most pixels of a side of a whole image, where those are wanted."""
    patch_size: int = 0
    """Side of a patch in pixels, where whole images are wanted."""
    most_patches: int = 0
    """Patches of a whole image that are kept in training, drawn at random; 0 keeps all."""
    regions: RegionSpec | None = None
    """Regions in place of pixels; images are then not decoded."""

    def __post_init__(self):
        if self.image_resize == "square":
            return
        if self.patch_size < 1 or self.longest_side < self.patch_size:
            raise ValueError(
                f"images resized to {self.image_resize!r} want a patch_size ({self.patch_size}) of 1 or more "
                f"and a longest_side ({self.longest_side}) of at least a patch"
            )
        if self.kept_patches != self.patches:
            raise ValueError(f"patches cannot be dropped from images resized to {self.image_resize!r}")


@dataclass(frozen=True, kw_only=True)
class TextSpec:
    """What a text tower takes."""

    max_text_tokens: int
    """Captions are cut to this many tokens, special tokens included."""
    vocab_size: int
    """Rows of the token embedding; the tokenizer may not produce an id beyond it."""
    text_padding: Literal["none", "max"] = "none"
    """`max`: pads are tokens like any other and fill each caption to max_text_tokens (SigLIP as published)."""


@dataclass(frozen=True, kw_only=True)
class WordMasking:
    """Which words are to be guessed, after BERT (Devlin et al. 2019, section 3.1): of those chosen 80 % become [MASK],
    10 % a random id and 10 % stay."""

    share: float = 0.15
    """Each token is chosen with this probability."""
    whole_words: bool = False
    """All tokens of a word together (ViLT, Kim et al. 2021, section 3.4)."""
    at_least_one: bool = False
    """Choose one where the draw chose none (UNITER)."""
    last_token: bool = False
    """Whether the last special token, [SEP], may be chosen (ALBEF's code does); the first never is."""

    def __post_init__(self):
        if not 0 < self.share < 1:
            raise ValueError(f"the share of masked words lies between 0 and 1, got {self.share}")


@dataclass(frozen=True, kw_only=True)
class InputSpec(PictureSpec, TextSpec):
    """Both towers' inputs, and what the objectives add."""

    extra_views: int = 0
    """Further crops of each image, for losses between views (SLIP wants 2)."""
    masked_words: WordMasking | None = None
    masked_regions: float = 0.0
    """Each region is to be guessed with this probability; at least one of an image is, where this is above 0."""
    partners: bool = False
    """Pictures for image-text matching: half of them another sample's, drawn from the whole data set."""
    draws: int = 0
    """Uniform numbers per sample for what the method itself draws."""
    tasks: tuple[tuple[str, int], ...] = ()
    """Tasks, one per optimizer step, and how often each is drawn: (name, integer weight). What a task does not need of
    the above is left out of its batches: `masked_words` belong to the task "mlm", `partners` to "itm",
    `masked_regions` to those whose names begin with "mr"."""


def combined(pictures: PictureSpec, text: TextSpec) -> InputSpec:
    """The inputs of an image tower and a text tower together."""
    return InputSpec(**vars(pictures), **vars(text))
