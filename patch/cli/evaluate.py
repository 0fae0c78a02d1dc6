"""Measure a model, pruned or dense."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from patch.artefacts import PatchError, exclusive
from patch.cli.options import (
    Device,
    Dtype,
    Key,
    Model,
    Output,
    Revision,
    Threads,
    device_name,
    parse_integer,
    parse_pairs,
    tokens_from,
    use_threads,
)

log = logging.getLogger("patch")


def evaluate(
    model: Model,
    output: Output,
    mask: Annotated[Path | None, typer.Option(help="mask.safetensors of `prune`; none for the dense model.")] = None,
    compressed: Annotated[Path | None, typer.Option(help="compressed.safetensors of `compress`, instead.")] = None,
    inputs: Annotated[str, typer.Option(help="Quantise the layers' inputs: none, int8 or float8.")] = "none",
    text: Annotated[
        list[str] | None,
        typer.Option(help="NAME=TOKENS for perplexity: a token file or a text source, e.g. wikitext2=wikitext2."),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens per window, for text sources.", min=2)] = 4096,
    task: Annotated[list[str] | None, typer.Option(help="A zero-shot task; repeat for more.")] = None,
    task_source: Annotated[str, typer.Option(help="Where questions come from: hub or embedded.")] = "hub",
    limit: Annotated[int | None, typer.Option(help="Only the first questions of every task.", min=1)] = None,
    limit_for: Annotated[list[str] | None, typer.Option(help="TASK=N, another limit for one task.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions scored together.", min=1)] = 8,
    state: Annotated[
        Path | None, typer.Option(help="Directory for finished parts; default: state/ in the output directory.")
    ] = None,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    key: Key = "",
) -> None:
    """Measure a model, pruned or dense, on texts and tasks: write record.json and items.parquet."""
    import pandas as pd

    from patch.artefacts import atomic_path
    from patch.compression.artefact import CompressedSet
    from patch.compression.inputs import quantise_inputs_
    from patch.evaluation import evaluate_model
    from patch.experiments import Tasks
    from patch.models import load_model, load_tokenizer, prunable_linears
    from patch.records import recording
    from patch.sparsity.maskset import MaskSet, fingerprint

    if not text and not task:
        raise PatchError("nothing to measure: give at least one --text or --task.")
    if mask and compressed:
        raise PatchError("--mask and --compressed: give one; a compressed file holds the mask that it was made with.")
    limits = {name: parse_integer(name, value) for name, value in parse_pairs(limit_for or [], "--limit-for").items()}
    tasks = (
        Tasks(names=tuple(task), source=task_source, limit=limit, limits=limits, batch_size=batch_size)
        if task
        else None
    )
    with exclusive(output):
        arguments = {
            "model": model,
            "revision": revision,
            "dtype": dtype,
            "mask": str(mask) if mask else None,
            "compressed": str(compressed) if compressed else None,
            "inputs": inputs,
            "texts": text,
            "tasks": tasks.model_dump() if tasks else None,
        }
        use_threads(threads)
        with recording("evaluate", key, arguments, output) as record:
            loaded = load_model(model, revision=revision, dtype=dtype)
            linears = prunable_linears(loaded)
            record.inputs["model"] = fingerprint(linears)
            if mask:
                masks = MaskSet.load(mask)
                masks.apply_(linears)
                record.inputs["mask"] = masks.checksum
            loaded.to(device_name(device))  # type: ignore[arg-type]
            if compressed:
                weights = CompressedSet.load(compressed)
                weights.apply_(linears)
                record.inputs["compressed"] = weights.checksum
            quantise_inputs_(linears.values(), inputs)
            texts = {
                name: tokens_from(source, model, revision, "joined", None, length, None)
                for name, source in parse_pairs(text or [], "--text").items()
            }
            tokenizer = load_tokenizer(model, revision=revision)
            results = evaluate_model(loaded, tokenizer, texts, tasks, state or output / "state")
            record.metrics = [metric for result in results.values() for metric in result.metrics]
            record.protocol = {name: result.protocol for name, result in results.items()}
            items = pd.DataFrame([item for result in results.values() for item in result.items])
            with atomic_path(output / "items.parquet") as temporary:
                items.to_parquet(temporary, index=False)
    for metric in record.metrics:
        error = f" ± {metric.stderr:.2g}" if metric.stderr is not None else ""
        log.info("%-14s %-10s %.4g%s", metric.subject, metric.name, metric.value, error)
