"""What a recipe will need on each device, before anything runs: bytes by part, FLOPs by part, and what would help.

What autograd keeps is not guessed: for towers that are transformers one block of the real width runs here, for other
towers and for methods that fuse a few pairs pass through the whole method (plan_sample.py). The rest is arithmetic over
the recipe. Not counted: the allocator's fragmentation, the libraries' workspaces, the loader's memory; and, of a method
that was measured, the one block that checkpointed activations compute again at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch

from mmpt.engine.optim import freeze
from mmpt.methods.clip import CLIPConfig
from mmpt.methods.filip import FILIPConfig
from mmpt.methods.method import MethodConfig
from mmpt.methods.siglip import SigLIPConfig
from mmpt.models.image import ViTConfig
from mmpt.models.text import TextTransformerConfig
from mmpt.models.transformer import TransformerConfig
from mmpt.ops.contrast.loss import ContrastConfig
from mmpt.ops.late_interaction.op import FOUND_AGAIN_BYTES, STORED_BYTES
from mmpt.ops.late_interaction.winners import index_type
from mmpt.plan_sample import FEW, MORE, Sample, sample_of, saved_bytes_per_token
from mmpt.recipe import Recipe


class Part(NamedTuple):
    name: str
    bytes: float
    why: str
    """What it is a product of."""


class Work(NamedTuple):
    name: str
    flops: float
    """Per step and device; a multiplication with its addition counts 2."""


@dataclass(frozen=True)
class Setting:
    """A recipe on so many devices, with texts of so many tokens on average, special tokens included."""

    recipe: Recipe
    devices: int
    mean_tokens: float

    @property
    def pairs(self) -> int:
        """B, per device and step."""
        return self.recipe.run.global_batch // self.devices

    @property
    def micro_batches(self) -> int:
        return self.recipe.micro_batches(self.devices)

    @property
    def micro_pairs(self) -> int:
        """Pairs of a micro-batch: an equal share of the step's, or what a budget of tokens holds."""
        budget, inputs = self.recipe.engine.max_micro_batch_tokens, self.recipe.method.inputs()
        if budget < 1:
            return self.pairs // self.micro_batches
        places = inputs.regions.most if inputs.regions else inputs.kept_patches
        return min(self.pairs, max(1, int(budget / (places + min(self.mean_tokens, inputs.max_text_tokens)))))

    @property
    def half(self) -> int:
        """Bytes of a number in the compute type."""
        return 4 if self.recipe.engine.precision == "fp32" else 2


class Tower(NamedTuple):
    name: str
    trunk: TransformerConfig
    tokens: float
    """Of one sequence, on average."""
    inputs: int
    """Numbers per token that enter the tower's embedding product; 0 where it is a table."""


def has_formulas(config: Any) -> bool:
    """Whether FLOPs and activations follow from the recipe: two transformers and nothing else that is large."""
    if not isinstance(config, CLIPConfig | FILIPConfig | SigLIPConfig):
        return False
    config = config if isinstance(config, SigLIPConfig) else config.towers
    return isinstance(config.image, ViTConfig) and isinstance(config.text, TextTransformerConfig)


def towers(setting: Setting) -> list[Tower]:
    """Of a method that `has_formulas`."""
    config: Any = setting.recipe.method
    pads = isinstance(config, SigLIPConfig)
    config = config if pads else config.towers
    image, text = config.image, config.text
    tokens = text.max_tokens if pads else min(setting.mean_tokens, text.max_tokens)
    return [
        Tower("image tower", image.trunk, image.kept_patches + image.class_token, 3 * image.patch_size**2),
        Tower("text tower", text.trunk, tokens, 0),
    ]


def memory(setting: Setting) -> list[Part]:
    """Bytes per device by part, at their highest; the parts do not all peak at the same moment."""
    return [*_state(setting), *_activations(setting), *_loss_memory(setting)]


def _state(setting: Setting) -> Iterator[Part]:
    """Parameters, gradients and optimizer as DeepSpeed holds them (Rajbhandari et al. 2020, figure 1)."""
    engine, ranks = setting.recipe.engine, setting.devices
    count, trained, copied, remembered = sizes_of(setting.recipe.method, setting.recipe.optim.lock)
    stage = engine.zero_stage
    each = 4 if stage == 0 else setting.half  # stage 0 keeps fp32 and casts on the fly
    shared = f"/ {ranks}"
    yield Part("parameters", each * (count / ranks if stage == 3 else count), f"{count:,} x {each} bytes" + (
        f" {shared}" if stage == 3 else ""))  # fmt: skip
    if stage == 3:
        live = min(count, 1_000_000_000)
        yield Part("parameters gathered", each * live, "of the layers at work; all, up to a billion")
    yield Part("gradients", each * (trained / ranks if stage >= 2 else trained), f"{trained:,} x {each} bytes" + (
        f" {shared}" if stage >= 2 else ""))  # fmt: skip
    per = 8 if stage == 0 else 12
    what = "two moments in fp32" + ("" if stage == 0 else " and the weights")
    yield Part("optimizer", per * trained / (ranks if stage else 1), what + (f" {shared}" if stage else ""))
    if copied:
        yield Part("momentum copy", 4 * copied, f"{copied:,} x 4 bytes on every device")
    if remembered:
        yield Part("buffers", remembered, "queues, running statistics")
    if stage:
        yield Part("buckets", 2 * setting.half * min(trained, engine.bucket_elements), "engine.bucket_elements, twice")


@cache
def sizes_of(config: MethodConfig, lock: str) -> tuple[int, int, int, int]:
    """Of all parameters, of those that are trained, of the momentum copy's parameters; and the buffers' bytes."""
    with torch.device("meta"):
        method = config.build()
    freeze(method, lock)
    parameters = list(method.parameters())
    copied = sum(p.numel() for p in method.teacher.parameters()) if method.teacher else 0
    return (
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in parameters if p.requires_grad),
        copied,
        sum(buffer.nbytes for buffer in method.buffers()),
    )


def _computes_in(setting: Setting) -> tuple[torch.dtype, bool]:
    """The type of parameters, and whether they are cast to bf16 on the fly."""
    casts = setting.recipe.engine.zero_stage == 0 and setting.half == 2
    return torch.float32 if casts or setting.half == 4 else torch.bfloat16, casts


def _sample(setting: Setting) -> Sample:
    recipe, (dtype, casts) = setting.recipe, _computes_in(setting)
    whole = not hasattr(recipe.method, "towers")  # the loss of two towers grows with the batch: formulas below
    return sample_of(recipe.method, max(1, round(setting.mean_tokens)), whole, recipe.optim.lock, dtype, casts)


def _activations(setting: Setting) -> Iterator[Part]:
    pairs = setting.micro_pairs
    if not has_formulas(setting.recipe.method):
        kept = _sample(setting).bytes
        yield Part("activations", pairs * kept, f"{pairs} pairs x {kept:,.0f} bytes, as measured on {FEW} and {MORE}")
        return
    dtype, casts = _computes_in(setting)
    for tower in towers(setting):
        width, depth, tokens = tower.trunk.width, tower.trunk.depth, pairs * tower.tokens
        block = saved_bytes_per_token(tower.trunk, max(1, round(tower.tokens)), dtype, casts)
        if tower.trunk.checkpoint_activations:
            kept = depth * width * setting.half + block
            why = f"{depth} block inputs and one block"
        else:
            kept, why = depth * block, f"{depth} blocks x {block:,.0f} bytes a token"
        yield Part(f"activations, {tower.name}", tokens * kept, f"{pairs} x {tower.tokens:g} tokens x {why}")


class Meeting(NamedTuple):
    """How features meet in the loss."""

    width: int
    image_tokens: float
    text_tokens: float
    """Vectors per sequence: 1 where a pair's score is one product."""
    contrast: ContrastConfig


def meeting(setting: Setting) -> Meeting:
    config: Any = setting.recipe.method
    if isinstance(config, SigLIPConfig):
        return Meeting(config.image.trunk.width, 1, 1, config.contrast)
    if not isinstance(config, FILIPConfig):
        return Meeting(config.towers.embed_dim, 1, 1, config.contrast)
    text = min(setting.mean_tokens, config.inputs().max_text_tokens) - (0 if config.text_special_tokens else 2)
    share = config.token_keep_ratio
    return Meeting(
        config.towers.embed_dim,
        share * config.towers.image.inputs().kept_patches,
        max(1, share * text),
        config.contrast,
    )


def _meets_in_loss(config: Any) -> bool:
    return isinstance(config, SigLIPConfig) or hasattr(config, "towers")


def _loss_memory(setting: Setting) -> Iterator[Part]:
    if not _meets_in_loss(setting.recipe.method):
        return
    meet, pairs, count = meeting(setting), setting.pairs, setting.recipe.run.global_batch
    ring = meet.contrast.exchange == "ring"
    number, columns = setting.half * meet.width, pairs if ring else count
    own = pairs * (meet.image_tokens + meet.text_tokens) * number
    yield Part("features and their gradients", 2 * own, f"{pairs} pairs x {meet.width} numbers a vector")
    texts, why = (4, "those under way, theirs in fp32") if ring else (2, "with their gradients")
    if setting.devices > 1:
        size = columns * meet.text_tokens * number
        yield Part("texts of other devices", texts * size, f"{columns:,} x {meet.text_tokens:g} vectors, {why}")
    scores = 8.0 * pairs * columns
    yield Part("scores", min(scores, meet.contrast.score_bytes), f"8 bytes x {pairs} images x {columns:,} texts")
    if isinstance(setting.recipe.method, FILIPConfig):
        winners = winners_of(setting, columns)
        stored = setting.recipe.method.winners == "store" or (
            setting.recipe.method.winners == "auto" and winners <= STORED_BYTES
        )
        planned = winners if stored else min(winners, FOUND_AGAIN_BYTES)
        yield Part("winners", planned, "stored" if stored else f"found again a part at a time; all: {gib(winners)} GiB")


def winners_of(setting: Setting, columns: int) -> float:
    """Bytes of where every maximum of this device's images with `columns` texts was found."""
    meet, longest = meeting(setting), setting.recipe.method.inputs()
    of_patches = meet.image_tokens * index_type(longest.max_text_tokens).itemsize
    of_words = meet.text_tokens * index_type(longest.kept_patches).itemsize
    return setting.pairs * columns * (of_patches + of_words)


def work(setting: Setting, again: bool = True) -> list[Work]:
    """FLOPs per step and device, by part: matrix products only. again: count what is computed again to save memory.

    A block: 24 D^2 for each token and 4 L D for its attention (Kaplan et al. 2020, table 1); a step is three forwards,
    one more where activations or features are computed twice; a tower that is locked has no backward.
    """
    out, lock = [], setting.recipe.optim.lock
    if not has_formulas(setting.recipe.method):
        sample = _sample(setting)
        cached = again and sample.couples_pairs and setting.micro_pairs < setting.pairs
        out.append(Work("forward and backward", setting.pairs * sample.flops * (4 / 3 if cached else 1)))
    for tower in towers(setting) if has_formulas(setting.recipe.method) else ():
        width, depth, tokens = tower.trunk.width, tower.trunk.depth, setting.pairs * tower.tokens
        mlp = 4 * tower.trunk.mlp_ratio * width**2
        block = 8 * width**2 + mlp + 4 * tower.tokens * width
        locked = lock == "both" or (lock != "none" and tower.name.startswith(lock))
        passes = (1 if locked else 3) + again * (setting.micro_batches > 1)
        passes += again * (tower.trunk.checkpoint_activations and not locked)
        out.append(Work(tower.name, passes * tokens * (depth * block + 2 * tower.inputs * width)))
    if not _meets_in_loss(setting.recipe.method):
        return out
    meet, count = meeting(setting), setting.recipe.run.global_batch
    once = 2.0 * setting.pairs * count * meet.image_tokens * meet.text_tokens * meet.width
    ring = meet.contrast.exchange == "ring" and setting.devices > 1
    twice = ring or 8 * setting.pairs * count > meet.contrast.score_bytes
    found_again = any(part.name == "winners" and part.why != "stored" for part in _loss_memory(setting))
    out.append(Work("similarity", once * (3 + again * (twice or found_again))))
    return out


def gib(count: float) -> str:
    return f"{count / (1 << 30):.2f}"
