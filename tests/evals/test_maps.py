"""Maps of words over places: against finite differences, attention written out, and models made so that it is known."""

import json
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.functional import normalize
from webdataset.writer import TarWriter

from data_tools.index import index
from data_tools.scenes import make_sample
from mmpt.batch import Pictures, Regions, Tokens, pack, pack_equal, part_of_tokens, unpack
from mmpt.data.loader import DataConfig
from mmpt.evals.alignment import grid_centres
from mmpt.evals.maps import aligned, centres
from mmpt.evals.maps_dual import grad_cam_maps, projected_maps, seeing
from mmpt.evals.maps_fused import WordRows, attention_in_sight, cross_attention_maps, transport_maps
from mmpt.evals.scenes import WordMatch, matches_of, word_patch, word_patch_scores
from mmpt.evals.suite import EvalConfig
from mmpt.methods.albef import ALBEF
from mmpt.methods.clip import CLIPConfig
from mmpt.methods.meter import METER
from mmpt.methods.method import MethodConfig
from mmpt.methods.vilt import ViLT
from mmpt.models.dual_tower import DualTowerConfig
from mmpt.models.image import ViT
from mmpt.models.regions import RegionEmbeddingConfig
from mmpt.models.resnet import ResNet, ResNetConfig
from mmpt.ops.attention import attention
from mmpt.recipe import load
from tests.evals.test_suite import WITH_CLS
from tests.methods import tiny
from tests.methods.tiny import CONFIGS, POOLED, TEXT, batch, build

ATTENDED = ResNetConfig((1, 1, 1, 1), 2, "modified", "attention", 12, 64)


def one_image(size: int) -> Pictures:
    return Pictures(torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8, generator=torch.Generator()))


def gradient_by_differences(score: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """d score / d x, number by number."""
    eps, out = 1e-6, torch.zeros(x.shape, dtype=x.dtype)
    for i in range(out.numel()):
        step = torch.zeros(out.numel(), dtype=x.dtype)
        step[i] = eps
        out.view(-1)[i] = (score(x + step.view(x.shape)) - score(x - step.view(x.shape))) / (2 * eps)
    return out


@torch.no_grad()
def test_grad_cam_of_a_class_token_is_that_of_finite_differences() -> None:
    method = build("clip", torch.float64).eval()
    picture, sees = one_image(16), seeing(method)  # type: ignore[arg-type]
    tower, texts = method.towers.image, normalize(torch.randn(2, 12, dtype=torch.float64), dim=1)
    x = tower.embedding(picture)
    x = tower.trunk.blocks[0](tower.ln_pre(x.x), x)  # of two blocks
    assert isinstance(tower, ViT) and len(x) == 17
    sequence = pack_equal(x[None])
    found = grad_cam_maps(sees, picture, texts)
    for text, heat in zip(texts, found, strict=True):

        def cosine(x: Tensor, text: Tensor = text) -> Tensor:
            last = tower.ln_post(tower.trunk.blocks[1](x, sequence))[0]
            return normalize(last @ method.towers.image_projection.weight.T, dim=0) @ text

        weights = gradient_by_differences(cosine, x)[1:].mean(0)
        expected = [max(0.0, float(weights @ place)) for place in x[1:]]
        assert heat.tolist() == pytest.approx(expected, abs=1e-6) and max(expected) > 0


@torch.no_grad()
@pytest.mark.parametrize("name", ["siglip", "align"])
def test_grad_cam_of_pooled_places_is_that_of_finite_differences(name: str) -> None:
    method = build(name, torch.float64).eval()
    sees = seeing(method)  # type: ignore[arg-type]
    picture = one_image(16)
    if name == "align":  # with more than one place
        method.towers.image = replace(POOLED, image_size=64).build().double().eval()
        sees, picture = seeing(method), one_image(64)  # type: ignore[arg-type]
    tokens = sees.tower(picture)
    text = normalize(torch.randn(1, sees.read(tokens).shape[1], dtype=torch.float64), dim=1)
    gradient = gradient_by_differences(lambda x: sees.read(tokens.with_x(x))[0] @ text[0], tokens.x)
    expected = (tokens.x @ gradient.mean(0)).clamp(min=0)
    torch.testing.assert_close(grad_cam_maps(sees, picture, text)[0].double(), expected, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_projected_places_are_late_interaction_s_and_values_of_attention() -> None:
    texts = normalize(torch.randn(3, 12), dim=1)
    method = build("clip").eval()
    own = method.towers.image_tokens(one_image(16)).x
    torch.testing.assert_close(projected_maps(seeing(method), one_image(16), texts), texts @ own.T)  # type: ignore[arg-type]
    towers = DualTowerConfig(ATTENDED, TEXT, 12, project_image=False)
    method, picture = CLIPConfig(towers).build().eval(), one_image(64)
    tower = method.towers.image
    assert isinstance(tower, ResNet) and tower.pooling is not None
    places, pooling = tower(picture).x, tower.pooling
    for place, heat in enumerate(projected_maps(seeing(method), picture, texts).T):  # it alone is looked at
        x = (places[place] + pooling.positions[1 + place])[None]
        query = pooling.q(torch.randn(1, x.shape[1])).view(1, pooling.heads, -1)
        key, value = pooling.kv(x).view(1, 2, pooling.heads, -1).unbind(1)
        summary = pooling.out(attention(query, key, value, pack_equal(query[None])).flatten(1))
        torch.testing.assert_close(heat, texts @ normalize(summary[0], dim=0))


def pairs_of(name: str, dtype: torch.dtype) -> tuple[ALBEF | METER, Tokens, Tokens]:
    """Three captions of different lengths with an image each, as they meet."""
    method = build(name, dtype).eval()
    assert isinstance(method, (ALBEF, METER))
    pairs = batch(name, 3, 0, 3)
    return method, method.encode_image(pairs.pictures), method.encode_text(pairs.text)


@torch.no_grad()
@pytest.mark.parametrize("name", ["albef local", "meter"])
def test_cross_attention_is_that_of_the_block_and_its_gradient_that_of_differences(name: str) -> None:
    method, image, text = pairs_of(name, torch.float64)
    block = (method.encoders.fusion.blocks if isinstance(method, ALBEF) else method.fusion.text_blocks)[0]
    plain = method.score_pairs(image, text)
    with attention_in_sight(block, text, image) as found:
        torch.testing.assert_close(method.score_pairs(image, text), plain)
    weights = found[0]
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    torch.testing.assert_close(method.score_pairs(image, text), plain)  # the hooks are gone
    values: list[Tensor] = []
    hook = block.cross_kv.register_forward_hook(lambda *arguments: values.append(arguments[2]))
    method.score_pairs(image, text)
    hook.remove()
    value = values[0].chunk(2, 1)[1].unflatten(1, (2, 8))  # [T, H, Dh], heads of 8
    pair, word, rows, eps = 1, 0, slice(17, 34), 1e-5  # one word of the second pair, by its 17 image tokens
    expected = torch.zeros(2, 17, dtype=torch.float64)
    for head in range(2):
        for place in range(17):

            def move(_: nn.Module, arguments: tuple[Tensor], h: int = head, p: int = place) -> tuple[Tensor]:
                x = arguments[0].clone()  # more weight on a place is more of its value in the head
                x.unflatten(1, (2, 8))[int(text.offsets[pair]) + word, h] += eps * value[rows][p, h]
                return (x,)

            hook = block.cross_out.register_forward_pre_hook(move)
            expected[head, place] = (method.score_pairs(image, text)[pair] - plain[pair]) / eps
            hook.remove()
    cam = (weights[pair, :, word] * expected.clamp(min=0)).mean(0)[1:]  # without [CLS]
    got = cross_attention_maps(method, image, text, [[[0]], [[word]], [[0]]])[pair][0]
    assert got.tolist() == pytest.approx(cam.tolist(), rel=1e-3, abs=1e-12) and float(cam.max()) > 0


def alone(tokens: Tokens, i: int) -> Tokens:
    return part_of_tokens(tokens, i, i + 1)


@torch.no_grad()
@pytest.mark.parametrize("name", ["albef local", "meter", "vilt", "uniter itm"])
def test_pairs_of_a_batch_have_the_maps_that_they_have_alone(name: str) -> None:
    method, pairs = build(name, torch.float64).eval(), batch(name, 4, 0, 4)
    image, text = method.encode_image(pairs.pictures), method.encode_text(pairs.text)  # type: ignore[operator]
    maps_of = transport_maps if name.split()[0] in ("vilt", "uniter") else cross_attention_maps
    words: WordRows = [[[1], [0, 1]], [[0]], [], [[1]]]
    found = maps_of(method, image, text, words)  # type: ignore[arg-type]
    assert [len(maps) for maps in found] == [2, 1, 0, 1]
    for i, maps in enumerate(found):
        places = len(unpack(image)[i]) - (name != "uniter itm")
        assert maps.shape == (len(words[i]), places)
        (single,) = maps_of(method, alone(image, i), alone(text, i), [words[i]])  # type: ignore[arg-type]
        torch.testing.assert_close(maps, single)
    one, both = maps_of(method, alone(image, 0), alone(text, 0), [[[0], [1], [0, 1]]])[0][[0, 1]], found[0][1]  # type: ignore[arg-type]
    torch.testing.assert_close(one.mean(0), both)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vilt", "uniter itm"])
def test_transport_finds_the_assignment(name: str) -> None:
    """With blocks that do nothing, n words meet n places: the plan is the best of all permutations."""
    method, generator = build(name).eval(), torch.Generator().manual_seed(1)
    method.trunk = nn.Identity()
    method.norm = nn.Identity()
    ends, first = (1, 1) if isinstance(method, ViLT) else (0, 0)  # [CLS] and [SEP]; the image's [CLS]
    words, places = torch.randn(6, 16, generator=generator), torch.randn(6, 16, generator=generator)
    text = pack([torch.cat([torch.randn(ends, 16), words, torch.randn(ends, 16)])])
    image = pack([torch.cat([torch.randn(first, 16), places])])
    (found,) = transport_maps(method, image, text, [[[ends + i] for i in range(6)]])  # type: ignore[arg-type]
    cost = 1 - normalize(words, dim=1) @ normalize(places, dim=1).T
    assert found.argmax(1).tolist() == linear_sum_assignment(cost.numpy())[1].tolist()
    assert found.sum().item() == pytest.approx(1.0, abs=1e-4)


def test_centres_of_grids_whole_images_and_regions() -> None:
    assert centres(one_image(8), 0, 4).tolist() == [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]
    patches = pack([torch.zeros(4, 12), torch.zeros(2, 12)])
    whole = Pictures(patches=patches, places=torch.tensor([0, 3, 1, 2, 1, 0]), grids=torch.tensor([[2, 2], [1, 2]]))
    assert centres(whole, 0, 4).tolist() == [[0.25, 0.25], [0.75, 0.75], [0.75, 0.25], [0.25, 0.75]]
    assert centres(whole, 1, 2).tolist() == [[0.75, 0.5], [0.25, 0.5]]
    boxes = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [0.5, 0, 1, 0.5, 0.5, 0.5, 0.25]])
    regions = Regions(pack([torch.zeros(1, 3), torch.zeros(1, 3)]), boxes, torch.zeros(2, 0))
    assert centres(Pictures(regions=regions), 1, 1).tolist() == [[0.75, 0.25]]


def test_matches_are_scored_by_where_the_maximum_lies() -> None:
    thing = lambda *box: {"box": list(box)}  # noqa: E731
    scene = {"key": "s", "width": 64, "height": 64, "objects": [thing(0, 0, 32, 32), thing(32, 32, 64, 64)]}
    words = [{"kind": "colour", "object": o} for o in (0, 1, 0, 0)]
    maps = torch.tensor([[0.1, 0, 0, 0], [0.2, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    found = list(matches_of(maps, words, grid_centres(2, 2), scene))
    assert [match.on for match in found] == [0, 0, None, None]  # nothing there; and the same everywhere
    scores = dict(word_patch_scores(word_patch(found)))
    assert (scores["word_patch_landed"], scores["word_patch_hit_rate"], scores["word_patch_ratio"]) == (0.5, 0.5, 1.0)
    assert isinstance(found[0], WordMatch)


def region_shards(folder: Path, scenes: int) -> Path:
    """Held-out scenes with the boxes of their objects as regions, surest first."""
    (folder / "held_out").mkdir(parents=True)
    with TarWriter(str(folder / "held_out/00000.tar"), encoder=False) as tar:
        for i in range(scenes):
            sample = make_sample(0, "held_out", 64, i)
            boxes = np.array([thing["box"] for thing in json.loads(sample["json"])["objects"]]) / 64
            boxes = np.concatenate([boxes, boxes[:, 2:] - boxes[:, :2]], 1)
            file, random = BytesIO(), np.random.default_rng(i)
            features = random.standard_normal((len(boxes), 6)).astype(np.float16)
            np.savez(file, features=features, norm_bb=boxes.astype(np.float16), conf=np.ones(len(boxes)))
            tar.write({**sample, "regions.npz": file.getvalue()})
    index(str(folder / "held_out"), 64)
    return folder / "held_out"


SMALL: dict[str, tuple[MethodConfig, set[str]]] = {
    "clip": (CLIPConfig(WITH_CLS), {"projected", "grad_cam"}),
    "align": (load("align.tiny").method, {"projected", "grad_cam"}),
    "albef": (load("albef.tiny").method, set()),
    "vilt": (load("vilt.tiny").method, set()),
    "uniter": (
        replace(
            tiny.UNITER, max_tokens=24, regions=RegionEmbeddingConfig(16, 6, 0), divergence_weight=0, class_weight=0,
            text=replace(tiny.WORDS, vocab_size=400, positions=24),
        ),
        set(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_every_method_s_words_are_scored_on_scenes(name: str, folder: Path, tmp_path: Path) -> None:
    config, ways = SMALL[name]
    shards = region_shards(tmp_path, 8) if name == "uniter" else folder / "scenes/held_out"
    data = DataConfig(shards="", tokenizer=str(folder / "tokenizer"), workers=0)
    torch.manual_seed(0)
    method = config.build().eval()
    found = aligned(EvalConfig(scenes=(str(shards),), batch=8), data, config.inputs(), method, "cpu")
    start = f"eval/{shards.parent.name}/held_out/word_patch_"
    ratios = {name.removeprefix(start + "ratio_"): value for name, value in found.items() if "ratio_" in name}
    assert set(ratios) == {"colour", "shape", "size", *ways}
    assert all(name.startswith(start) for name in found)
    if ways:
        assert found[start + "ratio"] == max(ratios[way] for way in ways)
    if name == "uniter":
        assert found[start + "landed"] == 1.0  # every region is an object
    assert 0 < found[start + "landed"] <= 1


def test_a_late_interaction_has_none(folder: Path) -> None:
    config = CONFIGS["filip"]
    data = DataConfig(shards="", tokenizer=str(folder / "tokenizer"), workers=0)
    assert aligned(EvalConfig(scenes=("x",)), data, config.inputs(), config.build(), "cpu") == {}
