"""Images, texts and pooling: patch dropout, precision, errors, and one vector per ragged sequence."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from mmpt.batch import Pictures, Regions, Tokens, pack, pack_equal, unpack
from mmpt.data.patches import pack_patches
from mmpt.models.dual_tower import DualTower, DualTowerConfig, unit
from mmpt.models.image import SIZES, ViT, ViTConfig, vit, with_first_token
from mmpt.models.logit_scale import LogitBias, LogitScale
from mmpt.models.pooling import AttentionPooling, first_token, last_token, mean_token, without_first_token
from mmpt.models.positions import positions_of_whole_images
from mmpt.models.text import TextTransformer, TextTransformerConfig
from mmpt.models.transformer import TransformerConfig
from mmpt.ops.bounded import capped_exp

TRUNK = TransformerConfig(width=24, depth=2, heads=4)
IMAGE = ViTConfig(TRUNK, image_size=32, patch_size=8)
TEXT = TextTransformerConfig(TRUNK, vocab_size=50, max_tokens=12)


def raw(count: int, size: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def unpacked(tokens: Tokens) -> torch.Tensor:
    """[B, L, D] of equally long sequences."""
    return torch.stack(unpack(tokens))


@pytest.mark.parametrize("class_token", [True, False])
def test_kept_patches_keep_their_content_and_position(class_token: bool) -> None:
    torch.manual_seed(0)
    model = ViT(replace(IMAGE, class_token=class_token))
    kept = torch.tensor([[0, 3, 15], [1, 2, 9]])
    whole, part = (unpacked(model.embedding(Pictures(raw(2), k))) for k in (None, kept))
    first = int(class_token)
    assert whole.shape[1] == 16 + first and part.shape[1] == 3 + first
    for i in range(2):
        torch.testing.assert_close(part[i, first:], whole[i, first:][kept[i]])
        assert torch.equal(part[i, :first], whole[i, :first])
    tokens = model(Pictures(raw(2), kept))
    assert tokens.longest == 3 + first and len(tokens.x) == 2 * tokens.longest
    everything = model(Pictures(raw(2), torch.arange(16).expand(2, 16))).x
    torch.testing.assert_close(everything, model(Pictures(raw(2))).x)


def test_patches_are_those_of_a_convolution() -> None:
    torch.manual_seed(0)
    model = ViT(IMAGE)
    convolution = nn.Conv2d(3, 24, 8, 8, bias=False)
    convolution.weight.data = model.embedding.patch.weight.detach().view(24, 3, 8, 8)
    model.embedding.position_embedding.data.zero_()
    pixels = (raw(2) / 255 - torch.tensor(IMAGE.mean)[:, None, None]) / torch.tensor(IMAGE.std)[:, None, None]
    expected = convolution(pixels).flatten(2).transpose(1, 2)
    torch.testing.assert_close(unpacked(model.embedding(Pictures(raw(2))))[:, 1:], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("size", "width", "depth", "heads"), [(k, *v) for k, v in SIZES.items()])
def test_published_sizes(size: str, width: int, depth: int, heads: int) -> None:
    """Width, depth, heads (Dosovitskiy et al. 2021, table 1; Touvron et al. 2021, table 1 for Ti and S)."""
    published = {"Ti": (192, 12, 3), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "H": (1280, 32, 16)}
    assert published[size] == (width, depth, heads)
    for patch in (8, 14, 16, 32):
        config = vit(size, patch, "gelu")  # type: ignore[arg-type]
        assert config.patches == (224 // patch) ** 2 and config.trunk.width == width


@pytest.mark.parametrize(("share", "kept"), [(1.0, 196), (0.5, 98), (0.25, 49), (0.001, 1)])
def test_kept_patches_in_training(share: float, kept: int) -> None:
    assert ViTConfig(TRUNK, 224, 16, patch_keep=share).kept_patches == kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compute_type_is_that_of_the_parameters(dtype: torch.dtype) -> None:
    image, text = ViT(IMAGE).to(dtype), TextTransformer(TEXT).to(dtype)
    assert image(Pictures(raw(2))).x.dtype == dtype
    assert text(pack([torch.arange(5), torch.arange(3)])).x.dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert ViT(IMAGE)(Pictures(raw(2))).x.isfinite().all()
    assert not list(image.buffers()), "an engine would round the pixels' mean and deviation to its own precision"


def test_bf16_stays_close_to_fp32() -> None:
    torch.manual_seed(0)
    model = ViT(IMAGE)
    exact = model(Pictures(raw(2))).x
    half = model.to(torch.bfloat16)(Pictures(raw(2))).x
    assert (half.float() - exact).abs().max() < 0.1 and exact.std() > 0.5


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"32-pixel images, got \(16, 16\)"):
        ViT(IMAGE)(Pictures(raw(1, 16)))
    with pytest.raises(ValueError, match="a caption has 13 tokens, the model takes 12"):
        TextTransformer(TEXT)(pack([torch.arange(13)]))
    with pytest.raises(ValueError, match="patches of 7 pixels"):
        replace(IMAGE, patch_size=7)
    with pytest.raises(ValueError, match=r"patch_keep .* got 0"):
        replace(IMAGE, patch_keep=0.0)
    with pytest.raises(ValueError, match=r"initial_temperature 0\.005"):
        LogitScale(1 / 200, 100.0, capped_exp)
    with pytest.raises(ValueError, match="pixels or patches, not regions"):
        ViT(IMAGE)(Pictures(regions=Regions(pack([torch.zeros(1, 4)]), torch.zeros(1, 7), torch.zeros(1, 0))))
    with pytest.raises(ValueError, match="embed_dim is 5, the image tower's width 24"):
        DualTower(DualTowerConfig(IMAGE, TEXT, 5, project_image=False), "tokens")


def test_text_is_causal_or_not() -> None:
    torch.manual_seed(0)
    ids = torch.arange(8)
    other = ids.clone()
    other[-1] = 40
    for causal in (True, False):
        model = TextTransformer(replace(TEXT, causal=causal))
        before, after = model(pack([ids])).x, model(pack([other])).x
        assert torch.equal(before[:-1], after[:-1]) == causal


def test_first_and_last_tokens() -> None:
    rows = [torch.randn(n, 3) for n in (4, 1, 2)]
    tokens = pack(rows)
    assert torch.equal(first_token(tokens), torch.stack([row[0] for row in rows]))
    assert torch.equal(last_token(tokens), torch.stack([row[-1] for row in rows]))
    torch.testing.assert_close(mean_token(tokens), torch.stack([row.mean(0) for row in rows]))
    rest = without_first_token(tokens)
    assert [part.tolist() for part in unpack(rest)] == [row[1:].tolist() for row in rows] and rest.longest == 3
    again = with_first_token(rest, torch.zeros(3))
    assert again.offsets.equal(tokens.offsets) and again.longest == 4
    assert [part.tolist() for part in unpack(again)] == [[[0.0] * 3, *row[1:].tolist()] for row in rows]
    equal = without_first_token(pack_equal(torch.arange(24.0).view(2, 4, 3)))
    torch.testing.assert_close(mean_token(equal), torch.arange(24.0).view(2, 4, 3)[:, 1:].mean(1))
    assert torch.equal(equal.x, torch.arange(24.0).view(2, 4, 3)[:, 1:].reshape(6, 3)) and equal.longest == 3


def test_attention_pooling_of_ragged_sequences() -> None:
    """Equal to torch's attention over one sequence at a time."""
    torch.manual_seed(0)
    pooling = AttentionPooling(TRUNK)
    for parameter in pooling.parameters():
        nn.init.normal_(parameter, std=0.3)
    torchs = nn.MultiheadAttention(24, 4, batch_first=True)
    torchs.load_state_dict({
        "in_proj_weight": torch.cat([pooling.q.weight, pooling.kv.weight]),
        "in_proj_bias": torch.cat([pooling.q.bias, pooling.kv.bias]),
        "out_proj.weight": pooling.out.weight, "out_proj.bias": pooling.out.bias,
    })  # fmt: skip
    tokens = pack([torch.randn(n, 24) for n in (5, 1, 8)])
    expected = []
    for row in unpack(tokens):
        y = torchs(pooling.query[None], row[None], row[None])[0][0]
        expected.append(y + pooling.mlp_out(nn.functional.gelu(pooling.mlp_in(pooling.norm(y)))))
    torch.testing.assert_close(pooling(tokens), torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_scale_and_bias_start_where_told_and_have_a_dimension() -> None:
    scale, bias = LogitScale(0.07, 100.0, capped_exp), LogitBias(-10.0)
    assert scale().item() == pytest.approx(1 / 0.07) and bias().item() == -10.0
    for module in (scale, bias):
        shared = module().data_ptr() == next(module.parameters()).data_ptr()
        assert not shared, "ZeRO 3 frees the parameter after the forward"
    for module in (scale, bias):
        assert [p.shape for p in module.parameters()] == [(1,)]
        assert module.to(torch.bfloat16)().dtype == torch.float32
    bias().sum().backward()
    assert bias.bias.grad is not None and bias.bias.grad.item() == 1.0


def test_unit_measures_length_in_fp32() -> None:
    x = torch.full((1, 4096), 0.01, dtype=torch.float16)
    assert unit(x).float().norm().item() == pytest.approx(1.0, abs=1e-3) and unit(x).dtype == torch.float16


@pytest.mark.parametrize("class_token", [True, False])
def test_whole_images_of_the_grids_own_shape_are_crops(class_token: bool) -> None:
    """As packed patches or as pixels, in any order of patches."""
    torch.manual_seed(0)
    model, images = ViT(replace(IMAGE, class_token=class_token)), raw(2)
    patches, places, grids = pack_patches(list(images.numpy()), 8, [None, None])
    expected = model(Pictures(images))
    torch.testing.assert_close(model(Pictures(patches=patches, places=places, grids=grids)).x, expected.x)
    order = torch.randperm(16)
    shuffled = Pictures(patches=pack([p[order] for p in unpack(patches)]), places=order.repeat(2), grids=grids)
    for found, wanted in zip(unpack(model.local(model(shuffled))), unpack(model.local(expected)), strict=True):
        torch.testing.assert_close(found, wanted[order])


def test_positions_of_whole_images() -> None:
    """Against torch's interpolation of one image at a time."""
    torch.manual_seed(0)
    table, shapes = torch.randn(16, 5), [(2, 7), (4, 4), (2, 7), (1, 1), (6, 3)]
    counts = [rows * columns for rows, columns in shapes]
    image = torch.repeat_interleave(torch.arange(5), torch.tensor(counts))
    places = torch.cat([torch.arange(n) for n in counts])
    found = positions_of_whole_images(table, torch.tensor(shapes), places, image)
    square = table.T.reshape(1, 5, 4, 4)
    expected = [
        nn.functional.interpolate(square, shape, mode="bilinear", align_corners=True)[0].flatten(1).T
        for shape in shapes
    ]
    torch.testing.assert_close(found, torch.cat(expected))
