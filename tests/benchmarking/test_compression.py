"""The benchmark of quantisation and adapters, with a stand-in for SLiM's checkout that has its interfaces."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from patch.artefacts import PatchError
from patch.benchmarking.compression import measure
from patch.benchmarking.contenders import output_norm, random_layer
from patch.benchmarking.references import slim_obstacle
from patch.cli import benchmark
from patch.compression.compress import compress_weight
from patch.compression.options import Compression
from patch.sparsity.maskset import LinearMask
from patch.sparsity.patterns import Pattern, keep_n_of_m

CPU = torch.device("cpu")
COLUMNS = [
    "quantiser", "adapter_rank", "pattern", "out_features", "in_features", "ours_s", "reference_s", "speedup",
    "ours_peak_gib", "reference_peak_gib", "code_agreement", "relative_output_error", "gpu", "torch", "commit", "date",
]  # fmt: skip

# One scale per matrix, of its largest weight, whatever was asked for, and the first row's codes are too large by one.
# Triton is imported and used by no one.
QUANTISATION = """
import torch
import triton
import triton.language as tl
from slim.quantization.levels import LARGEST

@triton.jit
def kernel(x, block: tl.constexpr):
    pass

class Quantizer:
    def __init__(self, matrix_type, num_bits=8, slim_quant=False, block_quantization=False, block_dim=16,
                 column_wise_grouping=True):
        assert (matrix_type, num_bits, block_dim, column_wise_grouping) == ("weight", 4, 128, False)
        assert not block_quantization
    def quantize_weight(self, mat, important_columns=None):
        self.scaling_factor = LARGEST / mat.abs().max().cuda(0)
        codes = torch.round(mat * self.scaling_factor).to(torch.int8)
        codes[0] += 1
        return codes
    def dequantize_absmax(self, quantized_mat):
        return quantized_mat / self.scaling_factor
"""
# Adapters of zeros.
LORA = """
import torch
from slim.quantization.quantization import Quantizer as AutoQuantizer
from .utils import message

def add_lora(module, W_mask, rank_ratio=0.01, slim_lora=False, activations=None, quantizer=None, quantize_first=False):
    print(message)
    assert (rank_ratio, slim_lora, quantize_first) == (0.25, True, True)
    assert activations.tokens == 3 * 8
    assert W_mask.float().mean() == 0.5
    module.weight.data[W_mask] = 0
    module.weight.data = quantizer.dequantize_absmax(quantizer.quantize_weight(module.weight.data))
    outputs, inputs = module.weight.shape
    module.lora_left = torch.nn.Parameter(torch.zeros(inputs, 3, dtype=torch.bfloat16))
    module.lora_right = torch.nn.Parameter(torch.zeros(3, outputs, dtype=torch.bfloat16))
"""
WRAPPER = """
class WrappedGPT:
    def __init__(self, layer):
        self.tokens = 0
    def add_batch(self, inp, out):
        self.tokens += len(inp)
"""


@pytest.fixture(autouse=True)
def _timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patch.benchmarking.contenders.REPEATS", 0)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    files = {
        "slim/quantization/quantization.py": QUANTISATION,
        "slim/quantization/levels.py": "LARGEST = 7",
        "slim/lora.py": LORA,
        "slim/utils.py": "message = 'loud'",
        "slim/layerwrapper.py": WRAPPER,
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


def row(checkout: Path | None, **options: object) -> dict[str, object]:
    (found,) = measure("12x16", Compression(**options), checkout, samples=3, length=8, device=CPU)  # type: ignore[arg-type]
    assert list(found) == COLUMNS
    assert (found["out_features"], found["in_features"]) == (12, 16)
    return found


def of_the_stand_in(weight: Tensor) -> Tensor:
    step = weight.abs().max() / 7
    codes = (weight / step).round()
    codes[0] += 1
    return codes * step


def test_codes_and_errors_are_those_of_both_sides(checkout: Path) -> None:
    found = row(checkout, quantiser="absmax")
    assert (found["quantiser"], found["adapter_rank"], found["pattern"]) == ("absmax", 0, "dense")
    assert found["code_agreement"] == pytest.approx(11 / 12, abs=1e-6)
    weight, inputs = random_layer(12, 16, 3, 8, CPU)
    theirs = of_the_stand_in(weight)
    step = weight.abs().max() / 7
    errors = [output_norm(made - weight, inputs) for made in ((weight / step).round() * step, theirs)]
    assert found["relative_output_error"] == pytest.approx(errors[0] / errors[1], rel=1e-4)
    assert found["speedup"] == pytest.approx(found["reference_s"] / found["ours_s"], rel=0.1)  # type: ignore[operator]


def test_adapters_count_and_stand_beside_wandas_half(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = Compression(quantiser="absmax", adapter_rank=0.25)
    found = row(checkout, quantiser="absmax", adapter_rank=0.25)
    assert (found["adapter_rank"], found["pattern"], found["code_agreement"]) == (0.25, "2:4", None)
    assert capsys.readouterr().out == ""
    weight, inputs = random_layer(12, 16, 3, 8, CPU)
    norms = inputs.float().square().sum((0, 1)).div(3).sqrt()
    keep = keep_n_of_m(weight.abs() * norms, 2, 4)
    made = compress_weight(weight, LinearMask.from_keep_mask(keep, Pattern("n:m", 2, 4)), norms, options)
    ours, left, right = (matrix.dense(torch.float32) for _, matrix in made.matrices())
    errors = [output_norm(new - weight, inputs) for new in (ours + right.T @ left, of_the_stand_in(weight * keep))]
    assert found["relative_output_error"] == pytest.approx(errors[0] / errors[1], rel=1e-3)


@pytest.mark.skipif(importlib.util.find_spec("triton") is not None, reason="Triton is installed")
def test_triton_is_stood_in_for_only_while_it_is_imported(checkout: Path) -> None:
    row(checkout, quantiser="absmax")
    assert importlib.util.find_spec("triton") is None


def test_groups_of_the_reference_need_a_gpu_and_sizes_that_divide(
    checkout: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = row(checkout, quantiser="group_absmax")
    assert found["reference_s"] is found["code_agreement"] is None
    assert "SLiM is not timed: its groups are Triton kernels, which need a GPU" in caplog.text
    monkeypatch.setattr("patch.benchmarking.references.runs_triton", lambda weight: True)
    assert row(checkout, quantiser="group_absmax")["reference_s"] is None
    assert "SLiM is not timed: its groups of 128 do not divide 12 x 16" in caplog.text
    assert slim_obstacle(torch.empty(128, 256), Compression()) == ""


def test_adapters_need_inputs_in_fours() -> None:
    with pytest.raises(PatchError, match=r"layer 8x10 \(8x10\): 10 inputs do not split into 4s"):
        list(measure("8x10", Compression(adapter_rank=0.5), None, samples=1, length=4, device=CPU))


@pytest.mark.parametrize("rank", [0, 0.25])
def test_without_the_reference_its_columns_are_empty(rank: float) -> None:
    found = row(None, adapter_rank=rank)
    empty = (
        "reference_s", "speedup", "ours_peak_gib", "reference_peak_gib", "code_agreement", "relative_output_error",
    )  # fmt: skip
    assert all(found[name] is None for name in empty)
    assert found["ours_s"] > 0  # type: ignore[operator]


def test_another_checkout_names_the_file_and_the_repository(tmp_path: Path) -> None:
    with pytest.raises(PatchError, match=r"lora\.py: no such file; --slim takes a checkout of .*Paramathic/slim"):
        row(tmp_path)


def test_the_command_writes_a_row_per_quantiser_and_rank(checkout: Path, tmp_path: Path) -> None:
    output = tmp_path / "rows.csv"
    arguments = ["--shape", "8x16", "--samples", "3", "--length", "8", "--device", "cpu", "--output", str(output)]
    result = CliRunner().invoke(
        benchmark.app, ["compression", *arguments, "--rank", "0,0.25", "--slim", str(checkout)], catch_exceptions=False
    )
    assert result.exit_code == 0
    made = pd.read_csv(output)
    expected = [(name, rank) for name in ("slim_quant", "group_absmax") for rank in (0, 0.25)]
    assert list(zip(made.quantiser, made.adapter_rank, strict=True)) == expected
    assert made.reference_s.notna().tolist() == [True, True, False, False]
    refused = CliRunner().invoke(benchmark.app, ["compression", *arguments, "--quantiser", "absmin"])
    assert isinstance(refused.exception, PatchError)
    assert "compression, setting 'quantiser'" in str(refused.exception)
