"""EfficientNet against transformers' ALIGN in tokens, summary, gradients and running statistics, and as published."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AlignVisionConfig, AlignVisionModel, EfficientNetModel
from transformers import EfficientNetConfig as TheirConfig

from mmpt.batch import Pictures, unpack
from mmpt.models.batch_norm import BatchNorm, batch_norms, settle, use_batch_norm
from mmpt.models.efficientnet import MOMENTUM, SIZES, DropConnect, EfficientNet, EfficientNetConfig, efficientnet
from mmpt.models.resnet import IMAGENET_MEAN, IMAGENET_STD
from mmpt.ops.batch_norm import batch_norm
from tests.models.weights import shake

CONFIG = EfficientNetConfig(0.25, 0.5, image_size=64, drop_connect=0.0)
SIZES_HERE = {"even": 65, "same": 64}


def raw(count: int, size: int) -> Tensor:
    shape = (count, 3, size, size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def pixels(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(c)[:, None, None] for c in (IMAGENET_MEAN, IMAGENET_STD))
    return ((images.double() / 255 - mean) / std).float()


def ready(config: EfficientNetConfig) -> EfficientNet:
    torch.manual_seed(0)
    model = config.build()
    shake(model)
    use_batch_norm(model, batch_norm)
    return model


def their_name(name: str) -> str:
    """Ours under transformers' name."""
    name = name.replace("running_variance", "running_var").replace("embedding.", "embeddings.", 1)
    top = {"top.0": "top_conv", "top.1": "top_bn"}
    for ours, theirs in top.items():
        name = name.replace(ours, f"encoder.{theirs}")
    return f"encoder.{name}" if name.startswith("blocks.") else name


@pytest.mark.parametrize("padding", SIZES_HERE)
@pytest.mark.parametrize("theirs_class", [AlignVisionModel, EfficientNetModel])
def test_same_as_transformers(theirs_class: type, padding: str) -> None:
    size = SIZES_HERE[padding]
    options = {"width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320, "drop_connect_rate": 0.0}
    align = theirs_class is AlignVisionModel
    theirs = theirs_class((AlignVisionConfig if align else TheirConfig)(image_size=size, **options))
    ours = ready(replace(CONFIG, padding=padding, image_size=size, top=not align))
    wanted = theirs.state_dict()
    state = {their_name(name): value for name, value in ours.state_dict().items()}
    assert state.keys() == {name for name in wanted if "num_batches" not in name}
    theirs.load_state_dict(wanted | state)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = MOMENTUM
    images = raw(6, size)
    expected, found = theirs.train()(pixels(images)), ours(Pictures(images))
    flat = expected.last_hidden_state.flatten(2).mT.flatten(0, 1)
    assert flat.abs().mean() > 0.1, "what comes out is not worth comparing"
    torch.testing.assert_close(found.x, flat, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours.summary(found), expected.pooler_output, rtol=1e-3, atol=1e-3)
    assert ours.config.width == found.x.shape[1] == (80 if align else 320)
    ours.summary(found).square().sum().backward()
    expected.pooler_output.square().sum().backward()
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    largest = max(float(grad.abs().max()) for grad in grads.values())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[their_name(name)], rtol=0, atol=1e-3 * largest)
    settle(ours)
    statistics = dict(theirs.named_buffers())
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, statistics[their_name(name)], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        flat = theirs.eval()(pixels(images)).last_hidden_state.flatten(2).mT.flatten(0, 1)
        torch.testing.assert_close(ours.eval()(Pictures(images)).x, flat, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [64, 65, 67, 70])
def test_padding_is_tensorflows(size: int) -> None:
    """Of every convolution with a stride: ceil(n / 2) places, what they lack padded half and half, an odd one last."""
    model, checked = ready(replace(CONFIG, image_size=size)).eval(), []

    def same(x: Tensor, conv: nn.Conv2d) -> Tensor:
        kernel, side = conv.kernel_size[0], x.shape[-1]
        missing = max((math.ceil(side / 2) - 1) * 2 + kernel - side, 0)
        first, last = missing // 2, missing - missing // 2
        return F.conv2d(F.pad(x, (first, last, first, last)), conv.weight, stride=2, groups=conv.groups)

    def check(conv: nn.Conv2d, inputs: dict[str, Tensor]):
        def compare(_: nn.Module, __: tuple[Tensor, ...], out: Tensor) -> None:
            torch.testing.assert_close(out, same(inputs["x"], conv))
            checked.append(conv)

        conv.register_forward_hook(compare)

    for module in model.modules():
        pad = getattr(module, "depthwise_conv_pad", getattr(module, "padding", None))
        if isinstance(pad, nn.ZeroPad2d):
            conv = getattr(module, "depthwise_conv", getattr(module, "convolution", None))
            if isinstance(conv, nn.Conv2d) and conv.stride == (2, 2):
                inputs: dict[str, Tensor] = {}
                pad.register_forward_hook(lambda _, x, __, inputs=inputs: inputs.update(x=x[0]))
                check(conv, inputs)
    tokens = model(Pictures(raw(1, size)))
    assert len(checked) == 5 and tokens.longest == model.config.places == math.ceil(size / 32) ** 2


COUNTS = {
    "B0": 4_007_548, "B1": 6_513_184, "B2": 7_700_994, "B3": 10_696_232, "B4": 17_548_616, "B5": 28_340_784,
    "B6": 40_735_704, "B7": 63_786_960, "L2": 474_804_308,
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_published_parameters(size: str) -> None:
    """torchvision's B0 to B7 and timm's L2, without their last linear."""
    config = efficientnet(size)  # type: ignore[arg-type]
    with torch.device("meta"):
        model = config.build()
    assert sum(p.numel() for p in model.parameters()) == COUNTS[size]
    assert not [module for module in model.modules() if isinstance(module, nn.BatchNorm2d | nn.Dropout)]
    assert all(norm.eps == 1e-3 and norm.momentum == 0.01 for norm in batch_norms(model))
    drops = [m.probability for m in model.modules() if isinstance(m, DropConnect)]
    blocks = len(model.blocks)
    assert drops == pytest.approx([0.2 * i / blocks for i in range(blocks)])


def test_initial_weights_let_the_image_through() -> None:
    torch.manual_seed(0)
    model = replace(CONFIG, drop_connect=0.2).build()
    use_batch_norm(model, batch_norm)
    assert 0.1 < model(Pictures(raw(8, 64))).x.std().item() < 10
    assert all(bool((norm.weight == 1).all()) for norm in batch_norms(model))
    big = EfficientNetConfig().build()
    depthwise = big.blocks[5].get_submodule("depthwise_conv.depthwise_conv")
    assert depthwise.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.05)  # type: ignore[union-attr]
    first = big.embedding.get_submodule("convolution")
    assert first.weight.std().item() == pytest.approx((2 / (9 * 32)) ** 0.5, rel=0.1)  # type: ignore[union-attr]


def test_drop_connect_drops_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop = DropConnect(0.3)
    drawn = drop(torch.ones(4000, 2, 3, 3)).flatten(1)
    assert drawn.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert bool((drawn == drawn[:, :1]).all()) and drawn[:, 0].mean().item() == pytest.approx(1.0, abs=0.05)
    x = torch.ones(4, 2, 3, 3)
    assert drop.eval()(x) is x


def test_kept_places_and_activation_checkpointing() -> None:
    model, kept = ready(CONFIG).eval(), torch.tensor([[0, 3], [1, 2]])
    whole, part = unpack(model(Pictures(raw(2, 64)))), unpack(model(Pictures(raw(2, 64), kept)))
    for row, all_places, places in zip(part, whole, kept, strict=True):
        assert torch.equal(row, all_places[places])
    results = []
    for saving in (False, True):
        model = ready(replace(CONFIG, checkpoint_activations=saving, drop_connect=0.5))
        torch.manual_seed(1)
        loss = model.summary(model(Pictures(raw(3, 64)))).square().sum()
        grads = torch.autograd.grad(loss, [*model.parameters()])
        settle(model)
        results.append([loss, *grads, *model.buffers()])
    for plain, saved in zip(*results, strict=True):
        assert torch.equal(plain, saved)


def test_what_does_not_fit_is_refused() -> None:
    bare = ready(replace(CONFIG, pool="none"))
    with pytest.raises(ValueError, match="EfficientNet has no summary"):
        bare.summary(bare(Pictures(raw(2, 64))))
    assert bare.config.summary_width == 0 and CONFIG.summary_width == CONFIG.width == 320
    assert replace(efficientnet("B7"), top=False).width == 640, "the shared space of ALIGN with B7"
    with pytest.raises(ValueError, match=r"drop_connect .* got 1"):
        replace(CONFIG, drop_connect=1.0)
    with pytest.raises(ValueError, match="the 4 places, got 5"):
        replace(CONFIG, kept_places=5)
    assert isinstance(batch_norms(bare)[0], BatchNorm) and efficientnet("L2", 289).places == 100
