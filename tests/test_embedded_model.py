"""The real embedded model: the methods must stand in the order that the literature reports."""

import copy

import pytest

from patch import embedded
from patch.data import make_tokens
from patch.evaluation.perplexity import perplexity
from patch.methods import make_method
from patch.models import load_model, load_tokenizer, prunable_linears
from patch.pruning import Job, prune_together
from patch.sparsity.maskset import MaskSet
from patch.sparsity.patterns import Pattern

MODEL = "embedded:smollm2-135m"

pytestmark = pytest.mark.integration


def test_dense_sparsegpt_and_thanos_wanda_magnitude_in_this_order_at_2_4() -> None:
    tokenizer = load_tokenizer(MODEL)
    windows = make_tokens(tokenizer, "embedded:wikipedia", sampling="joined", length=512, samples=4)
    calibration = make_tokens(tokenizer, "embedded:c4", sampling="packed", length=256, samples=12, seed=0)
    names = ("magnitude", "wanda", "sparsegpt", "thanos")
    options = {"thanos": {"block_size": 128}}  # a fraction of the default's time
    jobs = [Job(make_method(name, options.get(name, {})), Pattern.parse("2:4"), 0.5) for name in names]
    model = load_model(MODEL, dtype="float32")
    scores = {"dense": perplexity(model, "wikipedia", windows).metrics[0].value}
    for name, masks in zip(names, prune_together(model, jobs, calibration), strict=True):
        assert isinstance(masks, MaskSet)
        assert masks.sparsity == 0.5
        pruned = copy.deepcopy(model)
        masks.apply_(prunable_linears(pruned))
        scores[name] = perplexity(pruned, "wikipedia", windows).metrics[0].value
    # 19.2 at length 2048 (12 windows) was measured independently; shorter windows and other articles cost some
    assert 15 < scores["dense"] < 35
    assert scores["dense"] < scores["sparsegpt"] < scores["wanda"] < scores["magnitude"]
    assert scores["dense"] < scores["thanos"] < scores["wanda"]


def test_embedded_questions_have_their_published_counts() -> None:
    from patch.evaluation.zeroshot import TaskLibrary

    library = TaskLibrary(list(embedded.TASKS), "embedded")
    loaded = library.manager.load_task_or_group(["hellaswag", "piqa", "winogrande", "openbookqa"])
    tasks = loaded.get("tasks", loaded)
    counts = {str(name): len(task.validation_docs()) for name, task in tasks.items()}
    assert counts == {"hellaswag": 10042, "piqa": 1838, "winogrande": 1267, "openbookqa": 500}
