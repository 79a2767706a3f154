"""What happened since the last record: summed on the device, reduced over ranks once per record."""

import resource
import sys
import time

import torch

from mmpt import dist
from mmpt.data.device import Delivery
from mmpt.engine.build import StepResult
from mmpt.engine.stragglers import Stragglers
from mmpt.methods.method import Term


class Metrics:
    """Collects steps; `record` reduces and clears. Terms stay on the device until then. Construction is collective."""

    def __init__(self, pairs_per_step: int, device: torch.device):
        self.pairs_per_step, self.device = pairs_per_step, device
        self.skipped_steps = 0
        self.straggler = ""
        """A line about the rank that held the others up before the last record, if one did."""
        self._stragglers = Stragglers(device)
        self._clear()

    def _clear(self) -> None:
        self._terms: dict[str, Term] = {}
        self._step_seconds: list[float] = []
        self._data_seconds = 0.0
        self._grad_norm = 0.0
        self._quarantined, self._texts, self._text_tokens = 0, 0, 0
        self._since = time.perf_counter()

    def add(
        self, result: StepResult, terms: dict[str, Term], data_seconds: float, step_seconds: float, delivery: Delivery
    ) -> None:
        """One step: its terms (local sums and counts), the wait for its batch and its whole duration, in seconds, and
        what it was made on."""
        for name, term in terms.items():
            before = self._terms.get(name)
            self._terms[name] = (
                term if before is None else Term(before.sum + term.sum, before.count + term.count, term.weight)
            )
        self._data_seconds += data_seconds
        self._step_seconds.append(step_seconds)
        self._stragglers.add(data_seconds, step_seconds)
        self._quarantined += len(delivery.quarantined)
        self._texts += sum(len(batch) for batch in delivery.micro_batches)
        self._text_tokens += sum(len(batch.text.x) for batch in delivery.micro_batches)
        self._grad_norm = result.grad_norm
        self.skipped_steps += not result.applied

    def record(self) -> dict[str, float]:
        """The record of the steps since the last one, the same on every rank. Collective.

        A term is its sum over its count, over ranks and steps; `loss` is the weighted sum of the terms in the loss.
        Times are those of the slowest rank.
        """
        names = sorted(self._terms)
        local = torch.zeros(len(names) + 2, 2, device=self.device)
        for row, name in zip(local, names, strict=False):
            row[0], row[1] = self._terms[name].sum, self._terms[name].count
        local[-2, 0] = self._quarantined
        local[-1, 0], local[-1, 1] = self._text_tokens, self._texts
        *sums, (quarantined, _), (text_tokens, texts) = dist.sum_over_ranks(local).tolist()
        out: dict[str, float] = {"loss": 0.0}
        for name, (total, count) in zip(names, sums, strict=True):
            value = total / count if count else float("nan")
            out[name] = value
            if self._terms[name].weight:
                out["loss"] += self._terms[name].weight * value
        seconds = time.perf_counter() - self._since
        times = sorted(self._step_seconds)
        slowest = [
            seconds,
            self._data_seconds / seconds,
            *(_percentile(times, q) for q in (0.5, 0.95, 1.0)),
            memory_gib(),
        ]
        worst = dist.max_over_ranks(torch.tensor(slowest, device=self.device)).tolist()
        pairs = self.pairs_per_step * len(times)
        out |= {
            "grad_norm": self._grad_norm,
            "samples_per_second": pairs / worst[0],
            "samples_per_second_per_device": pairs / worst[0] / dist.world_size(),
            "data_wait_share": worst[1],
            "step_seconds_p50": worst[2],
            "step_seconds_p95": worst[3],
            "step_seconds_max": worst[4],
            "memory_gib": worst[5],
            "skipped_steps": float(self.skipped_steps),
            "quarantine_rate": quarantined / pairs,
            "mean_text_tokens": text_tokens / texts,
        }
        compared, self.straggler = self._stragglers.record()
        self._clear()
        return out | compared


def _percentile(ordered: list[float], q: float) -> float:
    """The smallest value with at least a share q of all at or below it."""
    return ordered[max(0, -(-int(q * 1000) * len(ordered) // 1000) - 1)]


def memory_gib() -> float:
    """Peak memory so far: of the device on CUDA, resident of this process elsewhere."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
