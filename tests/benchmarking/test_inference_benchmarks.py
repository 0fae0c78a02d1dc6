"""The benchmarks of layers, generation and memory, run on a CPU: columns, and that they measure the right thing."""

from __future__ import annotations

import hashlib
import itertools
import re

import pandas as pd
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

import patch
from patch.artefacts import PatchError
from patch.benchmarking import decoder, generation, layers, memory, replay
from patch.benchmarking.decoder import Decoder
from patch.benchmarking.generation import Cost, Generator
from patch.benchmarking.shapes import SHAPES, layer_shapes, random_mask, random_masks, random_model
from patch.cli import benchmark
from patch.kernels.hybrid.fusion import FusedLinear, fuse_linears
from patch.models import prunable_linears
from patch.records import Record
from patch.sparsity.maskset import LinearMask, MaskSet
from patch.sparsity.patterns import Pattern

CPU = torch.device("cpu")
LAYER_COLUMNS = [
    "out_features", "in_features", "tokens", "sparsity_percent", "kernel", "us", "dense_us", "speedup", "floor_us",
    "fraction_of_floor", "cusparselt_full_2_4_us", "max_relative_error", "gpu", "torch", "commit", "date",
    "compiled_dense_us", "mask",
]  # fmt: skip
GENERATION_COLUMNS = [
    "model", "batch", "prefill_tokens", "generated_tokens", "sparsity_percent", "dense_tok_s", "hybrid_tok_s",
    "speedup", "dense_gib", "hybrid_gib", "gpu", "torch", "commit", "date",
]  # fmt: skip


@pytest.fixture(autouse=True)
def known_limits(monkeypatch):
    """1 GB/s and 1 G multiply-adds per second, which take seconds to measure."""
    monkeypatch.setattr(layers, "_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(layers, "_rate", lambda device: 1e9)


def test_a_layer_has_one_row_for_each_number_of_tokens():
    rows = list(layers.measure(256, 128, [1, 64], 0.25, ["auto"], CPU))
    assert [list(row) for row in rows] == [LAYER_COLUMNS] * 2
    assert [row["tokens"] for row in rows] == [1, 64]
    for row in rows:
        assert (row["sparsity_percent"], row["kernel"], row["gpu"]) == (25.0, "reference", None)
        assert row["speedup"] == pytest.approx(row["dense_us"] / row["us"], abs=2e-3)
        assert row["max_relative_error"] < 0.01
    # 1 of 2 tiles of 128 x 128 is 2:4; bytes for one token, multiply-adds for 64
    size = 128 * 128 * (2 + 1.125) + 4 * 4
    assert rows[0]["floor_us"] == pytest.approx((size + 2 * (256 + 128)) / 1e3, abs=0.02)
    assert rows[1]["floor_us"] == pytest.approx(64 * 256 * 128 * 0.75 / 1e3, abs=0.02)


def test_the_compiled_dense_layer_is_a_peer_in_every_row(traced):
    rows = [
        row
        for sparsity in (0.25, 0.5)
        for row in layers.measure(256, 128, [1, 64], sparsity, ["auto"], CPU, compiled=True)
    ]
    assert [row["tokens"] for row in rows] == [1, 64, 1, 64]
    assert all(row["compiled_dense_us"] > 0 for row in rows)
    assert traced["unique_graphs"] == 2  # compiled once for all sparsities


def test_rows_of_a_learned_mask_name_it():
    weight = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    learned = random_mask(weight, 0.5, (128, 128), torch.Generator().manual_seed(0))
    (row,) = layers.measure(128, 128, [1], learned, ["auto"], CPU, mask_name="cell/mask.safetensors")
    assert (row["mask"], row["compiled_dense_us"]) == ("cell/mask.safetensors", None)


def test_kernels_that_cannot_run_have_no_row_and_unknown_ones_are_named(caplog):
    caplog.set_level("INFO")
    assert list(layers.measure(128, 64, [1], 0.5, ["decode"], CPU)) == []
    assert "128x64, 1 tokens: decode cannot run: the kernels need a CUDA GPU" in caplog.text
    with pytest.raises(PatchError, match="kernel 'fastest': not one of auto, decode, prefill"):
        list(layers.measure(128, 64, [1], 0.5, ["fastest"], CPU))


def test_layers_of_a_model_are_those_that_run_fused():
    assert set(layer_shapes("llama-2-7b", fused=True)) == {(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)}
    assert set(layer_shapes("llama-3.1-8b", fused=True)) == {(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)}


def test_learned_masks_are_measured_once_for_every_shape_and_sparsity():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 128, generator=generator)
    masks = {
        str(number): random_mask(weight, share, (64, 64), generator) for number, share in enumerate([0.25, 0.25, 0.5])
    }
    dense = {"dense": LinearMask.dense((256, 128))}
    found = layers.layers_of_masks(MaskSet(masks | dense))
    assert [mask.sparsity for mask in found] == [0.25, 0.5]
    with pytest.raises(PatchError, match="no layer of this mask has 2:4 tiles"):
        layers.layers_of_masks(MaskSet(dense))


@pytest.mark.parametrize(("sparsity", "tiles"), [(0.0, 0), (0.25, 4), (0.45, 7), (0.5, 8)])
def test_random_masks_have_the_share_of_sparse_tiles_that_was_asked_for(sparsity, tiles):
    mask = random_mask(torch.randn(256, 128), sparsity, (64, 64), torch.Generator().manual_seed(0))
    assert mask.pattern == Pattern.parse("tiles:64x64")
    assert int((~mask.dense_tiles()).sum()) == tiles


@pytest.fixture
def small_shape(monkeypatch):
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    monkeypatch.setitem(SHAPES, "small", config)
    return "small"


def measured(name, masks, **options):
    return list(generation.measure(name, lambda: random_model(name, CPU), masks, **options))


@pytest.mark.parametrize("fused", ["both", "hybrid", "none"])
def test_sides_compute_fused_products_as_asked_for(small_shape, fused, monkeypatch):
    sides = []
    monkeypatch.setattr(generation, "_costs", lambda name, model, *_: sides.append(model) or {(1, 2, 2): Cost(1, 1)})
    (row,) = measured(small_shape, [("random", 0.5)], batches=[1], lengths=[(2, 2)], fused=fused)
    assert row["fused"] == fused
    has_fused = [any(isinstance(module, FusedLinear) for module in model.modules()) for model in sides]
    assert has_fused == [fused == "both", fused != "none"]


def test_generation_has_a_row_for_each_mask_batch_and_length(small_shape):
    learned = random_masks(random_model(small_shape, CPU), 0.5)
    masks = [("random", 0.25), ("learned.safetensors", learned)]
    rows = measured(small_shape, masks, batches=[2, 1], lengths=[(5, 4), (5, 6), (3, 4)])
    assert [(row["mask"], row["sparsity_percent"], row["batch"], row["prefill_tokens"]) for row in rows] == [
        (name, sparsity, batch, prefill)
        for name, sparsity in (("random", 25.0), ("learned.safetensors", 50.0))
        for batch in (2, 1)
        for prefill in (5, 5, 3)
    ]
    assert [row["generated_tokens"] for row in rows] == [4, 6, 4] * 4
    for row in rows:
        assert list(row)[: len(GENERATION_COLUMNS)] == GENERATION_COLUMNS
        assert row["stack"] == "eager"
        assert row["hybrid_gib"] <= row["dense_gib"]
        assert row["hybrid_prefill_ms"] > 0


def test_each_side_of_a_row_is_measured_on_its_own_model(small_shape, monkeypatch):
    """With a time that depends on the number of packed layers."""
    made = []

    def cost(generator, generated, device):
        hybrids = len(patch.inference.hybrid_linears(generator._decoder._model))
        made.append((hybrids, generated))
        return Cost(prefill_ms=1000.0 / (1 + hybrids), decode_ms=0.0)

    monkeypatch.setattr(generation, "_cost", cost)
    (row,) = measured(small_shape, [("random", 0.5)], batches=[1], lengths=[(5, 3)])
    assert made[0] == (0, 3)
    assert made[1][0] > 0
    assert row["dense_tok_s"] == 8.0
    assert row["speedup"] == 1 + made[1][0]


def test_tokens_per_second_count_prompt_and_generated_ones():
    cost = Cost(prefill_ms=100.0, decode_ms=10.0)
    assert cost.tokens_per_second(batch=16, prefill=128, generated=11) == pytest.approx(16 * 139 / 0.2)


def transformers_tokens(model, prompt, number):
    return model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=number, min_new_tokens=number, do_sample=False
    )[:, prompt.shape[1] :]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_generated_tokens_are_those_of_transformers_every_time(architecture, fused, tiny_model):
    model = tiny_model(architecture)
    prompt = torch.randint(3, 256, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = transformers_tokens(model, prompt, 7)
    if fused:
        fuse_linears(model)
    generator = Generator(model, prompt, 7, compiled=False)
    for number in (7, 3, 7):
        assert torch.equal(generator(number), expected[:, :number])


@pytest.fixture
def traced(monkeypatch):
    """`torch.compile` without code generation, which takes long; what it needs of the code stays the same."""
    compile_ = torch.compile

    def trace(function, *, mode, **options):
        assert mode == decoder.MODE
        return compile_(function, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", trace)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters["stats"]
    torch.compiler.reset()


@pytest.mark.parametrize("hybrid", [False, True], ids=["dense", "hybrid"])
def test_compiled_decoders_generate_the_same_from_one_version_for_all_blocks(hybrid, tiny_model, traced):
    versions = []
    for blocks in (2, 4):
        model = tiny_model(hidden_size=128, intermediate_size=256, num_hidden_layers=blocks).bfloat16()
        if hybrid:
            model = patch.load(model, random_masks(model, 0.35, (128, 64)))
        else:
            fuse_linears(model)
        prompt = torch.randint(3, 256, (2, 9), generator=torch.Generator().manual_seed(0))
        expected = Generator(model, prompt, 7, compiled=False)()
        assert torch.equal(Generator(model, prompt, 7, compiled=True)(), expected)
        versions.append(traced["unique_graphs"])
    assert versions[1] == versions[0] > 0


def test_hybrid_models_compile_as_a_whole_without_graph_breaks(tiny_model):
    model = tiny_model(hidden_size=128, intermediate_size=256).bfloat16()
    model = patch.load(model, random_masks(model, 0.35, (128, 64)))
    assert patch.inference.hybrid_linears(model)
    ids = torch.randint(3, 256, (2, 9))
    expected = model(ids, use_cache=False).logits
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected)


def test_other_architectures_are_refused(tiny_model):
    with pytest.raises(PatchError, match="timed for llama and qwen2 models, this one is gemma3"):
        Decoder(tiny_model("gemma3"), 1, 8, compiled=False)


class NoReadback(TorchDispatchMode):
    """Fails where a tensor's content decides what the host does next, which no CUDA graph can hold."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.__name__.partition(".")[0] not in ("_local_scalar_dense", "is_nonzero", "nonzero", "equal"), func
        return func(*args, **(kwargs or {}))


def test_prefill_and_decoding_read_nothing_back_so_graphs_can_hold_them(tiny_model):
    generator = Generator(tiny_model(), torch.randint(3, 256, (2, 9)), 7, compiled=False)
    with NoReadback():
        generator.prefill()
        generator.step()


def test_memory_is_that_of_the_packed_layers(tiny_model, monkeypatch):
    model = tiny_model(hidden_size=128, intermediate_size=256).bfloat16()
    masks = random_masks(model, 0.5, (128, 64))
    weights = [linear.weight.numel() for linear in prunable_linears(model).values()]
    clock = iter([10.0, 12.5])
    monkeypatch.setattr(memory.time, "perf_counter", lambda: next(clock))
    row = memory.measure("tiny", model, masks)
    assert row["pack_s"] == 2.5
    assert row["dense_gib"] == round(2 * sum(weights) / 2**30, 4)
    assert row["linear_layers"] == len(weights)
    # down_proj 128 x 256: four 2:4 tiles and four descriptors
    assert row["smallest_ratio"] == pytest.approx((4 * 9216 + 16) / (2 * 128 * 256), abs=1e-4)
    assert row["whole_model_hybrid_gib"] <= row["whole_model_dense_gib"]
    assert row["hybrid_layers"] == sum(isinstance(module, patch.HybridLinear) for module in model.modules())


def test_a_gpu_on_which_others_work_is_refused(monkeypatch):
    total, held = 80 * 2**30, [3 * 2**30]  # 2 GiB of it are this process's own
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2 * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (total - held[0], total))
    replay.check_alone()
    held[0] = 5 * 2**30
    with pytest.raises(PatchError, match=r"GPU 0: other processes hold 1\.5 GiB of it, .* --resources gpu=1"):
        replay.check_alone()


def run(*arguments):
    return CliRunner().invoke(benchmark.app, [*map(str, arguments), "--device", "cpu"])


def test_a_benchmark_with_a_key_writes_a_record_last(tmp_path):
    output = tmp_path / "job" / "rows.csv"
    output.parent.mkdir()
    part = ("layers", "--output", output, "--shape", "8x64", "--sparsity", 50)
    assert run("--key", "k", *part, "--tokens", "0").exit_code != 0
    assert run(*part, "--tokens", "1").exit_code == 0  # by hand
    assert not (output.parent / "record.json").exists()
    assert run("--key", "k", *part, "--tokens", "1").exit_code == 0
    record = Record.read(output.parent)
    assert (record.stage, record.key, record.arguments["benchmark"]) == ("benchmark", "k", "layers")
    options = {"shape": ["8x64"], "tokens": "1", "compile": False, "kernel": [], "output": str(output)}
    assert options.items() <= record.arguments["options"].items()
    assert record.outputs == {"rows.csv": hashlib.sha256(output.read_bytes()).hexdigest()}
    assert record.cost["wall_s"] > 0


def test_a_model_generates_with_its_learned_mask(tiny_model, tmp_path):
    model = tiny_model(hidden_size=128, intermediate_size=256)
    model.save_pretrained(tmp_path / "model")
    random_masks(model, 0.5, (128, 64)).save(tmp_path / "mask.safetensors")
    output = tmp_path / "rows.csv"
    options = ("--shape", tmp_path / "model", "--mask", tmp_path / "mask.safetensors", "--batch", "1,2")
    done = run("generation", "--output", output, *options, "--length", "3+2")
    assert done.exit_code == 0, done.output
    rows = pd.read_csv(output)
    assert rows.batch.tolist() == [1, 2]
    assert set(rows["mask"]) == {str(tmp_path / "mask.safetensors")}
    assert set(rows.sparsity_percent) == {50.0}
    joined = tmp_path / "joined.csv"
    assert CliRunner().invoke(benchmark.app, ["join", str(output), str(output), "--output", str(joined)]).exit_code == 0
    pd.testing.assert_frame_equal(pd.read_csv(joined), pd.concat([rows, rows], ignore_index=True))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--batch", "1,0"), "--batch 1,0: write whole numbers"),
        (("--batch", "1.5"), "--batch 1.5: write whole numbers"),
        (("--length", "128"), "--length 128: write PROMPT.GENERATED"),
        (("--length", "128+128,8+1"), "at least 2 tokens to generate"),
        (("--mask", "x", "--shape", "a", "--shape", "b"), "give the one model that it belongs to as --shape, not 2"),
    ],
)
def test_mistakes_in_sizes_are_named(options, expected, tmp_path):
    done = run("generation", "--output", tmp_path / "rows.csv", *options)
    assert isinstance(done.exception, PatchError)
    assert re.search(expected, str(done.exception))


def test_names_of_shapes_are_checked():
    for name in itertools.chain(SHAPES, ["12x16"]):
        assert layer_shapes(name)
    with pytest.raises(PatchError, match="not one of"):
        layer_shapes("llama-1")
