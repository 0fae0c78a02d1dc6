"""The benchmark of pruning methods, with stand-ins for the reference checkouts that have their interfaces."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from patch.artefacts import PatchError
from patch.benchmarking.contenders import output_norm, random_layer
from patch.benchmarking.pruning import forward_seconds, measure
from patch.benchmarking.shapes import layer_shapes
from patch.cli import benchmark
from patch.kernels.proximal import proximal_
from patch.pruning.wanda import InputNorm
from patch.sparsity.patterns import Pattern

CPU = torch.device("cpu")
PATTERNS = ("2:4", "unstructured")
COLUMNS = [
    "method", "pattern", "out_features", "in_features", "ours_s", "reference_s", "speedup", "ours_peak_gib",
    "reference_peak_gib", "mask_agreement", "relative_output_error", "gpu", "torch", "commit", "date",
    "forward_s", "forward_with_statistic_s",
]  # fmt: skip

# Keeps the last 2 of every 4 and the first row, whatever the scores are.
SPARSEGPT = """
from quant import *
import torch

class SparseGPT:
    def __init__(self, layer):
        self.layer, self.seen = layer, 0
    def add_batch(self, inputs, outputs):
        self.seen += len(inputs)
    def fasterprune(self, sparsity, prunen=0, prunem=0, blocksize=0, percdamp=0):
        print(SETTINGS)
        torch.cuda.synchronize()
        assert (self.seen, sparsity, prunen, prunem) == (3 * 8, 0.5, 2, 4)
        self.layer.weight.data[1:].unflatten(1, (-1, 4))[..., :2] = 0
"""
# Wanda's 2:4, so that agreement is complete.
WANDA = """
import torch
from .layers import find_layers

def prune_wanda(args, model, tokenizer, device, prune_n=0, prune_m=0):
    get_loaders("c4")
    inputs, outputs, mask, positions = prepare_calibration_input(model, None, device)
    block, seen = model.model.layers[0], []
    (layer,) = find_layers(block)
    layer.register_forward_hook(lambda module, arguments, output: seen.append(arguments[0].float()))
    for number in range(args.nsamples):
        outputs[number] = block(inputs[number].unsqueeze(0), attention_mask=mask, position_ids=positions)[0]
    scores = layer.weight.data.abs() * torch.cat(seen).flatten(0, 1).norm(dim=0)
    dropped = scores.unflatten(1, (-1, prune_m)).argsort(-1)[..., :prune_n]
    layer.weight.data.unflatten(1, (-1, prune_m)).scatter_(2, dropped, 0)
"""
# Makes the 2 smallest of every 4 exactly 0, which the operator does with few weights of this size.
PROXSPARSE = """
import torch

def prox_op(weight_matrix, lambda_=0.1):
    assert lambda_ == 0.85
    groups = weight_matrix.view(-1, 4)
    smallest = groups.abs().topk(2, dim=1, largest=False).indices
    return groups.scatter(1, smallest, 0.0).view_as(weight_matrix)
"""


@pytest.fixture(autouse=True)
def _timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patch.benchmarking.contenders.REPEATS", 0)


@pytest.fixture
def checkouts(tmp_path: Path) -> dict[str, Path]:
    files = {
        "sparsegpt/sparsegpt.py": SPARSEGPT,
        "sparsegpt/quant.py": "SETTINGS = 'loud'",
        "wanda/lib/prune.py": WANDA,
        "wanda/lib/layers.py": "def find_layers(block): return list(block.children())",
        "proxsparse/end-to-end/prox_op.py": PROXSPARSE,
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    return {name: tmp_path / name for name in ("sparsegpt", "wanda", "proxsparse")}


def rows(method: str, checkouts: dict[str, Path], pattern: str = "2:4") -> list[dict[str, object]]:
    settings = {"samples": 3, "length": 8, "device": CPU}
    return list(measure("12x16", method, Pattern.parse(pattern), 0.5, checkouts, **settings))


def test_the_same_masks_agree_and_leave_the_same_error(checkouts):
    (row,) = rows("wanda", checkouts)
    assert list(row) == COLUMNS
    assert (row["method"], row["pattern"], row["out_features"], row["in_features"]) == ("wanda", "2:4", 12, 16)
    assert (row["mask_agreement"], row["relative_output_error"]) == (1, 1)
    assert row["ours_s"] > 0
    assert row["reference_s"] > 0
    assert 0 < row["forward_s"] < 1
    assert 0 < row["forward_with_statistic_s"] < 1


def test_other_masks_do_not_and_dense_rows_of_the_reference_do_not_count(checkouts, capsys):
    (row,) = rows("sparsegpt", checkouts)
    assert 0.3 < row["mask_agreement"] < 0.7
    assert row["relative_output_error"] < 1
    assert capsys.readouterr().out == ""


def test_the_proximal_operator_is_compared_by_the_zeros_it_makes(checkouts):
    (row,) = rows("proxsparse", checkouts)
    assert list(row) == COLUMNS
    weight, inputs = random_layer(12, 16, 3, 8, CPU)
    assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    new = weight.clone()
    proximal_(new, 0.85)
    zeros = (new == 0).float().mean().item()
    assert 0 < zeros < 0.25
    assert row["mask_agreement"] == pytest.approx(0.5 + zeros, abs=1e-6)  # all of them are among the 2 smallest
    groups = weight.view(-1, 4)
    lost = groups.masked_fill(groups.abs() > groups.abs().sort(dim=1).values[:, 1:2], 0).view(12, 16)
    expected = output_norm(new - weight, inputs) / output_norm(lost, inputs)
    assert row["relative_output_error"] == pytest.approx(expected, rel=1e-5)


def test_a_pattern_that_the_method_cannot_make_is_told(checkouts):
    with pytest.raises(PatchError, match="method proxsparse: cannot make unstructured; it makes 2:4"):
        rows("proxsparse", checkouts, "unstructured")
    with pytest.raises(PatchError, match="method 'prox': unknown; choose one of"):
        rows("prox", checkouts)


def test_the_command_takes_all_methods_with_the_patterns_that_they_can_make(checkouts, tmp_path):
    output = tmp_path / "rows.csv"
    arguments = ["--shape", "8x16", "--samples", "2", "--length", "8", "--device", "cpu", "--output", str(output)]
    result = CliRunner().invoke(
        benchmark.app, ["pruning", *arguments, "--proxsparse", str(checkouts["proxsparse"])], catch_exceptions=False
    )
    assert result.exit_code == 0
    made = pd.read_csv(output)
    both = [(name, pattern) for name in ("magnitude", "wanda", "sparsegpt", "thanos") for pattern in PATTERNS]
    assert list(zip(made.method, made.pattern, strict=True)) == [*both, ("proxsparse", "2:4")]
    assert made.reference_s.notna().tolist() == [False] * 8 + [True]


@pytest.mark.parametrize("method", ["magnitude", "thanos", "random"])
def test_without_a_reference_its_columns_are_empty(method):
    (row,) = rows(method, {}, "unstructured")
    assert list(row) == COLUMNS
    empty = ("reference_s", "speedup", "reference_peak_gib", "mask_agreement", "relative_output_error")
    assert all(row[name] is None for name in empty)


def test_another_checkout_names_the_file_and_the_repository(checkouts):
    with pytest.raises(PatchError, match=r"thanos\.py: no such file; --thanos takes a checkout of .*vectozavr/thanos"):
        rows("thanos", {"thanos": checkouts["wanda"]})


def test_layers_are_those_of_the_models():
    assert layer_shapes("qwen2.5-0.5b") == [(896, 896), (128, 896), (4864, 896), (896, 4864)]
    assert layer_shapes("llama-2-7b") == [(4096, 4096), (11008, 4096), (4096, 11008)]
    assert layer_shapes("12x16") == [(12, 16)]
    with pytest.raises(PatchError, match=r"shape 'llama-2': not one of qwen2\.5-0\.5b, .* or a layer such as 896x4864"):
        layer_shapes("llama-2")


def test_output_norms_are_those_of_all_tokens_together():
    weight, inputs = random_layer(6, 8, 3, 5, CPU)
    expected = (inputs.double().flatten(0, 1) @ weight.double().T).norm()
    assert output_norm(weight, inputs) == pytest.approx(float(expected), rel=1e-5)


def test_forward_passes_are_two_and_the_statistic_sees_every_token_once(monkeypatch):
    weight, inputs = random_layer(6, 8, 3, 5, CPU)
    seen, passes = [], []

    class Counted(InputNorm):
        def add(self, batch):
            seen.append(batch.shape[0])

    monkeypatch.setattr("patch.benchmarking.pruning.REPEATS", 1)
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda batch, layer: passes.append((batch.shape[0], layer.dtype))
    )
    assert forward_seconds(weight, inputs, Counted) > 0
    assert (sum(seen), sum(count for count, _ in passes)) == (2 * 3, 2 * 2 * 3)
    assert {dtype for _, dtype in passes} == {torch.bfloat16}
