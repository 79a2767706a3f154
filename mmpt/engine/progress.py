"""What a run remembers between steps, besides the engine: kept in every checkpoint."""

from dataclasses import dataclass, field
from pathlib import Path

from mmpt.data.left_out import join


@dataclass
class Progress:
    """All ranks hold the same."""

    step: int = 0
    """Batches taken."""
    applied_steps: int = 0
    """Optimizer updates applied: `step` without the skipped ones. The learning rate follows this."""
    data_state: int = 0
    """The loader's integer: pairs delivered so far, over all ranks."""
    data_fingerprint: str = ""
    """The loader's word for which data, in which order, that integer speaks of."""
    consecutive_skips: int = 0
    left_out: list[list[int]] = field(default_factory=list)
    """Stretches of positions that rollbacks have left out; see data/left_out.py."""
    unapplied: list[list[int]] = field(default_factory=list)
    """Stretches of positions whose batches came but whose updates were dropped."""
    rollbacks: int = 0
    recent_losses: list[float] = field(default_factory=list)
    """What the next loss is compared with; see engine/spikes.py."""

    def advance(self, applied: bool, data_state: int, global_batch: int) -> None:
        """Count a step. data_state: where the data goes on after it."""
        if not applied:
            self.unapplied = join(self.unapplied, self.data_state, self.data_state + global_batch)
        self.step += 1
        self.data_state = data_state
        self.applied_steps += applied
        self.consecutive_skips = 0 if applied else self.consecutive_skips + 1

    def stuck(self, max_consecutive_skips: int) -> str:
        """Why this cannot go on: too many updates in a row were dropped; nothing if it can. All ranks decide alike."""
        if self.consecutive_skips < max_consecutive_skips:
            return ""
        return (
            f"{self.consecutive_skips} updates in a row, up to step {self.step}, were dropped because the gradient was "
            "not finite, or the loss a spike. The last checkpoint is whole: continue with a lower optim.lr or another "
            "seed"
        )

    def begin(self, fingerprint: str, data_state: int, run_dir: Path) -> None:
        """Take the loader's word for where the data goes on; ValueError when a run is continued on other data."""
        if self.data_fingerprint not in ("", fingerprint):
            raise ValueError(f"the shards are not those that {run_dir} began with; choose another --run.dir")
        self.data_fingerprint, self.data_state = fingerprint, data_state
