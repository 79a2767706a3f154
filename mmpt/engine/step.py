"""One training step: forward, backward, update, over as many micro-batches as memory asks for."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from mmpt import dist
from mmpt.batch import Batch, Tokens, concatenate
from mmpt.engine.build import Engine, StepResult
from mmpt.methods.method import Term, loss_of


def train_step(
    engine: Engine, micro_batches: list[Batch], lr: float, ballot: Sequence[float] = (),
    veto: Callable[[float], bool] | None = None,
) -> tuple[StepResult, dict[str, Term]]:  # fmt: skip
    """One optimizer step on this rank's share of the global batch, given in micro-batches on the device.

    veto: told the loss over all ranks, it says whether the update is to be dropped; all ranks must say the same.

    Returns what the step did, with the ballot's numbers summed over ranks, and the terms of the loss as local (sum,
    count), detached and still on the device. The ballot travels with the counts, and is read when the optimizer has
    waited for the device anyway.
    """
    totals, heard = total_counts(engine, micro_batches, ballot)
    if len(micro_batches) > 1 and engine.method.couples_pairs:
        terms = _cached_backward(engine, micro_batches, totals)
    else:
        terms = _plain_backward(engine, micro_batches, totals)
    dropped = veto is not None and veto(loss_over_ranks(terms, totals))
    with record_function("mmpt: optimizer"):
        result = engine.step(lr, dropped)
    ballot = tuple(heard.tolist())
    engine.settle(result.applied)
    return replace(result, ballot=ballot), terms


def total_counts(
    engine: Engine, micro_batches: list[Batch], ballot: Sequence[float] = ()
) -> tuple[dict[str, Tensor], Tensor]:
    """The divisor of each term: its count over all ranks and micro-batches, known before the first backward; and the
    ballot, summed."""
    counts = [engine.method.counts(batch) for batch in micro_batches]
    names = sorted(counts[0])
    local = torch.tensor([*(sum(count[name] for count in counts) for name in names), *ballot], dtype=torch.float32)
    summed = dist.sum_over_ranks(local.to(engine.device))
    return dict(zip(names, summed, strict=False)), summed[len(names) :]


def loss_over_ranks(terms: dict[str, Term], totals: dict[str, Tensor]) -> float:
    """sum_k weight_k * mean_k over the global batch; the same number on all ranks. Waits for the device."""
    weighted = sorted(name for name, term in terms.items() if term.weight)
    sums = dist.sum_over_ranks(torch.stack([terms[name].sum.float() for name in weighted]))
    means = [sums[i] / totals[name].clamp(min=1) for i, name in enumerate(weighted)]
    return sum(terms[name].weight * mean for name, mean in zip(weighted, torch.stack(means).tolist(), strict=True))


def _plain_backward(engine: Engine, micro_batches: list[Batch], totals: dict[str, Tensor]) -> dict[str, Term]:
    """Terms that do not couple pairs add up over micro-batches, each divided by the same totals."""
    whole: dict[str, Term] = {}
    for i, batch in enumerate(micro_batches):
        terms = engine("terms", batch)
        engine.backward(loss_of(terms, totals, dist.world_size()), last=i + 1 == len(micro_batches))
        for name, term in terms.items():
            before = whole.get(name)
            total = term.sum.detach() if before is None else before.sum + term.sum.detach()
            whole[name] = Term(total, term.count if before is None else before.count + term.count, term.weight)
    return whole


def _cached_backward(engine: Engine, micro_batches: list[Batch], totals: dict[str, Tensor]) -> dict[str, Term]:
    """All negatives with the memory of one micro-batch.

    Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (2021), section 3: encode
    every micro-batch without a graph, take the loss's gradient with respect to all features at once, then encode each
    micro-batch again, with the same random state, and send its slice of that gradient through.
    """
    states, cached = [], []
    with torch.no_grad():
        for batch in micro_batches:
            states.append(random_state(engine.device))
            cached.append(engine("encode", batch))
    features = [_leaf(parts) for parts in zip(*cached, strict=True)]
    terms = engine("objective", *features)
    engine.backward(loss_of(terms, totals, dist.world_size()), last=False)
    gradients = [_values(feature).grad for feature in features]  # None for what carries no gradient, such as ids
    starts = [0] * len(features)
    for i, batch in enumerate(micro_batches):
        set_random_state(states[i], engine.device)
        surrogate = torch.zeros((), device=engine.device)
        for k, feature in enumerate(engine("encode", batch)):
            x, gradient = _values(feature), gradients[k]
            if gradient is not None:
                part = gradient[starts[k] : starts[k] + len(x)] / engine.loss_scale
                surrogate = surrogate + (x * part).sum(dtype=torch.float32)
            starts[k] += len(x)
        engine.backward(surrogate, last=i + 1 == len(micro_batches))
    return {name: Term(term.sum.detach(), term.count, term.weight) for name, term in terms.items()}


def _leaf(parts: tuple[Any, ...]) -> Any:
    """The features of all micro-batches as one, cut off from what made them."""
    if isinstance(parts[0], Tokens):
        whole = concatenate(parts)
        return whole.with_x(_leaf_tensor(whole.x))
    return _leaf_tensor(torch.cat(parts))


def _leaf_tensor(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(x.is_floating_point())


def _values(feature: Any) -> Tensor:
    return feature.x if isinstance(feature, Tokens) else feature


def random_state(device: torch.device) -> list[Tensor]:
    """The state that dropout and stochastic depth draw from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
