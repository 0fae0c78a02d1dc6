"""Time things beside their peers, on this machine."""

from __future__ import annotations

import hashlib
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from patch.artefacts import PatchError, write_text
from patch.cli.options import (
    CalibrationSamples,
    Device,
    Dtype,
    LearnedMethod,
    Length,
    MethodOptions,
    Model,
    Numbers,
    Official,
    RowsFile,
    Shard,
    Threads,
    device_name,
    learned_method,
    parse_counts,
    parse_lengths,
    parse_numbers,
    tokens_from,
    use_threads,
)

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger("patch")
app = typer.Typer(help=__doc__, no_args_is_help=True)


@app.callback()
def benchmark(
    exclusive: Annotated[bool, typer.Option("--exclusive", help="Refuse a GPU that other processes work on.")] = False,
    key: Annotated[
        str, typer.Option(help="Identity of the job: the workflow passes it, for a record.json beside the output.")
    ] = "",
) -> None:
    from patch.benchmarking.replay import check_alone

    if exclusive:
        check_alone()


class Recorded(TyperCommand):
    """A benchmark that writes a record of itself, last of all, where the workflow gave it a key."""

    def invoke(self, context: Any) -> Any:
        from patch.records import recording

        key = context.parent.params["key"]
        if not key:
            return super().invoke(context)
        output: Path = context.params["output"]
        options = {option.opts[0].removeprefix("--"): context.params[option.name] for option in self.params}
        arguments = {"benchmark": self.name, "options": {name: _plain(value) for name, value in options.items()}}
        with recording("benchmark", key, arguments, output.parent) as record:
            result = super().invoke(context)
            record.outputs[output.name] = hashlib.sha256(output.read_bytes()).hexdigest()
        return result


@app.command("learning", cls=Recorded)
def learning(
    output: RowsFile,
    shape: Annotated[list[str], typer.Option(help="qwen2.5-0.5b, llama-3.2-1b or llama-2-7b; repeat for more.")],
    mode: LearnedMethod = "patch_joint",
    setting: Annotated[
        list[str] | None, typer.Option(help="fast, lean or default; repeat for more. Default: fast and lean.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the one sequence in a step.", min=2)] = 4096,
    micro_batches: Annotated[int, typer.Option(help="Sequences per optimiser step.", min=1)] = 1,
    official: Official = None,
) -> None:
    """Cost of a mask-learning step: ours, the official code's, and a dense step without masks."""
    from patch.benchmarking.learning import measure

    for name in shape:
        for row in measure(name, mode, setting or ["fast", "lean"], tokens, official, micro_batches):
            _add_row(output, row)


@app.command("scaling")
def scaling(
    output: RowsFile,
    model: Annotated[str, typer.Option(help="A model, or a shape of `benchmark learning` with random weights.")],
    training: Annotated[str, typer.Option(help="Token file of `prepare tokens`, a text source, or random.")] = "random",
    method: LearnedMethod = "patch_joint",
    option: MethodOptions = None,
    length: Length = 4096,
    shard: Shard = False,
    dtype: Dtype = "bfloat16",
    device: Device = "auto",
) -> None:
    """Learn for a few steps alone or under torchrun: loss and time per step, to compare at equal work."""
    from patch.benchmarking.scaling import measure, with_speedup
    from patch.benchmarking.shapes import SHAPES, random_model, random_tokens, without_priors
    from patch.learning import distributed
    from patch.models import load_model

    chosen = without_priors(learned_method(method, option))
    with distributed.process_group(device_name(device)) as where:
        loaded = random_model(model, where) if model in SHAPES else load_model(model, dtype=dtype)
        wanted = chosen.steps * chosen.batch_size
        tokens = (
            random_tokens(loaded, length)
            if training == "random"
            else tokens_from(training, model, None, "packed", wanted, length, None)
        )
        row = measure(loaded, model, chosen, tokens, device=where, sharded=shard)
        if distributed.is_main():
            _add_row(output, row, with_speedup)


@app.command("curves")
def curves(
    output: Annotated[Path, typer.Option(help="CSV file of the curves.")],
    model: Model,
    training: Annotated[str, typer.Option(help="Token file of `prepare tokens`, or a text source.")],
    pattern_mask: Annotated[Path, typer.Option(help="2:4 mask of `prune`, the prior of the patterns.")],
    reference_mask: Annotated[Path, typer.Option(help="Unstructured mask of `prune`, the prior of the tiles.")],
    official: Annotated[Path, typer.Option(help="Checkout of Paramathic/patch.")],
    method: LearnedMethod = "patch_joint",
    pattern: Annotated[
        str, typer.Option(help="Tiles have to divide all layers for the official code.")
    ] = "tiles:64x64",
    sparsity: Annotated[float, typer.Option(help="Percent to prune.")] = 45.0,
    option: MethodOptions = None,
    seeds: Annotated[int, typer.Option(help="Runs of each.", min=2)] = 3,
    length: Length = 512,
    dtype: Dtype = "bfloat16",
    device: Device = "auto",
) -> None:
    """Loss curves of ours and of the official code from the same start, and how far seeds alone are apart."""
    import torch

    from patch.benchmarking.curves import loss_curves, summary
    from patch.models import load_model
    from patch.sparsity.maskset import MaskSet
    from patch.sparsity.patterns import Pattern

    chosen = learned_method(method, option)
    priors = {"pattern": MaskSet.load(pattern_mask), "reference": MaskSet.load(reference_mask)}
    curves = loss_curves(
        load_model(model, dtype=dtype), chosen, Pattern.parse(pattern), sparsity / 100,
        tokens_from(training, model, None, "packed", chosen.steps * chosen.batch_size, length, None), priors, official,
        seeds=range(seeds), device=torch.device(device_name(device)),
    )  # fmt: skip
    write_text(output, curves.to_csv(index=False))
    log.info("%s", ", ".join(f"{name} {value:.4f}" for name, value in summary(curves).items()))


LAYERS = ["qwen2.5-0.5b", "llama-2-7b"]
"""Whose layers are timed where none are named."""
LayerShapes = Annotated[
    list[str] | None,
    typer.Option(
        "--shape", help=f"A shape of `benchmark learning`, or a layer OUTxIN. Default: {' and '.join(LAYERS)}."
    ),
]


@app.command("pruning", cls=Recorded)
def pruning(
    output: RowsFile,
    shape: LayerShapes = None,
    method: Annotated[
        list[str] | None, typer.Option(help="A one-shot method, or proxsparse; repeat for more. Default: all.")
    ] = None,
    pattern: Annotated[
        list[str] | None,
        typer.Option(help="N:M or unstructured; repeat for more. Default: those of 2:4 and unstructured it can make."),
    ] = None,
    sparsity: Annotated[float, typer.Option(help="Percent to prune, for patterns that do not fix it.")] = 50.0,
    wanda: Annotated[Path | None, typer.Option(help="Checkout of locuslab/wanda to time too.")] = None,
    sparsegpt: Annotated[Path | None, typer.Option(help="Checkout of IST-DASLab/sparsegpt to time too.")] = None,
    thanos: Annotated[Path | None, typer.Option(help="Checkout of vectozavr/thanos to time too.")] = None,
    proxsparse: Annotated[Path | None, typer.Option(help="Checkout of amazon-science/ProxSparse to time too.")] = None,
    samples: CalibrationSamples = 128,
    length: Length = 2048,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Pruning of single layers beside the reference implementations: time, memory, masks, output errors."""
    import torch

    from patch.benchmarking.pruning import makes, measure
    from patch.benchmarking.references import REPOSITORIES
    from patch.sparsity.patterns import Pattern

    use_threads(threads)
    given = {"wanda": wanda, "sparsegpt": sparsegpt, "thanos": thanos, "proxsparse": proxsparse}
    checkouts = {name: path for name, path in given.items() if path}
    for layer in shape or LAYERS:
        for name in method or REPOSITORIES:
            usual = [text for text in ("2:4", "unstructured") if makes(name, Pattern.parse(text))]
            for text in pattern or usual:
                parsed = Pattern.parse(text)
                share = sparsity / 100 if parsed.fixed_sparsity is None else parsed.fixed_sparsity
                for row in measure(
                    layer, name, parsed, share, checkouts,
                    samples=samples, length=length, device=torch.device(device_name(device)),
                ):  # fmt: skip
                    _add_row(output, row)


@app.command("compression")
def compression(
    output: RowsFile,
    shape: LayerShapes = None,
    quantiser: Annotated[
        list[str] | None,
        typer.Option(help="slim_quant, group_absmax or absmax; repeat for more. Default: the first two."),
    ] = None,
    rank: Annotated[
        str, typer.Option(help="Of adapters beside 2:4 weights, as a share; 0: all weights quantised, none pruned.")
    ] = "0,0.1",
    slim: Annotated[Path | None, typer.Option(help="Checkout of Paramathic/slim to time too.")] = None,
    samples: CalibrationSamples = 128,
    length: Length = 2048,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """4-bit weights and adapters of single layers beside SLiM's own code: time, memory, codes, output errors."""
    import torch

    from patch.benchmarking.compression import measure
    from patch.compression.options import make_compression

    use_threads(threads)
    ranks = parse_numbers("--rank", rank)
    for layer in shape or LAYERS:
        for name in quantiser or ["slim_quant", "group_absmax"]:
            for share in ranks:
                options = make_compression({"quantiser": name, "adapter_rank": share})
                for row in measure(
                    layer, options, slim, samples=samples, length=length, device=torch.device(device_name(device))
                ):
                    _add_row(output, row)


@app.command("layers", cls=Recorded)
def layers(
    output: RowsFile,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="A shape of `benchmark learning`, llama-3.1-8b, or a layer OUTxIN. Default: llama-2-7b."),
    ] = None,
    tokens: Numbers = "1,16,64,2048",
    sparsity: Numbers = "25,35,45,50",
    kernel: Annotated[
        list[str] | None,
        typer.Option(help="auto, the one that is chosen, or a kernel's name; repeat for more. Default: auto."),
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="Learned mask instead of random tiles and shapes.")] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Time the dense layer by torch.compile, too; takes seconds per shape.")
    ] = False,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Linear layers with 2:4 tiles beside cuBLAS, cuSPARSELt and torch.compile; says which kernel ran and why."""
    import torch

    from patch.benchmarking.layers import layers_of_masks, measure
    from patch.benchmarking.options import RANDOM
    from patch.benchmarking.shapes import layer_shapes
    from patch.sparsity.maskset import LinearMask, MaskSet

    use_threads(threads)
    cases: list[tuple[tuple[int, int], LinearMask | float]]
    if mask:
        cases = [(layer.shape, layer) for layer in layers_of_masks(MaskSet.load(mask))]
    else:
        sizes = dict.fromkeys(size for name in shape or ["llama-2-7b"] for size in layer_shapes(name, fused=True))
        cases = [(size, percent / 100) for size in sizes for percent in parse_numbers("--sparsity", sparsity)]
    counts = parse_counts("--tokens", tokens)
    where = torch.device(device_name(device))
    for size, layer in cases:
        for row in measure(
            *size, counts, layer, kernel or ["auto"], where,
            compiled=compiled, mask_name=str(mask) if mask else RANDOM,
        ):  # fmt: skip
            _add_row(output, row)


@app.command("generation", cls=Recorded)
def generation(
    output: RowsFile,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="A shape of `benchmark layers`, repeat for more; with --mask, its model. Default: llama-2-7b."
        ),
    ] = None,
    batch: Annotated[str, typer.Option(help="Sequences at a time; numbers, separated by commas.")] = "16",
    length: Annotated[
        str, typer.Option(help="Tokens of the prompt + tokens to generate, such as 128+128,128+1024.")
    ] = "128+128",
    sparsity: Numbers = "25,35,45",
    mask: Annotated[Path | None, typer.Option(help="Learned mask instead of random tiles and weights.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Both sides through torch.compile.")] = False,
    fused: Annotated[
        str, typer.Option(help="Which sides compute query, key, value (gate, up) by one product: both, hybrid or none.")
    ] = "both",
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Greedy generation, dense and with 2:4 tiles: prefill, decoding, both, and memory."""
    from patch.benchmarking.generation import measure
    from patch.benchmarking.options import RANDOM
    from patch.benchmarking.shapes import SHAPES, random_model
    from patch.models import load_model
    from patch.sparsity.maskset import MaskSet

    use_threads(threads)
    names = shape or ["llama-2-7b"]
    if mask and len(names) != 1:
        raise PatchError(f"--mask {mask}: give the one model that it belongs to as --shape, not {len(names)}.")
    where = device_name(device)
    masks: list[tuple[str, float | MaskSet]] = (
        [(str(mask), MaskSet.load(mask))]
        if mask
        else [(RANDOM, percent / 100) for percent in parse_numbers("--sparsity", sparsity)]
    )
    batches, lengths = parse_counts("--batch", batch), parse_lengths("--length", length)

    def make(name: str) -> Any:
        return random_model(name, where) if name in SHAPES else load_model(name, dtype="bfloat16").to(where)  # type: ignore[arg-type]

    for name in names:
        for row in measure(
            name, partial(make, name), masks, batches=batches, lengths=lengths, compiled=compiled, fused=fused
        ):
            _add_row(output, row)


@app.command("memory", cls=Recorded)
def memory(
    output: RowsFile,
    model: Annotated[str, typer.Option(help="A model, or a shape of `benchmark layers` with random weights.")],
    mask: Annotated[Path | None, typer.Option(help="Mask of the model; random tiles if not given.")] = None,
    sparsity: Numbers = "25,35,45",
    dtype: Dtype = "bfloat16",
    device: Device = "auto",
) -> None:
    """Size of a model's linear layers, dense and with 2:4 tiles packed, and the time to pack them."""
    from patch.benchmarking.memory import measure
    from patch.benchmarking.options import RANDOM
    from patch.benchmarking.shapes import SHAPES, random_masks, random_model
    from patch.models import load_model
    from patch.sparsity.maskset import MaskSet

    where = device_name(device)
    for percent in [None] if mask else parse_numbers("--sparsity", sparsity):
        loaded = random_model(model, where) if model in SHAPES else load_model(model, dtype=dtype).to(where)  # type: ignore[arg-type]
        masks = MaskSet.load(mask) if mask else random_masks(loaded, (percent or 0) / 100)
        _add_row(output, measure(model, loaded, masks, str(mask) if mask else RANDOM))


@app.command("join")
def join(
    parts: Annotated[list[Path], typer.Argument(help="Files of one benchmark.", exists=True, dir_okay=False)],
    output: Annotated[Path, typer.Option(help="CSV file with the rows of all.")],
) -> None:
    """Rows of several runs in one file."""
    import pandas as pd

    tables = [pd.read_csv(part) for part in parts]
    write_text(output, pd.concat(tables, ignore_index=True).to_csv(index=False))


def _plain(value: Any) -> Any:
    """As JSON has it."""
    return str(value) if isinstance(value, Path) else value


def _add_row(output: Path, row: dict[str, Any], complete: Callable[[Any], Any] = lambda rows: rows) -> None:
    import pandas as pd

    before = pd.read_csv(output) if output.exists() else pd.DataFrame()
    write_text(output, complete(pd.concat([before, pd.DataFrame([row])], ignore_index=True)).to_csv(index=False))
    log.info("%s", ", ".join(f"{key} {value}" for key, value in row.items()))
