"""The benchmark of one-shot methods, with stand-ins for the reference checkouts that have their interfaces."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from patch.artefacts import PatchError
from patch.benchmarking.pruning import forward_seconds, measure, output_norm, random_layer
from patch.benchmarking.shapes import layer_shapes
from patch.pruning.wanda import InputNorm
from patch.sparsity.patterns import Pattern

CPU = torch.device("cpu")
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


@pytest.fixture
def checkouts(tmp_path: Path) -> dict[str, Path]:
    files = {
        "sparsegpt/sparsegpt.py": SPARSEGPT,
        "sparsegpt/quant.py": "SETTINGS = 'loud'",
        "wanda/lib/prune.py": WANDA,
        "wanda/lib/layers.py": "def find_layers(block): return list(block.children())",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    return {"sparsegpt": tmp_path / "sparsegpt", "wanda": tmp_path / "wanda"}


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
