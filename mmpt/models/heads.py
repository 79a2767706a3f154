"""What stands on a tower's tokens to answer a question about them, as BERT has it (Devlin et al. 2019, section 3.1)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from mmpt.models.transformer import BERT_DEVIATION, initialise_linear


class Pooler(nn.Module):
    """tanh(linear(x)), [B, D] -> [B, D], of each sequence's first token."""

    def __init__(self, width: int):
        super().__init__()
        self.dense = nn.Linear(width, width)
        initialise_linear(self.dense, BERT_DEVIATION)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dense(x))


class HeadTransform(nn.Module):
    """norm(gelu(linear(x))), [M, D] -> [M, D]: what comes before the output weights of a masked word or region."""

    def __init__(self, width: int, norm_eps: float):
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, norm_eps)
        initialise_linear(self.dense, BERT_DEVIATION)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(gelu(self.dense(x)))


class MaskedWordHead(nn.Module):
    """Logits over the vocabulary, transform(x) decoder^T + bias: [M, D] -> [M, V], for M words to be guessed.

    tied: the token embedding [V, D] that is the decoder too (BERT, UNITER, ALBEF); None for weights of its own (ViLT).
    """

    def __init__(self, width: int, vocab_size: int, tied: nn.Parameter | None = None, norm_eps: float = 1e-12):
        super().__init__()
        self.transform = HeadTransform(width, norm_eps)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        self.decoder: nn.Parameter
        if tied is None:
            self.decoder = nn.Parameter(torch.empty(vocab_size, width))
            nn.init.normal_(self.decoder, std=BERT_DEVIATION)
        else:
            if tied.shape != (vocab_size, width):
                raise ValueError(f"a decoder is [{vocab_size}, {width}], what it is tied to is {list(tied.shape)}")
            tie(self, "decoder", tied)

    def forward(self, x: Tensor) -> Tensor:
        return linear(self.transform(x), self.decoder, self.bias)


def tie(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Give a module another module's parameter under a name of its own: the same object, so that ZeRO 3 gathers it
    around both forwards and both add to one gradient. State dicts hold it once, under its owner's name.

    The owner is registered first in the method: a parameter is known by its first name.
    """

    def leave_out(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
        del state[prefix + name]

    def not_missing(holder: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        state.setdefault(prefix + name, holder.get_parameter(name).detach())

    module.register_parameter(name, parameter)
    module.register_state_dict_post_hook(leave_out)
    module.register_load_state_dict_pre_hook(not_missing)


class RegionFeatureHead(nn.Module):
    """The feature vector of a region to be guessed, transform(x) W + bias: [M, D] -> [M, F].

    tied: W [D, F], the weight of the linear layer that features enter by (Chen et al. 2020, UNITER, released code).
    """

    def __init__(self, width: int, tied: Tensor, norm_eps: float = 1e-12):
        super().__init__()
        self.transform = HeadTransform(width, norm_eps)
        self.bias = nn.Parameter(torch.zeros(tied.shape[1]))
        assert isinstance(tied, nn.Parameter)
        tie(self, "weight", tied)

    def forward(self, x: Tensor) -> Tensor:
        return self.transform(x) @ self.weight + self.bias  # type: ignore[operator]


class RegionClassHead(nn.Module):
    """Logits over the detector's classes, [M, D] -> [M, C], for M regions to be guessed."""

    def __init__(self, width: int, classes: int, norm_eps: float = 1e-12):
        super().__init__()
        self.transform = HeadTransform(width, norm_eps)
        self.classes = nn.Linear(width, classes)
        initialise_linear(self.classes, BERT_DEVIATION)

    def forward(self, x: Tensor) -> Tensor:
        return self.classes(self.transform(x))
