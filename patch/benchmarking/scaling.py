"""One mask-learning run on one or several processes at the same global batch: its loss, and the time of a step.

Started alone it runs on one GPU, under torchrun on as many as that starts; rows of both then stand side by side.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from transformers import PreTrainedModel

from patch.data import TokenSet
from patch.learning import distributed
from patch.learning.trainer import Trainer, make_masks
from patch.methods import Learned
from patch.provenance import stamp
from patch.sparsity.patterns import Pattern

WARM_UP = 6
"""Steps that compile, tune and capture, and do not count."""


def measure(
    model: PreTrainedModel, name: str, method: Learned, training: TokenSet, *, device: torch.device, sharded: bool
) -> dict[str, Any]:
    """One row of results/reference/scaling.csv, from all of the method's steps, without priors.

    name: of the model in the row. cross_entropy is the mean over the last tenth of the steps, ms the median time of a
    step after the first WARM_UP. Every process has to call it; all get the same loss.
    """
    tiled = method.title != "MaskLLM"
    pattern, sparsity = (Pattern.parse("tiles:128x128"), 0.45) if tiled else (Pattern.parse("2:4"), 0.5)
    masks = make_masks(
        model, method, pattern, sparsity, {}, seed=0, device=device, sharded=sharded, compiled=device.type == "cuda"
    )
    trainer = Trainer(model, masks, training, seed=0)
    trainer.prepare()
    rows = [trainer.step(step) for step in range(method.steps)]
    last = rows[-max(1, method.steps // 10) :]
    seconds = statistics.median(row["wall_s"] for row in rows[WARM_UP:])
    return {
        "model": name,
        "mode": method.title,
        "processes": distributed.world_size(),
        "sharded": sharded,
        "sequences": method.batch_size,
        "length": trainer.length,
        "steps": method.steps,
        "cross_entropy": round(sum(row["cross_entropy"] for row in last) / len(last), 4),
        "density": round(last[-1]["density"], 4),
        "ms": round(1000 * seconds, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if device.type == "cuda" else None,
        **stamp(),
    }


def with_speedup(rows: Any) -> Any:
    """rows: DataFrame of `measure`'s rows. Adds the column speedup: against one process with the same work."""
    work = ["model", "mode", "sequences", "length"]
    alone = rows[rows.processes == 1].drop_duplicates(work, keep="last").set_index(work).ms
    reference = rows.set_index(work).index.map(alone)
    return rows.assign(speedup=(reference.to_numpy() / rows.ms).round(3))
