"""open_clip's model names as fields of a recipe: the sizes in its model_configs, and what its names imply."""

from dataclasses import dataclass
from typing import Any

from mmpt import config
from mmpt.recipe import load


@dataclass(frozen=True)
class Sizes:
    """Of a CLIP with a vision transformer."""

    embed_dim: int
    image: tuple[int, int, int]
    """Width, depth, heads."""
    text: tuple[int, int, int]
    patch_size: int
    image_size: int = 224
    mlp_ratio: float = 4.0


B, L, H = (768, 12, 12), (1024, 24, 16), (1280, 32, 16)
TEXT_B, TEXT_L, TEXT_H = (512, 12, 8), (768, 12, 12), (1024, 24, 16)
VITS = {
    "ViT-S-32": Sizes(384, (384, 12, 6), (384, 12, 6), 32), "ViT-S-16": Sizes(384, (384, 12, 6), (384, 12, 6), 16),
    "ViT-S-32-alt": Sizes(256, (384, 12, 6), (256, 10, 4), 32),
    "ViT-S-16-alt": Sizes(256, (384, 12, 6), (256, 10, 4), 16),
    "ViT-M-32": Sizes(512, (512, 12, 8), TEXT_B, 32), "ViT-M-16": Sizes(512, (512, 12, 8), TEXT_B, 16),
    "ViT-M-32-alt": Sizes(384, (512, 12, 8), (384, 12, 6), 32),
    "ViT-B-32": Sizes(512, B, TEXT_B, 32), "ViT-B-32-256": Sizes(512, B, TEXT_B, 32, 256),
    "ViT-B-16": Sizes(512, B, TEXT_B, 16),
    "ViT-B-32-plus-256": Sizes(640, (896, 12, 14), (640, 12, 10), 32, 256),
    "ViT-B-16-plus": Sizes(640, (896, 12, 14), (640, 12, 10), 16),
    "ViT-B-16-plus-240": Sizes(640, (896, 12, 14), (640, 12, 10), 16, 240),
    "ViT-L-14": Sizes(768, L, TEXT_L, 14), "ViT-L-14-280": Sizes(768, L, TEXT_L, 14, 280),
    "ViT-L-14-336": Sizes(768, L, TEXT_L, 14, 336), "ViT-L-16": Sizes(768, L, TEXT_L, 16),
    "ViT-L-16-320": Sizes(768, L, TEXT_L, 16, 320),
    "ViT-H-14": Sizes(1024, H, TEXT_H, 14), "ViT-H-14-378": Sizes(1024, H, TEXT_H, 14, 378),
    "ViT-H-16": Sizes(1024, H, TEXT_H, 16),
    "ViT-g-14": Sizes(1024, (1408, 40, 16), TEXT_H, 14, mlp_ratio=4.3637),
    "ViT-bigG-14": Sizes(1280, (1664, 48, 16), (1280, 32, 20), 14, mlp_ratio=4.9231),
    "ViT-e-14": Sizes(1280, (1792, 56, 16), (1280, 36, 20), 14, mlp_ratio=8.5715),
}  # fmt: skip
RESNETS = {
    "RN50": ((3, 4, 6, 3), 64, 224, 1024, TEXT_B), "RN101": ((3, 4, 23, 3), 64, 224, 512, TEXT_B),
    "RN50x4": ((4, 6, 10, 6), 80, 288, 640, (640, 12, 10)), "RN50x16": ((6, 8, 18, 8), 96, 384, 768, TEXT_L),
    "RN50x64": ((3, 15, 36, 10), 128, 448, 1024, (1024, 12, 16)),
}  # fmt: skip
"""(blocks of each stage, bottleneck, image size, embed_dim, text)."""
SIGLIPS = {f"ViT-{size}-16-SigLIP{suffix}": (size, pixels) for size, suffix, pixels in (
    ("B", "", 224), ("B", "-256", 256), ("B", "-384", 384), ("B", "-512", 512), ("L", "-256", 256), ("L", "-384", 384),
)}  # fmt: skip


def recipe_of(model: str, quick_gelu: bool) -> tuple[str, dict[str, Any]]:
    """(recipe, fields of it that differ) of a model's name. ValueError for one that no recipe can be."""
    name = model.replace("/", "-")
    plain = name.removesuffix("-quickgelu")
    activation = "quick_gelu" if quick_gelu or plain != name else "gelu"
    if plain in VITS:
        recipe = {(B, 16): "clip.vit_b16", (L, 14): "clip.vit_l14"}.get(
            (VITS[plain].image, VITS[plain].patch_size), "clip.vit_b32"
        )
        return recipe, _differing(recipe, _vit(VITS[plain], activation))
    if plain in RESNETS:
        return "clip.rn50", _differing("clip.rn50", _resnet(plain, activation))
    if plain in SIGLIPS:
        return "siglip.vit_b16", _differing("siglip.vit_b16", _siglip(*SIGLIPS[plain]))
    known = [*VITS, *RESNETS, *SIGLIPS]
    raise ValueError(f"--model {model}: no recipe has these towers{config.near_miss(plain, known)}")


def _vit(sizes: Sizes, activation: str) -> dict[str, Any]:
    image, text = "method.towers.image", "method.towers.text"
    return (
        _trunk(image, sizes.image, activation)
        | _trunk(text, sizes.text, activation)
        | {
            f"{image}.trunk.mlp_ratio": sizes.mlp_ratio, f"{image}.patch_size": sizes.patch_size,
            f"{image}.image_size": sizes.image_size, "method.towers.embed_dim": sizes.embed_dim,
        }
    )  # fmt: skip


def _resnet(name: str, activation: str) -> dict[str, Any]:
    depths, bottleneck, pixels, embed_dim, text = RESNETS[name]
    image = "method.towers.image"
    return _trunk("method.towers.text", text, activation) | {
        f"{image}.depths": depths, f"{image}.bottleneck": bottleneck, f"{image}.image_size": pixels,
        f"{image}.embed_dim": embed_dim, "method.towers.embed_dim": embed_dim,
    }  # fmt: skip


def _siglip(size: str, pixels: int) -> dict[str, Any]:
    """timm's blocks have the exact GELU, and so has open_clip's text tower."""
    blocks = {"B": B, "L": L}[size]
    out = _trunk("method.image", blocks, "gelu") | _trunk("method.text", blocks, "gelu")
    return out | {"method.image.image_size": pixels}


def _trunk(tower: str, blocks: tuple[int, int, int], activation: str) -> dict[str, Any]:
    values = zip(("width", "depth", "heads", "activation"), (*blocks, activation), strict=True)
    return {f"{tower}.trunk.{name}": value for name, value in values}


def _differing(recipe: str, fields: dict[str, Any]) -> dict[str, Any]:
    ours = {path: value for path, _, value, _ in config.leaves(load(recipe))}
    return {path: value for path, value in fields.items() if ours[path] != value}
