"""Every table of rules: there and back again is the identity, bit for bit, and nothing is left on either side."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmpt.convert import formats
from mmpt.convert.exporting import their_tensors
from mmpt.convert.importing import respelled, take
from mmpt.convert.reading import Source
from mmpt.convert.rules import matches
from mmpt.engine.weights import put, tensors_of
from mmpt.methods.align import ALIGNConfig
from mmpt.methods.clip import CLIPConfig
from mmpt.methods.filip import FILIPConfig
from mmpt.methods.method import Method, MethodConfig
from mmpt.methods.slip import SLIPConfig
from mmpt.models.dual_tower import DualTowerConfig
from mmpt.models.efficientnet import EfficientNetConfig
from mmpt.models.image import ViTConfig
from mmpt.models.projector import ProjectorConfig
from mmpt.models.resnet import ResNetConfig
from tests.methods.tiny import CONFIGS, IMAGE_SIZE, READ, SEEN, TEXT, TOWERS, TRUNK

RESNET = ResNetConfig((1, 2, 1, 1), 8, "modified", "attention", 12, 32)
EFFICIENT = EfficientNetConfig(0.1, 0.1, 32, top=False)
BARE = replace(SEEN, norm_before=False)
METHODS: dict[str, MethodConfig] = {
    **{name: CONFIGS[name] for name in ("clip", "filip", "siglip", "vilt", "albef local", "uniter mlm", "meter")},
    "clip, resnet": CLIPConfig(DualTowerConfig(RESNET, TEXT, 12, project_image=False)),
    "clip, bert": CLIPConfig(DualTowerConfig(TOWERS.image, READ, 12)),
    "clip, timm": CLIPConfig(DualTowerConfig(BARE, TEXT, 12)),
    "slip, timm": SLIPConfig(DualTowerConfig(BARE, TEXT, 12), projector=ProjectorConfig(10, 6)),
    "align, efficientnet": ALIGNConfig(
        DualTowerConfig(EFFICIENT, READ, EFFICIENT.width, project_image=False, text_projection_bias=True)
    ),
    "declip clip": CLIPConfig(DualTowerConfig(TOWERS.image, TEXT, 12, text_projection_bias=True)),
    "filip, patches before the norm": FILIPConfig(
        DualTowerConfig(
            ViTConfig(TRUNK, IMAGE_SIZE, 4, norm_after=False),
            TEXT,
            12,
            image_projection_bias=True,
            text_projection_bias=True,
        )
    ),
}
WHOLE = [
    ("openai", "clip"), ("openai", "filip"), ("openai", "clip, resnet"), ("open_clip", "clip"), ("open_clip", "filip"),
    ("open_clip_siglip", "siglip"), ("hf_clip", "clip"), ("hf_clip", "filip"), ("hf_clip", "clip, bert"),
    ("hf_siglip", "siglip"), ("chinese_clip", "clip, bert"), ("wukong", "filip"), ("slip", "clip, timm"),
    ("hf_vilt", "vilt"), ("vilt", "vilt"), ("albef", "albef local"), ("uniter", "uniter mlm"), ("slip", "slip, timm"),
    ("hf_align", "align, efficientnet"), ("declip", "declip clip"), ("declip", "filip, patches before the norm"),
]  # fmt: skip
"""(format, method) where the format holds all of the method."""


def built(name: str, seed: int) -> Method:
    """A method in which no two tensors are alike."""
    torch.manual_seed(seed)
    method = METHODS[name].build().eval()
    with torch.no_grad():
        for value in tensors_of(method).values():
            value.copy_(torch.randn_like(value) if value.is_floating_point() else torch.full_like(value, seed + 3))
    return method


@pytest.mark.parametrize(("format_name", "name"), WHOLE)
def test_there_and_back(format_name: str, name: str) -> None:
    format, ours, other = formats.named(format_name), built(name, 0), built(name, 1)
    theirs, left = their_tensors(format, ours, partial=False)
    assert not left
    source = Source(Path("theirs"), theirs, {}, {})
    account = take(source, format, other, tensors_of(other), (), partial=False)
    put(other, account.loaded)
    kept = {n for n in tensors_of(ours) if re.fullmatch(format.optional, n)} - account.loaded.keys()
    assert account.loaded.keys() | kept == tensors_of(ours).keys() and not account.left and not account.resized
    for tensor_name, value in tensors_of(ours).items():
        if tensor_name not in kept:
            assert torch.equal(tensors_of(other)[tensor_name], value), tensor_name


PARTS = [
    ("hf_bert", "clip, bert"), ("hf_bert", "albef local"), ("hf_bert", "uniter mlm"), ("hf_bert", "meter"),
    ("hf_roberta", "meter"), ("hf_roberta", "clip, bert"),
    ("hf_vit", "clip, timm"), ("timm_vit", "clip, timm"), ("timm_vit", "vilt"), ("timm_vit", "albef local"),
    ("timm_vit", "meter"),
]  # fmt: skip
"""(format, method) where the format holds a part of the method."""


@pytest.mark.parametrize(("format_name", "name"), PARTS)
def test_parts_there_and_back(format_name: str, name: str) -> None:
    format, ours, other = formats.named(format_name), built(name, 0), built(name, 1)
    theirs, left = their_tensors(format, ours, partial=True)
    source = Source(Path("theirs"), theirs, {}, {})
    account = take(source, format, other, tensors_of(other), (), partial=True)
    given = {match.ours for match in matches(format.rules(ours), tensors_of(ours))}
    assert left and given and not account.left and given == account.loaded.keys() - set(left)
    for tensor_name in given:
        assert torch.equal(account.loaded[tensor_name], tensors_of(ours)[tensor_name]), tensor_name


@pytest.mark.parametrize(("format_name", "name"), WHOLE)
def test_a_format_recognises_itself_and_no_other_does(format_name: str, name: str) -> None:
    format = formats.named(format_name)
    theirs, _ = their_tensors(format, built(name, 0), partial=False)
    marked = theirs | ({"input_resolution": torch.tensor(16)} if format_name == "openai" else {})
    assert formats.recognised(Source(Path("theirs"), marked, {}, {})).name == format_name
    everything = respelled(Source(Path("theirs"), theirs, {}, {}), format)
    assert everything.keys() == theirs.keys() - {n for n, _ in format.repeats}, "our own spelling is the table's"
