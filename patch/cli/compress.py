"""Quantise a model to 4 bits."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from patch.artefacts import exclusive
from patch.cli.options import (
    CalibrationSamples,
    CalibrationText,
    Device,
    Dtype,
    Key,
    Length,
    Model,
    Output,
    Revision,
    Sampling,
    Seed,
    Threads,
    device_name,
    parse_options,
    tokens_from,
    use_threads,
)

log = logging.getLogger("patch")


def compress(
    model: Model,
    output: Output,
    mask: Annotated[
        Path | None, typer.Option(help="mask.safetensors of `prune` or `learn`; none for the dense model.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--set", help="A setting, e.g. adapter_rank=0.1; repeat for more.")
    ] = None,
    calibration: CalibrationText = None,
    sampling: Sampling = "windows",
    samples: CalibrationSamples = 128,
    length: Length = 2048,
    seed: Seed = 0,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    key: Key = "",
) -> None:
    """Quantise a model's weights to 4 bits: write compressed.safetensors (a CompressedSet) and record.json.

    The model itself is left alone. Only adapters (`--set adapter_rank=0.1`, SLiM-LoRA) look at calibration text.
    """
    from patch.compression.compress import compress_model
    from patch.compression.options import make_compression
    from patch.models import load_model
    from patch.records import Metric, recording
    from patch.sparsity.maskset import MaskSet

    options = make_compression(parse_options(option or []))
    with exclusive(output):
        arguments = {
            "model": model,
            "revision": revision,
            "dtype": dtype,
            "mask": str(mask) if mask else None,
            "options": options.model_dump(exclude={"inputs"}),
            "seed": seed,
        }
        use_threads(threads)
        with recording("compress", key, arguments, output) as record:
            loaded = load_model(model, revision=revision, dtype=dtype)
            masks = MaskSet.load(mask) if mask else None
            tokens = None
            if options.uses_calibration:
                tokens = tokens_from(calibration or "c4", model, revision, sampling, samples, length, seed)
                record.inputs["calibration"] = tokens.checksum
                record.protocol["calibration"] = tokens.protocol
            weights = compress_model(loaded, options, masks, tokens, device_name(device))
            weights.recipe = {
                **arguments,
                "mask_checksum": masks.checksum if masks else None,
                "calibration": tokens.protocol if tokens else None,
            }
            record.outputs["compressed.safetensors"] = weights.save(output / "compressed.safetensors")
            record.inputs["model"] = weights.base_fingerprint or ""
            record.inputs |= {"mask": masks.checksum} if masks else {}
            record.metrics = [Metric("model", "bits_per_weight", weights.bits_per_weight, samples=weights.size)]
        log.info("%s: %.2f bits per prunable weight", output / "compressed.safetensors", weights.bits_per_weight)
