"""Every cell: its state, where its numbers come from, and its logs."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pandas as pd

from patch.reporting.study import Study
from patch.reporting.tables.layout import Column, Table

LOG_LINES = 20
"""Last lines of a failed cell's log that stand in the table: in the report, a single file, links lead nowhere."""


def cells(study: Study) -> Table:
    """One row per cell.

    Columns of the data: run, model, cell, status, reason, reason.excerpt (the end of the log that the reason names),
    date, commit, device, torch, transformers, lm_eval, wall_s (of all stages), and record and logs, as paths from where
    the workflow runs.
    """
    runs = study.runs
    rows: list[dict[str, Any]] = []
    for (run, cell), own in runs.groupby(["run", "cell"], sort=False):
        known = own[["date", "commit", "dirty", "gpu", "cpu", "torch", "transformers", "lm_eval"]].bfill().iloc[0]
        times = own.loc[own["metric"] == "wall_s", "value"].astype(float)
        commit = "" if pd.isna(known["commit"]) else str(known["commit"])[:12]
        stages = list(own["stage"].dropna().unique())
        logs, reason = f"logs/{run}/{cell}", own["reason"].iloc[0]
        row = {
            "run": run,
            "model": own["model"].iloc[0],
            "cell": cell,
            "status": own["status"].iloc[0],
            "reason": reason,
            "reason.excerpt": None if pd.isna(reason) else _excerpt(str(reason)),
            "date": None if pd.isna(known["date"]) else str(known["date"])[:16].replace("T", " "),
            "commit": commit + ("+" if not pd.isna(known["dirty"]) and known["dirty"] else "") or None,
            "device": known["cpu"] if pd.isna(known["gpu"]) else known["gpu"],
            "torch": known["torch"],
            "transformers": known["transformers"],
            "lm_eval": known["lm_eval"],
            "wall_s": times.sum() if len(times) else math.nan,
            "record": f"results/{run}/{cell}/{stages[-1]}/record.json" if stages else None,
            "logs": logs if stages or Path(logs).is_dir() else None,
        }
        rows.append(row)
    data = pd.DataFrame(rows)
    columns = [Column("model", "Model", numeric=False), Column("cell", "Cell", numeric=False)]
    columns += [Column("status", "State", numeric=False)]
    columns += [Column("reason", "Why", numeric=False)] if data["reason"].notna().any() else []
    for name, header in (("date", "Measured (UTC)"), ("commit", "Commit"), ("device", "Device"), ("torch", "PyTorch")):
        columns.append(Column(name, header, numeric=False))
    columns += [Column("transformers", "transformers", numeric=False), Column("lm_eval", "lm-eval", numeric=False)]
    columns += [Column("wall_s", "Seconds", "{:.0f}".format)]
    columns += [Column("record", "Record", numeric=False, link=True), Column("logs", "Logs", numeric=False, link=True)]
    notes = {"dirty": "A + after the commit: the checkout had changes."}
    return Table(data, columns, notes=notes)


def _excerpt(reason: str) -> str | None:
    """The end of the log that a reason ends with, if it is on this machine, without a terminal's colours."""
    named = re.search(r"(\S+\.log)$", reason)
    if named is None or not Path(named[1]).is_file():
        return None
    lines = Path(named[1]).read_text(errors="replace").splitlines()
    return re.sub(r"\x1b\[[\d;]*m", "", "\n".join(lines[-LOG_LINES:]))
