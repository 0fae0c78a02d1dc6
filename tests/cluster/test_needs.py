"""What jobs ask for: near the estimates of the code that runs, more on a retry, and growing with the model."""

import math
from pathlib import Path

import pytest
import torch
import transformers

from patch.cluster.needs import benchmark, learning_gib, learning_gpus, parameter_count, stage
from patch.cluster.site import Gpu
from patch.experiments import Cell, ModelSource, load_experiment
from patch.learning.memory import memory_estimate, weights_memory_estimate
from patch.methods import METHODS, Learned, TrainedWeights
from patch.sparsity.patterns import Pattern

PAPER = Path(__file__).parents[2] / "workflow" / "config" / "paper.yaml"
H100 = Gpu(kind="h100")
SHAPES = {
    "qwen2.5-0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "vocab_size": 151936},
    "llama-2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000},
    "llama-2-13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "vocab_size": 32000},
}


@pytest.fixture(scope="module")
def cells() -> dict[str, Cell]:
    return {cell.path: cell for cell in load_experiment([PAPER]).cells()}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("method", ["patch_joint", "patch_tile"])
def test_memory_is_near_the_estimate_of_the_learning_code(name: str, method: str) -> None:
    config = transformers.LlamaConfig(**SHAPES[name], num_attention_heads=SHAPES[name]["hidden_size"] // 64)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    chosen = METHODS[method]()
    assert isinstance(chosen, Learned)
    exact = memory_estimate(model, chosen, Pattern.parse("tiles:128x128"), 4096)["sum"]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    ours = learning_gib(parameters, 2 * parameters / 2**30, chosen, 4096)
    assert exact < 1.05 * ours
    assert ours < 2 * exact


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    ("method", "options"),
    [("proxsparse", {}), ("fine_tune", {}), ("fine_tune", {"rounding": "stochastic", "optimizer": "adamw_8bit"})],
)
def test_memory_of_training_weights_is_near_the_estimate_too(name: str, method: str, options: dict[str, str]) -> None:
    config = transformers.LlamaConfig(**SHAPES[name], num_attention_heads=SHAPES[name]["hidden_size"] // 64)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    chosen = METHODS[method](**options)
    assert isinstance(chosen, TrainedWeights)
    exact = weights_memory_estimate(model, chosen, 4096)["sum"]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    ours = learning_gib(parameters, 2 * parameters / 2**30, chosen, 4096)
    assert exact < 1.05 * ours
    assert ours < 2 * exact


def test_bytes_of_a_trained_weight_are_those_of_the_tensors_that_there_are() -> None:
    """bfloat16: copy, gradients (the model's, and a float32 one), moments."""
    assert METHODS["proxsparse"]().weight_bytes(2) == (0, 2, 4)  # type: ignore[attr-defined]
    assert METHODS["fine_tune"]().weight_bytes(2) == (4, 6, 8)  # type: ignore[attr-defined]
    assert METHODS["fine_tune"]().weight_bytes(4) == (0, 4, 8)  # type: ignore[attr-defined]


def test_training_weights_takes_one_gpu_and_its_state_memory_of_the_host(cells: dict[str, Cell]) -> None:
    cell = cells["llama-2-7b/proxsparse/50-2of4"]
    asked = stage(cell, "learn", 7e9, H100, 1, 1440)
    assert (asked.gpus, asked.nodes) == (1, 1)
    saved = 7e9 * (2 + 4) / 2**20  # weights and both moments, MiB
    assert asked.memory_mb > saved + 7e9 * 2 / 2**20


def test_learning_that_does_not_fit_one_gpu_takes_as_many_as_it_needs() -> None:
    method = METHODS["patch_joint"]()
    assert isinstance(method, Learned)
    assert learning_gpus(0.5e9, 1, method, 4096, H100) == (1, 1)
    assert learning_gpus(7e9, 13, method, 4096, H100) == (4, 1)
    assert learning_gpus(7e9, 13, method, 4096, Gpu(memory_gib=80, per_node=2)) == (2, 2)


def test_needs_grow_with_the_model_and_with_attempts_and_time_is_bounded(cells: dict[str, Cell]) -> None:
    small, large = cells["qwen2.5-0.5b/sparsegpt/50-2of4"], cells["llama-2-13b/sparsegpt/50-2of4"]
    for name in ("prune", "evaluate"):
        one = stage(small, name, 0.5e9, H100, 1, 1440)
        more = stage(large, name, 13e9, H100, 1, 1440)
        again = stage(small, name, 0.5e9, H100, 1, 1440, attempt=2)
        assert one.memory_mb < more.memory_mb
        assert one.minutes < more.minutes
        assert again.memory_mb > one.memory_mb
        assert again.minutes > one.minutes
        assert one.gpus == 1
        assert one.cpus == 4
    assert stage(cells["llama-2-13b/patch_tile/45-tiles128x128"], "learn", 13e9, H100, 1, 600).minutes == 600


def test_adapters_cost_more_than_quantisation_and_more_in_large_models(cells: dict[str, Cell]) -> None:
    plain, adapters = (cells[f"llama-2-7b/patch_tile/45-tiles128x128/{name}"] for name in ("int4", "int4-lora"))
    asked = [stage(cell, "compress", 7e9, H100, 1, 1440) for cell in (plain, adapters)]
    assert asked[0].minutes < asked[1].minutes <= 240
    assert asked[0].memory_mb < asked[1].memory_mb
    assert stage(adapters, "compress", 70e9, H100, 1, 6000).minutes > asked[1].minutes
    assert stage(adapters, "compress", 7e9, None, 8, 6000).minutes > asked[1].minutes


def test_similar_jobs_have_equal_needs_so_that_they_share_an_array(cells: dict[str, Cell]) -> None:
    asked = {
        stage(cells[f"qwen2.5-0.5b/wanda/{level}-unstructured"], "prune", 0.5e9, H100, 1, 1440) for level in (25, 45)
    }
    assert len(asked) == 1
    assert all(needs.minutes % 15 == 0 and needs.memory_mb % 1024 == 0 for needs in asked)


def test_a_benchmark_takes_one_gpu_and_memory_for_the_model() -> None:
    small, large = (benchmark(parameters, H100) for parameters in (0.5e9, 8e9))
    assert small.gpus == large.gpus == small.nodes == 1
    assert small.memory_mb < large.memory_mb < benchmark(8e9, H100, attempt=2).memory_mb
    assert large.memory_mb > 1024 * 2 * 8e9 / 2**30
    assert benchmark(8e9, None).gpus == 0


def test_size_comes_from_the_prepared_model_else_from_the_name(tmp_path: Path) -> None:
    nowhere = tmp_path / "model.json"
    for name, size in (
        ("Qwen/Qwen2.5-0.5B", 0.5e9),
        ("meta-llama/Llama-2-13b-hf", 13e9),
        ("embedded:smollm2-135m", 135e6),
    ):
        assert math.isclose(parameter_count(ModelSource(source=name), nowhere), size)
    assert parameter_count(ModelSource(source="./mine"), nowhere) == 1e9
    nowhere.write_text('{"schema": "patch.model/1", "parameters": 77}')
    assert parameter_count(ModelSource(source="./mine"), nowhere) == 77
