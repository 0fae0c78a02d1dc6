"""The workflow as Snakemake sees it: every config's DAG, linting, reruns, and refusals."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from patch.benchmark_jobs import benchmark_jobs
from patch.experiments import Benchmarks, load_experiment
from patch.planning.reasons import benchmark_reason

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path for path in (ROOT / "workflow" / "config").glob("*.yaml"))


def snakemake(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("SNAKEMAKE_PROFILE", None)
    return subprocess.run(
        [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_dag_of_every_config_resolves_without_network_gpu_or_token(config: Path, tmp_path: Path) -> None:
    done = snakemake("--dry-run", "--configfile", str(config), "--directory", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "Job stats" in done.stdout + done.stderr


def test_paper_grid_shows_all_models_methods_exclusions_and_reasons(tmp_path: Path) -> None:
    config = ROOT / "workflow" / "config" / "paper.yaml"
    done = snakemake("--dry-run", "--configfile", str(config), "--directory", str(tmp_path))
    output = done.stdout + done.stderr
    models = ("qwen2.5-0.5b", "llama-3.2-1b", "gemma-3-1b", "llama-2-7b", "llama-3.1-8b", "llama-2-13b")
    for cell in (f"{model}/wanda/50-2of4" for model in models):
        assert f"results/paper/{cell}/prune/mask.safetensors" in output
    for level in ("45", "35", "25"):
        assert f"patch_joint/{level}-tiles128x128" in output
    assert "excluded: llama-2-13b/maskllm/50-2of4 (the paper prints N/A" in output
    assert "reason: Missing output files" in output


def test_learned_cells_come_after_the_masks_that_they_start_from(tmp_path: Path) -> None:
    config = ROOT / "workflow" / "config" / "paper.yaml"
    part = "only={models: [llama-2-13b], methods: [patch_tile], sparsities: [25]}"
    done = snakemake("--dry-run", "-p", "--configfile", str(config), "--directory", str(tmp_path), "--config", part)
    output = done.stdout + done.stderr
    learned = {command.split(" --output ")[1].split()[0]: command for command in commands(output, "learn")}
    cells = "results/paper/llama-2-13b"
    maskllm, tile = f"{cells}/maskllm/50-2of4/learn", f"{cells}/patch_tile/25-tiles128x128/learn"
    assert set(learned) == {maskllm, tile}
    assert f"--pattern-mask {cells}/sparsegpt/50-2of4/prune/mask.safetensors" in learned[maskllm]
    assert "--reference-mask" not in learned[maskllm]
    assert f"--pattern-mask {maskllm}/mask.safetensors" in learned[tile]
    assert f"--reference-mask {cells}/sparsegpt/25-unstructured/prune/mask.safetensors" in learned[tile]
    assert f"--training {cells}/tokens/training.safetensors --epochs 1" in learned[tile]
    assert "--set learning_rate=0.001 " in learned[tile]  # of this model only
    assert len(commands(output, "prune")) == 2
    assert len(commands(output, "evaluate")) == 1  # what others start from is not measured
    assert "only for their masks: llama-2-13b/sparsegpt/50-2of4, llama-2-13b/maskllm/50-2of4" in output
    training = next(command for command in commands(output, "prepare tokens") if "training.safetensors" in command)
    assert "--source slimpajama --sampling packed --length 4096 --samples 512000 --output" in training


def test_weights_are_trained_on_the_text_and_from_the_mask_of_their_method(tmp_path: Path) -> None:
    config = ROOT / "workflow" / "config" / "smollm2.yaml"
    part = "only={methods: [proxsparse, fine_tune]}"
    done = snakemake("--dry-run", "-p", "--configfile", str(config), "--directory", str(tmp_path), "--config", part)
    learned = {command.split("--method ")[1].split()[0]: command for command in commands(done.stdout, "learn")}
    model = "results/smollm2/smollm2-135m"
    assert set(learned) == {"proxsparse", "fine_tune"}
    assert f"--training {model}/tokens/documents.safetensors" in learned["proxsparse"]
    assert f"--training {model}/tokens/training.safetensors" in learned["fine_tune"]
    assert f"--start-mask {model}/sparsegpt/50-2of4/prune/mask.safetensors" in learned["fine_tune"]
    texts = [command for command in commands(done.stdout, "prepare tokens") if "documents.safetensors" in command]
    assert len(texts) == 1
    assert "--sampling documents --length 2048 --samples 400 --seed 42" in texts[0]


def commands(output: str, command: str) -> list[str]:
    """The shell commands of a dry-run that call `patch COMMAND`."""
    return [line for line in output.splitlines() if f"python -m patch {command} " in line]


def test_text_that_the_model_writes_wants_the_device(tmp_path: Path) -> None:
    config = tmp_path / "self.yaml"
    config.write_text(
        "{name: self, models: {tiny: {source: ./tiny}}, grid: [{methods: [maskllm]}], device: cuda,"
        " training: {source: self, seed: 7}, evaluation: {perplexity: {training: {source: c4}}, tasks: null}}"
    )
    done = snakemake("--dry-run", "-p", "--configfile", str(config), "--directory", str(tmp_path))
    output = done.stdout + done.stderr
    training = next(command for command in commands(output, "prepare tokens") if "/training.safetensors" in command)
    assert "--source self --length 4096 --samples 512000 --seed 7 --batch-size 256 --device cuda" in training
    job = output.split("rule prepare_training:")[1].split("Shell command")[0]
    assert "gpu=1" in job
    # a text for perplexity that has the same name is another file
    assert len([command for command in commands(output, "prepare tokens") if "text-training" in command]) == 1


def test_jobs_ask_a_cluster_for_what_the_model_needs_and_the_site_offers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site.yaml").write_text(
        "{account: lab, partition: cpu, gpu: {partition: gpu, kind: h100, per_node: 2}}"
    )
    monkeypatch.setenv("PATCH_SITE", str(tmp_path / "site.yaml"))
    config = ROOT / "workflow" / "config" / "paper.yaml"
    part = "only={models: [llama-2-7b], methods: [maskllm]}"
    done = snakemake("--dry-run", "-p", "--configfile", str(config), "--directory", str(tmp_path), "--config", part)
    jobs = {block.split(":")[0]: block for block in (done.stdout + done.stderr).split("\nrule ")[1:]}
    for rule in ("prune", "learn", "evaluate"):
        assert "slurm_account=lab" in jobs[rule]
        assert "slurm_partition=gpu" in jobs[rule]
        assert "gpu_model=h100" in jobs[rule]
    assert "slurm_partition=cpu" in jobs["prepare_model"]
    assert "gpu=1" in jobs["prune"]
    assert "gpu=2" in jobs["learn"]  # four in all: they do not fit one
    assert "nodes=2" in jobs["learn"]
    assert "--nodes 2 --processes 2" in jobs["learn"]


def test_mistake_in_the_site_settings_ends_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site.yaml").write_text("partitoin: cpu")
    monkeypatch.setenv("PATCH_SITE", str(tmp_path / "site.yaml"))
    config = ROOT / "workflow" / "config" / "demo.yaml"
    done = snakemake("--dry-run", "--configfile", str(config), "--directory", str(tmp_path))
    assert done.returncode != 0
    assert "site.yaml: unknown key 'partitoin'; did you mean 'partition'?" in done.stdout + done.stderr


def test_everything_that_needs_a_network_is_one_target(tmp_path: Path) -> None:
    config = ROOT / "workflow" / "config" / "paper.yaml"
    done = snakemake("prepare", "--dry-run", "--configfile", str(config), "--directory", str(tmp_path))
    started = {line.split()[1].rstrip(":") for line in done.stdout.splitlines() if line.startswith("rule ")}
    assert started - {"prepare"} == {
        f"prepare_{what}" for what in ("model", "calibration", "training", "documents", "text", "tasks")
    }


def test_typo_in_the_config_names_key_file_and_nearest_key(tmp_path: Path) -> None:
    layer = tmp_path / "mine.yaml"
    layer.write_text("calibraton: {samples: 3}\n")
    demo = ROOT / "workflow" / "config" / "demo.yaml"
    done = snakemake("--dry-run", "--configfile", str(demo), str(layer), "--directory", str(tmp_path))
    assert done.returncode != 0
    assert f"{layer}: unknown key 'calibraton'; did you mean 'calibration'?" in done.stdout + done.stderr


def test_rules_are_lint_free_and_formatted() -> None:
    done = snakemake("--lint")
    assert done.returncode == 0, done.stdout + done.stderr
    files = [ROOT / "Snakefile", *(ROOT / "workflow" / "rules").glob("*.smk")]
    subprocess.run([sys.executable, "-m", "snakefmt", "--check", *map(str, files)], check=True, capture_output=True)


def test_named_targets_exist(tmp_path: Path) -> None:
    config = str(ROOT / "workflow" / "config" / "demo.yaml")
    done = snakemake("--list-target-rules", "--configfile", config, "--directory", str(tmp_path))
    names = {"all", "demo", "tables", "figures", "mlflow", "table_tile_size", "figure_tile_size", "table_claims"}
    assert names <= set((done.stdout + done.stderr).split())


def test_one_table_runs_its_cells_only(tmp_path: Path) -> None:
    config = ROOT / "workflow" / "config" / "paper.yaml"
    done = snakemake("table_density_target", "-n", "-p", "--configfile", str(config), "--directory", str(tmp_path))
    learned = {command.split(" --output ")[1].split()[0] for command in commands(done.stdout + done.stderr, "learn")}
    cells = "results/paper/qwen2.5-0.5b/patch_joint"
    assert learned == {
        f"{cells}/{sparsity}-tiles128x128/{variant}learn" for sparsity in (45, 35, 25) for variant in ("", "per-block/")
    }
    (made,) = commands(done.stdout + done.stderr, "tables")
    assert "results/paper/targets/density_target/runs.parquet" in made
    assert "--only density_target" in made


def test_committed_results_are_reported_without_running_anything(tmp_path: Path) -> None:
    config = ROOT / "workflow" / "config" / "reference.yaml"
    done = snakemake(
        "tables", "figures", "table_claims", "--dry-run", "--configfile", str(config), "--directory", str(tmp_path)
    )
    started = {line.split()[1].rstrip(":") for line in done.stdout.splitlines() if "rule " in line[:10]}
    assert started == {"tables", "figures", "target_table", "table_claims"}


def test_generated_schema_and_key_list_are_up_to_date() -> None:
    """`make docs` writes them."""
    import json

    from patch.config_docs import options_markdown, schema

    directory = ROOT / "workflow" / "config"
    assert json.loads((directory / "schema.json").read_text()) == schema()
    assert (directory / "options.md").read_text() == options_markdown()


def test_published_masks_are_fetched_with_the_models_and_not_trained(tmp_path: Path) -> None:
    config = ROOT / "workflow" / "config" / "released_masks.yaml"
    part = "only={models: [llama-2-7b], methods: [released], sparsities: [45]}"
    shown = ("--dry-run", "-p", "--configfile", str(config), "--directory", str(tmp_path), "--config", part)
    output = snakemake(*shown).stdout
    cell = "results/released_masks/llama-2-7b/released/45-tiles128x128"
    (fetched,) = commands(output, "prepare released")
    assert (
        f"--source mohammad-mozaffari/llama_2_7b-PATCH-45Sparse --file mask.npz --output {cell}/released.json"
        in fetched
    )
    (taken,) = commands(output, "prune")
    assert "--method released --pattern tiles:128x128 --sparsity 45 " in taken
    assert f"--released {cell}/released.json" in taken
    assert not commands(output, "learn")
    assert commands(snakemake("prepare", *shown).stdout, "prepare released") == [fetched]


def test_compressed_cells_come_after_the_mask_that_they_share(tmp_path: Path) -> None:
    config = ROOT / "workflow" / "config" / "released_masks.yaml"
    part = "only={models: [llama-2-7b], methods: [dense, released], sparsities: [0, 45]}"
    shown = ("--dry-run", "-p", "--configfile", str(config), "--directory", str(tmp_path), "--config", part)
    output = snakemake(*shown).stdout
    mask = "results/released_masks/llama-2-7b/released/45-tiles128x128"
    assert len(commands(output, "prune")) == len(commands(output, "prepare released")) == 1
    made = {command.split(" --output ")[1].split()[0]: command for command in commands(output, "compress")}
    assert set(made) == {f"{mask}/int4/compress", f"{mask}/int4-lora/compress"}
    for name, command in made.items():
        assert f"--mask {mask}/prune/mask.safetensors" in command
        assert "--set 'quantiser=\"group_absmax\"' --set group_size=128" in command
        lora = "lora" in name
        assert ("tokens/calibration-seed-0.safetensors" in command) == lora
        assert f"--set adapter_rank={0.1 if lora else 0.0}" in command
        assert "inputs" not in command
    measured = commands(output, "evaluate")
    assert len(measured) == 4
    for name in made:
        assert sum(f"--compressed={name}/compressed.safetensors" in command for command in measured) == 1
    prepared = snakemake("prepare", *shown).stdout
    assert len(commands(prepared, "prepare released")) == 1
    assert any("calibration-seed-0" in command for command in commands(prepared, "prepare tokens"))


BENCHMARKS = """
name: timed
models: {one: {source: ./one-7b}, two: {source: ./two}}
grid:
  - {methods: [dense, patch_tile], patterns: ["tiles:128x128"], sparsities: [45, 25]}
  - {methods: [wanda], patterns: ["2:4", unstructured], sparsities: [50]}
training: {samples: 512000}
evaluation: {tasks: null}
benchmarks:
  layers: {shapes: [llama-3.1-8b, 128x64], tokens: [1, 16], sparsities: [25, 45.5], kernels: [auto, unpack]}
  generation: {shapes: [llama-2-7b], batches: [1, 16], lengths: ["128+128", "128+1024"]}
  memory: {shapes: [llama-2-7b]}
  pruning: {shapes: [64x64], methods: [wanda], patterns: ["2:4"], samples: 2, length: 8}
  learning: {shapes: [qwen2.5-0.5b], settings: [fast]}
  masks: {models: [one], sparsities: [45, 50]}
"""


def test_benchmarks_time_random_tiles_and_the_masks_of_chosen_cells(tmp_path: Path) -> None:
    config = tmp_path / "timed.yaml"
    config.write_text(BENCHMARKS)
    shown = ("benchmarks", "--dry-run", "-p", "--configfile", str(config), "--directory", str(tmp_path))
    output = snakemake(*shown, "--config", "device=cuda", "--resources", "gpu=3").stdout
    run, one = "results/timed/benchmarks", "results/timed/one"
    timed = [line.split("benchmark --exclusive --key ")[1] for line in commands(output, "benchmark --exclusive")]
    parts = {line.split(" --output ")[1].split()[0]: line.split(" --output ")[0].split(" ", 1) for line in timed}
    made = {name: command for name, (_, command) in parts.items()}
    # what is planned and shown, and what is run, are the same
    experiment = load_experiment([config])
    planned = {
        f"results/timed/{job.folder}/rows.csv": job.key
        for job in benchmark_jobs(experiment, experiment.cells(), on_gpu=True)
    }
    assert {name: key for name, (key, _) in parts.items()} == planned
    tile = f"{one}/patch_tile/45-tiles128x128/learn/mask.safetensors"
    wanda = f"{one}/wanda/50-2of4/prune/mask.safetensors"
    rows = "--tokens 1,16"
    kernels, device = "--kernel auto --kernel unpack --compile", "--device cuda"
    sizes = "--batch 1,16 --length 128+128,128+1024"
    layers = {
        f"{run}/layers/random/{shape}/rows.csv": f"layers --shape {shape} {rows} {kernels} --sparsity 25,45.5 {device}"
        for shape in ("llama-3.1-8b", "128x64")
    } | {
        f"{run}/layers/masks/one/{cell}/rows.csv": f"layers --mask {mask} {rows} {kernels} {device}"
        for cell, mask in (("patch_tile/45-tiles128x128", tile), ("wanda/50-2of4", wanda))
    }
    assert {name: command for name, command in made.items() if "/layers/" in name} == layers
    generated = f"{run}/generation/masks/one/wanda/50-2of4/rows.csv"
    assert made[generated] == (
        f"generation --shape {one}/model.json --mask {wanda} {sizes} --fused both --compile --device cuda"
    )
    assert (
        made[f"{run}/memory/random/llama-2-7b/rows.csv"]
        == "memory --model llama-2-7b --sparsity 25,35,45 --device cuda"
    )
    assert made[f"{run}/pruning/random/64x64/rows.csv"] == (
        "pruning --shape 64x64 --method wanda --pattern 2:4 --samples 2 --length 8 --device cuda"
    )
    assert made[f"{run}/learning/random/qwen2.5-0.5b/rows.csv"] == (
        "learning --shape qwen2.5-0.5b --mode patch_joint --setting fast --tokens 4096"
    )
    assert len(made) == 4 + 3 + 3 + 1 + 1
    joined = {line.split(" --output ")[1].split()[0]: line for line in commands(output, "benchmark join")}
    assert set(joined) == {f"{run}/{name}.csv" for name in ("layers", "generation", "memory", "pruning", "learning")}
    assert all(name in joined[f"{run}/layers.csv"] for name in layers)
    jobs = [block for block in output.split("\nrule ") if block.startswith(("benchmark_random", "benchmark_mask"))]
    assert len(jobs) == len(made)
    assert all("gpu=3" in job for job in jobs)  # all there are: nothing else that computes runs meanwhile
    assert not commands(output, "evaluate")


def test_benchmarks_are_part_of_the_grid_and_left_out_with_a_line_where_there_is_no_gpu(tmp_path: Path) -> None:
    config = tmp_path / "timed.yaml"
    config.write_text(BENCHMARKS)
    shown = ("--dry-run", "-p", "--configfile", str(config), "--directory", str(tmp_path), "--config")
    on_gpu = snakemake(*shown, "device=cuda")
    assert "benchmarks/generation.csv" in on_gpu.stdout
    (tables,) = commands(on_gpu.stdout, "tables")
    assert {"throughput", "weight_memory", "layer_speed"} <= set(tables.split())
    assert "skipped: benchmarks" not in on_gpu.stdout + on_gpu.stderr
    on_cpu = snakemake(*shown, "device=cpu")
    assert not commands(on_cpu.stdout, "benchmark join")
    assert (
        "skipped: benchmarks of layers, generation, memory, pruning, learning (no GPU; `without_gpu: run` under"
        " `benchmarks` runs them on the CPU)" in on_cpu.stdout + on_cpu.stderr
    )
    tried = snakemake(*shown, "device=cpu", "benchmarks={without_gpu: run}")
    assert len(commands(tried.stdout, "benchmark join")) == 5


def test_benchmarks_of_a_tiny_layer_run(tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(
        "{name: tiny, models: {tiny: {source: ./tiny}}, grid: [{methods: [dense]}], device: cpu,"
        " evaluation: {perplexity: {}, tasks: null}, benchmarks: {without_gpu: run,"
        " layers: {shapes: [128x64], tokens: [1, 2], sparsities: [50], compile: false}}}"
    )
    done = snakemake("benchmarks", "--cores", "1", "--configfile", str(config), "--directory", str(tmp_path))
    assert done.returncode == 0, done.stderr
    header, *rows = (tmp_path / "results/tiny/benchmarks/layers.csv").read_text().splitlines()
    assert {"gpu", "torch", "commit", "date", "mask"} <= set(header.split(","))
    assert [row.split(",")[:4] for row in rows] == [["128", "64", tokens, "50.0"] for tokens in ("1", "2")]
    # its record says so to `plan` and `status`
    experiment = load_experiment([config])
    (job,) = benchmark_jobs(experiment, experiment.cells(), on_gpu=False)
    run = tmp_path / "results" / "tiny"
    assert benchmark_reason(job, run) is None
    changed = experiment.model_copy(
        update={"benchmarks": Benchmarks(without_gpu="run", layers=job.section.model_copy(update={"tokens": (1, 4)}))}
    )
    (job,) = benchmark_jobs(changed, changed.cells(), on_gpu=False)
    assert benchmark_reason(job, run) == "settings changed: tokens 1,2 -> 1,4"
