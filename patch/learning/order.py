"""In which order a run reads its training text: every epoch is a permutation of its own, a function of the seed."""

from __future__ import annotations

import torch
from torch import Tensor


class Shuffled:
    """Sequences by their position in the run, so that a resumed run reads on where it stopped."""

    def __init__(self, ids: Tensor, seed: int):
        """ids: integer [sequences, length]; they may stay in a file."""
        self.ids, self.seed = ids, seed
        self._epoch = -1
        self._permutation = torch.empty(0)

    def __getitem__(self, positions: range) -> Tensor:
        """Token ids [len(positions), length]."""
        return self.ids[[self._row(position) for position in positions]]

    def _row(self, position: int) -> int:
        epoch, within = divmod(position, len(self.ids))
        if self._epoch != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._permutation = epoch, torch.randperm(len(self.ids), generator=generator)
        return int(self._permutation[within])
