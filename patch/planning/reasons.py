"""Why a stage of a cell would run: nothing there yet, settings or code changed, something before it runs again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from patch.artefacts import PatchError
from patch.experiments import Cell, Stage
from patch.records import Record


def reason(cell: Cell, stage: Stage, run: Path) -> str | None:
    """None where the stage is done. run: the folder of the experiment, results/NAME."""
    folder = run / cell.folder(stage)
    if not (folder / "record.json").is_file():
        return "new"
    try:
        record = Record.read(folder)
    except PatchError:
        return "its record cannot be read"
    if record.key == cell.key(stage):
        missing = sorted(name for name in record.outputs if not (folder / name).is_file())
        return f"missing {', '.join(missing)}" if missing else None
    changes = [*_model_changes(cell, run), *_changes(cell, stage, record)]
    if changes:
        return f"settings changed: {', '.join(changes)}"
    for source, earlier in _before(cell, stage):
        if reason(source, earlier, run):
            return f"{source.folder(earlier)} runs again"
    return "code changed"


def _before(cell: Cell, stage: Stage) -> Iterator[tuple[Cell, Stage]]:
    """The stages whose results a stage reads."""
    if stage == "evaluate" and cell.compression_options:
        yield cell, "compress"
    for source in [cell.uncompressed] if stage in ("compress", "evaluate") else cell.prerequisites.values():
        if source.mask_stage:
            yield source, source.mask_stage


def _changes(cell: Cell, stage: Stage, record: Record) -> Iterator[str]:
    """What is another than when the record was made, as far as it tells."""
    if stage == "evaluate":
        before, tasks = record.arguments.get("tasks"), cell.evaluation.tasks
        if before and tasks:
            yield from _differences("tasks", before, tasks.model_dump())
        elif before or tasks:
            yield f"tasks {'added' if tasks else 'removed'}"
        for name, text in cell.evaluation.perplexity.items():
            there = record.protocol.get(name)
            if there is None:
                yield f"text {name} added"
            else:
                yield from _differences(name, there, {"source": text.source, "length": text.length})
        return
    options, looked_at = cell.options, {"calibration": cell.calibration, "training": cell.training}
    if stage == "compress":
        assert cell.compression_options
        options = cell.compression_options.model_dump(exclude={"inputs"})
        looked_at = {"calibration": cell.compression_calibration}
    else:
        wanted = {"pattern": cell.pattern, "sparsity": cell.sparsity, "seed": cell.seed}
        yield from _differences("", record.arguments, wanted)
    yield from _differences("", record.arguments.get("options") or {}, options)
    for role, used in looked_at.items():
        if used is not None and role in record.protocol:
            known = {"source": used.source, "length": used.length, "samples": used.samples}
            yield from _differences(role, record.protocol[role], known)


def _differences(place: str, before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for name, value in json.loads(json.dumps(now)).items():  # as records have it: lists for tuples
        if before.get(name) != value:
            where = f"{place}.{name}" if place else name
            yield f"{where} {json.dumps(before.get(name))} -> {json.dumps(value)}"


def _model_changes(cell: Cell, run: Path) -> Iterator[str]:
    """Of the model that lies prepared there."""
    try:
        content = json.loads((run / cell.model / "model.json").read_text())
    except (OSError, ValueError):
        return
    if content.get("source") != cell.source.source:
        yield f"model {content.get('source')} -> {cell.source.source}"
    if cell.source.dtype not in ("auto", content.get("dtype")):
        yield f"dtype {content.get('dtype')} -> {cell.source.dtype}"
