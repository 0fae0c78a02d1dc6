"""The documented Python API, with the argument names and dictionary keys of the official Quick Start."""

import argparse
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import patch
from patch.artefacts import PatchError
from patch.fine_tune_mask import learn_mask
from patch.models import prunable_linears
from patch.utils import evaluate, prepare_pruned_model

ROOT = Path(__file__).parents[1]
LEARN: dict[str, Any] = {
    "learnable_mask": True,
    "mask_tile_size": (16, 16),
    "grad_checkpoint": True,
    "local_bs": 1,
    "optimizer": "adamw_torch",
    "fine_tuning_sequence_length": 16,
    "target_sparsity_ratio": 0.4,
    "lr": 1e-2,
    "sparse_reg": 7,
    "weight_reg": 10.0,
    "temp_schedule_2_4": [4.0, 0.05],
    "scaler_schedule_2_4": [100.0, 500.0],
    "hard_2_4": False,
    "prior_strength_2_4": 3.0,
    "joint_optim": True,
    "temp_schedule_tile": [4.0, 0.05],
    "scaler_schedule_tile": [25.0, 350.0],
    "hard_tile": False,
    "prior_strength_tile": 3.0,
    "mask_llm": False,
    "layer_target": False,
}
SHORT = {"steps": 4, "batch_size": 2, "selection": "topk"}
PRUNE: dict[str, Any] = {
    "prune_method": "wanda",
    "sparsity_type": "2:4",
    "sparsity_ratio": 0.5,
    "nsamples": 4,
    "maskllm_checkpoint": None,
    "optimizer_FT_pruning": "adamw_torch",
    "calibration_dataset": "c4",
    "eval_dataset": "wikitext2",
    "shift_zero_metrics": False,
    "fine_tune": False,
    "calibration_length": 16,
    "calibration_sampling": "packed",
}


@pytest.fixture
def text(tmp_path: Path, documents: list[str]) -> str:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(documents))
    return str(path)


@pytest.fixture
def compressed(model_directory: Path, tmp_path: Path, text: str) -> Callable[..., Any]:
    """`compressed(**changes)`: model, tokenizer and pruned model, as the first half of the Quick Start makes them."""

    def make(**changes: Any) -> Any:
        model, _ = patch.get_llm(model_name=str(model_directory))
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_directory)
        arguments = PRUNE | {"calibration_dataset": text} | changes
        pruned = prepare_pruned_model(
            model,
            tokenizer,
            str(tmp_path / "checkpoint"),
            prune_args=arguments,
            mask_tile_size=(16, 16),
            target_sparsity_ratio=0.4,
        )
        return tokenizer, pruned

    return make


@pytest.mark.parametrize("as_object", [False, True], ids=["dictionary", "namespace"])
def test_quick_start_prunes_learns_and_evaluates(
    compressed: Callable[..., Any], model_directory: Path, text: str, as_object: bool
) -> None:
    tokenizer, pruned = compressed()
    assert all((linear.weight == 0).float().mean() == 0.5 for linear in prunable_linears(pruned).values())
    arguments: Any = LEARN | SHORT | {"dataset": text}
    model, lm_eval_model = learn_mask(
        model_name=str(model_directory),
        compressed_model=pruned,
        tokenizer=tokenizer,
        mask_args=argparse.Namespace(**arguments) if as_object else arguments,
    )
    zeros = sum(int((linear.weight == 0).sum()) for linear in prunable_linears(model).values())
    assert zeros / sum(linear.weight.numel() for linear in prunable_linears(model).values()) == pytest.approx(
        0.4, abs=0.02
    )
    perplexity, accuracies = evaluate(
        model,
        lm_eval_model,
        tokenizer,
        evaluate_perplexity=True,
        eval_dataset=text,
        eval_batch_size=1,
        test_lmharness=False,
        length=32,
    )
    assert perplexity > 1
    assert accuracies == {}


def test_a_checkpoint_that_exists_is_used_instead_of_pruning(
    compressed: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, first = compressed()
    monkeypatch.setattr("patch.quickstart.prune_model", lambda *a, **k: pytest.fail("pruned again"))
    _, second = compressed()
    assert first.patch_masks["pattern"].checksum == second.patch_masks["pattern"].checksum


@pytest.mark.parametrize(
    ("switches", "kind"),
    [({"mask_llm": True}, "2:4"), ({"joint_optim": False}, "tiles:16x16")],
    ids=["maskllm", "tile"],
)
def test_the_official_switches_choose_the_method(
    compressed: Callable[..., Any], model_directory: Path, text: str, switches: dict[str, Any], kind: str
) -> None:
    tokenizer, pruned = compressed()
    model, _ = learn_mask(str(model_directory), pruned, tokenizer, LEARN | SHORT | {"dataset": text} | switches)
    assert {str(mask.pattern) for mask in model.patch_mask.linears.values()} == {kind}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prune_methods": "wanda"}, "prune_args: unknown key 'prune_methods'"),
        ({"prune_method": "patch_joint"}, "does not prune in one shot"),
        ({"sparsity_type": "1:4"}, "sparsity_type '1:4': choose 2:4 or unstructured"),
        ({"sparsity_ratio": 0.4}, "sparsity_ratio 0.4: 2:4 prunes half"),
        ({"prune_method": "prox_sparse", "sparsity_type": "unstructured"}, "makes 2:4 masks only"),
        ({"prune_method": "maskllm"}, "needs maskllm_checkpoint"),
        ({"fine_tune": True, "optimizer_FT_pruning": "lion"}, "option 'optimizer'"),
        ({"eval_dataset": "ptb"}, "text ptb: .*use wikitext2, or give your copy as a .txt file"),
        ({"eval_dataset": "wikitext3"}, "text wikitext3: not one of c4, wikitext2"),
    ],
)
def test_wrong_pruning_arguments_are_named(
    compressed: Callable[..., Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(PatchError, match=message):
        compressed(**changes)


def test_prox_sparse_trains_on_the_samples_with_the_optimizer(
    compressed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from patch.learning import train_weights

    asked: list[Any] = []
    monkeypatch.setattr("patch.quickstart.train_weights", lambda *a, **k: (asked.append(a), train_weights(*a, **k))[1])
    _, pruned = compressed(prune_method="prox_sparse", nsamples=20, optimizer_FT_pruning="adamw_fused")
    ((_, method, pattern, documents, _),) = asked
    assert (method.title, method.steps, method.warmup_steps, method.optimizer) == ("ProxSparse", 20, 2, "adamw_fused")
    assert (str(pattern), documents.ids.shape, documents.protocol["sampling"]) == ("2:4", (20, 16), "documents")
    assert {str(mask.pattern) for mask in pruned.patch_masks["pattern"].linears.values()} == {"2:4"}
    assert {str(mask.pattern) for mask in pruned.patch_masks["reference"].linears.values()} == {"unstructured"}


def test_fine_tuning_trains_the_kept_weights_of_the_compressed_model(
    compressed: Callable[..., Any], model_directory: Path, text: str, tmp_path: Path
) -> None:
    _, plain = compressed()
    shutil.rmtree(tmp_path / "checkpoint")
    short = {"fine_tuning_samples": 4, "fine_tuning_batch_size": 2, "fine_tuning_length": 16}
    tokenizer, tuned = compressed(fine_tune=True, fine_tuning_dataset=text, **short)
    for name, linear in prunable_linears(tuned).items():
        before = prunable_linears(plain)[name].weight
        assert torch.equal(linear.weight == 0, before == 0)
        assert not torch.equal(linear.weight, before)
    model, _ = learn_mask(str(model_directory), tuned, tokenizer, LEARN | SHORT | {"dataset": text})
    original, _ = patch.get_llm(str(model_directory))
    for name, linear in prunable_linears(model).items():
        kept = linear.weight != 0
        assert torch.equal(linear.weight[kept], prunable_linears(original)[name].weight[kept])


def test_unstructured_pruning_takes_any_ratio_and_is_no_prior(
    compressed: Callable[..., Any], model_directory: Path, text: str
) -> None:
    tokenizer, pruned = compressed(sparsity_type="unstructured", sparsity_ratio=0.3)
    assert pruned.patch_masks["pattern"].sparsity == pytest.approx(0.3, abs=0.02)
    with pytest.raises(PatchError, match=r"compressed_model: .* prepare it with sparsity_type 2:4"):
        learn_mask(str(model_directory), pruned, tokenizer, LEARN | SHORT | {"dataset": text})
    with pytest.raises(PatchError, match=r"checkpoint: holds masks of another kind \(unstructured\), not 2:4"):
        compressed()


def test_nothing_is_learned_where_the_mask_is_not_learnable(
    compressed: Callable[..., Any], model_directory: Path
) -> None:
    tokenizer, pruned = compressed()
    model, lm_eval_model = learn_mask(str(model_directory), pruned, tokenizer, LEARN | {"learnable_mask": False})
    assert model is pruned
    assert lm_eval_model.model is pruned
    assert model.patch_mask is pruned.patch_masks["pattern"]


def test_evaluation_takes_the_data_set_of_the_pruning_arguments(
    compressed: Callable[..., Any], model_directory: Path, text: str, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(Path(text).read_text().split("\n\n")[:20]))
    tokenizer, pruned = compressed(eval_dataset=str(other))
    learned, _ = learn_mask(str(model_directory), pruned, tokenizer, LEARN | SHORT | {"dataset": text})
    usual: dict[str, Any] = {"test_lmharness": False, "length": 32}
    for model in (pruned, learned):
        named, of_text = (evaluate(model, None, tokenizer, eval_dataset=name, **usual) for name in (str(other), text))
        assert evaluate(model, None, tokenizer, **usual) == named != of_text


@pytest.mark.integration
def test_evaluation_has_accuracies_by_default(model_directory: Path) -> None:
    model, lm_eval_model = patch.get_llm(str(model_directory))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_directory)
    tasks: dict[str, Any] = {"tasks": ("piqa", "arc_easy"), "task_source": "embedded", "limit": 1}
    perplexity, accuracies = evaluate(model, lm_eval_model, tokenizer, evaluate_perplexity=False, **tasks)
    assert perplexity == 0
    assert list(accuracies) == ["piqa", "arc_easy", "average"]
    assert {accuracies["piqa"], accuracies["arc_easy"]} <= {0.0, 1.0}
    assert accuracies["average"] == (accuracies["piqa"] + accuracies["arc_easy"]) / 2


def test_hub_access_is_asked_for_by_argument(model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    for loader in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        load = loader.from_pretrained
        monkeypatch.setattr(loader, "from_pretrained", lambda *a, load=load, **k: (asked.append(k), load(*a, **k))[1])
    before = dict(os.environ)
    patch.get_llm(str(model_directory), local_files_only=True, hf_token="hf_secret")
    assert [(one["local_files_only"], one["token"]) for one in asked] == [(True, "hf_secret")] * 2
    assert dict(os.environ) == before
    with pytest.raises(PatchError, match="model nobody/nothing: not in the local cache"):
        patch.get_llm("nobody/nothing", local_files_only=True)


def test_wrong_learning_arguments_are_named(compressed: Callable[..., Any], model_directory: Path) -> None:
    tokenizer, pruned = compressed()
    with pytest.raises(PatchError, match="mask_args: unknown key 'learning_rate'"):
        learn_mask(str(model_directory), pruned, tokenizer, LEARN | {"learning_rate": 1})
    with pytest.raises(PatchError, match="optimizer"):
        learn_mask(str(model_directory), pruned, tokenizer, LEARN | {"optimizer": "lion"})


def test_wandb_and_apex_say_how_they_are_missing(
    compressed: Callable[..., Any], model_directory: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "apex", None)
    tokenizer, pruned = compressed()
    arguments = LEARN | SHORT | {"dataset": text}
    with pytest.raises(PatchError, match="pip install wandb"):
        learn_mask(str(model_directory), pruned, tokenizer, arguments, wandb=True)
    with pytest.raises(PatchError, match="apex is not installed"):
        learn_mask(str(model_directory), pruned, tokenizer, arguments | {"optimizer": "adamw_apex"})


def test_apex_is_used_where_it_is(
    compressed: Callable[..., Any], model_directory: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in with apex's arguments, which counts its steps and does what PyTorch's AdamW does."""
    steps: list[int] = []

    class FusedAdam(torch.optim.AdamW):
        def __init__(self, parameters: Any, *, adam_w_mode: bool, **options: Any):
            assert adam_w_mode
            super().__init__(parameters, **options)

        def step(self) -> None:  # type: ignore[override]
            steps.append(len(steps))
            super().step()

    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", types.SimpleNamespace(FusedAdam=FusedAdam))
    tokenizer, pruned = compressed()
    masks = []
    for optimizer in ("adamw_torch", "adamw_apex"):
        arguments = LEARN | SHORT | {"dataset": text, "optimizer": optimizer}
        masks.append(learn_mask(str(model_directory), pruned, tokenizer, arguments)[0].patch_mask)
    assert steps == list(range(SHORT["steps"]))
    assert masks[0].checksum == masks[1].checksum


def test_the_public_names_are_those_of_the_quick_start() -> None:
    assert patch.evaluate is evaluate
    assert patch.learn_mask is learn_mask
    assert patch.prepare_pruned_model is prepare_pruned_model
    with pytest.raises(AttributeError, match="no attribute 'prune_everything'"):
        patch.prune_everything  # noqa: B018


@pytest.mark.integration
def test_the_example_runs_on_the_embedded_model() -> None:
    done = subprocess.run(
        [sys.executable, "examples/quickstart.py"], cwd=ROOT, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "sparsity 0.4" in done.stdout
