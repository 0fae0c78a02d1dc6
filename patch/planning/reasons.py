"""Why a stage or a benchmark would run: nothing there yet, settings or code changed, something before it runs again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from patch.artefacts import PatchError
from patch.benchmark_jobs import BenchmarkJob
from patch.experiments import Cell, Stage
from patch.records import Record


def reason(cell: Cell, stage: Stage, run: Path) -> str | None:
    """None where the stage is done. run: the folder of the experiment, results/NAME."""
    folder = run / cell.folder(stage)
    record = _read(folder)
    if isinstance(record, str):
        return record
    if record.key == cell.key(stage):
        return _missing(record, folder)
    changes = [*_model_changes(cell, run), *_changes(cell, stage, record)]
    if changes:
        return f"settings changed: {', '.join(changes)}"
    for source, earlier in _before(cell, stage):
        if reason(source, earlier, run):
            return f"{source.folder(earlier)} runs again"
    return "code changed"


def benchmark_reason(job: BenchmarkJob, run: Path) -> str | None:
    """As `reason`, of a benchmark."""
    folder = run / job.folder
    record = _read(folder)
    if isinstance(record, str):
        return record
    if record.key == job.key:
        return _missing(record, folder)
    if changes := list(_option_changes(record.arguments.get("options") or {}, job.options)):
        return f"settings changed: {', '.join(changes)}"
    if job.cell and job.cell.mask_stage and reason(job.cell, job.cell.mask_stage, run):
        return f"{job.cell.folder(job.cell.mask_stage)} runs again"
    return "code changed"


def _read(folder: Path) -> Record | str:
    """The record, or why there is none."""
    if not (folder / "record.json").is_file():
        return "new"
    try:
        return Record.read(folder)
    except PatchError:
        return "its record cannot be read"


def _missing(record: Record, folder: Path) -> str | None:
    missing = sorted(name for name in record.outputs if not (folder / name).is_file())
    return f"missing {', '.join(missing)}" if missing else None


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


def _option_changes(before: dict[str, Any], options: Sequence[str]) -> Iterator[str]:
    """Of a command's options, as a record has them, against those that it would be given now."""
    now: dict[str, list[str]] = {}
    for word in options:
        if word.startswith("--"):
            values = now.setdefault(word.removeprefix("--"), [])
        else:
            values.append(word)
    flags = [name for name, value in before.items() if value is True]
    for name in dict.fromkeys([*now, *flags]):
        earlier = before.get(name)
        if isinstance(earlier, bool):
            earlier, current = "on" if earlier else "off", "on" if name in now else "off"
        else:
            current = " ".join(now[name])
            earlier = " ".join(map(str, earlier if isinstance(earlier, list) else [earlier]))
        if earlier != current:
            yield f"{name} {earlier} -> {current}"


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
