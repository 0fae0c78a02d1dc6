"""Prune a model in one shot."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from patch.artefacts import PatchError, exclusive
from patch.cli.options import (
    Device,
    Dtype,
    Key,
    Length,
    MethodOptions,
    Model,
    Output,
    Revision,
    Sampling,
    Seed,
    Threads,
    device_name,
    parse_options,
    sparsity_metrics,
    tokens_from,
    use_threads,
)

log = logging.getLogger("patch")


def prune(
    model: Model,
    output: Output,
    method: Annotated[str, typer.Option(help="magnitude, wanda, sparsegpt, thanos or random.")] = "wanda",
    pattern: Annotated[str, typer.Option(help="N:M such as 2:4, or unstructured.")] = "2:4",
    sparsity: Annotated[float, typer.Option(help="Percent to prune, for patterns that do not fix it.")] = 50.0,
    option: MethodOptions = None,
    calibration: Annotated[
        str | None, typer.Option(help="Token file of `prepare tokens`, or a text source; default: c4.")
    ] = None,
    sampling: Sampling = "windows",
    samples: Annotated[int, typer.Option(help="Calibration sequences.", min=1)] = 128,
    length: Length = 2048,
    seed: Seed = 0,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    key: Key = "",
) -> None:
    """Prune a model: write mask.safetensors (a MaskSet) and record.json into the output directory.

    The model itself is left alone. `patch-llm prune --model gpt-like/model --method wanda --pattern 2:4
    --output out` is a complete call.
    """
    from patch.methods import make_method
    from patch.models import load_model
    from patch.pruning import prune_model
    from patch.records import recording
    from patch.sparsity.patterns import Pattern

    chosen = make_method(method, parse_options(option or []))
    parsed = Pattern.parse(pattern)
    fixed = parsed.fixed_sparsity
    share = fixed if fixed is not None else sparsity / 100
    if not 0 < share < 1:
        raise PatchError(f"--sparsity {sparsity:g}: must be above 0 and below 100 percent.")
    with exclusive(output):
        arguments = {
            "model": model,
            "revision": revision,
            "dtype": dtype,
            "method": method,
            "options": chosen.model_dump(),
            "pattern": str(parsed),
            "sparsity": 100 * share,
            "seed": seed,
        }
        use_threads(threads)
        with recording("prune", key, arguments, output) as record:
            loaded = load_model(model, revision=revision, dtype=dtype)
            tokens = None
            if chosen.uses_calibration:
                tokens = tokens_from(calibration or "c4", model, revision, sampling, samples, length, seed)
                record.inputs["calibration"] = tokens.checksum
                record.protocol["calibration"] = tokens.protocol
            masks = prune_model(loaded, chosen, parsed, share, tokens, device_name(device), seed)
            masks.recipe = {**arguments, "calibration": tokens.protocol if tokens else None}
            record.outputs["mask.safetensors"] = masks.save(output / "mask.safetensors")
            record.inputs["model"] = masks.base_fingerprint or ""
            record.metrics = sparsity_metrics(masks)
        log.info("%s: %.2f %% of the prunable weights are 0", output / "mask.safetensors", 100 * masks.sparsity)
