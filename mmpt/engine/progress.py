"""What a run remembers between steps, besides the engine: kept in every checkpoint."""

from dataclasses import dataclass
from pathlib import Path

from mmpt.failure import NotFinite


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

    def advance(self, applied: bool, data_state: int, max_consecutive_skips: int) -> None:
        """Count the step; NotFinite when too many in a row could not be applied. All ranks decide alike."""
        self.step += 1
        self.data_state = data_state
        self.applied_steps += applied
        self.consecutive_skips = 0 if applied else self.consecutive_skips + 1
        if self.consecutive_skips >= max_consecutive_skips:
            raise NotFinite(
                f"the gradient was not finite in {self.consecutive_skips} steps in a row, up to step {self.step}; "
                "nothing was updated in them. The last checkpoint is whole: continue with a lower optim.lr or another "
                "seed"
            )

    def same_data(self, fingerprint: str, run_dir: Path) -> None:
        """Remember what data a run began with; ValueError when it is continued on other data."""
        if self.data_fingerprint not in ("", fingerprint):
            raise ValueError(f"the shards are not those that {run_dir} began with; choose another --run.dir")
        self.data_fingerprint = fingerprint
