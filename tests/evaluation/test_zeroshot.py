"""Zero-shot scoring on a task made in the test, through the real harness."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lm_eval.models.huggingface import HFLM

from patch import embedded
from patch.artefacts import PatchError
from patch.evaluation import evaluate_model, suite
from patch.evaluation.zeroshot import TaskLibrary, harness_model, zero_shot
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


def random_tokens(count: int) -> list[int]:
    return torch.randint(3, 200, (count,), generator=torch.Generator().manual_seed(count)).tolist()


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_those_of_the_harness(tiny_model, tokenizer, dtype) -> None:
    """Short and long answers, the same input for several, one that is too long, and what greedy decoding gives."""
    model = tiny_model(vocab_size=max(256, len(tokenizer)), max_position_embeddings=64).to(dtype)
    shared, long = random_tokens(9), random_tokens(90)
    greedy = int(model(torch.tensor([shared])).logits[0, -1].argmax())
    pairs = [(random_tokens(1 + i), random_tokens(1 + i % 5)) for i in range(17)]
    pairs += [(shared, [greedy]), (shared, [4]), (long, random_tokens(3)), (shared, random_tokens(6))]
    requests = [(("", ""), context, answer) for context, answer in pairs]
    expected = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)._loglikelihood_tokens(requests, True)
    found = harness_model(model, tokenizer, 4)._loglikelihood_tokens(requests)
    assert [hit for _, hit in found] == [hit for _, hit in expected]
    assert any(hit for _, hit in found)
    # batches are not put together alike, so that padding and with it rounding differs
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], rel=tolerance)


@pytest.mark.parametrize("add_bos", [None, True, False])
def test_texts_are_tokenised_together_to_what_the_harness_makes_of_each(
    tiny_model, tokenizer, monkeypatch, add_bos
) -> None:
    """Contexts that end in spaces or are empty, and one that begins with BOS as its answers' texts do."""
    model = tiny_model(vocab_size=max(256, len(tokenizer)))
    plain, scorer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1), harness_model(model, tokenizer, 1)
    plain.add_bos_token = scorer.add_bos_token = add_bos
    bos = tokenizer.decode(scorer.prefix_token_id)
    pairs = [("What is it?", " A cat."), ("What is it?", " A dog, or two."), ("It is  ", "late."), ("", "Alone.")]
    pairs += [(f"{bos}It", " is.")]
    requests = [SimpleNamespace(args=pair) for pair in pairs]
    expected = plain.loglikelihood(requests, disable_tqdm=True)
    one_by_one = []
    encode = scorer.tokenizer.encode
    monkeypatch.setattr(
        scorer.tokenizer, "encode", lambda text, **options: one_by_one.append(text) or encode(text, **options)
    )
    found = scorer.loglikelihood(requests)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], rel=1e-5)
    assert set(one_by_one) == {"Alone.", f"{bos}It", f"{bos}It is."}


def test_one_input_serves_answers_of_several_lengths(tiny_model, tokenizer) -> None:
    """The harness (0.4.13) takes the probabilities of the longest one's first tokens for all of them."""
    model, tokens = tiny_model(vocab_size=max(256, len(tokenizer))), random_tokens(10)
    log_probabilities = torch.log_softmax(model(torch.tensor([tokens[:-1]])).logits[0].double(), -1)
    each = log_probabilities.gather(1, torch.tensor(tokens[1:])[:, None]).squeeze(1)
    requests = [(("", ""), tokens[:-length], tokens[-length:]) for length in (1, 3, 2)]
    found = harness_model(model, tokenizer, 4)._loglikelihood_tokens(requests)
    assert [score for score, _ in found] == pytest.approx([float(each[-n:].sum()) for n in (1, 3, 2)], rel=1e-5)


def test_an_answer_longer_than_the_model_is_refused(tiny_model, tokenizer) -> None:
    model = tiny_model(vocab_size=max(256, len(tokenizer)), max_position_embeddings=64)
    with pytest.raises(PatchError, match="answer of 65 tokens is longer than the model's 64"):
        harness_model(model, tokenizer, 4)._loglikelihood_tokens([(("", ""), [5], random_tokens(65))])


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
