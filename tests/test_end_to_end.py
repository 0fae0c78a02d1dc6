"""The whole flow through Snakemake on a tiny model: interrupted, resumed, reported, and rerun only where needed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from patch.collect import read_curves, read_runs

ROOT = Path(__file__).parents[1]
SHORT = {"steps": 4, "batch_size": 2, "checkpoint_every": 2}


@pytest.fixture
def project(model_directory: Path, documents: list[str], tmp_path: Path) -> Path:
    """A working directory with a config for a tiny model and a text file."""
    (tmp_path / "text.txt").write_text("\n\n".join(documents))
    config = {
        "name": "tiny",
        "models": {"tiny": {"source": str(model_directory), "dtype": "float32"}},
        "grid": [
            {"methods": ["dense", "magnitude", "wanda", "maskllm"]},
            {"methods": ["patch_joint"], "patterns": ["tiles:16x16"], "sparsities": [35]},
            {"methods": ["patch_tile"], "patterns": ["tiles:16xK"], "sparsities": [35]},
        ],
        "methods": {
            "maskllm": {**SHORT, "prior": "magnitude"},
            "patch_joint": {**SHORT, "selection": "topk", "prior": "magnitude", "reference": "magnitude"},
            "patch_tile": {**SHORT, "selection": "topk", "reference": "magnitude"},
        },
        "training": {"source": str(tmp_path / "text.txt"), "samples": 8, "length": 16},
        "calibration": {"source": str(tmp_path / "text.txt"), "sampling": "packed", "samples": 4, "length": 16},
        "evaluation": {
            "perplexity": {"own": {"source": str(tmp_path / "text.txt"), "length": 16, "windows": 6}},
            "tasks": None,
        },
        "device": "cpu",
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def command(project: Path, *arguments: str) -> list[str]:
    flags = ["--snakefile", str(ROOT / "Snakefile"), "--directory", str(project), "--rerun-incomplete"]
    return [sys.executable, "-m", "snakemake", *arguments, *flags, "--configfile", str(project / "tiny.yaml")]


ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}


def run(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(project, *arguments), env=ENVIRONMENT, capture_output=True, text=True, timeout=1800, cwd=project
    )


def planned(project: Path, target: str = "all") -> set[str]:
    """Rules that a dry-run would run now."""
    output = run(project, target, "--dry-run", "--quiet", "reason").stdout
    return {line.split()[1].rstrip(":") for line in output.splitlines() if line.startswith(("rule ", "localrule "))}


def test_interrupted_grid_resumes_and_reruns_only_what_changed(project: Path) -> None:
    # Ctrl-C: the signal goes to the whole foreground process group.
    grid = subprocess.Popen(
        command(project, "all", "--cores", "1"), env=ENVIRONMENT, cwd=project, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 1200
    while not has_pruned(project) and time.monotonic() < deadline:
        time.sleep(0.2)
    finished = {path: path.stat().st_mtime_ns for path in project.glob("results/tiny/tiny/*/*/prune/record.json")}
    assert len(finished) == 1

    second = run(project, "all", "--cores", "1")
    assert second.returncode != 0
    assert "cannot be locked" in second.stderr

    os.killpg(grid.pid, signal.SIGINT)
    grid.communicate(timeout=900)
    assert grid.returncode != 0
    assert not (project / "results/tiny/runs.parquet").exists()

    resumed = run(project, "all", "--cores", "2")
    assert resumed.returncode == 0, resumed.stderr
    assert {path: path.stat().st_mtime_ns for path in finished} == finished  # not computed again

    check_results(project)
    assert planned(project) == set()

    report = run(project, "--report", str(project / "report.html"))
    assert report.returncode == 0, report.stderr
    assert "Perplexity and mean accuracy" in (project / "report.html").read_text()

    config = yaml.safe_load((project / "tiny.yaml").read_text())
    change(project, {**config, "description": "other words", "threads": 2})
    assert planned(project) == set()
    after = {"evaluate", "collect", "tables", "figures", "mlflow", "all"}
    change(project, {**config, "methods": {**config["methods"], "wanda": {"shift_zero_metrics": True}}})
    assert planned(project) == {"prune", *after}
    change(project, {**config, "methods": {**config["methods"], "patch_joint": {**SHORT, "density_weight": 5}}})
    assert planned(project) == {"prune", "learn", *after}  # its priors are SparseGPT's now
    change(project, {**config, "training": {**config["training"], "samples": 9}})
    assert planned(project) == {"prepare_training", "learn", *after}
    change(project, {**config, "evaluation": {**config["evaluation"], "perplexity": {
        "own": {**config["evaluation"]["perplexity"]["own"], "windows": 5}}}})  # fmt: skip
    assert planned(project) == {"prepare_text", *after}


def has_pruned(project: Path) -> bool:
    """Whether Snakemake has seen a pruning job end; its record is there a little earlier."""
    logs = "".join(path.read_text() for path in project.glob(".snakemake/log/*.log"))
    return any(line.startswith("Finished") and "(Rule: prune)" in line for line in logs.splitlines())


def change(project: Path, config: dict) -> None:
    (project / "tiny.yaml").write_text(yaml.safe_dump(config))


def check_results(project: Path) -> None:
    results = project / "results/tiny"
    runs = read_runs(results / "runs.parquet")
    one_shot = {"tiny/dense", "tiny/magnitude/50-2of4", "tiny/wanda/50-2of4"}
    learned = {"tiny/maskllm/50-2of4", "tiny/patch_joint/35-tiles16x16", "tiny/patch_tile/35-tiles16xK"}
    assert set(runs["cell"]) == one_shot | learned
    assert set(runs["status"]) == {"done"}
    perplexities = runs[runs["metric"] == "perplexity"]
    assert len(perplexities) == 6
    assert (perplexities["samples"] == 6).all()
    pruned = runs[(runs["subject"] == "model") & (runs["metric"] == "sparsity")]
    assert list(pruned["value"]) == pytest.approx([0.5, 0.5, 0.5, 0.35, 0.35], abs=0.01)
    assert (pruned["value"] == pruned["realised_sparsity"] / 100).all()
    # what PATCH starts from is pruned once, and neither measured nor in the tables
    assert [path.name for path in (results / "tiny/magnitude/35-unstructured").iterdir()] == ["prune"]
    curves = read_curves(results / "runs.parquet")
    assert curves.groupby("cell")["step"].apply(list).to_dict() == {cell: [1, 2, 3, 4] for cell in learned}
    assert curves[["loss", "cross_entropy", "density", "gradient_norm", "wall_s"]].notna().all(axis=None)
    assert pd.read_csv(results / "runs.csv").shape == runs.shape
    record = json.loads((results / "tiny/wanda/50-2of4/evaluate/record.json").read_text())
    assert record["protocol"]["own"]["length"] == 16
    assert record["provenance"]["versions"]["torch"]
    assert (results / "tables/accuracy.tex").read_text().startswith("\\begin{tabular}")
    for name in ("perplexity_vs_sparsity", "training_curves"):
        assert (results / f"figures/{name}.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((results / "mlflow.json").read_text())["new"] >= 6


def test_compressed_cells_are_made_from_one_mask_and_measured(project: Path) -> None:
    config = yaml.safe_load((project / "tiny.yaml").read_text())
    config["grid"] = [
        {"methods": ["dense"]},
        {"methods": ["dense", "magnitude"], "compressions": ["int4", "int4-lora"]},
    ]
    config["compressions"] = {"int4": {"group_size": 32}, "int4-lora": {"group_size": 32, "adapter_rank": 0.25}}
    change(project, config)
    done = run(project, "results/tiny/runs.parquet", "--cores", "2")
    assert done.returncode == 0, done.stderr
    runs = read_runs(project / "results/tiny/runs.parquet")
    assert set(runs["status"]) == {"done"}
    perplexities = runs[runs["metric"] == "perplexity"]
    names = [("dense", "none"), *[(m, c) for m in ("dense", "magnitude") for c in ("int4", "int4-lora")]]
    assert list(zip(perplexities["method"], perplexities["compression"], strict=True)) == names
    assert perplexities["value"].nunique() == 5
    bits = dict(zip(*runs.loc[runs["metric"] == "bits_per_weight", ["cell", "value"]].to_numpy().T, strict=True))
    assert len(bits) == 4
    assert bits["tiny/magnitude/50-2of4/int4"] < bits["tiny/dense/int4"] < bits["tiny/dense/int4-lora"]
    assert len(list(project.glob("results/tiny/tiny/magnitude/**/mask.safetensors"))) == 1
    assert not planned(project, "results/tiny/runs.parquet")
    config["compressions"]["int4-lora"]["adapter_rank"] = 0.5
    change(project, config)
    assert planned(project, "results/tiny/runs.parquet") == {"compress", "evaluate", "collect"}
