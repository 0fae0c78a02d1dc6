"""Reading a step's numbers back while the device works on: a plain `.tolist()` would wait for all that is queued."""

from __future__ import annotations

import torch
from torch import Tensor


class Readback:
    """Copies a tensor to the host when made; `tolist` waits for that copy alone, not for what was queued after it."""

    def __init__(self, values: Tensor):
        """values: [n], any device."""
        self._copied: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._values = values.clone()

    def tolist(self) -> list[float]:
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()
