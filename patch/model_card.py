"""The README.md of an exported model: what it is, how to run it, what it scores, where it comes from.

Its header is that of Hugging Face model cards, so that the hub shows base model, tags and results.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from patch import embedded
from patch.artefacts import PatchError
from patch.methods import METHODS
from patch.models import PreparedModel
from patch.records import Metric, Record
from patch.sparsity.maskset import MaskSet

PAPER = "https://arxiv.org/abs/2509.23410"
_PERCENT = ("acc", "acc_norm")
"""Metrics that records hold as shares of 1 and cards show in percent."""


def model_card(masks: MaskSet, records: Sequence[Record], model: str, revision: str | None = None) -> str:
    """The text of the card.

    model, revision: the unpruned one. records: of the mask's making (`prune`, `learn`) and of evaluations, also of the
    dense model's.
    Raises PatchError for a record of another mask or another model.
    """
    source, revision = _origin(model, revision)
    evaluations: dict[str, list[Record]] = {"dense": [], "pruned": []}
    making = None
    for record in records:
        if record.stage in ("prune", "learn"):
            _check(record, record.outputs.get("mask.safetensors"), masks.checksum, "mask")
            making = record
        elif "mask" in record.inputs:
            _check(record, record.inputs["mask"], masks.checksum, "mask")
            evaluations["pruned"].append(record)
        else:
            _check(record, record.inputs.get("model"), masks.base_fingerprint, "model")
            evaluations["dense"].append(record)
    name = f"{Path(source).name.removeprefix(embedded.PREFIX)} at {100 * masks.sparsity:.1f} % sparsity"
    parts = [
        f"---\n{_header(source, name, evaluations['pruned'])}\n---",
        f"# {name}",
        _introduction(masks, source, revision),
        _usage(masks),
        *_results(evaluations),
        _provenance(masks, making, evaluations["pruned"]),
    ]
    return "\n\n".join(parts) + "\n"


def _origin(model: str, revision: str | None) -> tuple[str, str | None]:
    if model.endswith(".json"):
        prepared = PreparedModel.read(model)
        return prepared.source, prepared.revision
    return model, revision


def _check(record: Record, found: str | None, expected: str | None, what: str) -> None:
    if expected is None or found != expected:
        raise PatchError(
            f"record of the stage {record.stage}, {record.date or 'undated'}: it is of another {what} than the one to "
            f"export ({found or 'none'}, not {expected or 'unknown'}); give the records of this one."
        )


def _header(source: str, name: str, evaluations: list[Record]) -> str:
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=metric.subject,
            dataset_name=metric.subject,
            metric_type=metric.name,
            metric_value=round(_shown(metric), 2),
        )
        for record in evaluations
        for metric in record.metrics
    ]
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not Path(source).exists()
    data = ModelCardData(
        base_model=source if on_hub else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["patch", "pruning", "sparsity"],
        model_name=name if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()


def _introduction(masks: MaskSet, source: str, revision: str | None) -> str:
    title = METHODS[masks.recipe["method"]].title if masks.recipe.get("method") in METHODS else "a mask"
    patterns = sorted({str(mask.pattern) for mask in masks.linears.values()})
    named = Path(source).name if Path(source).exists() else source
    return (
        f"{named}{f' (revision {revision})' if revision else ''}, pruned with {title} to {100 * masks.sparsity:.2f} % "
        f"zeros in the {len(masks.linears)} linear layers of its decoder blocks (pattern {', '.join(patterns)}). "
        f"Embeddings, norms and head are unchanged. Made with an implementation of PATCH ({PAPER}). "
        "The base model's licence applies."
    )


def _usage(masks: MaskSet) -> str:
    tiled = any(mask.pattern.kind == "tiles" for mask in masks.linears.values())
    return f"""## Use

An ordinary transformers checkpoint:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("DIRECTORY")
```

transformers and vLLM run it as a dense model with zeros in it: not smaller, not faster. `mask.safetensors` says which
weights are zero{" and which tiles are dense" if tiled else ""}; with it, `patch.load("DIRECTORY")` of the
implementation above packs 2:4 groups."""


def _results(evaluations: dict[str, list[Record]]) -> Iterator[str]:
    columns = {name: _by_subject(records) for name, records in evaluations.items() if records}
    if not columns:
        return
    yield "## Results"
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for key in dict.fromkeys(key for values in columns.values() for key in values):
        lines.append(f"| {', '.join(key)} | {' | '.join(_cell(values.get(key)) for values in columns.values())} |")
    yield "\n".join(lines)
    protocols = {
        subject: protocol
        for records in evaluations.values()
        for record in records
        for subject, protocol in record.protocol.items()
    }
    yield "± is one standard error; accuracies are in percent. How each was measured:"
    yield "\n".join(f"* {subject}: {_told(protocol)}" for subject, protocol in protocols.items())


def _by_subject(records: list[Record]) -> dict[tuple[str, str], Metric]:
    return {(metric.subject, metric.name): metric for record in records for metric in record.metrics}


def _cell(metric: Metric | None) -> str:
    if metric is None:
        return ""
    error = f" ± {_shown(metric) / metric.value * metric.stderr:.2f}" if metric.stderr and metric.value else ""
    return f"{_shown(metric):.2f}{error}"


def _shown(metric: Metric) -> float:
    return metric.value * (100 if metric.name in _PERCENT else 1)


def _provenance(masks: MaskSet, making: Record | None, evaluations: list[Record]) -> str:
    recipe = masks.recipe
    rows: dict[str, Any] = {
        "method": recipe.get("method"),
        "options": json.dumps(recipe["options"]) if recipe.get("options") else None,
        "pattern": recipe.get("pattern"),
        "target sparsity, %": recipe.get("sparsity"),
        "seed": recipe.get("seed"),
        "calibration": _told(recipe.get("calibration")),
        "training": _told(recipe.get("training")),
        "mask checksum": masks.checksum,
        "base model fingerprint": masks.base_fingerprint,
    }
    for what, record in [("made", making), *(("evaluated", record) for record in evaluations)]:
        if record:
            origin, cost = record.provenance, record.cost
            device = origin.get("gpu") or origin.get("cpu")
            commit = f"{origin.get('commit') or 'unknown'}{' with changes' if origin.get('dirty') else ''}"
            versions = ", ".join(f"{name} {version}" for name, version in origin.get("versions", {}).items())
            rows[what] = f"{record.date}, commit {commit}, {device}, {cost.get('wall_s', 0):.0f} s; {versions}"
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value not in (None, "")]
    return "\n".join(["## Provenance", "", "| | |", "|---|---|", *lines])


def _told(protocol: dict[str, Any] | None) -> str:
    """A protocol in a line, without what only machines compare, and without the folders of who ran it."""
    hidden = ("tokenizer", "checksum", "model")
    parts = []
    for name, value in (protocol or {}).items():
        if name not in hidden and value is not None:
            parts.append(
                f"{name} {Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value}"
            )
    return ", ".join(parts)
