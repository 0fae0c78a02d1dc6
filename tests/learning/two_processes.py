"""What `test_distributed.py` lets torchrun start: `two_processes.py stop|go-on FOLDER MODE...`.

A mode names a folder for states, unless it begins with "whole"; with "sharded" in its name it shards. stop: learn
slowly, in each until a signal comes. go-on: learn to the end; results.json says what came out of each.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from patch.data import TokenSet
from patch.learning import LearnedMasks, Stopped, distributed, learn_masks
from patch.methods import PatchJoint
from patch.sparsity.patterns import Pattern

METHOD = PatchJoint(
    steps=16, batch_size=4, micro_batch_size=1, learning_rate=0.02, selection="topk", checkpoint_every=2,
    pattern_prior_strength=0, tile_prior_strength=0,
)  # fmt: skip


def learn(states: Path | None, sharded: bool, observe: Callable[[dict[str, float]], None]) -> LearnedMasks:
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()
    text = TokenSet(torch.randint(256, (METHOD.steps * METHOD.batch_size, 16), dtype=torch.int32), {})
    pattern = Pattern.parse("tiles:16x16")
    return learn_masks(model, METHOD, pattern, 0.35, text, {}, state=states, sharded=sharded, observe=observe)


def main(action: str, folder: Path, modes: list[str]) -> None:
    torch.set_num_threads(1)
    results = {}
    with distributed.process_group("cpu"):
        for mode in modes:
            steps: list[float] = []

            def observe(row: dict[str, float], steps: list[float] = steps) -> None:
                steps.append(row["step"])
                time.sleep(0.2 if action == "stop" else 0)

            try:
                learned = learn(None if mode.startswith("whole") else folder / mode, "sharded" in mode, observe)
            except Stopped:
                continue
            tensors = [tensor for mask in learned.masks.linears.values() for tensor in (mask.packed, mask.packed_tiles)]
            results[mode] = {
                "masks": [tensor.tolist() for tensor in tensors if tensor is not None],
                "losses": [row["loss"] for row in learned.curves],
                "first": steps[:1],
            }
        if distributed.is_main():
            (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
