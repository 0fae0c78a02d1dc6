"""The project's own workflow on a real cluster: the same results as on one machine, interrupted or not."""

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from grids import ROOT, Grid, finish, slurm, wait_until

from patch.artefacts import read_tensors
from patch.cluster.check import check
from patch.cluster.ledger import Ledger
from patch.cluster.queue import Queue
from patch.cluster.site import Site
from patch.cluster.status import LEDGER, StageStatus, grid_status
from patch.collect import read_runs
from patch.experiments import load_experiment

pytestmark = pytest.mark.slurm
LEARN = "results/tiny/tiny/maskllm/50-2of4/learn"
QUICK = ("--seconds-between-status-checks", "1", "--latency-wait", "5")
STEPS = 300
SITE = """
account: lab
setup: |
  called() { echo "$1" >> setup; }
  called "$SLURM_JOB_ID"
"""


@pytest.fixture
def project(model_directory: Path, documents: list[str], tmp_path: Path) -> Path:
    """A folder with a config: a tiny model, pruned, and with a learned mask that starts from there."""
    text = str(tmp_path / "text.txt")
    Path(text).write_text("\n\n".join(documents))
    config = {
        "name": "tiny",
        "models": {"tiny": {"source": str(model_directory), "dtype": "float32"}},
        "grid": [{"methods": ["magnitude", "maskllm"]}],
        "methods": {"maskllm": {"steps": STEPS, "batch_size": 2, "checkpoint_every": 20, "prior": "magnitude"}},
        "training": {"source": text, "samples": 8, "length": 16, "epochs": STEPS},
        "evaluation": {"perplexity": {"own": {"source": text, "length": 16, "windows": 6}}, "tasks": None},
        "device": "cpu",
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def start(project: Path, *arguments: str, path: str = "") -> subprocess.Popen:
    """Snakemake in the project's folder, called in ours, where `--profile slurm` is found."""
    python_path = os.pathsep.join(filter(None, (path, str(ROOT), os.environ.get("PYTHONPATH", ""))))
    (project / "site.yaml").write_text(SITE)
    environment = {
        **os.environ,
        "PATCH_SITE": str(project / "site.yaml"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": python_path,
    }
    command = [sys.executable, "-m", "snakemake", "--directory", str(project)]
    return subprocess.Popen(
        [*command, "--configfile", str(project / "tiny.yaml"), *arguments],
        cwd=ROOT, env=environment, text=True, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def results(project: Path) -> tuple[pd.DataFrame, dict]:
    """What the grid measured, without costs, and the learned mask."""
    runs = read_runs(project / "results/tiny/runs.parquet")
    measured = runs[runs["metric"].isin(["perplexity", "sparsity", "train_cross_entropy"])]
    mask = read_tensors(project / LEARN / "mask.safetensors", "patch.maskset/1")[0]
    columns = ["cell", "stage", "subject", "metric", "value"]
    return measured[columns].sort_values(columns[:-1]).reset_index(drop=True), {k: v.tolist() for k, v in mask.items()}


def test_the_same_grid_through_every_executor_gives_the_same_results(project: Path, grid: Grid) -> None:
    status, output = finish(start(project, "--cores", "2"), 600)
    assert status == 0, output
    expected, mask = results(project)
    shutil.move(project / "results", project / "of-one-machine")

    run = start(project, "--profile", "slurm", *QUICK)
    wait_until(lambda: list(project.glob("results/state/learn/*/step-*")), 200, run)
    shown = status_of(project)
    assert [stage.stage for stage in shown if stage.word == "running"][-1] == "learn"
    job = shown[-2].job
    slurm("scancel", "--signal=USR2", job)  # as Slurm does before a time limit or a preemption
    status, output = finish(run, 600)
    assert status == 0, output
    assert "going on after step" in (project / "logs/tiny/tiny/maskllm/50-2of4/learn.log").read_text()
    measured, learned = results(project)
    pd.testing.assert_frame_equal(measured, expected, check_exact=True)
    assert learned == mask
    assert len((project / "setup").read_text().split()) == 8  # in every job but those of this machine; learning twice
    assert len({task.job for task in Ledger(project / LEDGER).tasks.values() if task.rule == "learn"}) == 1

    native = os.environ.get("NATIVE_SLURM_PLUGIN", "")
    if not native and importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
        pytest.skip("the stock slurm plugin is not installed; NATIVE_SLURM_PLUGIN may name a folder that holds it")
    shutil.rmtree(project / "results")
    run = start(
        project, "--profile", "slurm/native", *QUICK, "--slurm-init-seconds-before-status-checks", "1", path=native
    )
    status, output = finish(run, 600)
    assert status == 0, output
    pd.testing.assert_frame_equal(results(project)[0], expected, check_exact=True)
    assert results(project)[1] == mask


def status_of(project: Path) -> list[StageStatus]:
    """In the order of the grid, so that the last two are learning and its evaluation."""
    with contextlib.chdir(project):  # outputs are named from there
        return grid_status(load_experiment(["tiny.yaml"]), slurm=Queue())


def test_learning_on_two_nodes_starts_one_torchrun_on_each(project: Path, grid: Grid) -> None:
    target = f"{LEARN}/mask.safetensors"
    run = start(project, "--profile", "slurm", *QUICK, "--set-resources", "learn:nodes=2", "--", target)
    status, output = finish(run, 600)
    assert status == 0, output + (project / "logs/tiny/tiny/maskllm/50-2of4/learn.log").read_text()
    record = json.loads((project / LEARN / "record.json").read_text())
    assert record["arguments"]["processes"] == 2


def test_check_reports_every_partition_and_kind_of_gpu(tmp_path: Path, grid: Grid) -> None:
    found = {(finding.place.partition, finding.place.gpu): finding for finding in check(Site(), tmp_path)}
    assert set(found) == {(partition, gpu) for partition in ("main", "urgent") for gpu in (None, "fake")}
    for finding in found.values():
        assert not finding.problem
        assert finding.found["shared"]
        assert finding.found["torch"]
        assert finding.seconds is not None
    assert found["main", "fake"].found["visible"] in ("0", "1")
