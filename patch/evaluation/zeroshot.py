"""Zero-shot tasks through lm-evaluation-harness, with the questions of the hub or the embedded ones.

Metrics are `acc` (what the paper's tables print, for every task) and `acc_norm`, with the harness's
standard errors. Nothing is cached by the harness itself: its cache does not know which model it scored.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from patch import embedded
from patch.artefacts import PatchError
from patch.evaluation.result import Result
from patch.hub import hub_access
from patch.records import Metric

if TYPE_CHECKING:
    from patch.evaluation.harness import CausalScorer

METRICS = ("acc", "acc_norm")
# Folders of the paper's tasks; indexing all of the harness's tasks would take a quarter of a minute.
_FOLDERS = {
    "mmlu": "mmlu/default",
    "piqa": "piqa",
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "winogrande": "winogrande",
    "openbookqa": "openbookqa",
    "race": "race",
    "hellaswag": "hellaswag",
}


class TaskLibrary:
    """The tasks that can be asked for by name."""

    def __init__(self, names: list[str], source: str):
        """source: "hub" or "embedded". Raises PatchError for a name that is not there."""
        import lm_eval
        from lm_eval.tasks import TaskManager

        self.source = source
        builtin = Path(lm_eval.__file__).parent / "tasks"
        if source == "embedded":
            self.manager = TaskManager(include_path=str(embedded.task_directory()), include_defaults=False)
        elif set(names) <= _FOLDERS.keys():
            folders = sorted({str(builtin / _FOLDERS[name]) for name in names})
            self.manager = TaskManager(include_path=folders, include_defaults=False)
        else:
            self.manager = TaskManager()
        for name in names:
            if name not in self.manager.all_tasks:
                known = embedded.TASKS if source == "embedded" else _FOLDERS
                raise PatchError(
                    f"task {name!r}: not among the {source} tasks; there are {', '.join(known)}"
                    f"{'' if source == 'embedded' else ' and all others of lm-evaluation-harness'}."
                )

    def download(self, name: str) -> None:
        """Bring a task's questions to this machine."""
        with hub_access(f"questions of task {name}"):
            self.manager.load_task_or_group([name])


def harness_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 1) -> CausalScorer:
    """The model as lm-evaluation-harness sees it."""
    from patch.evaluation.harness import CausalScorer

    return CausalScorer(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    library: TaskLibrary,
    task: str,
    limit: int | None,
    batch_size: int,
) -> Result:
    """Score one task or group; the model computes on its own device, in its own precision."""
    from lm_eval import simple_evaluate

    with hub_access(f"questions of task {task}"), _lean_harness():
        output = simple_evaluate(
            model=harness_model(model, tokenizer, batch_size),
            tasks=[task],
            num_fewshot=0,
            limit=limit,
            task_manager=library.manager,
            bootstrap_iters=100,  # means have closed-form errors; zero would switch those off as well
            log_samples=True,
            random_seed=0,
            numpy_random_seed=0,
            torch_random_seed=0,
            fewshot_random_seed=0,
        )
    assert output is not None
    scores: dict[str, Any] = output["results"][task]
    answered = sum(counts["effective"] for counts in output["n-samples"].values())
    metrics = []
    for name in METRICS:
        if f"{name},none" in scores:
            value = float(scores[f"{name},none"])
            stderr = _stderr(scores.get(f"{name}_stderr,none"), value, answered)
            metrics.append(Metric(task, name, value, stderr, answered))
    protocol = {
        "source": library.source,
        "version": output["versions"].get(task),
        "limit": limit,
        "questions": answered,
        "fewshot": 0,
        "batch_size": batch_size,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    items = [
        {"subject": member, "item": sample["doc_id"], "metric": name, "value": float(sample[name])}
        for member, samples in output["samples"].items()
        for sample in samples
        for name in METRICS
        if name in sample
    ]
    return Result(metrics, protocol, items)


@contextlib.contextmanager
def _lean_harness() -> Iterator[None]:
    """The harness without two habits that cost a small model more than its answers: it compiles a task's template anew
    for every question, and lists the machine's packages after every task, where our records name what matters."""
    from lm_eval import evaluator, utils

    replaced: list[tuple[Any, str, Any]] = [
        (evaluator, "add_env_info", lambda storage: None),
        (evaluator, "get_git_commit_hash", lambda: None),
        (utils.env, "from_string", functools.cache(utils.env.from_string)),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    for owner, name, replacement in replaced:
        setattr(owner, name, replacement)
    try:
        yield
    finally:
        for owner, name, original in before:
            setattr(owner, name, original)


def _stderr(reported: Any, share: float, answered: int) -> float | None:
    """The harness's standard error; the binomial one where it has none ("N/A", one question per member)."""
    if isinstance(reported, int | float):
        return float(reported)
    return math.sqrt(share * (1 - share) / (answered - 1)) if answered > 1 else None
