"""The saved state of a training job, from which an interrupted one goes on as if nothing had happened.

One file per process and saved step, `step-000150.rank-0.safetensors`, in a directory that belongs to the job's key; the
last two steps are kept, since processes that are killed may not all have saved the last one. Data order, noise and
schedules follow from the step, so what is trained, optimiser and curves are all there is to keep.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from patch.artefacts import PatchError, read_tensors, write_tensors

SCHEMA = "patch.learning/2"
KEPT = 2


@dataclass(frozen=True)
class State:
    step: int
    """Optimiser steps done."""
    tensors: dict[str, Tensor]
    curves: list[dict[str, float]]


class StateDirectory:
    """Where one process keeps its states. Different settings have different identities and never mix."""

    def __init__(self, directory: Path, identity: dict[str, Any], rank: int):
        """identity: everything that determines the run, the number of processes included (JSON)."""
        self.directory, self.identity, self.rank = directory, identity, rank

    def save(self, state: State) -> None:
        """Write atomically, then delete all but the last two."""
        metadata = {"identity": self.identity, "step": state.step, "curves": state.curves}
        write_tensors(self._path(state.step), state.tensors, SCHEMA, metadata)
        abandoned = self.directory.glob(f".step-*.rank-{self.rank}.*")  # of processes that were killed while writing
        for path in [*abandoned, *(self._path(step) for step in self._steps()[:-KEPT])]:
            path.unlink(missing_ok=True)

    def newest(self) -> int:
        """Step of the newest saved state, 0 where there is none."""
        return max(self._steps(), default=0)

    def leads_from(self, step: int) -> bool:
        """Whether a run can go on after `step`: its state is there, or it is 0 and no state has been deleted yet."""
        steps = self._steps()
        return step in steps or (step == 0 and len(steps) < KEPT)

    def discard_after(self, step: int) -> None:
        """Delete newer states than that of `step`. Raises PatchError, as `load` does, for one of another run."""
        for newer in self._steps():
            if newer > step:
                self.load(newer)
                self._path(newer).unlink()

    def load(self, step: int) -> State:
        """Raises PatchError for a damaged file, and for one of other settings or another number of processes."""
        tensors, metadata, _ = read_tensors(self._path(step), SCHEMA)
        if metadata["identity"] != self.identity:
            raise PatchError(
                f"{self._path(step)}: belongs to a run with other settings or another number of processes; "
                "use the same settings, or delete it to start anew."
            )
        return State(metadata["step"], tensors, metadata["curves"])

    def _steps(self) -> list[int]:
        return _steps(self.directory, self.rank)

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:06d}.rank-{self.rank}.safetensors"


def kept(directory: Path | None) -> str:
    """What an error says of the states in a directory; nothing where there is none."""
    steps = _steps(directory, "*") if directory else []
    return f" The state after step {steps[-1]} is kept." if steps else ""


def _steps(directory: Path, rank: int | str) -> list[int]:
    files = directory.glob(f"step-*.rank-{rank}.safetensors")
    return sorted(int(found[1]) for file in files if (found := re.match(r"step-(\d+)\.", file.name)))
