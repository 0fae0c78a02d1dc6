"""Two processes on one machine, over gloo: what torchrun starts on several GPUs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from patch.sparsity.maskset import MaskSet

OPTIONS = {"steps": 5, "batch_size": 8, "micro_batch_size": 2, "learning_rate": 0.02, "selection": "topk"}
PRIORS = {"pattern_prior_strength": 0, "tile_prior_strength": 0}


def run(model: Path, text: Path, output: Path, processes: int, *extra: str) -> dict:
    settings = [item for name, value in (OPTIONS | PRIORS).items() for item in ("--set", f"{name}={value}")]
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    subprocess.run(
        [
            *(sys.executable, *start, "-m", "patch", "learn", "--model", str(model), "--method", "patch_joint"),
            *("--pattern", "tiles:16x16", "--sparsity", "35", "--training", str(text), "--length", "16", "--epochs"),
            *("9", "--device", "cpu", "--threads", "1", "--output", str(output), *settings, *extra),
        ],
        check=True,
        capture_output=True,
        timeout=180,
    )
    return json.loads((output / "record.json").read_text())


@pytest.mark.parametrize("extra", [(), ("--shard",)], ids=["replicated", "sharded"])
def test_two_processes_learn_what_one_learns(model_directory: Path, tmp_path: Path, extra: tuple[str, ...]) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"the tile mask {i} of a river " * 8}) for i in range(40)))
    one = run(model_directory, text, tmp_path / "one", 1)
    two = run(model_directory, text, tmp_path / "two", 2, *extra)
    assert two["arguments"]["processes"] == 2
    losses = [
        next(metric["value"] for metric in record["metrics"] if metric["name"] == "train_cross_entropy")
        for record in (one, two)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    masks = [MaskSet.load(tmp_path / name / "mask.safetensors") for name in ("one", "two")]
    keep = [[mask.keep_mask() for mask in each.linears.values()] for each in masks]
    same = sum(int((a == b).sum()) for a, b in zip(*keep, strict=True)) / sum(mask.numel() for mask in keep[0])
    assert same > 0.999  # sums of gradients round differently
