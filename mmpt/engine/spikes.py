"""Loss spikes: what is one, and what follows. Decided alike on all ranks, from numbers that all of them have.

A loss is compared with those before it by robust statistics, which a spike in the window does not move:

    deviation = (loss - median) / max(1.4826 MAD, 0.01 |median|),   MAD = median |x - median|

1.4826 makes the MAD of normal noise its standard deviation. Losses that are not finite are no spikes: their steps are
never applied, whatever the policy (see engine/build.py).
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

FEWEST_LOSSES = 10
SMALLEST_SCALE = 0.01


@dataclass(frozen=True)
class SpikeConfig:
    policy: Literal["none", "skip", "rollback"] = "none"
    """What follows a spike. `skip`: each step's loss is judged before its update, which is dropped; it costs a small
    all-reduce and a wait for the device per step. `rollback`: each record's loss is judged; training goes back to a
    checkpoint from before and leaves the data out that led there. `none`: only `loss_deviation` is recorded."""
    deviations: float = 10.0
    """A spike lies this many robust standard deviations above the median of the losses before it."""
    window: int = 100
    """Losses that a new one is compared with: of steps for `skip`, of records otherwise."""
    left_out_steps: int = 0
    """A rollback leaves out the data of this many steps up to the spike; at least of those since the last record."""
    max_rollbacks: int = 3
    """One more is needed, and the run ends with status 78."""

    def __post_init__(self):
        if self.deviations <= 0 or self.window < FEWEST_LOSSES or min(self.left_out_steps, self.max_rollbacks) < 0:
            raise ValueError(
                f"spikes want deviations above 0 ({self.deviations}), a window of {FEWEST_LOSSES} or more "
                f"({self.window}), left_out_steps ({self.left_out_steps}) and max_rollbacks ({self.max_rollbacks}) of "
                "0 or more"
            )


def deviation(loss: float, recent: Sequence[float]) -> float:
    """How far a loss lies above the median of recent ones, in robust standard deviations; 0 while there are few."""
    if len(recent) < FEWEST_LOSSES or not math.isfinite(loss):
        return 0.0
    median = statistics.median(recent)
    spread = statistics.median(abs(x - median) for x in recent)
    scale = max(1.4826 * spread, SMALLEST_SCALE * abs(median), 1e-12)
    return (loss - median) / scale


class Spikes:
    """Judges loss after loss. recent: the losses before, which it adds to; they belong to the run's Progress."""

    def __init__(self, config: SpikeConfig, recent: list[float]):
        self.config, self._recent = config, recent
        self.deviation = 0.0
        """Of the last loss."""
        self.spike = ""
        """What a rollback should be for; nothing if none is due."""

    @property
    def veto(self) -> Callable[[float], bool] | None:
        """Whether to drop the update of a step with this loss, to be asked before each; None for another policy."""
        return self._judge if self.config.policy == "skip" else None

    def at_record(self, loss: float) -> dict[str, float]:
        """Judge the loss of a record; returns what to add to it."""
        if self.config.policy != "skip" and self._judge(loss) and self.config.policy == "rollback":
            self.spike = f"the loss rose to {loss:.4g}, {self.deviation:.1f} deviations above what it was"
        return {"loss_deviation": self.deviation}

    def _judge(self, loss: float) -> bool:
        self.deviation = deviation(loss, self._recent)
        if math.isfinite(loss):
            self._recent.append(loss)
            del self._recent[: -self.config.window]
        return self.deviation > self.config.deviations
