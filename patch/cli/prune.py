"""Prune a model in one shot."""

from __future__ import annotations

import contextlib
import itertools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from patch.artefacts import PatchError, exclusive
from patch.cli.options import (
    CalibrationSamples,
    CalibrationText,
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
    options_of,
    sparsity_metrics,
    tokens_from,
    use_threads,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from patch.data import TokenSet
    from patch.pruning import Job
    from patch.records import Clock
    from patch.sparsity.maskset import MaskSet

log = logging.getLogger("patch")


def prune(
    model: Model,
    output: Output,
    method: Annotated[
        list[str] | None,
        typer.Option(help="magnitude, wanda, sparsegpt, thanos, random, or released; repeat for more. Default: wanda."),
    ] = None,
    pattern: Annotated[
        list[str] | None, typer.Option(help="N:M, unstructured, or a released mask's tiles; repeat. Default: 2:4.")
    ] = None,
    sparsity: Annotated[
        list[float] | None,
        typer.Option(help="Percent to prune, for patterns that do not fix it; repeat for more. Default: 50."),
    ] = None,
    option: MethodOptions = None,
    calibration: CalibrationText = None,
    released: Annotated[
        Path | None, typer.Option(help="released.json of `prepare released`; by default it is fetched now.")
    ] = None,
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
    """Prune a model: write mask.safetensors (a MaskSet) and record.json into the output directory.

    The model itself is left alone. `patch-llm prune --model gpt-like/model --method wanda --pattern 2:4
    --output out` is a complete call.

    With several methods, patterns or sparsities, all their combinations are made in one pass over the model, each into
    a folder METHOD/SPARSITY-PATTERN of its own; one that fails leaves the others as they are. With
    `--set calibration_inputs=dense` one forward pass feeds them all. `--set METHOD.NAME=VALUE` is for one method only.
    """
    from patch.methods import Released
    from patch.models import load_model
    from patch.pruning import prune_together
    from patch.records import Clock

    wanted = _wanted(method or ["wanda"], pattern or ["2:4"], sparsity or [50.0], option or [], output)
    if key and len(wanted) > 1:
        raise PatchError(f"--key {key}: is that of one mask; {len(wanted)} are asked for.")
    with contextlib.ExitStack() as locks:
        for one in wanted:
            locks.enter_context(exclusive(one.directory))
        use_threads(threads)
        clock = Clock(masks=len(wanted))
        loaded = load_model(model, revision=revision, dtype=dtype)
        tokens = None
        if any(one.job.method.uses_calibration for one in wanted):
            tokens = tokens_from(calibration or "c4", model, revision, sampling, samples, length, seed)
        ours = [one.job for one in wanted if not isinstance(one.job.method, Released)]
        pruned = iter(prune_together(loaded, ours, tokens, device_name(device), seed))
        results = [
            _take(one.job, released, loaded) if isinstance(one.job.method, Released) else next(pruned) for one in wanted
        ]
        errors = {}
        for one, result in zip(wanted, results, strict=True):
            if isinstance(result, PatchError):
                errors[one] = result
            else:
                origin = {"model": model, "revision": revision, "dtype": dtype}
                _write(result, one, origin, seed, tokens, key, clock)
    if len(wanted) == len(errors) == 1:
        raise errors[wanted[0]]
    if errors:
        told = "; ".join(f"{one.directory.relative_to(output)}: {error}" for one, error in errors.items())
        raise PatchError(f"{len(errors)} of {len(wanted)} masks were not made: {told}")


@dataclass(frozen=True)
class _Wanted:
    """A mask, and where it goes."""

    name: str
    """Of the method."""
    job: Job
    directory: Path


def _wanted(
    methods: list[str], patterns: list[str], sparsities: list[float], options: list[str], output: Path
) -> list[_Wanted]:
    """All combinations; those of a pattern that fixes its sparsity once."""
    from patch.methods import make_method
    from patch.pruning import Job
    from patch.sparsity.patterns import Pattern

    found: dict[str, tuple[str, Job]] = {}
    by_method = options_of(methods, options)
    for name, text, percent in itertools.product(methods, patterns, sparsities):
        pattern = Pattern.parse(text)
        share = percent / 100 if pattern.fixed_sparsity is None else pattern.fixed_sparsity
        if not 0 < share < 1:
            raise PatchError(f"--sparsity {percent:g}: must be above 0 and below 100 percent.")
        job = Job(make_method(name, by_method[name]), pattern, share)
        found[f"{name}/{100 * share:g}-{pattern.slug}"] = name, job
    alone = len(found) == 1
    return [_Wanted(name, job, output if alone else output / path) for path, (name, job) in found.items()]


def _take(job: Job, released: Path | None, model: PreTrainedModel) -> MaskSet | PatchError:
    """A mask that somebody else has made."""
    from patch.methods import Released
    from patch.models import prunable_linears
    from patch.pruning.released import ReleasedFile, fetch, released_masks

    method = job.method
    assert isinstance(method, Released)
    try:
        if released:
            found = ReleasedFile.read(released)
        else:
            found = fetch(method.location(100 * job.sparsity), method.file, method.revision)
        return released_masks(found, prunable_linears(model), job.pattern, job.sparsity)
    except PatchError as error:
        return error


def _write(
    masks: MaskSet,
    wanted: _Wanted,
    origin: dict[str, str | None],
    seed: int,
    tokens: TokenSet | None,
    key: str,
    clock: Clock,
) -> None:
    """The mask and, last, its record."""
    from patch.records import recording

    arguments = {
        **origin,
        "method": wanted.name,
        "options": wanted.job.method.model_dump(),
        "pattern": str(wanted.job.pattern),
        "sparsity": 100 * wanted.job.sparsity,
        "seed": seed,
    }
    path = wanted.directory / "mask.safetensors"
    with recording("prune", key, arguments, wanted.directory, clock) as record:
        masks.recipe = {**arguments, "calibration": None, **masks.recipe}
        if "released" in masks.recipe:
            record.inputs["released"] = masks.recipe["released"]["checksum"]
        if tokens and wanted.job.method.uses_calibration:
            record.inputs["calibration"] = tokens.checksum
            record.protocol["calibration"] = masks.recipe["calibration"] = tokens.protocol
        record.outputs[path.name] = masks.save(path)
        record.inputs["model"] = masks.base_fingerprint or ""
        record.metrics = sparsity_metrics(masks)
    log.info("%s: %.2f %% of the prunable weights are 0", path, 100 * masks.sparsity)
