"""The paper's numbers, and when ours may stand beside them.

Files and their sources: results/published/README.md. Protocol: that of arXiv 2509.23410 and its official
evaluation code (perplexity at length 4096; eight zero-shot tasks, metric `acc`, all questions).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from patch.artefacts import PatchError
from patch.experiments import TASKS

DIRECTORY = Path(__file__).parents[2] / "results" / "published"
KEYS = ["source", "method", "sparsity", "pattern"]


def load_accuracy(directory: Path | str = DIRECTORY) -> pd.DataFrame:
    """The published accuracy tables, one row per model and method.

    Columns: source (hub id), method (key of `patch.methods.METHODS`), sparsity (percent), pattern (as in configs),
    perplexity (WikiText-2), perplexity_length (tokens per window; missing where the paper leaves it in doubt),
    mean_accuracy (percent, the mean of the eight tasks), and one column per task (percent; missing for the
    unstructured rows, of which only the mean is published).
    Raises PatchError when a file is missing.
    """
    names = {
        "model": "source",
        "sparsity_percent": "sparsity",
        "wikitext2_ppl": "perplexity",
        "ppl_length": "perplexity_length",
    }
    main = _read(Path(directory) / "accuracy.csv").rename(columns=names)
    main["mean_accuracy"] = main[list(TASKS)].mean(axis=1)
    other = _read(Path(directory) / "unstructured_comparison.csv").rename(columns={**names, "average": "mean_accuracy"})
    other = other[other["pattern"] == "unstructured"]  # its other rows repeat those of the main table
    table = pd.concat([main, other], ignore_index=True)
    table["sparsity"] = table["sparsity"].astype(float)
    return table[[*KEYS, "perplexity", "perplexity_length", "mean_accuracy", *TASKS]]


def same_perplexity_protocol(protocol: Mapping[str, Any]) -> bool:
    """Whether a perplexity of ours is the published quantity: all of WikiText-2 in windows of 4096 tokens.

    protocol: that of the text in the runs table.
    """
    wanted = {"source": "wikitext2", "sampling": "joined", "length": 4096, "complete": True}
    return all(protocol.get(key) == value for key, value in wanted.items())


def same_tasks_protocol(protocols: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a mean accuracy of ours is the published quantity: all eight tasks, every question, zero-shot.

    protocols: by task, as in the runs table.
    """
    wanted = {"source": "hub", "limit": None, "fewshot": 0}
    complete = all(protocol.get(key, "") == value for protocol in protocols.values() for key, value in wanted.items())
    return complete and set(protocols) == set(TASKS)


def _read(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path)
    except FileNotFoundError:
        raise PatchError(
            f"{path}: no such file; the published numbers belong to the checkout, get them from git."
        ) from None
