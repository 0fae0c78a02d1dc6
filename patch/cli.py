"""The command line: one command per stage, with typed options. Everything a rule of the workflow runs is here.

Results go to files, the log to standard error, tables to standard output. A PatchError ends a command with
one line; heavy imports happen inside the commands, so that --help is instant.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patch.artefacts import PatchError, exclusive, write_json, write_text

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from transformers import PreTrainedModel

    from patch.data import TokenSet
    from patch.methods import Learned
    from patch.records import Metric
    from patch.sparsity.maskset import MaskSet
    from patch.sparsity.patterns import Pattern

log = logging.getLogger("patch")

app = typer.Typer(
    name="patch-llm",
    help="Prune language models to any sparsity from 0 to 50 % and measure what it costs (PATCH, arXiv 2509.23410).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
prepare = typer.Typer(help="Bring models, tokens and questions to this machine.", no_args_is_help=True)
config = typer.Typer(help="Look at config files.", no_args_is_help=True)
benchmark = typer.Typer(help="Time things beside their peers, on this machine.", no_args_is_help=True)
cluster = typer.Typer(help="Look at a Slurm cluster.", no_args_is_help=True)
app.add_typer(prepare, name="prepare")
app.add_typer(benchmark, name="benchmark")
app.add_typer(config, name="config")
app.add_typer(cluster, name="cluster")

Model = Annotated[
    str, typer.Option(help="Hub id, directory, `embedded:smollm2-135m`, or a model.json of `prepare model`.")
]
Revision = Annotated[str | None, typer.Option(help="Commit, tag or branch on the hub.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto for the one it was saved in.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto for a GPU where there is one.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; all cores if not given.", min=1)]
Output = Annotated[Path, typer.Option(help="Directory for results; made if missing.")]
Key = Annotated[str, typer.Option(help="Identity to store in the record; the workflow passes its cell key.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Sampling = Annotated[
    str, typer.Option(help="windows (of documents that are long enough), packed, or joined (for perplexity).")
]
Samples = Annotated[int | None, typer.Option(help="Number of sequences; all if not given.", min=1)]
Length = Annotated[int, typer.Option(help="Tokens per sequence.", min=2)]
Configs = Annotated[list[Path], typer.Option("--config", help="Config layer; repeat for more, later ones win.")]
Override = Annotated[str, typer.Option(help="A last config layer as JSON.")]
Runs = Annotated[Path, typer.Argument(help="The runs table, runs.parquet, of `collect`.")]
MethodOptions = Annotated[
    list[str] | None, typer.Option("--set", help="A hyper-parameter, NAME=VALUE; repeat for more.")
]
LearnedMethod = Annotated[str, typer.Option(help="maskllm, patch_joint or patch_tile.")]
Shard = Annotated[
    bool, typer.Option(help="Split weights and logits over all processes; `learn` does where they do not fit one.")
]
RowsFile = Annotated[Path, typer.Option(help="CSV file to add rows to.")]
Official = Annotated[Path | None, typer.Option(help="Checkout of Paramathic/patch to time too.")]


@prepare.command("model")
def prepare_model(
    model: Model,
    output: Annotated[Path, typer.Option(help="File to write: where the model lies and what it is.")],
    revision: Revision = None,
    dtype: Dtype = "auto",
) -> None:
    """Download or convert a model, and describe it in a small JSON file that other commands take as --model."""
    from patch import models

    prepared = models.prepare_model(model, revision, dtype)
    prepared.write(output)
    log.info(
        "%s: %.1f M parameters, %.1f M prunable", model, prepared.parameters / 1e6, prepared.prunable_parameters / 1e6
    )


@prepare.command("tokens")
def prepare_tokens(
    model: Model,
    source: Annotated[
        str, typer.Option(help="c4, wikitext2, slimpajama, embedded:c4, embedded:wikipedia, self, or a file.")
    ],
    output: Annotated[Path, typer.Option(help="File to write, .safetensors.")],
    sampling: Sampling = "windows",
    length: Length = 2048,
    samples: Samples = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the draw; none for text in order.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences sampled together, for `self`.", min=1)] = 256,
    device: Device = "auto",
) -> None:
    """Tokenise text once, so that every method sees the same tokens; `--source self` samples it from the model."""
    from patch.data import generate_tokens, make_tokens
    from patch.models import load_model, load_tokenizer

    if source == "self":
        if samples is None:
            raise PatchError("--source self: say with --samples how many sequences to sample.")
        loaded = load_model(model).to(_device(device))  # type: ignore[arg-type]
        bos = load_tokenizer(model).bos_token_id
        sampled = generate_tokens(
            loaded, samples=samples, length=length, seed=seed or 0, batch_size=batch_size, bos=bos
        )
        sampled.save(output)
        return
    tokens = make_tokens(load_tokenizer(model), source, sampling=sampling, length=length, samples=samples, seed=seed)
    tokens.save(output)


@prepare.command("tasks")
def prepare_tasks(
    names: Annotated[list[str], typer.Argument(help="Task names of lm-evaluation-harness.")],
    output: Annotated[Path, typer.Option(help="File to write: what was brought.")],
    source: Annotated[str, typer.Option(help="hub or embedded.")] = "hub",
) -> None:
    """Bring the questions of zero-shot tasks to this machine, for nodes without network."""
    from patch.evaluation.zeroshot import TaskLibrary

    library = TaskLibrary(names, source)
    for name in names:
        log.info("questions of %s", name)
        library.download(name)
    write_json(output, {"schema": "patch.tasks/1", "source": source, "names": names})


@app.command()
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

    chosen = make_method(method, _options(option or []))
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
        _use_threads(threads)
        with recording("prune", key, arguments, output) as record:
            loaded = load_model(model, revision=revision, dtype=dtype)
            tokens = None
            if chosen.uses_calibration:
                tokens = _tokens(calibration or "c4", model, revision, sampling, samples, length, seed)
                record.inputs["calibration"] = tokens.checksum
                record.protocol["calibration"] = tokens.protocol
            masks = prune_model(loaded, chosen, parsed, share, tokens, _device(device), seed)
            masks.recipe = {**arguments, "calibration": tokens.protocol if tokens else None}
            record.outputs["mask.safetensors"] = masks.save(output / "mask.safetensors")
            record.inputs["model"] = masks.base_fingerprint or ""
            record.metrics = _sparsity_metrics(masks)
        log.info("%s: %.2f %% of the prunable weights are 0", output / "mask.safetensors", 100 * masks.sparsity)


@app.command()
def learn(
    model: Model,
    output: Output,
    training: Annotated[str, typer.Option(help="Token file of `prepare tokens`, or a text source such as slimpajama.")],
    method: LearnedMethod = "patch_joint",
    pattern: Annotated[str, typer.Option(help="2:4 for maskllm, tiles:HEIGHTxWIDTH for the others.")] = "tiles:128x128",
    sparsity: Annotated[float, typer.Option(help="Percent to prune, 0 to 50; 2:4 fixes it.")] = 45.0,
    option: MethodOptions = None,
    pattern_mask: Annotated[
        Path | None, typer.Option(help="2:4 mask of `prune` or `learn`: prior of the patterns, or what is frozen.")
    ] = None,
    reference_mask: Annotated[
        Path | None, typer.Option(help="Unstructured mask of `prune` at the target sparsity: prior of the tiles.")
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
    """
    processes = max(1, processes)
    if nodes * processes > 1:
        from patch.cluster import launch

        if not launch.started_by_torchrun():
            launch.relaunch(sys.argv[1:], nodes, processes)
        launch.check_processes(nodes, processes)
    import pandas as pd

    from patch.artefacts import atomic_path
    from patch.learning import Stopped, distributed, learn_masks
    from patch.learning.curves import observer
    from patch.models import load_model
    from patch.records import Metric, recording
    from patch.sparsity.maskset import MaskSet
    from patch.sparsity.patterns import Pattern

    chosen = _learned_method(method, option)
    parsed = Pattern.parse(pattern)
    fixed = parsed.fixed_sparsity
    share = fixed if fixed is not None else sparsity / 100
    parsed.check_sparsity(share)
    _use_threads(threads)
    with distributed.process_group(_device(device)) as where, distributed.only_main(exclusive, output):
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
            paths = {"pattern": pattern_mask, "reference": reference_mask}
            priors = {role: MaskSet.load(path) for role, path in paths.items() if path}
            tokens = _tokens(training, model, revision, "packed", chosen.steps * chosen.batch_size, length, None)
            try:
                with observer(wandb, arguments) as observe:
                    learned = learn_masks(
                        loaded, chosen, parsed, share, tokens, priors, seed=seed, epochs=epochs, device=where,
                        state=states, key=key, observe=observe,
                        sharded=shard or _must_shard(loaded, chosen, parsed, tokens, where),
                    )  # fmt: skip
            except Stopped as stopped:
                _fail(f"{stopped}; the same command goes on from there.", 128 + stopped.signal)
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
                    *_sparsity_metrics(masks),
                    Metric("model", "train_cross_entropy", float(last["cross_entropy"].mean()), samples=len(last)),
                    Metric("model", "tokens_per_second", float(curves["tokens_per_second"].median())),
                ]
        if distributed.is_main():
            shutil.rmtree(states, ignore_errors=True)
            log.info("%s: %.2f %% of the prunable weights are 0", output / "mask.safetensors", 100 * masks.sparsity)


@app.command()
def evaluate(
    model: Model,
    output: Output,
    mask: Annotated[Path | None, typer.Option(help="mask.safetensors of `prune`; none for the dense model.")] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="NAME=TOKENS for perplexity: a token file or a text source, e.g. wikitext2=wikitext2."),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens per window, for text sources.", min=2)] = 4096,
    task: Annotated[list[str] | None, typer.Option(help="A zero-shot task; repeat for more.")] = None,
    task_source: Annotated[str, typer.Option(help="Where questions come from: hub or embedded.")] = "hub",
    limit: Annotated[int | None, typer.Option(help="Only the first questions of every task.", min=1)] = None,
    limit_for: Annotated[list[str] | None, typer.Option(help="TASK=N, another limit for one task.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions scored together.", min=1)] = 8,
    state: Annotated[
        Path | None, typer.Option(help="Directory for finished parts; default: state/ in the output directory.")
    ] = None,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    key: Key = "",
) -> None:
    """Measure a model, pruned or dense, on texts and tasks: write record.json and items.parquet."""
    import pandas as pd

    from patch.artefacts import atomic_path
    from patch.evaluation import evaluate_model
    from patch.experiments import Tasks
    from patch.models import load_model, load_tokenizer, prunable_linears
    from patch.records import recording
    from patch.sparsity.maskset import MaskSet, fingerprint

    if not text and not task:
        raise PatchError("nothing to measure: give at least one --text or --task.")
    limits = {name: _integer(name, value) for name, value in _pairs(limit_for or [], "--limit-for").items()}
    tasks = (
        Tasks(names=tuple(task), source=task_source, limit=limit, limits=limits, batch_size=batch_size)
        if task
        else None
    )
    with exclusive(output):
        arguments = {
            "model": model,
            "revision": revision,
            "dtype": dtype,
            "mask": str(mask) if mask else None,
            "texts": text,
            "tasks": tasks.model_dump() if tasks else None,
        }
        _use_threads(threads)
        with recording("evaluate", key, arguments, output) as record:
            loaded = load_model(model, revision=revision, dtype=dtype)
            linears = prunable_linears(loaded)
            record.inputs["model"] = fingerprint(linears)
            if mask:
                masks = MaskSet.load(mask)
                masks.apply_(linears)
                record.inputs["mask"] = masks.checksum
            loaded.to(_device(device))  # type: ignore[arg-type]
            texts = {
                name: _tokens(source, model, revision, "joined", None, length, None)
                for name, source in _pairs(text or [], "--text").items()
            }
            tokenizer = load_tokenizer(model, revision=revision)
            results = evaluate_model(loaded, tokenizer, texts, tasks, state or output / "state")
            record.metrics = [metric for result in results.values() for metric in result.metrics]
            record.protocol = {name: result.protocol for name, result in results.items()}
            items = pd.DataFrame([item for result in results.values() for item in result.items])
            with atomic_path(output / "items.parquet") as temporary:
                items.to_parquet(temporary, index=False)
    for metric in record.metrics:
        error = f" ± {metric.stderr:.2g}" if metric.stderr is not None else ""
        log.info("%-14s %-10s %.4g%s", metric.subject, metric.name, metric.value, error)


@app.command()
def collect(
    config: Configs,
    output: Annotated[Path, typer.Option(help="Runs table to write, .parquet; .csv and curves come beside it.")],
    override: Override = "{}",
    results: Annotated[Path, typer.Option(help="Directory that holds the experiment's folder.")] = Path("results"),
) -> None:
    """Gather the records of an experiment into one tidy table, and the curves of learned cells into another.

    Cells that are not finished are listed as missing.
    """
    from patch import collect as collecting
    from patch.experiments import load_experiment

    experiment = load_experiment(config, json.loads(override))
    table = collecting.collect(experiment, results)
    collecting.write_runs(table, output)
    collecting.write_curves(collecting.collect_curves(experiment, results), output)
    write_json(output.with_name("experiment.json"), experiment.model_dump(mode="json"))
    counts = table.drop_duplicates("cell")["status"].value_counts()
    log.info("%s: %s", output, ", ".join(f"{number} cells {status}" for status, number in counts.items()))


@app.command()
def tables(runs: Runs, output: Output) -> None:
    """Write every table as CSV, Markdown and LaTeX."""
    from patch.collect import read_runs
    from patch.reporting.tables import write_tables

    for path in write_tables(read_runs(runs), output):
        log.info("%s", path)


@app.command()
def figures(runs: Runs, output: Output) -> None:
    """Draw every figure as PDF and PNG."""
    from patch.collect import read_curves, read_runs
    from patch.reporting.figures import write_figures

    for path in write_figures(read_runs(runs), read_curves(runs), output):
        log.info("%s", path)


@app.command()
def mlflow(
    runs: Runs,
    uri: Annotated[str, typer.Option(help="MLflow tracking store.")] = "sqlite:///results/mlflow.db",
    artifact: Annotated[list[Path] | None, typer.Option(help="File to attach; repeat for more.")] = None,
    output: Annotated[Path | None, typer.Option(help="File to write: what was done.")] = None,
) -> None:
    """Write the runs table to MLflow. Doing it again changes nothing; changed results replace old ones."""
    from patch.collect import read_curves, read_runs
    from patch.reporting.tracking import track

    counts = track(read_runs(runs), read_curves(runs), uri, artifact or [])
    log.info("%s: %s", uri, ", ".join(f"{number} runs {what}" for what, number in counts.items()))
    if output:
        write_json(output, {"uri": uri, **counts})


@app.command()
def show(runs: Runs) -> None:
    """Print the accuracy table in the terminal."""
    from rich.console import Console

    from patch.collect import read_runs
    from patch.reporting.published import load_accuracy
    from patch.reporting.tables import accuracy, render_terminal

    Console().print(render_terminal(accuracy(read_runs(runs), load_accuracy())))


@app.command()
def status(
    config: Configs,
    override: Override = "{}",
    results: Annotated[Path, typer.Option(help="Directory that holds the experiment's folder.")] = Path("results"),
    verbose: Annotated[bool, typer.Option("--all", help="List also what is done and what waits.")] = False,
) -> None:
    """Print how far a grid is: what is done, what Slurm runs (with its id), what failed (with its log), what waits.

    Reads only; the grid may run meanwhile.
    """
    from rich.console import Console
    from rich.table import Table

    from patch.cluster.queue import Queue
    from patch.cluster.status import grid_status
    from patch.experiments import load_experiment

    experiment = load_experiment(config, json.loads(override))
    stages = grid_status(experiment, results, slurm=Queue() if shutil.which("squeue") else None)
    counts = {word: [stage.word for stage in stages].count(word) for word in dict.fromkeys(s.word for s in stages)}
    console = Console(width=None if sys.stdout.isatty() else 200)  # so that a captured log names files in full
    console.print(f"{experiment.name}: {', '.join(f'{number} {word}' for word, number in counts.items())}")
    table = Table(box=None)
    for name in ("stage", "cell", "state", "Slurm job", "", "log"):
        table.add_column(name, overflow="fold")
    for stage in stages:
        if verbose or stage.word not in ("done", "waiting"):
            table.add_row(stage.stage, stage.cell, stage.word, stage.job, stage.detail, stage.log)
    if table.rows:
        console.print(table)


@cluster.command("check")
def cluster_check(
    partition: Annotated[list[str] | None, typer.Option(help="Only this one; repeat for more.")] = None,
    site: Annotated[Path | None, typer.Option(help="Site settings; default: $PATCH_SITE, or slurm/site.yaml.")] = None,
    folder: Annotated[Path, typer.Option(help="A folder that this machine and the nodes share.")] = Path("logs/check"),
    patience: Annotated[int, typer.Option(help="Seconds to wait for jobs to start.", min=1)] = 600,
) -> None:
    """Submit a tiny job per partition and kind of GPU; print what each found and how soon it started."""
    from rich.console import Console
    from rich.table import Table

    from patch.cluster.check import check
    from patch.cluster.site import load_site

    table = Table(
        "partition", "GPU asked for", "node", "started after", "torch", "CUDA", "GPUs seen", "problem", box=None
    )
    failed = False
    for finding in check(load_site(site), folder, partition or [], patience):
        problem, found = finding.problem, finding.found
        if found and not found["shared"]:
            problem = f"does not see {folder.absolute()}: not on a shared file system"
        elif found and not found["torch"]:
            problem = f"cannot import torch with the setup of the site settings: {found['error']}"
        torch_version, cuda, gpus = json.loads(found["torch"]) if found and found["torch"] else ("", "", [])
        if not problem and finding.place.gpu is not None and not gpus:
            problem = f"PyTorch sees no GPU (CUDA_VISIBLE_DEVICES={found['visible']!r})"
        asked = {None: "none", "": "any"}.get(finding.place.gpu, finding.place.gpu)
        started = f"{finding.seconds:.0f} s" if finding.seconds is not None else ""
        table.add_row(
            finding.place.partition, asked, found.get("node", ""), started, torch_version, cuda or "", ", ".join(gpus),
            problem or "none",
        )  # fmt: skip
        failed = failed or bool(problem)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    if failed:
        sys.exit(1)


@benchmark.command("learning")
def benchmark_learning(
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


@benchmark.command("scaling")
def benchmark_scaling(
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

    chosen = without_priors(_learned_method(method, option))
    with distributed.process_group(_device(device)) as where:
        loaded = random_model(model, where) if model in SHAPES else load_model(model, dtype=dtype)
        wanted = chosen.steps * chosen.batch_size
        tokens = (
            random_tokens(loaded, length)
            if training == "random"
            else _tokens(training, model, None, "packed", wanted, length, None)
        )
        row = measure(loaded, model, chosen, tokens, device=where, sharded=shard)
        if distributed.is_main():
            _add_row(output, row, with_speedup)


@benchmark.command("curves")
def benchmark_curves(
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

    chosen = _learned_method(method, option)
    priors = {"pattern": MaskSet.load(pattern_mask), "reference": MaskSet.load(reference_mask)}
    curves = loss_curves(
        load_model(model, dtype=dtype), chosen, Pattern.parse(pattern), sparsity / 100,
        _tokens(training, model, None, "packed", chosen.steps * chosen.batch_size, length, None), priors, official,
        seeds=range(seeds), device=torch.device(_device(device)),
    )  # fmt: skip
    write_text(output, curves.to_csv(index=False))
    log.info("%s", ", ".join(f"{name} {value:.4f}" for name, value in summary(curves).items()))


@benchmark.command("pruning")
def benchmark_pruning(
    output: RowsFile,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="A shape of `benchmark learning`, or a layer OUTxIN. Default: qwen2.5-0.5b and llama-2-7b."),
    ] = None,
    method: Annotated[list[str] | None, typer.Option(help="A one-shot method; repeat for more. Default: all.")] = None,
    pattern: Annotated[
        list[str] | None, typer.Option(help="N:M or unstructured; repeat for more. Default: 2:4 and unstructured.")
    ] = None,
    sparsity: Annotated[float, typer.Option(help="Percent to prune, for patterns that do not fix it.")] = 50.0,
    wanda: Annotated[Path | None, typer.Option(help="Checkout of locuslab/wanda to time too.")] = None,
    sparsegpt: Annotated[Path | None, typer.Option(help="Checkout of IST-DASLab/sparsegpt to time too.")] = None,
    thanos: Annotated[Path | None, typer.Option(help="Checkout of vectozavr/thanos to time too.")] = None,
    samples: Annotated[int, typer.Option(help="Calibration sequences.", min=1)] = 128,
    length: Length = 2048,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """One-shot pruning of single layers beside the reference implementations: time, memory, masks, output errors."""
    import torch

    from patch.benchmarking.pruning import measure
    from patch.benchmarking.references import REPOSITORIES
    from patch.sparsity.patterns import Pattern

    _use_threads(threads)
    given = {"wanda": wanda, "sparsegpt": sparsegpt, "thanos": thanos}
    checkouts = {name: path for name, path in given.items() if path}
    for layer in shape or ["qwen2.5-0.5b", "llama-2-7b"]:
        for name in method or REPOSITORIES:
            for text in pattern or ["2:4", "unstructured"]:
                parsed = Pattern.parse(text)
                share = sparsity / 100 if parsed.fixed_sparsity is None else parsed.fixed_sparsity
                for row in measure(
                    layer, name, parsed, share, checkouts,
                    samples=samples, length=length, device=torch.device(_device(device)),
                ):  # fmt: skip
                    _add_row(output, row)


def _add_row(output: Path, row: dict[str, Any], complete: Callable[[Any], Any] = lambda rows: rows) -> None:
    import pandas as pd

    before = pd.read_csv(output) if output.exists() else pd.DataFrame()
    write_text(output, complete(pd.concat([before, pd.DataFrame([row])], ignore_index=True)).to_csv(index=False))
    log.info("%s", ", ".join(f"{key} {value}" for key, value in row.items()))


def _learned_method(name: str, options: list[str] | None) -> Learned:
    from patch.methods import Learned, make_method

    chosen = make_method(name, _options(options or []))
    if not isinstance(chosen, Learned):
        raise PatchError(f"method {name!r}: does not learn; use `patch-llm prune`.")
    return chosen


@config.command("check")
def config_check(config: Configs, override: Override = "{}") -> None:
    """Validate a config and print the grid it expands to."""
    from patch.experiments import load_experiment

    typer.echo(load_experiment(config, json.loads(override)).expand().summary())


@config.command("name")
def config_name(config: Configs) -> None:
    """Print an experiment's name, which is its folder below results/."""
    from patch.experiments import load_experiment

    typer.echo(load_experiment(config).name)


@config.command("docs")
def config_docs(
    output: Annotated[Path, typer.Option(help="Directory for schema.json and options.md.")] = Path("workflow/config"),
) -> None:
    """Write the JSON schema of configs and the page of all keys, both generated from the code."""
    from patch.experiments import options_markdown, schema

    write_json(output / "schema.json", schema())
    write_text(output / "options.md", options_markdown())


def main() -> None:
    """Run the command line; errors that a person can mend end in one line."""
    # Before any library reads them: no progress bars in logs, no network for telemetry.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for name in ("httpx", "lm_eval", "datasets", "fsspec", "filelock", "matplotlib", "fontTools", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        app()
    except PatchError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("stopped; finished parts are kept, the same command goes on from there.", 130)
    except OSError as error:
        if error.errno != 28:
            raise
        _fail(f"{error.filename or 'disk'}: no space left; free some and run the same command again.")
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        _fail(f"out of GPU memory ({str(error).splitlines()[0]}); use --device cpu, a smaller batch, or a larger GPU.")


def _fail(message: str, code: int = 1) -> None:
    typer.echo(f"patch-llm: error: {' '.join(message.split())}", err=True)
    sys.exit(code)


def _sparsity_metrics(masks: MaskSet) -> list[Metric]:
    """Realised sparsity of the model and of every layer."""
    from patch.records import Metric

    sizes = {name: mask.size for name, mask in masks.linears.items()}
    return [
        Metric("model", "sparsity", masks.sparsity, samples=sum(sizes.values())),
        *(Metric(name, "sparsity", mask.sparsity, samples=sizes[name]) for name, mask in masks.linears.items()),
    ]


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


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise PatchError("--device cuda: PyTorch sees no GPU here; use --device cpu, or a CUDA build of PyTorch.")
    return name


def _use_threads(threads: int | None) -> None:
    import torch

    if threads:
        torch.set_num_threads(threads)


def _tokens(
    source: str, model: str, revision: str | None, sampling: str, samples: int | None, length: int, seed: int | None
) -> TokenSet:
    """A token file as it is, or tokens made from a text source now."""
    from patch.data import TokenSet, make_tokens
    from patch.models import load_tokenizer

    if source.endswith(".safetensors"):
        return TokenSet.load(source)
    tokenizer = load_tokenizer(model, revision=revision)
    return make_tokens(tokenizer, source, sampling=sampling, length=length, samples=samples, seed=seed)


def _options(pairs: list[str]) -> dict[str, Any]:
    import yaml

    return {name: yaml.safe_load(value) for name, value in _pairs(pairs, "--set").items()}


def _pairs(texts: list[str], option: str) -> dict[str, str]:
    for text in texts:
        if "=" not in text:
            raise PatchError(f"{option} {text}: write it as NAME=VALUE.")
    return dict(text.split("=", 1) for text in texts)


def _integer(name: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise PatchError(f"--limit-for {name}={value}: the limit must be a whole number.") from None
