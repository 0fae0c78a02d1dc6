"""Train: a mask on frozen weights, or the weights themselves."""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from patch.artefacts import PatchError, exclusive
from patch.cli.options import (
    Device,
    Dtype,
    Key,
    MethodOptions,
    Model,
    Output,
    Revision,
    Seed,
    Shard,
    Threads,
    TrainedMethod,
    device_name,
    fail,
    sparsity_metrics,
    tokens_from,
    trained_method,
    use_threads,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from patch.data import TokenSet
    from patch.methods import Learned
    from patch.sparsity.patterns import Pattern

log = logging.getLogger("patch")


def learn(
    model: Model,
    output: Output,
    training: Annotated[str, typer.Option(help="Token file of `prepare tokens`, or a text source such as slimpajama.")],
    method: TrainedMethod = "patch_joint",
    pattern: Annotated[
        str,
        typer.Option(help="2:4 for maskllm and proxsparse, tiles:HEIGHTxWIDTH for PATCH, any for fine_tune."),
    ] = "tiles:128x128",
    sparsity: Annotated[float, typer.Option(help="Percent to prune, 0 to 50; 2:4 fixes it.")] = 45.0,
    option: MethodOptions = None,
    pattern_mask: Annotated[
        Path | None, typer.Option(help="2:4 mask of `prune` or `learn`: prior of the patterns, or what is frozen.")
    ] = None,
    reference_mask: Annotated[
        Path | None, typer.Option(help="Unstructured mask of `prune` at the target sparsity: prior of the tiles.")
    ] = None,
    start_mask: Annotated[
        Path | None, typer.Option(help="Mask of `prune` or `learn` that fine_tune keeps, with its weights.")
    ] = None,
    epochs: Annotated[int, typer.Option(help="How often the training text may be read.", min=1)] = 1,
    length: Annotated[int, typer.Option(help="Tokens per sequence, for text sources.", min=2)] = 4096,
    seed: Seed = 0,
    state: Annotated[
        Path | None, typer.Option(help="Directory for saved states; default: state/ in the output directory.")
    ] = None,
    processes: Annotated[
        int, typer.Option(help="Learn on so many GPUs of a node (0 or 1: in this process); starts torchrun.", min=0)
    ] = 1,
    nodes: Annotated[
        int, typer.Option(help="Learn on so many nodes of a Slurm job, each with --processes.", min=1)
    ] = 1,
    shard: Shard = False,
    wandb: Annotated[str | None, typer.Option(help="Weights & Biases project to log curves to.")] = None,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    key: Key = "",
) -> None:
    """Learn a mask: write mask.safetensors (a MaskSet), curves.parquet and record.json into the output directory.

    An interrupted run goes on from its last state. Several GPUs (`--processes 4`, or a torchrun of your own) compute
    the same as one, faster. The priors are masks of `patch-llm prune`: 2:4, and unstructured at the target.
    proxsparse trains the weights to find a mask for the original ones; fine_tune trains those that a mask keeps.
    """
    processes = max(1, processes)
    if nodes * processes > 1:
        from patch.cluster import launch

        if not launch.started_by_torchrun():
            launch.relaunch(sys.argv[1:], nodes, processes)
        launch.check_processes(nodes, processes)
    import pandas as pd

    from patch.artefacts import atomic_path
    from patch.experiments import Documents
    from patch.learning import Stopped, distributed, learn_masks, train_weights
    from patch.learning.curves import observer
    from patch.methods import Learned, TrainedWeights
    from patch.models import load_model
    from patch.records import Metric, recording
    from patch.sparsity.maskset import MaskSet
    from patch.sparsity.patterns import Pattern

    chosen = trained_method(method, option)
    if shard and not isinstance(chosen, Learned):
        raise PatchError(f"--shard: {method} keeps all weights on every GPU; leave it out.")
    parsed = Pattern.parse(pattern)
    fixed = parsed.fixed_sparsity
    share = fixed if fixed is not None else sparsity / 100
    parsed.check_sparsity(share)
    use_threads(threads)
    with distributed.process_group(device_name(device)) as where, distributed.only_main(exclusive, output):
        arguments = {
            "model": model,
            "revision": revision,
            "dtype": dtype,
            "method": method,
            "options": chosen.model_dump(mode="json"),
            "pattern": str(parsed),
            "sparsity": 100 * share,
            "seed": seed,
            "epochs": epochs,
            "processes": distributed.world_size(),
        }
        states = (state or output / "state") / (key or "by-hand")
        with distributed.only_main(recording, "learn", key, arguments, output) as record:
            loaded = load_model(model, revision=revision, dtype=dtype)
            paths = {"pattern": pattern_mask, "reference": reference_mask, "start": start_mask}
            priors = {role: MaskSet.load(path) for role, path in paths.items() if path}
            sampling, draw = ("documents", Documents().seed) if chosen.text == "documents" else ("packed", None)
            samples = -(-chosen.steps * chosen.batch_size // epochs)
            tokens = tokens_from(training, model, revision, sampling, samples, length, draw)
            try:
                with observer(wandb, arguments) as observe:
                    if isinstance(chosen, Learned):
                        learned = learn_masks(
                            loaded, chosen, parsed, share, tokens, priors, seed=seed, epochs=epochs, device=where,
                            state=states, key=key, observe=observe,
                            sharded=shard or _must_shard(loaded, chosen, parsed, tokens, where),
                        )  # fmt: skip
                    else:
                        assert isinstance(chosen, TrainedWeights)
                        learned = train_weights(
                            loaded, chosen, parsed, tokens, priors, seed=seed, epochs=epochs, device=where,
                            state=states, key=key, observe=observe,
                        )  # fmt: skip
            except Stopped as stopped:
                fail(f"{stopped}; the same command goes on from there.", 128 + stopped.signal)
            if record is not None:
                masks, curves = learned.masks, pd.DataFrame(learned.curves)
                masks.recipe = {**arguments, "training": tokens.protocol}
                with atomic_path(output / "curves.parquet") as temporary:
                    curves.to_parquet(temporary, index=False)
                record.inputs = {"model": masks.base_fingerprint or "", "training": tokens.checksum}
                record.inputs |= {role: prior.checksum for role, prior in priors.items()}
                record.protocol["training"] = tokens.protocol
                record.outputs["mask.safetensors"] = masks.save(output / "mask.safetensors")
                last = curves.tail(max(1, len(curves) // 20))
                record.metrics = [
                    *sparsity_metrics(masks),
                    Metric("model", "train_cross_entropy", float(last["cross_entropy"].mean()), samples=len(last)),
                    Metric("model", "tokens_per_second", float(curves["tokens_per_second"].median())),
                ]
        if distributed.is_main():
            shutil.rmtree(states, ignore_errors=True)
            log.info("%s: %.2f %% of the prunable weights are 0", output / "mask.safetensors", 100 * masks.sparsity)


def _must_shard(
    model: PreTrainedModel, method: Learned, pattern: Pattern, tokens: TokenSet, device: torch.device
) -> bool:
    """Whether learning fits the GPUs only if they share weights and logits."""
    import torch

    from patch.learning import distributed
    from patch.learning.memory import memory_estimate

    if distributed.world_size() == 1 or device.type != "cuda":
        return False
    there = torch.cuda.get_device_properties(device).total_memory / 2**30
    return memory_estimate(model, method, pattern, tokens.ids.shape[1])["sum"] > 0.9 * there
