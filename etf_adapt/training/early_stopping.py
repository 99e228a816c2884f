"""Early stopping: the count of evaluations without improvement, which is part of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class EarlyStopping:
    """Counts evaluations since the best one; ``patience`` of them end the run, None never."""

    patience: int | None
    misses: int = 0

    def count(self, *, is_better: bool) -> None:
        """Count an evaluation."""
        self.misses = 0 if is_better else self.misses + 1

    @property
    def is_due(self) -> bool:
        """Whether the run is to end."""
        return self.patience is not None and self.misses >= self.patience
