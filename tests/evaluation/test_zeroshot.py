"""Zero-shot scoring on a task made in the test, through the real harness."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from patch import embedded
from patch.artefacts import PatchError
from patch.evaluation import evaluate_model, suite
from patch.evaluation.zeroshot import TaskLibrary, zero_shot
from patch.experiments import Tasks

QUESTIONS = [
    {"question": "the river", "choices": ["keeps the mountain", "drops"], "label": 0},
    {"question": "a mask", "choices": ["learns", "prunes the small tile"], "label": 1},
    {"question": "seven", "choices": ["while the text", "again"], "label": 1},
    {"question": "the paper", "choices": ["never", "because the method"], "label": 0},
]


@pytest.fixture
def questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A harness task `tiny` in place of the embedded ones."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "tiny.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    task = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(data)}},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "metadata": {"version": 7},
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(yaml.safe_dump(task))
    monkeypatch.setattr(embedded, "task_directory", lambda: tmp_path / "tasks")


def naive_choice(model, tokenizer, question: str, choices: list[str]) -> int:
    """The choice with the highest log-probability after the question."""
    scores = []
    for choice in choices:
        context = tokenizer(question).input_ids
        ids = tokenizer(f"{question} {choice}").input_ids
        log_probabilities = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), -1)
        scores.append(sum(log_probabilities[i - 1, ids[i]].item() for i in range(len(context), len(ids))))
    return max(range(len(scores)), key=scores.__getitem__)


def test_accuracy_is_the_share_of_most_likely_right_answers(questions, tiny_model, tokenizer) -> None:
    model = tiny_model(vocab_size=max(256, len(tokenizer)))
    result = zero_shot(model, tokenizer, TaskLibrary(["tiny"], "embedded"), "tiny", None, batch_size=2)
    right = [
        float(naive_choice(model, tokenizer, doc["question"], doc["choices"]) == doc["label"]) for doc in QUESTIONS
    ]
    acc = next(metric for metric in result.metrics if metric.name == "acc")
    assert acc.value == pytest.approx(sum(right) / 4)
    variance = acc.value * (1 - acc.value)
    assert acc.stderr == pytest.approx((variance / 3) ** 0.5)
    assert [item["value"] for item in result.items if item["metric"] == "acc"] == right
    assert result.protocol["version"] == 7
    assert result.protocol["questions"] == 4


def test_limit_asks_only_the_first_questions(questions, tiny_model, tokenizer) -> None:
    result = zero_shot(tiny_model(), tokenizer, TaskLibrary(["tiny"], "embedded"), "tiny", 2, batch_size=8)
    assert {item["item"] for item in result.items} == {0, 1}
    assert all(metric.samples == 2 for metric in result.metrics)


def test_scoring_takes_no_inventory_of_the_machine(questions, tiny_model, tokenizer, monkeypatch) -> None:
    """The harness would, after every task, for seconds."""
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: pytest.fail("called"))
    assert zero_shot(tiny_model(), tokenizer, TaskLibrary(["tiny"], "embedded"), "tiny", 1, batch_size=8).metrics


def test_unknown_task_is_named_with_the_known_ones(questions) -> None:
    with pytest.raises(PatchError, match=r"task 'helloswag': not among the embedded tasks; there are hellaswag"):
        TaskLibrary(["helloswag"], "embedded")


def test_finished_parts_survive_an_interruption_and_are_never_another_models(
    questions, tiny_model, tokenizer, tokens, tmp_path, monkeypatch
) -> None:
    tasks = Tasks(names=("tiny",), source="embedded")
    arguments = ({"text": tokens()}, tasks, tmp_path / "state")
    measured: list[str] = []
    perplexity, zero_shot_ = suite.perplexity, suite.zero_shot

    def counted_perplexity(model, name, windows):
        measured.append(name)
        return perplexity(model, name, windows)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(suite, "perplexity", counted_perplexity)
    monkeypatch.setattr(suite, "zero_shot", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_model(tiny_model(), tokenizer, *arguments)
    monkeypatch.setattr(suite, "zero_shot", zero_shot_)
    first = evaluate_model(tiny_model(), tokenizer, *arguments)
    assert measured == ["text"]
    assert evaluate_model(tiny_model(), tokenizer, *arguments) == first
    assert measured == ["text"]

    other = tiny_model()
    other.model.layers[1].mlp.down_proj.weight[0, 0] += 1e-3
    second = evaluate_model(other, tokenizer, *arguments)
    assert measured == ["text", "text"]
    assert second["text"].metrics != first["text"].metrics
