"""What every method offers, and how its terms become one loss."""

from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mmpt import dist
from mmpt.batch import Batch, InputSpec
from mmpt.objectives.contrastive import correct_matches, one_sided_info_nce


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
    """encode(batch) -> features; objective(*features) -> terms. Subclasses define both, and `counts`."""

    couples_pairs: bool
    """The loss of a pair depends on the other pairs: accumulation must cache features."""
    ensemble: Literal["features", "similarities"] = "features"
    """How zero-shot classification averages over prompts."""

    def forward(self, call: str, *args: Any) -> Any:
        """Run the function of that name: parameters are only whole while the engine runs the forward."""
        return getattr(self, call)(*args)

    def encode(self, batch: Batch) -> tuple[Any, ...]:
        raise NotImplementedError

    def objective(self, *features: Any) -> dict[str, Term]:
        raise NotImplementedError

    def counts(self, batch: Batch) -> dict[str, float]:
        """Local count of each weighted term, from the batch alone."""
        raise NotImplementedError

    def terms(self, batch: Batch) -> dict[str, Term]:
        """objective(encode(batch)), in one forward."""
        return self.objective(*self.encode(batch))


def contrastive_terms(logits_i2t: Tensor, logits_t2i: Tensor, scale: Tensor) -> dict[str, Term]:
    """The symmetric contrastive loss of this rank's images against all texts ([B, N] logits), with what is reported."""
    first, count = dist.rank() * len(logits_i2t), torch.tensor(float(len(logits_i2t)), device=logits_i2t.device)
    loss = one_sided_info_nce(logits_i2t, logits_t2i, first, dist.logsumexp_over_ranks)
    i2t, t2i = correct_matches(logits_i2t, logits_t2i, first, dist.max_over_ranks)
    return {
        "contrastive": Term(loss, count),
        "accuracy_i2t": Term(i2t, count, 0.0),
        "accuracy_t2i": Term(t2i, count, 0.0),
        "logit_scale": Term(scale.detach().sum(), torch.ones_like(count), 0.0),
    }


def loss_of(terms: dict[str, Term], total_counts: dict[str, Any], world_size: int) -> Tensor:
    """W * sum_k weight_k * sum_k / total_count_k: what a rank runs backward from.

    The engine averages gradients over ranks, hence W; then all ranks together follow sum_k weight_k * mean_k.
    """
    parts = [t.weight * t.sum / max(total_counts[name], 1) for name, t in terms.items() if t.weight]  # type: ignore[type-var]
    return world_size * sum(parts[1:], parts[0])
