"""What config files may hold, as a JSON schema and as a page: both generated from the models."""

from __future__ import annotations

from typing import Any

import yaml
from pydantic import BaseModel

from patch.benchmarking.options import (
    GenerationBenchmark,
    LayersBenchmark,
    LearningBenchmark,
    MemoryBenchmark,
    PruningBenchmark,
)
from patch.compression.options import Compression
from patch.experiments import (
    Benchmarks,
    Calibration,
    Documents,
    Evaluation,
    Exclusion,
    Experiment,
    GridBlock,
    ModelSource,
    PerplexityText,
    Selection,
    Tasks,
    Training,
)
from patch.methods import METHODS


def schema() -> dict[str, Any]:
    """JSON schema of a config file; `workflow/config/schema.json` is generated from it."""
    extends = {"description": "Config file(s) to start from, relative to this one.", "type": ["string", "array"]}
    content = Experiment.model_json_schema()
    content["properties"] = {"extends": extends, **content["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **content}


def options_markdown() -> str:
    """Every key of a config with its default and meaning, and every method's options, as Markdown."""
    lines = ["# Config keys", "", "Generated from `patch/experiments.py` and `patch/methods.py`; do not edit.", ""]
    sections: list[type[BaseModel]] = [
        Experiment, ModelSource, GridBlock, Selection, Exclusion, Calibration, Training, Documents, Evaluation,
        PerplexityText, Tasks, Compression, Benchmarks, LayersBenchmark, GenerationBenchmark, MemoryBenchmark,
        PruningBenchmark, LearningBenchmark,
    ]  # fmt: skip
    for model in sections:
        lines += [f"## {model.__name__}", "", _first_sentence(model), "", *_options_table(model)]
    lines += ["# Methods", ""]
    for name, method in METHODS.items():
        lines += [f"## `{name}`", "", " ".join((method.__doc__ or "").split()), "", *_options_table(method)]
    return "\n".join(lines).rstrip() + "\n"


def _options_table(model: type[BaseModel]) -> list[str]:
    if not model.model_fields:
        return []
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for name, field in model.model_fields.items():
        default = "required" if field.is_required() else f"`{_plain(field.default)}`"
        rows.append(f"| `{name}` | {default} | {' '.join((field.description or '').split())} |")
    return [*rows, ""]


def _plain(value: Any) -> str:
    if isinstance(value, BaseModel):
        return "see below"
    if isinstance(value, dict) and any(isinstance(item, BaseModel) for item in value.values()):
        return ", ".join(value)
    return (
        yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True, width=10**6)
        .removesuffix("\n...\n")
        .strip()
    )


def _first_sentence(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").split())
