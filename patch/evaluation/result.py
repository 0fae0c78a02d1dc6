"""The result of one text or task: metrics, the protocol behind them, and the value of every single item."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from patch.artefacts import read_json, write_json
from patch.records import Metric

SCHEMA = "patch.evaluation/1"


@dataclass(frozen=True)
class Result:
    """Kept as one file per text or task, so that an interrupted evaluation goes on where it stopped."""

    metrics: list[Metric]
    protocol: dict[str, Any]
    items: list[dict[str, Any]]
    """One per window or question: subject, item, metric, value. For paired comparisons."""

    def write(self, path: Path) -> None:
        write_json(path, {"schema": SCHEMA, **asdict(self)})

    @classmethod
    def read(cls, path: Path) -> Result:
        content = read_json(path, SCHEMA)
        return cls([Metric(**metric) for metric in content["metrics"]], content["protocol"], content["items"])
