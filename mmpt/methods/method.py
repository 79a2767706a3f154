"""What every method offers, and how its terms become one loss."""

import contextlib
from collections.abc import Iterator
from copy import deepcopy
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from mmpt import dist
from mmpt.batch import Batch
from mmpt.inputs import InputSpec
from mmpt.models.batch_norm import discard, settle
from mmpt.ops.contrast.loss import Contrast
from mmpt.ops.contrast.softmax import Softmax

NAMED = {"objective": "loss"}
"""What a profile calls a function of a method, where its name says less."""


class Term(NamedTuple):
    """A term of the loss as (local sum, local count): the mean over all ranks and micro-batches is taken later.

    A term of weight 0 is reported and not trained on.
    """

    sum: Tensor
    """Scalar."""
    count: Tensor
    """Scalar, fp32."""
    weight: float = 1.0


class MethodConfig(Protocol):
    """A frozen dataclass beside its method."""

    def inputs(self) -> InputSpec: ...

    def build(self) -> "Method": ...


class Method(nn.Module):
    """encode(batch) -> features; objective(*features) -> terms. Subclasses define both, and `counts`.

    What a method remembers between steps is a buffer, equal on all ranks; it changes in `after_step` alone, so that a
    forward may run twice (cached accumulation, activation checkpointing) and a skipped step leaves no trace.
    """

    couples_pairs: bool
    """The loss of a pair depends on the other pairs: accumulation must cache features."""
    ensemble: Literal["features", "similarities"] = "features"
    """How zero-shot classification averages over prompts."""
    fuses: bool = False
    """Image and text meet inside the model: they are scored pair by pair, by `score_pairs`, and not by `score`."""
    student: str = ""
    """Name of the submodule of which there is a momentum copy; empty for methods without one."""
    momentum: float = 1.0
    """The copy follows it by t <- momentum * t + (1 - momentum) * s after every applied step."""
    _outside: tuple[nn.Module, ...] = ()  # in a tuple, so that the copy is no submodule: no engine shards or rounds it

    def forward(self, call: str, *args: Any) -> Any:
        """Run the function of that name: parameters are only whole while the engine runs the forward."""
        with record_function(f"mmpt: {NAMED.get(call, call)}"):
            return getattr(self, call)(*args)

    def encode(self, batch: Batch) -> tuple[Any, ...]:
        raise NotImplementedError

    def objective(self, *features: Any) -> dict[str, Term]:
        raise NotImplementedError

    def counts(self, batch: Batch) -> dict[str, float]:
        """Local count of each weighted term, from the batch alone."""
        raise NotImplementedError

    def after_step(self) -> None:
        """Called once after every step that was applied, on every rank."""
        settle(self)

    def after_skip(self) -> None:
        """Called instead when the step was skipped because a gradient was not finite."""
        discard(self)

    def make_teacher(self) -> None:
        """For constructors: begin the momentum copy of `student`, in fp32, in training mode as that is."""
        teacher = deepcopy(self.get_submodule(self.student)).float()
        self._outside = (teacher.requires_grad_(False),)

    @property
    def teacher(self) -> nn.Module | None:
        """The momentum copy. The engine lets it follow; `teaching` lets it compute."""
        return self._outside[0] if self._outside else None

    @contextlib.contextmanager
    def teaching(self) -> Iterator[Any]:
        """The momentum copy inside: without gradient, in the compute type of the method."""
        parameter = next(self.parameters())
        half = parameter.dtype in (torch.bfloat16, torch.float16)
        with torch.no_grad(), torch.autocast(parameter.device.type, parameter.dtype if half else None, enabled=half):
            yield self._outside[0]

    def terms(self, batch: Batch) -> dict[str, Term]:
        """objective(encode(batch)), in one forward."""
        with record_function("mmpt: encode"):
            features = self.encode(batch)
        with record_function("mmpt: loss"):
            return self.objective(*features)


def contrastive_terms(found: Contrast, pairs: int, scale: Tensor) -> dict[str, Term]:
    """The contrastive loss of this rank's pairs; reported are the shares of pairs that score highest in the global
    batch, both ways, the logit scale, and the probability that has no gradient."""
    count = torch.full((), float(pairs), device=scale.device)
    terms = {
        "contrastive": Term(found.loss, count),
        "accuracy_i2t": Term(found.correct_i2t, count, 0.0),
        "accuracy_t2i": Term(found.correct_t2i, count, 0.0),
        "logit_scale": Term(scale.detach().sum(), torch.ones_like(count), 0.0),
    }
    if found.dropped is not None:
        terms["dropped_probability"] = Term(found.dropped, count, 0.0)
    return terms


@torch.no_grad()
def reported_terms(logits: Tensor, scale: Tensor) -> dict[str, Term]:
    """Share of pairs that score highest in the global batch, both ways, given the [B, N] logits of this rank's images
    with all texts, and the logit scale; weight 0."""
    first, count = first_pair(logits), pairs_of(logits)
    own = slice(first, first + len(logits))
    over_texts = Softmax(len(logits), 1, logits.dtype, logits.device)
    over_images = Softmax(logits.shape[1], 0, logits.dtype, logits.device)
    positive = torch.zeros_like(logits, dtype=torch.bool)
    positive[:, own].fill_diagonal_(True)
    over_texts.add(logits, positive, slice(None))
    over_images.add(logits, positive, slice(None))
    over_images.join_ranks()
    return {
        "accuracy_i2t": Term(over_texts.correct(slice(None)), count, 0.0),
        "accuracy_t2i": Term(over_images.correct(own), count, 0.0),
        "logit_scale": Term(scale.detach().sum(), torch.ones_like(count), 0.0),
    }


def first_pair(logits: Tensor) -> int:
    """The column of this rank's first image's own text in [B, N] logits: texts are gathered rank by rank."""
    return dist.rank() * len(logits)


def pairs_of(logits: Tensor) -> Tensor:
    """B as a scalar in fp32, on the logits' device."""
    return torch.full((), float(len(logits)), device=logits.device)


def loss_of(terms: dict[str, Term], total_counts: dict[str, Any], world_size: int) -> Tensor:
    """W * sum_k weight_k * sum_k / total_count_k, a scalar: what a rank runs backward from.

    total_counts: each weighted term's count over all ranks and micro-batches, as numbers or scalar tensors. The engine
    averages gradients over ranks, hence W; then all ranks together follow sum_k weight_k * mean_k. A term that nothing
    in the global batch counts towards adds 0. Raises ValueError where no term has a weight.
    """
    parts = [
        term.weight * term.sum / torch.as_tensor(total_counts[name], dtype=torch.float32).clamp(min=1)
        for name, term in terms.items()
        if term.weight
    ]
    if not parts:
        raise ValueError(f"none of the terms {sorted(terms)} has a weight: there is nothing to train on")
    return world_size * torch.stack(parts).sum()
