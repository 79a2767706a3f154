"""The head whose outputs two views of an image are compared by: SLIP's three layers (Mu et al. 2022, released code)."""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import relu

from mmpt.models.batch_norm import BatchNorm


@dataclass(frozen=True)
class ProjectorConfig:
    hidden_width: int = 4096
    """Width of both hidden layers."""
    width: int = 256
    """Width of the space in which views are compared."""


class Projector(nn.Module):
    """linear, batch norm, ReLU, twice, then linear: [B, input_width] -> [B, width]. Every linear has a bias."""

    def __init__(self, input_width: int, config: ProjectorConfig):
        super().__init__()
        hidden = config.hidden_width
        self.linear_1, self.norm_1 = nn.Linear(input_width, hidden), BatchNorm(hidden)
        self.linear_2, self.norm_2 = nn.Linear(hidden, hidden), BatchNorm(hidden)
        self.linear_3 = nn.Linear(hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.norm_1(self.linear_1(x)))
        return self.linear_3(relu(self.norm_2(self.linear_2(x))))
