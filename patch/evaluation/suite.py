"""All texts and tasks for one model, one after the other, each kept as soon as it is done."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from patch.artefacts import checksum_json
from patch.data import TokenSet
from patch.evaluation.perplexity import perplexity
from patch.evaluation.result import Result
from patch.evaluation.zeroshot import TaskLibrary, zero_shot
from patch.experiments import Tasks
from patch.models import content_checksum, tokenizer_checksum
from patch.progress import track
from patch.provenance import code_hash

log = logging.getLogger(__name__)


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, TokenSet],
    tasks: Tasks | None,
    state: Path,
) -> dict[str, Result]:
    """Perplexity on every text, accuracy on every task; keys are their names.

    state: directory for finished parts. They are found again only for exactly the same weights, settings
    and code, so a second call, after an interruption or for another grid, repeats nothing and mixes nothing.
    """
    weights = content_checksum(model)
    todo: list[tuple[str, Any, Callable[[], Result]]] = []
    for name, tokens in texts.items():
        todo.append((name, tokens.checksum, partial(perplexity, model, name, tokens)))
    if tasks is not None and tasks.names:
        library = TaskLibrary(list(tasks.names), tasks.source)
        words = tokenizer_checksum(tokenizer)
        for task in tasks.names:
            limit = tasks.limits.get(task, tasks.limit)
            settings = [tasks.source, limit, tasks.batch_size, words]
            todo.append((task, settings, partial(zero_shot, model, tokenizer, library, task, limit, tasks.batch_size)))
    results = {}
    for name, settings, measure in track(todo, "text or task", log):
        key = checksum_json([str(model.dtype), model.device.type, settings, code_hash("evaluate")])[:16]
        path = state / weights[:16] / f"{name}-{key}.json"
        if path.exists():
            log.info("%s: taken from an earlier run", name)
            results[name] = Result.read(path)
            continue
        results[name] = measure()
        results[name].write(path)
        log.info("%s: %s", name, ", ".join(f"{m.name} {m.value:.4g}" for m in results[name].metrics))
    return results
