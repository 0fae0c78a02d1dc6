"""Claims: every kind of query on tiny runs tables, the whole ledger on the paper's own numbers, and wrong ledgers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd
import pytest
from conftest import cell_rows, curves_of, runs_table

from patch.artefacts import PatchError
from patch.collect import PAIRED_COLUMNS
from patch.experiments import TASKS
from patch.methods import METHODS
from patch.reporting.claims import Claim, Verdict, judge, load_claims
from patch.reporting.published import load_published
from patch.reporting.study import Study

MASKLLM = {"method": "maskllm"}
JOINT, TILE = {"method": "patch_joint", "sparsity": 45}, {"method": "patch_tile", "sparsity": 45}


def claim(query: dict[str, object], models: tuple[str, ...] = ()) -> Claim:
    content = {"id": "it", "statement": "It holds.", "source": "a table", "models": models, "query": query}
    return Claim.model_validate(content)


def verdict(study: Study, query: dict[str, object]) -> Verdict:
    (found,) = judge(study, [claim(query)])
    return found


@pytest.fixture
def study(learned: tuple[pd.DataFrame, pd.DataFrame]) -> Study:
    """MaskLLM and PATCH-Joint on perplexity 15.0 before sparsity helps, PATCH-Tile on 15.5, dense 12.3."""
    return Study(*learned)


def with_value(study: Study, method: str, sparsity: float, value: float) -> Study:
    runs = study.runs.copy()
    chosen = (runs["method"] == method) & (runs["sparsity"] == sparsity) & (runs["subject"] == "wikitext2")
    runs.loc[chosen, "value"] = value
    return Study(runs, study.curves, study.paired)


def better(**changes: object) -> dict[str, object]:
    return {"kind": "better", "metric": "perplexity", "cell": JOINT, "than": [MASKLLM], **changes}


def test_a_claim_of_one_model_only_is_not_asked_of_others(study: Study) -> None:
    only = claim(better(), ("google/gemma-3-1b-pt",)).model_copy(update={"only": True})
    (found,) = judge(study, [only])
    assert (found.verdict, found.evidence) == ("not run", "speaks of google/gemma-3-1b-pt only")
    (own,) = judge(study, [only.model_copy(update={"models": ("Qwen/Qwen2.5-0.5B",)})])
    assert (own.verdict, own.of_paper) == ("reproduced", True)


def test_released_masks_are_asked_where_a_run_has_no_others() -> None:
    rows = cell_rows("qwen", "dense", "dense", 0.0)
    for pattern, sparsity, shift in (("tiles:128x128", 45.0, 0.0), ("2:4", 50.0, 1.0)):
        as_joint = cell_rows("qwen", "patch_joint", pattern, sparsity, shift=shift)
        rows += [{**row, "method": "released", "title": METHODS["released"].title} for row in as_joint]
    found = verdict(Study(runs_table(rows)), {**better(), "cell": {"method": "patch", "sparsity": 45}})
    assert found.verdict == "reproduced"
    assert found.evidence.startswith("Released mask 45 % ")


def test_better_compares_in_the_metrics_direction(study: Study) -> None:
    found = verdict(study, better())
    assert (found.model, found.verdict, found.of_paper) == ("qwen", "reproduced", False)
    assert found.evidence == "PATCH-Joint 45 % 14.73, MaskLLM 50 % 15.00 (−0.27 ± 0.21)"
    assert verdict(study, better(metric="accuracy")).verdict == "reproduced"
    assert verdict(study, better(cell=MASKLLM, than=[JOINT])).verdict == "not reproduced"
    assert verdict(study, better(metric="accuracy", cell=MASKLLM, than=[JOINT])).verdict == "not reproduced"


def test_a_margin_must_be_exceeded(study: Study) -> None:
    assert verdict(study, better(margin=0.25)).verdict == "reproduced"
    assert verdict(study, better(margin=0.28)).verdict == "not reproduced"


def test_patch_is_the_joint_method_where_there_is_one(study: Study) -> None:
    query = better(cell={"method": "patch", "sparsity": 45})
    assert "PATCH-Joint 45 %" in verdict(study, query).evidence
    without = Study(study.runs[study.runs["method"] != "patch_joint"])
    assert "PATCH-Tile 45 %" in verdict(without, query).evidence


def test_all_sparsities_must_hold_and_the_one_that_fails_comes_first(study: Study) -> None:
    query = better(cell={"method": "patch_joint"}, than=[{"method": "patch_tile"}], sparsities=[45, 35, 25])
    assert verdict(study, query).verdict == "reproduced"
    found = verdict(with_value(study, "patch_joint", 25, 99.0), query)
    assert found.verdict == "not reproduced"
    assert found.evidence.startswith("PATCH-Joint 25 % 99.00")


def test_a_missing_cell_means_not_run_unless_another_contradicts(study: Study) -> None:
    wanda = {"method": "wanda"}
    found = verdict(study, better(than=[MASKLLM, wanda]))
    assert found.verdict == "not run"
    assert "Wanda 50 %: not in this run's grid" in found.evidence
    assert math.isnan(found.p) is False  # of what is there
    assert verdict(study, better(cell=TILE, than=[JOINT, wanda])).verdict == "not reproduced"


def test_the_reason_of_a_missing_cell_is_the_evidence(runs: pd.DataFrame) -> None:
    query = better(cell={"method": "maskllm"}, than=[{"method": "thanos"}])
    found = {v.model: v for v in judge(Study(runs), [claim(query)])}
    assert found["qwen"].evidence == "MaskLLM 50 %: not run"
    assert found["tiny_1"].evidence == "MaskLLM 50 %: not in this run's grid"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_prove_nothing(study: Study, value: float) -> None:
    found = verdict(with_value(study, "patch_joint", 45, value), better())
    assert (found.verdict, found.evidence) == ("not run", "PATCH-Joint 45 %: has no finite value")


def test_without_tasks_claims_on_accuracy_are_not_run(study: Study) -> None:
    texts = Study(study.runs[~study.runs["metric"].isin(["acc", "acc_norm"])])
    assert verdict(texts, better(metric="accuracy")).evidence == "no tasks were measured"


def test_paired_errors_are_used_where_they_are(study: Study) -> None:
    assert not verdict(study, better()).paired
    row = {"run": "synthetic", "model": "qwen", "subject": "wikitext2", "metric": "perplexity", "items": 73}
    row |= {"first": "qwen/maskllm/50-2of4", "second": "qwen/patch_joint/45-tiles128x128"}
    pairs = pd.DataFrame([{**row, "difference": 0.27, "stderr": 0.02, "p": 0.0007}], columns=list(PAIRED_COLUMNS))
    found = verdict(Study(study.runs, study.curves, pairs), better())
    assert (found.paired, found.p) == (True, 0.0007)
    assert "(−0.27 ± 0.02)" in found.evidence


def test_order(study: Study) -> None:
    cells = [MASKLLM, *({"method": "patch_joint", "sparsity": s} for s in (45, 35, 25)), {"method": "dense"}]
    query = {"kind": "order", "metric": "accuracy", "worst_to_best": cells}
    assert verdict(study, query).verdict == "reproduced"
    assert verdict(study, {**query, "worst_to_best": cells[::-1]}).verdict == "not reproduced"


def test_spread(study: Study) -> None:
    query = {"kind": "spread", "metric": "perplexity", "cells": [JOINT, TILE]}
    found = verdict(study, {**query, "at_most": 0.5})
    assert (found.verdict, found.evidence) == ("reproduced", "14.73 to 15.18, spread 0.45")
    assert verdict(study, {**query, "at_most": 0.4}).verdict == "not reproduced"
    absent = {**query, "cells": [JOINT, TILE, {"method": "patch_joint", "pattern": "tiles:4x4", "sparsity": 45}]}
    assert verdict(study, {**absent, "at_most": 0.5}).verdict == "not run"
    assert verdict(study, {**absent, "at_most": 0.4}).verdict == "not reproduced"  # whatever the third is


def test_gain(study: Study) -> None:
    query = {"kind": "gain", "metric": "accuracy", "over": MASKLLM, "gains": {45: 0.7, 25: 3.5}}
    assert verdict(study, {**query, "tolerance": 0.01}).verdict == "reproduced"
    assert verdict(study, {**query, "gains": {45: 0.8}, "tolerance": 0.05}).verdict == "not reproduced"
    assert verdict(study, {**query, "gains": {40: 0.8}, "tolerance": 9.0}).verdict == "not run"


def test_as_published_needs_the_published_protocol(study: Study) -> None:
    query = {"kind": "published", "cell": {"method": "dense"}, "metric": "perplexity"}
    assert verdict(study, {**query, "tolerance": 0.23}).verdict == "reproduced"  # 12.30, 12.08 published
    assert verdict(study, {**query, "relative": 0.01}).verdict == "not reproduced"
    runs = study.runs.copy()
    runs["protocol"] = runs["protocol"].str.replace("4096", "2048")
    found = verdict(Study(runs), {**query, "tolerance": 9.0})
    assert found.verdict == "not run"
    assert "nothing is published" in found.evidence


def test_realised(study: Study) -> None:
    query = {"kind": "realised", "cells": [JOINT]}
    assert verdict(study, {**query, "tolerance": 0.02}).evidence == "PATCH-Joint 45 %: 44.99 % realised"
    assert verdict(study, {**query, "tolerance": 0.005}).verdict == "not reproduced"


def test_allocation_weighs_layers_by_their_size(study: Study) -> None:
    runs = study.runs.copy()
    of = (runs["method"] == "patch_joint") & (runs["metric"] == "sparsity") & (runs["sparsity"] == 45)
    for module, percent, weights in (
        ("q_proj", 0.1, 100),
        ("o_proj", 0.2, 100),
        ("up_proj", 0.5, 900),
        ("down_proj", 0.4, 100),
    ):
        own = of & runs["subject"].str.endswith(module)
        runs.loc[own, ["value", "samples"]] = [percent, weights]
    query = {"kind": "allocation", "cell": JOINT, "less": {"kinds": ["q"]}, "more": {"kinds": ["up", "down"]}}
    found = verdict(Study(runs), query)
    assert (found.verdict, found.evidence) == ("reproduced", "PATCH-Joint 45 %: q 10.0 %, up, down 49.0 %")
    bound = {"kind": "allocation", "cell": JOINT, "less": {"kinds": ["q", "o"]}}
    assert verdict(Study(runs), {**bound, "at_most": 15.0}).verdict == "reproduced"
    assert verdict(Study(runs), {**bound, "at_most": 14.0}).verdict == "not reproduced"
    depth = {"kind": "allocation", "cell": TILE, "less": {"depth": [0.75, 1.0]}, "more": {"depth": [0.25, 0.75]}}
    found = verdict(Study(runs), depth)  # deeper blocks are pruned more here
    assert found.verdict == "not reproduced"
    assert "blocks at 75 to 100 % of the depth 49.5 %" in found.evidence
    missing = {"kind": "allocation", "cell": JOINT, "less": {"kinds": ["k"]}, "at_most": 1.0}
    assert verdict(Study(runs), missing).evidence == "PATCH-Joint 45 %: has no such layers"


def test_cost_counts_only_with_the_papers_tokens(study: Study) -> None:
    query = {"kind": "cost", "cell": JOINT, "gpu_hours": {"Qwen/Qwen2.5-0.5B": 18}}
    rows = cell_rows("qwen", "patch_joint", "tiles:128x128", 45.0)
    learn = next(row for row in rows if row["metric"] == "wall_s")
    runs = runs_table([*rows, {**learn, "metric": "gpu_s", "value": 17 * 3600.0}])
    curves = curves_of(rows)
    assert "0 M tokens" in verdict(Study(runs, curves), query).evidence
    full = curves.assign(tokens_per_second=2000 * 256 * 4096 / curves["wall_s"].sum())
    found = verdict(Study(runs, full), query)
    assert (found.verdict, found.evidence) == ("reproduced", "17.0 GPU hours, stated 18")
    assert verdict(Study(runs, full), {**query, "gpu_hours": {"Qwen/Qwen2.5-0.5B": 16}}).verdict == "not reproduced"
    assert verdict(Study(runs, full), {**query, "gpu_hours": {"other": 16}}).verdict == "not run"
    unrecorded = verdict(Study(runs_table(rows), full), query)
    assert (unrecorded.verdict, unrecorded.evidence) == ("not run", "PATCH-Joint 45 %: its record does not say")


def generation(**columns: object) -> pd.DataFrame:
    row = {
        "model": "llama-2-7b",
        "batch": 16,
        "prefill_tokens": 128,
        "generated_tokens": 128,
        "sparsity_percent": 45.02,
    }
    row |= {"dense_tok_s": 100.0, "hybrid_tok_s": 140.0, "speedup": 1.4, "dense_gib": 10.0, "hybrid_gib": 6.0}
    return pd.DataFrame([{**row, "gpu": "NVIDIA H200", **columns}])


def test_speed_and_memory(study: Study) -> None:
    sizes = {"model": "llama-2-7b", "batch": 16, "prefill_tokens": 128, "generated_tokens": 128}
    query = {"kind": "speed", **sizes, "at_least": {45: 1.38}}
    measured = Study(study.runs, generation=generation())
    found = verdict(measured, query)
    assert (found.model, found.verdict) == ("llama-2-7b", "reproduced")
    assert found.evidence == "45 %: 1.40× on NVIDIA H200, stated 1.38×"
    assert verdict(measured, {**query, "at_least": {45: 1.41}}).verdict == "not reproduced"
    assert verdict(measured, {**query, "at_least": {45: 1.38, 25: 1.1}}).verdict == "not run"
    assert verdict(measured, {**query, "batch": 1}).verdict == "not run"
    elsewhere = verdict(measured, {**query, "gpu": "A6000"})
    assert elsewhere.verdict == "not run"
    assert "on NVIDIA H200" in elsewhere.evidence
    memory = {"kind": "memory", "model": "llama-2-7b"}
    assert verdict(measured, {**memory, "at_most": {45: 0.6}}).verdict == "reproduced"
    assert verdict(measured, {**memory, "at_most": {45: 0.59}}).verdict == "not reproduced"
    assert verdict(study, {**memory, "at_most": {45: 0.59}}).verdict == "not run"


def published_runs() -> pd.DataFrame:
    """A runs table of exactly what the paper prints, as if measured by its protocol."""
    rows = []
    models = {}
    for row in (
        load_published()
        .drop_duplicates(["source", "method", "sparsity", "pattern", "variant", "compression", "metric", "subject"])
        .to_dict("records")
    ):
        if row["subject"] == "mean":
            continue
        model = models.setdefault(row["source"], row["source"].split("/")[1])
        names = ("method", "pattern", "variant", "compression")
        path = "/".join([model, *(str(row[name]) for name in names), f"{row['sparsity']:g}"])
        text = row["metric"] == "perplexity"
        protocol = {"source": "wikitext2", "sampling": "joined", "length": 4096, "complete": True}
        protocol = protocol if text else {"source": "hub", "limit": None, "fewshot": 0}
        rows.append(
            {
                **{name: row[name] for name in (*names, "source", "sparsity", "subject", "metric")},
                "run": "paper", "cell": path, "cell_hash": path, "model": model, "title": METHODS[row["method"]].title,
                "realised_sparsity": row["sparsity"], "seed": 0, "status": "done", "stage": "evaluate",
                "value": row["value"] / (1 if text else 100), "stderr": 0.01, "protocol": json.dumps(protocol),
            }
        )  # fmt: skip
    return runs_table(rows)


def test_the_papers_own_numbers_bear_out_its_claims_on_quality() -> None:
    """So that a claim which fails on our numbers fails because of them, not because it was written down wrongly."""
    verdicts = [v for v in judge(Study(published_runs()), load_claims()) if v.of_paper]
    failed = {(v.claim.id, v.model, v.evidence) for v in verdicts if v.verdict == "not reproduced"}
    assert failed == set()
    reproduced = {v.claim.id for v in verdicts if v.verdict == "reproduced"}
    assert {
        "dense-perplexity", "dense-accuracy", "gap-perplexity", "gap-accuracy", "headline-gain", "joint-over-tile",
        "learned-over-one-shot-perplexity", "learned-over-one-shot-accuracy", "learned-over-thanos", "frozen-maskllm",
        "learned-over-proxsparse", "below-dense", "tile-size", "global-over-block", "tile-prior", "any-sparsity",
    } <= reproduced  # fmt: skip


def test_the_ledger_names_every_kind_of_claim_once() -> None:
    claims = load_claims()
    assert len({c.id for c in claims}) == len(claims) >= 30
    kinds = {"better", "order", "spread", "gain", "published", "realised", "allocation", "cost", "speed", "memory"}
    assert {c.query.kind for c in claims} == kinds
    assert len(TASKS) == 8


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"kind": "worse", "metric": "perplexity"}, "claim x: query: "),
        (better(cell={"method": "patsch"}), "claim x: query.better.cell: method 'patsch' is unknown"),
        (better(metric="loss"), "claim x: query.better.metric: "),
        (better(than=[]), "claim x: query.better.than: "),
        ({"kind": "published", "cell": MASKLLM, "metric": "accuracy"}, "give either tolerance or relative"),
        ({"kind": "allocation", "cell": JOINT, "less": {"kinds": ["q"]}}, "give either more or at_most"),
        ({"kind": "allocation", "cell": JOINT, "less": {}, "at_most": 1}, "give either kinds or depth"),
        ({**better(), "margn": 1}, "claim x: query.better.margn: "),
    ],
)
def test_a_wrong_query_is_told_with_its_claim(tmp_path: Path, query: dict[str, object], message: str) -> None:
    entry = {"id": "x", "statement": "s", "source": "t", "models": [], "query": query}
    (tmp_path / "claims.yaml").write_text(json.dumps([entry]))
    with pytest.raises(PatchError) as caught:
        load_claims(tmp_path / "claims.yaml")
    assert message in str(caught.value)


def test_damaged_ledgers_are_told_by_name(tmp_path: Path) -> None:
    path = tmp_path / "claims.yaml"
    with pytest.raises(PatchError, match=r"claims\.yaml: no such file"):
        load_claims(path)
    path.write_text("[")
    with pytest.raises(PatchError, match=r"claims\.yaml: not valid YAML"):
        load_claims(path)
    path.write_text("[just text]")
    with pytest.raises(PatchError, match="claim number 1"):
        load_claims(path)
    entry = {"id": "x", "statement": "s", "source": "t", "models": [], "query": better()}
    path.write_text(json.dumps([entry, entry]))
    with pytest.raises(PatchError, match="claim x: its id stands twice"):
        load_claims(path)
