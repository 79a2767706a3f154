"""The plain ResNet against transformers', CLIP's modified one against plain torch functions, and published sizes."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ResNetConfig as TheirConfig
from transformers import ResNetModel

from mmpt.batch import Pictures, Regions, pack, unpack
from mmpt.methods.clip import CLIPConfig
from mmpt.models.batch_norm import settle, use_batch_norm
from mmpt.models.dual_tower import DualTowerConfig
from mmpt.models.image import CLIP_MEAN, CLIP_STD
from mmpt.models.resnet import CLIP_SIZES, IMAGENET_MEAN, IMAGENET_STD, ResNet, ResNetConfig, clip_resnet, resnet
from mmpt.models.text import TextTransformerConfig
from mmpt.models.transformer import TransformerConfig
from mmpt.ops.batch_norm import batch_norm
from tests.models.weights import below, shake

DEPTHS, SIZE = (2, 1, 2, 1), 64
PLAIN = ResNetConfig(DEPTHS, bottleneck=4, image_size=SIZE)
MODIFIED = ResNetConfig(DEPTHS, 4, "modified", "attention", 10, SIZE, mean=CLIP_MEAN, std=CLIP_STD)
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}  # of numbers of order 10, through 20 convolutions in fp32


def raw(count: int, size: int = SIZE) -> Tensor:
    shape = (count, 3, size, size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def pixels(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    return ((images.double() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]).float()


def ready(config: ResNetConfig) -> ResNet:
    torch.manual_seed(0)
    model = config.build()
    shake(model)
    use_batch_norm(model, batch_norm)
    return model


def plain_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' ResNetModel under our names."""

    def unit(theirs: str, conv: str, norm: str) -> dict[str, Tensor]:
        out = {f"{conv}.weight": state[f"{theirs}.convolution.weight"]}
        for ours, name in (
            ("weight", "weight"), ("bias", "bias"), ("running_mean", "running_mean"),
            ("running_variance", "running_var"),
        ):  # fmt: skip
            out[f"{norm}.{ours}"] = state[f"{theirs}.normalization.{name}"]
        return out

    out = unit("embedder.embedder", "embedding.conv_1", "embedding.norm_1")
    layers = [(stage, i) for stage, depth in enumerate(DEPTHS) for i in range(depth)]
    for number, (stage, i) in enumerate(layers):
        layer, block = f"encoder.stages.{stage}.layers.{i}", f"blocks.{number}"
        for k in range(3):
            out |= unit(f"{layer}.layer.{k}", f"{block}.conv_{k + 1}", f"{block}.norm_{k + 1}")
        if f"{layer}.shortcut.convolution.weight" in state:
            out |= unit(f"{layer}.shortcut", f"{block}.shortcut", f"{block}.norm_shortcut")
    return out


def test_plain_is_transformers() -> None:
    """Tokens, summary and gradients in training, and tokens by running statistics afterwards."""
    torch.manual_seed(0)
    hidden = [4 * 4 << stage for stage in range(4)]
    theirs = ResNetModel(TheirConfig(embedding_size=4, hidden_sizes=hidden, depths=list(DEPTHS)))
    shake(theirs)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.5
    ours = PLAIN.build()
    ours.load_state_dict(plain_weights(theirs.state_dict()))
    use_batch_norm(ours, batch_norm)
    for module in ours.modules():
        if hasattr(module, "momentum"):
            module.momentum = 0.5
    inputs = pixels(raw(5), IMAGENET_MEAN, IMAGENET_STD)
    expected, found = theirs(inputs), ours(Pictures(raw(5)))
    torch.testing.assert_close(found.x, expected.last_hidden_state.flatten(2).mT.flatten(0, 1), **TOLERANCE)
    assert found.longest == PLAIN.places == 4
    torch.testing.assert_close(ours.summary(found), expected.pooler_output.flatten(1), **TOLERANCE)
    ours.summary(found).square().sum().backward()
    expected.pooler_output.square().sum().backward()
    wanted = dict(theirs.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in wanted.values() if p.grad is not None)
    gradients = plain_weights(
        theirs.state_dict() | {name: p.grad for name, p in wanted.items()}  # type: ignore[dict-item]
    )
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=0, atol=1e-4 * largest)
    settle(ours)
    with torch.no_grad():
        expected = theirs.eval()(inputs).last_hidden_state.flatten(2).mT.flatten(0, 1)
        torch.testing.assert_close(ours.eval()(Pictures(raw(5))).x, expected, **TOLERANCE)


def modified_by_functions(state: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """(last grid, summary): Radford et al. 2021, section 2.4, in torch's functions, every norm by its batch."""

    def unit(x: Tensor, conv: str, norm: str, **options: int) -> Tensor:
        x = F.conv2d(x, state[f"{conv}.weight"], **options)  # type: ignore[arg-type]
        return F.batch_norm(x, None, None, state[f"{norm}.weight"], state[f"{norm}.bias"], training=True)

    x = F.relu(unit(x, "embedding.conv_1", "embedding.norm_1", stride=2, padding=1))
    x = F.relu(unit(x, "embedding.conv_2", "embedding.norm_2", padding=1))
    x = F.avg_pool2d(F.relu(unit(x, "embedding.conv_3", "embedding.norm_3", padding=1)), 2)
    first_of_stage = {sum(DEPTHS[:i]) for i in range(1, 4)}
    for i in range(sum(DEPTHS)):
        stride, block = 2 if i in first_of_stage else 1, f"blocks.{i}"
        y = F.relu(unit(x, f"{block}.conv_1", f"{block}.norm_1"))
        y = F.relu(unit(y, f"{block}.conv_2", f"{block}.norm_2", padding=1))
        y = unit(F.avg_pool2d(y, stride), f"{block}.conv_3", f"{block}.norm_3")
        if f"{block}.shortcut.weight" in state:
            x = unit(F.avg_pool2d(x, stride), f"{block}.shortcut", f"{block}.norm_shortcut")
        x = F.relu(x + y)
    tokens = x.flatten(2).permute(2, 0, 1)  # [P, B, D]
    tokens = torch.cat([tokens.mean(0)[None], tokens]) + state["pooling.positions"][:, None]
    width = tokens.shape[-1]
    key, value = state["pooling.kv.weight"].chunk(2)
    pooled, _ = F.multi_head_attention_forward(
        tokens[:1], tokens, tokens, width, width // 64, None,
        torch.cat([state["pooling.q.bias"], state["pooling.kv.bias"]]), None, None, False, 0.0,
        state["pooling.out.weight"], state["pooling.out.bias"], use_separate_proj_weight=True,
        q_proj_weight=state["pooling.q.weight"], k_proj_weight=key, v_proj_weight=value,
    )  # fmt: skip
    return x, pooled[0]


def test_modified_is_the_published_formulation() -> None:
    ours = ready(MODIFIED)
    grid, pooled = modified_by_functions(ours.state_dict(), pixels(raw(5), CLIP_MEAN, CLIP_STD))
    tokens = ours(Pictures(raw(5)))
    torch.testing.assert_close(tokens.x, grid.flatten(2).mT.flatten(0, 1), **TOLERANCE)
    torch.testing.assert_close(ours.summary(tokens), pooled, **TOLERANCE)
    assert pooled.shape == (5, MODIFIED.summary_width) and MODIFIED.width == 128


@pytest.mark.parametrize(("layers", "expected"), [(50, 23_508_032), (101, 42_500_160), (152, 58_143_808)])
def test_published_parameters(layers: int, expected: int) -> None:
    """torchvision's resnet50, 101 and 152 without their last linear."""
    with torch.device("meta"):
        found = sum(p.numel() for p in resnet(layers).build().parameters())  # type: ignore[arg-type]
    assert found == expected


CLIP_COUNTS = {
    "RN50": 102_007_137, "RN101": 119_688_033, "RN50x4": 178_300_601, "RN50x16": 290_979_217, "RN50x64": 623_258_305,
}  # fmt: skip
TEXT_WIDTHS = {"RN50": 512, "RN101": 512, "RN50x4": 640, "RN50x16": 768, "RN50x64": 1024}


@pytest.mark.parametrize("size", CLIP_SIZES)
def test_clips_published_parameters(size: str) -> None:
    """Whole models (Radford et al. 2021, table 19), with no projection after the image tower."""
    width = TEXT_WIDTHS[size]
    text = TextTransformerConfig(TransformerConfig(width, 12, width // 64, activation="quick_gelu"))
    image = clip_resnet(size)  # type: ignore[arg-type]
    with torch.device("meta"):
        method = CLIPConfig(DualTowerConfig(image, text, image.embed_dim, project_image=False)).build()
    assert sum(p.numel() for p in method.parameters()) == CLIP_COUNTS[size]


def test_kept_places_are_those_of_the_whole_grid() -> None:
    """Pixel-BERT's random pixel sampling: the network runs on all pixels, fewer tokens leave it."""
    config = replace(PLAIN, kept_places=2)
    assert (config.inputs().patches, config.inputs().kept_patches) == (4, 2)
    model, kept = ready(config).eval(), torch.tensor([[0, 3], [1, 2]])
    whole, part = unpack(model(Pictures(raw(2)))), unpack(model(Pictures(raw(2), kept)))
    for row, all_places, places in zip(part, whole, kept, strict=True):
        assert torch.equal(row, all_places[places])
    assert model.summary(model(Pictures(raw(2), kept))).shape == (2, 128)


@pytest.mark.parametrize("config", [PLAIN, MODIFIED], ids=["plain", "modified"])
def test_activation_checkpointing_changes_nothing(config: ResNetConfig) -> None:
    results = []
    for saving in (False, True):
        model = ready(replace(config, checkpoint_activations=saving))
        loss = model.summary(model(Pictures(raw(3)))).square().sum()
        grads = torch.autograd.grad(loss, [*model.parameters()])
        settle(model)
        results.append([loss, *grads, *model.buffers()])
    for plain, saved in zip(*results, strict=True):
        assert torch.equal(plain, saved)


def test_initial_weights() -> None:
    """CLIP's blocks begin as identities; He's normal in the plain form."""
    torch.manual_seed(0)
    modified, plain = MODIFIED.build(), ResNetConfig(DEPTHS, 32, image_size=SIZE).build()
    assert not any(block.get_parameter("norm_3.weight").any() for block in modified.blocks)
    weight = plain.blocks[1].get_parameter("conv_2.weight")
    assert weight.std().item() == pytest.approx((2 / (9 * 32)) ** 0.5, rel=0.03)
    assert below(modified.state_dict(), "pooling.")["positions"].std().item() == pytest.approx(128**-0.5, rel=0.1)


def test_half_precision() -> None:
    model = ready(MODIFIED)
    exact = model.summary(model(Pictures(raw(4))))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.summary(model(Pictures(raw(4))))
    half = model.bfloat16()
    found = half.summary(half(Pictures(raw(4))))
    assert found.dtype == torch.bfloat16
    for approximate in (mixed, found):
        assert nn.functional.cosine_similarity(approximate.float(), exact).min() > 0.99


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"64-pixel images, got \(32, 32\)"):
        ready(PLAIN)(Pictures(raw(1, 32)))
    regions = Pictures(regions=Regions(pack([torch.zeros(1, 4)]), torch.zeros(1, 7), torch.zeros(1, 0)))
    with pytest.raises(ValueError, match="square crops of pixels"):
        ready(PLAIN)(regions)
    bare = ready(replace(PLAIN, pool="none"))
    with pytest.raises(ValueError, match="ResNet has no summary"):
        bare.summary(bare(Pictures(raw(2))))
    for changes, message in (
        ({"image_size": 100}, "multiple of 32 pixels, got 100"), ({"kept_places": 5}, "the 4 places, got 5"),
        ({"embed_dim": 8}, "got 8 with pool 'mean'"), ({"pool": "attention"}, "got 0 with pool 'attention'"),
        ({"pool": "attention", "embed_dim": 8, "kept_places": 2}, "kept_places must be 0"),
        ({"pool": "attention", "embed_dim": 8, "bottleneck": 3}, "do not divide the width 96"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            replace(PLAIN, **changes)  # type: ignore[arg-type]
