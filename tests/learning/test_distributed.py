"""Two processes on one machine, over gloo: what torchrun starts on several GPUs."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from patch.sparsity.maskset import MaskSet

OPTIONS = {"steps": 5, "batch_size": 8, "micro_batch_size": 2, "learning_rate": 0.02, "selection": "topk"}
SCRIPT = Path(__file__).with_name("two_processes.py")
PRIORS = {"pattern_prior_strength": 0, "tile_prior_strength": 0}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(model: Path, text: Path, output: Path, processes: int, *extra: str) -> dict:
    settings = [item for name, value in (OPTIONS | PRIORS).items() for item in ("--set", f"{name}={value}")]
    start = TORCHRUN if processes > 1 else [sys.executable]
    subprocess.run(
        [
            *(*start, "-m", "patch", "learn", "--model", str(model), "--method", "patch_joint"),
            *("--pattern", "tiles:16x16", "--sparsity", "35", "--training", str(text), "--length", "16", "--epochs"),
            *("9", "--device", "cpu", "--threads", "1", "--output", str(output), *settings, *extra),
        ],
        check=True,
        capture_output=True,
        timeout=300,
    )
    return json.loads((output / "record.json").read_text())


def test_two_processes_learn_what_one_learns(model_directory: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"the tile mask {i} of a river " * 8}) for i in range(40)))
    one = run(model_directory, text, tmp_path / "one", 1)
    for name, extra in {"replicated": (), "sharded": ("--shard",)}.items():
        two = run(model_directory, text, tmp_path / name, 2, *extra)
        assert two["arguments"]["processes"] == 2
        losses = [
            next(metric["value"] for metric in record["metrics"] if metric["name"] == "train_cross_entropy")
            for record in (one, two)
        ]
        assert losses[0] == pytest.approx(losses[1], abs=1e-3)
        masks = [MaskSet.load(tmp_path / each / "mask.safetensors") for each in ("one", name)]
        keep = [[mask.keep_mask() for mask in each.linears.values()] for each in masks]
        same = sum(int((a == b).sum()) for a, b in zip(*keep, strict=True)) / sum(mask.numel() for mask in keep[0])
        assert same > 0.999  # sums of gradients round differently


def wait_for(states: Path, count: int, process: subprocess.Popen) -> None:
    while len(list(states.glob("step-*"))) < count:
        assert process.poll() is None
        time.sleep(0.01)


def test_two_processes_that_are_interrupted_go_on_to_the_same_masks(tmp_path: Path) -> None:
    """By SIGTERM to one of them and to torchrun; and where one was killed before it saved its part of a state."""
    stop = [*TORCHRUN, str(SCRIPT), "stop", str(tmp_path), "replicated", "sharded"]
    process = subprocess.Popen(stop, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(tmp_path / "replicated", 2, process)
    psutil.Process(process.pid).children()[-1].send_signal(signal.SIGTERM)
    wait_for(tmp_path / "sharded", 4, process)
    process.send_signal(signal.SIGTERM)
    process.wait(120)
    shutil.copytree(tmp_path / "sharded", tmp_path / "sharded, one late")
    max((tmp_path / "sharded, one late").glob("*.rank-1.*")).unlink()

    modes = ["whole", "replicated", "whole, sharded", "sharded", "sharded, one late"]
    go_on = [*TORCHRUN, str(SCRIPT), "go-on", str(tmp_path), *modes]
    subprocess.run(go_on, check=True, capture_output=True, timeout=300)
    found = json.loads((tmp_path / "results.json").read_text())
    for whole, *others in (modes[:2], modes[2:]):
        for mode in others:
            assert found[mode]["masks"] == found[whole]["masks"]
            assert found[mode]["losses"] == found[whole]["losses"]
    first = {mode: found[mode]["first"][0] for mode in modes}
    assert first["replicated"] > 1
    assert 1 < first["sharded, one late"] < first["sharded"]
