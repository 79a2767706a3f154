"""The transformer against torch's own layers, one sequence at a time, and what training alone changes."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from mmpt.batch import pack, pack_equal, unpack
from mmpt.models.transformer import Transformer, TransformerConfig, activate

CONFIG = TransformerConfig(width=24, depth=3, heads=4)
LENGTHS = (5, 1, 9, 4)


def sequences(width: int = 24) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, width, generator=generator) for n in LENGTHS]


def torch_layer(config: TransformerConfig, block: nn.Module) -> nn.TransformerEncoderLayer:
    """torch's layer with the weights of one of our blocks."""
    layer = nn.TransformerEncoderLayer(
        config.width, config.heads, 4 * config.width, 0.0, "gelu", batch_first=True, norm_first=config.norm == "pre"
    )
    names = {
        "norm_1": "norm1", "norm_2": "norm2", "qkv.weight": "self_attn.in_proj_weight",
        "qkv.bias": "self_attn.in_proj_bias", "out": "self_attn.out_proj", "mlp_in": "linear1", "mlp_out": "linear2",
    }  # fmt: skip
    state = {}
    for name, value in block.state_dict().items():
        module, _, kind = name.rpartition(".")
        state[names.get(name) or f"{names[module]}.{kind}"] = value
    layer.load_state_dict(state)
    return layer


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_same_as_torch_one_sequence_at_a_time(norm: str, causal: bool) -> None:
    torch.manual_seed(0)
    config = replace(CONFIG, norm=norm)
    model = Transformer(config, causal)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    layers = [torch_layer(config, block).train() for block in model.blocks]  # train: no fused inference path
    found = unpack(model(pack(sequences())))
    for mine, x in zip(found, sequences(), strict=True):
        mask = nn.Transformer.generate_square_subsequent_mask(len(x)) if causal else None
        expected = x[None]
        for layer in layers:
            expected = layer(expected, src_mask=mask)
        torch.testing.assert_close(mine, expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_equals_one_by_one(causal: bool) -> None:
    torch.manual_seed(0)
    model = Transformer(CONFIG, causal)
    together = unpack(model(pack(sequences())))
    for mine, x in zip(together, sequences(), strict=True):
        torch.testing.assert_close(mine, model(pack([x])).x, rtol=1e-5, atol=1e-6)


def test_activations() -> None:
    x = torch.linspace(-4, 4, 17, dtype=torch.float64)
    gelu = x * 0.5 * (1 + torch.erf(x / 2**0.5))
    tanh = 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))
    for name, expected in (("gelu", gelu), ("gelu_tanh", tanh), ("quick_gelu", x / (1 + torch.exp(-1.702 * x)))):
        torch.testing.assert_close(activate(x, name), expected)


@pytest.mark.parametrize(
    "options", [{}, {"dropout": 0.3, "attention_dropout": 0.2, "drop_path": 0.5}], ids=["", "random"]
)
def test_activation_checkpointing_changes_nothing(options: dict[str, float]) -> None:
    """Values and gradients, to the bit; what is random is drawn the same again in the backward."""
    results = []
    for saving in (False, True):
        torch.manual_seed(0)
        model = Transformer(replace(CONFIG, checkpoint_activations=saving, **options))
        tokens = pack([x.requires_grad_() for x in sequences()])
        torch.manual_seed(1)
        out = model(tokens).x
        grads = torch.autograd.grad(out.square().sum(), [tokens.x, *model.parameters()])
        results.append([out, *grads])
    for plain, saved in zip(*results, strict=True):
        assert torch.equal(plain, saved)


def test_checkpointing_keeps_less() -> None:
    def saved_elements(saving: bool) -> int:
        model, seen = Transformer(replace(CONFIG, checkpoint_activations=saving)), []
        tokens = pack_equal(torch.randn(4, 16, 24, requires_grad=True))
        with torch.autograd.graph.saved_tensors_hooks(lambda x: seen.append(x.numel()) or x, lambda x: x):
            model(tokens)
        return sum(seen)

    assert saved_elements(True) < saved_elements(False) / 4


def test_stochastic_depth_drops_whole_sequences_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    config = replace(CONFIG, depth=1, drop_path=0.4)
    model = Transformer(config)
    block = model.blocks[0]
    assert [b.drop_path for b in Transformer(replace(CONFIG, drop_path=0.4)).blocks] == pytest.approx([0.0, 0.2, 0.4])
    block.drop_path = 0.4
    tokens = pack(sequences() * 4000)
    drawn = block._drop(torch.ones(len(tokens.x), 24), tokens)[:, 0].unflatten(0, (4000, -1))  # [draws, T]
    assert drawn.unique().tolist() == pytest.approx([0.0, 1 / 0.6])
    of_sequences = [part.unique(dim=1).shape[1] for part in drawn.split(LENGTHS, dim=1)]
    assert of_sequences == [1] * len(LENGTHS), "all tokens of a sequence are dropped together"
    torch.testing.assert_close(drawn.mean(0), torch.ones(len(drawn[0])), rtol=0, atol=0.06)
    correlation = torch.corrcoef(drawn[:, [0, 5, 6, 15]].T)
    assert (correlation - torch.eye(4)).abs().max() < 0.06, "sequences are dropped independently"


def test_evaluation_is_deterministic() -> None:
    model = Transformer(replace(CONFIG, dropout=0.5, attention_dropout=0.5, drop_path=0.5)).eval()
    tokens = pack(sequences())
    assert torch.equal(model(tokens).x, model(tokens).x)
    plain = Transformer(CONFIG)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(tokens).x, model(tokens).x)


@pytest.mark.parametrize("name", ["dropout", "attention_dropout", "drop_path"])
def test_each_kind_of_dropout_is_drawn_in_training(name: str) -> None:
    model, tokens = Transformer(replace(CONFIG, **{name: 0.5})), pack(sequences())
    assert not torch.equal(model(tokens).x, model(tokens).x)


def test_initial_weights() -> None:
    """The standard deviations of CLIP's released code, and Xavier's bound for each of q, k and v."""
    torch.manual_seed(0)
    width, depth = 128, 4
    config = TransformerConfig(width, depth, heads=2)
    block = Transformer(config).blocks[1]
    deviations = {
        "qkv": width**-0.5, "out": (2 * depth * width) ** -0.5, "mlp_in": (2 * width) ** -0.5,
        "mlp_out": (2 * depth * width) ** -0.5,
    }  # fmt: skip
    for name, deviation in deviations.items():
        linear = getattr(block, name)
        assert linear.weight.std().item() == pytest.approx(deviation, rel=0.03)
        assert not linear.bias.any()
    xavier = Transformer(replace(config, init="xavier")).blocks[1]
    for matrix in xavier.qkv.weight.chunk(3):
        assert matrix.abs().max().item() == pytest.approx((6 / (2 * width)) ** 0.5, rel=0.01)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="5 heads do not divide the width 24"):
        replace(CONFIG, heads=5)
