"""Every method at a size for tests, and batches of pairs for them."""

from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from mmpt.batch import (
    Batch,
    MaskedRegions,
    MaskedWords,
    Partners,
    Pictures,
    Regions,
    Tokens,
    concatenate,
    pack,
    part_of_pictures,
)  # fmt: skip
from mmpt.data.views import ViewConfig, draw_views
from mmpt.methods.albef import ALBEF, ALBEFConfig
from mmpt.methods.align import ALIGNConfig
from mmpt.methods.clip import CLIPConfig
from mmpt.methods.filip import FILIPConfig
from mmpt.methods.meter import METERConfig
from mmpt.methods.method import Method, MethodConfig
from mmpt.methods.siglip import SigLIPConfig
from mmpt.methods.slip import SLIPConfig
from mmpt.methods.uniter import UNITERConfig
from mmpt.methods.vilt import ViLTConfig
from mmpt.models.bert import BertConfig, BertEmbeddingConfig
from mmpt.models.dual_tower import DualTowerConfig
from mmpt.models.fusion import FusionConfig
from mmpt.models.image import ViTConfig
from mmpt.models.projector import ProjectorConfig
from mmpt.models.regions import RegionEmbeddingConfig
from mmpt.models.resnet import ResNetConfig
from mmpt.models.text import TextTransformerConfig
from mmpt.models.transformer import TransformerConfig
from mmpt.ops.contrast.loss import ContrastConfig

VOCABULARY, MAX_TOKENS, IMAGE_SIZE = 40, 10, 16
TRUNK = TransformerConfig(width=16, depth=2, heads=2)
TEXT = TextTransformerConfig(TRUNK, VOCABULARY, MAX_TOKENS)
TOWERS = DualTowerConfig(ViTConfig(TRUNK, IMAGE_SIZE, 4), TEXT, embed_dim=12)

WORDS = BertEmbeddingConfig(16, VOCABULARY, MAX_TOKENS, dropout=0.0)
POST = TransformerConfig(width=16, depth=2, heads=2, norm="post", init="bert")
READ = BertConfig(WORDS, POST, MAX_TOKENS)
FEATURES, CLASSES = 6, 5
REGIONS = RegionEmbeddingConfig(16, FEATURES, CLASSES, dropout=0.0)
SEEN = ViTConfig(TRUNK, IMAGE_SIZE, 4, patch_bias=True, norm_before=False)
PATCHES = ViTConfig(
    TRUNK, IMAGE_SIZE, 4, patch_bias=True, norm_before=False, image_resize="shorter_side", longest_side=32
)

POOLED = ResNetConfig((1, 1, 1, 1), bottleneck=2, image_size=32)
UNITER = UNITERConfig(POST, WORDS, REGIONS, MAX_TOKENS, class_weight=1)

CONFIGS: dict[str, MethodConfig] = {
    "clip": CLIPConfig(TOWERS),
    "clip at the cap": CLIPConfig(TOWERS, initial_temperature=0.01),
    "clip ring": CLIPConfig(TOWERS, contrast=ContrastConfig("ring", score_bytes=8)),
    "filip": FILIPConfig(TOWERS),
    "filip ring": FILIPConfig(TOWERS, contrast=ContrastConfig("ring")),
    "filip found again": FILIPConfig(TOWERS, winners="recompute"),
    "filip at the cap": FILIPConfig(TOWERS, initial_temperature=0.01),
    "filip without ends": FILIPConfig(TOWERS, text_special_tokens=False),
    "filip global": FILIPConfig(TOWERS, token_keep_ratio=0.4, scope="global"),
    "filip local": FILIPConfig(TOWERS, token_keep_ratio=0.4, scope="local"),
    "siglip": SigLIPConfig(
        ViTConfig(TRUNK, IMAGE_SIZE, 4, class_token=False, patch_bias=True, norm_before=False), TEXT, initial_bias=-2.0
    ),
    "siglip ring": SigLIPConfig(
        ViTConfig(TRUNK, IMAGE_SIZE, 4, class_token=False, patch_bias=True, norm_before=False),
        TEXT,
        initial_bias=-2.0,
        contrast=ContrastConfig("ring", score_bytes=8),
    ),
    "filip zero pads": FILIPConfig(TOWERS, zero_pads=True),
    "align": ALIGNConfig(DualTowerConfig(POOLED, READ, 64, project_image=False, text_projection_bias=True)),
    "slip": SLIPConfig(TOWERS, projector=ProjectorConfig(10, 6), view_weight=0.7),
    "meter": METERConfig(SEEN, READ, POST),
    "vilt": ViLTConfig(PATCHES, WORDS, MAX_TOKENS),
    **{
        f"uniter {task}": UNITERConfig(POST, WORDS, REGIONS, MAX_TOKENS)
        for task in ("mlm", "itm", "mrfr", "mrc", "mrckl")
    },
    "albef local": ALBEFConfig(SEEN, READ, FusionConfig(POST, 16), 12, queue=12, alpha_ramp_steps=2),
    "albef global": ALBEFConfig(SEEN, READ, FusionConfig(POST, 16), 12, queue=12, alpha_ramp_steps=2, scope="global"),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> Method:
    """The same weights in every process; every one of them matters."""
    torch.manual_seed(0)
    method = CONFIGS[name].build()
    with torch.no_grad():
        for parameter_name, parameter in method.named_parameters():
            if "logit_" not in parameter_name and "temperature" not in parameter_name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    method.to(dtype)
    if method.teacher is not None:
        method.make_teacher()
    return with_memory(method, seed=1)


def with_memory(method: Method, seed: int) -> Method:
    """A method in the middle of training: its momentum copy differs from its student, its queue has begun."""
    generator = torch.Generator().manual_seed(seed)
    if method.teacher is not None:
        dtype = next(method.parameters()).dtype
        with torch.no_grad():
            for parameter in method.teacher.to(dtype).parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(dtype), alpha=0.05)
    if isinstance(method, ALBEF):
        method.steps.fill_(1)  # type: ignore[operator]  # half way up the ramp of alpha
    return method


def batch(name: str, pairs: int, first: int, count: int, seed: int = 0) -> Batch:
    """Pairs first to first + count of a global batch of `pairs`; captions of mixed length, filled up for SigLIP."""
    kind = name.split()[0]
    generator = torch.Generator().manual_seed(seed)
    size = CONFIGS[name].inputs().image_size or IMAGE_SIZE if name in CONFIGS else IMAGE_SIZE
    images = torch.randint(0, 256, (pairs, 3, size, size), dtype=torch.uint8, generator=generator)
    shortest = 3 if kind in FUSION else 1  # [CLS], a word, [SEP]
    lengths = torch.randint(shortest, MAX_TOKENS + 1, (pairs,), generator=generator).tolist()
    texts = [torch.randint(1, VOCABULARY, (n,), generator=generator) for n in lengths]
    if kind == "siglip":
        texts = [torch.cat([text, text.new_zeros(MAX_TOKENS - len(text))]) for text in texts]
    whole = Batch(Pictures(images), pack(texts), torch.arange(pairs), ("",) * pairs)
    if kind == "slip":
        views = torch.randint(0, 256, (pairs, 2, 3, size, size), dtype=torch.uint8, generator=generator)
        random = partial(np.random.default_rng, seed)
        rows = [draw_views(ViewConfig(), lambda _: random(), 2) for _ in range(pairs)]
        whole = replace(whole, views=views, view_parameters=torch.from_numpy(np.stack(rows)))
    return (whole if kind not in FUSION else with_tasks(name, whole, generator)).part(first, first + count)


FUSION = ("vilt", "uniter", "albef", "meter")


def with_tasks(name: str, batch: Batch, generator: torch.Generator) -> Batch:
    """What fusion models want of the loader; the words and regions to be guessed are unevenly spread, and the last
    quarter of the pairs has none."""
    kind, pairs = name.split()[0], len(batch)
    chosen = torch.rand(len(batch.text.x), generator=generator) < 0.4
    chosen &= batch.text.sequence_index() < pairs * 3 // 4
    random = torch.randint(1, VOCABULARY, chosen.shape, generator=generator)
    words = MaskedWords(torch.where(chosen, random, batch.text.x), chosen, int(chosen.sum()))
    matches = torch.rand(pairs, generator=generator) < 0.5
    batch = replace(batch, masked_words=words, draws=torch.rand(pairs, 2, dtype=torch.float64, generator=generator))
    pictures, others = batch.pictures, torch.randperm(pairs, generator=generator)
    if kind == "vilt":
        pictures = whole_images(pairs, generator)
    if kind == "uniter":
        pictures = found_regions(pairs, generator)
    shown = [i if matches[i] else int(others[i]) for i in range(pairs)]
    mixed = [part_of_pictures(pictures, i, i + 1) for i in shown]
    batch = replace(batch, pictures=pictures, partners=Partners(join_pictures(mixed), matches))
    if kind == "uniter":
        assert pictures.regions is not None
        guessed = torch.rand(len(pictures.regions.boxes), generator=generator) < 0.4
        guessed &= pictures.regions.features.sequence_index() < pairs * 3 // 4
        batch = replace(batch, masked_regions=MaskedRegions(guessed, int(guessed.sum())), task=name.split()[1])
    return batch


def whole_images(count: int, generator: torch.Generator) -> Pictures:
    """Of 1 to 3 by 1 to 3 patches."""
    grids = torch.randint(1, 4, (count, 2), generator=generator)
    patches = pack(
        [torch.randint(0, 256, (int(n), 3 * 16), dtype=torch.uint8, generator=generator) for n in grids.prod(1)]
    )
    return Pictures(patches=patches, places=patches.position(), grids=grids)


def found_regions(count: int, generator: torch.Generator) -> Pictures:
    numbers = torch.randint(1, 5, (count,), generator=generator).tolist()
    features = pack([torch.randn(n, FEATURES, generator=generator) for n in numbers])
    boxes, classes = (
        torch.rand(sum(numbers), 7, generator=generator),
        torch.rand(sum(numbers), CLASSES, generator=generator),
    )
    return Pictures(regions=Regions(features, boxes, classes / classes.sum(1, keepdim=True)))


def join_pictures(parts: list[Pictures]) -> Pictures:
    """The images of all parts, in order."""

    def joined(field: str) -> Any:
        values = [getattr(part, field) for part in parts]
        if values[0] is None:
            return None
        if isinstance(values[0], Regions):
            features = concatenate([value.features for value in values])
            return Regions(features, *(torch.cat([value[i] for value in values]) for i in (1, 2)))
        return concatenate(values) if isinstance(values[0], Tokens) else torch.cat(values)

    return Pictures(**{field.name: joined(field.name) for field in fields(Pictures)})
