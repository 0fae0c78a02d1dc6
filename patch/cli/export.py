"""Write a pruned model as a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from patch.cli.options import Dtype, Model, Revision


def export(
    model: Model,
    mask: Annotated[Path, typer.Option(help="mask.safetensors of `prune` or `learn`.")],
    output: Annotated[Path, typer.Option(help="Directory to write; an earlier export there is replaced.")],
    record: Annotated[
        list[Path] | None,
        typer.Option(help="record.json of `prune`, `learn`, `evaluate` or of the dense `evaluate`; repeat for more."),
    ] = None,
    shard_size: Annotated[str, typer.Option(help="Larger checkpoints are written as several files.")] = "5GB",
    revision: Revision = None,
    dtype: Dtype = "auto",
) -> None:
    """Write the pruned model as a checkpoint that transformers and vLLM load, with its MaskSet and a model card.

    The zeros are in dense weights, and no key of the config speaks of sparsity: it loads anywhere and runs dense there.
    """
    from patch import exporting
    from patch.records import Record

    records = [Record.read(path.parent if path.name == "record.json" else path) for path in record or []]
    exporting.export(
        model, mask, output, records=records, revision=revision, dtype=dtype, shard_size=shard_size
    )  # fmt: skip
