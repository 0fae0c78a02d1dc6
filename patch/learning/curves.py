"""Live curves of a learning run to Weights & Biases, where it is asked for. Files and MLflow get them afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from patch.artefacts import PatchError
from patch.learning import distributed


@contextlib.contextmanager
def observer(project: str | None, settings: dict[str, Any]) -> Iterator[Callable[[dict[str, float]], None] | None]:
    """Yield what to call with every step's row: a W&B logger for `project`, or None without one.

    Raises PatchError where wandb is not installed.
    """
    if project is None or not distributed.is_main():
        yield None
        return
    try:
        import wandb
    except ImportError:
        raise PatchError("Weights & Biases is not installed: pip install wandb, or leave it out.") from None
    run = wandb.init(project=project, config=settings)
    try:
        yield lambda row: run.log({f"train/{name}": value for name, value in row.items()}, step=int(row["step"]))
    finally:
        run.finish()
