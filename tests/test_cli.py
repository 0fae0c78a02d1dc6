"""The commands as a person types them, on a tiny model directory; and one clear line for every kind of bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from patch.compression.artefact import CompressedSet
from patch.data import make_tokens
from patch.evaluation.perplexity import perplexity
from patch.models import load_model, load_tokenizer, prunable_linears
from patch.sparsity.maskset import MaskSet

ROOT = Path(__file__).parents[1]


def patch_llm(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "patch", *map(str, arguments)],
        cwd=cwd or Path(__file__).parents[1],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one line an error ends with; nothing that looks like a crash may stand before it."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


@pytest.fixture
def text_file(tmp_path: Path, documents: list[str]) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(documents))
    return path


def test_help_lists_one_command_per_stage_without_loading_torch() -> None:
    done = patch_llm("--help")
    assert done.returncode == 0
    for command in ("prepare", "prune", "compress", "evaluate", "collect", "tables", "figures", "mlflow", "show"):
        assert command in done.stdout
    loaded = subprocess.run(
        [sys.executable, "-c", "import patch.cli, sys; print('torch' in sys.modules)"], capture_output=True, text=True
    )
    assert loaded.stdout.strip() == "False"


def test_prune_then_evaluate_a_users_own_model(model_directory: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    calibration = ("--calibration", text_file, "--sampling", "packed", "--samples", 4, "--length", 16)
    done = patch_llm(
        "prune", "--model", model_directory, "--method", "wanda", "--pattern", "2:4", *calibration, "--output", out
    )
    assert done.returncode == 0, done.stderr
    masks = MaskSet.load(out / "mask.safetensors")
    assert masks.sparsity == 0.5
    assert masks.linears.keys() == prunable_linears(load_model(str(model_directory))).keys()
    record = json.loads((out / "record.json").read_text())
    assert record["arguments"]["method"] == "wanda"
    assert record["metrics"][0] == {
        "subject": "model", "name": "sparsity", "value": 0.5, "stderr": None, "samples": masks_size(masks)
    }  # fmt: skip

    text = ("--text", f"mine={text_file}", "--length", 16)
    done = patch_llm(
        "evaluate", "--model", model_directory, "--mask", out / "mask.safetensors", *text, "--output", out / "eval"
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((out / "eval" / "record.json").read_text())
    assert [metric["name"] for metric in record["metrics"]] == ["perplexity"]
    assert record["inputs"]["mask"] == masks.checksum


def test_compress_a_pruned_model_then_evaluate_it(model_directory: Path, text_file: Path, tmp_path: Path) -> None:
    calibration = ("--calibration", text_file, "--sampling", "packed", "--samples", 4, "--length", 16)
    mask = tmp_path / "out" / "mask.safetensors"
    done = patch_llm("prune", "--model", model_directory, "--method", "magnitude", "--output", mask.parent)
    assert done.returncode == 0, done.stderr
    settings = ("--set", "group_size=32", "--set", "adapter_rank=0.25")
    out = tmp_path / "compressed"
    done = patch_llm(
        "compress", "--model", model_directory, "--mask", mask, *settings, *calibration, "--output", out
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    weights = CompressedSet.load(out / "compressed.safetensors")
    record = json.loads((out / "record.json").read_text())
    assert record["stage"] == "compress"
    assert record["arguments"]["options"]["adapter_rank"] == 0.25
    assert record["inputs"]["mask"] == weights.recipe["mask_checksum"] == MaskSet.load(mask).checksum
    assert record["outputs"] == {"compressed.safetensors": weights.checksum}
    (size,) = record["metrics"]
    assert (size["name"], size["value"]) == ("bits_per_weight", pytest.approx(weights.bits_per_weight))

    text = ("--text", f"mine={text_file}", "--length", 16)
    values = {}
    for name, options in {
        "pruned": ("--mask", mask),
        "compressed": ("--compressed", out / "compressed.safetensors"),
        "inputs": ("--compressed", out / "compressed.safetensors", "--inputs", "int8"),
    }.items():
        state = ("--state", tmp_path / "state")  # one for all: finished parts of one are none of another
        done = patch_llm(
            "evaluate", "--model", model_directory, *options, *text, *state, "--output", tmp_path / name
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        record = json.loads((tmp_path / name / "record.json").read_text())
        (metric,) = record["metrics"]
        values[name] = metric["value"]
    assert record["inputs"]["compressed"] == weights.checksum
    assert record["arguments"]["inputs"] == "int8"
    assert len(set(values.values())) == 3

    model = load_model(str(model_directory))
    weights.apply_(prunable_linears(model))
    tokens = make_tokens(load_tokenizer(str(model_directory)), str(text_file), sampling="joined", length=16)
    assert perplexity(model, "mine", tokens).metrics[0].value == pytest.approx(values["compressed"], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compress", "--set", "rank=1"), "compression, setting 'rank': Extra inputs are not permitted"),
        (("compress", "--mask", "nowhere.safetensors"), "nowhere.safetensors: no such file; run the stage"),
        (("evaluate", "--text", "t=c4", "--inputs", "int3"), "inputs 'int3': choose none, int8 or float8"),
        (("evaluate", "--text", "t=c4", "--mask", "a", "--compressed", "b"), "--mask and --compressed: give one"),
        (("evaluate", "--text", "t=c4", "--compressed", "nowhere"), "nowhere: no such file; run the stage"),
    ],
)
def test_mistakes_in_compression_end_in_one_line(
    arguments: tuple[str, ...], message: str, model_directory: Path, tmp_path: Path
) -> None:
    done = patch_llm(*arguments, "--model", model_directory, "--output", tmp_path / "out")
    assert message in error_line(done)
    assert not (tmp_path / "out" / "record.json").exists()


def masks_size(masks: MaskSet) -> int:
    return sum(mask.size for mask in masks.linears.values())


def test_sparsegpt_options_reach_the_method(model_directory: Path, text_file: Path, tmp_path: Path) -> None:
    options = ("--set", "damping=0.1", "--set", "block_size=32")
    calibration = ("--calibration", text_file, "--sampling", "packed", "--samples", 4, "--length", 16)
    done = patch_llm(
        "prune", "--model", model_directory, "--method", "sparsegpt", "--pattern", "unstructured", "--sparsity", 30,
        *options, *calibration, "--output", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["arguments"]["options"] == {
        "layers": "all", "calibration_inputs": "pruned", "damping": 0.1, "block_size": 32
    }  # fmt: skip
    assert MaskSet.load(tmp_path / "out" / "mask.safetensors").sparsity == pytest.approx(0.3, abs=0.002)


def test_several_masks_in_one_pass_have_a_folder_and_a_record_each(
    model_directory: Path, text_file: Path, tmp_path: Path
) -> None:
    """A pattern that fits no layer fails alone, and the command tells of it at the end."""
    out = tmp_path / "out"
    calibration = ("--calibration", text_file, "--sampling", "packed", "--samples", 4, "--length", 16)
    done = patch_llm(
        "prune", "--model", model_directory, "--method", "wanda", "--method", "thanos", "--pattern", "2:4",
        "--pattern", "unstructured", "--pattern", "3:5", "--sparsity", 45, "--sparsity", 30,
        "--set", "calibration_inputs=dense", "--set", "thanos.block_size=32", *calibration, "--output", out,
    )  # fmt: skip
    assert "2 of 8 masks were not made: wanda/40-3of5: layer" in error_line(done)
    made = {str(path.parent.relative_to(out)) for path in out.rglob("record.json")}
    assert made == {
        f"{method}/{level}"
        for method in ("wanda", "thanos")
        for level in ("50-2of4", "45-unstructured", "30-unstructured")
    }
    assert not list(out.rglob(".lock"))
    for path in made:
        record, masks = (
            json.loads((out / path / "record.json").read_text()),
            MaskSet.load(out / path / "mask.safetensors"),
        )
        assert path == f"{record['arguments']['method']}/{record['arguments']['sparsity']:g}-{path.split('-')[1]}"
        assert masks.sparsity == pytest.approx(record["arguments"]["sparsity"] / 100, abs=0.02)
        assert record["arguments"]["options"].get("block_size") == (32 if path.startswith("thanos") else None)
        assert record["cost"]["masks"] == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "wanda", "--method", "magnitude", "--key", "k"], "--key k: is that of one mask; 2 are asked for"),
        (["--method", "wanda", "--set", "thanos.damping=1"], "--set thanos.damping: the methods asked for are wanda"),
        (["--method", "wnda"], "method 'wnda': unknown; choose one of"),
        (["--method", "proxsparse"], "method ProxSparse: does not prune in one shot; use `patch-llm learn`"),
        (["--method", "sparsegpt", "--set", "dampin=1"], "option 'dampin'"),
        (["--method", "magnitude", "--pattern", "2-4"], "pattern '2-4': not one of"),
        (["--method", "magnitude", "--pattern", "3:5"], "64 inputs do not split into 5s"),
        (["--method", "magnitude", "--dtype", "float8"], "dtype 'float8': choose one of"),
        (["--method", "magnitude", "--pattern", "unstructured", "--sparsity", "120"], "--sparsity 120"),
        (["--calibration", "nowhere.txt", "--sampling", "paked"], "sampling 'paked': choose one of windows"),
        (["--calibration", "nowhere.txt"], "text nowhere.txt: no such file"),
        (["--calibration", "c4"], "data set allenai/c4: not in the local cache"),
    ],
)
def test_bad_arguments_end_in_one_line_and_leave_no_result(
    arguments: list[str], message: str, model_directory: Path, tmp_path: Path
) -> None:
    done = patch_llm("prune", "--model", model_directory, "--output", tmp_path / "out", *arguments)
    assert message in error_line(done)
    assert not list(tmp_path.glob("out/*"))


def test_unknown_hub_model_without_network_says_how_to_go_on(tmp_path: Path) -> None:
    line = error_line(patch_llm("prune", "--model", "someone/some-model", "--output", tmp_path / "out"))
    assert "model someone/some-model: not in the local cache and the hub cannot be reached" in line


def test_damaged_weights_name_the_layer(model_directory: Path, tmp_path: Path) -> None:
    weights = load_file(model_directory / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(weights, model_directory / "model.safetensors", {"format": "pt"})
    done = patch_llm("prune", "--model", model_directory, "--method", "magnitude", "--output", tmp_path / "out")
    assert "layer model.layers.1.mlp.up_proj: its weights hold NaN or Inf" in error_line(done)
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_mask_of_another_model_is_refused(model_directory: Path, tmp_path: Path, text_file: Path) -> None:
    out = tmp_path / "out"
    assert patch_llm("prune", "--model", model_directory, "--method", "magnitude", "--output", out).returncode == 0
    weights = load_file(model_directory / "model.safetensors")
    save_file(
        {name: tensor * 1.5 for name, tensor in weights.items()},
        model_directory / "model.safetensors",
        {"format": "pt"},
    )
    done = patch_llm(
        "evaluate", "--model", model_directory, "--mask", out / "mask.safetensors", "--text", f"t={text_file}",
        "--length", 16, "--output", tmp_path / "eval",
    )  # fmt: skip
    assert "the mask belongs to another model" in error_line(done)


def test_truncated_mask_is_refused(model_directory: Path, tmp_path: Path, text_file: Path) -> None:
    out = tmp_path / "out"
    assert patch_llm("prune", "--model", model_directory, "--method", "magnitude", "--output", out).returncode == 0
    mask = out / "mask.safetensors"
    mask.write_bytes(mask.read_bytes()[:-100])
    done = patch_llm(
        "evaluate", "--model", model_directory, "--mask", mask, "--text", f"t={text_file}", "--output", tmp_path / "e"
    )
    assert "truncated or not a safetensors file" in error_line(done)


def test_full_disk_leaves_nothing_half_written(model_directory: Path, tmp_path: Path) -> None:
    """A file size limit stands for the full disk: the write fails part-way, as it would there."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); sys.argv[0] = 'patch-llm'; "
        "from patch.cli import main; main()"
    )
    arguments = ["prune", "--model", str(model_directory), "--method", "magnitude", "--output", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert "no space left to write it; nothing was changed" in error_line(done)
    assert not list((tmp_path / "out").iterdir())


def test_second_run_in_the_same_directory_is_refused(model_directory: Path, tmp_path: Path) -> None:
    from patch.artefacts import exclusive

    with exclusive(tmp_path / "out"):
        done = patch_llm("prune", "--model", model_directory, "--method", "magnitude", "--output", tmp_path / "out")
    assert "another run is writing here" in error_line(done)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_asking_for_a_missing_gpu_is_one_line(model_directory: Path, tmp_path: Path) -> None:
    done = patch_llm(
        "prune", "--model", model_directory, "--method", "magnitude", "--device", "cuda", "--output", tmp_path / "out"
    )
    assert "--device cuda: PyTorch sees no GPU here" in error_line(done)


def test_inspect_tells_what_a_mask_prunes_and_draws_it(model_directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    patch_llm("prune", "--model", model_directory, "--method", "magnitude", "--pattern", "2:4", "--output", out)
    done = patch_llm(
        "inspect", out / "mask.safetensors", "--csv", tmp_path / "layers.csv", "--picture", tmp_path / "t.png"
    )
    assert done.returncode == 0, done.stderr
    assert "2:4 in 14 layers" in done.stdout
    assert "50.000 % (target 50 %)" in done.stdout
    assert "all    50.0" in done.stdout
    assert len((tmp_path / "layers.csv").read_text().splitlines()) == 15
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "t.pdf").read_bytes().startswith(b"%PDF")
    (out / "mask.safetensors").write_bytes((out / "mask.safetensors").read_bytes()[:-40])
    assert "mask.safetensors: truncated" in error_line(patch_llm("inspect", out / "mask.safetensors"))


def test_learning_reads_text_for_half_its_steps_in_two_epochs(
    model_directory: Path, text_file: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(str(model_directory))
    held = len(make_tokens(tokenizer, str(text_file), sampling="packed", length=64).ids)
    steps = held // 4 + 2
    assert held // 2 < 2 * steps <= held < 4 * steps
    learn = ("learn", "--model", model_directory, "--method", "maskllm", "--pattern", "2:4", "--training", text_file)
    settings = {"steps": steps, "batch_size": 4, "micro_batch_size": 4, "pattern_prior_strength": 0}
    options = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    done = patch_llm(
        *learn, "--length", 64, "--epochs", 2, "--device", "cpu", "--threads", 1, *options, "--output", tmp_path / "out"
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["protocol"]["training"]["samples"] == 2 * steps


def test_export_writes_a_checkpoint_with_the_records_numbers(
    model_directory: Path, text_file: Path, tmp_path: Path
) -> None:
    mask, model = tmp_path / "out" / "mask.safetensors", ("--model", model_directory)
    patch_llm("prune", *model, "--method", "magnitude", "--pattern", "2:4", "--output", mask.parent)
    text = ("--text", f"mine={text_file}", "--length", 16)
    patch_llm("evaluate", *model, "--mask", mask, *text, "--output", tmp_path / "evaluate")
    record = tmp_path / "evaluate" / "record.json"
    done = patch_llm("export", *model, "--mask", mask, "--output", tmp_path / "exported", "--record", record)
    assert done.returncode == 0, done.stderr
    value = json.loads(record.read_text())["metrics"][0]["value"]
    assert f"| mine, perplexity | {value:.2f} ±" in (tmp_path / "exported" / "README.md").read_text()
    again = patch_llm("evaluate", "--model", tmp_path / "exported", *text, "--output", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "again" / "record.json").read_text())["metrics"][0]["value"] == value


def test_plan_of_one_table_counts_its_cells_only(tmp_path: Path) -> None:
    part = ("plan", "--config", ROOT / "workflow" / "config" / "paper.yaml", "--results", tmp_path, "--target")
    done = patch_llm(*part, "density_target")
    assert done.returncode == 0, done.stderr
    assert "paper: 7 cells" in done.stdout  # dense; one target and per block, at three sparsities
    assert "6 learn" in done.stdout
    unknown = patch_llm(*part, "tile_sizes")
    assert unknown.returncode == 1
    assert "target 'tile_sizes': unknown; choose of accuracy, " in unknown.stderr


def test_plan_tells_costs_and_reasons_and_writes_what_fits_a_budget(tmp_path: Path) -> None:
    config = ROOT / "workflow" / "config" / "paper.yaml"
    part = ("--config", config, "--results", tmp_path, "--override", '{"only": {"models": ["llama-2-7b"]}}')
    layer = tmp_path / "layer.yaml"
    done = patch_llm("plan", *part, "--budget", 20, "--layer", layer)
    assert done.returncode == 0, done.stderr
    assert "GPU-hours" in done.stdout
    assert "new" in done.stdout
    assert "Hours are those of one NVIDIA H200" in done.stdout
    assert f"snakemake --cores all --resources gpu=1 --configfile {config} {layer} --config 'only=" in done.stdout
    on_cpu = patch_llm("plan", *part, "--device", "cpu", "--budget", 2000, "--layer", layer.with_name("cpu.yaml"))
    assert f"snakemake --cores all --configfile {config}" in on_cpu.stdout
    again = patch_llm("plan", "--config", config, "--config", layer, *part[2:])
    (kept,) = [line for line in done.stdout.splitlines() if "cells fit 20 GPU-hours" in line]
    assert f"paper: {kept.split()[0]} cells" in again.stdout
    for arguments, message in (
        (("--layer", layer), "needs --budget"),
        (("--budget", 0.0001), "no cell is that cheap"),
        (("--device", "tpu"), "--device tpu: choose one of"),
    ):
        assert message in error_line(patch_llm("plan", *part, *arguments))


def test_plan_and_status_name_benchmarks(tmp_path: Path) -> None:
    config = ROOT / "workflow" / "config" / "paper.yaml"
    part = ("--config", config, "--results", tmp_path)
    layer = tmp_path / "layer.yaml"
    shown = patch_llm("plan", *part, "--target", "layer_speed")
    assert "paper: 0 cells" in shown.stdout
    assert "8 benchmark layers" in shown.stdout
    assert "benchmark generation" not in shown.stdout
    refused = patch_llm("plan", *part, "--target", "layer_speed", "--budget", 9, "--layer", layer)
    assert "--budget 9: layer_speed shows benchmarks only" in error_line(refused)
    budget = patch_llm("plan", *part, "--budget", 0.5)
    assert "1 GPU-hours come first: random tiles and generated text" in budget.stdout
    assert "--budget 0.5: no cell is that cheap beside 1 GPU-hours that belong to none." in error_line(budget)
    skipped = "skipped: benchmarks of layers, generation, memory (no GPU"
    assert skipped in patch_llm("plan", *part, "--device", "cpu").stdout
    on_gpu = patch_llm("status", *part, "--all", "--override", '{"device": "cuda"}').stdout
    assert "paper: 318 waiting" in on_gpu
    assert "benchmarks/memory/random/llama-3.1-8b" in on_gpu
    on_cpu = patch_llm("status", *part, "--override", '{"device": "cpu"}').stdout
    assert "paper: 294 waiting" in on_cpu
    assert skipped in on_cpu
