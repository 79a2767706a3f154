import pytest
import torch
from torch import nn

from mmpt.engine.optim import OptimConfig, build_optimizer, freeze, parameter_groups


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.norm = nn.LayerNorm(4)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = Tower(), Tower()
        self.image_projection = nn.Linear(4, 2, bias=False)
        self.scale = nn.Parameter(torch.zeros(1))


def grouped(model: nn.Module, config: OptimConfig) -> dict[str, tuple[float, float]]:
    names = {id(p): n for n, p in model.named_parameters()}
    return {
        names[id(p)]: (group["weight_decay"], group["lr_scale"])
        for group in parameter_groups(model, config)
        for p in group["params"]
    }


def test_vectors_do_not_decay_and_embeddings_by_choice() -> None:
    found = grouped(Model(), OptimConfig(weight_decay=0.1))
    assert found["image.blocks.0.weight"] == (0.1, 1.0) and found["image.blocks.0.bias"] == (0.0, 1.0)
    assert found["scale"] == (0.0, 1.0) and found["text.norm.weight"] == (0.0, 1.0)
    assert found["text.token_embedding.weight"] == (0.1, 1.0)
    assert grouped(Model(), OptimConfig(decay_embeddings=False))["text.token_embedding.weight"][0] == 0.0


def test_layer_decay_counts_from_the_top_of_each_tower() -> None:
    found = grouped(Model(), OptimConfig(layer_decay=0.5))
    assert [found[f"image.blocks.{i}.weight"][1] for i in range(3)] == [0.25, 0.5, 1.0]
    assert found["image.token_embedding.weight"][1] == 0.125
    assert found["image_projection.weight"][1] == 1.0 and found["scale"][1] == 1.0


def test_locked_towers_leave_projections_and_temperature() -> None:
    model = Model()
    freeze(model, "image")
    names = set(grouped(model, OptimConfig()))
    assert not any(name.startswith("image.") for name in names)
    assert {"image_projection.weight", "scale"} <= names and any(name.startswith("text.") for name in names)


def test_locking_what_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match="no image tower"):
        freeze(nn.Linear(2, 2), "image")


def test_a_parameter_without_dimension_is_named() -> None:
    model = nn.Module()
    model.logit_scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ValueError, match="logit_scale has no dimension"):
        parameter_groups(model, OptimConfig())


def test_order_depends_on_names_alone() -> None:
    names = list(grouped(Model(), OptimConfig()))
    model = Model()
    reordered = nn.Module()
    for name, child in reversed(list(model.named_children())):
        reordered.add_module(name, child)
    reordered.scale = model.scale
    assert list(grouped(reordered, OptimConfig())) == names


def test_apex_lamb_is_refused_where_it_would_be_wrong() -> None:
    groups = parameter_groups(Model(), OptimConfig())
    with pytest.raises(ValueError, match="one trust ratio for all"):
        build_optimizer(groups, OptimConfig(name="lamb", backend="apex"), 1, torch.device("cpu"))


def test_missing_apex_is_one_clear_error() -> None:
    groups = parameter_groups(Model(), OptimConfig())
    with pytest.raises(ValueError, match="apex"):
        build_optimizer(groups, OptimConfig(backend="apex"), 1, torch.device("cpu"))
