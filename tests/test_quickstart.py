"""The documented Python API, with the argument names and dictionary keys of the official Quick Start."""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
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
        ({"prune_method": "proxsparse"}, "does not prune in one shot"),
        ({"fine_tune": True}, "fine_tune is not available"),
        ({"sparsity_type": "unstructured"}, "2:4 mask"),
        ({"prune_method": "maskllm"}, "needs maskllm_checkpoint"),
    ],
)
def test_wrong_pruning_arguments_are_named(
    compressed: Callable[..., Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(PatchError, match=message):
        compressed(**changes)


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
