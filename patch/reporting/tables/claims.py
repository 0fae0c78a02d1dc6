"""The claims of the paper, and the verdict of a study on each."""

from __future__ import annotations

import math

import pandas as pd

from patch.reporting.claims import Verdict, judge, load_claims
from patch.reporting.study import Study
from patch.reporting.tables.layout import Column, Table, p_value

WITHIN_NOISE = 0.05
"""p-value above which a verdict is one on noise."""


def claims(study: Study) -> Table:
    """A row per claim and model: first those that were reproduced, then those that were not, then those not run.

    Columns of the data: id, statement, source, made_for (hub ids), model, about (the paper's model, or another one),
    verdict, certainty, evidence, p.
    """
    order = ("reproduced", "not reproduced", "not run")
    verdicts = sorted(judge(study, load_claims()), key=lambda verdict: order.index(verdict.verdict))
    rows = [
        {
            "verdict": verdict.verdict,
            "id": verdict.claim.id,
            "statement": verdict.claim.statement,
            "model": verdict.model,
            "about": "the paper's" if verdict.of_paper else "another",
            "evidence": verdict.evidence,
            "certainty": _certainty(verdict),
            "source": verdict.claim.source,
            "made_for": " ".join(verdict.claim.models),
            "p": verdict.p,
        }
        for verdict in verdicts
    ]
    columns = [
        Column("verdict", "Verdict", numeric=False),
        Column("statement", "Claim", numeric=False),
        Column("model", "Model", numeric=False),
        Column("about", "Model is", numeric=False),
        Column("evidence", "Evidence", numeric=False, listed=True),
        Column("certainty", "Certainty", numeric=False),
        Column("source", "Source", numeric=False),
    ]
    notes = {
        "patch": "± is the standard error of a difference. PATCH is PATCH-Joint where the run has it, else PATCH-Tile. "
        "Bounds hold for the paper's models by its protocol; on another model they show whether it behaves alike."
    }
    return Table(pd.DataFrame(rows), columns, blocks=("verdict",), notes=notes)


def _certainty(verdict: Verdict) -> str:
    if verdict.verdict == "not run" or math.isnan(verdict.p):
        return ""
    text = f"p {p_value(verdict.p)}" if verdict.p < 0.001 else f"p = {p_value(verdict.p)}"
    text += "" if verdict.paired else ", unpaired"
    return text if verdict.p <= WITHIN_NOISE else f"within noise, {text}"
