"""Runs and curves made by hand: small, and with everything that tables and figures must cope with."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from patch.collect import COLUMNS, CURVE_COLUMNS, IDENTITY
from patch.experiments import TASKS
from patch.methods import METHODS
from patch.sparsity.patterns import Pattern

BASE = {
    ("qwen", "dense"): (12.30, 46.0),
    ("qwen", "magnitude"): (6000.0, 30.0),
    ("qwen", "wanda"): (72.0, 33.0),
    ("qwen", "sparsegpt"): (36.0, 35.0),
    ("qwen", "maskllm"): (15.0, 39.0),
    ("qwen", "patch_joint"): (15.0, 39.0),
    ("qwen", "patch_tile"): (15.5, 38.5),
    ("tiny_1", "dense"): (18.0, 40.0),
    ("tiny_1", "wanda"): (60.0, 33.0),
    ("tiny_1", "sparsegpt"): (44.0, 34.0),
}
SOURCES = {"qwen": "Qwen/Qwen2.5-0.5B", "tiny_1": "embedded:tiny_1"}
MODULES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def cell_rows(
    model: str, method: str, pattern: str, sparsity: float, *, seed: int = 0, shift: float = 0.0, tasks: bool = True
) -> list[dict[str, object]]:
    """All rows of one finished cell. Its perplexity and mean accuracy stand in BASE; `shift` is added to both.

    Accuracies are the same for all tasks, except that they differ by task so that the mean is as given. acc_norm is
    one point higher; the standard error of every task is 1 point.
    """
    perplexity, accuracy = BASE[model, method]
    easier = (50 - sparsity) / 50 if method != "dense" else 0.0  # sparsities below 50 % cost less
    dense_perplexity, dense_accuracy = BASE[model, "dense"]
    perplexity += easier * (dense_perplexity - perplexity) + shift
    accuracy += easier * (dense_accuracy - accuracy) + shift
    path = f"{model}/{method}/{sparsity:g}-{Pattern.parse(pattern).slug}" + (f"/seed-{seed}" if seed else "")
    common: dict[str, object] = {
        "run": "synthetic",
        "cell": path,
        "cell_hash": f"hash of {path}",
        "model": model,
        "source": SOURCES[model],
        "method": method,
        "title": METHODS[method].title,
        "pattern": pattern,
        "sparsity": sparsity,
        "realised_sparsity": sparsity and sparsity - 0.01,
        "variant": "default",
        "compression": "none",
        "seed": seed,
        "status": "done",
        "date": "2026-01-02T03:04:05+00:00",
        "commit": "0123456789",
        "dirty": False,
        "cpu": "a CPU",
        "torch": "2.12.0",
    }
    learned = METHODS[method].learned
    evaluate, mask = {**common, "stage": "evaluate"}, {**common, "stage": "learn" if learned else "prune"}
    rows = []
    if method != "dense":
        uneven = 3 if pattern.startswith("tiles") else 0  # points of sparsity from block to block
        rows += [
            {
                **mask,
                "subject": f"model.layers.{block}.{module}",
                "metric": "sparsity",
                "value": (sparsity + uneven * (block - 1.5)) / 100,
            }
            for block in range(4)
            for module in MODULES
        ]
        rows.append({**mask, "subject": "model", "metric": "sparsity", "value": sparsity / 100})
        options = METHODS[method]().model_dump_json()
        rows.append({**mask, "subject": "model", "metric": "wall_s", "value": 12.5, "options": options})
    if learned:
        rows.append({**mask, "subject": "model", "metric": "train_cross_entropy", "value": 2.5})
    rows.append({**evaluate, "subject": "model", "metric": "wall_s", "value": 3.25})
    for text, factor in (("wikitext2", 1.0), ("c4", 1.5)):
        row = {"subject": text, "metric": "perplexity", "value": factor * perplexity, "stderr": 0.01 * perplexity}
        protocol = {"source": text, "sampling": "joined", "length": 4096, "complete": True}
        rows.append({**evaluate, **row, "samples": 73, "protocol": json.dumps(protocol)})
    for number, task in enumerate(TASKS if tasks else ()):
        value = (accuracy + (number - 3.5)) / 100
        protocol = {"source": "hub", "limit": None, "fewshot": 0}
        row = {"subject": task, "samples": 1000, "stderr": 0.01, "protocol": json.dumps(protocol)}
        rows.append({**evaluate, **row, "metric": "acc", "value": value})
        if task in ("piqa", "arc_easy"):
            rows.append({**evaluate, **row, "metric": "acc_norm", "value": value + 0.01})
    return rows


def runs_table(rows: list[dict[str, object]]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return table.astype({name: dtype for name, (dtype, _) in COLUMNS.items()})


def curves_of(rows: list[dict[str, object]], steps: int = 80) -> pd.DataFrame:
    """The curves of a learned cell with the given rows in the runs table."""
    first = rows[0]
    method, sparsity = str(first["method"]), float(str(first["sparsity"]))
    step = np.arange(1, steps + 1)
    share = (step - 1) / steps
    noise = np.random.default_rng(int(sparsity) + len(method)).normal(size=steps)
    table = pd.DataFrame(
        {
            "step": step,
            "cross_entropy": 2.5 + sparsity / 100 + 3 * np.exp(-8 * share) + 0.1 * noise,
            "density": 1 - sparsity / 100 + (0.1 * np.exp(-10 * share) if method.startswith("patch") else 0),
            "two_of_four": np.nan,
            "density_loss": 0.1,
            "norm_ratio": 0.9,
            "pattern_temperature": np.nan if method == "patch_tile" else 4 - 3.95 * share,
            "pattern_scale": np.nan if method == "patch_tile" else 100 + 400 * share,
            "tile_temperature": np.nan if method == "maskllm" else (4 if sparsity >= 40 else 2) * (1 - 0.98 * share),
            "tile_scale": np.nan if method == "maskllm" else 25 + 325 * share,
            "learning_rate": 1e-3 * (1 - share),
            "gradient_norm": 0.5,
            "tokens_per_second": 1000.0,
            "wall_s": 12.5 / steps,
        }
    )
    table = table.assign(loss=table["cross_entropy"] + 0.1, **{name: first[name] for name in IDENTITY})
    return table[list(CURVE_COLUMNS)].astype({name: dtype for name, (dtype, _) in CURVE_COLUMNS.items()})


@pytest.fixture
def learned() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Runs and curves: the dense model, MaskLLM, PATCH-Joint and PATCH-Tile."""
    cells = [cell_rows("qwen", "maskllm", "2:4", 50.0)]
    cells += [
        cell_rows("qwen", method, "tiles:128x128", sparsity)
        for method in ("patch_joint", "patch_tile")
        for sparsity in (45.0, 35.0, 25.0)
    ]
    dense = cell_rows("qwen", "dense", "dense", 0.0)
    curves = pd.concat([curves_of(rows) for rows in cells], ignore_index=True)
    return runs_table([row for rows in [dense, *cells] for row in rows]), curves


@pytest.fixture
def no_curves(learned: tuple[pd.DataFrame, pd.DataFrame]) -> pd.DataFrame:
    """The table of curves of a run without learned cells."""
    return learned[1].iloc[:0]


@pytest.fixture
def runs() -> pd.DataFrame:
    """Two models; 2:4 and unstructured; wanda 2:4 of qwen with two seeds; one cell missing, one excluded."""
    rows = []
    for model in ("qwen", "tiny_1"):
        methods = [method for method in ("magnitude", "wanda", "sparsegpt") if (model, method) in BASE]
        rows += [row for method in methods for row in cell_rows(model, method, "2:4", 50.0)]
        for sparsity in (25.0, 45.0):
            rows += [row for method in methods for row in cell_rows(model, method, "unstructured", sparsity)]
        rows += cell_rows(model, "dense", "dense", 0.0)
    rows += cell_rows("qwen", "wanda", "2:4", 50.0, seed=1, shift=2.0)
    identity = {
        key: rows[0][key] for key in ("run", "model", "source", "sparsity", "seed", "variant", "compression", "pattern")
    }
    for method, status, reason in (
        ("maskllm", "missing", "not run"),
        ("thanos", "excluded", "too slow & 100% not needed"),
    ):
        named = {"method": method, "title": METHODS[method].title, "cell": f"qwen/{method}/50-2of4"}
        rows.append({**identity, **named, "cell_hash": method, "status": status, "reason": reason})
    return runs_table(rows)
